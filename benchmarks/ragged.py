"""One logical batch as it is drawn: texts of all lengths. How it is padded matters more than how it is clipped."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.batches import logical_batch, pad_to
from benchmarks.contenders import CONTENDERS, Base, Batch, Contender, Execution, Fedlora, Settings
from benchmarks.spread import Spread, ratios, take_turns
from fedlora.engine.batching import fixed_shapes
from fedlora.engine.execution import BUDGETS

RECORDS, FIXED = 128, 128
USUAL, HALF = Execution("float32", "sdpa"), Execution("bfloat16", "eager")
REFERENCE = "opacus_hooks, float32 sdpa, padded to 128"

Parts = list[tuple[Batch, Any]]


def ragged_job(repeats: int, order: random.Random) -> dict[str, Any]:
    """A step on the same records: padded to 128 as examples do, to the longest record, and as `train` does it."""
    dataset = logical_batch(Base.load(USUAL), RECORDS)
    whole, groups = np.arange(RECORDS), list(fixed_shapes(dataset.lengths, BUDGETS["cpu"][1], dataset.longest))
    longest = [dataset.batch(whole)]
    fixed = [(pad_to(batch, FIXED), labels) for batch, labels in longest]
    fixed_parts = [dataset.batch(group.positions, shape=(group.rows, group.columns)) for group in groups]
    ways: dict[str, tuple[str, Execution, Parts]] = {
        REFERENCE: ("opacus_hooks", USUAL, fixed),
        "opacus_hooks, float32 sdpa, padded to the longest": ("opacus_hooks", USUAL, longest),
        "peft without privacy, float32 sdpa, padded to 128": ("peft", USUAL, fixed),
        "fedlora, float32 sdpa, padded to 128": ("fedlora", USUAL, fixed),
        "fedlora, float32 sdpa, padded to the longest": ("fedlora", USUAL, longest),
        "fedlora, float32 sdpa, fixed shapes": ("fedlora", USUAL, fixed_parts),
        "fedlora, bfloat16 eager, fixed shapes": ("fedlora", HALF, fixed_parts),
    }
    makers = {key: CONTENDERS[key[0]](Base.load(key[1]), Settings()) for key in {way[:2] for way in ways.values()}}
    tasks = {name: _task(makers[way[:2]], way[2]) for name, way in ways.items()}
    take_turns(tasks, 1, order)
    times = take_turns(tasks, repeats, order)
    return {
        "records": RECORDS,
        "mean_tokens": float(dataset.lengths.mean()),
        "max_tokens": int(dataset.lengths.max()),
        "reference": REFERENCE,
        "ways": {name: _facts(times[name], times[REFERENCE], way[2]) for name, way in ways.items()},
    }


def _facts(seconds: Sequence[float], reference: Sequence[float], parts: Parts) -> dict[str, Any]:
    speed_up = ratios(reference, seconds)
    return {
        "parts": len(parts),
        "padded_tokens": sum(batch["input_ids"].numel() for batch, _ in parts),
        "seconds": Spread.of(seconds).to_json(),
        "times_as_fast": speed_up.to_json(),
        "shown": str(speed_up),
    }


def _task(contender: Contender, parts: Parts) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        if isinstance(contender, Fedlora):
            contender.step_in_parts(parts)
        else:
            contender.step(*parts[0])
        return time.perf_counter() - start

    return run
