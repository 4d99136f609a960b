"""Training level: canaries among one site's records in a real run of the recipe, and what its updates tell of them.

The site trains alone: what other sites send reaches it only as the theta it starts a round from. Every canary is in or
out by its own secret coin (Steinke, Nasr, Jagielski 2023, algorithm 1). The auditor sees what the server sees, theta
before and after each round, and scores a canary by how much of its own clipped gradient
the move holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora.config import RunConfig
from fedlora.data.encode import EncodedDataset, encode
from fedlora.data.glue import Records
from fedlora.data.tasks import TASKS
from fedlora.engine.batching import microbatches
from fedlora.engine.prototypes import class_sums, prototype_head
from fedlora.engine.training import OptimizerState, TrainedRow, TrainingJob, train
from fedlora.experiments.simulate import resolve
from fedlora.federation.schedule import ScheduledRound
from fedlora.federation.workbench import Workbench, build_workbench
from fedlora.privacy.audit.finding import Evidence
from fedlora.privacy.noise import NoiseSource, make_noise_source
from fedlora.privacy.plan import FINETUNE, PROTOTYPE, PrivacyPlan, make_plan
from fedlora.randomness import PublicSeed, SecretRoot

MOST_ROUNDS = 3
"""Of the audited run. Its noise is calibrated for these rounds alone, so that its claim is the recipe's ε."""

ATTACKS = ("share, for the claimed noise", "share, for no noise")

_SMALL_PENALTY = 0.1  # of the clip norm squared
_WORDS_PER_TEXT = 12
Advance = Callable[[int], None]


def small_config(config: RunConfig, num_rounds: int) -> RunConfig:
    """The recipe for one site alone, with at most `MOST_ROUNDS` of its `num_rounds` rounds."""
    return resolve(config).with_overrides(
        "federation.clients=1",
        "federation.participation=1.0",
        "federation.private_evaluation=false",
        f"federation.rounds={min(num_rounds, MOST_ROUNDS)}",
    )


