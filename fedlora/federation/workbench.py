"""Everything a participant builds from the config alone: base model, layout, engine.

Server, simulated cohort and a single client build the same thing, so their layouts agree by digest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedlora.adapters.dam import Candidate, ModuleMask
from fedlora.adapters.methods import Method, Parts, Turn, method_of
from fedlora.adapters.methods.layout import Places, build_layout, frozen_factors, frozen_parts
from fedlora.adapters.slots import AdapterLayout
from fedlora.config import RunConfig
from fedlora.engine.backend import GradientBackend
from fedlora.engine.batching import AgreeingRows, Quantity, Shapes
from fedlora.engine.capacity import Footprint
from fedlora.engine.company import Company
from fedlora.engine.confusion import confusion_layout
from fedlora.engine.device_memory import exhaustion_named
from fedlora.engine.execution import Execution, choose_execution
from fedlora.engine.expanded import ExpandedBackend
from fedlora.engine.folding import FoldedBase
from fedlora.engine.gates import GatedSlots
from fedlora.engine.prototypes import prototype_layout
from fedlora.engine.training import Division
from fedlora.federation.schedule import ScheduledRound, make_schedule
from fedlora.federation.shelf import Shelf
from fedlora.models import Classifier
from fedlora.models.families import block_position
from fedlora.privacy.phases import ALIGNMENT, BILEVEL, EVALUATION, PROTOTYPE, WARMUP
from fedlora.privacy.projection import LowPass
from fedlora.randomness import PublicSeed

_PATIENCE = 10
"""Steps: long enough to see that a run runs."""
_STEPS_THAT_PAY = 100
"""Of a run. To find out which smaller micro-batches agree takes as long as several full ones of each width."""


@dataclass(kw_only=True)
class Workbench:
    """One process's shared, frozen things; a client on top of it costs kilobytes.

    What is trained can change once in a run: all candidates first, then those that a mask chooses. `adopt` changes
    layout, places, backend and initial theta together.
    """

    config: RunConfig
    execution: Execution
    classifier: Classifier
    schedule: tuple[ScheduledRound, ...]
    candidates: tuple[Candidate, ...]
    """The targets, in the model's order."""
    full_layout: AdapterLayout
    """With a slot for each of them, whatever is adapted by now."""
    mask: ModuleMask | None
    """Which of them are adapted; None for all."""
    places: Places
    """Base name of an adapter's slot -> paths of the modules it adapts."""
    layout: AdapterLayout
    backend: GradientBackend
    shapes: Shapes
    """How private records are cut into micro-batches for this back end."""
    initial_theta: Tensor
    """[P] float32: B = 0 (or R alone), so that training starts at the base model; A and a trained head are random."""
    folded: FoldedBase
    """The frozen weights of what is adapted, to which a method may add."""
    footprints: dict[str, Footprint] = field(default_factory=dict, repr=False)
    """What training takes of the device's memory, by phase, where it was measured for these adapters."""
    attached: bool = True
    """False where a change of adapters has failed: the next `adopt` starts over, whatever it is told."""

    def payload_layout(self, phase: str) -> AdapterLayout:
        """What a client sends back in `phase`."""
        if phase == PROTOTYPE:
            return prototype_layout(self.classifier.num_labels, self.classifier.hidden_size)
        if phase == EVALUATION:
            return confusion_layout(self.classifier.num_labels)
        if phase == ALIGNMENT:
            return self._with({}, "scores")
        if phase == BILEVEL:
            return self._with({slot.name: slot.shape for slot in self.full_layout.slots}, "gates")
        return self.full_layout if phase == WARMUP else self.layout

    def sent_layout(self, entry: ScheduledRound, client: int | None = None) -> AdapterLayout:
        """What a client sends back in the round `entry`: of `payload_layout`, what it trained and does not keep.

        Args:
            entry: the round.
            client: one of a smaller rank sends less; None: one of full rank.
        """
        layout = self.payload_layout(entry.phase)
        return layout.only(self.sent_parts(entry), self._rank(client)) if entry.turns else layout

    def sent_parts(self, entry: ScheduledRound) -> Parts:
        """Of the flat vector, in a round of fine-tuning."""
        trained = {part for turn in entry.turns for part in turn.parts}
        return tuple(part for part in self.shared_parts if part in trained)

    def sent_positions(self, entry: ScheduledRound, client: int | None = None) -> Tensor:
        """Where the numbers of `sent_layout` stand in the flat vector [P] of fine-tuning."""
        return self.layout.positions(self.sent_parts(entry), self._rank(client))

    def moved_from(self, theta: Tensor, entry: ScheduledRound, client: int) -> Tensor:
        """Where the update of `client` in the round `entry` started, in `sent_layout` and on the CPU.

        Args:
            theta: as the server sent it.
            entry: a round of training.
            client: its number.
        """
        if not entry.turns:
            return theta
        return self.start(theta.to(self.execution.device), client, None).cpu()[self.sent_positions(entry, client)]

    @property
    def shared_parts(self) -> Parts:
        """Of the flat vector: those that the server knows."""
        return tuple(part for part in self.layout.parts if part not in self.method.local)

    @property
    def method(self) -> Method:
        return method_of(self.config.adapter)

    @property
    def differs(self) -> bool:
        """Whether clients start a round from different vectors."""
        return bool(self.method.local or self.config.adapter.ranks)

    def division(self, entry: ScheduledRound) -> Division:
        """What the steps of the round `entry` train."""
        return Division(self.layout, entry.turns or (Turn(self.layout.parts),), self.config.adapter.rates)

    def active(self, client: int) -> Tensor | None:
        """Coordinates that `client` has, [P] bool; None for all."""
        if self._rank(client) == self.layout.rank:
            return None
        active = torch.zeros(self.layout.size, dtype=torch.bool)
        active[self.layout.positions(self.layout.parts, self._rank(client))] = True
        return active

    def start(self, theta: Tensor, client: int, kept: Tensor | None) -> Tensor:
        """Where `client` starts from, [P] on the device: `model` as far as its own rank goes."""
        start, active = self.model(theta, kept), self.active(client)
        return start if active is None else start * active.to(start.device)

    def model(self, theta: Tensor, kept: Tensor | None) -> Tensor:
        """The model of a site, [P] on the device: what the server sent, and what the site has kept.

        Args:
            theta: of `shared_parts`, on the device.
            kept: of the method's local parts, from its last round; None: as they are at first.
        """
        model, device = self.initial_theta.clone(), self.execution.device
        model[self.layout.positions(self.shared_parts).to(device)] = theta
        if kept is not None:
            model[self.layout.positions(self.method.local).to(device)] = kept.to(device)
        return model

    def global_size(self, phase: str) -> int:
        """How many numbers the server sends as theta in `phase`."""
        return self.payload_layout(phase).size if phase == BILEVEL else self.layout.only(self.shared_parts).size

    def _rank(self, client: int | None) -> int:
        return self.config.adapter.rank if client is None else self.config.adapter.rank_of(client)

    @property
    def gated(self) -> GatedSlots:
        """The slots that a search scores. Only while all candidates are adapted."""
        return GatedSlots.of(self.layout, [candidate.module for candidate in self.candidates])

    def adopt(self, chosen: tuple[bool, ...] | None) -> None:
        """Adapt the candidates that are `chosen`, all of them for None; does nothing where that is so already.

        Raises:
            AdapterError: another number of candidates, or none is chosen.
            PrivacyError: with these adapters, records of one micro-batch influence one another on this machine.
        """
        mask = None if chosen is None else ModuleMask(self.candidates, chosen)
        if mask == self.mask and self.attached:
            return
        self.detach()
        attached = _attach(self.config, self.execution, self.classifier, mask)
        self.places, self.layout, self.backend, self.shapes, self.initial_theta, self.folded = attached
        self.footprints.clear()
        self.mask, self.attached = mask, True

    def detach(self) -> None:
        """Give the base model back as it was. `adopt` attaches anew."""
        self.folded.undo()
        self.backend.detach()
        self.attached = False

    def _with(self, shapes: dict[str, tuple[int, ...]], name: str) -> AdapterLayout:
        """`shapes`, and one number per candidate under `name`; the digest knows the candidates and their order."""
        scored = {f"{name}/{candidate.module}": (1,) for candidate in self.candidates}
        return AdapterLayout.build(
            shapes | scored, method=self.layout.method, rank=self.layout.rank, alpha=self.layout.alpha
        )


