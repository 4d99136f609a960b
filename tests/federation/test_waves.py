"""A cohort in waves gives what it gives at once; what does not fit is refused before anything is charged."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.engine import gates, training
from fedlora.engine.device_memory import peak_bytes
from fedlora.engine.expanded import ExpandedBackend
from fedlora.errors import ModelError
from fedlora.federation import cohort, waves
from fedlora.privacy.phases import BILEVEL, FINETUNE

CLIENTS = tuple(range(5))
FIVE = ("federation.clients=5", "federation.rounds=3", "training.expected_batch_size=8", "privacy.accountant=rdp")
ADAM = ("training.optimizer=adam", "training.keep_state=true", "training.learning_rate=0.05")
# One batch of 8 records a client, whose micro-batches of 8 tokens have 16 rows however many clients share them.
ONE_SHAPE = ("engine.token_budget=16",)
BILEVEL_SEARCH = ("adapter.select=bilevel", "adapter.search_rounds=1", "adapter.warmup_rounds=1")


def rounds(federation: Any, phase: str, count: int = 2) -> list[Tensor]:
    """Vectors [P] of all clients in the first `count` rounds of a phase, all from the same start."""
    found: list[Tensor] = []
    for entry in [entry for entry in federation.workbench.schedule if entry.phase == phase][:count]:
        theta = federation.start().theta
        if phase == BILEVEL:
            theta = torch.cat([theta, torch.zeros(len(federation.workbench.candidates))])
        instruction = federation.instruction(entry, theta=theta)
        found += [update.vector for update in federation.exchange(instruction, CLIENTS)]
    return found


def same(found: Sequence[Tensor], wanted: Sequence[Tensor], *, bits: bool) -> bool:
    """Whether each vector is the other, if asked to the last bit.

    That takes calls of the same shapes, and no function whose vectorised code rounds otherwise at the end of an array,
    as the gates' sigmoid does.
    """
    pairs = zip(found, wanted, strict=True)
    return all(torch.equal(*pair) if bits else torch.allclose(*pair, atol=1e-6) for pair in pairs)


def sizes_of_calls(monkeypatch: pytest.MonkeyPatch, most: int = 10**9, error: Any = None) -> list[int]:
    """The number of jobs in every call of the engine from now on; calls with more than `most` end in `error`."""
    calls: list[int] = []

    def spied(genuine: Any) -> Any:
        def call(backend: Any, dataset: Any, jobs: Any, *rest: Any, **settings: Any) -> Any:
            calls.append(len(jobs))
            results = genuine(backend, dataset, jobs, *rest, **settings)
            if len(jobs) > most:
                raise error  # when all streams have moved on
            return results

        return call

    monkeypatch.setattr(cohort, "train", spied(training.train))
    monkeypatch.setattr(cohort, "search", spied(gates.search))
    return calls


def reserved(federation: Any) -> int:
    return sum(entry.kind == "reserved" for entry in federation.ledger.entries())


def exhausted() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("options", "phase"),
    [((), FINETUNE), (ADAM, FINETUNE), (BILEVEL_SEARCH, BILEVEL)],
    ids=["plain", "kept state", "search"],
)
@pytest.mark.parametrize(("size", "calls"), [(1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2])])
def test_waves_of_any_size_give_what_one_call_gives(
    make_federation: Any,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    phase: str,
    size: int,
    calls: list[int],
) -> None:
    together, apart = (make_federation(*FIVE, *ONE_SHAPE, *options) for _ in range(2))
    wanted = rounds(together, phase)
    monkeypatch.setattr(cohort, "wave_size", lambda *_: size)
    seen = sizes_of_calls(monkeypatch)
    found = rounds(apart, phase)
    assert seen == calls * (len(found) // 5)
    assert same(found, wanted, bits=phase == FINETUNE)
    for one, other in zip(apart.sites, together.sites, strict=True):
        assert (one.optimizer_state is None) == (other.optimizer_state is None) == (options != ADAM)
        for key, value in (one.optimizer_state or {}).items():
            assert torch.allclose(value, other.optimizer_state[key], atol=1e-6), key


@pytest.mark.parametrize("size", [1, 2, 4])
def test_no_record_can_tell_from_its_shapes_that_others_wait(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """How a cohort is divided may follow from what one long record takes: it must not show in the bits of others."""
    shapes: list[tuple[int, ...]] = []
    genuine = ExpandedBackend.gradients

    def spy(self: Any, theta: Tensor, batch: Any, labels: Tensor, owner: Tensor, turn: Any = None) -> Any:
        shapes.append((*batch["input_ids"].shape, min(len(theta), 2)))
        return genuine(self, theta, batch, labels, owner, turn)

    together, apart = (make_federation(*FIVE, "engine.token_budget=512") for _ in range(2))
    monkeypatch.setattr(ExpandedBackend, "gradients", spy)
    rounds(together, FINETUNE)
    wanted = set(shapes)
    shapes.clear()
    monkeypatch.setattr(cohort, "wave_size", lambda *_: size)
    rounds(apart, FINETUNE)
    assert set(shapes) <= wanted


@pytest.mark.parametrize("options", [(), ADAM, BILEVEL_SEARCH], ids=["sgd", "adam", "search"])
@pytest.mark.parametrize("backend", ["expanded", "opacus"])
def test_the_measured_estimate_holds_a_round(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], backend: str
) -> None:
    """Within the margin, with a rank so high that clients take as much as micro-batches."""
    wide = "adapter.rank=64", f"engine.backend={backend}", "engine.token_budget=64"
    federation = make_federation(*FIVE, *wide, *options)
    phase = BILEVEL if options == BILEVEL_SEARCH else FINETUNE
    monkeypatch.setattr(waves, "usable_bytes", lambda device: 1.0)
    with pytest.raises(ModelError):
        rounds(federation, phase)
    estimate = federation.workbench.footprints[phase].of_call(5, 8)
    monkeypatch.setattr(waves, "usable_bytes", lambda device: 1e12)
    taken = peak_bytes(torch.device("cpu"), lambda: rounds(federation, phase, 1))
    assert taken <= estimate * 1.25
    assert estimate <= taken * 2


@pytest.mark.parametrize("options", [(), ADAM, BILEVEL_SEARCH], ids=["sgd", "adam", "search"])
def test_little_memory_makes_waves_of_what_fits_and_the_trial_leaves_no_trace(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    phase = BILEVEL if options == BILEVEL_SEARCH else FINETUNE
    wanted = rounds(make_federation(*FIVE, *ONE_SHAPE, *options), phase)
    federation, probe = (make_federation(*FIVE, *ONE_SHAPE, *options) for _ in range(2))
    monkeypatch.setattr(waves, "usable_bytes", lambda device: 1.0)
    with pytest.raises(ModelError):
        rounds(probe, phase)
    kept = 5 * 4 * federation.workbench.layout.size * (3 if options == ADAM else 1)
    for_two = probe.workbench.footprints[phase].of_call(2, 8) + kept
    monkeypatch.setattr(waves, "usable_bytes", lambda device: for_two)
    seen = sizes_of_calls(monkeypatch)
    found = rounds(federation, phase)
    assert seen[:2] == [8, 16], "the trial's"
    assert seen[2:] == [2, 2, 1] * (len(found) // 5), "measured once"
    assert same(found, wanted, bits=phase == FINETUNE)


@pytest.mark.parametrize("head", ["frozen", "prototype"])
def test_what_does_not_fit_costs_nobody_anything(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    """A prototype is released before there is any training; it would be paid for a run that cannot go on."""
    federation = make_federation(*FIVE, f"model.head={head}")
    monkeypatch.setattr(waves, "usable_bytes", lambda device: 1e4)
    entry = federation.workbench.schedule[0]
    with pytest.raises(ModelError, match=r"takes \d+\.\d\d GB on cpu .* 0\.00 GB .*; lower engine\.token_budget"):
        federation.exchange(federation.instruction(entry), CLIENTS)
    assert federation.ledger.entries() == []
    assert [site.next_round for site in federation.sites] == [0] * 5
    assert all(site.optimizer_state is None for site in federation.sites)
    monkeypatch.undo()
    assert federation.exchange(federation.instruction(entry), CLIENTS)


@pytest.mark.parametrize("options", [(), ADAM, BILEVEL_SEARCH], ids=["sgd", "adam", "search"])
@pytest.mark.parametrize("backend", ["expanded", "opacus"])
def test_a_wave_that_ends_in_exhausted_memory_is_tried_again_on_the_same_draws(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], backend: str
) -> None:
    phase = BILEVEL if options == BILEVEL_SEARCH else FINETUNE
    how = (*FIVE, *ONE_SHAPE, *options, f"engine.backend={backend}", "privacy.seeded_noise=false")
    federation, other = (make_federation(*how) for _ in range(2))
    for site, twin in zip(other.sites, federation.sites, strict=True):
        site.secret = twin.secret
    wanted = rounds(other, phase)
    seen, before = sizes_of_calls(monkeypatch, most=2, error=exhausted()), federation.workbench.backend
    found = rounds(federation, phase)
    assert seen[:4] == [5, 3, 2, 2]
    assert same(found, wanted, bits=phase == FINETUNE)
    assert federation.workbench.backend is not before, "hooks may hold parts of what was given up"
    assert reserved(federation) == reserved(other) == len(found)


def test_one_client_that_exhausts_memory_in_spite_of_the_estimate_is_charged_and_told(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation(*FIVE)
    sizes_of_calls(monkeypatch, most=0, error=exhausted())
    with pytest.raises(ModelError, match="one client does not fit"):
        rounds(federation, FINETUNE)
    assert reserved(federation) == 5
    assert [site.next_round for site in federation.sites] == [1] * 5


def test_another_error_is_no_reason_to_try_again(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = make_federation(*FIVE)
    seen = sizes_of_calls(monkeypatch, most=0, error=RuntimeError("a broken kernel"))
    with pytest.raises(RuntimeError, match="a broken kernel"):
        rounds(federation, FINETUNE)
    assert seen == [5]


ROUND_OF_MANY = """
import sys
from pathlib import Path

