"""K sites' rounds in one engine call. Simulation is K sites here; a deployed client is the same call with K = 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.data.encode import EncodedDataset
from fedlora.engine.confusion import confusion_counts
from fedlora.engine.prototypes import LARGEST_LOGIT, class_sums
from fedlora.engine.training import TrainingJob, train
from fedlora.errors import ProtocolError
from fedlora.federation.messages import ClientUpdate, RoundInstruction, check_update
from fedlora.federation.schedule import ScheduledRound
from fedlora.federation.site import Site
from fedlora.federation.workbench import Workbench
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.noise import NoiseSource, make_noise_source
from fedlora.privacy.plan import EVALUATION, PROTOTYPE

LARGEST_VALUE = 10.0
"""Of theta. Records of one micro-batch share padding and kernels, so rounding ties them together a little; far outside
the range of trained values a hostile theta can magnify that beyond the clip norm."""


@dataclass(kw_only=True)
class Cohort:
    """Sites that share a process, a frozen base and one encoded data set (each sees its own positions only)."""

    workbench: Workbench
    dataset: EncodedDataset
    sites: Sequence[Site]
    ledger: Ledger

    def run(self, instruction: RoundInstruction) -> list[ClientUpdate]:
        """One round of every site: check, charge, compute, noise, check what leaves.

        Raises:
            ProtocolError: the instruction fits no round of a site, another layout, or has numbers out of range; nothing
                is spent or trained.
            AdapterError: its head does not fit the classifier; nothing is spent or trained.
            BudgetRefused: a site's ledger does not grant the round; nothing is spent or trained.
            LedgerUnavailable, LedgerBroken: a charge cannot be written; nothing is trained.
        """
        layout = self.workbench.payload_layout(instruction.phase)
        if instruction.layout_digest != layout.digest:
            raise ProtocolError(
                f"instruction has layout {instruction.layout_digest[:12]}, this side built {layout.digest[:12]}; "
                "server and clients run different configurations"
            )
        theta = instruction.theta
        if theta.shape != (self.workbench.layout.size,) or theta.dtype != torch.float32 or not theta.isfinite().all():
            raise ProtocolError(
                f"instruction's theta has shape {tuple(theta.shape)} and dtype {theta.dtype} or is not finite; "
                f"wanted {self.workbench.layout.size} finite numbers of float32"
            )
        if theta.abs().max() > LARGEST_VALUE:
            raise ProtocolError(
                f"instruction's theta has values beyond ±{LARGEST_VALUE:g}, wanted what sound training reaches; "
                "lower training.learning_rate if this is your own run"
            )
        requests = [site.request(instruction) for site in self.sites]  # one refusal, and no site has spent its round
        if instruction.head is not None:
            self._set_head(*instruction.head)
        reservations = self.ledger.reserve(requests)  # on disk before the first private step
        entries = [site.admit(instruction) for site in self.sites]
        compute = self._release if instruction.phase in (PROTOTYPE, EVALUATION) else self._train
        vectors = compute(instruction, entries[0])
        updates = [
            self._update(site, entry, instruction, vector)
            for site, entry, vector in zip(self.sites, entries, vectors, strict=True)
        ]
        self.ledger.settle(reservations)
        return updates

    def _set_head(self, weight: Tensor, bias: Tensor) -> None:
        if self.workbench.config.model.head != "prototype":
            raise ProtocolError("instruction has a head, but model.head is not prototype: nobody sends one in this run")
        if not all(part.abs().max() <= LARGEST_LOGIT for part in (weight, bias)):  # rounding, as for theta
            raise ProtocolError(
                f"instruction's head has values beyond ±{LARGEST_LOGIT:g} or none at all, which no noisy class means "
                "give; its server is not to be trusted, or of another version"
            )
        self.workbench.classifier.set_head(weight, bias)

    def _update(self, site: Site, entry: ScheduledRound, instruction: RoundInstruction, vector: Tensor) -> ClientUpdate:
        layout = self.workbench.payload_layout(instruction.phase)
        update = ClientUpdate(
            run_id=instruction.run_id,
            round_index=entry.index,
            phase=entry.phase,
            client=site.client,
            layout_digest=layout.digest,
            vector=vector,
            facts=site.facts(entry),
        )
        check_update(update, instruction, layout)
        return update

    def _train(self, instruction: RoundInstruction, entry: ScheduledRound) -> list[Tensor]:
        bench, index = self.workbench, instruction.round_index
        device = bench.execution.device
        jobs = [
            TrainingJob(
                records=site.records,
                phase=site.plan[instruction.phase],
                sampling=site.secret.numpy("sampling", site.client, index),
                noise=self._noise(site, index),
                optimizer_state=site.optimizer_state,
            )
            for site in self.sites
        ]
        trained = train(
            bench.backend,
            self.dataset,
            jobs,
            instruction.theta.to(device),
            num_steps=entry.num_steps,
            learning_rate=entry.learning_rate,
            training=bench.config.training,
            token_budget=bench.execution.token_budget,
        )
        if bench.config.training.keep_state:
            for site, row in zip(self.sites, trained, strict=True):
                site.optimizer_state = row.optimizer_state
        return [row.theta.cpu() for row in trained]

    def _release(self, instruction: RoundInstruction, entry: ScheduledRound) -> list[Tensor]:
        """One noised sum over each site's records."""
        sizes = [slot.size for slot in self.workbench.payload_layout(instruction.phase).slots]
        released = []
        for site in self.sites:
            total, noise = self._sum(site, instruction), self._noise(site, entry.index)
            released.append(site.plan[instruction.phase].privatize(total, noise=noise, slot_sizes=sizes).cpu())
        return released

    def _sum(self, site: Site, instruction: RoundInstruction) -> Tensor:
        """Un-noised: of prototypes over what the site trains on, of an evaluation over what it holds out."""
        bench, layout = self.workbench, self.workbench.payload_layout(instruction.phase)
        if instruction.phase == EVALUATION:
            theta = instruction.theta.to(bench.execution.device)
            return confusion_counts(
                bench.backend, self.dataset, site.heldout, theta, layout, bench.execution.token_budget
            )
        return class_sums(bench.classifier, self.dataset, site.records, layout, bench.execution.token_budget)

    def _noise(self, site: Site, index: int) -> NoiseSource:
        """The site's secret source for one round; no round is done twice, so no stream is used twice."""
        stream, bench = site.secret.numpy("noise", site.client, index), self.workbench
        return make_noise_source(bench.config.engine.noise, stream, bench.execution.device)
