"""Slots of a method at some modules, and the factors that nobody trains: drawn from the public seed, never sent.

PEFT's convention: W x + (alpha/r) B A x with A [r, d_in] and B [d_out, r]. B starts at zero, so that training starts at
the base model; `fed_sb` has a third factor, B R A, which starts at zero instead (in `fed_sb_svd` at the identity).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fedlora.adapters.methods.method import METHODS, Parts
from fedlora.adapters.slots import AdapterLayout
from fedlora.errors import AdapterError, ConfigError
from fedlora.randomness import PublicSeed

Subspace = Literal["random", "weights"]
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


def frozen_parts(
    kind: Subspace, seed: PublicSeed, modules: Mapping[str, nn.Linear], layout: AdapterLayout, places: Places
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A and B by base name, each where it is no slot of `layout`.

    Args:
        kind: of subspace, for fed_sb.
        seed: public.
        modules: linears by path, with the base's own weights.
        layout: of the method.
        places: that it was built for.
    """
    if factors_in(layout) == ("R",):
        found = {
            name: subspace(seed, name, modules[paths[0]].weight, layout.rank, kind) for name, paths in places.items()
        }
        return {name: inner for name, (_, inner) in found.items()}, {name: outer for name, (outer, _) in found.items()}
    return ({} if "A" in layout.parts else frozen_factors(seed, modules, places, layout.rank)), {}


def subspace(seed: PublicSeed, base_name: str, weight: Tensor, rank: int, kind: Subspace) -> tuple[Tensor, Tensor]:
    """The outer factors of `fed_sb`, with orthonormal columns and rows: B [d_out, r] and A [r, d_in], float32.

    Fed-SB's own come from gradients of private records, which cost privacy that nobody charges; these cost none.
    Signs are fixed, as libraries are free in them and all machines must mean the same by R.

    Args:
        seed: public.
        base_name: of the slot.
        weight: [d_out, d_in], frozen and public.
        rank: r, no more than the smaller side of `weight`.
        kind: "random", or "weights": the leading singular vectors of `weight`, as in LoRA-XS (arXiv 2405.17604).
    """
    if kind == "weights":
        left, _, right = torch.linalg.svd(weight.detach().float().cpu(), full_matrices=False)
        columns, rows = left[:, :rank], right[:rank]
        signs = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
        return columns * signs.T, rows * signs
    drawn = (
        torch.randn(size, rank, generator=seed.torch("fed_sb", str(side), base_name))
        for side, size in enumerate(weight.shape)
    )
    outer, inner = (q * upper.diagonal().sign() for q, upper in map(torch.linalg.qr, drawn))
    return outer, inner.T.contiguous()


def slot_shapes(
    modules: Mapping[str, nn.Linear], places: Places, rank: int, factor: str = "B"
) -> dict[str, tuple[int, ...]]:
    """One slot of `factor` for each entry of `places`: A [r, d_in], B [d_out, r] or R [r, r].

    Raises:
        ConfigError: the rank of an R is above a module's smaller side, where there are not so many directions.
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
        width, height = found[0]
        if factor == "R" and rank > min(width, height):
            raise ConfigError(
                f"adapter.rank = {rank} is above the smaller side of {name} ({height}x{width}), and outer factors of R "
                "have no more directions than that; lower it"
            )
        shapes[f"{name}/{factor}"] = {"A": (rank, width), "B": (height, rank), "R": (rank, rank)}[factor]
    return shapes


def build_layout(
    modules: Mapping[str, nn.Linear],
    head_modules: Mapping[str, nn.Linear],
    *,
    places: Places,
    rank: int,
    alpha: float,
    method: str = "ffa",
) -> AdapterLayout:
    """Slots of the method's first factor, then weight and bias slots of a trained head's linears, then other factors.

    Args:
        modules: linears by path; those that no place names are left alone.
        head_modules: empty for a frozen head.
        places: base name of a slot -> paths of the modules it adapts.
        rank: r of every A and B.
        alpha: LoRA's, over r.
        method: a name in `METHODS`.

    Raises:
        AdapterError, ConfigError: as `slot_shapes`.
    """
    first, *others = METHODS[method].factors
    shapes = slot_shapes(modules, places, rank, first)
    for name, module in head_modules.items():
        shapes[f"head:{name}/weight"] = (module.out_features, module.in_features)
        if module.bias is not None:
            shapes[f"head:{name}/bias"] = (module.out_features,)
    for factor in others:
        shapes |= slot_shapes(modules, places, rank, factor)
    return AdapterLayout.build(shapes, method=method, rank=rank, alpha=alpha)


def factors_in(layout: AdapterLayout) -> Parts:
    """Which of A, B and R are slots of `layout`, in its order."""
    return tuple(part for part in layout.parts if part != "head")


def check_places(layout: AdapterLayout, places: Places) -> None:
    """Refuse places that are not those the layout was built for.

    Raises:
        AdapterError: other base names, or in another order.
    """
    for factor in factors_in(layout):
        laid_out = [slot.name.removesuffix(f"/{factor}") for slot in layout.slots if slot.part == factor]
        if laid_out != [*places]:
            raise AdapterError(
                f"layout has {len(laid_out)} adapters, places are for {len(places)}, and their names are not the same "
                "in the same order; build both from one mask"
            )
