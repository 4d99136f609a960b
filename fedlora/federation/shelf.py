"""What the runs of one process share: records, their tokens and the frozen base model."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np

from fedlora.config import RunConfig
from fedlora.data.encode import EncodedDataset, encode
from fedlora.data.glue import Records, load_records
from fedlora.data.holdout import training_sample, tuning_half
from fedlora.data.tasks import TASKS
from fedlora.engine.attachment import is_attached
from fedlora.engine.execution import Execution
from fedlora.errors import DataError
from fedlora.models import Classifier, load_classifier
from fedlora.randomness import PublicSeed

Thing = TypeVar("Thing")


class Shelf:
    """Keeps the last of each kind: runs that follow one another and have it in common load it once.

    Records and tokens are never changed by a run. A classifier is lent to one run at a time; it is what a new one would
    be once that run's back end is detached, and is loaded anew where a run failed to do so.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Hashable, Any]] = {}

    def records(self, config: RunConfig, split: str) -> Records:
        """The records of a split that `config` uses: its share of "train", its part of a validation split.

        Raises:
            DataError: they cannot be found, or none is left.
        """
        return self._once(f"records of {split}", _records_key(config, split), lambda: _load(config, split))

    def encoded(self, config: RunConfig, split: str, classifier: Classifier) -> EncodedDataset:
        """The same records as tokens of `classifier`."""
        records = self.records(config, split)
        key = (*_records_key(config, split), config.model.name, config.data.max_length)
        return self._once(
            f"tokens of {split}", key, lambda: encode(records, classifier.tokenizer, config.data.max_length)
        )

    def classifier(self, config: RunConfig, execution: Execution) -> Classifier:
        """The base model with its head as before any training.

        Raises:
            ModelError: as `load_classifier`.
        """
        model, num_labels = config.model, TASKS[config.data.task].num_labels
        drawn = None if model.head == "prototype" else config.run.seed  # prototypes are given, other heads are drawn
        how = (execution.device, execution.dtype, execution.attention)
        key = (model.name, model.head, model.pooling, num_labels, drawn, *how)
        kept = self._kept.get("classifier")
        if kept is not None and is_attached(kept[1]):
            del self._kept["classifier"]
        classifier = self._once(
            "classifier",
            key,
            lambda: load_classifier(
                model,
                num_labels=num_labels,
                seed=PublicSeed.from_int(config.run.seed),
                device=execution.device,
                dtype=execution.dtype,
                attention=execution.attention,
            ),
        )
        if model.head == "prototype":
            classifier.clear_head()
        return classifier

    def _once(self, kind: str, key: Hashable, make: Callable[[], Thing]) -> Thing:
        if kind not in self._kept or self._kept[kind][0] != key:
            self._kept.pop(kind, None)  # first: two base models may not fit side by side
            self._kept[kind] = (key, make())
        kept: Thing = self._kept[kind][1]
        return kept


def _records_key(config: RunConfig, split: str) -> tuple[Hashable, ...]:
    data = config.data
    generated = (data.generated_records, config.run.seed) if data.source == "generated" else ()
    return (data.task, data.source, split, data.train_share if split == "train" else data.validation_part, *generated)


def _load(config: RunConfig, split: str) -> Records:
    data, seed = config.data, PublicSeed.from_int(config.run.seed)
    records = load_records(data.task, data.source, split, generated_records=data.generated_records, seed=seed)
    if split == "train":
        setting = f"data.train_share = {data.train_share:g}"
        kept = training_sample(records, data.train_share) if data.train_share < 1 else None
    else:
        setting = f"data.validation_part = {data.validation_part}"
        half = tuning_half(records) if data.validation_part != "all" else None
        kept = half if half is None or data.validation_part == "tuning" else ~half
    if kept is None:
        return records
    if not kept.any():
        raise DataError(f"{setting} leaves none of {len(records)} records of {split}; use more of them")
    return records.subset(np.flatnonzero(kept))