def build_workbench(config: RunConfig, shelf: Shelf | None = None) -> Workbench:
    """Load the base model and attach the adapters, of all candidates where some are to be chosen.

    Args:
        shelf: that lends the base model.

    Raises:
        ModelError: the model or a target module cannot be found.
        PrivacyError: on this machine records of one micro-batch influence one another.
    """
    execution = choose_execution(config)
    torch.set_float32_matmul_precision(execution.matmul_precision)
    classifier = (shelf or Shelf()).classifier(config, execution)
    places, layout, backend, shapes, initial_theta, folded = _attach(config, execution, classifier, None)
    return Workbench(
        config=config,
        execution=execution,
        classifier=classifier,
        schedule=make_schedule(config),
        candidates=find_candidates(classifier, config.adapter.targets),
        full_layout=layout,
        mask=None,
        places=places,
        layout=layout,
        backend=backend,
        shapes=shapes,
        initial_theta=initial_theta,
        folded=folded,
    )


def find_candidates(classifier: Classifier, targets: Sequence[str]) -> tuple[Candidate, ...]:
    """The linears that `targets` names, as modules that may get an adapter, in the model's order."""
    found = []
    for path, module in classifier.target_modules(targets).items():
        layer, kind = block_position(path, classifier.family)
        found.append(
            Candidate(
                module=path,
                layer=layer,
                kind=kind,
                in_features=module.in_features,
                out_features=module.out_features,
            )
        )
    return tuple(found)


