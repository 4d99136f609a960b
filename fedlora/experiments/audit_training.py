"""Training level: canaries among one site's records in a real run of the recipe, and what its updates tell of them.

The site trains alone: what other sites send reaches it only as the theta it starts a round from. Every canary is in or
out by its own secret coin (Steinke, Nasr, Jagielski 2023, algorithm 1). The auditor sees what the server sees, theta
before and after each round, and scores a canary by how much of its own clipped gradient
the move holds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedlora.config import RunConfig
from fedlora.data.encode import EncodedDataset
from fedlora.data.glue import Records
from fedlora.data.tasks import TASKS
from fedlora.engine.batching import microbatches
from fedlora.experiments.simulate import CohortTransport
from fedlora.federation.messages import ClientUpdate, RoundInstruction
from fedlora.federation.server import Reply, Server, Transport, initial_state
from fedlora.federation.site import Site
from fedlora.federation.sites import TrainingData, encode_training_data, make_site
from fedlora.federation.workbench import Workbench
from fedlora.privacy.audit.finding import Evidence
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.phases import FINETUNE
from fedlora.privacy.plan import PrivacyPlan
from fedlora.randomness import PublicSeed, SecretRoot

MOST_ROUNDS = 3
"""Of the audited run. Its noise is calibrated for these rounds alone, so that its claim is the recipe's ε."""

ATTACKS = ("share, for the claimed noise", "share, for no noise")

_SMALL_PENALTY = 0.1  # of the clip norm squared
_WORDS_PER_TEXT = 12
Advance = Callable[[int], None]


def small_config(config: RunConfig, num_rounds: int) -> RunConfig:
    """The recipe for one site alone, with at most `MOST_ROUNDS` of its `num_rounds` rounds."""
    return without_search(config).with_overrides(
        "federation.clients=1",
        "federation.participation=1.0",
        "federation.private_evaluation=false",
        f"federation.rounds={min(num_rounds, MOST_ROUNDS)}",
    )


def without_search(config: RunConfig) -> RunConfig:
    """The recipe with all its targets trained; what a search releases is audited at the mechanism level."""
    targets = ",".join(config.adapter.targets)
    return config.with_overrides(
        "adapter.select=none", f"adapter.target_modules={targets}", "adapter.mask=", "adapter.probe_texts="
    )


def audit_training(
    config: RunConfig, bench: Workbench, records: Records, *, canaries: int, secret: SecretRoot, advance: Advance
) -> Evidence:
    """One small run with `canaries` among the site's `records`: server, transport and site are those of a simulation.

    The site's plan is made for all records and all canaries, so that it says nothing about which of them are in.

    Args:
        config: from `small_config`.
        bench: built for it.
        records: of the audited site; no more are used than there are canaries, or two batches if that is more.
        canaries: m, each in with probability 1/2.
        secret: for the coins; the site has its own.
        advance: called with 1 after every round.

    Raises:
        DataError: the site has too many records for δ, or too few for a batch.
    """
    size = min(len(records), max(canaries, 2 * config.training.expected_batch_size))
    records = records.subset(np.arange(size))
    coins = secret.numpy("audit coins").random(canaries) < 0.5
    planted = _with_canaries(config, records, canaries, _words(bench))
    data = TrainingData(records=planted, parts={0: np.arange(size + canaries)})
    site = make_site(config, data, bench.schedule, 0)
    site = replace(site, records=np.concatenate([np.arange(size), size + np.flatnonzero(coins)]))
    dataset = encode_training_data(bench, data)
    seen = _run(bench, site, dataset, advance)
    auditor = _Auditor(bench=bench, plan=site.plan, dataset=dataset, canaries=np.arange(size, size + canaries))
    scores = np.sum([auditor.shares(*exchanged) for exchanged in seen], axis=0)
    shares = _centred(scores, planted.labels[size:])
    return Evidence(
        level="training",
        name=f"{canaries} canaries in one run",
        claimed=site.plan.epsilon(),
        delta=site.plan.delta,
        without=dict(zip(ATTACKS, shares[:, ~coins], strict=True)),
        with_record=dict(zip(ATTACKS, shares[:, coins], strict=True)),
        method="one run",
    )


@dataclass(frozen=True, kw_only=True)
class _Watched:
    """A transport, and all that passed over it: what a server sees."""

    transport: Transport
    seen: list[tuple[RoundInstruction, Reply]]

    def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        replies = self.transport.exchange(instruction, clients)
        self.seen.extend((instruction, reply) for reply in replies)
        return replies


def _run(bench: Workbench, site: Site, dataset: EncodedDataset, advance: Advance) -> list[tuple[Tensor, Tensor, float]]:
    """Theta before and after every round of fine-tuning, each [P] float32, and its learning rate."""
    with closing(Ledger.in_memory()) as ledger:
        transport = CohortTransport(workbench=bench, dataset=dataset, sites=[site], ledger=ledger)
        watched = _Watched(transport=transport, seen=[])
        server = Server(
            workbench=bench,
            transport=watched,
            evaluate=lambda theta: {},
            on_round=lambda report, state: advance(1),
        )
        server.run(initial_state(bench, "audit"))
    rates = {entry.index: entry.learning_rate for entry in bench.schedule}
    return [
        (asked.theta, reply.vector, rates[asked.round_index])
        for asked, reply in watched.seen
        if asked.phase == FINETUNE and isinstance(reply, ClientUpdate)
    ]


@dataclass(frozen=True, kw_only=True)
class _Auditor:
    """Holds the canaries' gradients against what the server saw."""

    bench: Workbench
    plan: PrivacyPlan
    dataset: EncodedDataset
    canaries: np.ndarray

    def shares(self, before: Tensor, after: Tensor, learning_rate: float) -> np.ndarray:
        """How much of each canary's clipped gradient one round seems to hold, [attacks, m] float64."""
        device = self.bench.execution.device
        # a step goes against the gradient; the rate is divided out, so that all rounds count alike
        return self._shares(before.to(device), (before - after).to(device) / learning_rate)

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
