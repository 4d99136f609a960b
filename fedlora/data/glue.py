"""The nine GLUE tasks and where their records come from: the hub, a folder, or the generated corpus.

A source is `"hub"`, `"generated"` or a folder. A folder is a task's own, or holds one sub-folder per task, and each
split in it is one of (the first that exists is taken, see `_SPLIT_FILES`):

    validation.parquet                      columns as in nyu-mll/glue
    validation-00000-of-00001.parquet       a clone of the hub repository
    dev.tsv                                 the original GLUE download; CoLA without a header, no quoting anywhere
    validation/state.json                   saved with `datasets.save_to_disk`
    validation_subset.parquet               part of a split, and said to be so
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.data.readers import HUB_DATASET, LABEL_COLUMN, READERS, Table, read_hub
from fedlora.data.tasks import TASKS, TaskSpec
from fedlora.errors import DataError
from fedlora.randomness import PublicSeed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Records:
    """Labelled texts in memory.

    Attributes:
        texts: one list of texts, or two of equal length for a pair task.
        labels: int64 class ids or float32 scores, shape [n].
        columns: further columns by name, each of length n; what `partition = "column"` divides by.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray
    columns: Mapping[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {len(column) for column in (*self.texts, *self.columns.values())}
        if lengths != {len(self.labels)}:
            raise DataError("columns and labels of several lengths; wanted one length")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:  # private text must not reach a log by way of a repr
        return f"Records({len(self)} records, {len(self.texts)} text columns)"

    def subset(self, indices: np.ndarray) -> Records:
        """The records at `indices` (int64 [m]), in that order."""
        chosen = indices.tolist()
        return Records(
            texts=tuple([column[i] for i in chosen] for column in self.texts),
            labels=self.labels[indices],
            columns={name: [column[i] for i in chosen] for name, column in self.columns.items()},
        )


def load_records(task: str, source: str, split: str, *, generated_records: int, seed: PublicSeed) -> Records:
    """The records of one split.

    Args:
        task: a key of `TASKS`.
        source: "hub", "generated" or a folder (see the module's text).
        split: "train" or one of the task's `validation_splits`.
        generated_records: size of the generated train split; other sources ignore it.
        seed: decides the generated corpus; other sources ignore it.

    Raises:
        DataError: the source, the split or a column is missing; a label is out of range; there is no record.
    """
    spec = _task_spec(task)
    if source == "generated":
        return _generated(spec, split, generated_records, seed)
    if source == "hub":
        return _to_records(spec, read_hub(spec, split), f"{HUB_DATASET} {task}/{split}")
    folder = _task_folder(spec, source)
    files = _split_files(spec, folder, split)
    if not files:
        raise DataError(
            f"no split {split!r} of {task} in {folder}; it has {_listed(_existing_splits(spec, folder))}; "
            f"wanted a file such as {split}.parquet or {_tsv_stem(split)}.tsv"
        )
    if files[0].stem.endswith("_subset"):
        logger.info("%s: using %s, a subset of the split %s", task, files[0], split)
    tables = [READERS[file.suffix](spec, file) for file in files]
    return _to_records(spec, _stacked(tables), str(files[0]))


def available_validation_splits(task: str, source: str) -> tuple[str, ...]:
    """The task's validation splits that `source` has, in the order of `TaskSpec.validation_splits`.

    The hub and the generated corpus have them all (the hub is not asked). A folder that lacks one is reported by
    `logging.info`.

    Raises:
        DataError: the folder is missing or has no validation split of the task.
    """
    spec = _task_spec(task)
    if source in ("hub", "generated"):
        return spec.validation_splits
    folder = _task_folder(spec, source)
    existing = _existing_splits(spec, folder)
    found = tuple(split for split in spec.validation_splits if split in existing)
    if not found:
        raise DataError(
            f"no validation split of {task} in {folder}; it has {_listed(existing)}; "
            f"wanted {' or '.join(spec.validation_splits)}"
        )
    for split in set(spec.validation_splits) - set(found):
        logger.info("%s: %s has no %s; evaluating on %s", task, folder, split, ", ".join(found))
    return found


def _task_spec(task: str) -> TaskSpec:
    if task not in TASKS:
        raise DataError(f"unknown task {task!r}; wanted one of {', '.join(TASKS)}")
    return TASKS[task]


def _generated(spec: TaskSpec, split: str, generated_records: int, seed: PublicSeed) -> Records:
    from fedlora.data.synthetic import generate

    if split not in ("train", *spec.validation_splits):
        known = ", ".join(("train", *spec.validation_splits))
        raise DataError(f"the generated corpus has no split {split!r} of {spec.name}; it has {known}")
    texts, labels = generate(spec.name, split, generated_records, seed)
    return Records(texts=texts, labels=np.asarray(labels, np.float32 if spec.regression else np.int64))


# --- from rows to records --------------------------------------------------------------------------------------------


def _to_records(spec: TaskSpec, table: Table, origin: str) -> Records:
    wanted = (*spec.text_columns, LABEL_COLUMN)
    missing = [name for name in wanted if name not in table]
    if missing:
        raise DataError(
            f"{origin} has no column {', '.join(missing)}; {spec.name} needs {', '.join(wanted)}: "
            "is this folder another task's, or its first line no header?"  # which is not shown: it may be a record
        )
    if not table[LABEL_COLUMN]:
        raise DataError(f"{origin} holds no record; wanted at least one: was the download cut short?")
    for name in spec.text_columns:
        if not all(isinstance(text, str) for text in table[name]):
            raise DataError(f"{origin}: some values of column {name} are not text; remove or fix those rows")
    return Records(
        texts=tuple(table[name] for name in spec.text_columns),
        labels=_labels(spec, table[LABEL_COLUMN], origin),
        columns={name: values for name, values in table.items() if name not in wanted},
    )


def _labels(spec: TaskSpec, values: Sequence[Any], origin: str) -> np.ndarray:
    """Labels as numbers, int64 or float32 [n]; the original TSV files write some of them as names."""
    ids = {name: number for number, name in enumerate(spec.label_names)}
    try:
        numbers = np.array([ids[value] if value in ids else float(value) for value in values])
    except (TypeError, ValueError) as error:
        wanted = ", ".join(spec.label_names) or "scores"
        raise DataError(f"{origin}: column {LABEL_COLUMN} has a value that is no label; wanted {wanted}") from error
    low, high = spec.label_range
    outside = ~((numbers >= low) & (numbers <= high))  # written so that nan is outside
    if not spec.regression:
        outside |= numbers != np.floor(numbers)
    if outside.any():
        raise DataError(
            f"{origin}: some labels are outside {low} to {high}; "
            "GLUE's test labels are hidden (-1): use a train or validation split"
        )
    return numbers.astype(np.float32 if spec.regression else np.int64)


def _stacked(tables: Sequence[Table]) -> Table:
    """Shards of one split, one below the other."""
    if len(tables) == 1:
        return tables[0]
    return {name: [value for table in tables for value in table.get(name, ())] for name in tables[0]}


def _listed(names: Any) -> str:
    return ", ".join(names) or "nothing"


# --- folders ---------------------------------------------------------------------------------------------------------

# The first pattern that matches wins: complete splits before subsets. No pattern reaches an altered copy such as
# train_subset_noperiods.parquet.
_SPLIT_FILES = (
    "{split}.parquet",
    "{split}-[0-9]*-of-[0-9]*.parquet",
    "{tsv}.tsv",
    "{split}/state.json",
    "{split}_subset.parquet",
)


def _tsv_stem(split: str) -> str:
    return split.replace("validation", "dev")


def _split_files(spec: TaskSpec, folder: Path, split: str) -> list[Path]:
    for pattern in _SPLIT_FILES:
        if files := sorted(folder.glob(pattern.format(split=split, tsv=_tsv_stem(split)))):
            return files
    return []


def _existing_splits(spec: TaskSpec, folder: Path) -> list[str]:
    return [split for split in ("train", *spec.validation_splits, "test") if _split_files(spec, folder, split)]


def _plain(name: str) -> str:
    """Folder names as people write them: SST-2, STS-B and MNLI are sst2, stsb and mnli."""
    return name.lower().replace("-", "").replace("_", "")


def _task_folder(spec: TaskSpec, source: str) -> Path:
    root = Path(source).expanduser()
    if not root.is_dir():
        near = difflib.get_close_matches(source, ["hub", "generated"], n=1)
        hint = f"did you mean {near[0]}?" if near else 'wanted "hub", "generated" or an existing folder'
        raise DataError(f"data.source = {source} is no folder; {hint}")
    for child in sorted(root.iterdir()):
        if _plain(child.name) == spec.name and child.is_dir():
            return child
    owner = _plain(root.resolve().name)
    if owner in TASKS and owner != spec.name:  # rte and mrpc share their columns: only the name tells them apart
        raise DataError(f"{root} is the folder of {owner}, wanted {spec.name}; give its folder or the one above both")
    if not _existing_splits(spec, root):
        raise DataError(
            f"no {spec.name} records in {root}; wanted a sub-folder {spec.name} with train.parquet or train.tsv"
        )
    return root