def _attach(
    config: RunConfig, execution: Execution, classifier: Classifier, mask: ModuleMask | None
) -> tuple[Places, AdapterLayout, GradientBackend, Shapes, Tensor, FoldedBase]:
    adapter = config.adapter
    modules = classifier.target_modules(adapter.targets)
    places: dict[str, tuple[str, ...]] = {path: (path,) for path in (modules if mask is None else mask.modules)}
    if mask is not None and adapter.sharing == "type":
        places |= mask.sharing
    heads = classifier.head_modules() if config.model.head == "trained" else {}
    layout = build_layout(modules, heads, places=places, rank=adapter.rank, alpha=adapter.alpha, method=adapter.method)
    folded = FoldedBase(modules, places)
    factors = frozen_factors(PublicSeed.from_int(config.run.seed), modules, places, adapter.rank)
    initial_theta = _initial_theta(layout, heads, factors).to(execution.device)
    backend = _make_backend(config, execution, classifier, layout, places)
    try:
        agreeing = _looks_at_company(config, execution, classifier, backend) if config.private else _all_agree
        many_steps = config.federation.rounds * config.federation.local_steps >= _STEPS_THAT_PAY
        patience = _PATIENCE if many_steps and not execution.compiled else math.inf  # to compile, each is one more
        shapes = Shapes(execution.token_budget, agreeing, patience)
        with exhaustion_named(f"a micro-batch of {config.model.name}"):
            shapes.check(min(config.data.max_length, classifier.tokenizer.model_max_length))
    except BaseException:
        backend.detach()
        raise
    return places, layout, backend, shapes, initial_theta, folded


def _initial_theta(layout: AdapterLayout, heads: Mapping[str, nn.Linear], factors: Mapping[str, Tensor]) -> Tensor:
    """The product of the factors at zero, A and a trained head at their random values."""
    theta = torch.zeros(layout.size)
    modules = {f"head:{path}": module for path, module in heads.items()}
    for slot in layout.slots:
        path, _, suffix = slot.name.rpartition("/")
        if path in modules:
            layout.view(theta, slot).copy_(getattr(modules[path], suffix).detach())
        elif slot.part == "A":
            layout.view(theta, slot).copy_(factors[path])
        elif slot.part == "R" and "B" in layout.parts:  # B is at zero, and its gradient should not be
            layout.view(theta, slot).fill_diagonal_(1.0)
    return theta


def _looks_at_company(
    config: RunConfig, execution: Execution, classifier: Classifier, backend: GradientBackend
) -> AgreeingRows:
    """What sees whether records have influence on one another, at any shape that is to be used."""
    company = Company(
        backend=backend,
        vocabulary=len(classifier.tokenizer),
        num_labels=classifier.num_labels,
        device=execution.device,
        projection=LowPass(config.privacy.low_pass) if config.privacy.low_pass < 1 else None,
        turns=_turns(config),
        classifier=classifier if classifier.pooling != "native" else None,
    )

    def agreeing(columns: int, counts: Sequence[int], clients: int, quantity: Quantity) -> Sequence[int]:
        with any_head(config, classifier):
            return company.agreeing_rows(columns, counts, clients, quantity)

    return agreeing


def _turns(config: RunConfig) -> Sequence[Turn | None]:
    """All that steps of the run train; where that is everything, as a search takes it too."""
    method, head = method_of(config.adapter), config.model.head == "trained"
    numbers = range(config.federation.rounds)
    found = dict.fromkeys(turn for number in numbers for turn in method.turns(number, head=head))
    everything = {*method.factors, "head"} if head else {*method.factors}
    return [None if {*turn.parts} == everything else turn for turn in found]


def _all_agree(_columns: int, counts: Sequence[int], _clients: int, _quantity: Quantity) -> Sequence[int]:
    """Without privacy nobody minds the last bits."""
    return counts


@contextmanager
def any_head(config: RunConfig, classifier: Classifier) -> Iterator[None]:
    """A random one in the place of a prototype head to come, or of one that a server has sent.

    Without a head gradients are zero, and whoever compares them is blind.
    """
    if config.model.head != "prototype" or classifier.head is None:
        yield
        return
    linear = classifier.head.linear
    known = linear.weight.clone(), linear.bias.clone()
    draw = PublicSeed.from_int(0).torch("company head")
    classifier.set_head(torch.randn(linear.weight.shape, generator=draw), torch.zeros(linear.bias.shape))
    try:
        yield
    finally:
        classifier.set_head(*known)


def _make_backend(
    config: RunConfig, execution: Execution, classifier: Classifier, layout: AdapterLayout, places: Places
) -> GradientBackend:
    factors, outer = frozen_parts(
        config.adapter.subspace,
        PublicSeed.from_int(config.run.seed),
        classifier.target_modules(config.adapter.targets),
        layout,
        places,
    )
    if config.engine.backend == "opacus":
        from fedlora.engine.opacus import OpacusBackend

        return OpacusBackend(classifier, layout, factors, places, outer=outer)
    return ExpandedBackend(classifier, layout, factors, places, outer=outer, compiled=execution.compiled)
