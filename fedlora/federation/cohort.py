"""K sites' rounds in one engine call. Simulation is K sites here; a deployed client is the same call with K = 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedlora.data.encode import EncodedDataset
from fedlora.engine.confusion import confusion_counts
from fedlora.engine.device_memory import exhaustion_named
from fedlora.engine.gates import SearchJob, alignment_sums, search
from fedlora.engine.prefix import PrefixCache
from fedlora.engine.prototypes import LARGEST_LOGIT, class_sums
from fedlora.engine.training import OptimizerState, TrainingJob, train
from fedlora.errors import ProtocolError
from fedlora.federation.messages import LARGEST_VALUE, ClientUpdate, RoundInstruction, check_update, coded_update
from fedlora.federation.prefixes import with_prefix
from fedlora.federation.protection import protected_vector
from fedlora.federation.quantisation import wire_dtype
from fedlora.federation.schedule import ScheduledRound
from fedlora.federation.site import Site
from fedlora.federation.waves import in_waves, wave_size
from fedlora.federation.workbench import Workbench
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.noise import HostNoise, NoiseSource, make_noise_source
from fedlora.privacy.phases import ALIGNMENT, BILEVEL, EVALUATION, FINETUNE, PROTOTYPE, TRAINING
from fedlora.randomness import SecretRoot

_Training = Callable[[ScheduledRound, Sequence[Site]], list[Tensor]]


@dataclass(kw_only=True)
class Cohort:
    """Sites that share a process, a frozen base and one encoded data set (each sees its own positions only)."""

    workbench: Workbench
    dataset: EncodedDataset
    sites: Sequence[Site]
    ledger: Ledger
    prefixes: PrefixCache | None = None
    """Of the process: what the frozen blocks below the lowest adapted one make of its sites' records."""

    def run(self, instruction: RoundInstruction) -> list[ClientUpdate]:
        """One round of every site: check, charge, compute, noise, check what leaves.

        Raises:
            ProtocolError: the instruction fits no round of a site, another layout, or has numbers out of range; nothing
                is spent or trained.
            AdapterError: its head or its mask does not fit the model; nothing is spent or trained.
            ModelError: one client alone does not fit into the device's memory; nothing is spent or trained, unless it
                is found out only on the way, against the estimate.
            BudgetRefused: a site's ledger does not grant the round; nothing is spent or trained.
            LedgerUnavailable, LedgerBroken: a charge cannot be written; nothing is trained.
        """
        requests = [site.request(instruction) for site in self.sites]  # one refusal, and no site has spent its round
        self._adopt(instruction)
        self._check_theta(instruction)
        self._fold(instruction.folded)
        if instruction.head is not None:
            self._set_head(*instruction.head)
        compute = self._computation(instruction)
        reservations = self.ledger.reserve(requests)  # on disk before the first private step
        entries = [site.admit(instruction) for site in self.sites]
        with exhaustion_named(f"phase {instruction.phase} of one client"):
            vectors = compute(entries[0])
        updates = [
            self._update(site, entry, instruction, self._protected(site, entry, instruction, vector))
            for site, entry, vector in zip(self.sites, entries, vectors, strict=True)
        ]
        self.ledger.settle(reservations)
        return updates

    def _adopt(self, instruction: RoundInstruction) -> None:
        """Train what the instruction's mask chooses, or everything as long as nothing was to be chosen yet."""
        phase, chosen = instruction.phase, instruction.mask
        selects = self.workbench.config.adapter.select != "none"
        if (chosen is not None) != (selects and phase in (FINETUNE, EVALUATION)):
            state = "no choice of modules" if chosen is None else "a choice of modules"
            raise ProtocolError(
                f"instruction for phase {phase} has {state}, but adapter.select = "
                f"{self.workbench.config.adapter.select}; server and clients run different configurations"
            )
        self.workbench.adopt(chosen)
        layout = self.workbench.sent_layout(self.sites[0].scheduled(instruction))
        if instruction.layout_digest != layout.digest:
            raise ProtocolError(
                f"instruction has layout {instruction.layout_digest[:12]}, this side built {layout.digest[:12]}; "
                "server and clients run different configurations"
            )

    def _check_theta(self, instruction: RoundInstruction) -> None:
        theta, size = instruction.theta, self.workbench.global_size(instruction.phase)
        if theta.shape != (size,) or theta.dtype != torch.float32 or not theta.isfinite().all():
            raise ProtocolError(
                f"instruction's theta has shape {tuple(theta.shape)} and dtype {theta.dtype} or is not finite; "
                f"wanted {size} finite numbers of float32"
            )
        if theta.abs().max() > LARGEST_VALUE:
            raise ProtocolError(
                f"instruction's theta has values beyond ±{LARGEST_VALUE:g}, wanted what sound training reaches; "
                "lower training.learning_rate if this is your own run"
            )

    def _fold(self, folded: Tensor | None) -> None:
        """Add to the base what the server has made of earlier rounds, where the method has it do so."""
        bench = self.workbench
        if folded is None:
            bench.folded.undo()
            return
        if not bench.method.folds:
            raise ProtocolError(
                f"instruction adds to the base model, which adapter.method = {bench.config.adapter.method} never does; "
                "server and clients run different configurations"
            )
        if folded.shape != (bench.folded.size,) or not folded.abs().max() <= LARGEST_VALUE:
            raise ProtocolError(
                f"instruction adds {tuple(folded.shape)} numbers to the base, wanted {bench.folded.size} within "
                f"±{LARGEST_VALUE:g}; lower training.learning_rate if this is your own run"
            )
        bench.folded.add(folded.to(bench.execution.device))

    def _check_gates(self, theta: Tensor) -> None:
        """Gradients of a bilevel search are taken where the gates have scaled the weights."""
        weights, logits = theta.split([self.workbench.layout.size, len(self.workbench.candidates)])
        if self.workbench.gated.opened(weights[None], logits[None]).abs().max() > LARGEST_VALUE:
            raise ProtocolError(
                f"instruction's theta times its gates has values beyond ±{LARGEST_VALUE:g}, wanted what sound training "
                "reaches; lower training.learning_rate if this is your own run"
            )

    def _computation(self, instruction: RoundInstruction) -> Callable[[ScheduledRound], list[Tensor]]:
        """What the phase has every site compute, noise included. Whatever can be refused is refused here."""
        theta = instruction.theta.to(self.workbench.execution.device)
        phase = instruction.phase
        if phase == BILEVEL:
            self._check_gates(theta)
        size = self._wave_size(theta, self.sites[0].scheduled(instruction))
        if phase == PROTOTYPE:
            return partial(self._release, self._class_sums)
        if phase == EVALUATION:
            return partial(self._release, partial(self._confusion_counts, theta))
        if phase == ALIGNMENT:
            return partial(self._release, partial(self._alignment_sums, theta, self.workbench.gated.directions(theta)))
        return partial(self._in_waves, size, partial(self._search if phase == BILEVEL else self._train, theta))

    def _wave_size(self, theta: Tensor, entry: ScheduledRound) -> int:
        """How many clients are trained at once. Other phases take them one by one, and less memory than training."""
        short = replace(entry, phase=entry.phase if entry.phase in TRAINING else FINETUNE, num_steps=2)
        compute = self._search if short.phase == BILEVEL else replace(self, prefixes=None)._train

        def train(count: int) -> None:
            nothing = np.empty(0, np.int64)
            blank = replace(
                self.sites[0],
                records=nothing,
                gate_records=nothing,
                optimizer_state=None,
                kept=None,
                secret=SecretRoot.from_os(),
            )
            compute(theta, short, [replace(blank) for _ in range(count)])

        bench = self.workbench
        return wave_size(bench, self.sites[0].plan[short.phase], bench.initial_theta, len(self.sites), train)

    def _in_waves(self, size: int, compute: _Training, entry: ScheduledRound) -> list[Tensor]:
        return in_waves(self.workbench, self.sites, size, partial(compute, entry))

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
        layout = self.workbench.sent_layout(entry, site.client)
        update = ClientUpdate(
            run_id=instruction.run_id,
            round_index=entry.index,
            phase=entry.phase,
            client=site.client,
            layout_digest=layout.digest,
            vector=vector,
            facts=site.facts(entry),
        )
        if (dtype := wire_dtype(self.workbench.config, entry.phase)) != "float32":
            start = self.workbench.moved_from(instruction.theta, entry, site.client)
            check_update(update, instruction, layout)  # what is not finite has no code
            update = coded_update(update, start, layout, dtype, site.secret.numpy("wire", site.client, entry.index))
        check_update(update, instruction, layout)
        return update

    def _protected(self, site: Site, entry: ScheduledRound, instruction: RoundInstruction, vector: Tensor) -> Tensor:
        """What may leave of a site's trained vector where its whole data are protected; else noise is in it already."""
        how = site.plan[entry.phase].client_level
        if how is None:
            return vector
        start = self.workbench.moved_from(instruction.theta, entry, site.client)
        noise = HostNoise(site.secret.numpy("client noise", site.client, entry.index))
        return protected_vector(how, vector, start, noise)

    def _train(self, theta: Tensor, entry: ScheduledRound, sites: Sequence[Site]) -> list[Tensor]:
        bench = self.workbench
        jobs = [
            TrainingJob(
                records=site.records,
                phase=site.plan[entry.phase],
                sampling=site.secret.numpy("sampling", site.client, entry.index),
                noise=self._noise(site, entry.index),
                optimizer_state=site.optimizer_state,
                active=bench.active(site.client),
            )
            for site in sites
        ]
        trained = train(
            bench.backend,
            self.dataset if self.prefixes is None else with_prefix(self.prefixes, bench, entry, self.sites),
            jobs,
            torch.stack([bench.start(theta, site.client, site.kept) for site in sites]) if bench.differs else theta,
            num_steps=entry.num_steps,
            learning_rate=entry.learning_rate,
            training=bench.config.training,
            shapes=bench.shapes,
            cohort=len(self.sites),
            division=bench.division(entry),
        )
        if bench.config.training.keep_state:
            for site, row in zip(sites, trained, strict=True):
                site.optimizer_state = _on_host(row.optimizer_state)
        rows = [row.theta.cpu() for row in trained]
        if bench.method.local:
            for site, own in zip(sites, rows, strict=True):
                site.kept = own[bench.layout.positions(bench.method.local)]
        if not entry.turns:
            return rows
        return [row[bench.sent_positions(entry, site.client)] for site, row in zip(sites, rows, strict=True)]

    def _search(self, theta: Tensor, entry: ScheduledRound, sites: Sequence[Site]) -> list[Tensor]:
        """Weights and gates in turn; `theta` [P + M] holds both."""
        bench = self.workbench
        jobs = [
            SearchJob(
                weight_records=site.weight_records,
                gate_records=site.gate_records,
                phase=site.plan[entry.phase],
                sampling=site.secret.numpy("sampling", site.client, entry.index),
                noise=self._noise(site, entry.index),
            )
            for site in sites
        ]
        weights, gates = theta.split([bench.layout.size, len(bench.candidates)])
        found = search(
            bench.backend,
            self.dataset,
            jobs,
            weights,
            gates,
            bench.gated,
            num_steps=entry.num_steps,
            learning_rate=entry.learning_rate,
            gate_learning_rate=bench.config.adapter.gate_learning_rate,
            training=bench.config.training,
            shapes=bench.shapes,
            cohort=len(self.sites),
        )
        return [row.cpu() for row in found]

    def _release(self, sums: Callable[[Site, ScheduledRound], Tensor], entry: ScheduledRound) -> list[Tensor]:
        """One noised sum over each site's records."""
        sizes = [slot.size for slot in self.workbench.payload_layout(entry.phase).slots]
        released = []
        for site in self.sites:
            total, noise = sums(site, entry), self._noise(site, entry.index)
            released.append(site.plan[entry.phase].privatize(total, noise=noise, slot_sizes=sizes).cpu())
        return released

    def _class_sums(self, site: Site, entry: ScheduledRound) -> Tensor:
        bench, layout = self.workbench, self.workbench.payload_layout(entry.phase)
        return class_sums(bench.classifier, self.dataset, site.records, layout, bench.shapes)

    def _confusion_counts(self, theta: Tensor, site: Site, entry: ScheduledRound) -> Tensor:
        bench, layout = self.workbench, self.workbench.payload_layout(entry.phase)
        theta = bench.model(theta, site.kept)
        return confusion_counts(bench.backend, self.dataset, site.heldout, theta, layout, bench.shapes)

    def _alignment_sums(self, theta: Tensor, directions: Tensor, site: Site, entry: ScheduledRound) -> Tensor:
        bench, phase = self.workbench, site.plan[entry.phase]
        sampling = site.secret.numpy("sampling", site.client, entry.index)
        drawn = site.records[phase.sampler.draw(len(site.records), sampling)]
        sums = alignment_sums(
            bench.backend,
            self.dataset,
            [drawn],
            start=bench.gated.scaled(theta[None], theta.new_zeros(1, len(bench.candidates)))[0],
            directions=directions,
            gated=bench.gated,
            phase=phase,
            shapes=bench.shapes,
        )
        return sums[0]

    def _noise(self, site: Site, index: int) -> NoiseSource:
        """The site's secret source for one round; no round is released twice, so no stream is used twice."""
        stream, bench = site.secret.numpy("noise", site.client, index), self.workbench
        return make_noise_source(bench.config.engine.noise, stream, bench.execution.device)


def _on_host(state: OptimizerState) -> OptimizerState:
    """A client has its turn once in a while; until then its optimiser takes no room on the device."""
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()}
