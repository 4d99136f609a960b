"""A search through real cohorts: which records a site uses for what, and how much noise leaves it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from fedlora.federation.site import Site
from fedlora.federation.sites import TrainingData, make_sites
from fedlora.privacy.ledger import DataSet, Ledger
from fedlora.privacy.phases import ALIGNMENT, BILEVEL
from fedlora.privacy.sampling import PoissonSampler
from tests.engine.test_noise import Sabotaged, are_uncorrelated, has_std, is_normal

SEARCH = ("federation.rounds=5", "adapter.warmup_rounds=2", "adapter.search_rounds=2")
EVALUATED = "federation.private_evaluation=true"
SILENT = ("model.head=prototype", "privacy.accountant=rdp")  # without a head yet, every gradient is exactly zero


# ---------------------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize("evaluated", [True, False])
def test_halves_are_disjoint_and_together_all_that_is_trained_on(make_federation: Any, evaluated: bool) -> None:
    federation = make_federation(*SEARCH, "adapter.select=bilevel", *([EVALUATED] if evaluated else []))
    for site in federation.sites:
        weights, gates, heldout = (
            set(part.tolist()) for part in (site.weight_records, site.gate_records, site.heldout)
        )
        assert weights
        assert gates
        assert bool(heldout) == evaluated
        assert not weights & gates
        assert weights | gates == set(site.records.tolist())
        assert weights | gates | heldout == set(federation.data.parts[site.client].tolist())
        assert not heldout & (weights | gates), "a held-out record teaches neither"


def test_only_bilevel_divides_records(make_federation: Any) -> None:
    for select in ("none", "warmup", "alignment"):
        for site in make_federation(*SEARCH, f"adapter.select={select}").sites:
            assert site.gate_records.tolist() == []
            assert np.array_equal(site.weight_records, np.sort(site.records))


def halves(sites: list[Site], data: TrainingData) -> dict[tuple[str, int], set[str]]:
    """By text and label of each record, the half that it is in; twins share one."""
    found: dict[tuple[str, int], set[str]] = {}
    for site in sites:
        for name, part in (("weights", site.weight_records), ("gates", site.gate_records), ("heldout", site.heldout)):
            for record in part:
                key = (data.records.texts[0][record], int(data.records.labels[record]))
                found.setdefault(key, set()).add(name)
    return found


def test_one_record_less_moves_no_other_record_to_the_other_half(make_federation: Any) -> None:
    """Nor does another order of a site's records."""
    federation = make_federation(*SEARCH, "adapter.select=bilevel", EVALUATED)
    before = halves(federation.sites, federation.data)
    assert all(len(sides) == 1 for sides in before.values())
    draw = np.random.default_rng(0)
    for client in range(3):
        parts = {key: draw.permutation(part) for key, part in federation.data.parts.items()}
        parts[client] = parts[client][1:]
        fewer = TrainingData(records=federation.data.records, parts=parts)
        after = halves(make_sites(federation.config, fewer, federation.workbench.schedule), fewer)
        assert all(before[key] == sides for key, sides in after.items())


