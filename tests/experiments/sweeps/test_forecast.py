"""A forecast says of each cell what its run would find, and runs nothing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.engine.expanded import ExpandedBackend
from fedlora.experiments.simulate import simulate
from fedlora.experiments.sweeps import speed as speed_module
from fedlora.experiments.sweeps.duration import run_seconds, workload_of
from fedlora.experiments.sweeps.forecast import Forecast, forecast, print_forecast, together
from fedlora.experiments.sweeps.speed import Speed
from fedlora.experiments.sweeps.sweep import Cell
from fedlora.experiments.sweeps.worker import Unwatched
from fedlora.experiments.terminal import shown_seconds
from fedlora.federation import shelf as shelf_module
from fedlora.federation import workbench as workbench_module
from fedlora.federation.shelf import Shelf
from fedlora.models import Classifier

MakeConfig = Callable[..., RunConfig]
NOTHING = Speed(start=0, gradient_token=0, gradient_row=0, forward_token=0, release=0)


@pytest.fixture
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is another test's."""
    monkeypatch.setattr(speed_module, "_REPEATS", 1)


def cell(config: RunConfig, **axes: str) -> Cell:
    return Cell(axes=axes, config=config)


@pytest.mark.usefixtures("quick_probe")
@pytest.mark.parametrize(
    "settings",
    [
        ("data.partition=label_skew", "data.label_skew='0.6,0.6;0.3,0.3;0.1,0.1'"),
        ("federation.participation=0.67", "model.head=prototype", "privacy.mechanism=gredp"),
        ("adapter.select=alignment", "federation.rounds=5", "federation.private_evaluation=true"),
    ],
    ids=["sites of other sizes", "sites of other rounds", "a search"],
)
def test_noise_and_budget_are_those_of_the_run(tiny_config: MakeConfig, tmp_path: Path, settings: Any) -> None:
    config = tiny_config("privacy.accountant=rdp", *settings, f"run.out='{tmp_path / 'run'}'")
    (found,) = forecast([cell(config)], Shelf())
    record = json.loads((simulate(config, Unwatched()) / "record.json").read_text())
    noise = [client["effective_noise_multiplier"] for client in record["clients"]]
    assert found.error == ""
    assert found.noise_multiplier == (min(noise), max(noise))
    assert found.epsilon == pytest.approx(max(client["epsilon"] for client in record["clients"]))
    assert found.records == sum(client["num_examples"] for client in record["clients"])
    assert found.seconds is not None
    assert 0 < found.seconds < 600


