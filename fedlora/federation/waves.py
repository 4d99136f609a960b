"""A cohort in waves: as many clients in one engine call as fit into the device's memory.

Clients do not see one another in training, so who shares a call changes no more than how micro-batches are cut. Only
the wave at work lies on the device; everyone else's vector and optimiser lie on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fedlora.engine.capacity import Footprint, measure_footprint, most_clients, rough_footprint, usable_bytes
from fedlora.engine.device_memory import ADVICE, exhaustion_named
from fedlora.errors import ModelError
from fedlora.federation.site import Site
from fedlora.federation.workbench import Workbench
from fedlora.privacy.phases import BILEVEL
from fedlora.privacy.plan import PhasePlan

Compute = Callable[[Sequence[Site]], list[Tensor]]
"""One engine call: the round's vectors of these sites, on the host."""


def wave_size(bench: Workbench, phase: PhasePlan, theta: Tensor, clients: int, train: Callable[[int], object]) -> int:
    """How many of `clients` may be in one call, in waves about as large as one another. A public number.

    Args:
        bench: with its adapters attached.
        phase: of training.
        theta: [P] float32, on the device.
        clients: K.
        train: does a short round of so many clients without any record.

    Raises:
        ModelError: one client alone does not fit.
    """
    training, device = bench.config.training, bench.execution.device
    kept = clients * theta.nbytes * (3 if training.keep_state else 1)  # no optimiser has more than two rows of state
    usable = usable_bytes(device) - (0 if device.type == "cuda" else kept)
    count = partial(most_clients, usable=usable, clients=clients, batch_size=training.expected_batch_size)
    weights = sum(weight.nbytes for weight in bench.classifier.parameters())
    rough = rough_footprint(bench.backend, weights=weights, token_budget=bench.execution.token_budget)
    most = count(rough)
    if most < clients:
        footprint = _footprint(bench, phase, theta, train)
        most = count(footprint)
        if most == 0:
            needed = footprint.of_call(1, training.expected_batch_size)
            raise ModelError(
                f"training one client of {bench.config.model.name} takes {needed / 1e9:.2f} GB on {device} beside the "
                f"model, and {max(usable, 0) / 1e9:.2f} GB of what is free there may be used; {ADVICE}"
            )
    return -(-clients // -(-clients // most))


def _footprint(bench: Workbench, phase: PhasePlan, theta: Tensor, train: Callable[[int], object]) -> Footprint:
    """Measured once for the adapters that are attached."""
    if phase.name not in bench.footprints:
        tokenizer, gates = bench.classifier.tokenizer, theta.new_ones(2, len(bench.candidates))
        weighted = partial(bench.gated.weighted, factors=gates) if phase.name == BILEVEL else None
        with exhaustion_named(f"a part of a micro-batch of {bench.config.model.name}"):
            bench.footprints[phase.name] = measure_footprint(
                bench.backend,
                phase,
                theta,
                train,
                token_budget=bench.execution.token_budget,
                longest=min(bench.config.data.max_length, tokenizer.model_max_length),
                classes=bench.classifier.num_labels > 1,
                vectors=weighted and (lambda gradients, owner: weighted(gradients, owner=owner)),
            )
    return bench.footprints[phase.name]


def in_waves(bench: Workbench, sites: Sequence[Site], size: int, compute: Compute) -> list[Tensor]:
    """`compute` on `size` sites at a time, or on fewer once memory ends in spite of the estimate.

    A wave that ends so has released nothing. Its clients' streams of sampling and noise are derived anew from the same
    names, so that trying it again in smaller waves is the same computation on the same draws: one release, of one draw,
    for one charge. Nothing is said about it, as the shape that did not fit may be the doing of one long record.

    Raises:
        ModelError: not even one client fits; the round stays charged.
    """
    vectors: list[Tensor] = []
    while len(vectors) < len(sites):
        wave = sites[len(vectors) : len(vectors) + size]
        if len(wave) == 1:
            with exhaustion_named("training of one client"):
                vectors += compute(wave)
            continue
        found = _attempted(compute, wave)
        if found is None:
            size = -(-len(wave) // 2)
            _start_over(bench)
        else:
            vectors += found
    return vectors


def _attempted(compute: Compute, wave: Sequence[Site]) -> list[Tensor] | None:
    """None where memory ended. Once this returns, nothing holds on to the tensors of the attempt."""
    try:
        return compute(wave)
    except torch.OutOfMemoryError:
        return None


def _start_over(bench: Workbench) -> None:
    """Give up what the attempt has left on the device, and in a back end's hooks."""
    added = bench.folded.added
    bench.detach()
    bench.adopt(None if bench.mask is None else bench.mask.chosen)
    bench.folded.add(added)
    torch.cuda.empty_cache()
