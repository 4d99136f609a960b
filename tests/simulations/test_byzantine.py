"""Only the hostile sites' vectors are corrupted, each as its attack says, and the table says what the runs found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.config import RunConfig
from fedlora.federation.messages import ClientFailure, ClientUpdate, RoundInstruction
from fedlora.privacy.phases import FINETUNE, PROTOTYPE
from simulations import byzantine
from simulations.byzantine import AGGREGATORS, ATTACKS, HOSTILE, SETTINGS, Case, HostileTransport, cases, table

START = torch.tensor([1.0, 2.0, 3.0])


class Honest:
    """Client k moves by k + 1 in every coordinate; client 5 is silent."""

    def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Any]:
        start = instruction.theta if instruction.phase == FINETUNE else 0.0
        return [
            ClientFailure(client, "internal")
            if client == 5
            else ClientUpdate(
                run_id="r",
                round_index=0,
                phase=instruction.phase,
                client=client,
                layout_digest="d",
                vector=start + torch.full((3,), client + 1.0),
                facts={},
            )
            for client in clients
        ]


def moves(attack: str, phase: str = FINETUNE) -> dict[int, torch.Tensor]:
    """What each client's vector says that it moved, by client."""
    transport = HostileTransport(
        inner=Honest(), hostile=HOSTILE, attack=ATTACKS[attack], generator=torch.Generator().manual_seed(0)
    )
    instruction = RoundInstruction(run_id="r", round_index=0, phase=phase, layout_digest="d", theta=START)
    replies = transport.exchange(instruction, tuple(range(10)))
    assert [reply.client for reply in replies] == list(range(10))
    assert isinstance(replies[5], ClientFailure)
    start = START if phase == FINETUNE else torch.zeros(3)
    return {reply.client: reply.vector - start for reply in replies if isinstance(reply, ClientUpdate)}


@pytest.mark.parametrize("phase", [FINETUNE, PROTOTYPE])
@pytest.mark.parametrize(
    ("attack", "sent"),
    [("flipped", [-4.0, -8.0]), ("flipped × 20", [-80.0, -160.0]), ("scaled × 100", [400.0, 800.0])],
)
def test_only_what_the_hostile_send_is_changed(attack: str, sent: list[float], phase: str) -> None:
    found = moves(attack, phase)
    for client, move in found.items():
        wanted = sent[HOSTILE.index(client)] if client in HOSTILE else client + 1.0
        assert torch.allclose(move, torch.full((3,), wanted))


def test_attacks_without_a_direction_of_their_own() -> None:
    assert all(moves("NaN")[client].isnan().all() for client in HOSTILE)
    lengths = [float(moves("random × 20")[client].norm()) for client in HOSTILE]
    assert lengths == pytest.approx([20 * 4 * 3**0.5, 20 * 8 * 3**0.5], rel=1e-5)
    honest = torch.tensor([client + 1.0 for client in range(10) if client != 5])
    wanted = float(honest.mean() - 1.5 * honest.std())
    assert all(torch.allclose(moves("colluding")[client], torch.full((3,), wanted)) for client in HOSTILE)


def test_every_rule_meets_every_attack_in_a_run_that_the_configuration_allows() -> None:
    asked = cases([0])
    assert len(set(asked)) == len(asked) == len(AGGREGATORS) * (1 + 2 * len(ATTACKS))
    for aggregator in AGGREGATORS:
        config = RunConfig.from_mapping(SETTINGS, [f"federation.aggregator={aggregator}"])
        assert max(HOSTILE) < config.federation.clients
        assert config.federation.assumed_attackers == len(HOSTILE)


def test_the_table_is_the_mean_over_seeds_and_shows_what_is_missing() -> None:
    found: dict[Case, float | None] = {Case("none", 0, "mean", seed): 0.5 + seed / 10 for seed in range(3)}
    found |= {Case("flipped", 2, "median", 0): 0.7, Case("flipped", 2, "median", 1): None}
    lines = table(found).splitlines()
    assert "| none | 0 | 0.600 | – | – | – | – |" in lines
    assert "| flipped | 2 | – | – | – | – | – |" in lines


def test_what_other_code_found_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byzantine, "RESULTS", tmp_path)
    found: dict[Case, float | None] = {Case("flipped", 1, "mean", 0): 0.5, Case("NaN", 2, "median", 0): None}
    byzantine.write(found)
    assert byzantine.read() == found
    monkeypatch.setattr(byzantine, "code_digest", lambda: "another")
    assert byzantine.read() == {}