def test_each_half_goes_where_it_belongs(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cohort hands to the engine; that the engine keeps them apart is shown in tests/engine."""
    federation = make_federation(*SEARCH, "adapter.select=bilevel", EVALUATED)
    handed: list[Any] = []

    def instead(backend: Any, dataset: Any, jobs: Any, theta: Tensor, logits: Tensor, *rest: Any, **how: Any) -> Any:
        handed.extend(jobs)
        return [torch.cat([theta, logits])] * len(jobs)

    monkeypatch.setattr("fedlora.federation.cohort.search", instead)
    entry = next(entry for entry in federation.workbench.schedule if entry.phase == BILEVEL)
    federation.exchange(bilevel_instruction(federation, entry), entry.clients)
    for job, site in zip(handed, federation.sites, strict=True):
        assert np.array_equal(job.weight_records, site.weight_records)
        assert np.array_equal(job.gate_records, site.gate_records)
        assert job.phase is site.plan[BILEVEL]


@pytest.mark.parametrize("evaluated", [True, False])
def test_scores_are_taken_on_as_many_records_as_are_charged(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch, evaluated: bool
) -> None:
    """Each training record by a coin of its own; exact two-sided binomial bounds, false alarms 1e-6; none held out."""
    settings = ("adapter.select=alignment", "adapter.alignment_records=24", "privacy.accountant=rdp")
    federation = make_federation(*SEARCH, *settings, *([EVALUATED] if evaluated else []))
    assert federation.sites[0].plan[ALIGNMENT].charge().sampling_probability == 24 / 80
    first, drawn = federation.sites[0], []

    def instead(backend: Any, dataset: Any, records: Any, **how: Any) -> Tensor:
        drawn.extend(records)
        return torch.zeros(1, 12, dtype=torch.float64)

    monkeypatch.setattr("fedlora.federation.cohort.alignment_sums", instead)
    sites = [dataclasses.replace(site, records=first.records) for site in many_sites(federation, 60)]
    released(federation, sites, ALIGNMENT)
    counts = np.array([len(part) for part in drawn])
    assert all(set(part.tolist()) <= set(first.records.tolist()) for part in drawn)
    trials = len(sites) * len(first.records)
    assert binom.ppf(5e-7, trials, 0.3) <= counts.sum() <= binom.isf(5e-7, trials, 0.3)
    assert len(set(counts.tolist())) > 3, "coins, not a batch of fixed size"
    assert len({tuple(part.tolist()) for part in drawn}) == len(sites), "each site has its own"


# ---------------------------------------------------------------------------------------------------------- noise


def bilevel_instruction(federation: Any, entry: Any) -> Any:
    start = torch.zeros(federation.workbench.global_size(BILEVEL))
    return federation.instruction(entry, theta=start)


def many_sites(federation: Any, count: int) -> list[Site]:
    """Copies of the first site with few records, each with its own streams and its own budget."""
    first = federation.sites[0]
    return [
        dataclasses.replace(
            first,
            client=client,
            records=first.records[:2],
            gate_records=first.records[1:2],
            data_set=DataSet(fingerprint=f"client {client}", name=f"client {client}"),
        )
        for client in range(count)
    ]


def released(federation: Any, sites: list[Site], phase: str, number: int = 0) -> Tensor:
    """[K, numbers]: what `sites` send in the phase's round `number`."""
    entry = [entry for entry in federation.workbench.schedule if entry.phase == phase][number]
    federation.sites, federation.ledger = sites, Ledger.in_memory()
    if phase == BILEVEL:
        instruction = bilevel_instruction(federation, entry)
    else:
        draw = torch.Generator().manual_seed(number)
        theta = torch.randn(federation.workbench.layout.size, generator=draw)
        instruction = federation.instruction(entry, theta=theta)
    replies = federation.exchange(instruction, tuple(site.client for site in sites))
    return torch.stack([reply.vector for reply in replies])


def test_the_scores_that_leave_have_the_noise_of_the_plan(make_federation: Any) -> None:
    """Sensitivity 1 times privacy.alignment_noise_multiplier, ±10 % red; of another stream at every site."""
    settings = (*SEARCH, *SILENT, "adapter.select=alignment", "privacy.alignment_noise_multiplier=15")
    federation = make_federation(*settings)
    scores = released(federation, many_sites(federation, 400), ALIGNMENT)
    assert scores.shape == (400, 12)
    assert has_std(scores, 15.0)
    assert is_normal(scores, 15.0)
    assert not has_std(scores, 0.9 * 15)
    assert not has_std(scores, 1.1 * 15)
    assert are_uncorrelated(scores.T)
    assert are_uncorrelated(scores.reshape(4, -1))
    assert len({tuple(row.tolist()) for row in scores}) == 400


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_scores_with_less_or_more_noise_would_be_caught(make_federation: Any, factor: float) -> None:
    federation = make_federation(*SEARCH, *SILENT, "adapter.select=alignment")
    sites = many_sites(federation, 400)
    plan = sites[0].plan
    lying = dataclasses.replace(plan[ALIGNMENT], mechanism=Sabotaged(20.0, factor))
    phases = tuple(lying if phase.name == ALIGNMENT else phase for phase in plan.phases)
    sites = [dataclasses.replace(site, plan=dataclasses.replace(plan, phases=phases)) for site in sites]
    scores = released(federation, sites, ALIGNMENT)
    assert not has_std(scores, 20.0)
    assert has_std(scores, factor * 20.0)


def test_scores_are_those_of_all_a_sites_training_records_under_its_noise(make_federation: Any) -> None:
    """A seeded run less its noise, which anyone can repeat, is the sum of its records' scores: at most one each."""
    settings = (*SEARCH, "adapter.select=alignment", "model.head=frozen")
    noisy, exact = make_federation(*settings), make_federation(*settings, "privacy.epsilon=inf")
    found = [released(federation, federation.sites, ALIGNMENT) for federation in (noisy, exact)]
    assert (found[1].norm(dim=1) <= torch.tensor([float(len(site.records)) for site in noisy.sites])).all()
    assert (found[1].norm(dim=1) > 1).all()
    entry = next(entry for entry in noisy.workbench.schedule if entry.phase == ALIGNMENT)
    for site, row in zip(noisy.sites, found[0] - found[1], strict=True):
        stream = site.secret.numpy("noise", site.client, entry.index).standard_normal(12)
        assert torch.allclose(row, 20.0 * torch.from_numpy(stream).float(), atol=1e-4)


def test_weights_and_gates_that_leave_have_the_noise_of_the_plan(make_federation: Any) -> None:
    """A round of two steps at known rates, without gradients; other noise at every site and in every round."""
    federation = make_federation(*SEARCH, *SILENT, "adapter.select=bilevel", "adapter.gate_learning_rate=0.7")
    size, batch = federation.workbench.layout.size, 16
    rates = [entry.learning_rate for entry in federation.workbench.schedule if entry.phase == BILEVEL]
    sigma = federation.sites[0].plan[BILEVEL].charge().noise_multiplier
    rounds = [released(federation, many_sites(federation, 400), BILEVEL, number) for number in range(2)]
    for rate, moved in zip(rates, rounds, strict=True):
        for part, wanted in (
            (moved[:, :size], rate * math.sqrt(2) * sigma * 1.0 / batch),
            (moved[:, size:], 0.7 * math.sqrt(2) * sigma * 1.0 / batch),
        ):
            assert has_std(part, wanted)
            assert is_normal(part, wanted)
            assert not has_std(part, 0.9 * wanted)
            assert not has_std(part, 1.1 * wanted)
    gates = torch.stack([moved[:, size:] for moved in rounds])
    assert are_uncorrelated(gates.flatten(1)), "rounds"
    assert are_uncorrelated(gates.transpose(0, 1).reshape(4, -1)), "sites"
    for moved in rounds:
        assert are_uncorrelated(torch.stack([moved[:, :12].flatten(), moved[:, size:].flatten()])), "weights and gates"
        assert are_uncorrelated(torch.stack([moved[:, size - 12 : size].flatten(), moved[:, size:].flatten()]))


def test_sites_of_different_size_search_at_their_own_rates(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a site's records are sampled at 2 B / n of that site, whoever is first in the call."""
    drawn: list[float] = []
    federation = make_federation(
        *SEARCH, "adapter.select=bilevel", "data.partition=dirichlet", "data.dirichlet_alpha=3", "run.seed=1"
    )
    draw = PoissonSampler.draw

    def noted(self: PoissonSampler, num_examples: int, generator: np.random.Generator) -> np.ndarray:
        drawn.append(self.sampling_probability)
        return draw(self, num_examples, generator)

    monkeypatch.setattr(PoissonSampler, "draw", noted)
    wanted = [2 * 16 / len(federation.data.parts[site.client]) for site in federation.sites]
    assert len(set(wanted)) == 3
    released(federation, federation.sites, BILEVEL)
    assert drawn == 4 * wanted, "two steps of weights and two of gates"
