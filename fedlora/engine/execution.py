"""How a device runs the frozen base: attention kernel, dtype, precision of products, size of a micro-batch, compiler.

`auto` measures: what is fastest differs by machine and by version (bf16 with eager attention is over twice as fast as
fp32 SDPA on CPUs with AMX, and slower elsewhere). Private arithmetic is float32 or finer whatever is chosen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.cache import remembered
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, ModelError
from fedlora.models import Classifier, load_classifier
from fedlora.privacy.noise import require_accelerator
from fedlora.randomness import PublicSeed

Attention = Literal["auto", "eager", "sdpa"]
Precision = Literal["highest", "high", "medium"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Padded tokens of a micro-batch, tried in this order.
BUDGETS = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192, 16384)}
_NEARLY_BEST = 0.9
"""A micro-batch is no larger than what has this share of the best speed: what is not filled of it is wasted."""
_COMPILED_STEPS = 2000
"""Private steps of a run from which compiling pays on an accelerator. It takes some 20 seconds for each of up to a
dozen shapes, and on a CPU saves a sixth of a step (`engine.compile = on` for those who want that)."""
_WIDTH, _WORDS = 16, 100


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The choices of one device, part of every record."""

    device: torch.device
    dtype: torch.dtype
    attention: Attention
    matmul_precision: Precision
    token_budget: int
    compiled: bool

    def describe(self) -> dict[str, str | int | bool]:
        return {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.attention,
            "matmul_precision": self.matmul_precision,
            "token_budget": self.token_budget,
            "compiled": self.compiled,
        }


@dataclass(frozen=True, kw_only=True)
class _Kernels:
    """What decides how long a token takes."""

    dtype: str
    attention: Attention
    matmul_precision: Precision


def choose_execution(config: RunConfig) -> Execution:
    """What the config fixes, and the fastest of the rest by a measurement that is remembered for this machine.

    Raises:
        ConfigError: the asked device does not exist here, or cannot draw the noise it is to draw.
    """
    device = find_device(config.run.device)
    if config.engine.noise == "device":
        require_accelerator(device)  # now, and not when the first round is charged already
    candidates = _candidates(config, device)
    budgets: tuple[int, ...] = BUDGETS.get(device.type, BUDGETS["cpu"])
    if config.engine.token_budget != "auto":
        budgets = (config.engine.token_budget,)
    if len(candidates) * len(budgets) == 1:
        kernels, budget = candidates[0], budgets[0]
    else:
        kernels, budget = _fastest(config, device, candidates, budgets)
    steps = config.federation.rounds * config.federation.local_steps
    worth = device.type == "cuda" and steps >= _COMPILED_STEPS
    return Execution(
        device=device,
        dtype=DTYPES[kernels.dtype],
        attention=kernels.attention,
        matmul_precision=kernels.matmul_precision,
        token_budget=budget,
        compiled=worth if config.engine.compile == "auto" else config.engine.compile == "on",
    )


def _candidates(config: RunConfig, device: torch.device) -> list[_Kernels]:
    """Who asks for float32 gets it whole; faster products of float32 are tried beside bfloat16, which is as coarse.

    A base that is to be added to is float32, as bfloat16 would round off what one round has learnt.
    """
    free = config.model.dtype == "auto" and not config.adapter.wants_exact_base
    attentions: list[Attention] = ["sdpa", "eager"] if config.model.attention == "auto" else [config.model.attention]
    coarse: Precision = "high" if device.type == "cuda" else "medium"
    precisions: list[Precision] = ["highest"]
    if config.engine.matmul_precision != "auto":
        precisions = [config.engine.matmul_precision]
    elif free:
        precisions = ["highest", coarse]
    found = []
    for dtype in DTYPES if free else ["float32" if config.model.dtype == "auto" else config.model.dtype]:
        for attention in attentions:
            own = precisions if dtype == "float32" else precisions[:1]
            found += [_Kernels(dtype=dtype, attention=attention, matmul_precision=precision) for precision in own]
    return found


def find_device(name: str) -> torch.device:
    """The device of that name; of "auto", the accelerator where there is one.

    Raises:
        ConfigError: there is none of that name here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"run.device = {name} is not available here; use auto or cpu") from error
    return device


def _fastest(
    config: RunConfig, device: torch.device, candidates: Sequence[_Kernels], budgets: Sequence[int]
) -> tuple[_Kernels, int]:
    """The kernels and micro-batch that take most tokens a second, measured once for a machine, model and torch."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    question = {
        "model": config.model.name,
        "device": where,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "candidates": [asdict(candidate) for candidate in candidates],
        "budgets": list(budgets),
    }
    answer = remembered("execution", question, lambda: _measured(config, device, candidates, budgets))
    if not isinstance(answer, dict) or answer.get("token_budget") not in budgets:
        return candidates[0], budgets[0]
    known = (candidate for candidate in candidates if asdict(candidate) == answer.get("kernels"))
    return next(known, candidates[0]), answer["token_budget"]


def _measured(
    config: RunConfig, device: torch.device, candidates: Sequence[_Kernels], budgets: Sequence[int]
) -> dict[str, Any]:
    middle = budgets[len(budgets) // 2]
    probe = _Probe(config, device)
    speeds = [probe.tokens_per_second(kernels, middle) for kernels in candidates]
    best = max(speeds)
    kernels = candidates[speeds.index(best)]
    by_budget = [best if budget == middle else probe.tokens_per_second(kernels, budget) for budget in budgets]
    enough = (
        budget for budget, speed in zip(budgets, by_budget, strict=True) if speed >= _NEARLY_BEST * max(by_budget)
    )
    return {"kernels": asdict(kernels), "token_budget": next(enough)}


class _Probe:
    """Base models, one at a time, that take forwards and backwards over public tokens."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._loaded: tuple[str, Attention] | None = None
        self._classifier: Classifier | None = None

    def tokens_per_second(self, kernels: _Kernels, budget: int) -> float:
        """Best of three; 0 where the model lacks the kernel or the device the memory."""
        if self._loaded != (kernels.dtype, kernels.attention):
            self._load(kernels)
        classifier = self._classifier
        if classifier is None:
            return 0.0
        words = min(_WORDS, len(classifier.tokenizer))
        draw = torch.Generator(self._device).manual_seed(0)
        ids = torch.randint(words, (max(1, budget // _WIDTH), _WIDTH), device=self._device, generator=draw)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(kernels.matmul_precision)
        try:
            seconds = min([self._seconds(classifier, batch) for _ in range(4)][1:])
        except torch.OutOfMemoryError:
            return 0.0
        finally:
            torch.set_float32_matmul_precision(before)
        return ids.numel() / seconds

    def _load(self, kernels: _Kernels) -> None:
        self._loaded, self._classifier = (kernels.dtype, kernels.attention), None  # never two models in memory
        try:
            classifier = load_classifier(
                self._config.model,
                num_labels=2,
                seed=PublicSeed.from_int(0),
                device=self._device,
                dtype=DTYPES[kernels.dtype],
                attention=kernels.attention,
            )
        except ModelError:
            if kernels.attention != "sdpa":  # some families have no such kernel
                raise
            return
        lowest = next(iter(classifier.target_modules(self._config.adapter.targets).values()))
        self._leaf: Tensor = lowest.weight.requires_grad_()  # makes the backward run down to the lowest adapted layer
        self._classifier = classifier

    def _seconds(self, classifier: Classifier, batch: dict[str, Tensor]) -> float:
        start = time.perf_counter()
        torch.autograd.grad(classifier(batch).sum(), self._leaf)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start
