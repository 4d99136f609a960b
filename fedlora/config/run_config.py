"""RunConfig: one frozen description of a run, in three notations that say the same.

    TOML file  ⇄  frozen dataclasses  ⇄  Flower's flat run_config ("privacy.epsilon" = 6.0)

Every key has a default and the defaults are the quickstart; what is not a key is an error that names the nearest one.
Knows no torch and starts fast.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedlora.config.combinations import check_combinations
from fedlora.config.sections import (
    AdapterConfig,
    DataConfig,
    EngineConfig,
    FederationConfig,
    ModelConfig,
    PrivacyConfig,
    RunSection,
    TrainingConfig,
)
from fedlora.errors import ConfigError
from fedlora.schema import Section, build_section, parse_settings, read_settings, require_known, shown, wants_text

Scalar = bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, complete: two equal configs and one public seed describe the same experiment."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    federation: FederationConfig = dataclasses.field(default_factory=FederationConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    run: RunSection = dataclasses.field(default_factory=RunSection)

    def __post_init__(self) -> None:
        check_combinations(self.model, self.adapter, self.data, self.federation, self.training, self.privacy)

    @property
    def private(self) -> bool:
        """Whether the run asks for a guarantee at all; False also for a mechanism that can give none."""
        return math.isfinite(self.privacy.epsilon) and not self.unsound

    @property
    def unsound(self) -> bool:
        """Whether the mechanism protects nothing, however much noise it adds."""
        return self.privacy.mechanism == "gredp" and self.privacy.gredp_noise == "real"

    @property
    def warmup_rounds(self) -> int:
        """Rounds that train all candidates before modules are chosen."""
        return self.adapter.planned_warmup_rounds

    @property
    def search_rounds(self) -> int:
        """Rounds that train weights and gates in turn."""
        return self.adapter.planned_search_rounds

    @classmethod
    def from_mapping(cls, tables: Mapping[str, Any], overrides: Sequence[str] = ()) -> Self:
        """Build from nested tables, then apply `section.key=value` overrides.

        Raises:
            ConfigError: unknown section or key, wrong type, value out of range or at odds with another.
        """
        merged: dict[str, dict[str, Any]] = {}
        for section, table in tables.items():
            require_known(section, SECTIONS, "section", f"[{section}]")
            if not isinstance(table, Mapping):
                raise ConfigError(
                    f"[{section}] is {shown(table)}, wanted a table of keys; write [{section}] above them"
                )
            merged[section] = dict(table)
        for override in overrides:
            section, key, value = parse_override(override)
            merged.setdefault(section, {})[key] = value
        built: dict[str, Any] = {section: build_section(SECTIONS[section], table) for section, table in merged.items()}
        return cls(**built)

    @classmethod
    def from_toml(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe; see `from_mapping` for what is refused."""
        return cls.from_mapping(parse_settings(read_settings(path, "recipe"), f"recipe {path}"), overrides)

    def to_mapping(self) -> dict[str, dict[str, Any]]:
        """Nested tables of plain values, tuples as lists; `from_mapping` inverts it."""
        tables = dataclasses.asdict(self)
        return {
            section: {key: list(value) if isinstance(value, tuple) else value for key, value in table.items()}
            for section, table in tables.items()
        }

    def to_toml(self) -> str:
        import tomli_w

        return tomli_w.dumps(self.to_mapping())

    @classmethod
    def from_flower(cls, run_config: Mapping[str, Scalar]) -> Self:
        """Build from Flower's flat run_config; tuples travel as comma-separated text."""
        tables: dict[str, dict[str, Any]] = {}
        for flat_key, value in run_config.items():
            section, _, key = flat_key.partition(".")
            tables.setdefault(section, {})[key] = value
        return cls.from_mapping(tables)

    def to_flower(self) -> dict[str, Scalar]:
        return {
            f"{section}.{key}": ",".join(value) if isinstance(value, list) else value
            for section, table in self.to_mapping().items()
            for key, value in table.items()
        }

    def digest(self) -> str:
        """SHA-256 of what decides the result: not where it goes, how, and how long anyone waits."""
        tables = self.to_mapping()
        for section, key in _NO_PART_OF_THE_RESULT:
            del tables[section][key]
        canonical = json.dumps(tables, sort_keys=True, default=str)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def with_overrides(self, *overrides: str) -> Self:
        return type(self).from_mapping(self.to_mapping(), overrides)


_NO_PART_OF_THE_RESULT = (
    ("run", "out"),
    ("run", "transport"),
    ("run", "workers"),
    ("federation", "minimum_clients"),
    ("federation", "join_deadline"),
    ("federation", "round_deadline"),
    ("federation", "rejoin_deadline"),
)

SECTIONS: dict[str, type[Section]] = {
    spec.name: typing.cast(type[Section], spec.default_factory) for spec in dataclasses.fields(RunConfig)
}


def parse_override(override: str) -> tuple[str, str, Any]:
    """Section, key and value of "section.key=value", as given with --set.

    Raises:
        ConfigError: it is not of that form.
    """
    path, equals, text = override.partition("=")
    section, dot, key = path.strip().partition(".")
    if not (equals and dot and key):
        raise ConfigError(f"override {override!r} is not section.key=value; write for example privacy.epsilon=3")
    require_known(section, SECTIONS, "section", f"[{section}]")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # bare words are text, as everyone types them in a shell
    if wants_text(SECTIONS[section], key) and not isinstance(value, str):
        value = text.strip()  # a folder may be called 2024
    return section, key, value
