"""Metrics of the global adapter on public validation data: free of privacy cost, and said to be so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from fedlora.data.encode import EncodedDataset
from fedlora.data.glue import available_validation_splits
from fedlora.data.tasks import TASKS
from fedlora.engine.batching import microbatches
from fedlora.evaluation import glue_metrics
from fedlora.federation.shelf import Shelf
from fedlora.federation.site import Site
from fedlora.federation.workbench import Workbench

Measured = Literal["global", "own", "shared"]
"""The one model of all | the mean over the sites' own | the part that they share, with zeros for what each keeps."""


class Evaluator:
    """Holds the encoded validation splits of a run's task."""

    def __init__(self, workbench: Workbench, shelf: Shelf | None = None) -> None:
        """Load and encode.

        Args:
            shelf: that the records may lie on already.

        Raises:
            DataError: no validation split can be found.
        """
        self._workbench = workbench
        config, shelf = workbench.config, shelf or Shelf()
        self.splits = {
            split: shelf.encoded(config, split, workbench.classifier)
            for split in available_validation_splits(config.data.task, config.data.source)
        }
        self.headline = TASKS[workbench.config.data.task].metric

    def of_sites(self, theta: Tensor, sites: Sequence[Site]) -> dict[str, float]:
        """Metrics of the global `theta` [P]; where sites keep a part for themselves, the mean over their own models.

        Args:
            sites: of this process. Where they live elsewhere nobody sees their models, and `theta` alone is measured.
        """
        if self.measured(sites) != "own":
            return self(theta)
        found = [self(personal_theta(self._workbench, theta, site)) for site in sites]
        return {name: sum(metrics[name] for metrics in found) / len(found) for name in found[0]}

    def measured(self, sites: Sequence[Site]) -> Measured:
        """Which model the metrics of `of_sites` are of."""
        if not self._workbench.method.local:
            return "global"
        return "own" if sites else "shared"

    def __call__(self, theta: Tensor) -> dict[str, float]:
        """Metrics of `theta` [P], the headline of the first split first; further splits are prefixed by their name."""
        metrics: dict[str, float] = {}
        for name, dataset in self.splits.items():
            prefix = f"{name}/" if metrics else ""
            found = glue_metrics(self._workbench.config.data.task, self._predict(theta, dataset), dataset.labels)
            metrics |= {prefix + self.headline: found[self.headline]} | {prefix + key: v for key, v in found.items()}
        return metrics

    def _predict(self, theta: Tensor, dataset: EncodedDataset) -> np.ndarray:
        execution, backend = self._workbench.execution, self._workbench.backend
        predictions = np.empty(len(dataset), dtype=dataset.labels.dtype)
        for group in microbatches(dataset.lengths, execution.token_budget):
            batch, labels = dataset.batch(group, execution.device)
            logits = backend.logits(theta.to(execution.device), batch)
            chosen = logits[:, 0] if labels.is_floating_point() else logits.argmax(dim=1)
            predictions[group] = chosen.cpu().numpy()
        return predictions


def personal_theta(workbench: Workbench, theta: Tensor, site: Site) -> Tensor:
    """[P] on the CPU: of the global `theta` [P] what all share, and what `site` has kept for itself."""
    shared = theta[workbench.layout.positions(workbench.shared_parts)]
    return workbench.model(shared.to(workbench.execution.device), site.kept).cpu()
