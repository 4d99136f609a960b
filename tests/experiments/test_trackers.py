"""Trackers are told public facts, go on in the run they began, and whatever happens to them never reaches the run."""

from __future__ import annotations

import http.client
import inspect
import json
import math
import re
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedlora.cli import main
from fedlora.config import RunConfig
from fedlora.engine.confusion import PrivateEvaluation
from fedlora.errors import ConfigError
from fedlora.experiments.simulate import resume, simulate
from fedlora.experiments.trackers import TRACKERS, open_trackers
from fedlora.experiments.trackers.prometheus import Prometheus, trackers_from
from fedlora.experiments.trackers.tracker import Tracked, earlier_run, numbers_of, remember_run
from fedlora.federation.server import RoundReport


def report(number: int = 0, **changes: Any) -> RoundReport:
    known: dict[str, Any] = {
        "round": number,
        "phase": "finetune",
        "metric": 0.5,
        "metrics": {"accuracy": 0.5, "f1": 0.25},
        "epsilon_max": 1.5,
        "noise_seeded": False,
        "bytes_up": 10,
        "bytes_down": 20,
        "seconds": 1.25,
        "clients_ok": 3,
        "clients_failed": 0,
        "failures": {},
    }
    return RoundReport(**known | changes)


@dataclass
class Watcher:
    """A progress or a tracker that writes down what it is told and fails where it is asked to."""

    name: str = "watcher"
    fails_at: str = ""
    error: BaseException = field(default_factory=lambda: OSError(28, "No space left on device"))
    told: list[str] = field(default_factory=list)

    def _hear(self, what: str) -> None:
        self.told.append(what)
        if what.startswith(self.fails_at) and self.fails_at:
            raise self.error

    def start(self, config: RunConfig, folder: Any = None, **how: Any) -> None:
        self._hear(f"start {how.get('first_round', how.get('done'))}")

    def round(self, report: RoundReport) -> None:
        self._hear(f"round {report.round}")

    def finish(self, record: Any) -> None:
        self._hear("finish")

    def close(self, *, whole: bool) -> None:
        self._hear(f"close {whole}")


def watch(tracked: Tracked, *, rounds: int = 2, ends: bool = True, done: int = 0) -> None:
    with tracked:
        tracked.start(RunConfig(), folder=Path(), metric="accuracy", num_rounds=rounds, done=done)
        for number in range(rounds):
            tracked.round(report(number))
        if ends:
            tracked.finish({})


WHOLE = ["start 0", "round 0", "round 1", "finish", "close True"]


def test_everyone_is_told_everything_in_order() -> None:
    progress, one, two = Watcher(), Watcher(), Watcher()
    watch(Tracked(progress, [one, two], pytest.fail))
    assert one.told == two.told == WHOLE
    assert progress.told == WHOLE[:-1], "the terminal closes itself"


@pytest.mark.parametrize("step", ["start", "round 1", "finish", "close"])
def test_a_tracker_that_fails_is_said_once_and_left_out(step: str) -> None:
    broken, sound, said = Watcher(name="broken", fails_at=step), Watcher(), []
    watch(Tracked(Watcher(), [broken, sound], said.append))
    assert sound.told == WHOLE
    assert broken.told == WHOLE[: next(n for n, what in enumerate(WHOLE) if what.startswith(step)) + 1]
    assert len(said) == 1
    assert "broken" in said[0]
    assert "No space left on device" in said[0]
    assert "\n" not in said[0]


def test_a_run_that_stops_is_closed_as_one_that_is_not_whole() -> None:
    tracker = Watcher()
    watch(Tracked(Watcher(), [tracker], pytest.fail), ends=False)
    assert tracker.told[-1] == "close False"


def test_a_tracker_that_was_never_started_is_not_closed() -> None:
    tracker = Watcher()
    with pytest.raises(ConfigError), Tracked(Watcher(), [tracker], pytest.fail):
        raise ConfigError("a setting is wrong")
    assert tracker.told == []


