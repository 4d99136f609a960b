"""GLUE's metrics: known values, and zeros instead of nan where nothing varies."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from fedlora.data.tasks import TASKS
from fedlora.errors import DataError
from fedlora.evaluation import glue_metrics

TRUTH = np.array([1, 1, 1, 0])
GUESS = np.array([1, 1, 0, 0])


@pytest.mark.parametrize("task", TASKS)
def test_the_headline_is_among_the_metrics_and_one_when_perfect(task: str) -> None:
    labels = np.array([0.0, 2.5, 5.0]) if TASKS[task].regression else np.array([0, 1, 1])
    assert glue_metrics(task, labels, labels)[TASKS[task].metric] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        ("sst2", {"accuracy": 0.75}),
        ("mrpc", {"accuracy": 0.75, "f1": 0.8}),
        ("qqp", {"accuracy": 0.75, "f1": 0.8}),
        ("cola", {"matthews_correlation": 1 / np.sqrt(3)}),
    ],
)
def test_known_values(task: str, wanted: dict[str, float]) -> None:
    assert glue_metrics(task, GUESS, TRUTH) == pytest.approx(wanted)


def test_stsb_is_the_mean_of_both_correlations() -> None:
    metrics = glue_metrics("stsb", np.array([0.0, 1.0, 10.0]), np.array([1.0, 2.0, 3.0]))
    assert metrics["spearman"] == pytest.approx(1.0)
    assert metrics["pearson"] == pytest.approx(np.corrcoef([0, 1, 10], [1, 2, 3])[0, 1])
    assert metrics["pearson_spearman"] == pytest.approx((metrics["pearson"] + 1) / 2)


@pytest.mark.parametrize("task", ["cola", "mrpc", "stsb"])
def test_constant_predictions_score_zero_without_a_warning(task: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = glue_metrics(task, np.zeros(4, np.float32), TRUTH.astype(np.float32))
    assert {name: value for name, value in metrics.items() if name != "accuracy"} == dict.fromkeys(
        set(metrics) - {"accuracy"}, 0.0
    )


def test_a_collapsed_regression_counts_as_constant() -> None:
    collapsed = np.float32(2.5) + np.array([0, 1e-7, 0, 2e-7], np.float32)
    assert glue_metrics("stsb", collapsed, np.array([1.0, 2.0, 3.0, 4.0]))["pearson_spearman"] == 0.0


@pytest.mark.parametrize(
    ("task", "predictions", "labels", "message"),
    [
        ("sst3", GUESS, TRUTH, "unknown task"),
        ("sst2", GUESS[:3], TRUTH, "one prediction per record"),
        ("sst2", np.zeros((4, 2)), TRUTH, "one prediction per record"),
        ("sst2", GUESS[:0], TRUTH[:0], "one prediction per record"),
        ("stsb", np.array([1.0, np.nan]), np.array([1.0, 2.0]), "1 of 2 predictions are not finite"),
    ],
)
def test_bad_input_is_refused(task: str, predictions: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        glue_metrics(task, predictions, labels)
