"""Runs found in a folder: finished ones for its store, and those that have not ended."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedlora.errors import ConfigError, RunFolderError, StoreError
from fedlora.experiments.record import SCHEMA_VERSION
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.runs.store import FILE_NAME, Store
from fedlora.experiments.runs.stored_run import StoredRun
from fedlora.experiments.sweeps.sweep import Cell, Sweep
from fedlora.schema import shown

Role = Literal["cell", "trial", "run"]
PLACES: Mapping[str, Role] = {"": "run", "cells": "cell", "trials": "trial"}
"""Where run folders lie, from the folder of runs or the sweep's."""


_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "config_digest": str,
    "config.data.task": str,
    "config.adapter.method": str,
    "config.run.seed": int,
    "config.privacy.epsilon": (int, float, str),
    "metric.name": str,
    "metric.value": (int, float),
    "wall_seconds": (int, float),
    "started": str,
    "clients": list,
}
"""What a store takes from a record."""


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What is known of the runs of a folder.

    Attributes:
        store: a copy in memory of the folder's store, with unfinished runs besides.
        complaints: what was left out and why, a line each.
    """

    store: Store
    complaints: Sequence[str]

    def find(self, word: str) -> StoredRun:
        """The run of that folder, or the only one whose folder, its last part or its digest starts with `word`.

        Raises:
            StoreError: there is none, or there are several.
        """
        runs = [(row["folder"], row["folder"].rpartition("/")[2], row["digest"]) for row in self.store.select()]
        word = word.rstrip("/") or word
        called = {folder: folder if "/" in word else name for folder, name, _ in runs}
        found = (
            [run[0] for run in runs if word in run[:2]]
            or [folder for folder, name in called.items() if name.startswith(word)]
            or [run[0] for run in runs if run[2].startswith(word)]
        )
        if not found:
            place = shlex.quote(str(self.store.path.parent))
            raise StoreError(f"no run {word!r} in {place}; `fedlora runs list {place}` names them")
        if len(found) > 1:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise StoreError(f"{word!r} could be {', '.join(found[:5])}{more}; give more of its name")
        return self.store.get(found[0])


def gather(place: Path) -> Gathered:
    """The runs of a folder, and its store brought up to date with them where it can be written.

    Args:
        place: a sweep's folder, a folder of run folders, or a store that lies without its run folders.

    Raises:
        StoreError: there is no such folder, it is that of a single run, or its store is not one of this version.
    """
    _check(place)
    if place.is_file():
        Store.open(place, read_only=True).close()  # an empty file is none
        return Gathered(store=Store.copy(place), complaints=())
    store, complaints = Store.copy(place / FILE_NAME), []
    known, cells = store.stamps(), None
    fresh: list[StoredRun] = []
    for folder, role in run_folders(place):
        name = folder.relative_to(place).as_posix()
        stamp = stamp_of(RunFolder(folder).record_file)
        if name in known and stamp in ("", known[name]):
            continue  # without a record: it has failed, and the store knows why
        if cells is None and role == "cell":
            cells = _cells(place)
        cell = (cells or {}).get(name)
        axes, digest = (cell.axes, cell.digest) if cell else (None, None)
        try:
            found = (
                stored_run(folder, relative_to=place, role=role, axes=axes, digest=digest)
                if stamp
                else _unfinished(folder, relative_to=place, role=role, axes=axes)
            )
            fresh.append(found)
        except (StoreError, RunFolderError) as error:
            complaints.append(str(error))
    store.put(*fresh, keep_labels=True)
    return Gathered(store=store, complaints=[*complaints, *_keep(place, [run for run in fresh if run.record])])


def run_folders(root: Path) -> Iterator[tuple[Path, Role]]:
    """Folders of runs below `root`, finished or not, in order."""
    for place, role in PLACES.items():
        if not (root / place).is_dir():
            continue
        for folder in sorted((root / place).iterdir()):
            files = RunFolder(folder)
            if not folder.name.startswith(".") and (files.config_file.is_file() or files.record_file.is_file()):
                yield folder, role


def stored_run(
    folder: Path,
    *,
    relative_to: Path,
    role: Role = "run",
    axes: Mapping[str, str] | None = None,
    digest: str | None = None,
) -> StoredRun:
    """The finished run in `folder`, as a store keeps it.

    Args:
        relative_to: the store's folder.
        axes: label by axis of the sweep that it belongs to.
        digest: of the config that was asked for; None: what the record says, of the config that ran.

    Raises:
        StoreError: naming record.json, which is not there, damaged or of a newer version.
    """
    path = RunFolder(folder).record_file
    stamp = stamp_of(path)  # before it is read: a change meanwhile is then found the next time
    record = _read_record(path)
    return StoredRun(
        folder=folder.relative_to(relative_to).as_posix(),
        digest=str(record["config_digest"]) if digest is None else digest,
        role=role,
        axes=axes or {},
        record=record,
        rounds=_read_rounds(folder),
        stamp=stamp,
    )


def stamp_of(path: Path) -> str:
    """Changes when the file at `path` does; empty where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_mtime_ns}-{status.st_size}"


