"""GLUE's official metrics (Wang et al. 2019, section 3), on public validation data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fedlora.data.tasks import TASKS
from fedlora.errors import DataError

Metrics = dict[str, float]


def glue_metrics(task: str, predictions: np.ndarray, labels: np.ndarray) -> Metrics:
    """Every official metric of a task; `TASKS[task].metric` names the headline among them.

    Args:
        task: a key of `TASKS`.
        predictions: class ids, or scores for stsb, shape [n].
        labels: the same for the truth, shape [n].

    Returns:
        cola: matthews_correlation. stsb: pearson, spearman and pearson_spearman, their mean. mrpc, qqp: accuracy and
        f1 of the positive class. The others: accuracy. A correlation with something constant is 0.

    Raises:
        DataError: unknown task, other shapes than [n] twice, no record, or predictions that are not finite.
    """
    if task not in TASKS:
        raise DataError(f"unknown task {task!r}; wanted one of {', '.join(TASKS)}")
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.ndim != 1 or predictions.shape != labels.shape or not len(labels):
        raise DataError(
            f"predictions of shape {list(predictions.shape)} for labels of shape {list(labels.shape)}; "
            "wanted one prediction per record, as class ids or scores"
        )
    if not np.isfinite(predictions).all():
        raise DataError(
            f"{int((~np.isfinite(predictions)).sum())} of {len(predictions)} predictions are not finite; "
            "training diverged: lower training.learning_rate"
        )
    return _METRICS.get(task, _accuracy)(predictions, labels)


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> Metrics:
    return {"accuracy": float(np.mean(predictions == labels))}


def _accuracy_and_f1(predictions: np.ndarray, labels: np.ndarray) -> Metrics:
    from sklearn.metrics import f1_score

    return {**_accuracy(predictions, labels), "f1": float(f1_score(labels, predictions, zero_division=0.0))}


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> Metrics:
    from sklearn.metrics import matthews_corrcoef

    # scikit-learn warns when there is only one class on both sides; the correlation is then 0 by convention.
    constant = np.ptp(predictions) == 0 or np.ptp(labels) == 0
    return {"matthews_correlation": 0.0 if constant else float(matthews_corrcoef(labels, predictions))}


def _correlations(predictions: np.ndarray, labels: np.ndarray) -> Metrics:
    from scipy.stats import pearsonr, spearmanr

    # float64, relative to the spread: a model that has collapsed to one value differs from constant by rounding.
    predictions, labels = predictions.astype(np.float64), labels.astype(np.float64)
    if any(np.ptp(values) <= 1e-6 * np.abs(values).max() for values in (predictions, labels)):
        pearson = spearman = 0.0
    else:
        pearson = float(pearsonr(predictions, labels).statistic)
        spearman = float(spearmanr(predictions, labels).statistic)
    return {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}


_METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], Metrics]] = {
    "cola": _matthews,
    "stsb": _correlations,
    "mrpc": _accuracy_and_f1,
    "qqp": _accuracy_and_f1,
}
