"""DiffoRA's Differential Adaptation Matrix: which modules of a model get an adapter. Knows no privacy.

Scores come in from outside, already released; what is here is a function of them and of the model's shape.
"""

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
        return tuple(
            candidate.module for candidate, chosen in zip(self.candidates, self.chosen, strict=True) if chosen
        )

    @property
    def sharing(self) -> Mapping[str, tuple[str, ...]]:
        """Those not chosen, by type and shape: slot name of the adapter they may share -> paths."""
        groups: dict[str, list[str]] = {}
        for candidate, chosen in zip(self.candidates, self.chosen, strict=True):
            if not chosen:
                shape = f"{candidate.in_features}x{candidate.out_features}"
                groups.setdefault(f"shared/{candidate.kind}/{shape}", []).append(candidate.module)
        return {name: tuple(paths) for name, paths in groups.items()}
