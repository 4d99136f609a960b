"""The same samples three ways through `engine.training.train`: fused clients, one client with all, one after another.

Every record has the same length and every draw takes all records (probability 1), so that the three ways really see
the same samples; noise is on. What differs is padding: a client alone fills its micro-batches less well.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.spread import Spread, ratios, take_turns
from fedlora.adapters.methods import Turn
from fedlora.config import TrainingConfig
from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import Batch, GradientBackend
from fedlora.engine.batching import Shapes
from fedlora.engine.training import TrainingJob, train
from fedlora.privacy.clipping import Clipping
from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.noise import make_noise_source
from fedlora.privacy.phases import FINETUNE
from fedlora.privacy.plan import PhasePlan
from fedlora.privacy.sampling import PoissonSampler
from fedlora.randomness import PublicSeed

FUSED, CENTRALISED, APART = "fused", "one batch", "one after another"
WAYS = (FUSED, CENTRALISED, APART)

Noise = Literal["host", "device"]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What `train` needs beside jobs: a back end on its base model, and where training starts."""

    backend: GradientBackend
    theta: Tensor
    """[P] float32, on the device."""
    shapes: Shapes
    vocabulary: int
    noise: Noise

    @property
    def device(self) -> torch.device:
        return self.theta.device


@dataclass(frozen=True, kw_only=True)
class Work:
    """K clients with b records of T tokens each, and how many steps a call takes."""

    clients: int
    records: int
    tokens: int
    steps: int
    noise_multiplier: float = 1.0

    def __str__(self) -> str:
        return f"{self.clients} clients, {self.records}x{self.tokens}"

    @property
    def samples(self) -> int:
        return self.clients * self.records * self.steps


