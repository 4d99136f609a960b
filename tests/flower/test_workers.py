"""Nodes of Flower's simulation engine that stand for many clients: the cohort's result, and nothing for real nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")
pytest.importorskip("ray")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

import clients.app
import clients.simulated
import server.transport
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, DataError, FedloraError
from fedlora.federation import cohort, wire
from fedlora.federation.cohort import Cohort
from simulations.flower import Machine, Workers
from tests.flower.local_grid import LocalGrid, forget, rounds, run, trained
from tests.flower.test_apps import fresh_process, run_over_both  # noqa: F401 a fixture

pytestmark = pytest.mark.flower


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients.app, "_in_simulation_engine", lambda: True)


@pytest.fixture
def five(config: RunConfig) -> RunConfig:
    """Five clients, three of them in a round of fine-tuning, whose optimisers remember."""
    return config.with_overrides(
        "federation.clients=5", "federation.rounds=3", "federation.participation=0.6", "data.generated_records=400",
        "training.keep_state=true", "training.optimizer=adam", "training.learning_rate=0.1",
    )  # fmt: skip


def asked(message: Message) -> list[int]:
    return list(message.content["asked"]["clients"])  # type: ignore[arg-type]


@pytest.mark.parametrize("forgetful", [False, True], ids=["one process", "a process per message"])
def test_two_workers_end_with_the_cohorts_adapter(
    five: RunConfig, tmp_path: Path, forgetful: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused: list[list[int]] = []
    whole = Cohort.run

    def watched(self: Cohort, instruction: Any) -> Any:
        fused.append([site.client for site in self.sites])
        return whole(self, instruction)

    monkeypatch.setattr(Cohort, "run", watched)
    grid, flower, _ = run_over_both(five, tmp_path, forgetful=forgetful, workers=2)
    sent = trained(grid)
    assert [asked(message) for message in sent] == fused[: len(sent)], "a message is one engine call"
    assert [asked(message) for message in sent[:2]] == [[0, 2, 4], [1, 3]]
    assert all({client % 2 for client in asked(one)} == {1000 - one.metadata.dst_node_id} for one in sent)
    each = [sum(len(asked(one)) for one in sent if one.metadata.group_id == str(number)) for number in range(4)]
    assert each == [5, 3, 3, 3]
    assert [line["clients_failed"] for line in rounds(flower)] == [0] * 4


def test_a_client_that_cannot_take_part_does_not_stop_the_others_of_its_worker(
    five: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_site = clients.simulated.make_site

    def broken(config: RunConfig, data: Any, schedule: Any, client: int) -> Any:
        if client == 2:
            raise DataError("too few records")
        return make_site(config, data, schedule, client)

    monkeypatch.setattr(clients.simulated, "make_site", broken)
    done = rounds(run(five, LocalGrid(five, 2)))
    assert done[0]["failures"] == {"2": "bad_input"}
    assert [line["clients_ok"] + line["clients_failed"] for line in done] == [5, 3, 3, 3]
    assert {code for line in done for code in line["failures"].values()} == {"bad_input"}
    assert "too few records" in caplog.text


def test_clients_of_one_worker_fail_together_once_they_have_begun_and_the_round_is_spent(
    five: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_sums = cohort.class_sums

    def broken(*arguments: Any) -> Any:
        if len(trained(grid)) == 1:
            raise ValueError
        return class_sums(*arguments)

    grid = LocalGrid(five, 2)
    grid.forgetful = True
    monkeypatch.setattr(cohort, "class_sums", broken)
    assert rounds(run(five, grid))[0]["failures"] == {"0": "internal", "2": "internal", "4": "internal"}
    again = grid.deliver(trained(grid)[0]).content
    assert {name: dict(told) for name, told in again.items()} == {  # type: ignore[call-overload]
        f"failure-{client}": {"code": "over"} for client in (0, 2, 4)
    }


def test_only_those_of_a_worker_are_asked_who_have_not_answered(
    five: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server was killed while it wrote down what a worker had answered; the engine went with it."""
    five = five.with_overrides("training.keep_state=false")
    keep, kept = server.transport.RoundAnswers.keep, []

    class Killed(BaseException):
        pass

    def killed(self: Any, update: Any, data: bytes) -> None:
        if len(kept) == 2:
            raise Killed
        kept.append(update.client)
        keep(self, update, data)

    with monkeypatch.context() as patch:
        patch.setattr(server.transport.RoundAnswers, "keep", killed)
        with pytest.raises(Killed):
            run(five, LocalGrid(five, 2))
    forget()
    grid = LocalGrid(five, 2)
    assert [line["clients_failed"] for line in rounds(run(five, grid))] == [0] * 4
    assert kept == [0, 2]
    assert sorted(asked(message) for message in trained(grid)[:2]) == [[1, 3], [4]]


