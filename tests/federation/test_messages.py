from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fedlora.adapters.slots import AdapterLayout
from fedlora.errors import ProtocolError
from fedlora.federation.messages import ClientUpdate, RoundInstruction, check_update

LAYOUT = AdapterLayout.build({"m/B": (4, 2)}, method="ffa", rank=2, alpha=2.0)
INSTRUCTION = RoundInstruction(
    run_id="run", round_index=3, phase="finetune", layout_digest=LAYOUT.digest, theta=torch.zeros(8)
)
UPDATE = ClientUpdate(
    run_id="run",
    round_index=3,
    phase="finetune",
    client=1,
    layout_digest=LAYOUT.digest,
    vector=torch.ones(8),
    facts={
        "client": 1,
        "num_examples": 80,
        "noise_seeded": False,
        "unit": "record",
        "relation": "add/remove",
        "delta": 1e-5,
        "epsilon": 1.0,
        "accountant": "pld",
        "sampling_probability": 0.1,
        "noise_multiplier": 1.1,
        "effective_noise_multiplier": 1.1,
        "num_steps": 4,
        "mechanism": "gaussian",
        "clip_norm": 1.0,
        "clipping": "flat",
        "phases": [
            {
                "name": "finetune",
                "mechanism": "gaussian",
                "sampling_probability": 0.1,
                "effective_noise_multiplier": 1.1,
                "sensitivity": 1.0,
                "num_steps": 4,
            }
        ],
    },
)


def with_number(value: float) -> torch.Tensor:
    vector = torch.ones(8)
    vector[5] = value
    return vector


def test_an_update_that_answers_the_instruction_passes() -> None:
    check_update(UPDATE, INSTRUCTION, LAYOUT)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"run_id": "other"}, "run"),
        ({"round_index": 2}, "round"),
        ({"phase": "prototype"}, "phase"),
        ({"layout_digest": "0" * 64}, "layout digest"),
        ({"vector": torch.ones(7)}, "shape"),
        ({"vector": torch.ones(1, 8)}, "shape"),
        ({"vector": torch.tensor(1.0)}, "shape"),
        ({"vector": torch.ones(8, dtype=torch.float64)}, "dtype"),
        ({"vector": torch.ones(8, dtype=torch.int64)}, "dtype"),
        ({"vector": torch.ones(8, dtype=torch.bfloat16)}, "dtype"),
        ({"vector": with_number(torch.nan)}, "not finite"),
        ({"vector": with_number(torch.inf)}, "not finite"),
        ({"vector": with_number(-torch.inf)}, "not finite"),
    ],
)
def test_anything_else_is_refused_by_name_of_client_and_fault(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ProtocolError, match=f"client 1 has.*{named}") as caught:
        check_update(dataclasses.replace(UPDATE, **change), INSTRUCTION, LAYOUT)
    assert "tensor(" not in str(caught.value), "no numbers of a client in a message"


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"epsilon": 1.0},
        UPDATE.facts | {"loss": 0.5},
        {key: value for key, value in UPDATE.facts.items() if key != "delta"},
        UPDATE.facts | {"num_steps": True},
        UPDATE.facts | {"phases": [{"name": "finetune"}]},
    ],
    ids=["none", "too few", "a loss", "no delta", "truth for a count", "a phase without its facts"],
)
def test_facts_other_than_those_that_may_leave_are_refused_without_their_values(facts: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="it is not used") as caught:
        check_update(dataclasses.replace(UPDATE, facts=facts), INSTRUCTION, LAYOUT)
    assert "0.5" not in str(caught.value)


def test_the_number_of_records_may_stay_at_home() -> None:
    facts = {key: value for key, value in UPDATE.facts.items() if key != "num_examples"}
    check_update(dataclasses.replace(UPDATE, facts=facts), INSTRUCTION, LAYOUT)


def test_bytes_count_every_tensor() -> None:
    assert INSTRUCTION.num_bytes == 32
    head = (torch.zeros(2, 6), torch.zeros(2))
    assert dataclasses.replace(INSTRUCTION, head=head).num_bytes == 32 + 48 + 8
    assert dataclasses.replace(INSTRUCTION, head=head, folded=torch.zeros(5)).num_bytes == 32 + 48 + 8 + 20


def test_whatever_an_instruction_says_is_in_its_digest() -> None:
    said = [
        INSTRUCTION,
        dataclasses.replace(INSTRUCTION, theta=torch.ones(8)),
        dataclasses.replace(INSTRUCTION, head=(torch.zeros(2, 6), torch.zeros(2))),
        dataclasses.replace(INSTRUCTION, mask=(True,)),
        dataclasses.replace(INSTRUCTION, folded=torch.zeros(5)),
        dataclasses.replace(INSTRUCTION, folded=torch.tensor([0.0, 0, 0, 0, 1])),
        dataclasses.replace(INSTRUCTION, head=(torch.zeros(2, 6), torch.zeros(2)), folded=torch.zeros(5)),
    ]
    assert len({instruction.digest for instruction in said}) == len(said)
    assert dataclasses.replace(said[4], folded=torch.zeros(5)).digest == said[4].digest


def test_messages_are_immutable() -> None:
    for message in (INSTRUCTION, UPDATE):
        with pytest.raises(dataclasses.FrozenInstanceError):
            message.round_index = 4  # type: ignore[misc]
