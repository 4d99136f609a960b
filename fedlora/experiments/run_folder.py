"""The folder a run leaves behind: what was asked, what happened, what it cost, and the adapter.

config.toml   as resolved         rounds.jsonl   one object per round       curve.png
record.json   the whole account   adapter/       in PEFT format             checkpoint.safetensors   while it runs
PRIVACY.md    what is promised    ledger.sqlite  what each simulated site was charged
selection.json, dam.png           which modules were chosen and by which scores, where any were to be
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedlora.claims import claim, is_claimed
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, FedloraError, RunFolderError, RunInterrupted


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
        folder = cls(Path(config.run.out) if config.run.out else _unused(config))
        try:
            text = config.to_toml().encode()
            folder.path.mkdir(parents=True, exist_ok=bool(config.run.out))
            replace_file(folder.config_file, text)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise _cannot_make(folder.path, error) from error
        return folder

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """The folder at `run.out` of an interrupted run with this very configuration; else a new one.

        Raises:
            RunFolderError: another run is there, one that has ended, or none can be made.
        """
        found = cls(Path(config.run.out))
        if config.run.out and found.config_file.is_file():
            began = found.read_config()
            if (began.digest(), began.run.transport) == (config.digest(), config.run.transport):
                return cls.open(found.path)
            raise RunFolderError(
                f"run folder {found.path} holds a run with another configuration or transport and is left as it is; "
                "choose another run.out, or submit what it began with"
            )
        return cls.create(config)

    @staticmethod
    def check_free(config: RunConfig) -> None:
        """Refuse a folder with anything in it, before any work is done.

        Raises:
            RunFolderError: `run.out` is not empty, not a folder, or cannot be looked at.
        """
        path = Path(config.run.out)
        try:
            taken = bool(config.run.out) and path.exists() and (not path.is_dir() or any(path.iterdir()))
        except OSError as error:
            raise _cannot_make(path, error) from error
        if taken and path.is_dir():
            raise RunFolderError(
                f"run folder {path} is not empty and is left as it is; choose another with --out, "
                f"or go on with --resume {shlex.quote(str(path))}"
            )
        if taken:
            raise RunFolderError(f"run folder {path} is a file and is left as it is; choose another with --out")

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
            raise RunFolderError(f"cannot read the run in {self.path}: {error}") from error

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from going on with this run meanwhile; a claim ends with its process, however that ends.

        Raises:
            RunFolderError: another process has it.
        """
        with self.config_file.open("rb") as file:
            refusal = f"another process is at work on the run in {self.path}; wait for it, or stop it first"
            claim(file, RunFolderError(refusal))
            yield

    def is_claimed(self) -> bool:
        """Whether some process is at work on this run; False also where there is nothing to claim."""
        return is_claimed(self.config_file)

    @contextmanager
    def resumable(self, policy: Path | None = None) -> Iterator[None]:
        """Ctrl-C in here names the command that goes on, with the `policy` that the run obeys."""
        try:
            yield
        except KeyboardInterrupt:
            rules = "" if policy is None else f" --policy {shlex.quote(str(policy))}"
            raise RunInterrupted(
                f"interrupted, rounds done: {len(self.read_rounds())}; "
                f"fedlora simulate --resume {shlex.quote(str(self.path))}{rules} goes on"
            ) from None

    @contextmanager
    def failing(self) -> Iterator[None]:
        """A run that fails in here says why in its folder, for whoever looks there; a person's interrupt is none.

        A folder that holds no state of this run is left as it is.
        """
        try:
            yield
        except RunFolderError:
            raise
        except Exception as error:  # of others than ours the text is not for keeping: nobody knows what it quotes
            reason = str(error) if isinstance(error, FedloraError) else f"{type(error).__name__}; the log says where"
            replace_file(self.failure_file, f"{' '.join(reason.split())}\n".encode())
            raise

    @property
    def started(self) -> str:
        """When the folder was made, which is before anything private was touched."""
        return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.config_file.stat().st_mtime))

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
    def privacy_file(self) -> Path:
        return self.path / "PRIVACY.md"

    @property
    def checkpoint_file(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def asked_file(self) -> Path:
        return self.path / "asked"

    @property
    def failure_file(self) -> Path:
        """Why the run ended without a record."""
        return self.path / "failure"

    @property
    def answers_folder(self) -> Path:
        """What sites elsewhere have answered in the round under way."""
        return self.path / "answers"

    @property
    def ledger_file(self) -> Path:
        """What the simulated sites were charged; not there where they obey a policy, which names its own."""
        return self.path / "ledger.sqlite"

    @property
    def adapter_folder(self) -> Path:
        return self.path / "adapter"

    @property
    def personal_folder(self) -> Path:
        """Adapters of single simulated sites, where a method has them keep a part for themselves."""
        return self.path / "personal"

    @property
    def curve_file(self) -> Path:
        return self.path / "curve.png"

    @property
    def selection_file(self) -> Path:
        """Which modules were chosen; `adapter.mask` of another run takes it."""
        return self.path / "selection.json"

    @property
    def selection_plot(self) -> Path:
        return self.path / "dam.png"

    def append_round(self, report: Mapping[str, Any]) -> None:
        """One line, durable before the next round starts."""
        with self.rounds_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_json(report)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def mark_asked(self, index: int) -> None:
        """Round `index` is about to be asked for; durable before anyone is."""
        replace_file(self.asked_file, f"{index}\n".encode())

    def last_asked(self) -> int:
        """The round that was asked for last, -1 where none was."""
        try:
            return int(self.asked_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return -1

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

    def restore_rounds(self, count: int, last: Mapping[str, Any] | None) -> None:
        """Bring the rounds in line with a checkpoint, which is written before a round's line is.

        Args:
            count: whole rounds that the checkpoint knows.
            last: report of the last of them, added where a stop came before its line was written.

        Raises:
            RunFolderError: the rounds are not those of the checkpoint: one of the files is lost or damaged, and rounds
                that are spent would be spent again.
        """
        rounds = self.read_rounds()
        if last is not None and last["round"] not in (line["round"] for line in rounds):
            rounds.append(dict(last))
        if len(rounds) != count:
            raise RunFolderError(
                f"cannot resume {self.path}: {self.rounds_file.name} has {len(rounds)} readable rounds, the checkpoint "
                f"{count}; a file is lost or damaged: start the run anew"
            )
        replace_file(self.rounds_file, "".join(json.dumps(line) + "\n" for line in rounds).encode())

    def write_selection(self, selection: Mapping[str, Any]) -> None:
        replace_file(self.selection_file, (json.dumps(selection, indent=2) + "\n").encode())

    def write_record(self, record: Mapping[str, Any]) -> None:
        replace_file(self.record_file, (json.dumps(to_json(record), indent=2) + "\n").encode())


def _unused(config: RunConfig) -> Path:
    """runs/<task>-<method>-<time>, numbered where several runs start in one second."""
    stem = f"runs/{config.data.task}-{config.adapter.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
    return next(path for path in map(Path, names) if not path.exists())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file. A kill leaves the old one or the new one, whole."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _cannot_make(path: Path, error: OSError | ValueError) -> RunFolderError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return RunFolderError(f"cannot make run folder {path}: {reason}; choose another with --out")


def to_json(value: Any) -> Any:
    """`value` with every infinite number as the text "inf": JSON has none, and nobody may read ε = ∞ as null."""
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): to_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(part) for part in value]
    return value
