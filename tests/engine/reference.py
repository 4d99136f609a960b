"""Per-record gradients as anyone would write them down: the truth that back ends are held against."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from fedlora.adapters.methods import Turn
from fedlora.adapters.methods import layout as layouts
from fedlora.adapters.slots import AdapterLayout
from fedlora.config import RunConfig
from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import record_losses
from fedlora.models import Classifier, load_classifier
from fedlora.randomness import PublicSeed


def random_theta(layout: AdapterLayout, clients: int, scale: float = 0.3, seed: int = 1) -> Tensor:
    return scale * torch.randn(clients, layout.size, generator=torch.Generator().manual_seed(seed))


def untouched_classifier(config: RunConfig, num_labels: int = 2) -> Classifier:
    return load_classifier(
        config.model,
        num_labels=num_labels,
        seed=PublicSeed.from_int(config.run.seed),
        attention=config.model.attention,
    )


def loop_over_records(
    config: RunConfig,
    layout: AdapterLayout,
    places: layouts.Places,
    theta: Tensor,
    dataset: EncodedDataset,
    owner: Tensor,
    turn: Turn | None = None,
) -> list[Tensor]:
    """One unpadded record at a time, through a model without adapters whose weights are W + alpha/r B A, or B R A."""
    classifier = untouched_classifier(config, num_labels=1 if dataset.labels.dtype == np.float32 else 2)
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    linears = classifier.target_modules([path for paths in places.values() for path in paths])
    seed = PublicSeed.from_int(config.run.seed)
    frozen = dict(zip("AB", layouts.frozen_parts(config.adapter.subspace, seed, linears, layout, places), strict=True))
    heads = {f"head:{path}": module for path, module in classifier.head_modules().items()}
    scale = config.adapter.alpha / config.adapter.rank
    rows: list[list[Tensor]] = []
    for record in range(len(dataset)):
        values = {slot.name: layout.view(theta[owner[record]], slot).clone() for slot in layout.slots}
        trained = [slot.name for slot in layout.slots if turn is None or slot.part in turn.parts]
        leaves = [values[name].requires_grad_() for name in trained]
        weights: dict[str, Tensor] = {}
        for base, paths in places.items():
            core = values.get(f"{base}/R", torch.eye(layout.rank))
            factors = [values[f"{base}/{part}"] if part in layout.parts else frozen[part][base] for part in "BA"]
            product = factors[0] @ core @ factors[1]
            for path in paths:
                weight = linears[path].weight
                weights[names[id(weight)]] = weight + scale * product
        for base, module in heads.items():
            for suffix, parameter in module.named_parameters():
                if f"{base}/{suffix}" in values:
                    weights[names[id(parameter)]] = values[f"{base}/{suffix}"]
        batch, labels = dataset.batch(np.array([record]))
        loss = record_losses(functional_call(classifier, weights, (batch,)), labels).sum()
        rows.append([gradient.flatten() for gradient in torch.autograd.grad(loss, leaves)])
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def assert_same(got: list[Tensor], wanted: list[Tensor], relative: float = 1e-5) -> None:
    """Every record's error relative to the norm of its whole gradient, and no gradient is trivially zero."""
    first, second = torch.cat(got, dim=1), torch.cat(wanted, dim=1)
    assert first.shape == second.shape
    assert first.dtype == torch.float32
    assert (second.norm(dim=1) > 1e-4).all(), "a gradient of zero proves nothing"
    assert ((first - second).norm(dim=1) <= relative * second.norm(dim=1)).all()
    for part, other in zip(got, wanted, strict=True):
        assert (part - other).abs().max() <= 3 * relative * second.abs().max()
