"""FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313): W x + (alpha/r) B A x with A frozen, B trained from zero.

With one common A the mean of the sites' B gives exactly the mean of their products B A, and noise enters linearly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlora.adapters.slots import AdapterLayout
from fedlora.randomness import PublicSeed


def frozen_factor(seed: PublicSeed, module_name: str, rank: int, in_features: int) -> Tensor:
    """A [rank, in_features] float32, uniform in ±1/√in_features: PEFT's default, from the public seed.

    Named by module, so a module has the same A whatever else is adapted.
    """
    generator = seed.torch("ffa", "A", module_name)
    bound = in_features**-0.5
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


def slot_shapes(modules: Mapping[str, nn.Linear], rank: int) -> dict[str, tuple[int, ...]]:
    """One B slot [out_features, rank] for each adapted linear."""
    return {f"{name}/B": (module.out_features, rank) for name, module in modules.items()}


def build_layout(
    modules: Mapping[str, nn.Linear], head_modules: Mapping[str, nn.Linear], *, rank: int, alpha: float
) -> AdapterLayout:
    """B slots of `modules`, then weight and bias slots of a trained head's linears (empty for a frozen head)."""
    shapes = slot_shapes(modules, rank)
    for name, module in head_modules.items():
        shapes[f"head:{name}/weight"] = (module.out_features, module.in_features)
        if module.bias is not None:
            shapes[f"head:{name}/bias"] = (module.out_features,)
    return AdapterLayout.build(shapes, method="ffa", rank=rank, alpha=alpha)
