"""From what clients send in a round of fine-tuning to the next global state, as the method has it.

All of it is post-processing of noised vectors or, where clients' whole data are protected, of their noised mean. An
exact method's model is the mean of the clients' models, up to rounding: the product B A is linear in what they trained,
or what it lacks goes into the base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.adapters.methods.layout import frozen_factor
from fedlora.adapters.methods.products import singular, stacked, truncated
from fedlora.adapters.slots import AdapterLayout, Slot
from fedlora.federation.aggregation import client_weights
from fedlora.federation.messages import LARGEST_VALUE, ClientUpdate
from fedlora.federation.schedule import ScheduledRound
from fedlora.federation.server_optimizer import ServerOptimizer
from fedlora.federation.workbench import Workbench
from fedlora.randomness import PublicSeed

MakeOne = Callable[[Sequence[ClientUpdate], Tensor], Tensor]
"""One vector [S] of clients' vectors, [S] each, and of what they moved from, [S]."""


@dataclass(frozen=True)
class Merged:
    """The global state after a round."""

    theta: Tensor
    """[P] float32."""
    folded: Tensor | None
    """[F] float32, what the base is given beside its own weights by now; None: nothing."""


def merge(
    bench: Workbench,
    entry: ScheduledRound,
    before: Merged,
    updates: Sequence[ClientUpdate],
    optimizer: ServerOptimizer,
    make_one: MakeOne,
) -> Merged:
    """One state of the clients' vectors.

    Args:
        bench: with the run's adapters.
        entry: the round.
        before: what it started from.
        updates: checked, at least one; each holds what `bench.sent_layout(entry, client)` says.
        optimizer: of the server, which may remember earlier rounds.
        make_one: `aggregate`, or what protects clients in its place; it gets what the round sends, of full rank.

    Raises:
        FedloraError: as `make_one`.
    """
    method, federation = bench.config.adapter.method, bench.config.federation
    whole = [replace(update, vector=padded(bench, entry, update, torch.zeros(bench.layout.size))) for update in updates]
    at = bench.sent_positions(entry)
    sent = torch.zeros(bench.layout.size, dtype=torch.bool)
    sent[at] = True
    reached = torch.zeros(bench.layout.size)
    reached[at] = make_one([replace(update, vector=update.vector[at]) for update in whole], before.theta[at])
    theta = optimizer.step(before.theta, reached, sent)
    if method == "ffa_svd" and (entry.index + 1) % bench.config.adapter.svd_every == 0:
        return replace(before, theta=_refactored(bench, theta))
    if method == "fed_sb_svd" and "R" not in bench.sent_parts(entry):
        return replace(before, theta=_outer_factors(bench, theta, entry))
    if method in ("fedex", "flora", "flexlora"):
        ordered = sorted(whole, key=lambda update: update.client)
        clients = [update.vector for update in ordered], client_weights(ordered, federation).tolist()
        if method == "flexlora":
            return replace(before, theta=_cut(bench, theta, *clients))
        if method == "flora":
            theta = _restarted(bench, theta, entry)
        return Merged(theta, _fold(bench, before.folded, theta, *clients))
    return replace(before, theta=theta)


def padded(bench: Workbench, entry: ScheduledRound, update: ClientUpdate, around: Tensor) -> Tensor:
    """The client's vector as [P], with `around` [P] where it has sent nothing."""
    vector = around.clone()
    vector[bench.sent_positions(entry, update.client)] = update.vector
    return vector


def _adapters(layout: AdapterLayout) -> list[tuple[Slot, Slot]]:
    """B and A of each adapter, in the order of places."""
    named = {slot.name: slot for slot in layout.slots}
    return [(slot, named[f"{slot.name.removesuffix('/B')}/A"]) for slot in layout.slots if slot.part == "B"]


def _refactored(bench: Workbench, theta: Tensor) -> Tensor:
    """The same products B A by factors of which A follows the directions learnt so far; as they are while B = 0."""
    layout, remade = bench.layout, theta.clone()
    for b, a in _adapters(layout):
        if layout.view(theta, b).any():
            outer, inner = truncated(
                layout.view(theta, b), layout.view(theta, a), layout.rank, bench.config.adapter.svd_split
            )
            layout.view(remade, b).copy_(outer)
            layout.view(remade, a).copy_(inner)
    return remade


_LARGEST = LARGEST_VALUE / 2
"""Singular values that R can hold and move on from. Together they are as long as a factor of many numbers."""


def _outer_factors(bench: Workbench, theta: Tensor, entry: ScheduledRound) -> Tensor:
    """The same products B R A with what has been learnt of directions: after B's round in B, after A's in A too.

    The two passes of a randomised SVD (Halko, Martinsson and Tropp 2011, algorithms 4.1 and 5.1), loosely, as training
    goes on between them: B sees the gradient through a random A, then A sees it through orthonormal columns of B. What
    the rounds have learnt is kept, as R or, until A has had its round, in A; where these would not fit into a
    message, B and A are longer than orthonormal ones.
    """
    layout, remade = bench.layout, theta.clone()
    slots = {slot.name: slot for slot in layout.slots}
    for name in bench.places:
        outer, core, inner = (slots[f"{name}/{part}"] for part in "BRA")
        product = layout.view(theta, outer), layout.view(theta, core) @ layout.view(theta, inner)
        columns, values, rows = singular(*product, layout.rank)
        longer = (values.max() / _LARGEST).clamp(min=1.0).sqrt()
        columns, values, rows = columns * longer, values / longer**2, rows * longer
        layout.view(remade, outer).copy_(columns)
        if "A" in bench.sent_parts(entry):
            layout.view(remade, core).copy_(values.diag())
            layout.view(remade, inner).copy_(rows)
        else:
            layout.view(remade, inner).copy_(values[:, None] * rows)
    return remade


def _cut(bench: Workbench, theta: Tensor, vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`theta` with the factors of the clients' mean product, cut to the largest rank, leading directions first."""
    layout, remade = bench.layout, theta.clone()
    for b, a in _adapters(layout):
        outers, inners = ([layout.view(vector, slot) for vector in vectors] for slot in (b, a))
        outer, inner = truncated(*stacked(outers, inners, weights), layout.rank, "balanced")
        layout.view(remade, b).copy_(outer)
        layout.view(remade, a).copy_(inner)
    return remade


def _restarted(bench: Workbench, theta: Tensor, entry: ScheduledRound) -> Tensor:
    """`theta` with B = 0 and an A drawn anew for the next round, as the clients' products are in the base by now."""
    layout, remade = bench.layout, theta.clone()
    seed = PublicSeed.from_int(bench.config.run.seed)
    for b, a in _adapters(layout):
        layout.view(remade, b).zero_()
        drawn = frozen_factor(seed, f"{b.name} after round {entry.index}", layout.rank, a.shape[1])
        layout.view(remade, a).copy_(drawn)
    return remade


def _fold(
    bench: Workbench, folded: Tensor | None, theta: Tensor, vectors: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """What the base needs for the model of `theta` to be the clients' mean model: their mean product less theta's."""
    layout, rests = bench.layout, []
    for b, a in _adapters(layout):
        outers, inners = ([layout.view(vector, slot) for vector in vectors] for slot in (b, a))
        outer, inner = stacked(outers, inners, weights)
        mean = outer @ inner
        mean -= layout.view(theta, b).double() @ layout.view(theta, a).double()
        rests.append(mean.flatten() * layout.scale)
    rest = torch.cat(rests)
    return (rest if folded is None else folded.double() + rest).float()
