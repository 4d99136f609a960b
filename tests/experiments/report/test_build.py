"""A report is whole, the same every time, and replaces nothing but a report."""

from __future__ import annotations

import re
import sqlite3
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.cli import main
from fedlora.errors import StoreError
from fedlora.experiments.report import build_report, read_results
from fedlora.experiments.report.build import LISTED
from fedlora.experiments.report.style import COLOURS, EpsilonAxis
from fedlora.experiments.runs.stored_run import StoredRun

ALWAYS = {"report.html", "tables.md", "metric.csv", "differences.csv", "costs.csv", "runs.csv"}


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def candidates(chosen: tuple[bool, bool]) -> list[dict[str, Any]]:
    places = (("query", chosen[0]), ("value", chosen[1]))
    return [{"module": f"m.{kind}", "layer": 0, "type": kind, "selected": taken} for kind, taken in places]


@pytest.fixture
def full(stored: Callable[..., StoredRun]) -> list[StoredRun]:
    """Runs whose records have something for every figure."""
    slots = [{"name": "m.query/B", "layer": 0, "kind": "query", "energy": 2.0, "noise_energy": 1.0}]
    return [
        stored(
            0.8 + seed / 100,
            method=method,
            seed=seed,
            slots=slots,
            selection={"candidates": candidates((True, seed == 0))} if method == "search" else None,
        )
        for method in ("plain", "search")
        for seed in range(2)
    ]


def test_everything_is_written_and_the_same_bytes_every_time(
    folder_of: Callable[..., Path], full: list[StoredRun], tmp_path: Path
) -> None:
    folder = folder_of(full)
    page = build_report(folder, tmp_path / "one")
    build_report(folder, tmp_path / "two")
    figures = ("metric_by_epsilon", "metric_by_bytes", "learning_curves_1_sst2", "modules_1_sst2")
    figures += ("noise_by_layer_1_sst2",)
    assert names(page.parent) == ALWAYS | {LISTED} | {f"{name}.{kind}" for name in figures for kind in ("png", "svg")}
    for name in names(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    for drawing in page.parent.glob("*.svg"):
        ElementTree.parse(drawing)


def test_figures_without_facts_are_left_out(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun], tmp_path: Path
) -> None:
    build_report(folder_of([stored(rounds=[], bytes_up=None)]), tmp_path / "out")
    assert names(tmp_path / "out") == ALWAYS | {LISTED, "metric_by_epsilon.png", "metric_by_epsilon.svg"}


def test_an_earlier_report_is_replaced_and_other_files_stay(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    folder = folder_of([stored(0.1)])
    build_report(folder, out)
    (out / "notes.txt").write_text("mine")
    folder_of([stored(0.2, rounds=[])])  # the same run, without a curve this time
    build_report(folder, out)
    assert "0.2000" in (out / "tables.md").read_text()
    assert not list(out.glob("learning_curves*"))
    assert (out / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".report-*"))


@pytest.mark.parametrize("name", ["thesis.tex", "tables.md"])
def test_what_is_no_report_is_not_overwritten(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(StoreError, match="no report of fedlora"):
        build_report(folder_of([stored()]), out)
    assert [(file.name, file.read_text()) for file in out.iterdir()] == [(name, "mine")]


def test_a_file_with_the_name_of_a_new_figure_is_not_overwritten(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun], tmp_path: Path
) -> None:
    folder, out = folder_of([stored(rounds=[])]), tmp_path / "out"
    build_report(folder, out)
    (out / "learning_curves_1_sst2.png").write_text("mine")
    folder_of([stored()])
    with pytest.raises(StoreError, match="no part of the earlier report"):
        build_report(folder, out)
    assert (out / "learning_curves_1_sst2.png").read_text() == "mine"


def test_a_list_of_files_that_was_tampered_with_removes_nothing_elsewhere(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun], tmp_path: Path
) -> None:
    (tmp_path / "precious").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / LISTED).write_text("../precious\n/etc/hostname\n..\n")
    build_report(folder_of([stored()]), out)
    assert (tmp_path / "precious").exists()


