"""Moves in fewer bits: right on average, never further off than said, and the same bits whatever carries them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from fedlora.adapters.slots import AdapterLayout
from fedlora.config import RunConfig
from fedlora.errors import ProtocolError
from fedlora.federation import wire
from fedlora.federation.messages import ClientUpdate, RoundInstruction, check_update, coded_update, opened_update
from fedlora.federation.quantisation import Coded, WireDtype, decode, encode, slot_bytes, wire_dtype
from fedlora.privacy.phases import ALIGNMENT, BILEVEL, EVALUATION, FINETUNE, PROTOTYPE, WARMUP
from fedlora.randomness import SecretRoot

LAYOUT = AdapterLayout.build({"m/B": (6, 2), "n/B": (4, 2), "gates": (3,)}, method="ffa", rank=2, alpha=2.0)
SIZES = [12, 8, 3]
CODED: list[WireDtype] = ["bfloat16", "int8"]
ROOT = SecretRoot.seeded(7)


def random_move(spread: float = 1e-3) -> Tensor:
    move = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * spread
    move[:12] *= 50  # slots differ in size
    return move


def steps_of(move: Tensor, dtype: WireDtype) -> Tensor:
    """Distance of a coordinate's two neighbours on its grid, worked out another way than in the code."""
    if dtype == "bfloat16":
        exponents = [-133 if x == 0 else max(math.floor(math.log2(abs(x))) - 7, -133) for x in move.tolist()]
        return torch.tensor([2.0**exponent for exponent in exponents], dtype=torch.float64)
    largest = [part.abs().max() / 127 for part in move.split(SIZES)]
    return torch.cat([step.expand(size) for step, size in zip(largest, SIZES, strict=True)])


def draws(move: Tensor, dtype: WireDtype, count: int) -> Tensor:
    generator = ROOT.numpy("draws", dtype)
    return torch.stack([decode(encode(move, LAYOUT, dtype, generator), LAYOUT, dtype) for _ in range(count)])


@pytest.mark.parametrize("dtype", CODED)
def test_the_mean_is_right_and_the_expected_error_is_as_stated(dtype: WireDtype) -> None:
    move, count = random_move(), 4000
    steps, errors = steps_of(move, dtype), draws(move, dtype, count) - move
    above = (move / steps) % 1
    squared = steps**2 * above * (1 - above)
    assert (squared <= steps**2 / 4).all()
    assert squared.sum() > 0.05 * (steps**2).sum(), "or there is nothing to see"
    deviations = (squared / count).sqrt()
    assert (errors.mean(dim=0).abs() <= 5 * deviations + 1e-4 * steps).all()  # a scale is rounded up
    seen, wanted = float((errors**2).mean(dim=0).sum()), float(squared.sum())
    assert abs(seen / wanted - 1) < 0.05


@pytest.mark.parametrize("dtype", CODED)
def test_rounding_to_nearest_would_be_seen(dtype: WireDtype) -> None:
    """The test above can tell: numbers a tenth of a step above a neighbour go up in a tenth of all draws."""
    move = torch.full((LAYOUT.size,), 1.0, dtype=torch.float64)
    move[1] = steps_of(move, dtype)[1] * (64.1 if dtype == "int8" else 1.1 * 64)
    up = (draws(move, dtype, 4000)[:, 1] > move[1]).double().mean()
    above = float((move / steps_of(move, dtype))[1] % 1)
    assert abs(float(up) - above) < 5 * math.sqrt(above * (1 - above) / 4000)


finite = st.floats(-(2.0**100), 2.0**100, width=32)


