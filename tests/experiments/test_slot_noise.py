"""What a record says of noise in each slot is what noise does there, and is made of what has left the sites."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlora.config import RunConfig
from fedlora.engine.expanded import ExpandedBackend
from fedlora.errors import RunInterrupted
from fedlora.experiments import simulate as simulation
from fedlora.experiments.run_folder import to_json
from fedlora.experiments.simulate import simulate
from fedlora.experiments.slot_noise import slot_facts
from fedlora.experiments.sweeps.worker import Unwatched
from fedlora.privacy.projection import LowPass

Slots = list[dict[str, Any]]

SETTINGS = (
    "adapter.rank=128",
    "adapter.target_modules=['all']",  # 26,624 numbers
    "federation.rounds=4",
    "training.learning_rate=0.3",
    "privacy.accountant=rdp",
    "privacy.epsilon=1.0",
)


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> Run:
    """`run("section.key=value", …)` is the record of a seeded run, its folder under "folder"."""

    def make(*overrides: str, out: str = "run") -> dict[str, Any]:
        path = simulate(tiny_config(*SETTINGS, *overrides, f"run.out='{tmp_path / out}'"), Unwatched())
        return {**json.loads((path / "record.json").read_text()), "folder": path}

    return make


@pytest.fixture
def no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record's gradient is zero: what moves theta is the noise and nothing else."""
    genuine = ExpandedBackend.gradients

    def zero(self: ExpandedBackend, *arguments: Any) -> list[torch.Tensor]:
        return [gradient.zero_() for gradient in genuine(self, *arguments)]

    monkeypatch.setattr(ExpandedBackend, "gradients", zero)


def ratio(slots: Slots) -> float:
    return math.fsum(slot["energy"] for slot in slots) / math.fsum(slot["noise_energy"] for slot in slots)


CASES: dict[str, tuple[str, ...]] = {
    "linear, three clients": (),
    "constant": ("training.schedule=constant",),
    "one client": ("federation.clients=1",),
    "two of three clients a round": ("federation.participation=0.67", "federation.rounds=7"),
    "sites of other sizes, so other σ": ("data.partition=label_skew", "data.label_skew='0.6,0.6;0.3,0.3;0.1,0.1'"),
    "automatic clipping to 0.1": ("privacy.clipping=automatic", "privacy.clip_norm=0.1"),
    "a trained head": ("model.head=trained",),
    "gredp complex": ("privacy.mechanism=gredp",),
    "gredp complex, flat": ("privacy.mechanism=gredp", "privacy.gredp_over=flat"),
    "gredp complex_half": ("privacy.mechanism=gredp", "privacy.gredp_noise=complex_half"),
    "low-pass": ("privacy.low_pass=0.7", "adapter.rank=256"),
    "chosen at random": ("adapter.select=random", "adapter.rank=256"),
    "after a warm-up that is kept": ("adapter.select=warmup", "adapter.ratio=1.0"),
    "after a warm-up, afresh": ("adapter.select=warmup", "adapter.warm_start=false", "adapter.rank=256"),
    "after a bilevel search, afresh": (
        "adapter.select=bilevel",
        "adapter.warm_start=false",
        "adapter.rank=256",
        "federation.rounds=6",
    ),
    "both factors": ("adapter.method=lora",),
    "both factors and a head, A twice as fast": ("adapter.method=lora", "adapter.rate_of_a=2", "model.head=trained"),
    "factors by round": ("adapter.method=rolora", "federation.participation=0.67", "federation.rounds=7"),
    "factors by step, one of B more": (
        "adapter.method=la_lora",
        "federation.local_steps=3",
        "adapter.rate_of_a=2",
        "model.head=trained",
    ),
    "the rest goes into the base": ("adapter.method=fedex", "model.dtype=float32"),
    "shared adapters start after a warm-up": ("adapter.select=warmup", "adapter.sharing=type", "adapter.rank=256"),
}


