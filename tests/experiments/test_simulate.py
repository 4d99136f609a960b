"""Whole runs on tiny random models: what they leave behind, and that stopping them anywhere changes nothing."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedlora
from fedlora.config import RunConfig
from fedlora.data.glue import load_records
from fedlora.errors import BudgetRefused, RunFolderError, RunInterrupted
from fedlora.experiments import simulate as module
from fedlora.experiments.progress import print_result
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.simulate import resume, simulate
from fedlora.federation.shelf import Shelf
from fedlora.privacy.ledger import Ledger
from fedlora.randomness import PublicSeed

MakeRun = Callable[..., RunConfig]
# `fedlora`, also where the shell that started us ignores interrupts, as it does for background jobs.
START = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from fedlora.cli import main; main()"


class Silent:
    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None: ...

    def round(self, report: Any) -> None: ...

    def finish(self, record: Any) -> None: ...


@pytest.fixture
def make_run(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> MakeRun:
    """`make_run("section.key=value", …)`: a seeded run with prototypes, stateful clients and a varying cohort."""

    def make(*overrides: str, out: str = "run") -> RunConfig:
        return tiny_config(
            "model.head=prototype",
            "federation.participation=0.67",
            "training.optimizer=momentum",
            "training.keep_state=true",
            "training.learning_rate=0.02",
            "privacy.accountant=rdp",
            *overrides,
            f"run.out='{tmp_path / out}'",
        )

    return make


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def result(path: Path) -> tuple[dict[str, str], list[dict[str, Any]], dict[str, Any]]:
    """What two runs of one config have in common: adapter, rounds and record, without times and places."""
    adapter = {file.name: sha256(file.read_bytes()).hexdigest() for file in path.glob("adapter/*.safetensors")}
    rounds = [{**entry, "seconds": 0} for entry in RunFolder(path).read_rounds()]
    record = json.loads((path / "record.json").read_text())
    record["config"]["run"]["out"] = record["started"] = record["wall_seconds"] = record["peak_memory_bytes"] = None
    record["privacy"]["ledger"] = record["privacy"]["resumed"] = None
    for site in record["privacy"]["sites"]:  # a round that died with its process stays charged
        site["rounds_charged"] = site["epsilon_charged"] = None
    return adapter, rounds, record


def test_a_finished_folder_holds_what_is_promised_and_nothing_else(make_run: MakeRun) -> None:
    config = make_run()
    path = simulate(config, Silent())
    assert path == Path(config.run.out)
    assert {entry.name for entry in path.iterdir()} == {
        "config.toml",
        "rounds.jsonl",
        "record.json",
        "adapter",
        "curve.png",
        "ledger.sqlite",
        "PRIVACY.md",
    }
    assert {entry["round"] for entry in RunFolder(path).read_rounds()} == {0, 1, 2, 3}
    assert RunConfig.from_toml(path / "config.toml") == module.resolve(config)


def test_rounds_have_the_promised_keys_and_add_up_to_the_record(make_run: MakeRun) -> None:
    path = simulate(make_run(), Silent())
    record = json.loads((path / "record.json").read_text())
    rounds = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    promised = {"round", "metric", "epsilon_max", "bytes_up", "bytes_down", "seconds", "clients_ok", "clients_failed"}
    assert all(promised <= entry.keys() for entry in rounds)
    for key in ("bytes_up", "bytes_down"):
        assert sum(entry[key] for entry in rounds) == record[key] > 0
    assert rounds[-1]["metric"] == record["metric"]["value"]
    assert rounds[-1]["epsilon_max"] == max(client["epsilon"] for client in record["clients"])
    spent = [entry["epsilon_max"] for entry in rounds]
    assert spent == sorted(spent)
    assert [entry["clients_ok"] for entry in rounds] == [3, 2, 2, 2]


def test_a_run_without_noise_says_so_in_every_file(make_run: MakeRun) -> None:
    path = simulate(make_run("privacy.epsilon=inf", "privacy.seeded_noise=false"), Silent())
    for name in ("record.json", "rounds.jsonl"):
        for line in (path / name).read_text().splitlines() if name == "rounds.jsonl" else [(path / name).read_text()]:
            json.loads(line, parse_constant=pytest.fail)  # no Infinity, which is no JSON
    record = json.loads((path / "record.json").read_text())
    assert record["private"] is False
    assert record["config"]["privacy"]["epsilon"] == "inf"
    assert {client["epsilon"] for client in record["clients"]} == {"inf"}
    assert {entry["epsilon_max"] for entry in RunFolder(path).read_rounds()} == {"inf"}
    assert RunConfig.from_toml(path / "config.toml").private is False


def test_the_same_seeds_give_the_same_bits_and_other_noise_other_ones(make_run: MakeRun) -> None:
    one, same = (simulate(make_run(out=name), Silent()) for name in ("one", "same"))
    assert result(one) == result(same)
    other = simulate(make_run("privacy.seeded_noise=false", out="other"), Silent())
    assert result(other)[0]["adapter_model.safetensors"] != result(one)[0]["adapter_model.safetensors"]


def test_the_adapter_is_ready_for_fedlora_and_for_plain_peft(make_run: MakeRun, tiny_model: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    path = simulate(make_run(), Silent())
    classifier = fedlora.load(path)
    assert classifier.predict(["a good film"])[0] in ("negative", "positive")
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model("bert")), str(path / "adapter"))
    trained = [value for name, value in plain.named_parameters() if "lora_B" in name]
    assert trained
    assert all(value.abs().sum() > 0 for value in trained)
    batch = classifier.classifier.tokenizer(["a good film", "the plot was dull"], padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = plain(**batch).last_hidden_state
        ours = classifier.classifier.network(**batch).last_hidden_state
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_where_each_site_keeps_a_part_its_own_model_is_measured_and_said_to_be(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run("adapter.method=fedsa", "privacy.epsilon=inf", "training.learning_rate=2.0")
    path = simulate(config, Silent())
    record = json.loads((path / "record.json").read_text())
    seed = PublicSeed.from_int(config.run.seed)
    public, right = load_records("sst2", "generated", "validation", generated_records=240, seed=seed), []
    for client in range(3):
        own = path / "personal" / f"client-{client}"
        assert f"client-{client}'s own" in (own / "README.md").read_text()
        ranked = fedlora.load(own).logits(*public.texts).argmax(dim=1)
        right.append(np.mean(ranked.numpy() == public.labels))
    assert record["metric"]["of"] == "own"
    assert record["metric"]["value"] == pytest.approx(np.mean(right), abs=0.01)
    print_result(path)
    shown = capsys.readouterr().out
    for text in (shown, (path / "adapter" / "README.md").read_text()):
        assert "the mean over the sites' own models" in text
    assert "personal/client-0" in shown
    assert "each site keeps its own B." in (path / "PRIVACY.md").read_text()


# --- stopping and going on -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run at once, as `kill -9` does: nothing in fedlora catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *, before: bool) -> None:
    """The `call`-th call of `owner.name` is the last thing that happens, or does not happen any more."""
    genuine, calls = getattr(owner, name), iter(range(call + 1))

    def dying(*arguments: Any, **how: Any) -> Any:
        last = next(calls) == call
        if last and before:
            raise Killed
        answer = genuine(*arguments, **how)
        if last:
            raise Killed
        return answer

    monkeypatch.setattr(owner, name, dying)


MOMENTS = {
    "the first report": (RunFolder, "append_round", 0),
    "a later report": (RunFolder, "append_round", 2),
    "the checkpoint before any round": (module, "save_checkpoint", 0),
    "the first round's checkpoint": (module, "save_checkpoint", 1),
    "the last checkpoint": (module, "save_checkpoint", 4),
    "the replacement of a checkpoint": (Path, "replace", 4),
    "the export": (module, "export_adapter", 0),
    "the curve": (module, "plot_curve", 0),
    "the record": (RunFolder, "write_record", 0),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_and_resumed_it_ends_as_if_nothing_had_happened(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, moment: str, before: bool
) -> None:
    whole = simulate(make_run(out="whole"), Silent())
    config = make_run(out="killed")
    owner, name, call = MOMENTS[moment]
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call, before=before)
        with pytest.raises(Killed):
            simulate(config, Silent())
    path = Path(config.run.out)
    if RunFolder(path).record_file.exists():
        with pytest.raises(RunFolderError, match="has ended"):
            resume(path, Silent())
    else:
        resume(path, Silent())
    assert result(path) == result(whole)
    assert not [*path.glob("*.partial")]


def test_a_run_interrupted_in_every_round_ends_as_if_nothing_had_happened(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = simulate(make_run(out="whole"), Silent())
    config = make_run(out="stopped")
    exchange, asked = module.CohortTransport.exchange, iter(range(100))

    def interrupted(self: Any, *arguments: Any) -> Any:
        replies = exchange(self, *arguments)
        if next(asked) % 2 == 0:
            raise KeyboardInterrupt  # computed, and on its way to the server
        return replies

    monkeypatch.setattr(module.CohortTransport, "exchange", interrupted)
    for done in range(4):
        with pytest.raises(RunInterrupted, match=rf"rounds done: {done}; fedlora simulate --resume .*stopped goes on"):
            simulate(config, Silent()) if done == 0 else resume(Path(config.run.out), Silent())
    resume(Path(config.run.out), Silent())
    assert result(Path(config.run.out)) == result(whole)


@pytest.fixture
def stopped(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run killed in its third round."""
    config = make_run()
    with monkeypatch.context() as patch:
        kill_at(patch, RunFolder, "append_round", 2, before=True)
        with pytest.raises(Killed):
            simulate(config, Silent())
    return RunFolder(Path(config.run.out))


