"""Everything a participant builds from the config alone: base model, layout, engine.

Server, simulated cohort and a single client build the same thing, so their layouts agree by digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.adapters.methods import ffa
from fedlora.adapters.slots import AdapterLayout
from fedlora.config import RunConfig
from fedlora.data.tasks import TASKS
from fedlora.engine.backend import GradientBackend
from fedlora.engine.company import check_company
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
    places: ffa.Places
    """Base name of an adapter's slot -> paths of the modules it adapts."""
    backend: GradientBackend
    schedule: tuple[ScheduledRound, ...]
    initial_theta: Tensor
    """[P] float32: B = 0, so that training starts at the base model; a trained head starts at its random values."""

    def payload_layout(self, phase: str) -> AdapterLayout:
        """What a client sends back in `phase`."""
        if phase == PROTOTYPE:
            return prototype_layout(self.classifier.num_labels, self.classifier.hidden_size)
        if phase == EVALUATION:
            return confusion_layout(self.classifier.num_labels)
        return self.layout


def build_workbench(config: RunConfig) -> Workbench:
    """Load the base model and attach the adapters.

    Raises:
        ModelError: the model or a target module cannot be found.
        PrivacyError: on this machine records of one micro-batch influence one another.
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
    modules = classifier.target_modules(adapter.targets)
    heads = classifier.head_modules() if config.model.head == "trained" else {}
    places = {path: (path,) for path in modules}
    layout = ffa.build_layout(modules, heads, places=places, rank=adapter.rank, alpha=adapter.alpha)
    factors = ffa.frozen_factors(seed, modules, places, adapter.rank)
    initial_theta = _initial_theta(layout, heads).to(execution.device)
    backend = _make_backend(config, classifier, layout, factors, places)
    if config.private:
        _check_company(config, execution, classifier, backend)
    return Workbench(
        config=config,
        execution=execution,
        classifier=classifier,
        layout=layout,
        places=places,
        backend=backend,
        schedule=make_schedule(config),
        initial_theta=initial_theta,
    )


def _initial_theta(layout: AdapterLayout, heads: Mapping[str, nn.Linear]) -> Tensor:
    theta = torch.zeros(layout.size)
    modules = {f"head:{path}": module for path, module in heads.items()}
    for slot in layout.slots:
        path, _, suffix = slot.name.rpartition("/")
        if path in modules:
            layout.view(theta, slot).copy_(getattr(modules[path], suffix).detach())
    return theta


def _check_company(config: RunConfig, execution: Execution, classifier: Classifier, backend: GradientBackend) -> None:
    """Without a head gradients are zero and the check blind: a random one stands in for a prototype head to come."""
    shape = (classifier.num_labels, classifier.hidden_size)
    if config.model.head == "prototype":
        draw = PublicSeed.from_int(0).torch("company head")
        classifier.set_head(torch.randn(shape, generator=draw), torch.zeros(shape[0]))
    check_company(
        backend,
        vocabulary=len(classifier.tokenizer),
        num_labels=classifier.num_labels,
        token_budget=execution.token_budget,
        longest=min(config.data.max_length, classifier.tokenizer.model_max_length),
        device=execution.device,
    )
    if config.model.head == "prototype":
        classifier.set_head(torch.zeros(shape), torch.zeros(shape[0]))


def _make_backend(
    config: RunConfig,
    classifier: Classifier,
    layout: AdapterLayout,
    factors: Mapping[str, Tensor],
    places: ffa.Places,
) -> GradientBackend:
    if config.engine.backend == "opacus":
        from fedlora.engine.opacus import OpacusBackend

        return OpacusBackend(classifier, layout, factors, places)
    return ExpandedBackend(classifier, layout, factors, places)