def test_an_engine_in_our_own_hands_is_not_asked_again_while_it_computes(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would begin the same round once more, in another process, which knows nothing of the first."""
    monkeypatch.setattr(server.app, "ASK_SILENT_AGAIN", 0.0)
    for workers, again in ((None, True), (3, False)):
        chosen = config.with_overrides(f"run.out='{config.run.out}-{workers}'", "federation.round_deadline=1")
        grid = LocalGrid(chosen, workers)

        def lose(client: int, answer: Message, grid: LocalGrid = grid) -> Message:
            if client == 1 and trained(grid):
                grid.silent = {1}
            return answer

        grid.tamper = lose
        run(chosen, grid)
        to_silent = [one for one in trained(grid) if one.metadata.dst_node_id == 999 and one.metadata.group_id == "1"]
        assert (len(to_silent) > 1) == again


def _several(answer: Message) -> RecordDict:
    """The update of the node's own client, and another in the name of the next one, as a worker would send them."""
    update = wire.decode_update(bytes(answer.content["update"]["bytes"].data))  # type: ignore[union-attr]
    facts = {**update.facts, "client": 2}
    forged = wire.encode_update(type(update)(**{**vars(update), "client": 2, "facts": facts}))
    stolen = ArrayRecord({"bytes": Array("uint8", (len(forged),), "bytes", forged)})
    return RecordDict({"update-1": answer.content["update"], "update-2": stolen})


def _shared(answer: Message) -> RecordDict:
    """Joins as one of two nodes that share all clients."""
    return RecordDict({"enrolment": ConfigRecord({**answer.content["enrolment"], "clients": [1, 2]})})


@pytest.mark.parametrize("kind", ["answers for two", "joins for two"])
def test_where_nodes_are_not_our_own_each_is_one_client(config: RunConfig, kind: str) -> None:
    """`workers` is the server's to say; what a node claims has no place to be said in."""
    grid = LocalGrid(config)
    grid.silent = {2}

    def tamper(client: int, answer: Message) -> Message:
        if client == 1 and answer.metadata.message_type == "train" and kind == "answers for two":
            answer.content = _several(answer)
        if client == 1 and answer.metadata.message_type == "query" and kind == "joins for two":
            answer.content = _shared(answer)
        return answer

    grid.tamper = tamper
    done = rounds(run(config, grid))
    mine = {"1": "protocol"} if kind == "answers for two" else {}
    assert [line["failures"] for line in done] == [mine | {"2": "no_reply"}] * 3
    assert not any("asked" in message.content for message in grid.sent)


def test_nodes_that_are_fewer_than_the_clients_are_refused_where_they_are_not_our_own(config: RunConfig) -> None:
    grid = LocalGrid(config, 2)
    grid.workers = None
    with pytest.raises(FedloraError, match=r"has 2 nodes, but federation\.clients = 3"):
        run(config, grid)


def test_a_worker_speaks_for_its_own_clients_only(five: RunConfig) -> None:
    def tamper(node: int, answer: Message) -> Message:
        if node == 0 and "update-4" in answer.content:
            answer.content["update-1"] = answer.content["update-2"] = answer.content["update-4"]
        return answer

    grid = LocalGrid(five, 2)
    grid.tamper = tamper
    assert rounds(run(five, grid))[0]["failures"] == {"2": "protocol"}


def test_a_courier_does_not_look_at_who_else_is_asked(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = LocalGrid(config)
    run(config, grid)
    message = trained(grid)[0]
    message.content["asked"] = ConfigRecord({"clients": [0, 1, 2]})
    monkeypatch.setattr(clients.app, "_in_simulation_engine", lambda: False)
    assert dict(grid.deliver(message).content["failure"]) == {"code": "bad_input"}, "it names no site"
    grid.contexts[1000].node_config["site"] = "/nowhere/site.sock"
    for engine in (False, True):
        monkeypatch.setattr(clients.app, "_in_simulation_engine", lambda engine=engine: engine)
        told = grid.deliver(message).content
        assert {name: dict(told[name]) for name in told} == {"failure": {"code": "unavailable"}}  # type: ignore[call-overload]


def workers_on(*machines: Machine, clients: int = 10, workers: int | str = "auto", device: str = "cpu") -> Workers:
    tables = {"federation": {"clients": clients}, "run": {"workers": workers, "device": device}}
    return Workers.on(machines, RunConfig.from_mapping(tables))


Case = Callable[[], Workers]
FOUR, GPUS = Machine(cpus=4), Machine(cpus=16, gpus=4)


@pytest.mark.parametrize(
    ("case", "number", "actors", "cpus", "gpus"),
    [
        (lambda: workers_on(FOUR, workers=2), 2, 2, 2, 0),
        (lambda: workers_on(FOUR, workers=10), 10, 4, 1, 0),
        (lambda: workers_on(FOUR, workers=3), 3, 3, 1, 0),
        (lambda: workers_on(FOUR, workers=50, clients=2), 2, 2, 2, 0),
        (lambda: workers_on(GPUS, device="cuda"), 4, 4, 4, 1),
        (lambda: workers_on(GPUS, device="cuda", workers=10), 10, 4, 4, 1),
        (lambda: workers_on(GPUS, device="cuda", workers=1), 1, 1, 16, 1),
        (lambda: workers_on(Machine(cpus=2, gpus=4), device="cuda"), 4, 4, 1, 1),
        (lambda: workers_on(GPUS, FOUR, device="cuda"), 4, 4, 4, 1),
        (lambda: workers_on(FOUR, Machine(cpus=6), workers=2), 2, 2, 4, 0),
        (lambda: workers_on(FOUR, Machine(cpus=6), workers=4), 4, 4, 2, 0),
    ],
)
def test_workers_fit_on_their_machines(case: Case, number: int, actors: int, cpus: int, gpus: int) -> None:
    found = case()
    assert (found.number, found.actors, found.cpus, found.gpus) == (number, actors, cpus, gpus)


def test_a_device_that_no_machine_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.device = cuda, but Ray has no such device"):
        workers_on(FOUR, device="cuda")


def test_the_record_does_not_depend_on_who_shared_the_work(five: RunConfig) -> None:
    path = run(five.with_overrides("run.workers=2"), LocalGrid(five, 2))
    record = json.loads((path / "record.json").read_text())
    assert record["config_digest"] == five.digest()
