"""A store to be published: the records whole, without the folders of the machine that made them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.errors import ConfigError, StoreError
from fedlora.experiments.run_folder import replace_file
from fedlora.experiments.runs.gathering import gather
from fedlora.experiments.runs.store import Store
from fedlora.experiments.runs.stored_run import StoredRun
from fedlora.experiments.sweeps.sweep import Sweep

PLACES: Mapping[str, str] = {
    "data.source": "PATH_TO_DATA",
    "model.name": "PATH_TO_MODEL",
    "adapter.mask": "PATH_TO_MASK",
    "adapter.probe_texts": "PATH_TO_TEXTS",
    "run.out": "",
}
"""Settings that may name a folder or file of a machine, and what stands for it."""


def export_runs(folder: Path, out: Path) -> list[str]:
    """Copy what is known of the runs of `folder` that have ended into a store in `out`, without this machine's paths.

    Each config_digest stays that of the config that ran.

    Args:
        folder: of a sweep or of runs, as for `gather`.
        out: a new or empty folder; gets runs.sqlite, and sweep.toml where `folder` has one.

    Returns:
        What was left out and why, a line each.

    Raises:
        StoreError: there is nothing to export, or `out` cannot take it.
    """
    gathered = gather(folder)
    with gathered.store as store:
        runs = [run for run in store.runs() if run.status != "unfinished"]
    if not runs:
        raise StoreError(f"no run in {folder} has ended yet; there is nothing to export")
    _make(out)
    with Store.create(out) as store:
        store.put(*map(_published, runs))
    if (folder / "sweep.toml").is_file():
        replace_file(out / "sweep.toml", tomli_w.dumps(_sweep_without_places(folder / "sweep.toml")).encode())
    return list(gathered.complaints)


def without_places(config: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The config of a record with a word in the place of each path.

    Hub ids and the names of installed models stay: they are the same everywhere.
    """
    tables = {section: dict(table) for section, table in config.items()}
    for name, word in PLACES.items():
        section, _, key = name.partition(".")
        if _is_place(name, tables.get(section, {}).get(key, "")):
            tables[section][key] = word
    return tables


def _is_place(name: str, value: str) -> bool:
    if name == "data.source":
        return value not in ("hub", "generated")
    if name == "model.name":
        return Path(value).is_absolute() or value.startswith((".", "~")) or Path(value).exists()
    return bool(value)


def _published(run: StoredRun) -> StoredRun:
    config = None if run.config is None else without_places(run.config)
    record = None if run.record is None else {**run.record, "config": without_places(run.record["config"])}
    error = run.error
    for section, table in run.settings.items():
        for key, value in table.items():
            name = f"{section}.{key}"
            if name in PLACES and _is_place(name, value):
                error = error.replace(value, PLACES[name])
    return dataclasses.replace(run, config=config, record=record, error=error, stamp="")


def _sweep_without_places(file: Path) -> dict[str, Any]:
    try:
        sweep = Sweep.from_toml(file)
    except ConfigError as error:
        raise StoreError(f"{file} cannot be read: {error}") from error
    shown = {
        name: PLACES[name] if name in PLACES and _is_place(name, value) else value for name, value in sweep.base.items()
    }
    return dataclasses.replace(sweep, base=shown).to_mapping()


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        taken = any(out.iterdir())
    except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
        reason = getattr(error, "strerror", None) or str(error)
        raise StoreError(f"cannot make {out}: {reason}; give another folder") from error
    if taken:
        raise StoreError(f"{out} is not empty and is left as it is; give a new folder")
