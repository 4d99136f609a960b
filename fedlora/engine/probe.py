"""Scores of modules at ε = 0: how strongly, and in how many directions, public texts pull at each of them.

DiffoRA (Jiang, Wang and Yuan 2025, arXiv 2502.08905) chooses modules so that the smallest eigenvalue of a Gram matrix
of gradients grows, which bounds how fast training converges (Du et al., ICLR 2019, arXiv 1810.02054). That needs no
training and no labels, so it can be looked at on public text. The score is the matrix's trace, as in NASI (Shu et al.,
ICLR 2022, arXiv 2109.00817): the smallest eigenvalue hangs on the two texts that are most alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapters.slots import AdapterLayout
from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import GradientBackend
from fedlora.engine.batching import microbatches
from fedlora.errors import AdapterError, DataError, ModelError

_BYTES_HELD = 2**29  # of gradients at a time: MiniLM's 36 linears at rank 8 and 256 texts are a third of it


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeScores:
    """What the Gram matrices K_m of M modules say, in the order asked for; each [M] float64 on the CPU."""

    trace: Tensor
    """Mean squared norm of a text's gradient: the score."""
    lambda_min: Tensor
    """Smallest eigenvalue; K_m is divided by the number of texts, so times that it is the one of the literature."""
    effective_rank: Tensor
    """exp of the entropy of the normalised eigenvalues (Roy and Vetterli, EUSIPCO 2007); 0 for a module without any."""


def probe_scores(
    backend: GradientBackend,
    dataset: EncodedDataset,
    theta: Tensor,
    *,
    layout: AdapterLayout,
    modules: Sequence[str],
    num_labels: int,
    token_budget: int,
) -> ProbeScores:
    """Spectra of K_m[i, j] = 1 / (n C) Σ_c <g_im^c, g_jm^c> over n public texts and C possible labels.

    g_im^c is the gradient of text i's loss, had it label c, with respect to B of module m: an empirical tangent kernel
    that no label enters. A score has no targets to run over; 0 and 1 stand in for them.

    ONLY PUBLIC TEXT. What is returned is exact: it is no release, no ledger knows of it, and it costs nothing because
    nothing private goes in. Above all `lambda_min` is never to be computed on private records, whatever the noise: one
    record that nearly repeats another takes it to zero, so that no useful bound on its sensitivity exists.

    Gradients of all texts are needed at once. Where they are too large, modules are taken in groups, each with passes
    over the texts of its own; the result is the same.

    Args:
        backend: has all candidates attached, and a head: a prototype head is there once its release has been made,
            which only post-processes that release.
        dataset: n >= 2 public texts; their labels are not looked at.
        theta: [P] float32; B = 0 is what a run starts from.
        layout: of `theta`.
        modules: paths of M modules, each with a slot `<path>/B`.
        num_labels: C; 1 for a regression.
        token_budget: padded tokens of a micro-batch.

    Raises:
        AdapterError: a module has no slot, or all gradients are zero, as under a head that is not set.
        DataError: fewer than two texts.
        ModelError: a gradient is not finite.
    """
    if len(dataset) < 2:
        raise DataError(f"{len(dataset)} public texts to compare modules on, wanted at least 2")
    slots = _positions(layout, modules)
    groups = _groups([backend.slot_sizes[slot] for slot in slots], _BYTES_HELD // (4 * len(dataset)))
    spectra = torch.cat([_spectra(backend, dataset, theta, slots[group], num_labels, token_budget) for group in groups])
    trace = spectra.sum(dim=1)
    if not trace.any():
        raise AdapterError(
            "public texts pull at no module: all gradients are zero, as they are before the head is set; "
            "probe after the head was made"
        )
    shares = spectra / trace.clamp(min=torch.finfo(trace.dtype).tiny).unsqueeze(1)
    ranks = torch.special.entr(shares).sum(dim=1).exp()
    return ProbeScores(trace=trace, lambda_min=spectra[:, 0], effective_rank=torch.where(trace > 0, ranks, 0.0))


def _positions(layout: AdapterLayout, modules: Sequence[str]) -> list[int]:
    """Where the modules' slots stand in the layout."""
    known = {slot.name: position for position, slot in enumerate(layout.slots)}
    missing = [module for module in modules if f"{module}/B" not in known]
    if missing or not modules:
        raise AdapterError(
            f"{len(missing)} of {len(modules)} modules to be scored have no slot{', such as ' if missing else ''}"
            f"{''.join(missing[:1])}; attach all candidates before the probe"
        )
    return [known[f"{module}/B"] for module in modules]


def _groups(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Cut `sizes` into runs that add up to at most `most`; a single larger one makes a run."""
    start, held = 0, 0
    for position, size in enumerate(sizes):
        if position > start and held + size > most:
            yield slice(start, position)
            start, held = position, 0
        held += size
    yield slice(start, len(sizes))


def _spectra(
    backend: GradientBackend,
    dataset: EncodedDataset,
    theta: Tensor,
    slots: Sequence[int],
    num_labels: int,
    token_budget: int,
) -> Tensor:
    """Eigenvalues of the slots' Gram matrices, ascending, [len(slots), n] float64 on the CPU."""
    count = len(dataset)
    targets = list(torch.arange(num_labels) if num_labels > 1 else torch.tensor([0.0, 1.0]))
    grams = theta.new_zeros(len(slots), count, count, dtype=torch.float64)
    for target in targets:
        for gram, gradients in zip(
            grams, _gradients(backend, dataset, theta, slots, target, token_budget), strict=True
        ):
            rows = gradients.double()
            gram.addmm_(rows, rows.T)
    if not grams.isfinite().all():
        raise ModelError("gradients of public texts are not finite under this model; set model.dtype=float32")
    # One by one: in a batch, a matrix' eigenvalues round by its place (seen on an AMD CPU).
    spectra = torch.stack([torch.linalg.eigvalsh(gram) for gram in grams.cpu() / (count * len(targets))])
    return spectra.clamp_(min=0.0)  # rounding takes a zero to either side


def _gradients(
    backend: GradientBackend,
    dataset: EncodedDataset,
    theta: Tensor,
    slots: Sequence[int],
    target: Tensor,
    token_budget: int,
) -> list[Tensor]:
    """For each slot the gradients of all texts, had they all the label `target`, [n, size of slot]."""
    held = [theta.new_empty(len(dataset), backend.slot_sizes[slot]) for slot in slots]
    for group in microbatches(dataset.lengths, token_budget):
        batch, _ = dataset.batch(group, theta.device)
        rows = torch.from_numpy(group.copy()).to(theta.device)  # a reversed view, which torch does not take
        labels = target.to(theta.device).expand(len(rows))
        gradients = backend.gradients(theta.unsqueeze(0), batch, labels, torch.zeros_like(rows))
        for whole, slot in zip(held, slots, strict=True):
            whole[rows] = gradients[slot]
    return held
