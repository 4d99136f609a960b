"""Everything a participant builds from the config alone: base model, layout, engine.

Server, simulated cohort and a single client build the same thing, so their layouts agree by digest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapters.methods import ffa
from fedlora.adapters.slots import AdapterLayout
from fedlora.config import RunConfig
from fedlora.data.tasks import TASKS
from fedlora.engine.backend import GradientBackend
from fedlora.engine.confusion import confusion_layout
from fedlora.engine.execution import Execution, choose_execution
from fedlora.engine.expanded import ExpandedBackend
from fedlora.engine.prototypes import prototype_layout
from fedlora.federation.schedule import ScheduledRound, make_schedule
from fedlora.models import Classifier, load_classifier
from fedlora.privacy.plan import EVALUATION, PROTOTYPE
from fedlora.randomness import PublicSeed


@dataclass(kw_only=True)
class Workbench:
    """One process's shared, frozen things; a client on top of it costs kilobytes."""

    config: RunConfig
    execution: Execution
    classifier: Classifier
    layout: AdapterLayout
    backend: GradientBackend
    schedule: tuple[ScheduledRound, ...]

    def payload_layout(self, phase: str) -> AdapterLayout:
        """What a client sends back in `phase`."""
        if phase == PROTOTYPE:
            return prototype_layout(self.classifier.num_labels, self.classifier.hidden_size)
        if phase == EVALUATION:
            return confusion_layout(self.classifier.num_labels)
        return self.layout

    def initial_theta(self) -> Tensor:
        """[P] float32: B = 0, so that training starts at the base model; a trained head starts at its random values."""
        theta = torch.zeros(self.layout.size, device=self.execution.device)
        heads = {f"head:{path}": module for path, module in self.classifier.head_modules().items()}
        for slot in self.layout.slots:
            path, _, suffix = slot.name.rpartition("/")
            if path in heads:
                self.layout.view(theta, slot).copy_(getattr(heads[path], suffix))
        return theta


def build_workbench(config: RunConfig) -> Workbench:
    """Load the base model and attach the adapters.

    Raises:
        ModelError: the model or a target module cannot be found.
    """
    seed = PublicSeed.from_int(config.run.seed)
    execution = choose_execution(config)
    classifier = load_classifier(
        config.model,
        num_labels=TASKS[config.data.task].num_labels,
        seed=seed,
        device=execution.device,
        dtype=execution.dtype,
        attention=execution.attention,
    )
    adapter = config.adapter
    modules = classifier.target_modules(adapter.target_modules)
    heads = classifier.head_modules() if config.model.head == "trained" else {}
    layout = ffa.build_layout(modules, heads, rank=adapter.rank, alpha=adapter.alpha)
    factors = {
        name: ffa.frozen_factor(seed, name, adapter.rank, module.in_features) for name, module in modules.items()
    }
    return Workbench(
        config=config,
        execution=execution,
        classifier=classifier,
        layout=layout,
        backend=_make_backend(config, classifier, layout, factors),
        schedule=make_schedule(config),
    )


def _make_backend(
    config: RunConfig, classifier: Classifier, layout: AdapterLayout, factors: dict[str, Tensor]
) -> GradientBackend:
    if config.engine.backend == "opacus":
        from fedlora.engine.opacus import OpacusBackend

        return OpacusBackend(classifier, layout, factors)
    return ExpandedBackend(classifier, layout, factors)
