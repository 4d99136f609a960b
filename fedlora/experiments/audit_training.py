"""Training level: canaries among one site's records in a real run of the recipe, and what its updates tell of them.

The site trains alone: what other sites send reaches it only as the theta it starts a round from. Every canary is in or
out by its own secret coin (Steinke, Nasr, Jagielski 2023, algorithm 1). The auditor sees what the server sees, theta
before and after each round, and scores a canary by how much of its own clipped gradient the move holds. Where a method
has the site keep a factor, the auditor knows that too: it is noised like what is sent, and covered by the same claim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters.methods import Turn
from fedlora.config import RunConfig
from fedlora.data.encode import EncodedDataset
from fedlora.data.glue import Records
from fedlora.data.tasks import TASKS
from fedlora.engine.batching import microbatches
from fedlora.experiments.simulate import CohortTransport
from fedlora.federation.messages import ClientUpdate, RoundInstruction
from fedlora.federation.schedule import ScheduledRound
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
    """The recipe for one site alone, with as many of its `num_rounds` rounds as are audited."""
    return without_search(config).with_overrides(
        "federation.clients=1",
        "federation.participation=1.0",
        "federation.private_evaluation=false",
        *LONE_SERVER,
        f"federation.rounds={audited_rounds(config, num_rounds)}",
    )


def audited_rounds(config: RunConfig, num_rounds: int) -> int:
    """At most `MOST_ROUNDS` of a site's `num_rounds`; under fed_sb_svd always three, as R is trained in the third."""
    return 3 if config.adapter.method == "fed_sb_svd" else min(num_rounds, MOST_ROUNDS)


LONE_SERVER = (
    "federation.minimum_clients=1",
    "federation.aggregator=mean",
    "federation.weights=uniform",
    "federation.attackers=auto",
    "federation.norm_bound=auto",
)
"""What a server makes of several sites' answers is post-processing, and some of it needs more of them."""


def without_search(config: RunConfig) -> RunConfig:
    """The recipe with all its targets trained, at full rank; what a search releases is audited at the mechanism level.

    A smaller rank drops noise that a site has added, and no more: its release is made of that at full rank.
    """
    targets = ",".join(config.adapter.targets)
    return config.with_overrides(
        "adapter.select=none",
        f"adapter.target_modules={targets}",
        "adapter.mask=",
        "adapter.probe_texts=",
        "adapter.ranks=",
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
    scores = np.sum([auditor.shares(move) for move in seen], axis=0)
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
    """A transport, and all that passed over it: what a server sees, and what the site kept before and after."""

    transport: Transport
    site: Site
    seen: list[tuple[RoundInstruction, Reply, Tensor | None, Tensor | None]]

    def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        kept = self.site.kept
        replies = self.transport.exchange(instruction, clients)
        self.seen.extend((instruction, reply, kept, self.site.kept) for reply in replies)
        return replies


@dataclass(frozen=True, kw_only=True)
class _Move:
    """What a round of fine-tuning did to theta."""

    entry: ScheduledRound
    start: Tensor
    """[P] float32, where the site began."""
    end: Tensor
    """[P] float32, where that and its answer, and what it kept, put it."""
    folded: Tensor | None
    """[F] float32, what the base had been given by then."""


def _run(bench: Workbench, site: Site, dataset: EncodedDataset, advance: Advance) -> list[_Move]:
    """All rounds; those of fine-tuning, as the server saw them."""
    with closing(Ledger.in_memory()) as ledger:
        transport = CohortTransport(workbench=bench, dataset=dataset, sites=[site], ledger=ledger)
        watched = _Watched(transport=transport, site=site, seen=[])
        server = Server(
            workbench=bench,
            transport=watched,
            evaluate=lambda theta: {},
            on_round=lambda report, state: advance(1),
        )
        server.run(initial_state(bench, "audit"))
    return [
        _move(bench, asked, reply, kept, keeps)
        for asked, reply, kept, keeps in watched.seen
        if asked.phase == FINETUNE and isinstance(reply, ClientUpdate)
    ]


def _move(
    bench: Workbench, asked: RoundInstruction, reply: ClientUpdate, kept: Tensor | None, keeps: Tensor | None
) -> _Move:
    entry, layout = bench.schedule[asked.round_index], bench.layout
    start = bench.start(asked.theta.to(bench.execution.device), reply.client, kept)
    end = start.cpu().clone()
    end[bench.sent_positions(entry, reply.client)] = reply.vector
    if keeps is not None:
        end[layout.positions(bench.method.local)] = keeps
    return _Move(entry=entry, start=start, end=end.to(start.device), folded=asked.folded)


@dataclass(frozen=True, kw_only=True)
class _Auditor:
    """Holds the canaries' gradients against what the server saw."""

    bench: Workbench
    plan: PrivacyPlan
    dataset: EncodedDataset
    canaries: np.ndarray

    def shares(self, move: _Move) -> np.ndarray:
        """How much of each canary's clipped gradient one round seems to hold, [attacks, m] float64."""
        bench, start, division = self.bench, move.start, self.bench.division(move.entry)
        # a step goes against the gradient; the rate is divided out, so that all rounds and parts count alike
        moved = (start - move.end) / move.entry.learning_rate
        for part, rate in division.rates.items():
            moved[bench.layout.positions((part,)).to(start.device)] /= rate
        bench.folded.add(None if move.folded is None else move.folded.to(start.device))
        return self._shares(self._clipped_gradients(start, division.turns), moved)

    def _shares(self, gradients: Tensor, moved: Tensor) -> np.ndarray:
        """Ridge estimates of how often each of `gradients` [m, P] is in `moved` [P], [attacks, m] float64.

        A plain inner product would drown in what canaries have in common. One penalty fits the claimed noise (its
        variance over that of a canary's count), the other fits none: it sees a run whose noise is missing.
        """
        phase = self.plan[FINETUNE]
        gram = (gradients @ gradients.T).double().cpu().numpy()
        along = (gradients @ moved).double().cpu().numpy() * self.bench.config.training.expected_batch_size
        without_noise = _SMALL_PENALTY * phase.sensitivity**2
        noise_variance = (phase.mechanism.effective_noise_multiplier * phase.sensitivity) ** 2
        penalties = max(noise_variance / phase.sampler.sampling_probability, without_noise), without_noise
        return np.stack([np.linalg.solve(gram + penalty * np.eye(len(gram)), along) for penalty in penalties])

    def _clipped_gradients(self, theta: Tensor, turns: Sequence[Turn]) -> Tensor:
        """Of every canary at `theta` [P], [m, P] float32: what a step of each turn would add, together."""
        bench, clipping = self.bench, self.plan[FINETUNE].clipping
        rows = torch.zeros(len(self.canaries), len(theta), device=theta.device)
        for group in microbatches(self.dataset.lengths[self.canaries], bench.execution.token_budget):
            batch, labels = self.dataset.batch(self.canaries[group], theta.device)
            owner = torch.zeros(len(group), dtype=torch.int64, device=theta.device)
            members = torch.from_numpy(group.copy()).to(theta.device)
            for turn in turns:
                own = torch.cat(bench.backend.gradients(theta[None], batch, labels, owner, turn), dim=1)
                weights = clipping.weights(own.double().norm(dim=1))
                at = bench.layout.positions(turn.parts).to(theta.device)
                rows[members[:, None], at] += own * weights[:, None].float()
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
