"""Mechanism level: worst-case gradients through the engine's own path, with one record and without it, many times.

`engine.training.train` draws, clips, sums, noises and divides as in a run; only the gradients are planted. A trial is a
job, and hundreds of them go through one call. What the optimiser and the noise filter would make of a release is
post-processing, so the audit looks at the release itself: plain steps of rate 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters.methods import Turn
from fedlora.config import RunConfig, TrainingConfig
from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import Batch
from fedlora.engine.batching import Shapes
from fedlora.engine.execution import choose_execution
from fedlora.engine.training import TrainingJob, train
from fedlora.privacy.accounting import Charge, epsilon
from fedlora.privacy.audit.finding import Evidence
from fedlora.privacy.audit.scores import log_likelihood_ratio
from fedlora.privacy.noise import NoiseSource, make_noise_source
from fedlora.privacy.phases import FINETUNE
from fedlora.privacy.plan import PhasePlan, PrivacyPlan
from fedlora.randomness import SecretRoot

SLOT_SIZES = (8, 8, 8, 8)
SAMPLED_STEPS = 4
CROWDED_TRIALS = 4
"""How many times the trials the case of a crowded batch gets: a fixed-size sampler shows in one step, but seldom."""

_TRIALS_PER_CALL = 250  # the engine's sum over clients is a dense product: its cost grows with their square
_MOST_OPPONENTS = 256
_HUGE = 1e6  # in clip norms: length of the record's gradient before clipping

Advance = Callable[[int], None]


class PlantedBackend:
    """Serves the same gradients whatever the model: record 0 is the audited one, record 1 stands for everyone else."""

    fuses_clients = True
    slot_sizes = SLOT_SIZES

    def __init__(self, gradients: Tensor) -> None:
        """`gradients` is [2, P] float32."""
        self._gradients = gradients

    def gradients(
        self, theta: Tensor, batch: Batch, labels: Tensor, owner: Tensor, turn: Turn | None = None
    ) -> list[Tensor]:
        return [part.clone() for part in self._gradients[batch["input_ids"][:, 0]].split(self.slot_sizes, dim=1)]

    def logits(self, theta: Tensor, batch: Batch) -> Tensor:
        raise NotImplementedError("planted gradients have no model")

    def detach(self) -> None:
        """Nothing was attached."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to be the worst record.

    Attributes:
        name: for the table.
        direction: [P] unit vector of the record's gradient.
        opponents: how many other records the site holds; each pushes the other way, with all its clip norm.
        num_steps: released sums of one trial.
        trials: as a multiple of the asked ones.
    """

    name: str
    direction: np.ndarray
    opponents: int = 0
    num_steps: int = 1
    trials: int = 1


def release_cases(config: RunConfig, phase: PhasePlan) -> list[Case]:
    """Worst records of one noised sum: whatever a norm, a slot or a noise direction might have been forgotten in."""
    spread = np.random.default_rng(0).standard_normal(sum(SLOT_SIZES))
    return [
        Case(name="gradient over all slots", direction=_unit(spread)),
        Case(name="gradient in one slot", direction=_unit(_placed(np.ones(SLOT_SIZES[2]), 2 * SLOT_SIZES[0]))),
        Case(name="least noised direction", direction=_weakest(config, phase)),
        Case(name="against another record", direction=_unit(spread), opponents=1),
    ]


def sampled_cases(phase: PhasePlan) -> list[Case]:
    """Worst records of sampled steps: alone for a few steps, and in one beside so many that one of them is drawn."""
    spread = _unit(np.random.default_rng(0).standard_normal(sum(SLOT_SIZES)))
    others = min(_MOST_OPPONENTS, round(1 / phase.sampler.sampling_probability))
    return [
        Case(name=f"{SAMPLED_STEPS} sampled steps, alone", direction=spread, num_steps=SAMPLED_STEPS),
        Case(name="sampled step, in a crowd", direction=spread, opponents=others, trials=CROWDED_TRIALS),
    ]


def whole_batch(phase: PhasePlan) -> PhasePlan:
    """`phase` with every record in every batch: q = 1."""
    return dataclasses.replace(phase, sampler=dataclasses.replace(phase.sampler, sampling_probability=1.0))


def mechanism_work(config: RunConfig, plan: PrivacyPlan, trials: int) -> int:
    """Noised sums that `audit_mechanism` makes, for a progress bar."""
    cases = [*release_cases(config, plan[FINETUNE]), *sampled_cases(plan[FINETUNE])]
    return 2 * trials * (sum(case.num_steps * case.trials for case in cases) + len(_other_phases(plan)))


def _other_phases(plan: PrivacyPlan) -> list[PhasePlan]:
    """All but fine-tuning, those that run beside another among them."""
    return [
        part for phase in plan.phases for part in (phase, phase.beside) if part is not None and part.name != FINETUNE
    ]


def audit_mechanism(
    config: RunConfig, plan: PrivacyPlan, *, trials: int, secret: SecretRoot, advance: Advance
) -> list[Evidence]:
    """Scores of every case, `trials` with the record and `trials` without.

    A whole release (q = 1) is judged as Gaussian, which is what is claimed of it and sharp; the first of them also
    without that assumption, like all sampled steps.

    Args:
        config: of the run.
        plan: of the audited site; its sampler, clipping and mechanisms are what is audited.
        trials: of each world.
        secret: where batches and noise come from.
        advance: told how many noised sums were made.
    """
    phase = plan[FINETUNE]
    release = whole_batch(phase)
    stage = Stage(config=config, plan=plan, trials=trials, secret=secret, advance=advance)
    whole = [stage.evidence(case, release) for case in release_cases(config, phase)]
    return [
        dataclasses.replace(whole[0], name=f"{whole[0].name}, any noise"),
        *(dataclasses.replace(part, method="gaussian") for part in whole),
        *(stage.evidence(case, phase) for case in sampled_cases(phase)),
        *(stage.single_release(whole_batch(other)) for other in _other_phases(plan)),
    ]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Runs cases: what all of them have in common."""

    config: RunConfig
    plan: PrivacyPlan
    trials: int
    secret: SecretRoot
    advance: Advance

    def evidence(self, case: Case, phase: PhasePlan) -> Evidence:
        """Scores of `case` under `phase`, beside what is claimed of as many of its steps."""
        without, with_record = (
            _scores(self._released(case, phase, inside=inside), case, phase) for inside in (False, True)
        )
        return self._evidence(case.name, phase.charge(case.num_steps), without, with_record)

    def single_release(self, phase: PhasePlan) -> Evidence:
        """One noised sum of a phase: `privatize` on nothing, and on the longest step that a record can make."""
        sizes = SLOT_SIZES[:2]
        record = torch.zeros(sum(sizes), dtype=torch.float64)
        record[0] = record[-1] = phase.sensitivity / np.sqrt(2)  # of a prototype: its unit row and its count
        direction = _unit(record.numpy())
        case = Case(name=f"{phase.name} release", direction=direction)
        scores = []
        for inside in (False, True):
            noise = self._noise(case, inside=inside)
            total = (record if inside else torch.zeros_like(record)).to(self._device)
            rows = []
            for _ in range(self.trials):
                rows.append(phase.privatize(total.clone(), noise=noise, slot_sizes=sizes))
                self.advance(1)
            scores.append(_scores(torch.stack(rows).double().cpu().numpy()[:, None], case, phase))
        return dataclasses.replace(self._evidence(case.name, phase.charge(1), *scores), method="gaussian")

    def _evidence(
        self, name: str, charge: Charge, without: dict[str, np.ndarray], with_record: dict[str, np.ndarray]
    ) -> Evidence:
        return Evidence(
            level="mechanism",
            name=name,
            claimed=epsilon([charge], self.plan.delta, self.plan.accountant),
            delta=self.plan.delta,
            without=without,
            with_record=with_record,
        )

    @cached_property
    def _device(self) -> torch.device:
        """Only noise that an accelerator draws needs one; the rest is faster without for vectors so short."""
        noise_on_device = self.config.engine.noise == "device"
        return choose_execution(self.config).device if noise_on_device else torch.device("cpu")

    def _noise(self, case: Case, *, inside: bool) -> NoiseSource:
        """As the run's, over a stream of its own for each world of each case."""
        stream = self.secret.numpy("audit noise", case.name, int(inside))
        return make_noise_source(self.config.engine.noise, stream, self._device)

    def _released(self, case: Case, phase: PhasePlan, *, inside: bool) -> np.ndarray:
        """Released sums of one world, [trials, steps, P] float64."""
        clip_norm = phase.clipping.clip_norm
        record = torch.from_numpy(clip_norm * case.direction)
        backend = PlantedBackend(torch.stack([_HUGE * record, -record]).float().to(self._device))
        batch_size = self.config.training.expected_batch_size
        training = TrainingConfig(optimizer="sgd", expected_batch_size=batch_size)
        job = TrainingJob(  # one for all trials: its streams go on from trial to trial
            records=np.array([0] * inside + [1] * case.opponents, dtype=np.int64),
            phase=phase,
            sampling=self.secret.numpy("audit sampling", case.name, int(inside)),
            noise=self._noise(case, inside=inside),
        )
        theta = torch.zeros(sum(SLOT_SIZES), device=self._device)
        chunks = []
        for count in _chunks(case.trials * self.trials):
            steps = []
            for _ in range(case.num_steps):
                rows = train(
                    backend,
                    _DATASET,
                    [job] * count,
                    theta,
                    num_steps=1,
                    learning_rate=1.0,
                    training=training,
                    shapes=Shapes(_TRIALS_PER_CALL),
                )
                steps.append(torch.stack([row.theta for row in rows]).double().mul_(-batch_size))
                self.advance(count)
            chunks.append(torch.stack(steps, dim=1).cpu().numpy())
        return np.concatenate(chunks)