@given(arrays.arrays(np.float32, LAYOUT.size, elements=finite), st.sampled_from(CODED))
def test_no_coordinate_is_further_off_than_a_step(numbers: np.ndarray, dtype: WireDtype) -> None:
    move = torch.from_numpy(numbers).double()
    found = decode(encode(move, LAYOUT, dtype, ROOT.numpy("bound")), LAYOUT, dtype)
    bound = steps_of(move, dtype) * (1 + 2e-7) + 2e-45  # a scale is rounded up to a float32
    assert ((found - move).abs() <= bound).all()
    assert (found.sign() * move.sign() >= 0).all()
    if dtype == "bfloat16":
        assert ((found - move).abs() <= move.abs() / 128 + 2.0**-133).all()


@pytest.mark.parametrize("dtype", CODED)
def test_a_stream_gives_the_same_bits_again_and_another_one_others(dtype: WireDtype) -> None:
    first, again = (encode(random_move(), LAYOUT, dtype, ROOT.numpy("wire", 0, 1)) for _ in range(2))
    other = encode(random_move(), LAYOUT, dtype, ROOT.numpy("wire", 0, 2))
    assert torch.equal(first.codes, again.codes)
    assert not torch.equal(first.codes, other.codes)


@pytest.mark.parametrize("dtype", CODED)
def test_as_much_is_drawn_for_every_move(dtype: WireDtype) -> None:
    used, expected = ROOT.numpy("drawn"), ROOT.numpy("drawn")
    for move in (random_move(), torch.zeros(LAYOUT.size)):
        encode(move, LAYOUT, dtype, used)
        expected.random(LAYOUT.size)
    assert used.random() == expected.random()


@pytest.mark.parametrize("dtype", CODED)
def test_a_client_that_did_not_move_is_seen_not_to_have_moved(dtype: WireDtype) -> None:
    coded = encode(torch.zeros(LAYOUT.size), LAYOUT, dtype, ROOT.numpy("zero"))
    assert not decode(coded, LAYOUT, dtype).any()


def test_one_huge_number_coarsens_its_own_slot_alone_and_is_itself_exact() -> None:
    move = random_move()
    move[3] = 1e4
    found = decode(encode(move, LAYOUT, "int8", ROOT.numpy("huge")), LAYOUT, "int8")
    assert found[3] == pytest.approx(1e4, rel=2e-7)
    others = torch.arange(12) != 3
    step = 1e4 / 127
    assert all(min(abs(value), abs(abs(value) - step)) < 1e-4 for value in found[:12][others].tolist())
    assert ((found - move)[12:].abs() <= steps_of(move, "int8")[12:] * (1 + 2e-7)).all()


def test_the_least_numbers_of_float32_are_kept_on_average_too() -> None:
    move = torch.zeros(LAYOUT.size, dtype=torch.float64)
    move[0], move[13] = 2.0**-149, -(2.0**-140)
    for dtype in CODED:
        found = draws(move, dtype, 300)
        assert found[:, 0].min() >= 0
        assert found[:, 13].max() <= 0
        assert found.isfinite().all()
        assert found[:, 13].any()


THETA = torch.linspace(-2, 2, LAYOUT.size)
INSTRUCTION = RoundInstruction(run_id="run", round_index=3, phase="finetune", layout_digest=LAYOUT.digest, theta=THETA)
PHASE = {
    "name": "finetune",
    "mechanism": "gaussian",
    "sampling_probability": 0.1,
    "effective_noise_multiplier": 1.1,
    "sensitivity": 1.0,
    "num_steps": 4,
}
UPDATE = ClientUpdate(
    run_id="run",
    round_index=3,
    phase="finetune",
    client=1,
    layout_digest=LAYOUT.digest,
    vector=(THETA.double() + random_move()).float(),
    facts={
        "client": 1,
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
        "phases": [PHASE],
    },
)


def sent(dtype: WireDtype) -> ClientUpdate:
    return coded_update(UPDATE, THETA, LAYOUT, dtype, ROOT.numpy("wire", 1, 3))


