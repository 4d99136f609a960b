"""Flower's two apps on an in-process Grid: the real apps and messages. test_engine.py starts Flower's own engine."""

from __future__ import annotations

import json
import logging
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Error, Message, RecordDict

import clients.app
import clients.simulated
import server.app
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, FedloraError, RunFolderError
from fedlora.experiments.simulate import simulate
from fedlora.federation import cohort, wire
from server.app import app as server_app
from server.app import prepare
from tests.flower.local_grid import LocalGrid, Silent, context_of, forget, rounds, run, trained

pytestmark = pytest.mark.flower

SECRET = "the patient's name is in this sentence"


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """These nodes run in the test's process and not in Ray's; as real ones they would need policies."""
    monkeypatch.setattr(clients.app, "_in_simulation_engine", lambda: True)


@pytest.fixture(autouse=True)
def fresh_process() -> None:
    forget()
    clients.simulated._common.cache_clear()


def assert_same_adapter(ours: Path, theirs: Path) -> None:
    ours_b, theirs_b = (load_file(next((folder / "adapter").glob("adapter*.safetensors"))) for folder in (ours, theirs))
    assert ours_b.keys() == theirs_b.keys()
    for name, tensor in ours_b.items():
        torch.testing.assert_close(tensor, theirs_b[name], rtol=0, atol=1e-5)
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in ours_b.items())


KEPT_ADAM = ("model.head=trained", "training.optimizer=adam", "training.keep_state=true", "training.learning_rate=0.1")


EVALUATED = ("federation.private_evaluation=true", "data.heldout_share=0.3", "privacy.evaluation_noise_multiplier=2")


@pytest.mark.parametrize("overrides", [EVALUATED, KEPT_ADAM], ids=["prototype, evaluation", "trained, adam kept"])
@pytest.mark.parametrize("forgetful", [False, True], ids=["one process", "a process per message"])
def test_both_transports_end_with_the_same_adapter(
    config: RunConfig, tmp_path: Path, overrides: tuple[str, ...], forgetful: bool
) -> None:
    run_over_both(config.with_overrides(*overrides), tmp_path, forgetful=forgetful)


def run_over_both(
    config: RunConfig, folder: Path, *, forgetful: bool, workers: int | None = None
) -> tuple[LocalGrid, Path, Path]:
    """Flower's grid, and the run folders of its and of the cohort's transport, which ended alike."""
    grid = LocalGrid(config, workers)
    grid.forgetful = forgetful
    flower = run(config, grid)
    fused = simulate(config.with_overrides(f"run.out='{folder / 'cohort'}'"), Silent())
    assert_same_adapter(flower, fused)
    ours, theirs = (json.loads((folder / "record.json").read_text()) for folder in (flower, fused))
    for key in ("clients", "metric", "bytes_up", "bytes_down", "config_digest", "noise_seeded", "private_evaluation"):
        assert ours[key] == theirs[key], key
    return grid, flower, fused


SELECTED = {
    "alignment, adam kept": (
        "adapter.select=alignment", "adapter.alignment_records=40",
        "training.optimizer=adam", "training.keep_state=true", "training.learning_rate=0.1",
        "federation.private_evaluation=true",
    ),
    "bilevel, trained, shared": (
        "adapter.select=bilevel", "adapter.search_rounds=1", "model.head=trained", "adapter.sharing=type",
        "training.learning_rate=0.5",
    ),
    "warmup, one client a round": ("adapter.select=warmup", "federation.participation=0.3"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "forgetful"), [("bilevel, trained, shared", False), *((kind, True) for kind in SELECTED)]
)
def test_both_transports_choose_the_same_modules_and_end_with_the_same_adapter(
    config: RunConfig, tmp_path: Path, kind: str, forgetful: bool
) -> None:
    config = config.with_overrides("federation.rounds=5", *SELECTED[kind])
    grid, flower, fused = run_over_both(config, tmp_path, forgetful=forgetful)
    ours, theirs = (json.loads((folder / "record.json").read_text()) for folder in (flower, fused))
    assert choice(ours) == choice(theirs)
    assert 0 < sum(choice(ours).values()) < 12
    sent = [wire.decode_instruction(clients.app._instruction(message)) for message in trained(grid)]
    masks = {one.mask for one in sent if one.phase in ("finetune", "evaluation")}
    assert masks == {tuple(choice(ours).values())}, "one choice for the whole run and every node"
    assert {one.mask for one in sent if one.phase not in ("finetune", "evaluation")} == {None}
    assert [line["clients_failed"] for line in rounds(flower)] == [0] * len(rounds(flower))