_DATASET = EncodedDataset(
    ids=np.arange(2, dtype=np.int32),
    starts=np.arange(2),
    lengths=np.ones(2, np.int64),
    labels=np.zeros(2, np.int64),
    pad_token_id=0,
)


def _scores(released: np.ndarray, case: Case, phase: PhasePlan) -> dict[str, np.ndarray]:
    """Attacks on releases [trials, steps, P]: the best one if the claim holds, and those that lies fall for."""
    along = released @ case.direction / phase.sensitivity
    if released.shape[1] == 1 and phase.sampler.sampling_probability == 1:
        return {"projection": along[:, 0]}  # the likelihood ratio, but for scale
    attacks = {
        "largest step": along.max(axis=1),  # a sampler of fixed size swaps an opponent for the record: twice as far
        "largest movement": np.linalg.norm(released, axis=2).max(axis=1),  # a skipped empty batch moves nothing
    }
    sigma = phase.mechanism.effective_noise_multiplier
    if sigma > 0:
        q = phase.sampler.sampling_probability
        attacks["likelihood ratio"] = log_likelihood_ratio(along, sampling_probability=q, noise_multiplier=sigma)
    return attacks


def _weakest(config: RunConfig, phase: PhasePlan) -> np.ndarray:
    """Eigenvector of the smallest eigenvalue of the noise's covariance; GReDP with real noise: an odd vector."""
    whole = config.privacy.mechanism == "gredp" and config.privacy.gredp_over == "flat"
    vectors = np.linalg.eigh(phase.mechanism.covariance(sum(SLOT_SIZES) if whole else SLOT_SIZES[0]))[1]
    return _unit(_placed(vectors[:, 0], 0))


def _placed(part: np.ndarray, offset: int) -> np.ndarray:
    vector = np.zeros(sum(SLOT_SIZES))
    vector[offset : offset + len(part)] = part
    return vector


def _unit(vector: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vector / np.linalg.norm(vector)
    return unit


def _chunks(trials: int) -> Iterator[int]:
    for start in range(0, trials, _TRIALS_PER_CALL):
        yield min(_TRIALS_PER_CALL, trials - start)
