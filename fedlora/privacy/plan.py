"""PrivacyPlan: sampling, clipping, noise and accounting of one site's whole run, made together so they cannot disagree.

A run is a sequence of phases. Each has one mechanism, one sampler, one sensitivity and a planned number of steps; all
phases are priced by one accountant, and the noise of fine-tuning is what remains to be chosen so that the total
meets ε.

Where a client's whole data is protected (privacy.unit = client), steps have no noise: what is released, and charged, is
the noised sum of whole moves after a round of them (`client_level`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from fedlora.config import RunConfig
from fedlora.errors import BudgetRefused, DataError, PrivacyError, UnsoundMechanism
from fedlora.privacy.accounting import Charge, epsilon
from fedlora.privacy.calibration import calibrate_noise_multiplier
from fedlora.privacy.client_level import ClientLevel
from fedlora.privacy.clipping import Clipping
from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.mechanisms.mechanism import Mechanism, make_mechanism
from fedlora.privacy.noise import NoiseSource
from fedlora.privacy.phases import ALIGNMENT, BILEVEL, EVALUATION, FINETUNE, PROTOTYPE, WARMUP
from fedlora.privacy.projection import LowPass
from fedlora.privacy.sampling import PoissonSampler


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """One mechanism, run `num_steps` times on batches of one sampler, each record clipped to the sensitivity.

    These are the steps that a site does. What the accountant sees of them is `charge`.
    """

    name: str
    sampler: PoissonSampler
    clipping: Clipping
    mechanism: Mechanism
    num_steps: int
    projection: LowPass | None = None
    """Applied to every record's vector before clipping, and to what is released."""
    beside: PhasePlan | None = None
    """Runs in turn with this phase, step for step, on records that this one never touches.

    Every record decides by itself which of the two sees it, so that each costs a record what it costs alone and both
    cost the larger of the two (parallel composition; it holds for releases in turn as well, since the half without the
    record is the same in both worlds). It must be no dearer than this phase, whose charge then stands for both.
    """
    client_level: ClientLevel | None = None
    """How a client's whole move of a round is protected, in the place of its steps, which then have no noise."""

    def __post_init__(self) -> None:
        if self.client_level is not None and (self.mechanism.noise_multiplier > 0 or self.beside is not None):
            raise PrivacyError(
                f"phase {self.name} has noise on steps, or two kinds of them, and on clients' whole moves; its charge "
                "is for the moves alone"
            )
        if self.beside is not None and not _no_dearer(self.beside.charge(), self.charge()):
            raise PrivacyError(
                f"phase {self.beside.name} samples more, has less noise or more steps than {self.name}, which is to "
                "pay for both"
            )

    @property
    def sensitivity(self) -> float:
        """L2 distance that adding or removing one record can make to one step's sum."""
        return self.clipping.clip_norm

    @property
    def charged_sensitivity(self) -> float:
        """L2 distance that adding or removing the unit of privacy can make to what the charged noise is added to."""
        return self.sensitivity if self.client_level is None else self.client_level.clip_norm

    def add_clipped(self, total: Tensor, vectors: Sequence[Tensor], owner: Tensor) -> None:
        """Project and clip every record's vector and add it to `total`; arguments as in `Clipping.add_clipped`.

        Rows beyond the owners are dummies that fill up a micro-batch's fixed shape. They go after the projection only:
        a Fourier transform of fewer rows may round differently, and how many records there are is no row's business.
        """
        projected = vectors if self.projection is None else [self.projection(part) for part in vectors]
        self.clipping.add_clipped(total, [part[: len(owner)] for part in projected], owner)

    def privatize(self, total: Tensor, *, noise: NoiseSource, slot_sizes: Sequence[int]) -> Tensor:
        """What may be released of one step's sum `total` [P] float64 of clipped records, [P] float32."""
        released = self.mechanism.privatize(total, sensitivity=self.sensitivity, noise=noise, slot_sizes=slot_sizes)
        return released if self.projection is None else self.projection.of_slots(released, slot_sizes)

    def charge(self, num_steps: int | None = None) -> Charge:
        """What the accountant sees of `num_steps` steps (all planned ones by default)."""
        steps = self.num_steps if num_steps is None else num_steps
        if self.client_level is not None:
            return self.client_level.charge(steps)
        return Charge(self.sampler.sampling_probability, self.mechanism.effective_noise_multiplier, steps)


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """All phases of one site, in order, and the guarantee that they meet together."""

    phases: tuple[PhasePlan, ...]
    delta: float
    accountant: str

    def __getitem__(self, name: str) -> PhasePlan:
        return next(phase for phase in self.phases if phase.name == name)

    @property
    def unit(self) -> str:
        """What is added or removed between neighbours: "record" or "client"."""
        return "record" if all(phase.client_level is None for phase in self.phases) else "client"

    def epsilon(self) -> float:
        """ε at `delta` of the whole plan; inf for a run without noise."""
        return epsilon([phase.charge() for phase in self.phases], self.delta, self.accountant)

    def describe(self, steps: Mapping[str, int], *, spent: float) -> dict[str, Any]:
        """Public facts from which anyone can derive ε anew: what ran so far, and the ε `spent` by it.

        Args:
            steps: private steps done so far, by phase.
            spent: ε of exactly these steps.
        """
        finetune = self[FINETUNE]
        charged = {phase.name: phase.charge(steps.get(phase.name, 0)) for phase in self.phases}
        nominal = charged[FINETUNE] if finetune.client_level else finetune.mechanism
        return {
            "unit": self.unit,
            "relation": "add/remove",
            "delta": self.delta,
            "epsilon": spent,
            "accountant": self.accountant,
            "sampling_probability": charged[FINETUNE].sampling_probability,
            "noise_multiplier": nominal.noise_multiplier,
            "effective_noise_multiplier": charged[FINETUNE].noise_multiplier,
            "num_steps": charged[FINETUNE].num_steps,
            "mechanism": finetune.mechanism.name,
            "clip_norm": finetune.charged_sensitivity,
            "clipping": "flat" if finetune.client_level else finetune.clipping.kind,
            "phases": [
                {
                    "name": phase.name,
                    "mechanism": phase.mechanism.name,
                    "sampling_probability": charged[phase.name].sampling_probability,
                    "effective_noise_multiplier": charged[phase.name].noise_multiplier,
                    "sensitivity": phase.charged_sensitivity,
                    "num_steps": charged[phase.name].num_steps,
                }
                for phase in self.phases
            ],
        }


