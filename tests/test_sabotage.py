"""The ways in which published code for private federated training has been wrong, planted in a scratch copy of ours.

Every lie turns at least one ordinary check red; on the sound copy all of them are green. A lie names the exact text it
replaces, so that it cannot quietly stop meaning what it says when the code moves on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED = 0, 1  # pytest's exit codes; anything else would mean that the copy does not even start


@dataclass(frozen=True, kw_only=True)
class Lie:
    """One planted error, and the checks of this suite that must turn red under it."""

    file: str
    sound: str
    planted: str
    checks: tuple[str, ...]


_NOISE = "tests/engine/test_noise.py"
_TRAINING = "tests/engine/test_training.py"
_CLIPPING = "tests/privacy/test_clipping.py"
_SAMPLING = "tests/privacy/test_sampling.py"
_MECHANISMS = "tests/privacy/test_mechanisms.py"
_LEDGER = "tests/privacy/test_ledger.py"
_COHORT = "tests/federation/test_cohort.py"
_PLAN = "tests/privacy/test_plan.py"
_GATES = "tests/engine/test_gates.py"
_BILEVEL = "tests/engine/test_bilevel.py"
_RELEASES = "tests/federation/test_search_releases.py"
_DESK = "tests/site/test_desk.py"
_SPENDING = "tests/site/test_spending.py"
_DAEMON = "tests/site/test_daemon.py"
_COMPANY = "tests/engine/test_company.py"
_CLIENTS = "tests/privacy/test_client_level.py"
_TURNS = "tests/engine/test_turns.py"
_FACTORS = "tests/engine/test_factors.py"
_METHODS = "tests/federation/test_methods.py"
_CLIENT_RUNS = "tests/federation/test_client_level_runs.py"

LIES = {
    "no noise": Lie(
        file="fedlora/privacy/mechanisms/granular.py",
        sound="+ (unit_noise * std / grid).round_()",
        planted="+ (unit_noise * 0).round_()",
        checks=(_NOISE, _MECHANISMS),
    ),
    "ten percent too little noise": Lie(
        file="fedlora/privacy/mechanisms/granular.py",
        sound="return noise_multiplier * (sensitivity",
        planted="return 0.9 * noise_multiplier * (sensitivity",
        checks=(_NOISE, _MECHANISMS),
    ),
    "noise over the root of the batch size": Lie(
        file="fedlora/privacy/plan.py",
        sound="total, sensitivity=self.sensitivity, noise=noise",
        planted="total, sensitivity=self.sensitivity / 4**0.5, noise=noise",  # the batch size of the check is 4
        checks=(_NOISE,),
    ),
    "noise before clipping": Lie(
        file="fedlora/privacy/clipping.py",
        sound="        # float64: a float32 norm",
        planted="        gradients = [p + torch.randn_like(p) for p in gradients]\n        # float64: a float32 norm",
        checks=(_CLIPPING, _TRAINING),
    ),
    "the mean of the batch is clipped": Lie(
        file="fedlora/privacy/clipping.py",
        sound="weights, offset = self.weights(norms), 0",
        planted="weights, offset = self.weights(sum(gradients[0]).norm().double().expand(len(owner))), 0",
        checks=(_CLIPPING, _TRAINING),
    ),
    "shuffled batches of fixed size": Lie(
        file="fedlora/privacy/sampling.py",
        sound="return np.flatnonzero(generator.random(num_examples) < self.sampling_probability)",
        planted="return generator.permutation(num_examples)[: round(self.sampling_probability * num_examples)]",
        checks=(_SAMPLING,),
    ),
    "an outlier is not clipped": Lie(
        file="fedlora/privacy/clipping.py",
        sound="return torch.where(norms < _LARGEST_NORM, factor * _ROUNDING, torch.zeros_like(norms))",
        planted="return torch.where(norms < 1e3, factor * _ROUNDING, torch.ones_like(norms))",
        checks=(_CLIPPING,),
    ),
    "one slot is left out of the norm": Lie(
        file="fedlora/privacy/clipping.py",
        sound="dtype=torch.float64) for part in gradients]",
        planted="dtype=torch.float64) for part in gradients[:1]]",
        checks=(_CLIPPING,),
    ),
    "one noise draw for every round": Lie(
        file="fedlora/federation/cohort.py",
        sound='site.secret.numpy("noise", site.client, index)',
        planted='site.secret.numpy("noise", site.client)',
        checks=(_COHORT,),
    ),
    "one noise draw for every client": Lie(
        file="fedlora/federation/cohort.py",
        sound='site.secret.numpy("noise", site.client, index)',
        planted='site.secret.numpy("noise", index)',
        checks=(_COHORT,),
    ),
    "GReDP with real noise passes as private": Lie(
        file="fedlora/privacy/mechanisms/gredp.py",
        sound='"real": 0.0}',
        planted='"real": math.sqrt(0.5)}',
        checks=(_MECHANISMS,),
    ),
    "GReDP with half the variance is charged as if it were whole": Lie(
        file="fedlora/privacy/mechanisms/gredp.py",
        sound='"complex_half": math.sqrt(0.5)',
        planted='"complex_half": 1.0',
        checks=(_MECHANISMS,),
    ),
    "a new budget in every round": Lie(
        file="fedlora/privacy/ledger.py",
        sound="        return self._tally.charges(data_set.unit, data_set.relation, _owner(data_set))\n",
        planted="        return []\n",
        checks=(_LEDGER,),
    ),
    "a ledger goes on from rows that were taken back": Lie(
        file="fedlora/privacy/tally.py",
        sound="            self._start_anew()\n        for",
        planted="            return\n        for",
        checks=("tests/privacy/test_tally.py",),
    ),
    "a new budget in every run": Lie(
        file="fedlora/federation/site.py",
        sound="            data_set=self.data_set,\n",
        planted="            data_set=replace(self.data_set, name='', fingerprint=instruction.run_id),\n",
        checks=("tests/federation/test_site.py",),
    ),
    "charged after it is computed": Lie(
        file="fedlora/federation/cohort.py",
        sound="        reservations = self.ledger.reserve(requests)  # on disk before the first private step\n",
        planted="        reservations: list[int] = []\n",
        checks=("tests/federation/test_kill.py",),
    ),
    "an empty batch is skipped": Lie(
        file="fedlora/engine/training.py",
        sound="    totals = clipped_sums(backend, dataset, drawn, rows, phase, width=",
        planted=(
            "    if not sum(map(len, drawn)):\n        return list(torch.zeros_like(rows))\n"
            "    totals = clipped_sums(backend, dataset, drawn, rows, phase, width="
        ),
        checks=(_TRAINING,),
    ),
    "division by the realised batch size": Lie(
        file="fedlora/engine/training.py",
        sound=".div_(training.expected_batch_size)",
        planted=".div_(max(1, sum(map(len, drawn))))",
        checks=(_TRAINING, _NOISE),
    ),
    "δ from the number of steps": Lie(
        file="fedlora/privacy/plan.py",
        sound="            delta=privacy.delta,\n            sampling_probability",
        planted="            delta=1 / trained,\n            sampling_probability",
        checks=(_PLAN,),
    ),
    "a search costs nothing": Lie(
        file="fedlora/privacy/plan.py",
        sound="return epsilon([phase.charge() for phase in self.phases], self",
        planted="return epsilon([p.charge() for p in self.phases if p.name not in (BILEVEL, ALIGNMENT)], self",
        checks=(_PLAN,),
    ),
    "halves are charged as if all records were sampled from": Lie(
        file="fedlora/privacy/plan.py",
        sound="return Charge(self.sampler.sampling_probability,",
        planted="return Charge(self.sampler.sampling_probability / (2 if self.beside else 1),",
        checks=(_PLAN,),
    ),
    "gates may cost more than what is charged for both": Lie(
        file="fedlora/privacy/plan.py",
        sound="if self.beside is not None and not _no_dearer(",
        planted="if self.beside is self and not _no_dearer(",
        checks=(_PLAN,),
    ),
    "noise is remembered without a part of what it was found for": Lie(
        file="fedlora/privacy/calibration.py",
        sound='"further": [[float(probability), int(steps)] for probability, steps in further]',
        planted='"further": []',
        checks=("tests/privacy/test_calibration.py",),
    ),
    "halves are divided by position": Lie(
        file="fedlora/data/holdout.py",
        sound='return _share(records, 0.5, seed, b"fedlora gates")',
        planted="return np.arange(len(records)) % 2 == 0",
        checks=("tests/data/test_holdout.py", _RELEASES),
    ),
    "weights learn from the gates' half too": Lie(
        file="fedlora/federation/cohort.py",
        sound="weight_records=site.weight_records,",
        planted="weight_records=site.records,",
        checks=(_RELEASES,),
    ),
    "gates learn from held-out records": Lie(
        file="fedlora/federation/sites.py",
        sound="_for_gates(config, records) & ~kept_back",
        planted="_for_gates(config, records)",
        checks=(_RELEASES,),
    ),
    "gates are drawn at the first site's rate": Lie(
        file="fedlora/engine/gates.py",
        sound="_draw(job.gate_phase, job.gate_records, job.sampling)",
        planted="_draw(gate_phase, job.gate_records, job.sampling)",
        checks=(_BILEVEL, _RELEASES),
    ),
    "gates learn from the batch of the weights": Lie(
        file="fedlora/engine/gates.py",
        sound="_draw(job.gate_phase, job.gate_records, job.sampling)",
        planted="_draw(job.gate_phase, job.weight_records, job.sampling)",
        checks=(_BILEVEL,),
    ),
    "clients draw the same noise": Lie(
        file="fedlora/engine/releases.py",
        sound="totals[client], noise=noise[client], slot_sizes",
        planted="totals[client], noise=noise[0], slot_sizes",
        checks=("tests/engine/test_releases.py",),
    ),
    "smaller micro-batches are used unseen": Lie(
        file="fedlora/engine/company.py",
        sound="(rows for rows in fewer if _agree(prints(members, rows), wanted))",
        planted="fewer",
        checks=(_COMPANY,),
    ),
    "one record stands for all of a micro-batch": Lie(
        file="fedlora/engine/company.py",
        sound="if _agree(prints(members, rows), wanted)",
        planted="if _agree(prints(members[:1], rows), wanted)",
        checks=(_COMPANY,),
    ),
    "rows follow from how many records were drawn": Lie(
        file="fedlora/engine/batching.py",
        sound="lambda columns: self.row_counts(columns, clients, expected, fewer=fewer),",
        planted="lambda columns: (2, 3, 5, 9, 17, 33),",
        checks=(_COMPANY,),
    ),
    "only one width is looked at": Lie(
        file="fedlora/engine/batching.py",
        sound="if self.agreeing is None:",
        planted="if self.agreeing is None or columns != 24:",
        checks=(_COMPANY,),
    ),
    "a lone client's kernels are not looked at": Lie(
        file="fedlora/engine/company.py",
        sound="min(clients, 2) if self.backend.fuses_clients",
        planted="2 if self.backend.fuses_clients",
        checks=(_COMPANY,),
    ),
    "embeddings are taken in company unseen": Lie(
        file="fedlora/engine/prototypes.py",
        sound="for group in shapes.cut_full(",
        planted="for group in Shapes(shapes.token_budget).cut_full(",
        checks=("tests/engine/test_prototypes.py",),
    ),
    "logits are taken in company unseen": Lie(
        file="fedlora/engine/confusion.py",
        sound="for group in shapes.cut_full(",
        planted="for group in Shapes(shapes.token_budget).cut_full(",
        checks=("tests/engine/test_confusion.py",),
    ),
    "gradients stand for logits": Lie(
        file="fedlora/engine/company.py",
        sound='if quantity == "logits":',
        planted='if quantity == "none":',
        checks=(_COMPANY, "tests/engine/test_confusion.py"),
    ),
    "a wave is cut as if it were the cohort": Lie(
        file="fedlora/engine/training.py",
        sound="jobs[0].phase, cohort or len(jobs)",
        planted="jobs[0].phase, len(jobs)",
        checks=("tests/federation/test_waves.py",),
    ),
    "a head of zeros blinds the look at company": Lie(
        file="fedlora/federation/workbench.py",
        sound="        with any_head(config, classifier):\n            return company",
        planted="        if True:\n            return company",
        checks=(_COMPANY,),
    ),
    "gates leave without noise": Lie(
        file="fedlora/engine/gates.py",
        sound="released = privatize_all([job.gate_phase for job in jobs], gate_sums(gates), noise, (logits.numel(),))",
        planted="released = list(gate_sums(gates).float())",
        checks=(_BILEVEL, _RELEASES),
    ),
    "gates have the same noise in every step": Lie(
        file="fedlora/engine/gates.py",
        sound="gate_sums(gates), noise, (logits.numel(),))",
        planted="gate_sums(gates), [type(one)(np.random.default_rng(0)) for one in noise], (logits.numel(),))",
        checks=(_BILEVEL,),
    ),
    "what is made of gradients is not clipped": Lie(
        file="fedlora/engine/sums.py",
        sound="phase.add_clipped(totals, gradients if vectors is None else vectors(gradients, everyone), owners)",
        planted=(
            "totals.index_add_(0, owners, torch.cat([*vectors(gradients, everyone)], 1)[: len(owners)].double())"
            " if vectors else phase.add_clipped(totals, gradients, owners)"
        ),
        checks=(_GATES, _BILEVEL),
    ),
    "scores of all records are charged as if they were sampled": Lie(
        file="fedlora/federation/cohort.py",
        sound="drawn = site.records[phase.sampler.draw(len(site.records), sampling)]",
        planted="drawn = site.records",
        checks=(_RELEASES,),
    ),
    "scores are centred over their micro-batch": Lie(
        file="fedlora/engine/gates.py",
        sound="[-gated.products(gradients, toward, owner)]",
        planted="[(s := gated.products(gradients, toward, owner)).nan_to_num().mean(0) - s]",
        checks=(_GATES,),
    ),
    "a kept answer is given to another question": Lie(
        file="fedlora/site/desk.py",
        sound="kept is not None and kept.asked == asked and",
        planted="kept is not None and",
        checks=(f"{_DESK}::test_another_question_for_a_round_that_is_over_is_refused",),
    ),
    "rounds that only the ledger remembers are open again": Lie(
        file="fedlora/site/desk.py",
        sound="max(seat.site.next_round, max(charged) + 1)",
        planted="seat.site.next_round",
        checks=(f"{_SPENDING}::test_what_was_passed_over_stays_so_though_answers_are_lost",),
    ),
    "an edit of the policy counts from the next start": Lie(
        file="fedlora/site/desk.py",
        sound="policy = self._policy_now()\n        policy.check_config",
        planted="policy = self.policy\n        policy.check_config",
        checks=(f"{_DESK}::test_an_edit_of_the_policy_counts_at_once",),
    ),
    "a run may change its configuration": Lie(
        file="fedlora/site/desk.py",
        sound="        _check_run(config, instruction)\n",
        planted="",
        checks=(f"{_DESK}::test_a_run_is_one_configuration",),
    ),
    "a run may change its plan": Lie(
        file="fedlora/site/desk.py",
        sound="                _check_plan(seat.site, charged)\n",
        planted="                pass\n",
        checks=(f"{_DESK}::test_a_run_is_one_plan",),
    ),
    "two runs of one configuration share a secret": Lie(
        file="fedlora/site/desk.py",
        sound="            self._clear()\n            seat = self._seat_for(config, request, policy)\n",
        planted="            seat.site.run_id, seat.site.next_round = None, 0\n",
        checks=(f"{_DESK}::test_two_runs_take_turns_and_each_is_charged",),
    ),
    "an update leaves unseen": Lie(
        file="fedlora/federation/cohort.py",
        sound="        check_update(update, instruction, layout)\n        return update\n",
        planted="        return update\n",
        checks=(f"{_SPENDING}::test_what_egress_refuses_does_not_leave",),
    ),
    "status is told to couriers": Lie(
        file="fedlora/site/listeners.py",
        sound="if self.server.peer(self.request) not in (os.geteuid(), 0):",
        planted="if self.server.peer(self.request) in ():",
        checks=(f"{_DAEMON}::test_status_is_for_its_own_user_and_root",),
    ),
    "everybody may use the socket": Lie(
        file="fedlora/site/daemon.py",
        sound="os.umask(0o117 if group else 0o177)",
        planted="os.umask(0)",
        checks=(f"{_DAEMON}::test_the_socket_is_for_its_user_or_for_the_group",),
    ),
    "couriers over TLS need no certificate": Lie(
        file="fedlora/site/daemon.py",
        sound="context.verify_mode = ssl.CERT_REQUIRED",
        planted="context.verify_mode = ssl.CERT_OPTIONAL",
        checks=("tests/site/test_tls.py::test_without_a_certificate_nobody_is_answered",),
    ),
    "the mean of clients is over who answered": Lie(
        file="fedlora/privacy/client_level.py",
        sound="        return released.double() / self.cohort_size",
        planted="        return released.double() / len(parts)",
        checks=(_CLIENTS,),
    ),
    "ten percent too little noise on clients": Lie(
        file="fedlora/privacy/client_level.py",
        sound="mechanism = GaussianMechanism(self.noise_multiplier)",
        planted="mechanism = GaussianMechanism(0.9 * self.noise_multiplier)",
        checks=(_CLIENTS,),
    ),
    "noise on a client's n-th of the sum": Lie(
        file="fedlora/privacy/client_level.py",
        sound="mechanism.privatize(total[0], sensitivity=self.clip_norm,",
        planted="mechanism.privatize(total[0], sensitivity=self.clip_norm / self.cohort_size,",
        checks=(_CLIENTS,),
    ),
    "a client may move the sum by twice the bound": Lie(
        file="fedlora/privacy/client_level.py",
        sound='Clipping("flat", self.clip_norm)',
        planted='Clipping("flat", 2 * self.clip_norm)',
        checks=(_CLIENTS,),
    ),
    "clients' coordinates are clipped one by one": Lie(
        file="fedlora/privacy/client_level.py",
        sound="        own = move.detach().to(",
        planted="        move = move.clamp(-self.clip_norm / 2, self.clip_norm / 2)\n        own = move.detach().to(",
        checks=(_CLIENTS,),
    ),
    "the server believes that clients have clipped": Lie(
        file="fedlora/privacy/client_level.py",
        sound="            self._add_clipped(total, part)",
        planted="            total[0] += part",
        checks=(_CLIENTS,),
    ),
    "shared noise goes on without everybody": Lie(
        file="fedlora/privacy/client_level.py",
        sound="if len(parts) < self.cohort_size:",
        planted="if len(parts) < 1:",
        checks=(_CLIENTS,),
    ),
    "each client's part is all of the noise": Lie(
        file="fedlora/privacy/client_level.py",
        sound="return self.noise_multiplier / math.sqrt(self.cohort_size - 1)",
        planted="return self.noise_multiplier",
        checks=(_CLIENTS,),
    ),
    "a client counts its own part as noise against it": Lie(
        file="fedlora/privacy/client_level.py",
        sound="return self.noise_multiplier / math.sqrt(self.cohort_size - 1)",
        planted="return self.noise_multiplier / math.sqrt(self.cohort_size)",
        checks=(_CLIENTS,),
    ),
    "clients are charged as if they were sampled": Lie(
        file="fedlora/privacy/client_level.py",
        sound="return Charge(1.0, self.noise_multiplier, -(-num_steps",
        planted="return Charge(0.25, self.noise_multiplier, -(-num_steps",
        checks=(_CLIENTS,),
    ),
    "the server adds no noise to clients' moves": Lie(
        file="fedlora/federation/server.py",
        sound="        if how is None:\n            return partial(aggregate, config=config.federation)",
        planted="        if how is None or config.privacy.client_noise == 'server':\n"
        "            return partial(aggregate, config=config.federation)",
        checks=(_CLIENT_RUNS,),
    ),
    "one key for the server's noise in all rounds": Lie(
        file="fedlora/federation/server.py",
        sound='HostNoise(root.numpy("client-level noise", entry.index))',
        planted='HostNoise(SecretRoot.seeded(config.run.seed).numpy("client-level noise"))',
        checks=(_CLIENT_RUNS,),
    ),
    "an outlier among protected clients is dropped": Lie(
        file="fedlora/federation/server.py",
        sound="if entry.phase in TRAINING and self.client_level is None:",
        planted="if entry.phase in TRAINING:",
        checks=(_CLIENT_RUNS,),
    ),
    "noise of clients on the sum of those who answered": Lie(
        file="fedlora/federation/server.py",
        sound="        return partial(protected_mean, how, noise=noise)",
        planted="        return lambda updates, start: protected_mean(\n"
        "            replace(how, cohort_size=len(updates)), updates, start, noise=noise\n        )",
        checks=(_CLIENT_RUNS,),
    ),
    "clients protect the vector and not the move": Lie(
        file="fedlora/federation/cohort.py",
        sound="return protected_vector(how, vector, start, noise)",
        planted="return protected_vector(how, vector, torch.zeros_like(start), noise)",
        checks=(_CLIENT_RUNS,),
    ),
    "clients send what they trained as it is": Lie(
        file="fedlora/federation/cohort.py",
        sound="return protected_vector(how, vector, start, noise)",
        planted="return vector",
        checks=(_CLIENT_RUNS,),
    ),
    "both sides add noise to clients' moves": Lie(
        file="fedlora/federation/cohort.py",
        sound="return protected_vector(how, vector, start, noise)",
        planted="return protected_vector(how, vector, start, noise) + 0.1 * torch.randn_like(start)",
        checks=(_CLIENT_RUNS,),
    ),
    "protected clients draw the same noise": Lie(
        file="fedlora/federation/cohort.py",
        sound='site.secret.numpy("client noise", site.client, entry.index)',
        planted='site.secret.numpy("client noise", entry.index)',
        checks=(_CLIENT_RUNS,),
    ),
    "each protected client has a sigma of its own": Lie(
        file="fedlora/federation/sites.py",
        sound="how = client_level_of(config, schedule)",
        planted="how = client_level_of(config, mine)",
        checks=(_CLIENT_RUNS,),
    ),
    "a protected client's number of records is told": Lie(
        file="fedlora/federation/sites.py",
        sound="public_size=None if declared or how else size,",
        planted="public_size=None if declared else size,",
        checks=(_CLIENT_RUNS,),
    ),
    "an owner's ledger counts noise that others add": Lie(
        file="fedlora/federation/site.py",
        sound="if self.secret.is_seeded or exposed else charge",
        planted="if self.secret.is_seeded else charge",
        checks=("tests/federation/test_client_level_policy.py",),
    ),
    "a silent client is charged by the step": Lie(
        file="fedlora/federation/server.py",
        sound='released = 1 if config.privacy.unit == "client" else past.num_steps',
        planted="released = past.num_steps",
        checks=(_CLIENT_RUNS,),
    ),
    "noise fills what a smaller rank does not have": Lie(
        file="fedlora/engine/training.py",
        sound="gradient = gradient * lesson.cut(job.active).to(gradient.device)",
        planted="pass",
        checks=(_TURNS, f"{_METHODS}::test_a_client_of_a_smaller_rank_has_nothing_beyond_it"),
    ),
    "each factor is clipped by itself": Lie(
        file="fedlora/engine/sums.py",
        sound="phase.add_clipped(totals, gradients if vectors is None else vectors(gradients, everyone), owners)",
        planted=(
            "offset = 0\n"
            "        for part in gradients if vectors is None else vectors(gradients, everyone):\n"
            "            phase.add_clipped(totals[:, offset : offset + part.shape[1]], [part], owners)\n"
            "            offset += part.shape[1]"
        ),
        checks=(f"{_TURNS}::test_a_record_is_clipped_over_all_that_the_step_trains",),
    ),
    "only the first factor gets noise": Lie(
        file="fedlora/engine/training.py",
        sound="    return [gradient.div_(training.expected_batch_size) for gradient in released]\n",
        planted=(
            "    released[0][sizes[0] :] = totals[0, sizes[0] :].float()\n"
            "    return [gradient.div_(training.expected_batch_size) for gradient in released]\n"
        ),
        checks=(f"{_TURNS}::test_every_coordinate_that_is_trained_gets_all_of_the_noise_and_no_other_any",),
    ),
    "all factors train in every step": Lie(
        file="fedlora/adapters/methods/method.py",
        sound='trains=lambda number: (("A" if number % 2 else "B",),)',
        planted='trains=_always("B", "A")',
        checks=(f"{_METHODS}::test_what_is_declared_leaves_and_nothing_else",),
    ),
    "the gradient is of all factors, whatever trains": Lie(
        file="fedlora/engine/expanded.py",
        sound="if turn is None or slot.part in turn.parts:",
        planted="if True:",
        checks=(_FACTORS, _TURNS),
    ),
    "Opacus takes all factors, whatever trains": Lie(
        file="fedlora/engine/opacus.py",
        sound="            if turn is None or slot.part in turn.parts\n",
        planted="",
        checks=(f"{_FACTORS}::test_opacus_equals_the_loop",),
    ),
    "every client has the first one's factor, though it trains its own": Lie(
        file="fedlora/engine/expanded.py",
        sound="rows[:1] if turn and slot.part in turn.common else rows",
        planted="rows[:1] if turn else rows",
        checks=(f"{_FACTORS}::test_expanded_equals_a_loop_over_single_records",),
    ),
    "a factor that waits moves all the same": Lie(
        file="fedlora/engine/training.py",
        sound="        optimizer.zero_grad()\n",
        planted="",
        checks=(f"{_TURNS}::test_what_a_step_does_not_train_does_not_move",),
    ),
    "fedex adds what it should take away": Lie(
        file="fedlora/federation/merging.py",
        sound="        mean -= layout.view(theta, b)",
        planted="        mean += layout.view(theta, b)",
        checks=(f"{_METHODS}::test_an_exact_methods_model_is_the_mean_of_the_clients_models",),
    ),
    "R has no rate of its own": Lie(
        file="fedlora/config/sections.py",
        sound='"R": self.rate_of_r',
        planted='"R": 1.0',
        checks=("tests/federation/test_outer_factors.py::test_r_moves_at_its_own_rate",),
    ),
    "fed_sb_svd forgets what its outer factors have learnt": Lie(
        file="fedlora/federation/merging.py",
        sound="layout.view(remade, core).copy_(values.diag())",
        planted="layout.view(remade, core).copy_(torch.eye(layout.rank))",
        checks=(f"{_METHODS}::test_an_exact_methods_model_is_the_mean_of_the_clients_models",),
    ),
    "flora forgets a client": Lie(
        file="fedlora/adapters/methods/products.py",
        sound="    return torch.cat(weighted, dim=1), torch.cat([inner.double() for inner in inners])\n",
        planted=(
            "    weighted[-1] = weighted[-1] * 0\n"
            "    return torch.cat(weighted, dim=1), torch.cat([inner.double() for inner in inners])\n"
        ),
        checks=("tests/adapters/test_products.py", f"{_METHODS}::test_every_clients_records_decide_the_result"),
    ),
    "a new basis changes the model": Lie(
        file="fedlora/adapters/methods/products.py",
        sound="(columns * values).float(), rows.float()",
        planted="(columns * values.sqrt()).float(), rows.float()",
        checks=(
            "tests/adapters/test_products.py",
            f"{_METHODS}::test_an_exact_methods_model_is_the_mean_of_the_clients_models",
        ),
    ),
    "what a site should keep is sent": Lie(
        file="fedlora/adapters/methods/method.py",
        sound='local=("B", "head"), exact=False',
        planted='local=("head",), exact=False',
        checks=(f"{_METHODS}::test_what_is_declared_leaves_and_nothing_else",),
    ),
    "what was added to the base stays after the run": Lie(
        file="fedlora/federation/workbench.py",
        sound="        self.folded.undo()\n",
        planted="",
        checks=(f"{_METHODS}::test_the_base_is_given_back_as_it_was",),
    ),
    "an audit looks for what the step did not train": Lie(
        file="fedlora/experiments/audit_training.py",
        sound="bench.backend.gradients(theta[None], batch, labels, owner, turn)",
        planted="bench.backend.gradients(theta[None], batch, labels, owner)",
        checks=("tests/experiments/test_audit.py::test_canaries_in_a_run_of_every_method",),
    ),
}


def copy_of_the_project(folder: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "results")
    for name in ("fedlora", "clients", "server", "simulations", "deploy", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run_checks(project: Path, checks: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", "not slow", *checks]
    return subprocess.run(
        [sys.executable, *command],
        cwd=project,
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
def test_the_checks_pass_on_the_sound_code(tmp_path: Path) -> None:
    checks = tuple(sorted({check for lie in LIES.values() for check in lie.checks}))
    ended = run_checks(copy_of_the_project(tmp_path), checks)
    assert ended.returncode == PASSED, ended.stdout[-3000:]
    assert "passed" in ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", LIES)
def test_a_planted_lie_is_caught(name: str, tmp_path: Path) -> None:
    lie = LIES[name]
    project = copy_of_the_project(tmp_path)
    plant(project, lie)
    ended = run_checks(project, lie.checks)
    assert ended.returncode == FAILED, f"{name} went unnoticed:\n{ended.stdout[-3000:]}"


@pytest.mark.parametrize("name", LIES)
def test_a_lie_still_says_what_it_replaces(name: str) -> None:
    lie = LIES[name]
    assert (ROOT / lie.file).read_text().count(lie.sound) == 1, "the code has moved on: rewrite this lie"


def plant(project: Path, lie: Lie) -> None:
    path = project / lie.file
    text = path.read_text()
    assert text.count(lie.sound) == 1
    path.write_text(text.replace(lie.sound, lie.planted))