from fedlora.config import RunConfig
from fedlora.federation.cohort import Cohort
from fedlora.federation.messages import RoundInstruction
from fedlora.federation.server import initial_state
from fedlora.federation.sites import encode_training_data, load_simulated_data, make_sites
from fedlora.federation.workbench import build_workbench
from fedlora.privacy.ledger import Ledger


def memory(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


config = RunConfig.from_mapping({
    "model": {"name": sys.argv[1], "dtype": "float32", "attention": "eager", "head": "frozen"},
    "adapter": {"rank": 288, "target_modules": ["query", "value"]},
    "data": {"generated_records": 800, "max_length": 8},
    "federation": {"clients": int(sys.argv[2]), "rounds": 1, "local_steps": 2},
    "training": {"expected_batch_size": 1, "learning_rate": 0.001},
    "privacy": {"delta": 1e-3},
    "engine": {"token_budget": 128},
    "run": {"device": "cpu"},
})
bench, data = build_workbench(config), load_simulated_data(config)
dataset, ledger = encode_training_data(bench, data), Ledger.in_memory()
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
cohort = Cohort(workbench=bench, dataset=dataset, sites=make_sites(config, data, bench.schedule), ledger=ledger)
(entry,), state = bench.schedule, initial_state(bench, "run")
updates = cohort.run(RoundInstruction(
    run_id="run", round_index=0, phase=entry.phase, layout_digest=bench.layout.digest, theta=state.theta
))
assert len(updates) == int(sys.argv[2])
print(bench.layout.size, memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_client_of_the_size_of_minilm_adds_less_than_a_megabyte(tiny_model: Any) -> None:
    """Sites, jobs, sums, noise, answers: the peak of the resident memory of a process that does nothing else."""
    model = tiny_model("bert", hidden_size=32)

    def peak(clients: int) -> int:
        command = [sys.executable, "-c", ROUND_OF_MANY, str(model), str(clients)]
        size, taken = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        assert int(size) == 36_864
        return int(taken)

    few, many = peak(20), peak(220)
    assert 200 * 4 * 36_864 < many - few < 200 * 2**20, "at least their answers"
