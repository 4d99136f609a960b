"""What a person reads while and after a run, in a terminal and in a file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.adapters.dam import Candidate, ModuleMask, Selection
from fedlora.config import RunConfig
from fedlora.experiments.progress import TerminalProgress, print_result, shown_evaluation
from fedlora.experiments.terminal import shown_bytes, shown_epsilon
from fedlora.federation.server import RoundReport

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
Watch = Callable[..., str]


def report(**changes: Any) -> RoundReport:
    known = {
        "round": 3,
        "phase": "finetune",
        "metric": 0.8125,
        "metrics": {"accuracy": 0.8125},
        "epsilon_max": 2.00001,
        "noise_seeded": False,
        "bytes_up": 442_368,
        "bytes_down": 451_600_000,
        "seconds": 5.43,
        "clients_ok": 3,
        "clients_failed": 0,
        "failures": {},
    }
    return RoundReport(**known | changes)


@pytest.fixture
def watch(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Watch:
    """What a run prints; `terminal` is its width, None for a file."""

    def run(*overrides: str, terminal: int | None = None, **changes: Any) -> str:
        monkeypatch.setenv("TERM", "xterm")
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")
            monkeypatch.setenv("COLUMNS", str(terminal))
        with TerminalProgress() as progress:
            progress.start(
                RunConfig().with_overrides(*overrides), folder=Path(), metric="accuracy", num_rounds=11, done=3
            )
            progress.round(report(**changes))
        return capfd.readouterr().out

    return run


def test_a_file_gets_rows_and_no_control_codes(watch: Watch) -> None:
    out = watch()
    assert not CONTROL.search(out)
    head, asked, names, row = out.splitlines()
    assert head == "sst2 from generated: 3 clients, ffa rank 8"
    assert asked == "asked: ε = 6 at δ = 1e-05 for one record of one site (add/remove), by PLD accounting"
    assert names.split() == [
        "round",
        "phase",
        "accuracy",
        "ε",
        "spent",
        "sent",
        "up",
        "sent",
        "down",
        "time",
        "clients",
    ]
    assert row.split() == ["3", "finetune", "0.8125", "2.001", "442.4", "kB", "451.6", "MB", "5.4", "s", "3"]
    assert [names.index(right) + len(right) for right in ("accuracy", "ε spent", "sent up")] == [
        row.index(right) + len(right) for right in ("0.8125", "2.001", "442.4 kB")
    ], "columns line up"


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_a_bar_with_the_rounds_done_and_rows_that_fit(watch: Watch, width: int) -> None:
    out = watch(terminal=width)
    assert "4/11" in out
    assert "left" in out
    rows = [line for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out).splitlines() if "finetune" in line]
    assert all(len(row.rpartition("\r")[2]) <= 80 for row in rows)


def test_a_choice_of_modules_stands_before_the_first_round_that_trains_them(watch: Watch) -> None:
    *_, choice, row = watch(choice="alignment chose 18 of 36 modules").splitlines()
    assert choice.strip() == "alignment chose 18 of 36 modules"
    assert row.split()[:2] == ["3", "finetune"]


def test_failures_and_rounds_without_evaluation_show(watch: Watch) -> None:
    row = watch(metric=None, metrics={}, clients_ok=2, clients_failed=1, failures={1: "error"}).splitlines()[-1]
    assert row.endswith("2 (1 failed)")
    assert "0.8125" not in row


def test_brackets_in_a_name_are_no_markup(watch: Watch) -> None:
    assert "/tmp/[red]x[/red]" in watch("data.source='/tmp/[red]x[/red]'")


def test_seeded_noise_and_no_noise_are_called_not_private(watch: Watch) -> None:
    assert "NOT private" in watch("privacy.seeded_noise=true")
    assert "no guarantee: ε = ∞" in watch("privacy.epsilon=inf", epsilon_max=math.inf)


def record(**changes: Any) -> dict[str, Any]:
    """Of a finished run, with `changes` of its guarantee."""
    return {
        "config": {"federation": {"private_evaluation": False}},
        "metric": {"name": "accuracy", "value": 0.8125, "split": "validation"},
        "private_evaluation": None,
        "bytes_up": 1000,
        "bytes_down": 2_000_000,
        "wall_seconds": 75.2,
        "peak_memory_bytes": 1.4e9,
        "privacy": {"guarantee": {"epsilon": 5.99612, "delta": 1e-5, "accountant": "pld"} | changes},
    }


@pytest.fixture
def result(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def print_of(*, measured: str = "global", **changes: Any) -> str:
        finished = record(**changes)
        finished["metric"]["of"] = measured
        (tmp_path / "record.json").write_text(json.dumps(finished))
        print_result(tmp_path)
        return capfd.readouterr().out

    return print_of


def test_the_result_is_the_records_guarantee_and_what_it_leaves_out(result: Callable[..., str]) -> None:
    out = result()
    assert "guarantee    ε = 5.997 at δ = 1e-05 for one record of one site (add/remove), by PLD accounting\n" in out
    assert "not covered  several records of one person" in out
    assert not CONTROL.search(out)


def test_no_model_is_offered_where_each_site_has_its_own_elsewhere(result: Callable[..., str]) -> None:
    out = result(measured="shared")
    assert "of the part alone that the sites share" in out
    assert "fedlora predict" not in out


def test_in_a_file_every_fact_is_one_line(result: Callable[..., str], tmp_path: Path) -> None:
    lines = result().splitlines()
    assert f"run folder   {tmp_path}" in lines
    assert len(lines) == 7


def test_the_result_names_the_choice_of_modules_and_what_one_should_know_of_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    candidates = tuple(
        Candidate(module=f"layer.{number}", layer=number, kind="up", in_features=4, out_features=4)
        for number in range(3)
    )
    selection = Selection(
        mask=ModuleMask(candidates, (True, False, False)),
        method="warmup",
        discretise="global_topk",
        ratio=1 / 3,
        scores=(1.0, -2.0, 0.0),
        noise_to_signal=math.inf,
        stability=None,
        diagnostics={},
        note="no signal stood out",
    )
    (tmp_path / "record.json").write_text(json.dumps({**record(), "selection": selection.to_json()}))
    print_result(tmp_path)
    assert "choice       warmup chose 1 of 3 modules; no signal stood out\n" in capfd.readouterr().out


def test_in_a_terminal_texts_are_folded_and_paths_are_not_cut(
    result: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    lines = result().splitlines()
    assert all(len(line) <= 60 for line in lines if str(tmp_path) not in line)
    assert sum(str(tmp_path) in line for line in lines) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise_seeded": True}, "noise seeded, not private"),
        ({"epsilon": "inf"}, "ε = ∞, run without noise"),
    ],
)
def test_no_guarantee_is_called_that(result: Callable[..., str], changes: dict[str, Any], words: str) -> None:
    out = result(**changes)
    assert f" no guarantee: {words}\n" in out
    assert "not covered" not in out


def test_epsilon_is_never_shown_smaller_than_it_is() -> None:
    assert [shown_epsilon(value) for value in (2.00001, 0.0848502, 6.0, math.inf)] == ["2.001", "0.08486", "6", "∞"]


@pytest.mark.parametrize(("accuracy", "outside"), [(-0.0421, True), (0.0, False), (1.0, False), (1.0133, True)])
def test_an_accuracy_that_noise_put_outside_is_shown_as_it_came_and_said_to_be(accuracy: float, outside: bool) -> None:
    shown = shown_evaluation({"accuracy": accuracy, "standard_error": 0.07, "clients": 3, "noise_std": 17.3})
    assert shown.startswith(f"{accuracy:.4f} ± 0.0700 on held-out records of 3 clients, ")
    assert ("the noise put it outside 0 to 1" in shown) is outside


def test_bytes_have_units() -> None:
    assert [shown_bytes(count) for count in (0, 999, 1000, 1.5e6, 2.5e9, 3e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.5 MB",
        "2.50 GB",
        "3000.00 GB",
    ]