def test_a_run_of_seconds_from_the_command_line(
    folder_of: Callable[..., Path],
    sweep_runs: list[StoredRun],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = folder_of(sweep_runs)
    assert run(monkeypatch, "report", folder / "runs.sqlite") == 0
    said = capsys.readouterr().out
    assert "0.8000 ± 0.0036 (3)" in said
    assert "report.html" in said
    assert (folder / "report" / "report.html").exists()


@pytest.mark.parametrize(
    ("width", "epsilons", "shown"),
    [
        (100, 4, "0.8000 ± 0.0100 (3)"),
        (80, 3, "0.8000 ± 0.0100 (3)"),
        (80, 4, "0.8000 ± 0.0100"),
        (80, 7, "0.8000"),
        (50, 4, "0.8000"),
    ],
)
def test_no_value_is_folded_in_a_terminal(
    folder_of: Callable[..., Path],
    stored: Callable[..., StoredRun],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    width: int,
    epsilons: int,
    shown: str,
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": str(width)}.items():
        monkeypatch.setenv(name, value)
    asked = [*(float(number) for number in range(1, epsilons)), "inf"]
    runs = [
        stored(0.79 + seed / 100, method=method, epsilon=epsilon, seed=seed)
        for method in ("plain", "with fixed shapes")
        for epsilon in asked
        for seed in range(3)
    ]
    assert run(monkeypatch, "report", folder_of(runs)) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    (row,) = [line for line in text.splitlines() if line.startswith("plain")]
    assert re.split(r" {2,}", row.strip()) == ["plain", *[shown] * epsilons]
    assert all(len(line.rstrip()) <= width for line in text.splitlines()[: text.splitlines().index(row)])
    assert "at δ = 1e-05" in " ".join(text.split())


def broken(folder: Path, kind: str) -> None:
    path = folder / "runs.sqlite"
    if kind == "damaged":
        path.write_bytes(b"SQLite format 3\0" + b"x" * 500)
        return
    with sqlite3.connect(path) as connection:
        if kind == "newer":
            connection.execute("PRAGMA user_version = 99")
        elif kind == "no runs":
            connection.execute("DELETE FROM runs")
        else:
            connection.execute("UPDATE runs SET record = '{\"config\": 3'")
    connection.close()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("damaged", "cannot use the store"),
        ("newer", "has schema 99"),
        ("no runs", "holds no run that is done"),
        ("altered", "cannot use the store"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line(
    folder_of: Callable[..., Path],
    stored: Callable[..., StoredRun],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    said: str,
) -> None:
    folder = folder_of([stored()])
    broken(folder, kind)
    assert run(monkeypatch, "report", folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (folder / "report").exists()


def test_no_folder_and_only_failed_runs_are_one_line(
    folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "report", tmp_path / "nowhere") == 2
    assert "is not there" in capsys.readouterr().err
    folder = folder_of([StoredRun(folder="cells/a", digest="a", role="cell", error="site 2 refused\nround 3")])
    assert run(monkeypatch, "report", folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 failed" in line
    assert "site 2 refused round 3" in line


@pytest.mark.parametrize(
    "record",
    [
        {"config": {}, "metric": {"value": 0.5}},
        {"config": {"privacy": {"epsilon": 6.0}}, "metric": None},
        {"config": {"privacy": {"epsilon": 6.0}}, "metric": {"value": "nan"}},
    ],
)
def test_a_record_without_what_a_table_needs_is_named_and_left_out(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun], tmp_path: Path, record: dict[str, Any]
) -> None:
    whole = {"privacy": {"epsilon": 6.0}} | record["config"]
    old = StoredRun(folder="cells/old", digest="old", role="cell", record=record | {"config": whole})
    if not record["config"]:
        old = StoredRun(folder="cells/old", digest="old", role="cell", record={"metric": record["metric"]})
    build_report(folder_of([stored(), old]), tmp_path / "out")
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "1 unreadable:" in text
    assert "cells/old: its record has no" in text


def test_a_record_with_the_least_a_table_needs_is_reported(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    record = {
        "config": {"privacy": {"epsilon": 6.0}},
        "metric": {"value": 0.5},
        "clients": "?",
        "slots": [None, {"layer": "x"}],
        "selection": {"candidates": [{}, 3]},
        "privacy": {"sites": 4, "guarantee": []},
        "tuning": {"values": 7},
    }
    folder = folder_of([StoredRun(folder="a", digest="a", record=record, rounds=[{"round": None}, {}])])
    build_report(folder, tmp_path / "out")
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "unknown task" in text
    assert "the record states no guarantee" in text


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["fedlora", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_infinity_stands_apart_at_the_right_end() -> None:
    scale = EpsilonAxis([float("inf"), 1.0, 8.0, 2.0])
    places = [scale.place(epsilon) for epsilon in (1.0, 2.0, 8.0, float("inf"))]
    assert places == sorted(places)
    assert places[1] - places[0] == pytest.approx((places[2] - places[1]) / 2)  # logarithmic
    assert places[3] - places[2] >= places[2] - places[1]
    assert EpsilonAxis([float("inf")]).place(float("inf")) > 0


def test_figures_show_means_and_intervals(
    folder_of: Callable[..., Path], sweep_runs: list[StoredRun], tmp_path: Path, drawn: list[Any]
) -> None:
    folder = folder_of(sweep_runs)
    build_report(folder, tmp_path / "out")
    panel = drawn[0].axes[0]
    bars = [c for c in panel.containers if c.get_label() == "plain"]
    shown = [y for bar in bars for y in bar.lines[0].get_ydata()]
    results = read_results(folder)
    assert shown == pytest.approx([sum(r.value for r in results.of("sst2", "plain", e)) / 3 for e in results.epsilons])
    (low, high) = bars[0].lines[2][0].get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * 4.302653 * 0.0036055 / 3**0.5, rel=1e-3)


def test_the_page_has_the_figures_colours_in_dark_too() -> None:
    style = (Path(__file__).parents[3] / "fedlora/experiments/report/page/report.css").read_text()
    assert len(re.findall(r"--c\d: #", style)) == len(COLOURS)