def audit_training(
    config: RunConfig, records: Records, *, canaries: int, secret: SecretRoot, advance: Advance
) -> Evidence:
    """One small run with `canaries` among the site's `records`.

    The plan is made for all records and all canaries, so that it says nothing about which of them are in.

    Args:
        config: from `small_config`.
        records: of the audited site; no more are used than there are canaries, or two batches if that is more.
        canaries: m, each in with probability 1/2.
        secret: coins, batches and noise.
        advance: called with 1 after every round.

    Raises:
        DataError: the site has too many records for δ, or too few for a batch.
    """
    size = min(len(records), max(canaries, 2 * config.training.expected_batch_size))
    records = records.subset(np.arange(size))
    coins = secret.numpy("audit coins").random(canaries) < 0.5
    bench = build_workbench(config)
    planted = _with_canaries(config, records, canaries, _words(bench))
    plan = make_plan(config, num_examples=size + canaries, num_rounds=config.federation.rounds, client=0)
    run = _Run(
        bench=bench,
        plan=plan,
        dataset=encode(planted, bench.classifier.tokenizer, config.data.max_length),
        records=np.concatenate([np.arange(size), size + np.flatnonzero(coins)]),
        canaries=np.arange(size, size + canaries),
        secret=secret,
    )
    shares = _centred(run.scores(advance), planted.labels[size:])
    return Evidence(
        level="training",
        name=f"{canaries} canaries in one run",
        claimed=plan.epsilon(),
        delta=plan.delta,
        without=dict(zip(ATTACKS, shares[:, ~coins], strict=True)),
        with_record=dict(zip(ATTACKS, shares[:, coins], strict=True)),
        method="one run",
    )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The site's rounds, and the canaries' gradients held against each. Nothing leaves the process: no ledger pays."""

    bench: Workbench
    plan: PrivacyPlan
    dataset: EncodedDataset
    records: np.ndarray
    canaries: np.ndarray
    secret: SecretRoot

    def scores(self, advance: Advance) -> np.ndarray:
        """How much of each canary's clipped gradient all rounds together seem to hold, [attacks, m] float64."""
        theta, found = self.bench.initial_theta, np.zeros((len(ATTACKS), len(self.canaries)))
        state = None
        for entry in self.bench.schedule:
            if entry.phase == PROTOTYPE:
                self._release_head(entry)
            else:
                row = self._train(entry, theta, state)
                state = row.optimizer_state if self.bench.config.training.keep_state else None
                # a step goes against the gradient; the rate is divided out, so that all rounds count alike
                found += self._shares(theta, (theta - row.theta) / entry.learning_rate)
                theta = row.theta
            advance(1)
        return found

    def _release_head(self, entry: ScheduledRound) -> None:
        bench, phase = self.bench, self.plan[PROTOTYPE]
        layout = bench.payload_layout(PROTOTYPE)
        total = class_sums(bench.classifier, self.dataset, self.records, layout, bench.execution.token_budget)
        sizes = [slot.size for slot in layout.slots]
        released = phase.privatize(total, noise=self._noise(entry), slot_sizes=sizes).cpu()
        bench.classifier.set_head(*prototype_head(released, layout, bench.config.model.temperature))

    def _train(self, entry: ScheduledRound, theta: Tensor, state: OptimizerState | None) -> TrainedRow:
        job = TrainingJob(
            records=self.records,
            phase=self.plan[entry.phase],
            sampling=self.secret.numpy("sampling", 0, entry.index),
            noise=self._noise(entry),
            optimizer_state=state,
        )
        bench = self.bench
        return train(
            bench.backend,
            self.dataset,
            [job],
            theta,
            num_steps=entry.num_steps,
            learning_rate=entry.learning_rate,
            training=bench.config.training,
            token_budget=bench.execution.token_budget,
        )[0]

    def _noise(self, entry: ScheduledRound) -> NoiseSource:
        generator = self.secret.numpy("noise", 0, entry.index)
        return make_noise_source(self.bench.config.engine.noise, generator, self.bench.execution.device)

    def _shares(self, theta: Tensor, moved: Tensor) -> np.ndarray:
        """Ridge estimates of how often each canary's clipped gradient is in `moved` [P], [attacks, m] float64.

        A plain inner product would drown in what canaries have in common. One penalty fits the claimed noise (its
        variance over that of a canary's count), the other fits none: it sees a run whose noise is missing.
        """
        phase = self.plan[FINETUNE]
        gradients = self._clipped_gradients(theta)
        gram = (gradients @ gradients.T).double().cpu().numpy()
        along = (gradients @ moved).double().cpu().numpy() * self.bench.config.training.expected_batch_size
        without_noise = _SMALL_PENALTY * phase.sensitivity**2
        noise_variance = (phase.mechanism.effective_noise_multiplier * phase.sensitivity) ** 2
        penalties = max(noise_variance / phase.sampler.sampling_probability, without_noise), without_noise
        return np.stack([np.linalg.solve(gram + penalty * np.eye(len(gram)), along) for penalty in penalties])

    def _clipped_gradients(self, theta: Tensor) -> Tensor:
        """Of every canary at `theta` [P], [m, P] float32."""
        bench, clipping = self.bench, self.plan[FINETUNE].clipping
        rows = torch.empty(len(self.canaries), len(theta), device=theta.device)
        for group in microbatches(self.dataset.lengths[self.canaries], bench.execution.token_budget):
            batch, labels = self.dataset.batch(self.canaries[group], theta.device)
            owner = torch.zeros(len(group), dtype=torch.int64, device=theta.device)
            whole = torch.cat(bench.backend.gradients(theta[None], batch, labels, owner), dim=1)
            weights = clipping.weights(whole.double().norm(dim=1))
            rows[torch.from_numpy(group.copy()).to(theta.device)] = whole * weights[:, None].float()
        return rows


def _with_canaries(config: RunConfig, records: Records, canaries: int, words: list[str]) -> Records:
    """`records` and behind them texts of random `words` with random labels, which nothing else explains."""
    draw = PublicSeed.from_int(config.run.seed).numpy("canaries")
    texts = tuple(
        [*column, *(" ".join(draw.choice(words, _WORDS_PER_TEXT)) for _ in range(canaries))] for column in records.texts
    )
    labels = (
        draw.choice(records.labels, canaries)
        if TASKS[config.data.task].regression
        else draw.integers(TASKS[config.data.task].num_labels, size=canaries)
    )
    return Records(texts=texts, labels=np.concatenate([records.labels, labels.astype(records.labels.dtype)]))


def _words(bench: Workbench) -> list[str]:
    """Whole words that the tokenizer knows, without the marks that some put before a word."""
    return sorted({word for token in bench.classifier.tokenizer.get_vocab() if (word := token.lstrip("Ġ▁")).isalpha()})


def _centred(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`scores` less the mean of their label: what all canaries of a label have in common says nothing about one."""
    centred = scores.copy()
    for label in np.unique(labels):
        centred[:, labels == label] -= scores[:, labels == label].mean(axis=1, keepdims=True)
    return centred
