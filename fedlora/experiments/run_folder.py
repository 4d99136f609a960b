"""The folder a run leaves behind: what was asked, what happened, what it cost, and the adapter.

config.toml   as resolved         rounds.jsonl   one object per round       curve.png
record.json   the whole account   adapter/       in PEFT format             checkpoint.safetensors   while it runs
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, RunFolderError


@dataclass(frozen=True)
class RunFolder:
    """One run's files."""

    path: Path

    @classmethod
    def create(cls, config: RunConfig) -> Self:
        """A new folder at `run.out`, or runs/<task>-<method>-<time>.

        Raises:
            RunFolderError: the folder exists and is not empty, or cannot be made. Nothing is overwritten.
        """
        cls.check_free(config)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = Path(config.run.out or f"runs/{config.data.task}-{config.adapter.method}-{stamp}")
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path)
            folder.config_file.write_text(config.to_toml(), encoding="utf-8")
        except OSError as error:
            raise RunFolderError(
                f"cannot make run folder {path}: {error.strerror}; choose another with --out"
            ) from error
        return folder

    @staticmethod
    def check_free(config: RunConfig) -> None:
        """Refuse a folder with anything in it, before any work is done.

        Raises:
            RunFolderError: `run.out` is not empty, or not a folder.
        """
        path = Path(config.run.out)
        if config.run.out and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunFolderError(
                f"run folder {path} is not empty and is left as it is; choose another with --out, "
                f"or go on with --resume {path}"
            )

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing run's folder, to resume.

        Raises:
            RunFolderError: it is no run folder, or the run in it has ended.
        """
        folder = cls(path)
        if not folder.config_file.is_file():
            raise RunFolderError(
                f"{path} is not a run folder: it has no config.toml; give the folder of an earlier run"
            )
        if folder.record_file.exists():
            raise RunFolderError(f"the run in {path} has ended (record.json is there); start a new one")
        return folder

    def read_config(self) -> RunConfig:
        """The run's config as resolved.

        Raises:
            RunFolderError: it cannot be read as one.
        """
        try:
            return RunConfig.from_toml(self.config_file)
        except ConfigError as error:
            raise RunFolderError(f"cannot resume {self.path}: {error}") from error

    @property
    def config_file(self) -> Path:
        return self.path / "config.toml"

    @property
    def rounds_file(self) -> Path:
        return self.path / "rounds.jsonl"

    @property
    def record_file(self) -> Path:
        return self.path / "record.json"

    @property
    def checkpoint_file(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def adapter_folder(self) -> Path:
        return self.path / "adapter"

    @property
    def curve_file(self) -> Path:
        return self.path / "curve.png"

    def append_round(self, report: Mapping[str, Any]) -> None:
        """One line, durable before the next round starts."""
        with self.rounds_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_json(report)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_rounds(self) -> list[dict[str, Any]]:
        """Rounds so far; a last line cut off by a crash is left out."""
        rounds = []
        if self.rounds_file.exists():
            for line in self.rounds_file.read_text(encoding="utf-8").splitlines():
                try:
                    rounds.append(json.loads(line))
                except ValueError:
                    break
        return rounds

    def keep_rounds_before(self, index: int) -> None:
        """Drop rounds that were reported but not checkpointed: a resumed run does them again."""
        kept = [line for line in self.read_rounds() if line["round"] < index]
        partial = self.rounds_file.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(self.rounds_file)

    def write_record(self, record: Mapping[str, Any]) -> None:
        partial = self.record_file.with_suffix(".partial")
        partial.write_text(json.dumps(to_json(record), indent=2) + "\n", encoding="utf-8")
        partial.replace(self.record_file)


def to_json(value: Any) -> Any:
    """`value` with every infinite number as the text "inf": JSON has none, and nobody may read ε = ∞ as null."""
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): to_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(part) for part in value]
    return value
