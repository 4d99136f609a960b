"""Runs found in a folder: finished ones for its store, and those that have not ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fedlora.errors import StoreError
from fedlora.experiments.record import SCHEMA_VERSION
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.store import StoredRun


def stored_run(
    folder: Path,
    *,
    relative_to: Path,
    role: Literal["cell", "trial", "run"] = "run",
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
    files = RunFolder(folder)
    record, stamp = _read_record(files.record_file)
    return StoredRun(
        folder=folder.relative_to(relative_to).as_posix(),
        digest=str(record["config_digest"]) if digest is None else digest,
        role=role,
        axes=axes or {},
        record=record,
        rounds=files.read_rounds(),
        stamp=stamp,
    )


def _read_record(path: Path) -> tuple[dict[str, Any], str]:
    """A record and the stamp of its file.

    Raises:
        StoreError: it cannot be read as one.
    """
    stamp = stamp_of(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _check(record)
    except OSError as error:
        raise StoreError(f"cannot read the record {path}: {error.strerror}; it is left out") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise StoreError(
            f"{path} is damaged ({reason}) and is left out; put a good copy there, or remove the run"
        ) from error
    return record, stamp


def _check(record: Any) -> None:
    """Look at everything that a store, a list and a comparison take from a record.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: something is missing or of another kind.
    """
    if not isinstance(record, dict):
        raise ValueError("it is no record")
    if record["schema_version"] > SCHEMA_VERSION:
        raise ValueError(f"schema {record['schema_version']}, this fedlora reads up to {SCHEMA_VERSION}")
    config = record["config"]
    str(config["data"]["task"]), str(config["adapter"]["method"]), int(config["run"]["seed"])
    float(config["privacy"]["epsilon"]), float(record["metric"]["value"]), str(record["metric"]["name"])
    str(record["config_digest"]), float(record["wall_seconds"]), str(record["started"])
    for facts in record["clients"]:
        float(facts["epsilon"])


def stamp_of(path: Path) -> str:
    """Changes when the file at `path` does; empty where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_mtime_ns}-{status.st_size}"