@pytest.mark.parametrize("dtype", CODED)
def test_what_the_site_sends_is_what_the_server_finds_over_a_wire_and_without(dtype: WireDtype) -> None:
    update = sent(dtype)
    arrived = wire.decode_update(wire.encode_update(update))
    assert arrived.vector.numel() == 0
    with pytest.raises(ProtocolError, match="shape"):
        check_update(arrived, INSTRUCTION, LAYOUT)  # nobody averages what was not opened
    for found in (opened_update(arrived, THETA, LAYOUT, dtype), opened_update(update, THETA, LAYOUT, dtype)):
        check_update(found, INSTRUCTION, LAYOUT)
        assert torch.equal(found.vector, update.vector)
        assert found.vector.dtype == torch.float32
        assert found.num_bytes == update.num_bytes
    steps = steps_of(UPDATE.vector.double() - THETA.double(), dtype)
    assert ((update.vector - UPDATE.vector).abs() <= steps * 1.001 + 3e-7).all()
    assert not torch.equal(update.vector, UPDATE.vector)


def test_bytes_are_counted_as_they_travel() -> None:
    assert UPDATE.num_bytes == 4 * LAYOUT.size
    assert sent("bfloat16").num_bytes == 2 * LAYOUT.size
    assert sent("int8").num_bytes == LAYOUT.size + 4 * len(LAYOUT.slots)
    for dtype, update in {"float32": UPDATE, "bfloat16": sent("bfloat16"), "int8": sent("int8")}.items():
        assert sum(slot_bytes(slot, dtype) for slot in LAYOUT.slots) == update.num_bytes  # type: ignore[arg-type]
    long = AdapterLayout.build({"m/B": (2000, 2)}, method="ffa", rank=2, alpha=2.0)
    blank = replace(UPDATE, vector=torch.ones(4000))
    blobs = {
        dtype: len(wire.encode_update(coded_update(blank, torch.zeros(4000), long, dtype, ROOT.numpy("x"))))
        for dtype in CODED
    }
    whole = len(wire.encode_update(blank))
    assert whole - blobs["bfloat16"] == pytest.approx(8000, abs=300)
    assert whole - blobs["int8"] == pytest.approx(12000, abs=300)


def test_float32_is_left_alone() -> None:
    assert opened_update(UPDATE, THETA, LAYOUT, "float32") is UPDATE


@pytest.mark.parametrize("made", ["float32", *CODED])
@pytest.mark.parametrize("wanted", ["float32", *CODED])
def test_an_update_in_another_dtype_than_the_runs_is_refused(made: WireDtype, wanted: WireDtype) -> None:
    update = UPDATE if made == "float32" else sent(made)
    if made == wanted:
        opened_update(update, THETA, LAYOUT, wanted)
        return
    with pytest.raises(ProtocolError, match=r"not in|codes of") as caught:
        opened_update(update, THETA, LAYOUT, wanted)
    assert "tensor(" not in str(caught.value)


CODES, SCALES = torch.ones(LAYOUT.size, dtype=torch.int8), torch.ones(3)
HALVES = torch.ones(LAYOUT.size, dtype=torch.bfloat16)