@pytest.mark.usefixtures("quick_probe")
def test_a_cell_that_cannot_run_says_why_and_stops_no_other(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rdp = "privacy.accountant=rdp"
    wrong = {
        "privacy.epsilon=0.01": "nothing is left for training",
        "privacy.delta=0.1": r"privacy.delta = 0.1 is not below 1/n",
        "training.expected_batch_size=100": "training.expected_batch_size = 100, but client",
        f"data.source='{tmp_path / 'nowhere'}'": "is no folder",
        "model.name=nobody/nothing": "not there, and HF_HUB_OFFLINE is set",
        "adapter.target_modules=['nonsense']": "nonsense",
    }
    head = "model.head=prototype"
    cells = [cell(tiny_config(rdp, head, setting), setting=setting) for setting in wrong]
    seen: list[Forecast] = []
    *failed, good = forecast([*cells, cell(tiny_config(rdp, head))], Shelf(), seen.append)
    assert seen == [*failed, good]
    assert good.error == ""
    assert good.seconds is not None
    for found, words in zip(failed, wrong.values(), strict=True):
        assert words in found.error
        assert "\n" not in found.error
        assert found.seconds is None
    *_, missing_model, _ = failed
    assert missing_model.noise_multiplier[0] > 0, "what can be known without the model is"


@pytest.mark.usefixtures("quick_probe")
def test_a_run_without_noise_has_none(tiny_config: MakeConfig) -> None:
    (found,) = forecast([cell(tiny_config("privacy.epsilon=inf"))], Shelf())
    assert (found.noise_multiplier, found.epsilon, found.error) == ((0.0, 0.0), math.inf, "")


@pytest.mark.usefixtures("quick_probe")
def test_nothing_is_left_behind_and_one_model_is_loaded_for_all_cells(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    loads: list[object] = []
    genuine = shelf_module.load_classifier
    monkeypatch.setattr(shelf_module, "load_classifier", lambda *args, **how: loads.append(1) or genuine(*args, **how))
    cells = [
        cell(
            tiny_config("privacy.accountant=rdp", "model.head=prototype", f"run.seed={seed}", f"privacy.epsilon={eps}")
        )
        for eps in (1.0, 6.0, "inf")
        for seed in (0, 1)
    ]
    assert [found.error for found in forecast(cells, Shelf())] == [""] * len(cells)
    assert len(loads) == 1
    assert os.listdir(tmp_path) == ["cache"]  # noqa: PTH208
    monkeypatch.setattr(speed_module, "_measure", None)
    again = forecast(cells, Shelf())
    assert [found.error for found in again] == [""] * len(cells), "what was measured is remembered"


@pytest.mark.usefixtures("quick_probe")
@pytest.mark.parametrize(
    "settings", [("engine.backend=opacus",), ("engine.token_budget=1",), ("privacy.low_pass=0.5",)]
)
def test_a_model_for_short_texts_is_measured_too(tiny_config: MakeConfig, settings: tuple[str, ...]) -> None:
    (found,) = forecast([cell(tiny_config("privacy.accountant=rdp", *settings, family="roberta"))], Shelf())
    assert (found.error, found.seconds is None) == ("", False)


# --- time ------------------------------------------------------------------------------------------------------------

SEARCH = ("adapter.select=alignment", "adapter.alignment_records=40", "federation.rounds=6")
WORK: dict[str, tuple[str, ...]] = {
    "plain": (),
    "a cohort of one of three": ("federation.participation=0.3", "federation.rounds=12"),  # small draws vary
    "prototypes and evaluations": ("model.head=prototype", "run.evaluate_every=2"),
    "a private evaluation": ("federation.private_evaluation=true", "data.heldout_share=0.5"),
    "alignment": SEARCH,
    "bilevel": ("adapter.select=bilevel", "federation.rounds=6"),
}


@pytest.mark.parametrize("case", WORK)
def test_what_is_counted_is_what_a_run_computes(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Padded tokens and rows that pass through gradients and forwards; a seeded run, within the chance of its draws."""
    counted = {"gradient_token": 0, "gradient_row": 0, "forward_token": 0}

    def count(owner: Any, name: str, position: int, *, rows: bool = False) -> None:
        genuine = getattr(owner, name)

        def counting(self: Any, *arguments: Any) -> Any:
            ids = arguments[position]["input_ids"]
            counted["gradient_token" if rows else "forward_token"] += ids.numel()
            counted["gradient_row"] += len(ids) * rows
            return genuine(self, *arguments)

        monkeypatch.setattr(owner, name, counting)

    config = tiny_config(
        "privacy.accountant=rdp",
        "engine.token_budget=128",
        "federation.local_steps=8",
        *WORK[case],
        f"run.out='{tmp_path / 'run'}'",
    )
    monkeypatch.setattr(workbench_module, "_looks_at_company", lambda *_: workbench_module._all_agree)
    monkeypatch.setattr(workbench_module, "_PATIENCE", 0)
    shelf = Shelf()
    workload, sizes = workload_of(config, shelf), [80, 80, 80]
    count(ExpandedBackend, "gradients", 1, rows=True)
    count(ExpandedBackend, "logits", 1)
    count(Classifier, "embed", 0)
    simulate(config, Unwatched())
    for name, found in counted.items():
        expected = _units(config, name, workload, sizes)
        assert found == pytest.approx(expected, rel=0.1), name
    assert counted["gradient_token"] > 0 < counted["forward_token"]


def _units(config: RunConfig, name: str, workload: Any, sizes: list[int]) -> float:
    """Of one kind: a second each, less what a run takes without any. A row is one, however few modules it has."""
    config, one = config.with_overrides("adapter.ratio=1.0"), Speed(**{**NOTHING.__dict__, name: 1.0})
    return run_seconds(config, one, workload, sizes) - run_seconds(config, NOTHING, workload, sizes)


def test_chosen_modules_take_a_share_of_the_copies(tiny_config: MakeConfig) -> None:
    half, whole = (tiny_config("adapter.select=random", f"adapter.ratio={ratio}") for ratio in (0.5, 1.0))
    workload, rows = workload_of(half, Shelf()), Speed(**{**NOTHING.__dict__, "gradient_row": 1.0})
    constant = run_seconds(half, NOTHING, workload, [80] * 3)
    less, more = (run_seconds(config, rows, workload, [80] * 3) - constant for config in (half, whole))
    assert less == pytest.approx(more / 2)


def test_tokens_and_rows_are_told_apart() -> None:
    budget, token, row = 1024, 2e-4, 5e-4
    seconds = [token * 1024 + row * 128, token * 1024 + row * 16]
    assert speed_module._apart(seconds, (8, 64), budget) == pytest.approx((token, row))
    assert speed_module._apart([0.1, 0.2], (8, 64), budget) == pytest.approx((0.2 / 1024, 0.0)), "no less than nothing"


def test_workers_take_the_next_cell_when_they_are_free() -> None:
    start = together([0.0], 1)
    assert together([10.0] * 8, 4) == start + 20
    assert together([10.0, 10.0, 10.0, 30.0], 2) == start + 40
    assert together([10.0], 4) == start + 10


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (4.4, "4 s"),
        (99.4, "99 s"),
        (99.7, "1.7 min"),
        (114.0, "1.9 min"),
        (599, "10 min"),
        (3600, "60 min"),
        (9000, "2 h 30 min"),
    ],
)
def test_seconds_as_people_say_them(seconds: float, words: str) -> None:
    assert shown_seconds(seconds) == words


def test_two_hundred_cells_are_a_row_each(capsys: pytest.CaptureFixture[str], tiny_config: MakeConfig) -> None:
    config = tiny_config("privacy.seeded_noise=false")
    found = [
        Forecast(
            cell=cell(config, **{"task": "sst2", "privacy.epsilon": f"{number}", "method": "random half [x]"}),
            records=6704,
            noise_multiplier=(0.7, 0.82 if number else 0.7),
            epsilon=5.99617 if number else math.inf,
            seconds=60.0,
        )
        for number in range(200)
    ]
    broken = [
        Forecast(cell=cell(config, **{"task": "rte", "privacy.epsilon": "9"}), error="no rte records in here")
        for _ in range(3)
    ]
    print_forecast([*found, *broken], 4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "epsilon", "method", "records", "σ", "ε", "spent", "time"]
    assert sum(line.startswith(("sst2 ", "rte ")) for line in lines) == 203
    assert all(len(line) <= 80 for line in lines[:205])
    assert "random half [x]" in lines[2]
    assert lines[2].split()[-4:] == ["0.7", "∞", "60", "s"]
    assert "0.7 to 0.82" in lines[3]
    assert lines[-2] == "cannot run, 3 of 203 cells: no rte records in here"
    assert lines[-1].startswith("200 cells take about 3 h 20 min one after the other, 50 min with 4 workers:")


def test_noise_that_anyone_can_repeat_is_called_so(capsys: pytest.CaptureFixture[str], tiny_config: MakeConfig) -> None:
    print_forecast([Forecast(cell=cell(tiny_config()), epsilon=6.0, seconds=1.0)], 1)
    assert "noise seeded: NOT private" in capsys.readouterr().out
