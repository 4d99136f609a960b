"""How a device runs the frozen base: attention kernel, dtype, size of a micro-batch.

`auto` measures: which kernel and dtype are fastest differs by machine and by version (bf16 with eager attention is over
twice as fast as fp32 SDPA on CPUs with AMX, and slower elsewhere). Private arithmetic is float32 whatever is chosen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch

from fedlora.cache import remembered
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, ModelError
from fedlora.models import load_classifier
from fedlora.privacy.noise import require_accelerator
from fedlora.randomness import PublicSeed

Attention = Literal["auto", "eager", "sdpa"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Padded tokens of a micro-batch. More is faster per token, but shapes are fixed and what is not filled is wasted.
CPU_TOKENS, ACCELERATOR_TOKENS = 1024, 4096


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The choices of one device, part of every record."""

    device: torch.device
    dtype: torch.dtype
    attention: Attention
    token_budget: int

    def describe(self) -> dict[str, str | int]:
        return {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.attention,
            "token_budget": self.token_budget,
        }


def choose_execution(config: RunConfig) -> Execution:
    """What the config fixes, and the fastest of the rest by a measurement that is remembered for this machine.

    Raises:
        ConfigError: the asked device does not exist here, or cannot draw the noise it is to draw.
    """
    device = find_device(config.run.device)
    if config.engine.noise == "device":
        require_accelerator(device)  # now, and not when the first round is charged already
    dtypes = list(DTYPES) if config.model.dtype == "auto" else [config.model.dtype]
    kernels: list[Attention] = ["sdpa", "eager"] if config.model.attention == "auto" else [config.model.attention]
    candidates = list(product(dtypes, kernels))
    dtype, attention = candidates[0] if len(candidates) == 1 else _fastest(config, device, candidates)
    budget = config.engine.token_budget
    if budget == "auto":
        budget = CPU_TOKENS if device.type == "cpu" else ACCELERATOR_TOKENS
    return Execution(device=device, dtype=DTYPES[dtype], attention=attention, token_budget=budget)


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
    config: RunConfig, device: torch.device, candidates: Sequence[tuple[str, Attention]]
) -> tuple[str, Attention]:
    """The candidate with the shortest forward and backward, measured once per machine, model and torch version."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    question = {
        "model": config.model.name,
        "device": where,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "candidates": [list(candidate) for candidate in candidates],
    }
    answer = remembered(
        "execution", question, lambda: min(candidates, key=lambda candidate: _measure(config, device, *candidate))
    )
    return next((candidate for candidate in candidates if list(candidate) == list(answer)), candidates[0])


def _measure(config: RunConfig, device: torch.device, dtype: str, attention: Attention) -> float:
    """Best of three: seconds of one forward and backward over 64 records of 16 tokens; inf where the model lacks it."""
    try:
        classifier = load_classifier(
            config.model,
            num_labels=2,
            seed=PublicSeed.from_int(0),
            device=device,
            dtype=DTYPES[dtype],
            attention=attention,
        )
    except ModelError:
        if attention == "sdpa":
            return math.inf  # some families have no such kernel
        raise
    ids = torch.randint(5, 100, (64, 16), device=device, generator=torch.Generator(device).manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    lowest = next(iter(classifier.target_modules(config.adapter.targets).values()))
    lowest.weight.requires_grad_()  # makes the backward run down to the lowest adapted layer
    times = []
    for _ in range(4):
        start = time.perf_counter()
        torch.autograd.grad(classifier(batch).sum(), lowest.weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