def with_one(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed[1] = value
    return changed


FORGED: dict[str, tuple[WireDtype, Coded]] = {
    "too few codes": ("int8", Coded(CODES[1:], SCALES)),
    "too many codes": ("int8", Coded(torch.ones(LAYOUT.size + 1, dtype=torch.int8), SCALES)),
    "a matrix of codes": ("int8", Coded(CODES[None], SCALES)),
    "codes of another dtype": ("int8", Coded(CODES.to(torch.uint8), SCALES)),
    "wide codes": ("int8", Coded(CODES.to(torch.int16), SCALES)),
    "the code that is left out": ("int8", Coded(with_one(CODES, -128), SCALES)),
    "no scales": ("int8", Coded(CODES)),
    "too few scales": ("int8", Coded(CODES, SCALES[1:])),
    "too many scales": ("int8", Coded(CODES, torch.ones(4))),
    "a scale for everything": ("int8", Coded(CODES, torch.tensor(1.0))),
    "a scale that is no number": ("int8", Coded(CODES, with_one(SCALES, math.nan))),
    "an infinite scale": ("int8", Coded(CODES, with_one(SCALES, math.inf))),
    "a negative scale": ("int8", Coded(CODES, with_one(SCALES, -1.0))),
    "scales in double precision": ("int8", Coded(CODES, SCALES.double())),
    "halves for bytes": ("int8", Coded(HALVES, SCALES)),
    "bytes for halves": ("bfloat16", Coded(CODES)),
    "other halves": ("bfloat16", Coded(HALVES.to(torch.float16))),
    "scales for halves": ("bfloat16", Coded(HALVES, SCALES)),
    "too few halves": ("bfloat16", Coded(HALVES[1:])),
    "a half that is no number": ("bfloat16", Coded(with_one(HALVES, math.nan))),
    "an infinite half": ("bfloat16", Coded(with_one(HALVES, -math.inf))),
}


@pytest.mark.parametrize("name", FORGED)
def test_codes_that_nobody_can_have_made_are_refused(name: str) -> None:
    dtype, coded = FORGED[name]
    with pytest.raises(ProtocolError, match="it is not used") as caught:
        opened_update(replace(UPDATE, coded=coded), THETA, LAYOUT, dtype)
    assert "tensor(" not in str(caught.value)


def test_codes_that_reach_beyond_float32_do_not_pass_the_gate() -> None:
    far = Coded(CODES * 127, with_one(SCALES, 3e38))
    with pytest.raises(ProtocolError, match="not finite"):
        check_update(opened_update(replace(UPDATE, coded=far), THETA, LAYOUT, "int8"), INSTRUCTION, LAYOUT)


def test_only_training_is_coded() -> None:
    config = RunConfig.from_mapping({}, ["federation.wire_dtype=int8"])
    assert {wire_dtype(config, phase) for phase in (WARMUP, BILEVEL, FINETUNE)} == {"int8"}
    assert {wire_dtype(config, phase) for phase in (PROTOTYPE, ALIGNMENT, EVALUATION)} == {"float32"}
    assert wire_dtype(RunConfig.from_mapping({}), FINETUNE) == "float32"


@dataclass
class Bytes:
    """A transport that carries nothing but bytes."""

    federation: Any
    lies: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What clients put into their answers, by client."""

    def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Any]:
        asked = wire.decode_instruction(wire.encode_instruction(instruction))
        answers = [wire.encode_update(update) for update in self.federation.exchange(asked, clients)]
        found = [wire.decode_update(answer) for answer in answers]
        return [replace(update, **self.lies.get(update.client, {})) for update in found]


def finished(federation: Any, transport: Any = None) -> tuple[Any, list[Any]]:
    reports: list[Any] = []
    server = federation.server(transport, lambda report, state: reports.append(report))
    return server.run(federation.start()), reports


METHODS = {
    "ffa": (),
    "head": ("model.head=trained",),
    "turns": ("adapter.method=rolora",),
    "kept": ("adapter.method=fedsa",),
    "folded": ("adapter.method=fedex",),
    "ranks": ("adapter.method=hetlora", 'adapter.ranks="4, 2"'),
    "searched": ("adapter.select=bilevel", "adapter.warmup_rounds=1", "federation.rounds=4"),
}


@pytest.mark.parametrize("dtype", CODED)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_over_bytes_ends_with_the_bits_of_one_without(make_federation: Any, method: str, dtype: str) -> None:
    options = (*METHODS[method], f"federation.wire_dtype={dtype}", "training.learning_rate=0.05")
    here, _ = finished(federation := make_federation(*options))
    over = make_federation(*options)
    there, reports = finished(over, Bytes(over))
    assert torch.equal(here.theta, there.theta)
    assert here.theta.any()
    assert here.bytes_up == there.bytes_up
    if here.folded is not None:
        assert torch.equal(here.folded, there.folded)
    for report, entry in zip(reports, federation.workbench.schedule, strict=True):
        if report.phase == FINETUNE:
            layouts = [federation.workbench.sent_layout(entry, client) for client in entry.clients]
            wanted = [slot_bytes(slot, dtype) for layout in layouts for slot in layout.slots]  # type: ignore[arg-type]
            assert report.bytes_up == sum(wanted)
            assert not report.failures


@pytest.mark.parametrize("dtype", CODED)
def test_noise_and_batches_are_those_of_a_run_in_float32(make_federation: Any, dtype: WireDtype) -> None:
    """Of the first round, vectors differ by less than a step of their moves."""
    whole, coded = make_federation(), make_federation(f"federation.wire_dtype={dtype}")
    entry, layout = whole.workbench.schedule[0], whole.workbench.layout
    pairs = [one.exchange(one.instruction(entry), entry.clients) for one in (whole, coded)]
    for exact, rounded in zip(*pairs, strict=True):
        assert exact.coded is None
        start = whole.start().theta
        move, found = exact.vector.double() - start.double(), rounded.vector.double() - start.double()
        largest = max(float(layout.view(move, slot).abs().max()) for slot in layout.slots)
        assert 0 < (found - move).abs().max() < largest / (127 if dtype == "int8" else 128) * 1.001


def test_every_client_and_round_has_coins_of_its_own_and_float32_none(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[Any, ...]] = []
    honest = SecretRoot.numpy
    monkeypatch.setattr(SecretRoot, "numpy", lambda root, *path: used.append(path) or honest(root, *path))
    finished(make_federation("federation.wire_dtype=int8", "federation.rounds=2"))
    assert sorted(path for path in used if path[0] == "wire") == [("wire", *pair) for pair in product(range(3), (0, 1))]
    others = [path for path in used if path[0] != "wire"]
    used.clear()
    finished(make_federation("federation.rounds=2"))
    assert used == others


def test_releases_of_other_phases_travel_as_they_are(make_federation: Any) -> None:
    federation = make_federation("model.head=prototype", "federation.wire_dtype=int8", "privacy.accountant=rdp")
    entry = federation.workbench.schedule[0]
    assert entry.phase == PROTOTYPE
    updates = federation.exchange(federation.instruction(entry), entry.clients)
    assert all(update.coded is None and update.vector.dtype == torch.float32 for update in updates)
    state, reports = finished(make_federation("model.head=prototype", "federation.wire_dtype=int8"))
    assert reports[0].bytes_up == 3 * 4 * federation.workbench.payload_layout(PROTOTYPE).size
    assert state.next_round == 4


def test_a_client_that_codes_otherwise_is_not_used(make_federation: Any) -> None:
    federation = make_federation("federation.wire_dtype=int8", "federation.rounds=1")
    size = federation.workbench.layout.size
    lies = {
        0: {"coded": None, "vector": torch.zeros(size)},
        1: {"coded": Coded(torch.zeros(size, dtype=torch.bfloat16))},
    }
    _, reports = finished(federation, Bytes(federation, lies))
    assert dict(reports[0].failures) == {0: "protocol", 1: "protocol"}
    assert reports[0].clients_ok == 1


@pytest.mark.parametrize("method", ["ffa", "head", "turns", "kept", "ranks"])
def test_a_move_is_taken_from_what_was_sent_of_the_same_slots_and_ranks(make_federation: Any, method: str) -> None:
    bench = make_federation(*METHODS[method]).workbench
    shared = bench.layout.only(bench.shared_parts)
    theta = torch.arange(float(shared.size))
    named = {slot.name: slot for slot in shared.slots}
    for entry in bench.schedule:
        for client in entry.clients:
            layout = bench.sent_layout(entry, client)
            start = bench.moved_from(theta, entry, client)
            assert start.shape == (layout.size,)
            for slot in layout.slots:
                sent = shared.view(theta, named[slot.name])
                assert torch.equal(layout.view(start, slot), sent[tuple(slice(0, size) for size in slot.shape)])
