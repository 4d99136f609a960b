"""`fedlora sweep` at the command line: one line for every mistake, nothing written by accident, and a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.config import RunConfig
from tests.command_line import Said, typed

CommandLine = Callable[..., Said]


@pytest.fixture
def fedlora(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    """`fedlora("sweep", …)` in this process, in a folder with tiny.toml, a run of seconds."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Said:
        return typed(arguments, monkeypatch, capfd)

    return run


@pytest.fixture
def tiny(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> str:
    """The line that makes cells of a sweep runs of seconds."""
    settings = ("federation.rounds=1", "federation.local_steps=1", "privacy.accountant=rdp", "model.head=prototype")
    (tmp_path / "tiny.toml").write_text(tiny_config(*settings).to_toml())
    return 'recipe = "tiny.toml"\n'


def test_from_one_file_to_its_page(fedlora: CommandLine, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f"{tiny}[grid]\nprivacy.epsilon = [inf, 6.0]\n")
    first = fedlora("sweep", "mine.toml", "--workers", 2)
    assert first.code == 0, first
    assert "2/2" in first.out
    folder = tmp_path / "runs" / "mine"
    assert f"{Path('runs/mine/report/report.html')}" in first.out
    assert {"tables.md", "report.html", "metric.csv"} <= {file.name for file in (folder / "report").iterdir()}
    again = fedlora("sweep", "mine.toml", "--workers", 2)
    assert (again.code, "2 of 2 cells are done already" in again.out) == (0, True)


def test_cells_that_fail_are_named_and_the_rest_is_reported(fedlora: CommandLine, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f'{tiny}[axes.data]\nhere = {{}}\nno = {{ data.source = "nowhere" }}\n')
    said = fedlora("sweep", "mine.toml", "--workers", 1, "--out", "out")
    assert said.code == 1
    assert "done: 1, failed cells: 1; `fedlora runs list out --status failed` says why; " in said.err
    assert "fedlora sweep mine.toml --out out --workers 1 tries failed cells again" in said.err
    assert "nowhere" in (tmp_path / "out" / "report" / "tables.md").read_text()
    assert "nowhere" in fedlora("runs", "list", "out", "--status", "failed", "--task", "sst2").out


def test_a_dry_run_writes_nothing(fedlora: CommandLine, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f"{tiny}[grid]\nprivacy.epsilon = [inf, 6.0]\n")
    before = sorted(tmp_path.iterdir())
    said = fedlora("sweep", "mine.toml", "--dry-run")
    assert said.code == 0, said
    assert "2 cells take about" in said.out
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("[grid]\nprivacy.epsilno = [1.0]", [], "unknown key privacy.epsilno in grid; did you mean privacy.epsilon?"),
        ("[grid]\nrun.seed = []", [], "wanted a list of values with at least one"),
        ("[axes.method]\na = {}\nb = {}", [], "two cells of the sweep are the same run: method a and method b"),
        ("", ["--ray", "auto", "--workers", 2], "--ray and --workers"),
        ("", ["--workers", 0], "Invalid value for '--workers'"),
        ("", ["--track", "tensorbord"], "did you mean tensorboard?"),
        ("", ["--set", "run.sed=3"], "unknown key run.sed in --set; did you mean run.seed?"),
        ("", ["--out", "taken"], "taken is not empty and no sweep's folder; choose another with --out"),
        ("", ["--out", "tiny.toml"], "tiny.toml is not empty and no sweep's folder"),
        ("[tune]\nhow = 'magic'\n[tune.space]\nadapter.rank = [4]", [], "tune.how"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    fedlora: CommandLine, tiny: str, tmp_path: Path, text: str, options: list[object], message: str
) -> None:
    (tmp_path / "mine.toml").write_text(f"{tiny}{text}\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    said = fedlora("sweep", "mine.toml", *options)
    assert (said.code, said.out) == (2, ""), said
    assert message in said.err
    assert said.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