def _no_dearer(one: Charge, other: Charge) -> bool:
    """Whether Poisson-sampled Gaussians as in `one` cost at most what those in `other` do, term by term."""
    return (
        one.sampling_probability <= other.sampling_probability
        and one.noise_multiplier >= other.noise_multiplier
        and one.num_steps <= other.num_steps
    )


def make_plan(
    config: RunConfig,
    *,
    num_examples: int,
    num_steps: Mapping[str, int],
    client: int,
    client_level: ClientLevel | None = None,
) -> PrivacyPlan:
    """The plan of a site with `num_examples` records that does `num_steps` private steps in each phase.

    All training, in warm-up, bilevel search and fine-tuning, has one noise multiplier, so chosen that everything
    together meets ε.

    With ε = inf the same plan without noise: its ε is inf. So is that of a mechanism which protects nothing, with the
    noise that a sound one would need.

    Args:
        client_level: of the whole run, where privacy.unit = client, and only there.

    Raises:
        PrivacyError: it is missing, or there where records are protected.
        UnsoundMechanism: the mechanism protects nothing and privacy.allow_unsound is not set.
        DataError: δ is not below 1/n, or the expected batch is larger than the site's data.
        BudgetRefused: the phases beside training alone exceed ε.
    """
    privacy, batch = config.privacy, config.training.expected_batch_size
    if config.unsound and not privacy.allow_unsound:
        raise UnsoundMechanism(
            "privacy.gredp_noise = real puts no noise on g_j - g_(n-j): half of every summed gradient would leave in "
            "clear, at no finite ε. Set privacy.gredp_noise=complex, or privacy.allow_unsound=true to run it at ε = inf"
        )
    if (client_level is not None) != (privacy.unit == "client"):
        given = "none is given" if client_level is None else "one is given"
        raise PrivacyError(f"privacy.unit = {privacy.unit}, but of a protection of whole clients {given}")
    noisy = math.isfinite(privacy.epsilon)
    if noisy and client_level is None and privacy.delta >= 1 / num_examples:
        raise DataError(
            f"privacy.delta = {privacy.delta:g} is not below 1/n = {1 / num_examples:.3g} of client {client} "
            f"({num_examples} records): at that δ one record in n may be published. Set privacy.delta below it"
        )
    if batch > num_examples:
        raise DataError(
            f"training.expected_batch_size = {batch}, but client {client} has {num_examples} records; "
            f"set it to at most {num_examples}"
        )
    probability = batch / num_examples
    if client_level is not None:
        return _client_level_plan(config, probability, num_steps.get(FINETUNE, 0), client, client_level)
    before, after = _prototype_phases(config), evaluation_phases(config)
    alignment, searched = _alignment_phases(config, num_examples), num_steps.get(BILEVEL, 0)
    trained = num_steps.get(WARMUP, 0) + num_steps.get(FINETUNE, 0)
    noise_multiplier = 0.0
    if noisy and trained + searched:
        noise_multiplier = calibrate_noise_multiplier(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            sampling_probability=probability,
            num_steps=trained,
            further=[(_search_probability(config, probability, client), searched)] if searched else [],
            fixed=[phase.charge() for phase in (*before, *alignment, *after)],
            accountant=privacy.accountant,
        )
    warmup, finetune = (
        _training_phase(config, name, probability, noise_multiplier, num_steps.get(name, 0))
        for name in (WARMUP, FINETUNE)
    )
    warmups = (warmup,) if config.warmup_rounds else ()
    bilevel = (_bilevel_phase(config, probability, noise_multiplier, searched, client),) if config.search_rounds else ()
    phases = (*before, *warmups, *alignment, *bilevel, finetune, *after)
    plan = PrivacyPlan(phases=phases, delta=privacy.delta, accountant=privacy.accountant)
    if not config.unsound:
        _check_target(plan, config, client)
    return plan