def _check(place: Path) -> None:
    try:
        there, single = place.exists(), RunFolder(place).config_file.is_file()
        if place.is_dir():
            os.scandir(place).close()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise StoreError(f"cannot read {place}: {getattr(error, 'strerror', None) or error}") from error
    if not there:
        raise StoreError(f"{place} is not there; give a folder of runs or a sweep's, or run `fedlora simulate` first")
    if single:
        raise StoreError(
            f"{place} is the folder of one run; give the folder that it lies in, {place.absolute().parent}"
        )


def _unfinished(folder: Path, *, relative_to: Path, role: Role, axes: Mapping[str, str] | None) -> StoredRun:
    config = RunFolder(folder).read_config()
    return StoredRun(
        folder=folder.relative_to(relative_to).as_posix(),
        digest=config.digest(),
        role=role,
        axes=axes or {},
        config=config.to_mapping(),
        rounds=_read_rounds(folder),
    )


def _cells(root: Path) -> dict[str, Cell]:
    """By folder; none where a sweep cannot be read, or tuning decides about its cells."""
    try:
        return {cell.folder: cell for cell in Sweep.from_toml(root / "sweep.toml").cells()}
    except ConfigError:
        return {}


def _keep(root: Path, finished: Sequence[StoredRun]) -> list[str]:
    """Put `finished` into the store on disk; what cannot be kept is listed all the same."""
    if not finished or not os.access(root, os.W_OK):
        return []
    try:
        with Store.create(root) as store:
            store.put(*finished, keep_labels=True)
    except StoreError as error:
        return [f"{error} (runs that it lacks are shown all the same)"]
    return []


def _read_rounds(folder: Path) -> list[dict[str, Any]]:
    files = RunFolder(folder)
    try:
        rounds = files.read_rounds()
        written = files.rounds_file.read_text("utf-8").splitlines() if files.rounds_file.exists() else []
    except (OSError, ValueError) as error:  # ValueError: no text
        raise StoreError(f"cannot read {files.rounds_file}: {error}; the run is left out") from error
    if files.record_file.exists() and len(rounds) < len(written):  # before that a kill may have cut off the last
        raise StoreError(
            f"{files.rounds_file} is damaged in line {len(rounds) + 1} and left out; put a good copy there"
        )
    return rounds


def _read_record(path: Path) -> dict[str, Any]:
    """The record in `path`, with everything in it that a store takes.

    Raises:
        StoreError: it cannot be read as one.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["schema_version"] > SCHEMA_VERSION:
            raise ValueError(f"it has schema {record['schema_version']}, this fedlora reads up to {SCHEMA_VERSION}")
        for name, kind in _KINDS.items():
            value: Any = record
            for key in name.split("."):
                value = value[key]
            if not isinstance(value, kind):
                raise ValueError(f"{name} is {shown(value)}")
        spent = StoredRun(folder="", digest="", record=record).epsilon_spent
        if spent is None or math.isnan(spent):
            raise ValueError("ε is not a number")
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; the run is left out") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise StoreError(f"{path} is damaged ({reason}) and left out; put a good copy there") from error
    return record