def uniform_records(count: int, tokens: int, vocabulary: int) -> EncodedDataset:
    """`count` records of exactly `tokens` random words, of two classes."""
    draw = np.random.default_rng(0)
    ids = draw.integers(vocabulary // 10, vocabulary, count * tokens)  # past the special tokens
    return EncodedDataset(
        ids=ids.astype(np.int32),
        starts=np.arange(count) * tokens,
        lengths=np.full(count, tokens, np.int64),
        labels=draw.integers(0, 2, count),
        pad_token_id=0,
        token_type_ids=np.zeros(count * tokens, np.int32),
        longest=max(tokens, 16),
    )


def run(engine: Engine, work: Work, dataset: EncodedDataset, way: str) -> tuple[float, Tensor]:
    """Seconds of `work` done `way`, and the mean [P] of what its clients end with."""
    everyone = np.arange(work.clients * work.records)
    parts = [everyone] if way == CENTRALISED else np.split(everyone, work.clients)
    jobs = [_job(engine, work, client, part) for client, part in enumerate(parts)]
    calls = [[job] for job in jobs] if way == APART else [jobs]
    step = partial(
        train,
        engine.backend,
        dataset,
        theta=engine.theta,
        num_steps=work.steps,
        learning_rate=0.1,
        training=TrainingConfig(optimizer="sgd", expected_batch_size=len(parts[0])),
        shapes=engine.shapes,
    )
    settle(engine.device)
    start = time.perf_counter()
    trained = [row.theta for call in calls for row in step(jobs=call)]
    settle(engine.device)
    return time.perf_counter() - start, torch.stack(trained).mean(dim=0)


def settle(device: torch.device) -> None:
    """Wait until an accelerator has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _job(engine: Engine, work: Work, client: int, records: np.ndarray) -> TrainingJob:
    phase = PhasePlan(
        name=FINETUNE,
        sampler=PoissonSampler(1.0),
        clipping=Clipping("flat", 1.0),
        mechanism=GaussianMechanism(work.noise_multiplier),
        num_steps=work.steps,
    )
    # Public streams: a benchmark protects nobody, and the cipher behind secret ones is not installed everywhere.
    seed = PublicSeed.from_int(client)
    noise = make_noise_source(engine.noise, seed.numpy("noise"), engine.device)
    return TrainingJob(records=records, phase=phase, sampling=seed.numpy("sampling"), noise=noise)


def agreement(engine: Engine, work: Work) -> float:
    """Largest distance between what the ways end with after one step without noise, over how far they got.

    From a common start, the mean over clients of b records each is one step on all K·b records.
    """
    single = Work(clients=work.clients, records=work.records, tokens=work.tokens, steps=1, noise_multiplier=0.0)
    dataset = uniform_records(work.clients * work.records, work.tokens, engine.vocabulary)
    ends = [run(engine, single, dataset, way)[1] for way in WAYS]
    moved = (ends[0] - engine.theta).norm()
    return float(max((end - ends[0]).norm() for end in ends[1:]) / moved)


class _Counted:
    """Passes on to a back end, and counts the micro-batches and the padded tokens that it is asked for."""

    def __init__(self, backend: GradientBackend) -> None:
        self._backend, self.fuses_clients, self.slot_sizes = backend, backend.fuses_clients, backend.slot_sizes
        self.parts = self.tokens = 0

    def gradients(
        self, theta: Tensor, batch: Batch, labels: Tensor, owner: Tensor, turn: Turn | None = None
    ) -> list[Tensor]:
        self.parts += 1
        self.tokens += batch["input_ids"].numel()
        return self._backend.gradients(theta, batch, labels, owner, turn)

    def logits(self, theta: Tensor, batch: Batch) -> Tensor:
        return self._backend.logits(theta, batch)

    def detach(self) -> None:
        self._backend.detach()


def padding(engine: Engine, work: Work, dataset: EncodedDataset, way: str) -> dict[str, int]:
    """Micro-batches of one step done `way`, and their tokens with all padding; also a first run, to warm up."""
    counted = _Counted(engine.backend)
    once = Work(clients=work.clients, records=work.records, tokens=work.tokens, steps=1)
    copy = Engine(
        backend=counted, theta=engine.theta, shapes=engine.shapes, vocabulary=engine.vocabulary, noise=engine.noise
    )
    run(copy, once, dataset, way)
    return {"parts": counted.parts, "padded_tokens": counted.tokens}


def contest(engines: Mapping[str, Engine], work: Work, repeats: int, order: random.Random) -> dict[str, dict[str, Any]]:
    """All ways in turns, under each engine; facts by the engine's name."""
    datasets = {
        name: uniform_records(work.clients * work.records, work.tokens, engine.vocabulary)
        for name, engine in engines.items()
    }
    asked = {
        (name, way): padding(engine, work, datasets[name], way) for name, engine in engines.items() for way in WAYS
    }
    tasks = {
        f"{name} / {way}": partial(_seconds, engine, work, datasets[name], way)
        for name, engine in engines.items()
        for way in WAYS
    }
    times = take_turns(tasks, repeats, order)
    print(f"{work}: {repeats} turns", flush=True)
    return {name: _facts(work, {way: times[f"{name} / {way}"] for way in WAYS}, asked, name) for name in engines}


def _seconds(engine: Engine, work: Work, dataset: EncodedDataset, way: str) -> float:
    return run(engine, work, dataset, way)[0]


def _facts(
    work: Work, times: Mapping[str, list[float]], asked: Mapping[tuple[str, str], dict[str, int]], name: str
) -> dict[str, Any]:
    throughput, speed_up = ratios(times[CENTRALISED], times[FUSED]), ratios(times[APART], times[FUSED])
    return {
        "clients": work.clients,
        "shape": f"{work.records}x{work.tokens}",
        "ways": {
            way: {
                "seconds": Spread.of(seconds).to_json(),
                "samples_per_second": round(work.samples / Spread.of(seconds).median, 1),
                **asked[name, way],
            }
            for way, seconds in times.items()
        },
        "throughput_to_one_batch": throughput.to_json(),
        "times_as_fast_as_apart": speed_up.to_json(),
        "shown": [str(throughput), str(speed_up)],
    }
