"""K sites in one call are K deployed sites, and an instruction that does not fit costs nobody anything."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2

from fedlora.engine import training
from fedlora.engine.batching import Shapes
from fedlora.engine.prototypes import class_sums
from fedlora.errors import AdapterError, ProtocolError
from fedlora.federation import cohort
from fedlora.privacy.sampling import PoissonSampler
from fedlora.randomness import SecretRoot

EVERYONE = (0, 1, 2)


@pytest.mark.parametrize("head", ["prototype", "trained"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_cohort_gives_what_its_sites_give_alone(make_federation: Any, head: str, optimizer: str) -> None:
    options = (f"model.head={head}", f"training.optimizer={optimizer}", "training.learning_rate=0.05")
    together, apart = make_federation(*options), make_federation(*options)
    entries = together.workbench.schedule[:3]
    for entry in entries:
        fused = together.exchange(together.instruction(entry), EVERYONE)
        alone = [apart.exchange(apart.instruction(entry), (client,))[0] for client in (2, 0, 1)]
        for update in fused:
            other = next(one for one in alone if one.client == update.client)
            assert torch.allclose(update.vector, other.vector, atol=1e-5, rtol=1e-5)
            assert update.facts == other.facts


@pytest.mark.parametrize("number_of_rounds", [1, 2])
def test_every_round_and_client_has_noise_of_its_own(make_federation: Any, number_of_rounds: int) -> None:
    federation = make_federation("model.head=prototype")  # its head is unset: no gradient, all is noise
    vectors = []
    for entry in federation.workbench.schedule[1 : 1 + number_of_rounds]:
        vectors += [update.vector for update in federation.exchange(federation.instruction(entry), EVERYONE)]
    correlation = torch.corrcoef(torch.stack(vectors)) - torch.eye(len(vectors))
    assert correlation.abs().max() < 5.5 / federation.workbench.layout.size**0.5  # false alarms below 1e-6


def test_batches_are_drawn_anew_for_every_client_step_and_round(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records met again in a disjoint pair of batches: exact two-sided binomial bounds, false alarms 1e-6 each."""
    drawn: list[np.ndarray] = []
    genuine = PoissonSampler.draw

    def spy(self: PoissonSampler, num_examples: int, generator: np.random.Generator) -> np.ndarray:
        included = np.zeros(num_examples, dtype=bool)
        positions = genuine(self, num_examples, generator)
        included[positions] = True
        drawn.append(included)
        return positions

    monkeypatch.setattr(PoissonSampler, "draw", spy)
    federation = make_federation("federation.rounds=20", "training.learning_rate=0.001")
    federation.server().run(federation.start())
    batches = np.array(drawn).reshape(20, 2, 3, 80)  # rounds, steps, clients, records
    pairs = {
        "rounds": (batches[::2], batches[1::2]),
        "steps": (batches[:, 0], batches[:, 1]),
        "clients 0 and 1": (batches[:, :, 0], batches[:, :, 1]),
        "clients 1 and 2": (batches[:, :, 1], batches[:, :, 2]),
    }
    probability = 16 / 80
    for what, (one, other) in pairs.items():
        low, high = binom.ppf(5e-7, one.size, probability**2), binom.isf(5e-7, one.size, probability**2)
        assert low <= (one & other).sum() <= high, what
    low, high = binom.ppf(5e-7, batches.size, probability), binom.isf(5e-7, batches.size, probability)
    assert low <= batches.sum() <= high


def test_the_prototype_release_of_a_site_has_noise_of_sigma_times_root_two(make_federation: Any) -> None:
    """Sum of squares over the variance is chi-square: false alarms 1e-6; 0.9 σ and 1.1 σ are rejected."""
    federation = make_federation("model.head=prototype")
    entry, bench = federation.workbench.schedule[0], federation.workbench
    layout, noise = bench.payload_layout(entry.phase), []
    exact = [
        class_sums(bench.classifier, federation.dataset, site.records, layout, Shapes(4096))
        for site in federation.sites
    ]
    for repetition in range(100):
        for site in federation.sites:
            site.secret, site.next_round, site.run_id = SecretRoot.seeded(repetition), 0, None
        updates = federation.exchange(federation.instruction(entry, run_id=f"run-{repetition}"), EVERYONE)
        noise += [update.vector - total for update, total in zip(updates, exact, strict=True)]
    values = torch.stack(noise).double()
    low, high = chi2.ppf(5e-7, values.numel()), chi2.isf(5e-7, values.numel())
    for scale, fits in ((1.0, True), (0.9, False), (1.1, False)):
        assert (low < float(values.square().sum()) / (scale * 20.0 * 2**0.5) ** 2 < high) == fits


