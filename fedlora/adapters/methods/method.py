"""What a federated LoRA method is: which factors of W + (alpha/r) B A are trained in which step, and what is sent.

What the server makes of it is in `federation.merging`. Privacy needs to know only that every step trains one set of
slots, whose per-record gradients are clipped together. Knows no torch.

    ffa       B                  A frozen at random            Sun et al., ICLR 2024, arXiv 2403.12313
    ffa_svd   B                  A made anew from mean(B) A    FedSVD, arXiv 2505.12805; balanced: FedASK, 2507.09990
    rolora    B or A by round                                  RoLoRA, arXiv 2409.02346
    la_lora   B or A by step                                   LA-LoRA, arXiv 2602.19926
    lora      A and B            averaged each for itself      FedIT, arXiv 2305.05644
    fedex     A and B            the rest goes into the base   FedEx-LoRA, arXiv 2410.09432
    fedsa     A and B            only A is sent                FedSA-LoRA, arXiv 2410.01463
    flora     A and B            products go into the base     FLoRA, arXiv 2409.05976
    flexlora  A and B            products cut to a rank        FlexLoRA, arXiv 2402.11505
    hetlora   A and B            averaged, zeros where smaller HetLoRA, arXiv 2401.06432
    fed_sb    R of W + B R A     A and B frozen                Fed-SB, arXiv 2502.15436
    fed_sb_svd  B, A, then R     A and B of what was learnt    Fed-SB's start, in two charged rounds; FedSVD's division
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedlora.config import AdapterConfig

Parts = tuple[str, ...]
"""Names of parts of the flat vector: "A", "B", "R" and "head", each of which lies in one piece."""


@dataclass(frozen=True)
class Turn:
    """What one private step trains; every other part stays as it is."""

    parts: Parts
    common: Parts = ()
    """Parts that are the same for all clients throughout the round, since nobody trains them in it."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method, as far as clients are concerned."""

    factors: Parts
    """Parts that are slots, in the order of the flat vector; a head lies behind the first."""
    trains: Callable[[int], tuple[Parts, ...]]
    """From the number of a training round to the factors that its steps train, in turn."""
    local: Parts = ()
    """Parts that a site keeps to itself, between rounds too."""
    exact: bool
    """Whether the server's model is the mean of the sites' models, up to rounding."""
    folds: bool = False
    """Whether the server adds to the frozen base."""

    def turns(self, number: int, *, head: bool) -> tuple[Turn, ...]:
        """Of training round `number`; a trained head trains in every step."""
        steps = [(*factors, "head") if head else factors for factors in self.trains(number)]
        idle = tuple(part for part in self.factors if part not in self.local and not any(part in own for own in steps))
        return tuple(Turn(parts, idle) for parts in steps)


def _always(*factors: str) -> Callable[[int], tuple[Parts, ...]]:
    return lambda number: (factors,)


METHODS = {
    "ffa": Method(factors=("B",), trains=_always("B"), exact=True),
    "ffa_svd": Method(factors=("B", "A"), trains=_always("B"), exact=True),
    "rolora": Method(factors=("B", "A"), trains=lambda number: (("A" if number % 2 else "B",),), exact=True),
    "la_lora": Method(factors=("B", "A"), trains=lambda number: (("B",), ("A",)), exact=False),
    "lora": Method(factors=("B", "A"), trains=_always("B", "A"), exact=False),
    "fedex": Method(factors=("B", "A"), trains=_always("B", "A"), exact=True, folds=True),
    "fedsa": Method(factors=("B", "A"), trains=_always("B", "A"), local=("B", "head"), exact=False),
    "flora": Method(factors=("B", "A"), trains=_always("B", "A"), exact=True, folds=True),
    "flexlora": Method(factors=("B", "A"), trains=_always("B", "A"), exact=False),
    "hetlora": Method(factors=("B", "A"), trains=_always("B", "A"), exact=False),
    "fed_sb": Method(factors=("R",), trains=_always("R"), exact=True),
    "fed_sb_svd": Method(factors=("R", "B", "A"), trains=lambda number: (("BAR"[min(number, 2)],),), exact=True),
}


def method_of(adapter: AdapterConfig) -> Method:
    """The one that `adapter` names."""
    return METHODS[adapter.method]