def choice(record: dict[str, Any]) -> dict[str, bool]:
    return {row["module"]: row["selected"] for row in record["selection"]["candidates"]}


def test_a_choice_that_cannot_be_made_is_refused_before_any_node_is_asked(config: RunConfig) -> None:
    config = config.with_overrides("adapter.select=random", "adapter.ratio=0.1")
    grid = LocalGrid(config)
    with pytest.raises(ConfigError, match=r"adapter\.ratio = 0\.1 chooses none"):
        run(config, grid)
    assert grid.sent == []
    assert not Path(config.run.out).exists()


def test_partial_participation_asks_only_the_scheduled(config: RunConfig) -> None:
    grid = LocalGrid(config.with_overrides("federation.participation=0.4"))
    run(config.with_overrides("federation.participation=0.4"), grid)
    trained = [message.metadata.dst_node_id for message in grid.sent if message.metadata.message_type == "train"]
    assert len(trained) == 3 + 1 + 1


def test_a_client_that_cannot_take_part_is_counted_and_the_rest_go_on(
    config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    grid = LocalGrid(config)
    grid.contexts[1000 - 1].run_config["training.expected_batch_size"] = 200
    done = rounds(run(config, grid))
    assert [entry["clients_failed"] for entry in done] == [1, 1, 1]
    assert done[0]["failures"] == {"1": "bad_input"}
    assert "expected_batch_size = 200, but client 1 has 80 records" in caplog.text, "the site's own log says why"


def test_when_all_clients_fail_so_does_the_run(config: RunConfig) -> None:
    grid = LocalGrid(config)
    for context in grid.contexts.values():
        context.run_config["adapter.rank"] = 3
    with pytest.raises(FedloraError, match="none of 3 clients answered usably"):
        run(config.with_overrides("model.head=frozen"), grid)
    assert not (Path(config.run.out) / "record.json").exists()


def test_instructions_that_no_site_would_take_are_refused_before_any_is_sent(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folding = config.with_overrides("adapter.method=fedex", "model.dtype=float32")
    lean = prepare(folding.with_overrides("adapter.method=lora"))
    added = prepare(folding).folded.size
    monkeypatch.setattr(server.app, "LARGEST_PAYLOAD", 2**20 + 4 * (lean.layout.size + added) - 1)
    prepare(folding.with_overrides("adapter.method=lora"))
    grid = LocalGrid(config)
    with pytest.raises(ConfigError, match=r"has 1 MB and a site takes 1 at most; adapt fewer modules"):
        run(folding, grid)
    assert not grid.sent


class RustPanic(BaseException):
    """As pyo3 raises them."""


@pytest.mark.parametrize("kind", [ValueError, RustPanic, SystemExit])
def test_no_text_of_an_exception_leaves_the_site(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise kind(SECRET)

    monkeypatch.setattr(cohort, "class_sums", broken)
    replies: list[Message] = []

    def record(_: int, answer: Message) -> Message:
        replies.append(answer)
        return answer

    grid = LocalGrid(config)
    grid.tamper = record
    with caplog.at_level(logging.DEBUG), pytest.raises(FedloraError, match=r"\(internal\)"):
        run(config, grid)
    failures = [reply.content["failure"] for reply in replies if "failure" in reply.content]
    assert [dict(failure) for failure in failures] == [{"code": "internal"}] * 3
    assert not any(reply.has_error() for reply in replies)
    assert SECRET.encode() not in pickle.dumps(replies)
    assert kind.__name__ in caplog.text
    assert "in broken" in caplog.text, "the site's log has the place"
    assert SECRET not in caplog.text


@pytest.mark.parametrize("forgetful", [False, True], ids=["one process", "a process per message"])
def test_a_round_is_done_once_whichever_process_is_asked_again(config: RunConfig, forgetful: bool) -> None:
    grid = LocalGrid(config)
    run(config, grid)
    grid.forgetful = forgetful
    for message in [message for message in grid.sent if message.metadata.message_type == "train"]:
        assert dict(grid.deliver(message).content["failure"]) == {"code": "over"}


def test_a_round_that_failed_half_way_is_spent(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError

    grid = LocalGrid(config)
    grid.forgetful = True
    with monkeypatch.context() as patch:
        patch.setattr(cohort, "class_sums", broken)
        with pytest.raises(FedloraError):
            run(config, grid)
    message = next(message for message in grid.sent if message.metadata.message_type == "train")
    assert dict(grid.deliver(message).content["failure"]) == {"code": "over"}


def _failing(code: object) -> Callable[[Message], RecordDict]:
    return lambda answer: RecordDict({"failure": ConfigRecord({"code": code})})  # type: ignore[dict-item]


TAMPERED: dict[str, tuple[Callable[[Message], RecordDict], str]] = {
    "nothing": (lambda answer: RecordDict(), "protocol"),
    "own code": (_failing(SECRET), "protocol"),
    "list as code": (_failing([SECRET]), "protocol"),
    "no code": (lambda answer: RecordDict({"failure": ConfigRecord()}), "protocol"),
    "known code": (_failing("refused"), "refused"),
    "text for an update": (lambda answer: RecordDict({"update": ConfigRecord({"bytes": "none"})}), "protocol"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_hostile_answer_is_a_failure_of_that_client_only(config: RunConfig, name: str) -> None:
    forge, code = TAMPERED[name]

    def tamper(client: int, answer: Message) -> Message:
        if client == 2 and answer.metadata.message_type == "train":
            answer.content = forge(answer)
        return answer

    grid = LocalGrid(config)
    grid.tamper = tamper
    assert [entry["failures"] for entry in rounds(run(config, grid))] == [{"2": code}] * 3


def test_a_node_speaks_for_its_own_client_only(config: RunConfig) -> None:
    stolen: dict[str, RecordDict] = {}

    def tamper(client: int, answer: Message) -> Message:
        if answer.metadata.message_type == "train" and client == 0:
            stolen["update"] = answer.content
        elif answer.metadata.message_type == "train" and client == 1:
            answer.content = stolen["update"]
        return answer

    grid = LocalGrid(config)
    grid.tamper = tamper
    assert rounds(run(config, grid))[0]["failures"] == {"1": "protocol"}


def test_an_error_of_flower_is_no_reply(config: RunConfig) -> None:
    def tamper(client: int, answer: Message) -> Message:
        if client == 0 and answer.metadata.message_type == "train":
            return Message(Error(code=0, reason=SECRET), reply_to=_instruction(grid, client))
        return answer

    grid = LocalGrid(config)
    grid.tamper = tamper
    folder = run(config, grid)
    assert rounds(folder)[0]["failures"] == {"0": "no_reply"}
    assert not any(SECRET in path.read_text(errors="replace") for path in folder.rglob("*.json*"))


def _instruction(grid: LocalGrid, client: int) -> Message:
    return next(message for message in reversed(grid.sent) if message.metadata.dst_node_id == 1000 - client)


def test_the_wait_for_nodes_ends(config: RunConfig) -> None:
    grid = LocalGrid(config)
    grid.silent = {1}
    start = time.monotonic()
    with pytest.raises(FedloraError, match=r"2 of 3 clients joined within 0\.2 s, missing 1"):
        run(config.with_overrides("federation.minimum_clients=3"), grid)
    assert time.monotonic() - start < 30


def test_a_node_without_a_partition_id_does_not_join(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    grid = LocalGrid(config)
    grid.contexts[1000].node_config.clear()
    with pytest.raises(FedloraError, match="missing 0; nodes answered bad_input"):
        run(config.with_overrides("federation.minimum_clients=3"), grid)
    assert "partition-id is None, wanted a number below federation.clients = 3" in caplog.text


def test_a_federation_with_too_few_nodes_is_not_waited_for(config: RunConfig) -> None:
    grid = LocalGrid(config)
    grid.contexts[1000].node_config["num-partitions"] = 2
    with pytest.raises(FedloraError, match=r"has 2 nodes, but federation\.clients = 3"):
        run(config.with_overrides("federation.join_deadline=60"), grid)


def test_two_nodes_cannot_be_one_client(config: RunConfig) -> None:
    grid = LocalGrid(config)
    grid.contexts[1000].node_config["partition-id"] = 1
    with pytest.raises(FedloraError, match="two nodes have partition-id 1"):
        run(config, grid)


def test_a_node_that_runs_other_code_ends_the_run(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients.simulated, "code_digest", lambda: "other")
    with pytest.raises(FedloraError, match="another version of fedlora"):
        run(config, LocalGrid(config))


def test_flower_runs_the_server_app_with_its_own_folder(config: RunConfig) -> None:
    context = context_of(0, config, config.federation.clients)
    server_app(LocalGrid(config), context)
    record = json.loads((Path(config.run.out) / "record.json").read_text())
    assert record["config"]["run"]["transport"] == "flower"
    with pytest.raises(RunFolderError, match="has ended"):
        server_app(LocalGrid(config), context)