def test_a_run_is_not_resumed_under_another_config(stopped: RunFolder) -> None:
    """Its record would claim an ε under which its first rounds did not run."""
    genuine = stopped.config_file.read_text()
    stopped.config_file.write_text(genuine.replace("epsilon = 6.0", "epsilon = 1.0"))
    before = contents(stopped.path)
    with pytest.raises(RunFolderError, match="not the one that the run began with"):
        resume(stopped.path, Silent())
    assert contents(stopped.path) == before
    stopped.config_file.write_text(genuine)
    resume(stopped.path, Silent())


@pytest.mark.parametrize("damage", ["lost", "cut short", "one bit"])
def test_a_damaged_checkpoint_is_refused_and_nothing_is_touched(stopped: RunFolder, damage: str) -> None:
    data = bytearray(stopped.checkpoint_file.read_bytes())
    if damage == "lost":
        stopped.checkpoint_file.unlink()
    else:
        data[-1] ^= 1
        stopped.checkpoint_file.write_bytes(data if damage == "one bit" else data[: len(data) // 2])
    before = contents(stopped.path)
    with pytest.raises(RunFolderError, match="cannot resume"):
        resume(stopped.path, Silent())
    assert contents(stopped.path) == before


def test_a_run_that_another_process_does_is_left_alone(stopped: RunFolder) -> None:
    script = "import sys, pathlib; from fedlora.experiments.run_folder import RunFolder\n"
    script += "with RunFolder(pathlib.Path(sys.argv[1])).claimed(): print('claimed', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(stopped.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        with pytest.raises(RunFolderError, match="another process is at work"):
            resume(stopped.path, Silent())
        other.kill()
    resume(stopped.path, Silent())


def test_a_refused_budget_leaves_no_folder(make_run: MakeRun) -> None:
    config = make_run("privacy.epsilon=0.05")
    with pytest.raises(BudgetRefused):
        simulate(config, Silent())
    assert not Path(config.run.out).exists()


def wait_for_rounds(folder: RunFolder, count: int) -> None:
    """Until `count` more rounds are done, or the patience is."""
    end, already = time.monotonic() + 30, len(folder.read_rounds())
    while len(folder.read_rounds()) < already + count and time.monotonic() < end:
        time.sleep(0.005)


def test_ctrl_c_ends_the_real_command_with_one_line_and_it_can_be_resumed(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run("federation.rounds=12", "federation.local_steps=60")
    recipe, folder = tmp_path / "recipe.toml", RunFolder(Path(config.run.out))
    recipe.write_text(config.to_toml())

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", START, "simulate", *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with start(recipe) as run:
        wait_for_rounds(folder, 2)
        time.sleep(0.05)  # into the middle of the next round
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert re.fullmatch(
        rf"fedlora: interrupted, rounds done: \d+; fedlora simulate --resume {folder.path} goes on\n", err
    )
    assert "\x1b" not in out

    with start("--resume", folder.path) as run:
        out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (0, ""), "and libraries say nothing"
    assert "no guarantee: noise seeded, not private" in out
    assert [entry["round"] for entry in folder.read_rounds()] == list(range(13))


def _go_on(config: RunConfig) -> None:
    path = Path(config.run.out)
    if path.exists():
        resume(path, Silent())
    else:
        simulate(config, Silent())


@pytest.mark.parametrize("select", ["none", pytest.param("alignment", marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_loses_no_round_and_no_bit(make_run: MakeRun, select: str) -> None:
    """With a choice of modules in the middle of where it is killed, or without."""
    settings = ("federation.rounds=60", "federation.local_steps=4", f"adapter.select={select}")
    whole = simulate(make_run(*settings, out="whole"), Silent())
    config = make_run(*settings)
    folder, draw = RunFolder(Path(config.run.out)), random.Random(0)
    context = multiprocessing.get_context("forkserver")  # torch is imported once, not by every process
    context.set_forkserver_preload(["fedlora.experiments.simulate", "transformers"])
    for _ in range(3):
        process = context.Process(target=_go_on, args=(config,))
        process.start()
        wait_for_rounds(folder, draw.randint(1, 6))
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    resume(folder.path, Silent())
    assert [entry["round"] for entry in folder.read_rounds()] == list(range(61 if select == "none" else 62))
    (*ours, record), (*theirs, wanted) = result(folder.path), result(whole)
    assert ours == theirs
    assert record["selection"] == wanted["selection"]
    assert [path.name for path in folder.path.glob("ledger*")] == ["ledger.sqlite"], "no journal is left"


class _Elsewhere:
    """Sites in another process: they answer, the same to the same question, and the server dies before it notes it."""

    def __init__(self, config: RunConfig, dies_at: int | None, given: dict[str, Any]) -> None:
        self.open = ExitStack()  # it would take the adapters off again where it is collected
        prepared = self.open.enter_context(module._prepared(config, None, Shelf()))
        self.inner = module.CohortTransport(
            workbench=prepared.workbench,
            dataset=prepared.dataset,
            sites=prepared.sites,
            ledger=Ledger.open(Path(config.run.out).with_name("elsewhere.sqlite")),
        )
        self.dies_at, self.given = dies_at, given
        self.asked: list[int] = []

    def exchange(self, instruction: Any, clients: tuple[int, ...]) -> Any:
        self.asked.append(instruction.round_index)
        if instruction.digest not in self.given:
            self.given[instruction.digest] = self.inner.exchange(instruction, clients)
        if instruction.round_index == self.dies_at:
            raise Killed
        return self.given[instruction.digest]


def _serve(config: RunConfig, folder: RunFolder, dies_at: int | None, given: dict[str, Any]) -> _Elsewhere:
    transport = _Elsewhere(config, dies_at, given)
    module.run_server(config, folder, transport.inner.workbench, transport, (), Silent())
    return transport


@pytest.mark.parametrize("dies_at", [0, 2])
def test_a_round_that_sites_elsewhere_have_answered_is_asked_for_in_the_very_same_words(
    make_run: MakeRun, dies_at: int
) -> None:
    """In other words they would have to do it again with other noise: two releases, and one in the record."""
    config = make_run("privacy.seeded_noise=false", "federation.participation=1.0", "training.keep_state=false")
    folder, given = RunFolder.create(config), dict[str, Any]()
    with pytest.raises(Killed):
        _serve(config, folder, dies_at, given)
    asked = _serve(config, folder, None, given).asked
    assert asked == list(range(dies_at, 4))
    assert len(given) == 4
    assert [entry["round"] for entry in folder.read_rounds()] == [0, 1, 2, 3]
    record = json.loads(folder.record_file.read_text())
    assert {client["num_steps"] for client in record["clients"]} == {3 * config.federation.local_steps}
    assert not folder.asked_file.exists()
