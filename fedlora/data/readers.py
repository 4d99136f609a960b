"""Readers of every form in which GLUE lies about: parquet, the original TSV, a saved `datasets` folder, the hub.

Each gives a table of columns as they are; `fedlora.data.glue` checks them. Heavy libraries are imported by the reader
that needs them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedlora.data.tasks import TaskSpec
from fedlora.errors import DataError

logger = logging.getLogger(__name__)

HUB_DATASET = "nyu-mll/glue"
LABEL_COLUMN = "label"
_HUB_PATIENCE_SECONDS = 4.0
Table = dict[str, list[Any]]


def _read_parquet(spec: TaskSpec, path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        # ParquetFile, not read_table: the latter makes columns of folder names such as "task=sst2".
        return dict(pyarrow.parquet.ParquetFile(path).read().to_pydict())
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path} as parquet ({type(error).__name__}); copy or download it again") from error


def _read_saved(spec: TaskSpec, path: Path) -> Table:
    import datasets

    try:
        return dict(datasets.load_from_disk(str(path.parent)).to_dict())
    except Exception as error:  # datasets raises whatever its readers raise
        raise DataError(
            f"cannot read {path.parent} as saved by datasets.save_to_disk ({type(error).__name__}); save it again"
        ) from error


_TSV_HEADERS: Mapping[str, list[str]] = {"cola": ["source", "label", "star", "sentence"]}
_TSV_RENAMES: Mapping[str, Mapping[str, str]] = {
    "mrpc": {"Quality": LABEL_COLUMN, "#1 String": "sentence1", "#2 String": "sentence2"},
    "stsb": {"score": LABEL_COLUMN},
    "qqp": {"is_duplicate": LABEL_COLUMN},
    "mnli": {"gold_label": LABEL_COLUMN, "sentence1": "premise", "sentence2": "hypothesis"},
}


def _read_tsv(spec: TaskSpec, path: Path) -> Table:
    """The original GLUE download. Rows cut short are dropped, as the hub's own loader does, and counted."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # MRPC starts with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} as UTF-8 text ({type(error).__name__}); download it again") from error
    # Not csv, not splitlines: quotes are ordinary characters here, and so are the rarer Unicode line separators.
    rows = [line.split("\t") for line in text.split("\n") if line]
    header = _TSV_HEADERS.get(spec.name) or (rows.pop(0) if rows else [])
    renames = _TSV_RENAMES.get(spec.name, {})
    names = [renames.get(name, name) for name in header]
    whole = [row for row in rows if len(row) >= len(names)]
    if len(whole) < len(rows):
        logger.warning("%s: dropped %d rows of %d with too few columns", path, len(rows) - len(whole), len(rows))
    return {name: [row[position] for row in whole] for position, name in enumerate(names)}


READERS: Mapping[str, Callable[[TaskSpec, Path], Table]] = {
    ".parquet": _read_parquet,
    ".tsv": _read_tsv,
    ".json": _read_saved,
}


def read_hub(spec: TaskSpec, split: str) -> Table:
    """One split from the hub, or from its local cache when the hub does not answer."""
    import datasets

    online = _hub_answers()
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not online
    try:
        return dict(datasets.load_dataset(HUB_DATASET, spec.name, split=split).to_dict())
    except Exception as error:  # offline, unknown split, broken cache: every library below has its own exceptions
        hub = "the hub" if online else "the hub (which does not answer)"
        raise DataError(
            f"cannot load split {split!r} of {spec.name} in {HUB_DATASET} from {hub} or its cache "
            f"{datasets.config.HF_DATASETS_CACHE} ({type(error).__name__}); connect to the hub, "
            'or set data.source to a folder with the GLUE files or to "generated"'
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _hub_answers() -> bool:
    """One short question: left to itself, `datasets` retries an unreachable hub for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(HUB_DATASET, timeout=_HUB_PATIENCE_SECONDS)
    except HfHubHTTPError:
        return True  # it answers, if only to refuse; what it refuses is for `datasets` to find out
    except Exception:  # whatever the HTTP client of the day raises
        return False
    return True
