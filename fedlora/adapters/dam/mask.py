"""Modules that may get an adapter, and which of them do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.errors import AdapterError


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A linear map that may get an adapter."""

    module: str
    """Path inside the backbone."""
    layer: int
    kind: str
    """Canonical type, such as "query"."""
    in_features: int
    out_features: int


@dataclass(frozen=True)
class ModuleMask:
    """One row of the DAM per layer, flat: which candidates were chosen, in the model's order."""

    candidates: tuple[Candidate, ...]
    chosen: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.chosen) != len(self.candidates):
            raise AdapterError(
                f"a mask of {len(self.chosen)} modules, this model has {len(self.candidates)} candidates; "
                "it was made for another model or other adapter.target_modules"
            )
        if not any(self.chosen):
            raise AdapterError("a mask that chooses no module, so that nothing would be trained; choose at least one")

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the chosen ones."""
        return tuple(candidate.module for candidate, chosen in zip(self.candidates, self.chosen, strict=True) if chosen)

    @property
    def sharing(self) -> Mapping[str, tuple[str, ...]]:
        """Those not chosen, by type and shape: slot name of the adapter they may share -> paths."""
        groups: dict[str, list[str]] = {}
        for candidate, chosen in zip(self.candidates, self.chosen, strict=True):
            if not chosen:
                shape = f"{candidate.in_features}x{candidate.out_features}"
                groups.setdefault(f"shared/{candidate.kind}/{shape}", []).append(candidate.module)
        return {name: tuple(paths) for name, paths in groups.items()}


def overlap(first: ModuleMask, second: ModuleMask) -> float:
    """|both| / max(|first|, |second|): the share of the larger choice that the smaller one chose too, in [0, 1].

    Symmetric, and 1 only for equal masks. A random choice of k of M modules has an expected overlap of k / M with any
    choice of at most k, so that of two random halves is 1/2: compare with that, not with 0.

    Raises:
        AdapterError: the masks are of different models.
    """
    if first.candidates != second.candidates:
        raise AdapterError(
            f"masks over {len(first.candidates)} and {len(second.candidates)} candidates that are not the same; "
            "compare masks of one model and the same adapter.target_modules"
        )
    both = sum(a and b for a, b in zip(first.chosen, second.chosen, strict=True))
    return both / max(sum(first.chosen), sum(second.chosen))
