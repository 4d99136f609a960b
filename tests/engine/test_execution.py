"""What the config fixes stays; the rest is the fastest of what was measured, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.config import RunConfig
from fedlora.engine import execution
from fedlora.engine.execution import choose_execution
from fedlora.errors import ConfigError
from fedlora.models import load_classifier

AUTO = ("model.dtype=auto", "model.attention=auto")
MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[tuple[Any, ...], float]:
    """Speeds by kernels and budget, as if measured; whatever is asked for is entered."""
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))  # what other tests measured is not to answer here
    speeds: dict[tuple[Any, ...], float] = {}

    class Probe:
        def __init__(self, _config: RunConfig, _device: torch.device) -> None:
            pass

        def tokens_per_second(self, kernels: Any, budget: int) -> float:
            return speeds.setdefault((kernels.dtype, kernels.attention, kernels.matmul_precision, budget), 1.0)

    monkeypatch.setattr(execution, "_Probe", Probe)
    return speeds


def chosen(config: RunConfig) -> tuple[Any, ...]:
    found = choose_execution(config).describe()
    return tuple(found[key] for key in ("dtype", "attention", "matmul_precision", "token_budget", "compiled"))


def test_the_fastest_is_chosen_and_remembered(tiny_config: MakeConfig, measured: dict[Any, float]) -> None:
    config = tiny_config(*AUTO, family="roberta")
    measured |= {("bfloat16", "eager", "highest", budget): 5.0 for budget in (512, 1024, 2048)}
    assert chosen(config) == ("bfloat16", "eager", "highest", 512, False)
    kernels = {key[:3] for key in measured}
    coarse = {("float32", attention, "medium") for attention in ("sdpa", "eager")}
    assert kernels == coarse | {(dtype, a, "highest") for dtype in ("float32", "bfloat16") for a in ("sdpa", "eager")}
    asked = len(measured)
    measured |= {("float32", "sdpa", "highest", budget): 9.0 for budget in (512, 1024, 2048)}
    assert chosen(config) == ("bfloat16", "eager", "highest", 512, False)
    assert len(measured) == asked + 2, "nothing was measured again"


def test_a_micro_batch_is_as_small_as_it_may_be_for_nearly_the_best_speed(
    tiny_config: MakeConfig, measured: dict[Any, float]
) -> None:
    by_budget = {512: 5.0, 1024: 9.1, 2048: 10.0}
    measured |= {("float32", "eager", "highest", budget): speed for budget, speed in by_budget.items()}
    assert chosen(tiny_config(family="electra"))[3] == 1024


def test_what_the_config_says_is_not_measured(tiny_config: MakeConfig, measured: dict[Any, float]) -> None:
    fixed = ("engine.token_budget=640", "engine.matmul_precision=high", "engine.compile=on")
    assert chosen(tiny_config(*fixed)) == ("float32", "eager", "high", 640, True)
    assert measured == {}


def test_who_asks_for_float32_gets_it_whole(tiny_config: MakeConfig, measured: dict[Any, float]) -> None:
    config = tiny_config("model.attention=auto", family="distilbert")
    measured |= {("float32", "sdpa", "medium", 1024): 99.0}
    assert chosen(config)[2] == "highest"


@pytest.mark.parametrize("method", ["fedex", "flora"])
def test_a_base_that_is_added_to_is_float32(tiny_config: MakeConfig, measured: dict[Any, float], method: str) -> None:
    measured |= {("bfloat16", "eager", "highest", 1024): 99.0, ("float32", "sdpa", "medium", 1024): 99.0}
    assert chosen(tiny_config(*AUTO, f"adapter.method={method}"))[:3:2] == ("float32", "highest")


def test_a_device_that_is_not_there(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"run\.device = cuda:7 is not available here"):
        choose_execution(tiny_config("run.device='cuda:7'"))


def test_a_real_measurement_leaves_nothing_behind(tiny_config: MakeConfig) -> None:
    before = torch.get_float32_matmul_precision()
    found = choose_execution(tiny_config("model.dtype=auto", "model.attention=auto", family="bert"))
    assert found.token_budget in (512, 1024, 2048)
    assert torch.get_float32_matmul_precision() == before


def test_a_model_is_loaded_once_for_kernels_that_run_the_same_one(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    loaded: list[torch.dtype] = []
    genuine = load_classifier

    def load(*arguments: Any, **how: Any) -> Any:
        loaded.append(how["dtype"])
        return genuine(*arguments, **how)

    class Clock(execution._Probe):
        def _seconds(self, classifier: Any, batch: Any) -> float:
            super()._seconds(classifier, batch)
            return 2.0 if next(classifier.parameters()).dtype == torch.float32 else 1.0

    monkeypatch.setattr(execution, "load_classifier", load)
    monkeypatch.setattr(execution, "_Probe", Clock)
    found = choose_execution(tiny_config("model.dtype=auto", "model.attention=eager", family="bert"))
    assert (found.dtype, found.token_budget) == (torch.bfloat16, 2048)
    assert loaded == [torch.float32, torch.bfloat16], "neither for other products nor for the size of micro-batches"
