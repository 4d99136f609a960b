"""The recipes and sweeps that come with the project: what they say of themselves, and that each can run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedlora.config import RunConfig
from fedlora.data.glue import Records
from fedlora.data.partition import partition
from fedlora.experiments.simulate import simulate
from fedlora.experiments.sweeps.sweep import Cell, Sweep
from fedlora.experiments.sweeps.tuning import Tuning
from fedlora.randomness import PublicSeed

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted(ROOT.glob("simulations/sweeps/*.toml"))
FILES = sorted(ROOT.glob("simulations/recipes/*.toml")) + SWEEPS
SCALED = ("minilm", "gredp", "quick", "tuned")
LABEL_COUNTS = {  # of the train splits on the hub
    "mnli": (130_899, 130_900, 130_903),
    "sst2": (29_780, 37_569),
    "qqp": (229_468, 134_378),
    "qnli": (52_366, 52_377),
}


class Silent:
    def start(self, *arguments: object, **facts: object) -> None: ...

    def round(self, report: object) -> None: ...

    def finish(self, record: object) -> None: ...


def sweep_file(name: str) -> Path:
    return ROOT / "simulations" / "sweeps" / f"{name}.toml"


def opening(file: Path) -> str:
    """The comment that a file begins with, in one line."""
    lines = file.read_text().splitlines()
    count = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return re.sub(r"\s+", " ", " ".join(line.removeprefix("#") for line in lines[:count]))


def test_there_are_sweeps_of_every_kind() -> None:
    assert {"ffa_lora_paper", "diffora_paper", *SCALED} <= {file.stem for file in SWEEPS}


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_file_says_what_it_is_for_and_what_it_costs(file: Path) -> None:
    text = opening(file)
    places = [text.find(f" {word} ") for word in ("Purpose", "Cost", "Command", "Expect")]
    assert min(places) >= 0
    assert places == sorted(places)
    command = "sweep" if file in SWEEPS else "simulate"
    assert f"fedlora {command} {file.relative_to(ROOT)}" in text
    assert '"/' not in file.read_text(), "a path of somebody's machine"


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_counts_in_the_opening_are_those_of_the_file(file: Path) -> None:
    if file not in SWEEPS:
        assert RunConfig.from_toml(file) != RunConfig(), "a recipe says something"
        return
    sweep = Sweep.from_toml(file)
    tuning, text = Tuning.of(sweep), opening(file)
    cells = sweep.cells()
    assert f"{len(cells)} cells" in text
    assert tuning is None or f"{tuning.total()} trials" in text


@pytest.mark.parametrize("task", LABEL_COUNTS)
def test_delta_of_the_papers_sweep_is_below_one_over_its_largest_site(task: str) -> None:
    """By the label counts of the hub's files, dealt as the sweep deals them."""
    cells = [cell for cell in Sweep.from_toml(sweep_file("ffa_lora_paper")).cells() if cell.config.data.task == task]
    labels = np.repeat(np.arange(len(LABEL_COUNTS[task])), LABEL_COUNTS[task])
    records = Records(texts=([""] * len(labels),), labels=labels)
    config = cells[0].config
    largest = max(map(len, partition(config.data, config.federation.clients, records, PublicSeed.from_int(0))))
    assert {cell.config.privacy.delta for cell in cells} == {config.privacy.delta}
    assert config.privacy.delta < 1 / largest


def test_gredp_is_never_swept_in_the_reading_that_protects_nothing() -> None:
    for file in SWEEPS:
        assert not any(
            cell.config.unsound or cell.config.privacy.allow_unsound for cell in Sweep.from_toml(file).cells()
        )


def kinds(name: str) -> list[Cell]:
    """One cell of a scaled sweep for each combination of its axes but ε and seed."""
    cells = {
        tuple(label for axis, label in cell.axes.items() if axis not in ("privacy.epsilon", "run.seed")): cell
        for cell in Sweep.from_toml(sweep_file(name)).cells()
        if cell.config.private
    }
    return list(cells.values())


def tiny(config: RunConfig, model: Path, out: Path) -> RunConfig:
    return config.with_overrides(
        *(f"model.name='{model}'", "model.dtype=float32", "run.device=cpu", f"run.out='{out}'"),
        *("data.source=generated", "data.generated_records=240", "data.train_share=1.0", "data.max_length=16"),
        *("federation.rounds=3", "federation.local_steps=1", "training.expected_batch_size=8"),
        *("privacy.delta=1e-3", "privacy.accountant=rdp", "privacy.prototype_noise_multiplier=40.0"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALED)
def test_every_kind_of_cell_of_a_scaled_sweep_can_run(
    name: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """As it is written, but for a tiny model, generated records and three rounds of one small step."""
    for index, cell in enumerate(kinds(name)):
        config = tiny(cell.config, tiny_model("bert"), tmp_path / str(index))
        assert (simulate(config, Silent()) / "record.json").is_file(), cell.name
