"""A choice of modules that the user gives as a file: `adapter.select = mask`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.adapters.dam.mask import Candidate, ModuleMask
from fedlora.errors import ConfigError
from fedlora.schema import read_settings, shown

_FORMATS = "a selection.json, a JSON list of modules or a text file with one module by line"
_LONGEST_NAME = 200
"""Of a module in a message; whatever is longer was never one."""


def read_mask(path: Path, candidates: Sequence[Candidate]) -> ModuleMask:
    """The choice in the file `adapter.mask`.

    It is the selection.json of a run (any JSON object with "candidates", each with "module" and "selected"), a JSON
    list of module paths, or text with one module path by line, where # starts a comment.

    Raises:
        ConfigError: the file cannot be read, is larger than 1 MiB or none of these; it names a module twice or one that
            this model does not have, was made for other candidates, or chooses nothing.
    """
    place = f"adapter.mask = {path}"
    try:
        text = read_settings(path, "adapter.mask", wanted=_FORMATS).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place} is not UTF-8 text: byte {error.start}; wanted {_FORMATS}") from error
    if text.lstrip().startswith(("{", "[")):
        content = _parse(text, place)
        names = _chosen_rows(content, candidates, place) if isinstance(content, dict) else content
        if not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{place} is a JSON list of other things than module paths; wanted {_FORMATS}")
    else:
        names = [name for line in text.splitlines() if (name := line.partition("#")[0].strip())]
    return _mask(names, candidates, place)


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{place} is not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise ConfigError(f"{place} is not valid JSON: {error}; wanted {_FORMATS}") from error


def _chosen_rows(content: dict[str, Any], candidates: Sequence[Candidate], place: str) -> list[str]:
    """Modules that a selection chooses, which has to be about exactly `candidates`, in any order."""
    rows = content.get("candidates")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("module"), str) and type(row.get("selected")) is bool
        for row in rows
    ):
        raise ConfigError(f'{place} is no selection: wanted "candidates", a list of {{"module", "selected"}}')
    sizes = {candidate.module: candidate for candidate in candidates}
    unknown = [row["module"] for row in rows if not _fits(row, sizes.get(row["module"]))]
    if unknown or len(rows) != len(candidates):
        example = f" ({len(unknown)} do not fit, the first {_short(unknown[0])})" if unknown else ""
        raise ConfigError(
            f"{place} is about {len(rows)} modules{example}, wanted this model's {len(candidates)} candidates; it was "
            "made for another model or other adapter.target_modules"
        )
    _check_duplicates([row["module"] for row in rows], place)
    return [row["module"] for row in rows if row["selected"]]


def _fits(row: dict[str, Any], candidate: Candidate | None) -> bool:
    return candidate is not None and all(
        row.get(size, getattr(candidate, size)) == getattr(candidate, size) for size in ("in_features", "out_features")
    )


def _mask(names: Sequence[str], candidates: Sequence[Candidate], place: str) -> ModuleMask:
    known = [candidate.module for candidate in candidates]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name[:_LONGEST_NAME], known, n=1, cutoff=0)[0]
            raise ConfigError(
                f"{place}: this model has no module {_short(name)} to adapt; the nearest it has is {shown(near)}"
            )
    _check_duplicates(names, place)
    if not names:
        raise ConfigError(f"{place} chooses no module, so that nothing would be trained; name at least one")
    return ModuleMask(tuple(candidates), tuple(name in names for name in known))


def _check_duplicates(names: Sequence[str], place: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f"{place} names {_short(name)} twice; name each module once")
        seen.add(name)


def _short(name: str) -> str:
    return shown(name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "…")
