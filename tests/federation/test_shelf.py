"""What runs share: loaded once, and a run with a shelf is the run without one, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.config import RunConfig
from fedlora.engine.execution import choose_execution
from fedlora.errors import ConfigError, DataError
from fedlora.experiments.simulate import simulate
from fedlora.federation import shelf as module
from fedlora.federation.shelf import Shelf
from fedlora.federation.sites import load_own_data

TinyConfig = Callable[..., RunConfig]


class Silent:
    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None: ...
    def round(self, report: Any) -> None: ...

    def finish(self, record: Any) -> None: ...


def outcome(path: Path) -> tuple[bytes, Any]:
    record = json.loads((path / "record.json").read_text())
    return (path / "adapter" / "adapter_model.safetensors").read_bytes(), record["metrics"]


def test_runs_that_share_a_shelf_are_the_runs_alone_bit_for_bit(tiny_config: TinyConfig, tmp_path: Path) -> None:
    changes = [
        ("model.head=prototype", "privacy.epsilon=inf"),
        ("model.head=prototype", "privacy.epsilon=3"),
        ("model.head=prototype", "adapter.select=alignment", "adapter.warmup_rounds=1"),
        ("model.head=prototype", "engine.backend=opacus"),
        ("model.head=trained", "run.seed=1"),
        ("model.head=frozen", "run.seed=2"),
        ("model.head=prototype", "data.max_length=8"),
        ("model.head=prototype", "privacy.epsilon=inf"),
    ]
    shared = Shelf()
    for number, settings in enumerate(changes):
        together, alone = (
            simulate(tiny_config(*settings, f"run.out={tmp_path / f'{number}-{name}'}"), Silent(), None, shelf)
            for name, shelf in (("together", shared), ("alone", None))
        )
        assert outcome(together) == outcome(alone), settings


def test_what_two_runs_have_in_common_is_loaded_once(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for name in ("load_records", "encode", "load_classifier"):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, _real=real, _name=name, **how: (seen.append(_name), _real(*args, **how))[1]
        )
    shared = Shelf()
    for number, epsilon in enumerate((1, 3, "inf")):
        out = f"run.out={tmp_path / str(number)}"
        simulate(tiny_config("model.head=prototype", f"privacy.epsilon={epsilon}", out), Silent(), None, shared)
    assert sorted(seen) == ["encode"] * 2 + ["load_classifier"] + ["load_records"] * 2, "training and validation"


def test_a_model_that_a_failed_run_left_changed_is_not_lent_again(tiny_config: TinyConfig) -> None:
    from fedlora.federation.workbench import build_workbench

    shared, config = Shelf(), tiny_config("model.head=prototype")
    left = build_workbench(config, shared)
    assert build_workbench(config, shared).classifier is not left.classifier


def test_a_new_head_means_another_model(tiny_config: TinyConfig) -> None:
    shared, execution = Shelf(), choose_execution(tiny_config())
    first = shared.classifier(tiny_config("model.head=frozen", "run.seed=0"), execution)
    assert shared.classifier(tiny_config("model.head=frozen", "run.seed=1"), execution) is not first


# ----------------------------------------------------------------------------------------------------- shares and parts


def test_a_share_is_the_same_records_in_every_run_and_contains_smaller_ones(tiny_config: TinyConfig) -> None:
    def texts(*settings: str) -> list[str]:
        return Shelf().records(tiny_config("data.generated_records=2000", *settings), "train").texts[0]

    half, tenth, everything = texts("data.train_share=0.5"), texts("data.train_share=0.1"), texts()
    assert 850 < len(half) < 1150
    assert set(tenth) < set(half) < set(everything)
    kept = [text for text in everything if text in set(half)]
    assert half == kept, "in the order of the whole"


def test_the_parts_of_validation_are_disjoint_and_make_up_the_whole(tiny_config: TinyConfig) -> None:
    def rows(part: str) -> list[tuple[str, int]]:
        records = Shelf().records(tiny_config(f"data.validation_part={part}"), "validation")
        return sorted(zip(records.texts[0], records.labels.tolist(), strict=True))

    tuning, reporting = rows("tuning"), rows("reporting")
    assert not set(tuning) & set(reporting)
    assert sorted(tuning + reporting) == rows("all")
    assert min(len(tuning), len(reporting)) > 0.4 * len(rows("all"))


def test_a_share_of_nothing_is_refused(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "training_sample", lambda records, share: np.zeros(len(records), dtype=bool))
    with pytest.raises(DataError, match=r"data.train_share = 0.1 leaves none of 240 records of train"):
        Shelf().records(tiny_config("data.train_share=0.1"), "train")


def test_a_real_site_takes_part_with_all_of_its_records(tiny_config: TinyConfig) -> None:
    with pytest.raises(ConfigError, match="for simulations"):
        load_own_data(tiny_config("data.train_share=0.5"), 0, Shelf())