def test_ctrl_c_is_the_users_also_inside_a_tracker() -> None:
    tracker = Watcher(fails_at="round 1", error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        watch(Tracked(Watcher(), [tracker], pytest.fail))
    assert tracker.told[-1] == "close False"


def test_numbers_are_those_of_a_round_and_infinity_is_left_out() -> None:
    assert numbers_of(report()) == {
        "epsilon_max": 1.5,
        "bytes_up": 10.0,
        "bytes_down": 20.0,
        "seconds": 1.25,
        "clients_ok": 3.0,
        "clients_failed": 0.0,
        "accuracy": 0.5,
        "f1": 0.25,
    }
    assert "epsilon_max" not in numbers_of(report(epsilon_max=math.inf))
    assert "accuracy" not in numbers_of(report(metrics={}, metric=None))


def test_an_unknown_tracker_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown tracker --track tensorbord; did you mean tensorboard?"):
        open_trackers(["tensorbord"])


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_one_line_before_anything_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    for module in (f"fedlora.experiments.trackers.{name}", "torch.utils.tensorboard"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "argv", ["fedlora", "simulate", "--out", str(tmp_path / "run"), "--track", name])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr()
    assert ended.value.code == 2
    assert f"pip install 'fedlora[{name}]'" in said.err
    assert said.err.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


def test_flower_runs_are_not_tracked_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["simulate", "--transport", "flower", "--out", str(tmp_path / "run"), "--track", "tensorboard"]
    monkeypatch.setattr(sys, "argv", ["fedlora", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--track is for the cohort transport" in capfd.readouterr().err


def test_ids_are_remembered_beside_one_another(tmp_path: Path) -> None:
    assert earlier_run(tmp_path, "mlflow") is None
    remember_run(tmp_path, "mlflow", "1")
    remember_run(tmp_path, "wandb", "2")
    assert (earlier_run(tmp_path, "mlflow"), earlier_run(tmp_path, "wandb")) == ("1", "2")
    (tmp_path / "trackers.json").write_text("[")
    assert earlier_run(tmp_path, "mlflow") is None


class Stop(Exception):
    pass


@dataclass
class StopsAfter(Watcher):
    """A progress that ends the process' run after a round, as a crash would."""

    last: int = 1

    def round(self, report: RoundReport) -> None:
        if report.round == self.last:
            raise Stop


TinyConfig = Callable[..., RunConfig]


def tracked_twice(config: RunConfig, name: str) -> Path:
    """A run that died after its second round and was resumed, both times with the tracker."""
    with pytest.raises(Stop), Tracked(StopsAfter(), open_trackers([name]), pytest.fail) as progress:
        simulate(config, progress)
    with Tracked(Watcher(), open_trackers([name]), pytest.fail) as progress:
        return resume(Path(config.run.out), progress)


def test_tensorboard_has_every_round_of_a_resumed_run(tmp_path: Path, tiny_config: TinyConfig) -> None:
    folder = tracked_twice(tiny_config(f"run.out='{tmp_path}/run'", "privacy.seeded_noise=false"), "tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    shown = {event.step: event.value for event in events.Scalars("epsilon_max")}
    # Round 1 was done and is in the account; the process died before its tracker was told.
    assert shown == pytest.approx({line["round"]: line["epsilon_max"] for line in rounds if line["round"] != 1})
    assert [event.value for event in events.Scalars("accuracy")] == pytest.approx(
        [line["metrics"]["accuracy"] for line in rounds if line["round"] != 1]
    )
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert texts["guarantee/text_summary"].startswith("ε = ")
    assert "| federation.rounds | 3 |" in texts["settings/text_summary"]


def scraped(port: int) -> dict[str, float]:
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    line.request("GET", "/metrics")
    families = text_string_to_metric_families(line.getresponse().read().decode())
    line.close()
    samples = [sample for family in families for sample in family.samples]
    return {" ".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}


def test_prometheus_is_asked_for_by_the_environment() -> None:
    assert trackers_from({}) == []
    (tracker,) = trackers_from({"FEDLORA_METRICS": "127.0.0.1:9465"})
    assert tracker.name == "prometheus"
    with pytest.raises(ConfigError, match=r"FEDLORA_METRICS = 0\.0\.0\.0:9465, wanted a loopback address"):
        trackers_from({"FEDLORA_METRICS": "0.0.0.0:9465"})


def test_prometheus_tells_the_run_as_it_stands(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    tracker = Prometheus(f"127.0.0.1:{port}")
    tracker.start(RunConfig(), tmp_path / "run", first_round=3)
    before = scraped(port)
    tracker.round(report(3, failures={1: "no_reply"}, clients_ok=2, clients_failed=1))
    tracker.round(
        report(4, failures={1: "no_reply"}, metrics={}, metric=None, epsilon_max=math.inf, phase="evaluation")
    )
    after = scraped(port)
    tracker.finish({})
    done = scraped(port)
    tracker.close(whole=True)
    assert (before["fedlora_run_rounds_done"], before["fedlora_run_rounds_planned"]) == (3, 11)
    assert before["fedlora_run_state running"] == 1
    assert before["fedlora_run_epsilon_asked"] == 6
    apart = re.compile("fedlora_run_(info|state)|.*_created ")  # the last is when a counter began
    assert {name: value for name, value in after.items() if not apart.match(name)} == {
        "fedlora_run_rounds_planned": 11,
        "fedlora_run_rounds_done": 5,
        "fedlora_run_phase evaluation": 1,
        "fedlora_run_metric accuracy": 0.5,
        "fedlora_run_metric f1": 0.25,
        "fedlora_run_epsilon_asked": 6,
        "fedlora_run_epsilon_max": math.inf,
        "fedlora_run_clients ok": 3,
        "fedlora_run_clients failed": 0,
        "fedlora_run_failures_total no_reply": 2,
        "fedlora_run_bytes_total up": 20,
        "fedlora_run_bytes_total down": 40,
        "fedlora_run_round_seconds": 1.25,
    }
    assert done["fedlora_run_state done"] == 1
    with pytest.raises(ConnectionRefusedError):
        scraped(port)


def test_an_address_that_another_run_has_stops_no_run() -> None:
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        tracker, sound = Prometheus(f"127.0.0.1:{taken.getsockname()[1]}"), Watcher()
        watch(Tracked(Watcher(), [tracker, sound], said.append))
    assert sound.told == WHOLE
    assert len(said) == 1
    assert "cannot be listened on" in said[0]


@dataclass
class Calls:
    """Stands in for the packages: signatures are checked against the real ones where these are installed."""

    made: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def named(self, name: str) -> list[dict[str, Any]]:
        return [facts for called, facts in self.made if called == name]


def _importing(monkeypatch: pytest.MonkeyPatch, name: str, **modules: ModuleType) -> None:
    monkeypatch.delitem(sys.modules, f"fedlora.experiments.trackers.{name}", raising=False)
    for module, stand_in in modules.items():
        stand_in.__spec__ = ModuleSpec(module, None)  # others look whether it is there
        monkeypatch.setitem(sys.modules, module.replace("_", "."), stand_in)


@pytest.fixture
def mlflow_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    calls = Calls()

    class MlflowClient:
        def get_experiment_by_name(self, name: str) -> Any:
            calls.made.append(("get_experiment_by_name", {"name": name}))

        def create_experiment(self, name: str) -> str:
            calls.made.append(("create_experiment", {"name": name}))
            return "7"

        def create_run(self, experiment_id: str, run_name: str | None = None) -> Any:
            calls.made.append(("create_run", {"experiment_id": experiment_id, "run_name": run_name}))
            return SimpleNamespace(info=SimpleNamespace(run_id="run of mlflow"))

        def update_run(self, run_id: str, status: str | None = None) -> None:
            calls.made.append(("update_run", {"run_id": run_id, "status": status}))

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            calls.made.append(("log_batch", {"run_id": run_id, "metrics": metrics, "params": params}))

        def set_tag(self, run_id: str, key: str, value: Any) -> None:
            calls.made.append(("set_tag", {"run_id": run_id, "key": key, "value": value}))

        def log_dict(self, run_id: str, dictionary: dict[str, Any], artifact_file: str) -> None:
            calls.made.append(("log_dict", {"run_id": run_id, "dictionary": dictionary, "file": artifact_file}))

        def set_terminated(self, run_id: str, status: str | None = None) -> None:
            calls.made.append(("set_terminated", {"run_id": run_id, "status": status}))

    package, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    package.__dict__.update(MlflowClient=MlflowClient, entities=entities)
    entities.__dict__.update(
        Metric=lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step),
        Param=lambda key, value: SimpleNamespace(key=key, value=value),
    )
    _importing(monkeypatch, "mlflow", mlflow=package, mlflow_entities=entities)
    yield calls
    sys.modules.pop("fedlora.experiments.trackers.mlflow", None)


def test_mlflow_has_settings_rounds_and_record_in_one_run(
    tmp_path: Path, tiny_config: TinyConfig, mlflow_calls: Calls
) -> None:
    config = tiny_config(f"run.out='{tmp_path}/run'", f"data.partition_column='{'x' * 900}'")
    folder = tracked_twice(config, "mlflow")
    assert mlflow_calls.named("create_run") == [{"experiment_id": "7", "run_name": "run"}]
    assert mlflow_calls.named("update_run") == [{"run_id": "run of mlflow", "status": "RUNNING"}]
    batches = mlflow_calls.named("log_batch")
    params = {param.key: param.value for batch in batches for param in batch["params"]}
    assert params["privacy.epsilon"] == "6.0"
    assert set(params) == set(config.to_flower())
    assert max(len(batch["params"]) for batch in batches) <= 100
    assert max(map(len, params.values())) <= 500
    rounds = {metric.step: metric.value for batch in batches for metric in batch["metrics"] if metric.key == "bytes_up"}
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert rounds == {line["round"]: line["bytes_up"] for line in lines if line["round"] != 1}
    (kept,) = mlflow_calls.named("log_dict")
    assert kept["dictionary"] == json.loads((folder / "record.json").read_text())
    tags = {tag["key"]: tag["value"] for tag in mlflow_calls.named("set_tag")}
    assert tags == {"guarantee": "no guarantee: noise seeded, not private"}
    assert [end["status"] for end in mlflow_calls.named("set_terminated")] == ["KILLED", "FINISHED"]


@pytest.fixture
def wandb_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    calls = Calls()

    class Run:
        def __init__(self, run_id: str) -> None:
            self.id, self.summary = run_id, self

        def log(self, data: dict[str, Any], step: int | None = None) -> None:
            calls.made.append(("log", {"data": data, "step": step}))

        def update(self, summary: dict[str, Any]) -> None:
            calls.made.append(("summary", summary))

        def finish(self, exit_code: int | None = None) -> None:
            calls.made.append(("finish", {"exit_code": exit_code}))

    def init(**how: Any) -> Run:
        calls.made.append(("init", how))
        return Run(how["id"] or "run of wandb")

    package = ModuleType("wandb")
    package.__dict__.update(init=init, Settings=lambda **settings: settings)
    _importing(monkeypatch, "wandb", wandb=package)
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    yield calls
    sys.modules.pop("fedlora.experiments.trackers.wandb", None)


def test_wandb_is_offline_collects_nothing_itself_and_goes_on_under_one_id(
    tmp_path: Path, tiny_config: TinyConfig, wandb_calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(f"run.out='{tmp_path}/run'")
    folder = tracked_twice(config, "wandb")
    first, second = wandb_calls.named("init")
    assert (first["mode"], first["project"], first["dir"]) == ("offline", "fedlora", str(folder))
    assert (first["id"], first["resume"]) == (None, None)
    assert (second["id"], second["resume"]) == ("run of wandb", "allow")
    assert first["config"].keys() == config.to_flower().keys()
    collected = ("disable_git", "disable_code", "x_disable_stats", "x_disable_meta", "x_disable_machine_info")
    assert all(first["settings"][name] for name in collected)
    assert not any(first["settings"][name] for name in ("save_code", "x_save_requirements"))
    assert first["settings"]["console"] == "off"
    assert [entry["step"] for entry in wandb_calls.named("log")] == [0, 2]
    (summary,) = wandb_calls.named("summary")
    assert summary["guarantee"] == "no guarantee: noise seeded, not private"
    assert [end["exit_code"] for end in wandb_calls.named("finish")] == [1, 0]

    monkeypatch.setenv("WANDB_MODE", "online")
    (tracker,) = open_trackers(["wandb"])
    tracker.start(config, tmp_path, first_round=0)
    assert wandb_calls.named("init")[-1]["mode"] == "online"


def test_a_private_evaluation_is_shown_by_what_it_released() -> None:
    names = inspect.signature(PrivateEvaluation).parameters
    known = {"accuracy": 0.75, "standard_error": 0.125}
    found = PrivateEvaluation(**{name: known.get(name) for name in names})
    numbers = numbers_of(report(private_evaluation=found))
    assert {name: numbers[name] for name in numbers if name.startswith("private")} == {
        "private_accuracy": 0.75,
        "private_standard_error": 0.125,
    }


@pytest.mark.filterwarnings("default")  # of its database
def test_with_mlflow_itself(tmp_path: Path, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    folder = tracked_twice(tiny_config(f"run.out='{tmp_path}/run'"), "mlflow")
    client, run_id = mlflow.MlflowClient(), earlier_run(folder, "mlflow")
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run_id, "accuracy")] == [0, 2]


@pytest.mark.filterwarnings("default")
def test_with_wandb_itself(tmp_path: Path, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = tracked_twice(tiny_config(f"run.out='{tmp_path}/run'"), "wandb")
    run_id = earlier_run(folder, "wandb")
    assert len([*(folder / "wandb").glob(f"offline-run-*-{run_id}")]) == 2
