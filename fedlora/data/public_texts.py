"""Texts that are nobody's private records: what a search at ε = 0 looks at."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fedlora.data.glue import Records, load_records
from fedlora.data.tasks import TASKS, TaskSpec
from fedlora.errors import ConfigError
from fedlora.randomness import PublicSeed
from fedlora.schema import read_settings

_LEAST = 2  # texts that a Gram matrix can compare


def public_records(task: str, file: str, seed: PublicSeed, count: int = 256) -> Records:
    """At most `count` public texts in the task's columns, without labels: all of them are 0.

    Without a file they are texts of the generated corpus, from a public stream of their own. They are taken from what
    belongs to a validation split, whose first texts occur in no generated train split of any seed or size: no training
    record is among them where the run trains on the generated corpus itself.

    That the texts of a file are public is the word of whoever gives it.

    Args:
        task: a key of `TASKS`.
        file: one text by line, UTF-8; for a pair task "text<TAB>text", or one text, beside which the other is empty.
            Blank and repeated lines do not count. Of more than `count` lines those are taken that lie evenly over the
            file. Empty: the generated corpus.
        seed: decides the generated texts; a file ignores it.
        count: from 2 to 1000.

    Raises:
        ConfigError: the file cannot be read, is no UTF-8, has less than two different lines or more texts in a line
            than the task.
    """
    spec = TASKS[task]
    rows = _rows_of_file(spec, file) if file else _generated_rows(spec, seed, count)
    chosen = [rows[position * len(rows) // count] for position in range(count)] if len(rows) > count else rows
    columns = tuple(list(column) for column in zip(*chosen, strict=True))
    return Records(texts=columns, labels=np.zeros(len(chosen), np.float32 if spec.regression else np.int64))


def refuse_training_records(public: Records, training: Records) -> None:
    """Refuse texts that are trained on: they are not public, whoever says so.

    Raises:
        ConfigError: a row of `public` is one of `training`.
    """
    private = set(zip(*training.texts, strict=True))
    if not private.isdisjoint(zip(*public.texts, strict=True)):
        raise ConfigError(  # not how many: that is a count of records
            f"adapter.probe_texts: some of {len(public)} texts are records of this run's training data, which a "
            "probe must not see; give texts that are public, or leave it empty for generated ones"
        )


def _generated_rows(spec: TaskSpec, seed: PublicSeed, count: int) -> list[tuple[str, ...]]:
    own = PublicSeed(seed.numpy("public texts").bytes(32))
    size_of_train = 6 * count  # a validation split has a sixth of it
    records = load_records(spec.name, "generated", spec.validation_splits[0], generated_records=size_of_train, seed=own)
    return list(zip(*records.texts, strict=True))


def _rows_of_file(spec: TaskSpec, file: str) -> list[tuple[str, ...]]:
    """Different rows of texts, in the file's order."""
    place = f"adapter.probe_texts = {file}"
    path = Path(os.path.expanduser(file))  # noqa: PTH111 - Path's own fails for a user that there is not
    content = read_settings(path, "adapter.probe_texts", wanted="a text file of some hundred lines")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{place} is not UTF-8 text: byte {error.start}; save it as UTF-8, one text by line"
        ) from error
    width, rows = len(spec.text_columns), dict[tuple[str, ...], None]()
    for number, line in enumerate(text.split("\n"), start=1):
        parts = [part.strip() for part in line.strip().split("\t")]
        if len(parts) > width:
            raise ConfigError(
                f"{place}: line {number} has {len(parts)} texts between tabs, but {spec.name} takes {width}; "
                "leave labels and other columns out"
            )
        if any(parts):
            rows[*parts, *[""] * (width - len(parts))] = None
    if len(rows) < _LEAST:
        raise ConfigError(
            f"{place} has {len(rows)} different lines of text, wanted at least {_LEAST}, better some hundreds; "
            "or leave it empty for generated texts"
        )
    return list(rows)