def test_without_seeded_noise_two_runs_differ(make_federation: Any) -> None:
    first, second = (make_federation("privacy.seeded_noise=false") for _ in range(2))
    entry = first.workbench.schedule[0]
    results = [federation.exchange(federation.instruction(entry), EVERYONE) for federation in (first, second)]
    for one, other in zip(*results, strict=True):
        assert not torch.allclose(one.vector, other.vector, atol=1e-3)
    roots = {site.secret.root for federation in (first, second) for site in federation.sites}
    assert len(roots) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"layout_digest": "0" * 64},
        {"theta": torch.zeros(3)},
        {"theta": torch.zeros(1, 256)},
        {"theta": torch.zeros(256, dtype=torch.float64)},
        {"theta": torch.full((256,), torch.nan)},
        {"theta": torch.cat([torch.zeros(255), torch.tensor([torch.inf])])},
    ],
)
def test_an_instruction_that_does_not_fit_costs_nobody_anything(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    federation = make_federation()
    assert federation.workbench.layout.size == 256
    monkeypatch.setattr(cohort, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ProtocolError):
        federation.exchange(federation.instruction(federation.workbench.schedule[0], **change), EVERYONE)
    assert [site.next_round for site in federation.sites] == [0, 0, 0]


@pytest.mark.parametrize(
    ("head", "sent", "error"),
    [
        ("frozen", (torch.zeros(2, 16), torch.zeros(2)), ProtocolError),
        ("prototype", (torch.zeros(2, 5), torch.zeros(2)), AdapterError),
        ("prototype", (torch.zeros(3, 16), torch.zeros(3)), AdapterError),
        ("prototype", (torch.full((2, 16), -1001.0), torch.zeros(2)), ProtocolError),
        ("prototype", (torch.zeros(2, 16), torch.full((2,), 1e30)), ProtocolError),
        ("prototype", (torch.zeros(2, 16), torch.full((2,), torch.nan)), ProtocolError),
    ],
    ids=["none is due", "another width", "other classes", "huge weights", "huge biases", "no number"],
)
def test_a_head_that_does_not_fit_costs_nobody_anything(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch, head: str, sent: Any, error: type[Exception]
) -> None:
    federation = make_federation(f"model.head={head}", "model.pooling=mean")
    before = [tensor.clone() for tensor in federation.workbench.classifier.head.parameters()]
    monkeypatch.setattr(cohort, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(error):
        federation.exchange(federation.instruction(federation.workbench.schedule[-1], head=sent), EVERYONE)
    assert [site.next_round for site in federation.sites] == [0, 0, 0]
    assert federation.ledger.entries() == []
    assert all(map(torch.equal, before, federation.workbench.classifier.head.parameters()))


def test_what_is_not_finite_does_not_leave(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = make_federation()
    genuine = training.train

    def diverged(*arguments: Any, **settings: Any) -> list[Any]:
        rows = genuine(*arguments, **settings)
        rows[1].theta[0] = torch.inf
        return rows

    monkeypatch.setattr(cohort, "train", diverged)
    with pytest.raises(ProtocolError, match="client 1 has numbers that are not finite"):
        federation.exchange(federation.instruction(federation.workbench.schedule[0]), EVERYONE)
    assert [site.next_round for site in federation.sites] == [1, 1, 1], "it was computed, so it counts"


def test_an_update_carries_no_other_clients_row(make_federation: Any) -> None:
    """A view into the cohort's common tensor would take all rows along when it is pickled."""
    federation = make_federation()
    for update in federation.exchange(federation.instruction(federation.workbench.schedule[0]), EVERYONE):
        assert update.vector.untyped_storage().nbytes() == update.vector.nbytes
        assert len(pickle.dumps(update.vector)) < update.vector.nbytes + 1000


@pytest.mark.parametrize("keep", [True, False])
def test_optimizer_state_stays_at_its_site_where_asked(make_federation: Any, keep: bool) -> None:
    federation = make_federation("training.optimizer=adam", f"training.keep_state={str(keep).lower()}")
    for entry in federation.workbench.schedule[:2]:
        federation.exchange(federation.instruction(entry), EVERYONE)
    for site in federation.sites:
        if keep:
            assert site.optimizer_state["B/step"] == 4
        else:
            assert site.optimizer_state is None


def test_a_whole_run_leaves_global_random_state_untouched(
    make_federation: Any, untouched_global_generator: None
) -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    for overrides in (["model.head=prototype"], ["model.head=trained", "privacy.seeded_noise=false"]):
        federation = make_federation(*overrides)
        federation.server().run(federation.start())
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_a_theta_far_outside_what_training_reaches_is_refused_and_spends_nothing(make_federation: Any) -> None:
    """With huge values a hostile server could make one record's padding show in another's gradient."""
    federation = make_federation()
    instruction = federation.instruction(federation.workbench.schedule[0])
    far = dataclasses.replace(instruction, theta=torch.full_like(instruction.theta, 11.0))
    with pytest.raises(ProtocolError, match="beyond ±10"):
        federation.exchange(far, EVERYONE)
    assert federation.exchange(instruction, EVERYONE)
