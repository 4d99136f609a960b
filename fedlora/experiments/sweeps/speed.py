"""How fast this machine takes the private steps of a run: measured once, remembered on disk.

On a CPU in the thread's own time, so that what else the machine does meanwhile counts as little as it can.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from fedlora.cache import remembered
from fedlora.config import RunConfig
from fedlora.data.encode import EncodedDataset
from fedlora.data.tasks import TASKS
from fedlora.engine.batching import Shapes, most_rows
from fedlora.engine.execution import Execution, choose_execution
from fedlora.engine.sums import clipped_sums
from fedlora.federation.shelf import Shelf
from fedlora.federation.workbench import Workbench, build_workbench
from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.noise import make_noise_source
from fedlora.privacy.plan import PhasePlan
from fedlora.randomness import PublicSeed, SecretRoot

_NARROW, _WIDE = 8, 64  # tokens; two widths, to tell the cost of a token from that of a row
_REPEATS = 7
_SCHEMA = 2  # raise it when the measurement changes what it means


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of a thread with a core to itself, or of an accelerator."""

    start: float
    """To put adapters on a loaded base model and check that records do not influence one another."""
    gradient_token: float
    """A padded token of a micro-batch of gradients: forward and backward."""
    gradient_row: float
    """A row of it, beside its tokens: a copy of the adapters, clipping."""
    forward_token: float
    release: float
    """One client's Gaussian noise of one step; that of other mechanisms takes a little longer."""


def speed_of(config: RunConfig, phase: PhasePlan, shelf: Shelf) -> Speed:
    """Of a run of `config` whose `phase` trains; measured once per machine, model and torch version.

    Raises:
        ModelError: the model or its target modules are not there.
        PrivacyError: on this machine records of one micro-batch influence one another.
    """
    execution = choose_execution(config)
    question = _question(config, execution)
    return Speed(**remembered("speed", question, lambda: asdict(_measure(config, phase, shelf))))


def _question(config: RunConfig, execution: Execution) -> dict[str, Any]:
    cuda = execution.device.type == "cuda"
    return {
        "schema": _SCHEMA,
        "machine": torch.cuda.get_device_name(execution.device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "execution": execution.describe(),
        "model": [config.model.name, config.model.head, config.model.pooling],
        "adapter": [config.adapter.method, config.adapter.rank, list(config.adapter.targets)],
        "labels": TASKS[config.data.task].num_labels,
        "clients": min(config.federation.cohort_size, 2),  # one client's adapters are not copied for each record
        "engine": [config.engine.backend, config.engine.noise],
        "projected": config.privacy.low_pass < 1,
    }


def _measure(config: RunConfig, phase: PhasePlan, shelf: Shelf) -> Speed:
    build_workbench(config, shelf).backend.detach()  # loads the model, and imports what that takes
    clock = _clock(choose_execution(config).device)
    begun = clock()
    workbench = build_workbench(config, shelf)
    start = clock() - begun
    try:
        return _measure_steps(workbench, phase, start, clock)
    finally:
        workbench.backend.detach()


def _measure_steps(workbench: Workbench, phase: PhasePlan, start: float, clock: Callable[[], float]) -> Speed:
    """Medians of repeats in turn: a machine that others use as well is slow for seconds at a time."""
    _give_head(workbench)
    mechanism = GaussianMechanism(1.0)
    shapes, device = Shapes(workbench.execution.token_budget), workbench.execution.device
    clients = min(workbench.config.federation.cohort_size, 2) if workbench.backend.fuses_clients else 1
    theta = workbench.initial_theta.repeat(clients, 1)
    noise = make_noise_source(workbench.config.engine.noise, SecretRoot.from_os().numpy("speed"), device)
    widths = _NARROW, min(_WIDE, workbench.classifier.tokenizer.model_max_length)
    full = [_full_batch(workbench, width) for width in widths]

    def gradients(dataset: EncodedDataset) -> object:
        drawn = np.array_split(np.arange(len(dataset)), clients)
        return clipped_sums(workbench.backend, dataset, drawn, theta, phase, shapes=shapes).sum().item()

    def forward(dataset: EncodedDataset) -> object:
        batch, _ = dataset.batch(np.arange(len(dataset)), device)
        return workbench.backend.logits(theta[0], batch).sum().item()

    def release() -> object:
        total = torch.zeros(theta.shape[1], dtype=torch.float64, device=device)
        slots = workbench.backend.slot_sizes
        return mechanism.privatize(total, sensitivity=1.0, noise=noise, slot_sizes=slots).sum().item()

    tasks: list[Callable[[], object]] = [
        *(lambda dataset=dataset: gradients(dataset) for dataset in full),
        lambda: forward(full[-1]),
        release,
    ]
    times = [[_timed(task, clock) for task in tasks] for _ in range(1 + _REPEATS)][1:]  # the first warms up
    *gradient, forwards, releases = (statistics.median(column) for column in zip(*times, strict=True))
    token, row = _apart(gradient, widths, shapes.token_budget)
    tokens = len(full[-1]) * int(full[-1].lengths[0])
    return Speed(start=start, gradient_token=token, gradient_row=row, forward_token=forwards / tokens, release=releases)


def _apart(seconds: Sequence[float], widths: Sequence[int], budget: int) -> tuple[float, float]:
    """Seconds of a token and of a row that give those of a full micro-batch of either width; never below 0."""
    (narrow, wide), rows = seconds, [most_rows(width, budget) for width in widths]
    tokens = [count * width for count, width in zip(rows, widths, strict=True)]
    row = (narrow * tokens[1] - wide * tokens[0]) / (rows[0] * tokens[1] - rows[1] * tokens[0])
    row = min(max(row, 0.0), narrow / rows[0])
    return max((wide - rows[1] * row) / tokens[1], 0.0), row


def _full_batch(workbench: Workbench, width: int) -> EncodedDataset:
    """As many random records of `width` tokens as share a micro-batch; public."""
    count = most_rows(width, workbench.execution.token_budget) - 1
    draw, labels = PublicSeed.from_int(0).numpy("speed", width), workbench.classifier.num_labels
    return EncodedDataset(
        ids=draw.integers(0, len(workbench.classifier.tokenizer), count * width).astype(np.int32),
        starts=np.arange(count) * width,
        lengths=np.full(count, width),
        labels=draw.integers(0, labels, count) if labels > 1 else draw.normal(size=count).astype(np.float32),
        pad_token_id=0,
        longest=width,
    )


def _give_head(workbench: Workbench) -> None:
    """Any: a prototype head is made by the run, and without one there is no gradient."""
    classifier = workbench.classifier
    if workbench.config.model.head == "prototype":
        weight = PublicSeed.from_int(0).torch("speed head")
        shape = (classifier.num_labels, classifier.hidden_size)
        classifier.set_head(torch.randn(shape, generator=weight), torch.zeros(classifier.num_labels))


def _timed(task: Callable[[], object], clock: Callable[[], float]) -> float:
    begun = clock()
    task()  # ends with a number on the host, so that an accelerator is done
    return clock() - begun


def _clock(device: torch.device) -> Callable[[], float]:
    return time.process_time if device.type == "cpu" else time.perf_counter
