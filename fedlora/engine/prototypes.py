"""The private prototype head: noisy per-class sums of sentence embeddings, released once, made into a linear head.

Idea of FedNCM (Legate et al., NeurIPS 2023), here under a Gaussian mechanism. A record contributes one unit vector to
its class's sum and 1 to its class's count, so adding or removing it moves the released vector by at most √2.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters.slots import AdapterLayout
from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import Batch
from fedlora.engine.batching import Shapes
from fedlora.models import Classifier

LARGEST_LOGIT = 1000.0
"""No head made here has a number beyond it, whatever the noise (`prototype_head` says why), and no site takes one."""


def prototype_layout(num_labels: int, hidden_size: int) -> AdapterLayout:
    """What a site releases: `sums` [C, h] and `counts` [C]."""
    shapes = {"prototype/sums": (num_labels, hidden_size), "prototype/counts": (num_labels,)}
    return AdapterLayout.build(shapes, method="prototype", rank=1, alpha=1.0)


@torch.no_grad()
def unit_embeddings(classifier: Classifier, batch: Batch) -> Tensor:
    """What each record may add to its class's sum, [N, h] float64 of L2 norm at most 1, or not finite.

    Of the whole micro-batch, dummies and all: a reduction too chooses its order by shape, so that the norm of a record
    would otherwise show how many others there are.
    """
    embeddings = classifier.embed(dict(batch)).double()
    embeddings /= embeddings.norm(dim=1, keepdim=True).clamp(min=1.0)
    # Cut towards zero to multiples of 2^-30: no record gets longer and float64 adds them without rounding.
    return (embeddings * 2.0**30).trunc_() * 2.0**-30


@torch.no_grad()
def class_sums(
    classifier: Classifier, dataset: EncodedDataset, records: np.ndarray, layout: AdapterLayout, shapes: Shapes
) -> Tensor:
    """Un-noised sums and counts over `records`, flat [C (h + 1)] float64: private until a mechanism has noised it.

    Each record's contribution has L2 norm at most √2; one whose embedding is not finite contributes nothing. Sums of up
    to 2^23 records are exact, whatever their order: no rounding adds to how far one record moves them. Nor does what
    one record changes in the embeddings of others: `shapes` has seen that it changes nothing, or takes them one by one.
    """
    device = next(classifier.parameters()).device
    total = torch.zeros(layout.size, dtype=torch.float64, device=device)
    sums, counts = (layout.view(total, slot) for slot in layout.slots)
    for group in shapes.cut_full(dataset.lengths[records], dataset.longest, "embeddings"):
        own = records[group.positions]
        batch, labels = dataset.batch(own, device, shape=(group.rows, group.columns))
        embeddings, labels = unit_embeddings(classifier, batch)[: len(own)], labels[: len(own)]
        usable = torch.isfinite(embeddings).all(dim=1)
        sums.index_add_(0, labels[usable], embeddings[usable])
        counts += torch.bincount(labels[usable], minlength=len(counts))
    return total


def prototype_head(released: Tensor, layout: AdapterLayout, temperature: float) -> tuple[Tensor, Tensor]:
    """Nearest-class-mean head from a noisy release: weight [C, h] and bias [C]. Post-processing, costs no privacy.

    With class means m_c, their average m and s the mean distance |m_c - m|, the logits are
    log(count_c) - temperature / (2 s) * |z - m_c|² up to a term common to all classes: a Gaussian class model with its
    prior, without which training first shifts every embedding towards the larger class. Dividing by s makes the
    temperature mean the same whether the classes lie close together or far apart.

    A mean of embeddings lies in the unit ball, as they do. One that noise has carried out of it, as happens where a
    class has few records, is put back on its surface (the nearest point of the ball); all others stay as they are. This
    bounds the head: no offset is longer than C/2 times the mean of all, so that the weights stay within temperature
    · C / 2, and, as | |m_c|² - |m|² | <= 2 |m_c - m| in the ball, the biases do but for the prior. That is at most 89,
    the log of the largest float32, and `model.temperature` is at most 500: no number reaches `LARGEST_LOGIT`.
    """
    sums, counts = (layout.view(released, slot) for slot in layout.slots)
    means = sums / counts.clamp(min=1.0).unsqueeze(1)
    means = means * means.norm(dim=1, keepdim=True).reciprocal().clamp(max=1.0)
    centre = means.mean(dim=0)
    offsets = means - centre
    scale = temperature / offsets.norm(dim=1).mean().clamp(min=1e-6)
    weight = scale * offsets
    prior = counts.clamp(min=1.0).log()
    bias = prior - prior.mean() - scale * (offsets @ centre + offsets.square().sum(dim=1) / 2)
    return weight, bias