@pytest.mark.usefixtures("no_signal")
@pytest.mark.parametrize("case", CASES)
def test_without_signal_energy_is_noise_energy(run: Run, case: str) -> None:
    """A chi-squared mean over N numbers: off by 5.2 √(2/N) once in 5 million runs, a slot by 7 √(2/N) hardly ever."""
    record = run(*CASES[case])
    slots, sizes = record["slots"], sizes_of(record)
    if "low-pass" in case:
        sizes = {name: LowPass(0.7).dimension(size) for name, size in sizes.items()}
    assert [slot["name"] for slot in slots] == [*sizes]
    assert_is_noise(slots, sum(sizes.values()))
    for slot in slots:
        tolerance = 7 * math.sqrt(2 / sizes[slot["name"]])
        assert tolerance > 1 or abs(slot["energy"] / slot["noise_energy"] - 1) < tolerance, slot


def assert_is_noise(slots: Slots, numbers: int) -> None:
    tolerance = 5.2 * math.sqrt(2 / numbers)
    assert tolerance < 0.047, "small enough to reject a noise_energy that is 10 % off in either direction"
    found = math.fsum(slot["energy"] for slot in slots) / math.fsum(slot["noise_energy"] for slot in slots)
    assert abs(found - 1) < tolerance, (found, tolerance)


def sizes_of(record: dict[str, Any]) -> dict[str, int]:
    """Of all slots that leave in fine-tuning, in whatever round."""
    vectors = [vector for vector in record["privacy"]["vectors_out"] if vector["phase"] == "finetune"]
    return {slot["name"]: math.prod(slot["shape"]) for vector in vectors for slot in vector["slots"]}


@pytest.mark.usefixtures("no_signal")
def test_only_those_who_answered_count(make_federation: Callable[..., Any]) -> None:
    """Whose update is lost adds no noise, and the mean over fewer has more of it."""
    federation = make_federation(*SETTINGS, "privacy.accountant=rdp")
    lines: list[dict[str, Any]] = []

    class Lossy:
        def exchange(self, instruction: Any, clients: tuple[int, ...]) -> list[Any]:
            replies = federation.exchange(instruction, clients)
            return replies[: 1 + instruction.round_index % 2]

    server = federation.server(Lossy(), on_round=lambda report, state: lines.append(to_json(asdict(report))))
    state = server.run(federation.start())
    assert [len(line["failures"]) for line in lines] == [2, 1, 2, 1]
    facts = slot_facts(
        federation.config, federation.workbench, theta=state.theta, clients=[*state.facts.values()], rounds=lines
    )
    assert_is_noise(facts["slots"], len(state.theta))


def test_the_two_numbers_follow_from_what_a_run_publishes(run: Run) -> None:
    """From the adapter's file, rounds.jsonl and the clients' facts alone: nothing that stayed at a site is in them."""
    record = run("privacy.seeded_noise=false")
    weights = load_file(record["folder"] / "adapter" / "adapter_model.safetensors")
    scale = record["config"]["training"]["learning_rate"] / record["config"]["training"]["expected_batch_size"]
    lines = [json.loads(line) for line in (record["folder"] / "rounds.jsonl").read_text().splitlines()]
    rates = [scale * (1 - number / len(lines)) for number in range(len(lines))]
    stds = [client["noise_multiplier"] * client["clip_norm"] for client in record["clients"]]
    variance = sum(2 * (rate / 3) ** 2 * sum(std**2 for std in stds) for rate in rates)
    for slot in record["slots"]:
        published = next(value for name, value in weights.items() if f"{slot['name'][:-2]}.lora_B" in name)
        assert slot["energy"] == pytest.approx(published.double().square().sum().item(), rel=1e-5)
        assert slot["noise_energy"] == pytest.approx(variance * published.numel(), rel=1e-3)
        assert slot.keys() == {"name", "layer", "kind", "energy", "noise_energy"}


