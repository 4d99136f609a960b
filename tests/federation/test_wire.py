"""What crosses a process border arrives as it was, or is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from fedlora.config import RunConfig
from fedlora.errors import ProtocolError
from fedlora.federation import wire
from fedlora.federation.memory import recall, remember
from fedlora.federation.messages import ClientUpdate, RoundInstruction
from fedlora.federation.quantisation import Coded
from fedlora.federation.schedule import make_schedule, planned_steps
from fedlora.federation.site import Site
from fedlora.privacy.ledger import DataSet
from fedlora.privacy.plan import make_plan
from fedlora.randomness import SecretRoot

CONFIG = RunConfig.from_mapping({}, ["federation.rounds=2", "privacy.accountant=rdp", "federation.local_steps=2"])
HEAD = (torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([0.25, -0.25]))


def make_site(config: RunConfig = CONFIG, client: int = 1) -> Site:
    schedule = make_schedule(config)
    plan = make_plan(config, num_examples=2000, num_steps=planned_steps(schedule, client), client=client)
    return Site(
        client=client,
        records=np.arange(2000),
        public_size=2000,
        plan=plan,
        schedule=schedule,
        secret=SecretRoot.from_os(),
        data_set=DataSet(fingerprint="f1" * 32, name="ward"),
    )


def make_update(config: RunConfig = CONFIG) -> ClientUpdate:
    site = make_site(config)
    return ClientUpdate(
        run_id="0" * 32,
        round_index=1,
        phase="finetune",
        client=site.client,
        layout_digest="a" * 64,
        vector=torch.tensor([0.1, -2.5, 1e-30]),
        facts=site.facts(site.schedule[1]),
    )


INSTRUCTION = RoundInstruction(
    run_id="0" * 32, round_index=3, phase="finetune", layout_digest="a" * 64, theta=torch.tensor([1.0, 2.0]), head=HEAD
)


@pytest.mark.parametrize("head", [None, HEAD])
def test_an_instruction_arrives_as_it_was(head: Any) -> None:
    sent = replace(INSTRUCTION, head=head)
    got = wire.decode_instruction(wire.encode_instruction(sent))
    assert torch.equal(got.theta, sent.theta)
    assert (got.head is None) == (head is None)
    for ours, theirs in zip(got.head or (), head or (), strict=True):
        assert torch.equal(ours, theirs)
    assert replace(got, theta=sent.theta, head=head) == sent


@pytest.mark.parametrize("epsilon", ["6.0", "inf"])
def test_an_update_of_a_real_site_arrives_as_it_was(epsilon: str) -> None:
    sent = make_update(CONFIG.with_overrides(f"privacy.epsilon={epsilon}"))
    got = wire.decode_update(wire.encode_update(sent))
    assert torch.equal(got.vector, sent.vector)
    assert got.facts == sent.facts
    assert math.isinf(got.facts["epsilon"]) == (epsilon == "inf")
    assert replace(got, vector=sent.vector) == sent


def test_neither_fingerprint_nor_name_of_the_records_leaves() -> None:
    sent = wire.encode_update(make_update())
    assert b"f1f1" not in sent
    assert b"ward" not in sent


def test_a_fact_that_is_not_on_the_list_does_not_leave() -> None:
    update = make_update()
    with pytest.raises(ProtocolError, match="other fields"):
        wire.encode_update(replace(update, facts=update.facts | {"loss": 0.3}))


@pytest.mark.parametrize("vector", [torch.tensor([math.nan]), torch.ones(2, 2), torch.ones(2, dtype=torch.float64)])
def test_a_vector_that_does_not_fit_does_not_leave(vector: torch.Tensor) -> None:
    with pytest.raises(ProtocolError, match="vector"):
        wire.encode_update(replace(make_update(), vector=vector))


def forged(
    change: Callable[[dict[str, Any]], object] = lambda fields: None,
    *,
    vector: torch.Tensor | None = None,
    **metadata: str,
) -> bytes:
    """An update as someone may write it who does not use our encoder."""
    blob = wire.encode_update(make_update())
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    fields = json.loads(header["__metadata__"]["fields"])
    change(fields)
    written = {"format": wire.FORMAT, "kind": "update", "fields": json.dumps(fields)} | metadata
    return save({"vector": torch.ones(3) if vector is None else vector}, metadata=written)


def test_the_forger_can_forge() -> None:
    assert wire.decode_update(forged()).client == 1


HOSTILE = {
    "empty": b"",
    "noise": b"\x10\0\0\0\0\0\0\0 no header at all",
    "huge header": (2**40).to_bytes(8, "little") + b"{}",
    "header over the limit": forged(fields="x" * wire.MAX_HEADER_BYTES),
    "cut off": forged()[:-4],
    "longer": forged() + b"1234",
    "another format": forged(format="fedlora-wire-0"),
    "another kind": forged(kind="instruction"),
    "no JSON": forged(fields="{"),
    "deep JSON": forged(fields="[" * 20_000),
    "a list": forged(fields="[]"),
    "a fact more": forged(lambda fields: fields["facts"].update(loss=0.5)),
    "a fact less": forged(lambda fields: fields["facts"].pop("epsilon")),
    "no facts": forged(lambda fields: fields.pop("facts")),
    "NaN": forged(lambda fields: fields["facts"].update(epsilon=math.nan)),
    "Infinity": forged(lambda fields: fields["facts"].update(epsilon=math.inf)),
    "negative ε": forged(lambda fields: fields["facts"].update(epsilon=-1.0)),
    "infinite δ": forged(lambda fields: fields["facts"].update(delta="inf")),
    "text for a number": forged(lambda fields: fields["facts"].update(epsilon="6")),
    "truth for a number": forged(lambda fields: fields["facts"].update(num_steps=True)),
    "long text": forged(lambda fields: fields["facts"].update(unit="x" * 200)),
    "too many phases": forged(lambda fields: fields["facts"].update(phases=fields["facts"]["phases"] * 20)),
    "a phase that is none": forged(lambda fields: fields["facts"].update(phases=[1])),
    "negative client": forged(lambda fields: fields.update(client=-1)),
    "someone else's facts": forged(lambda fields: fields.update(client=2)),
    "round as text": forged(lambda fields: fields.update(round_index="1")),
    "double precision": forged(vector=torch.ones(3, dtype=torch.float64)),
    "a matrix": forged(vector=torch.ones(3, 3)),
    "not finite": forged(vector=torch.tensor([math.inf])),
    "one tensor more": save({"vector": torch.ones(1), "more": torch.ones(1)}, metadata={"format": wire.FORMAT}),
    "no metadata": save({"vector": torch.ones(1)}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_anything_else_is_a_breach_of_protocol(name: str) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_update(HOSTILE[name])
    with pytest.raises(ProtocolError):
        wire.decode_instruction(HOSTILE[name])


def test_what_is_no_bytes_is_a_breach_of_protocol() -> None:
    with pytest.raises(ProtocolError):
        wire.decode_instruction({"theta": [1.0]})  # type: ignore[arg-type]


@pytest.mark.parametrize("head", [None, HEAD])
@pytest.mark.parametrize("mask", [(True,), (False,), (True, False, False, True) * 18])
def test_a_choice_of_modules_arrives_as_it_was(head: Any, mask: tuple[bool, ...]) -> None:
    got = wire.decode_instruction(wire.encode_instruction(replace(INSTRUCTION, head=head, mask=mask)))
    assert got.mask == mask
    assert {type(chosen) for chosen in got.mask} == {bool}
    assert (got.head is None) == (head is None)
    assert wire.decode_instruction(wire.encode_instruction(INSTRUCTION)).mask is None


FOLDED = torch.tensor([0.5, -1e-30, 0.0, 3.0])


@pytest.mark.parametrize("head", [None, HEAD])
@pytest.mark.parametrize("mask", [None, (True, False)])
def test_what_was_folded_into_the_base_arrives_as_it_was(head: Any, mask: tuple[bool, ...] | None) -> None:
    got = wire.decode_instruction(wire.encode_instruction(replace(INSTRUCTION, head=head, mask=mask, folded=FOLDED)))
    assert got.folded is not None
    assert torch.equal(got.folded, FOLDED)
    assert got.mask == mask
    assert (got.head is None) == (head is None)
    assert wire.decode_instruction(wire.encode_instruction(replace(INSTRUCTION, head=head, mask=mask))).folded is None


@pytest.mark.parametrize(
    "folded",
    [
        torch.zeros(2, 2),
        torch.zeros(0),
        torch.tensor(1.0),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.bfloat16),
        torch.tensor([1.0, math.nan]),
        torch.tensor([-math.inf, 1.0]),
    ],
)
def test_what_cannot_have_been_folded_into_the_base_is_refused_at_both_ends(folded: torch.Tensor) -> None:
    with pytest.raises(ProtocolError, match="folded"):
        wire.encode_instruction(replace(INSTRUCTION, folded=folded))
    fields = {"run_id": "run", "round_index": 3, "phase": "finetune", "layout_digest": "a" * 64}
    metadata = {"format": wire.FORMAT, "kind": "instruction+folded", "fields": json.dumps(fields)}
    forged = save({"theta": torch.ones(2), "folded": folded}, metadata=metadata)
    with pytest.raises(ProtocolError, match="folded"):
        wire.decode_instruction(forged)


def with_mask(mask: torch.Tensor, kind: str = "instruction+mask", **more: torch.Tensor) -> bytes:
    """An instruction as someone may write it who does not use our encoder."""
    fields = {"run_id": "run", "round_index": 3, "phase": "finetune", "layout_digest": "a" * 64}
    metadata = {"format": wire.FORMAT, "kind": kind, "fields": json.dumps(fields)}
    return save({"theta": torch.ones(2), "mask": mask, **more}, metadata=metadata)


FORGED_MASKS = {
    "a half": with_mask(torch.tensor([1.0, 0.5])),
    "two": with_mask(torch.tensor([2.0, 0.0])),
    "minus one": with_mask(torch.tensor([1.0, -1.0])),
    "nearly one": with_mask(torch.tensor([1.0 + 2**-23, 0.0])),
    "no number": with_mask(torch.tensor([1.0, math.nan])),
    "infinite": with_mask(torch.tensor([math.inf, 0.0])),
    "of nothing": with_mask(torch.zeros(0)),
    "a matrix": with_mask(torch.ones(2, 2)),
    "truths": with_mask(torch.tensor([True, False])),
    "whole numbers": with_mask(torch.tensor([1, 0])),
    "double precision": with_mask(torch.ones(2, dtype=torch.float64)),
    "not announced": with_mask(torch.ones(2), "instruction"),
    "for a head": with_mask(torch.ones(2), "instruction+head"),
    "with a head that was not announced": with_mask(torch.ones(2), weight=torch.ones(2, 2), bias=torch.ones(2)),
    "with a head that is missing": with_mask(torch.ones(2), "instruction+head+mask"),
    "in an update": with_mask(torch.ones(2), "update"),
}


@pytest.mark.parametrize("name", FORGED_MASKS)
def test_a_choice_of_anything_but_modules_is_a_breach_of_protocol(name: str) -> None:
    assert wire.decode_instruction(with_mask(torch.tensor([1.0, 0.0]))).mask == (True, False), "the forger can forge"
    with pytest.raises(ProtocolError):
        wire.decode_instruction(FORGED_MASKS[name])


CODES, HALVES = torch.tensor([127, -127, 0], dtype=torch.int8), torch.tensor([0.5, -3.0, 0.0], dtype=torch.bfloat16)


@pytest.mark.parametrize("coded", [Coded(CODES, torch.tensor([0.25])), Coded(HALVES)], ids=["int8", "bfloat16"])
def test_a_coded_move_arrives_as_it_was_and_in_place_of_the_vector(coded: Coded) -> None:
    sent = replace(make_update(), coded=coded)
    got = wire.decode_update(wire.encode_update(sent))
    assert got.coded is not None
    assert got.coded.codes.dtype == coded.codes.dtype
    assert torch.equal(got.coded.codes, coded.codes)
    assert (got.coded.scales is None) == (coded.scales is None)
    if got.coded.scales is not None and coded.scales is not None:
        assert torch.equal(got.coded.scales, coded.scales)
    assert got.vector.shape == (0,)
    assert replace(got, vector=sent.vector, coded=coded) == sent


def coded_blob(kind: str, **tensors: torch.Tensor) -> bytes:
    """An update as someone may write it who does not use our encoder."""
    blob = wire.encode_update(make_update())
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    return save(tensors, metadata=header["__metadata__"] | {"kind": kind})


ONE = torch.ones(1)
FORGED_CODES = {
    "no scales": coded_blob("update+int8", codes=CODES),
    "no codes": coded_blob("update+int8", scales=ONE),
    "scales for halves": coded_blob("update+bfloat16", codes=HALVES, scales=ONE),
    "a vector beside": coded_blob("update+int8", codes=CODES, scales=ONE, vector=torch.ones(3)),
    "not announced": coded_blob("update", codes=CODES, scales=ONE),
    "wide codes": coded_blob("update+int8", codes=CODES.to(torch.int32), scales=ONE),
    "halves as bytes": coded_blob("update+int8", codes=HALVES, scales=ONE),
    "bytes as halves": coded_blob("update+bfloat16", codes=CODES),
    "a matrix of codes": coded_blob("update+int8", codes=CODES[None], scales=ONE),
    "codes of nothing": coded_blob("update+int8", codes=CODES[:0], scales=ONE),
    "scales of nothing": coded_blob("update+int8", codes=CODES, scales=ONE[:0]),
    "a matrix of scales": coded_blob("update+int8", codes=CODES, scales=ONE[None]),
    "double scales": coded_blob("update+int8", codes=CODES, scales=ONE.double()),
    "a scale that is no number": coded_blob("update+int8", codes=CODES, scales=ONE * math.nan),
    "an infinite scale": coded_blob("update+int8", codes=CODES, scales=ONE * math.inf),
    "an infinite half": coded_blob("update+bfloat16", codes=HALVES * math.inf),
    "for a head": coded_blob("update+int8+head", codes=CODES, scales=ONE),
}


@pytest.mark.parametrize("name", FORGED_CODES)
def test_codes_that_do_not_fit_their_kind_are_a_breach_of_protocol(name: str) -> None:
    assert wire.decode_update(coded_blob("update+int8", codes=CODES, scales=ONE)).coded is not None, "it can forge"
    with pytest.raises(ProtocolError):
        wire.decode_update(FORGED_CODES[name])
    with pytest.raises(ProtocolError):
        wire.decode_instruction(FORGED_CODES[name])


def test_a_head_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ProtocolError, match="2 rows and 1 biases"):
        wire.decode_instruction(wire.encode_instruction(replace(INSTRUCTION, head=(HEAD[0], torch.ones(1)))))


@given(st.data())
def test_a_flipped_byte_is_refused_or_harmless(data: st.DataObject) -> None:
    blob = bytearray(wire.encode_instruction(INSTRUCTION))
    blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = wire.decode_instruction(bytes(blob))
    except ProtocolError:
        return
    assert got.theta.shape == (2,)
    assert torch.isfinite(got.theta).all()


def test_a_site_remembers_what_is_over_wherever_it_is_rebuilt() -> None:
    before, after = make_site(), make_site()
    before.next_round, before.run_id = 2, INSTRUCTION.run_id
    before.optimizer_state = {"step": torch.tensor(4.0), "exp_avg": torch.ones(3), "momentum_buffer": None}
    recall(after, remember(before))
    assert (after.next_round, after.run_id) == (2, INSTRUCTION.run_id)
    assert after.optimizer_state is not None
    assert after.optimizer_state.keys() == {"step", "exp_avg"}
    assert torch.equal(after.optimizer_state["exp_avg"], torch.ones(3))
    recall(after, remember(make_site()))
    assert after.next_round == 2, "a round that is over stays over"
    assert after.mask is None
    after.mask = (True, False)
    third = make_site()
    recall(third, remember(after))
    assert third.mask == (True, False)
    recall(third, remember(make_site()))
    assert third.mask == (True, False), "there is one choice for a run"
    with pytest.raises(ProtocolError, match="another choice"):
        third.scheduled(replace(INSTRUCTION, round_index=2, mask=(False, True)))
    after.mask = None
    with pytest.raises(ProtocolError, match="already done"):
        after.admit(replace(INSTRUCTION, round_index=1))
    with pytest.raises(ProtocolError, match="another run"):
        after.admit(replace(INSTRUCTION, round_index=2, run_id="other"))
