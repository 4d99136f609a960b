"""A choice of modules with all that led to it, as selection.json keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from fedlora.adapters.dam.mask import Candidate, ModuleMask
from fedlora.errors import AdapterError, RunFolderError

_CANDIDATE_KEYS = ("module", "layer", "type", "in_features", "out_features", "score", "selected")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which modules were chosen, how and from what. Public: made of released numbers and the model's shape."""

    mask: ModuleMask
    method: str
    """`adapter.select`."""
    discretise: str
    """What was used in the end, which may be a fallback."""
    ratio: float
    """Share of the candidates that is chosen, in the end."""
    scores: tuple[float, ...]
    """By candidate; empty where none were needed."""
    noise_to_signal: float | None
    """R of the cost-aware choice, may be ∞; None elsewhere."""
    stability: float | None
    """Expected overlap with the choice that the same scores give under once more the noise that they have; None where
    they have none, or it is not known. Scores that are all noise overlap by more than the ratio: half of their noise is
    the same. Choosing 3 of 6 they keep about 0.73."""
    diagnostics: Mapping[str, tuple[float, ...]]
    """Further numbers by candidate, such as the probe's lambda_min."""
    note: str
    """What a reader should know, such as why a fallback was taken."""

    def __post_init__(self) -> None:
        count, chosen = len(self.mask.candidates), sum(self.mask.chosen)
        if not math.isclose(self.ratio, chosen / count):
            raise AdapterError(
                f"a ratio of {self.ratio} for {chosen} chosen of {count} modules, wanted {chosen / count}"
            )
        columns = {**({"score": self.scores} if self.scores else {}), **self.diagnostics}
        for name, values in columns.items():
            if len(values) != count or not all(map(math.isfinite, values)):
                raise AdapterError(f"{name} of modules: {len(values)} values, wanted {count} finite ones")
        if taken := self.diagnostics.keys() & set(_CANDIDATE_KEYS):
            raise AdapterError(f"diagnostics named {', '.join(sorted(taken))}, which a selection uses itself")
        if self.noise_to_signal is not None and not self.noise_to_signal >= 0:
            raise AdapterError(f"noise-to-signal ratio {self.noise_to_signal}, wanted 0 or more")
        if self.stability is not None and not 0 <= self.stability <= 1:
            raise AdapterError(f"a stability of {self.stability}, wanted 0 to 1")

    def __str__(self) -> str:
        """One line for a terminal, a title or a card."""
        stable = "" if self.stability is None else f"; as much noise once more would keep {self.stability:.0%} of them"
        return f"{self.method} chose {sum(self.mask.chosen)} of {len(self.mask.chosen)} modules{stable}"

    def to_json(self) -> dict[str, Any]:
        """What selection.json holds: only types of strict JSON, ∞ as the text "inf"."""
        rows = []
        for index, (candidate, chosen) in enumerate(zip(self.mask.candidates, self.mask.chosen, strict=True)):
            rows.append(
                {
                    "module": candidate.module,
                    "layer": candidate.layer,
                    "type": candidate.kind,
                    "in_features": candidate.in_features,
                    "out_features": candidate.out_features,
                    "score": self.scores[index] if self.scores else None,
                    "selected": chosen,
                    **{name: values[index] for name, values in self.diagnostics.items()},
                }
            )
        return {
            "method": self.method,
            "discretise": self.discretise,
            "ratio": self.ratio,
            "stability": self.stability,
            "noise_to_signal": "inf" if self.noise_to_signal == math.inf else self.noise_to_signal,
            "note": self.note,
            "candidates": rows,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            RunFolderError: `content` is not what `to_json` made.
        """
        try:
            return cls._parse(content)
        except (AdapterError, AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise RunFolderError(
                f"a selection is broken: {reason}; wanted selection.json as fedlora wrote it, choose anew"
            ) from error

    @classmethod
    def _parse(cls, content: Mapping[str, Any]) -> Self:
        rows = [dict(row) for row in _typed(content["candidates"], list)]
        names = [name for name in (rows[0] if rows else {}) if name not in _CANDIDATE_KEYS]
        if any(row.keys() != {*_CANDIDATE_KEYS, *names} for row in rows):
            raise ValueError(f"each candidate needs {', '.join((*_CANDIDATE_KEYS, *names))} and nothing else")
        candidates = tuple(_candidate(row) for row in rows)
        has_scores = any(row["score"] is not None for row in rows)
        noise_to_signal = content["noise_to_signal"]
        if noise_to_signal is not None:
            noise_to_signal = math.inf if noise_to_signal == "inf" else _number(noise_to_signal)
        return cls(
            mask=ModuleMask(candidates, tuple(_typed(row["selected"], bool) for row in rows)),
            method=_typed(content["method"], str),
            discretise=_typed(content["discretise"], str),
            ratio=_number(content["ratio"]),
            scores=tuple(_number(row["score"]) for row in rows) if has_scores else (),
            noise_to_signal=noise_to_signal,
            stability=None if content["stability"] is None else _number(content["stability"]),
            diagnostics={name: tuple(_number(row[name]) for row in rows) for name in names},
            note=_typed(content["note"], str),
        )


def _candidate(row: Mapping[str, Any]) -> Candidate:
    return Candidate(
        module=_typed(row["module"], str),
        layer=_typed(row["layer"], int),
        kind=_typed(row["type"], str),
        in_features=_typed(row["in_features"], int),
        out_features=_typed(row["out_features"], int),
    )


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"got {value!r}, wanted a finite number")
    return float(value)


def _typed(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:  # exactly: True is no layer
        raise ValueError(f"got {value!r}, wanted {kind.__name__}")
    return value