def test_slots_are_placed_in_the_model(run: Run) -> None:
    slots = run("model.head=trained", "adapter.select=warmup", "adapter.sharing=type")["slots"]
    placed = {slot["name"]: (slot["layer"], slot["kind"]) for slot in slots}
    alone = {name: at for name, at in placed.items() if name.startswith("encoder")}
    assert alone
    assert all(f"layer.{layer}." in name and isinstance(kind, str) for name, (layer, kind) in alone.items())
    assert {at for name, at in placed.items() if name not in alone} == {(None, None)}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("training.optimizer=adam", "training.learning_rate=0.001"), "training.optimizer = adam"),
        (("training.optimizer=momentum",), "training.optimizer = momentum"),
        (("training.weight_decay=0.01",), "training.weight_decay = 0.01"),
        (("training.noise_filter=disk",), "training.noise_filter = disk"),
        (("privacy.mechanism=gredp", "privacy.gredp_noise=real", "privacy.allow_unsound=true"), "gredp_noise = real"),
        (("adapter.select=bilevel", "federation.rounds=6"), "adapter.select = bilevel"),
        (("adapter.method=ffa_svd",), "adapter.method = ffa_svd"),
        (("adapter.method=fed_sb_svd", "adapter.rank=16"), "adapter.method = fed_sb_svd"),
        (("adapter.method=flora",), "adapter.method = flora"),
        (("adapter.method=flexlora",), "adapter.method = flexlora"),
        (("adapter.method=hetlora", "adapter.ranks='128,4'"), "adapter.ranks = 128,4"),
        (("federation.aggregator=median",), "federation.aggregator = median"),
        (("federation.weights=public_size",), "federation.weights = public_size"),
        (("federation.server_optimizer=adam",), "federation.server_optimizer = adam"),
        (("federation.wire_dtype=int8",), "federation.wire_dtype = int8"),
    ],
)
def test_what_cannot_be_stated_exactly_is_not_stated(run: Run, settings: tuple[str, ...], reason: str) -> None:
    record = run("training.learning_rate=0.02", *settings)
    assert record["slots"] is None
    assert reason in record["slots_note"]


@pytest.mark.usefixtures("no_signal")
def test_what_sites_keep_is_in_no_slot(run: Run) -> None:
    record = run("adapter.method=fedsa", "adapter.rank=256")
    slots, sizes = record["slots"], sizes_of(record)
    assert_is_noise([slot for slot in slots if slot["name"] in sizes], sum(sizes.values()))
    rest = [slot for slot in slots if slot["name"] not in sizes]
    assert len(rest) == len(sizes)
    assert all(slot["energy"] == slot["noise_energy"] == 0 for slot in rest)
    assert "what sites keep" in record["slots_note"]


def test_both_factors_of_a_module_are_placed(run: Run) -> None:
    placed = {slot["name"]: (slot["layer"], slot["kind"]) for slot in run("adapter.method=lora")["slots"]}
    assert {name[-2:] for name in placed} == {"/B", "/A"}
    assert all(placed[f"{name[:-2]}/B"] == at != (None, None) for name, at in placed.items())


def test_the_choice_saw_the_noise_of_a_warm_up_that_is_kept(run: Run) -> None:
    assert run()["slots_note"] == ""
    assert "mean before the choice" in run("adapter.select=warmup", out="searched")["slots_note"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_without_noise_all_energy_is_signal(run: Run, optimizer: str) -> None:
    slots = run("privacy.epsilon=inf", f"training.optimizer={optimizer}", "training.learning_rate=0.01")["slots"]
    assert all(slot["noise_energy"] == 0 < slot["energy"] for slot in slots)


def test_a_run_that_was_stopped_says_the_same(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The round that died left nothing in theta; it is done anew."""
    whole = run()
    exchange, asked = simulation.CohortTransport.exchange, iter(range(10))

    def interrupted(self: Any, *arguments: Any) -> Any:
        replies = exchange(self, *arguments)
        if next(asked) == 1:
            raise KeyboardInterrupt
        return replies

    monkeypatch.setattr(simulation.CohortTransport, "exchange", interrupted)
    with pytest.raises(RunInterrupted):
        run(out="stopped")
    path = simulation.resume(whole["folder"].parent / "stopped", Unwatched())
    assert json.loads((path / "record.json").read_text())["slots"] == whole["slots"]
