"""From a client's vector to what it sends, and from what was sent to the mean, around where a round began."""

from __future__ import annotations

import pytest
import torch

from fedlora.config import RunConfig
from fedlora.federation.messages import ClientUpdate
from fedlora.federation.protection import client_level_of, protected_mean, protected_vector
from fedlora.federation.schedule import make_schedule, planned_steps
from fedlora.privacy.client_level import ClientLevel, ServerNoise, SharedNoise
from fedlora.privacy.noise import HostNoise
from fedlora.privacy.phases import FINETUNE
from fedlora.privacy.plan import make_plan
from fedlora.randomness import SecretRoot

START = torch.linspace(-9.0, 9.0, 50)


def secret(*path: str | int) -> HostNoise:
    return HostNoise(SecretRoot.seeded(0).numpy(*path))


def update(client: int, vector: torch.Tensor) -> ClientUpdate:
    return ClientUpdate(
        run_id="run", round_index=0, phase=FINETUNE, client=client, layout_digest="", vector=vector, facts={}
    )


@pytest.mark.parametrize("kind", [ServerNoise, SharedNoise])
def test_vectors_are_moves_around_the_start(kind: type[ClientLevel]) -> None:
    """Clipped is how far a client moved, not where it is; the order of arrival decides no bit."""
    how = kind(clip_norm=0.5, noise_multiplier=0.0, cohort_size=4, steps_per_round=2)
    moved = [START + 0.01 * client for client in (1, 2, 3, 4)]  # as long as 0.07 to 0.28
    sent = [protected_vector(how, vector, START, secret()) for vector in moved]
    for vector, own in zip(moved, sent, strict=True):
        assert (own.dtype, own.shape) == (torch.float32, START.shape)
        assert torch.allclose(own, vector, atol=2e-6)
    updates = [update(client, vector) for client, vector in enumerate(sent)]
    mean = protected_mean(how, updates, START, secret("server"))
    assert torch.allclose(mean, START + 0.025, atol=2e-6)
    assert torch.equal(mean, protected_mean(how, updates[::-1], START, secret("server")))
    far = protected_vector(how, START + 100.0, START, secret())
    assert float((far - START).norm()) == pytest.approx(0.5, rel=1e-4)


def test_one_sigma_is_chosen_for_the_client_that_is_asked_most_often() -> None:
    settings = ("federation.clients=12", "federation.participation=0.25", "federation.rounds=9")
    config = RunConfig().with_overrides("privacy.unit=client", "model.head=frozen", *settings)
    schedule = make_schedule(config)
    how = client_level_of(config, schedule)
    assert how is not None
    rounds = [sum(client in entry.clients for entry in schedule) for client in range(12)]
    assert len(set(rounds)) > 1, "or this would say nothing"
    spent = []
    for client in range(12):
        steps = planned_steps(schedule, client)
        plan = make_plan(config, num_examples=500, num_steps=steps, client=client, client_level=how)
        assert plan[FINETUNE].charge().num_steps == rounds[client]
        spent.append(plan.epsilon())
    assert 0.98 * 6 <= max(spent) <= 6
    assert spent.index(max(spent)) == rounds.index(max(rounds))


def test_where_records_are_protected_there_is_no_such_thing() -> None:
    assert client_level_of(RunConfig(), make_schedule(RunConfig())) is None
