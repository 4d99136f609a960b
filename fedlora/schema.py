"""What a settings file may hold: frozen sections whose fields carry type, range and meaning.

A key's type comes from its annotation, its range from `setting(...)`; whatever does not fit is a ConfigError that says
what, got and wanted, and names the nearest known key. Used by the run's config and by a site's policy, as is the one
way in which either is read from disk.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import stat
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from fedlora.errors import ConfigError

LARGEST_FILE = 2**20
"""Bytes of a settings file, at most: what is larger is something else."""


def read_settings(path: Path, kind: str, wanted: str = "a TOML file") -> bytes:
    """The content of a settings file, or of another small file that a run names.

    Neither waits for a pipe nor reads a device without end.

    Args:
        kind: what the file is to the reader of a message, such as "recipe".
        wanted: what the file should be, for a message.

    Raises:
        ConfigError: there is no regular file at `path`, it is too large or cannot be read.
    """
    try:
        if stat.S_ISREG(path.stat().st_mode):
            with path.open("rb") as file:
                content = file.read(LARGEST_FILE + 1)
            if len(content) <= LARGEST_FILE:
                return content
            reason = f"it has more than {LARGEST_FILE} bytes"
        else:
            reason = "it is a folder, a device or a pipe"
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
    raise ConfigError(f"cannot read {kind} {path}: {reason}; give the path of {wanted}")


def parse_settings(content: bytes, place: str) -> dict[str, Any]:
    """The tables of a settings file.

    Args:
        place: which file, for a message.

    Raises:
        ConfigError: it is not valid TOML.
    """
    try:
        return tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place} is not valid TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{place} is not valid TOML: nested too deeply") from error


def setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A documented config field: `at_least <= value <= at_most` and `value > above`, where given."""
    bounds = {"at_least": at_least, "above": above, "at_most": at_most}
    return dataclasses.field(default=default, metadata={"help": help, **bounds})


def required(
    help: str, *, at_least: float | None = None, above: float | None = None, at_most: float | None = None
) -> Any:
    """As `setting`, for a key without a sensible default."""
    return setting(dataclasses.MISSING, help, at_least=at_least, above=above, at_most=at_most)


class Section:
    """Checks every field of a section against its annotation and range when it is made."""

    section: typing.ClassVar[str]

    def __init_subclass__(cls, section: str) -> None:
        cls.section = section

    def __post_init__(self) -> None:
        hints = _hints(type(self))  # type: ignore[arg-type]
        for spec in dataclasses.fields(self):  # type: ignore[arg-type]
            name = f"{self.section}.{spec.name}"
            value = _coerce(name, getattr(self, spec.name), hints[spec.name])
            _check_range(name, value, spec.metadata)
            object.__setattr__(self, spec.name, value)


@functools.cache
def _hints(kind: type[Section]) -> dict[str, Any]:
    """Annotations of a section as types. They are texts, and reading them takes longer than all checks together."""
    return typing.get_type_hints(kind)


SectionType = TypeVar("SectionType", bound=Section)


def options_of(kind: type[Section], key: str) -> tuple[str, ...]:
    """The names that `key`, which takes one of a fixed set, may have."""
    return typing.get_args(_hints(kind)[key])  # type: ignore[arg-type]


def wants_text(kind: type[Section], key: str) -> bool:
    """Whether `key`, which `kind` may not know, takes any text."""
    return _hints(kind).get(key) is str  # type: ignore[arg-type]


def build_section(kind: type[SectionType], table: Mapping[str, Any], name: str = "") -> SectionType:
    """A section from its table.

    Args:
        name: of the table, where it is not that of the section.

    Raises:
        ConfigError: a key is unknown, missing, of the wrong type or out of range.
    """
    name = name or kind.section
    specs = dataclasses.fields(kind)  # type: ignore[arg-type]
    for key in table:
        require_known(key, [spec.name for spec in specs], "key", f"{name}.{key}", prefix=f"{name}.")
    for spec in specs:
        if spec.default is dataclasses.MISSING and spec.name not in table:
            raise ConfigError(f"{name}.{spec.name} is missing: {spec.metadata['help']}")
    return kind(**table)


def require_known(name: str, known: typing.Iterable[str], kind: str, shown: str, prefix: str = "") -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(sorted(known))}"
    raise ConfigError(f"unknown {kind} {shown}; {hint}")


def _coerce(name: str, value: Any, annotation: Any) -> Any:
    """`value` as `annotation` asks, or ConfigError. Whole numbers serve as floats; nothing else is converted."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        if value in arguments and type(value) is str:
            return value
        raise ConfigError(
            f"{name} = {shown(value)}, wanted one of {', '.join(map(str, arguments))}{_near(value, arguments)}"
        )
    if origin is types.UnionType or origin is typing.Union:
        for option in arguments:
            try:
                return _coerce(name, value, option)
            except ConfigError:
                continue
        raise ConfigError(f"{name} = {shown(value)}, wanted {' or '.join(map(_type_name, arguments))}")
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, list | tuple) and value and all(isinstance(part, str) and part for part in value):
            return tuple(value)
        raise ConfigError(f"{name} = {shown(value)}, wanted a non-empty list of names")
    if annotation is float and type(value) is int:
        value = float(value)
    if type(value) is not annotation:
        raise ConfigError(f"{name} = {shown(value)}, wanted {_type_name(annotation)}")
    return value


def _check_range(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    at_least, above, at_most = bounds["at_least"], bounds["above"], bounds["at_most"]
    if math.isnan(value):
        raise ConfigError(f"{name} = nan, wanted a number")
    if math.isinf(value) and name != "privacy.epsilon":
        raise ConfigError(f"{name} = {value}, wanted a finite number")
    if (
        (at_least is not None and value < at_least)
        or (above is not None and value <= above)
        or (at_most is not None and value > at_most)
    ):
        low = f">= {at_least}" if at_least is not None else f"> {above}" if above is not None else ""
        high = f"<= {at_most}" if at_most is not None else ""
        raise ConfigError(f"{name} = {value}, wanted {' and '.join(filter(None, (low, high)))}")


def _near(value: Any, options: Sequence[Any]) -> str:
    near = difflib.get_close_matches(str(value), [str(option) for option in options], n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def shown(value: Any) -> str:
    return json.dumps(value, default=str)


def _type_name(annotation: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false"}
    if typing.get_origin(annotation) is Literal:
        return " or ".join(f'"{option}"' for option in typing.get_args(annotation))
    return names.get(annotation, str(annotation))
