"""FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313): W x + (alpha/r) B A x with A frozen, B trained from zero.

With one common A the mean of the sites' B gives exactly the mean of their products B A, and noise enters linearly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlora.adapters.slots import AdapterLayout
from fedlora.errors import AdapterError
from fedlora.randomness import PublicSeed

Places = Mapping[str, tuple[str, ...]]
"""Base name of a slot -> paths of the modules it adapts: a module's own path and that path alone, or the name of an
adapter that several modules share, such as "shared/query/384x384"."""


def frozen_factor(seed: PublicSeed, base_name: str, rank: int, in_features: int) -> Tensor:
    """A [rank, in_features] float32, uniform in ±1/√in_features: PEFT's default, from the public seed.

    Named by module, so a module has the same A whatever else is adapted; modules that share a slot share its A.
    """
    generator = seed.torch("ffa", "A", base_name)
    bound = in_features**-0.5
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


def frozen_factors(seed: PublicSeed, modules: Mapping[str, nn.Linear], places: Places, rank: int) -> dict[str, Tensor]:
    """A of every base name of `places`, whose modules are among `modules`."""
    return {name: frozen_factor(seed, name, rank, modules[paths[0]].in_features) for name, paths in places.items()}


def slot_shapes(modules: Mapping[str, nn.Linear], places: Places, rank: int) -> dict[str, tuple[int, ...]]:
    """One B slot [out_features, rank] for each entry of `places`.

    Raises:
        AdapterError: an entry names no module, modules of several shapes, one that is not among `modules`, or one that
            another entry names too.
    """
    named = [path for paths in places.values() for path in paths]
    if doubled := {path for path in named if named.count(path) > 1}:
        raise AdapterError(f"module {min(doubled)} is given to more than one adapter; give each module one place")
    if unknown := set(named) - set(modules):
        raise AdapterError(f"place for module {min(unknown)}, which is not among the {len(modules)} linears at hand")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, paths in places.items():
        found = sorted({(modules[path].in_features, modules[path].out_features) for path in paths})
        if len(found) != 1:
            listed = ", ".join(f"{width}x{height}" for width, height in found) or "none"
            raise AdapterError(f"adapter {name} is for modules of shapes {listed}; only modules of one shape can share")
        shapes[f"{name}/B"] = (found[0][1], rank)
    return shapes


def build_layout(
    modules: Mapping[str, nn.Linear],
    head_modules: Mapping[str, nn.Linear],
    *,
    places: Places,
    rank: int,
    alpha: float,
) -> AdapterLayout:
    """B slots of `places`, then weight and bias slots of a trained head's linears.

    Args:
        modules: linears by path; those that no place names are left alone.
        head_modules: empty for a frozen head.
        places: base name of a slot -> paths of the modules it adapts.
        rank: r of every A and B.
        alpha: LoRA's, over r.

    Raises:
        AdapterError: as `slot_shapes`.
    """
    shapes = slot_shapes(modules, places, rank)
    for name, module in head_modules.items():
        shapes[f"head:{name}/weight"] = (module.out_features, module.in_features)
        if module.bias is not None:
            shapes[f"head:{name}/bias"] = (module.out_features,)
    return AdapterLayout.build(shapes, method="ffa", rank=rank, alpha=alpha)


def check_places(layout: AdapterLayout, places: Places) -> None:
    """Refuse places that are not those the layout was built for.

    Raises:
        AdapterError: other base names, or in another order.
    """
    laid_out = [slot.name.removesuffix("/B") for slot in layout.slots if not slot.name.startswith("head:")]
    if laid_out != [*places]:
        raise AdapterError(
            f"layout has {len(laid_out)} adapters, places are for {len(places)}, and their names are not the same in "
            "the same order; build both from one mask"
        )