def _check_target(plan: PrivacyPlan, config: RunConfig, client: int) -> None:
    """Priced anew: a calibration may come from a cache, the guarantee never does."""
    spends = plan.epsilon()
    if spends > config.privacy.epsilon:
        raise BudgetRefused(
            f"the plan of client {client} would spend ε = {spends:.4f}, asked was {config.privacy.epsilon:g}; nothing "
            "was computed. Delete fedlora's cache folder and try again"
        )


def _client_level_plan(
    config: RunConfig, probability: float, num_steps: int, client: int, client_level: ClientLevel
) -> PrivacyPlan:
    """Steps without noise, and rounds that are charged as releases of whole moves. Nothing else is released."""
    finetune = replace(_training_phase(config, FINETUNE, probability, 0.0, num_steps), client_level=client_level)
    plan = PrivacyPlan(phases=(finetune,), delta=config.privacy.delta, accountant=config.privacy.accountant)
    _check_target(plan, config, client)
    return plan


def _prototype_phases(config: RunConfig) -> tuple[PhasePlan, ...]:
    """The one release of per-class sums and counts: a record moves one unit row and one count, √2 in L2."""
    if config.model.head != "prototype":
        return ()
    return (_one_release(config, PROTOTYPE, math.sqrt(2.0), config.privacy.prototype_noise_multiplier),)


def _alignment_phases(config: RunConfig, num_examples: int) -> tuple[PhasePlan, ...]:
    """The one release of the modules' scores: a record is a vector of one number per module, of L2 norm at most 1."""
    if config.adapter.select != "alignment":
        return ()
    probability = min(1.0, config.adapter.alignment_records / num_examples)
    noise_multiplier = config.privacy.alignment_noise_multiplier
    return (_one_release(config, ALIGNMENT, 1.0, noise_multiplier, probability=probability, kind="automatic"),)


def _training_phase(
    config: RunConfig, name: str, probability: float, noise_multiplier: float, num_steps: int
) -> PhasePlan:
    """Private steps on adapters, by the run's clipping, mechanism and projection."""
    privacy = config.privacy
    return PhasePlan(
        name=name,
        sampler=PoissonSampler(probability),
        clipping=Clipping(privacy.clipping, privacy.clip_norm),
        mechanism=make_mechanism(privacy, noise_multiplier),
        num_steps=num_steps,
        projection=LowPass(privacy.low_pass) if privacy.low_pass < 1 else None,
    )


def _bilevel_phase(
    config: RunConfig, probability: float, noise_multiplier: float, num_steps: int, client: int
) -> PhasePlan:
    """Steps on weights and, beside them, on gates, each on its half of the records."""
    own_probability = _search_probability(config, probability, client)
    weights = _training_phase(config, BILEVEL, own_probability, noise_multiplier, num_steps)
    gates = PhasePlan(
        name="gates",
        sampler=weights.sampler,
        clipping=Clipping("automatic", 1.0),
        mechanism=GaussianMechanism(weights.mechanism.effective_noise_multiplier),
        num_steps=num_steps,
    )
    return replace(weights, beside=gates)


def _search_probability(config: RunConfig, probability: float, client: int) -> float:
    """Of a record for a batch of its half. How many records a half has is private: twice the rate of all is not.

    Raises:
        DataError: that is above 1.
    """
    if probability > 0.5:
        raise DataError(
            f"training.expected_batch_size = {config.training.expected_batch_size} is more than half the records of "
            f"client {client}, but adapter.select = bilevel trains on halves; lower it"
        )
    return 2 * probability


def evaluation_phases(config: RunConfig) -> tuple[PhasePlan, ...]:
    """The one release of held-out counts, where it is asked for: a record is 1 in one cell of a confusion matrix.

    A record is either trained on or held out, so the whole run costs it the larger of two prices. The plan charges
    their sum: never less, and no argument about the split is needed.
    """
    if not config.federation.private_evaluation:
        return ()
    return (_one_release(config, EVALUATION, 1.0, config.privacy.evaluation_noise_multiplier),)


def _one_release(
    config: RunConfig,
    name: str,
    sensitivity: float,
    noise_multiplier: float,
    *,
    probability: float = 1.0,
    kind: Literal["flat", "automatic"] = "flat",
) -> PhasePlan:
    """A sum over records, by default none left out by chance, released once under plain Gaussian noise."""
    return PhasePlan(
        name=name,
        sampler=PoissonSampler(probability),
        clipping=Clipping(kind, sensitivity),
        mechanism=GaussianMechanism(noise_multiplier if math.isfinite(config.privacy.epsilon) else 0.0),
        num_steps=1,
    )
