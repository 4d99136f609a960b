"""The nine GLUE tasks: columns, labels, metrics and public splits, in the notation of `nyu-mll/glue`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A GLUE task in the notation of `nyu-mll/glue`.

    Attributes:
        text_columns: one column, or the two of a pair.
        num_labels: number of classes; 1 for a regression.
        label_names: by class id; empty for a regression.
        metric: the headline, a key of `evaluation.glue_metrics`.
        validation_splits: public splits that carry labels.
        label_range: smallest and largest label that may occur.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metric: str = "accuracy"
    validation_splits: tuple[str, ...] = ("validation",)

    @property
    def regression(self) -> bool:
        return not self.label_names

    @property
    def num_labels(self) -> int:
        return len(self.label_names) or 1

    @property
    def label_range(self) -> tuple[int, int]:
        return (0, 5) if self.regression else (0, self.num_labels - 1)


_SENTENCES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

TASKS: Mapping[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec(
            name="cola",
            text_columns=("sentence",),
            label_names=("unacceptable", "acceptable"),
            metric="matthews_correlation",
        ),
        TaskSpec(name="sst2", text_columns=("sentence",), label_names=("negative", "positive")),
        TaskSpec(name="mrpc", text_columns=_SENTENCES, label_names=("not_equivalent", "equivalent")),
        TaskSpec(name="stsb", text_columns=_SENTENCES, label_names=(), metric="pearson_spearman"),
        TaskSpec(name="qqp", text_columns=("question1", "question2"), label_names=("not_duplicate", "duplicate")),
        TaskSpec(
            name="mnli",
            text_columns=("premise", "hypothesis"),
            label_names=("entailment", "neutral", "contradiction"),
            validation_splits=("validation_matched", "validation_mismatched"),
        ),
        TaskSpec(name="qnli", text_columns=("question", "sentence"), label_names=_ENTAILMENT),
        TaskSpec(name="rte", text_columns=_SENTENCES, label_names=_ENTAILMENT),
        TaskSpec(name="wnli", text_columns=_SENTENCES, label_names=("not_entailment", "entailment")),
    )
}
