"""Stopped anywhere around the choice of modules, a run goes on to the bits that it would have come to."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlora.config import RunConfig
from fedlora.errors import RunInterrupted
from fedlora.experiments import simulate as module
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.simulate import resume, run_server, simulate
from fedlora.federation.checkpoint import load_checkpoint, save_checkpoint
from fedlora.federation.messages import RoundInstruction
from fedlora.federation.server import Reply
from fedlora.federation.workbench import build_workbench
from fedlora.privacy.phases import FINETUNE

SHORT = ("federation.local_steps=1", "adapter.search_rounds=2", "privacy.accountant=rdp", "training.learning_rate=0.05")
KEPT_ADAM = ("training.optimizer=adam", "training.keep_state=true")
RUNS = {
    "alignment": ["adapter.select=alignment", "model.head=prototype", *KEPT_ADAM],
    "cost-aware": ["adapter.select=alignment", "adapter.discretise=cost_aware", "adapter.sharing=type"],
    "warmup": ["adapter.select=warmup"],
    "one site a round": ["adapter.select=bilevel", "federation.participation=0.34", "run.seed=1", *KEPT_ADAM],
    "bilevel": ["adapter.select=bilevel", "model.head=trained", *KEPT_ADAM],
    "probe": ["adapter.select=probe", "model.head=prototype"],
    "random": ["adapter.select=random"],
}
DENSE = "encoder.layer.0.output.dense\nencoder.layer.1.output.dense\n"
QUERIES = "encoder.layer.0.attention.self.query\nencoder.layer.1.attention.self.query\n"


@pytest.mark.parametrize("kind", RUNS)
def test_stopped_after_any_round_it_ends_with_the_same_bits(make_federation: Any, tmp_path: Path, kind: str) -> None:
    options = (*SHORT, f"federation.rounds={8 if kind == 'one site a round' else 6}", *RUNS[kind])
    whole, other = make_federation(*options), make_federation(*options)

    def on_round(report: Any, state: Any) -> None:
        save_checkpoint(tmp_path / f"{report.round}", state, whole.sites)

    wanted = whole.server(None, on_round).run(whole.start())
    for index in range(len(whole.workbench.schedule)):
        other.ledger.abandon("run-1", from_round=0)
        for site in other.sites:
            site.run_id = None
        state = load_checkpoint(tmp_path / f"{index}", other.sites)
        resumed = other.server().run(state)
        assert torch.equal(resumed.theta, wanted.theta), f"stopped after round {index}"
        assert resumed.search.selection.to_json() == wanted.search.selection.to_json()
        assert resumed.facts == wanted.facts
        assert (resumed.bytes_up, resumed.bytes_down) == (wanted.bytes_up, wanted.bytes_down)


@pytest.mark.parametrize("kind", ["alignment", "cost-aware", "bilevel"])
def test_a_checkpoint_holds_all_that_the_search_has_found(make_federation: Any, tmp_path: Path, kind: str) -> None:
    federation = make_federation(*SHORT, "federation.rounds=5", *RUNS[kind])
    found = []

    def on_round(report: Any, state: Any) -> None:
        save_checkpoint(tmp_path / f"{report.round}", state, federation.sites)
        found.append(copy.deepcopy(state.search))

    federation.server(None, on_round).run(federation.start())
    for index, search in enumerate(found):
        loaded = load_checkpoint(tmp_path / f"{index}", federation.sites).search
        for name in ("scores", "gates"):
            one, other = getattr(loaded, name), getattr(search, name)
            assert (one is None and other is None) or (torch.equal(one, other) and one.dtype == other.dtype)
        assert (loaded.products is None) == (search.products is None)
        if loaded.products is not None:
            assert torch.equal(loaded.products.signal(), search.products.signal()) or loaded.products.count < 2
            assert loaded.products.slots == search.products.slots
        assert loaded.selection == search.selection
    assert any(search.products is not None for search in found)
    assert any((search.gates if kind == "bilevel" else search.scores) is not None for search in found)
    assert found[-1].selection is not None


# --------------------------------------------------------------------------------------------------------- whole runs


class Killed(BaseException):
    """Ends a run at once, as `kill -9` does: nothing in fedlora catches it."""


class Silent:
    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None: ...

    def round(self, report: Any) -> None: ...

    def finish(self, record: Any) -> None: ...


@pytest.fixture
def make_run(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    def make(*overrides: str, out: str) -> RunConfig:
        return tiny_config(*SHORT, "federation.rounds=4", *overrides, f"run.out='{tmp_path / out}'")

    return make


def result(path: Path) -> tuple[dict[str, torch.Tensor], Any, list[Any]]:
    record = json.loads((path / "record.json").read_text())
    rounds = [{**line, "seconds": 0} for line in RunFolder(path).read_rounds()]
    return load_file(path / "adapter" / "adapter_model.safetensors"), record["selection"], rounds


def assert_same(ours: Path, theirs: Path) -> None:
    (tensors, *rest), (others, *rest_of_others) = result(ours), result(theirs)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    assert rest == rest_of_others


def die_in(patch: pytest.MonkeyPatch, number: int, phase: str, *, computed: bool) -> None:
    """The run dies in its `number`-th round of `phase`, before or after the sites have computed it."""
    exchange, met = module.CohortTransport.exchange, iter(range(100))

    def dying(self: Any, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        last = instruction.phase == phase and next(met) == number
        if last and not computed:
            raise Killed
        replies = exchange(self, instruction, clients)
        if last:
            raise Killed
        return replies

    patch.setattr(module.CohortTransport, "exchange", dying)


@pytest.mark.parametrize("computed", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("select", ["alignment", "bilevel"])
def test_killed_in_any_phase_and_resumed_it_ends_as_if_nothing_had_happened(
    make_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, select: str, computed: bool
) -> None:
    options = (f"adapter.select={select}", "adapter.search_rounds=1", *KEPT_ADAM)
    whole = simulate(make_run(*options, out="whole"), Silent())
    path = Path(make_run(*options, out="killed").run.out)
    for phase in ("warmup", select, FINETUNE):
        with monkeypatch.context() as patch:
            die_in(patch, 0, phase, computed=computed)
            with pytest.raises(Killed):
                resume(path, Silent()) if path.exists() else simulate(make_run(*options, out="killed"), Silent())
    resume(path, Silent())
    assert_same(path, whole)


@pytest.mark.parametrize("number", [0, 1], ids=["in the first round after it", "later"])
@pytest.mark.parametrize("select", ["probe", "mask"])
def test_a_file_that_changes_after_the_choice_changes_nothing(
    make_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, select: str, number: int
) -> None:
    """The sites have been told, and the round is charged: there is one choice for a run."""
    contents = {"probe": ("a good film\nbad\n", "the plot was dull\nit is very long\n" * 9), "mask": (DENSE, QUERIES)}[
        select
    ]
    file = tmp_path / "file.txt"
    key = "probe_texts" if select == "probe" else "mask"
    options = (f"adapter.select={select}", f"adapter.{key}='{file}'", "adapter.ratio=0.3", "model.head=trained")
    file.write_text(contents[1])
    other = simulate(make_run(*options, out="other"), Silent())
    file.write_text(contents[0])
    whole = simulate(make_run(*options, out="whole"), Silent())
    assert result(whole)[1]["candidates"] != result(other)[1]["candidates"], "the files lead to different choices"
    config = make_run(*options, out="killed")
    with monkeypatch.context() as patch:
        die_in(patch, number, FINETUNE, computed=True)
        with pytest.raises(Killed):
            simulate(config, Silent())
    file.write_text(contents[1])
    resume(Path(config.run.out), Silent())
    assert_same(Path(config.run.out), whole)


class Norm:
    """An evaluation that tells one adapter from another."""

    headline, splits = "norm", ("validation",)

    def __call__(self, theta: torch.Tensor) -> dict[str, float]:
        return {"norm": float(theta.norm())}

    def of_sites(self, theta: torch.Tensor, sites: Any) -> dict[str, float]:
        return self(theta)

    def measured(self, sites: Any) -> str:
        return "global"


@pytest.mark.parametrize("rounds", [3, 4], ids=["the only one", "the first of two"])
def test_the_first_round_with_the_chosen_modules_is_asked_for_again_and_the_choice_stands(
    make_federation: Any, tmp_path: Path, rounds: int
) -> None:
    """Sites elsewhere have released it, and answer the very same words alike. They were told the choice, too."""
    federation = make_federation(
        *SHORT, "adapter.select=warmup", f"federation.rounds={rounds}", "federation.private_evaluation=true",
        "privacy.seeded_noise=false", f"run.out='{tmp_path / 'run'}'",
    )  # fmt: skip
    folder, told, given = RunFolder.create(federation.config), [], dict[str, list[Reply]]()

    class Cut:
        def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
            replies = given.get(instruction.digest) or federation.exchange(instruction, clients)
            given[instruction.digest] = replies
            if instruction.phase == FINETUNE and not told:
                told.append(instruction.mask)
                raise KeyboardInterrupt
            return replies

    with pytest.raises(RunInterrupted):
        run_server(federation.config, folder, federation.workbench, Cut(), (), Silent(), Norm())  # type: ignore[arg-type]
    run_server(federation.config, folder, build_workbench(federation.config), Cut(), (), Silent(), Norm())  # type: ignore[arg-type]
    record = json.loads(folder.record_file.read_text())
    assert tuple(row["selected"] for row in record["selection"]["candidates"]) == told[0]
    assert [line["phase"] for line in folder.read_rounds()] == (
        ["warmup"] * 2 + [FINETUNE] * (rounds - 2) + ["evaluation"]
    )
    assert record["private_evaluation"]["clients"] == 3
    exported = load_file(folder.adapter_folder / "adapter_model.safetensors")
    factors = [tensor for name, tensor in exported.items() if ".lora_B." in name]
    assert len(factors) == 6
    norm = torch.cat([tensor.flatten() for tensor in factors]).norm()
    assert record["metric"]["value"] == pytest.approx(float(norm)), "the metric is that of the adapter beside it"
