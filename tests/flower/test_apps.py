"""Flower's two apps on an in-process Grid: the real apps and messages. test_engine.py starts Flower's own engine."""

from __future__ import annotations

import json
import logging
import pickle
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

import clients.app
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, FedloraError, RunFolderError
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.simulate import run_server, simulate
from fedlora.federation import cohort, wire
from fedlora.models import locate_model
from fedlora.privacy.ledger import Ledger
from server.app import app as server_app
from server.app import connect
from server.transport import enrol

pytestmark = [pytest.mark.flower, pytest.mark.xdist_group("flower")]

RUN_ID = 7
SECRET = "the patient's name is in this sentence"


class LocalGrid(Grid):
    """Copies what Ray copies. Node ids are not in the order of clients; each node has its own context."""

    def __init__(self, config: RunConfig) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, 1
        self.contexts = {1000 - client: _context(client, config) for client in range(config.federation.clients)}
        self.forgetful = False
        """Whether every message meets a new process, which knows only what is in the context."""
        self.silent: set[int] = set()
        self.tamper: Callable[[int, Message], Message] = lambda client, answer: answer
        """What the node of a client makes of its answer."""
        self.sent: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        assert timeout is not None, "nothing may wait for ever"
        pushed = list(messages)
        assert len({id(message.content) for message in pushed}) == len(pushed), "every message needs its own record"
        self.sent += pushed
        return [self.deliver(message) for message in pushed if 1000 - message.metadata.dst_node_id not in self.silent]

    def deliver(self, message: Message) -> Message:
        if self.forgetful:
            forget()
        node = message.metadata.dst_node_id
        context = pickle.loads(pickle.dumps(self.contexts[node]))
        answer = clients.app.app(pickle.loads(pickle.dumps(message)), context)
        self.contexts[node] = context
        return self.tamper(1000 - node, answer)

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


def _context(client: int, config: RunConfig) -> Context:
    return Context(
        run_id=RUN_ID,
        node_id=1000 - client,
        node_config={"partition-id": client, "num-partitions": config.federation.clients},
        state=RecordDict(),
        run_config=dict(config.to_flower()),
    )


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """These nodes run in the test's process and not in Ray's; as real ones they would need policies."""
    monkeypatch.setattr(clients.app, "_in_simulation_engine", lambda: True)


class Silent:
    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None: ...

    def round(self, report: Any) -> None: ...

    def finish(self, record: Any) -> None: ...


@pytest.fixture
def config(tiny_model: Callable[..., Path], tmp_path: Path) -> RunConfig:
    """Three clients, a prototype round and two rounds of fine-tuning."""
    return RunConfig.from_mapping(
        {
            "model": {"name": str(tiny_model("bert")), "dtype": "float32", "attention": "eager"},
            "data": {"generated_records": 240, "max_length": 16},
            "federation": {"rounds": 2, "local_steps": 2},
            "training": {"expected_batch_size": 8},
            "privacy": {"seeded_noise": True, "accountant": "rdp", "delta": 1e-3},
            "engine": {"token_budget": 4096},
            "run": {"device": "cpu", "out": str(tmp_path / "flower")},
        }
    )


@pytest.fixture(autouse=True)
def fresh_process() -> None:
    forget()
    clients.app._simulated.cache_clear()


def forget() -> None:
    """What a new process has not."""
    clients.app._simulated_cohort.cache_clear()
    clients.app._own_cohort.cache_clear()


def run(config: RunConfig, grid: LocalGrid) -> Path:
    workbench, transport = connect(grid, config, nodes_deadline=0.2)
    folder = RunFolder.create(config)
    run_server(config, folder, workbench, transport, (), Silent())
    return folder.path


def rounds(folder: Path) -> list[dict[str, Any]]:
    return RunFolder(folder).read_rounds()


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


def run_over_both(config: RunConfig, folder: Path, *, forgetful: bool) -> tuple[LocalGrid, Path, Path]:
    """Flower's grid, and the run folders of its and of the cohort's transport, which ended alike."""
    grid = LocalGrid(config)
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
    sent = [wire.decode_instruction(clients.app._unpack(message)) for message in trained(grid)]
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
        assert dict(grid.deliver(message).content["failure"]) == {"code": "protocol"}


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
    assert dict(grid.deliver(message).content["failure"]) == {"code": "protocol"}


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
        run(config, grid)
    assert time.monotonic() - start < 30


def test_a_node_without_a_partition_id_does_not_join(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    grid = LocalGrid(config)
    grid.contexts[1000].node_config.clear()
    with pytest.raises(FedloraError, match="missing 0; nodes answered bad_input"):
        enrol(grid, 3, deadline=0.1)
    assert "partition-id is None, wanted 0 to 2" in caplog.text


def test_a_federation_with_too_few_nodes_is_not_waited_for(config: RunConfig) -> None:
    grid = LocalGrid(config)
    grid.contexts[1000].node_config["num-partitions"] = 2
    with pytest.raises(FedloraError, match=r"has 2 nodes, but federation\.clients = 3"):
        enrol(grid, 3, deadline=60.0)


def test_two_nodes_cannot_be_one_client(config: RunConfig) -> None:
    grid = LocalGrid(config)
    grid.contexts[1000].node_config["partition-id"] = 1
    with pytest.raises(FedloraError, match="two nodes have partition-id 1"):
        enrol(grid, 3, deadline=0.1)


def test_a_node_that_runs_other_code_ends_the_run(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients.app, "code_digest", lambda: "other")
    with pytest.raises(FedloraError, match="another version of fedlora"):
        enrol(LocalGrid(config), 3, deadline=0.1)


def test_flower_runs_the_server_app_with_its_own_folder(config: RunConfig) -> None:
    context = _context(0, config)
    server_app(LocalGrid(config), context)
    record = json.loads((Path(config.run.out) / "record.json").read_text())
    assert record["config"]["run"]["transport"] == "flower"
    with pytest.raises(RunFolderError, match="not empty"):
        server_app(LocalGrid(config), context)


# --- sites with a policy ---------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(config: RunConfig, tmp_path: Path) -> tuple[RunConfig, LocalGrid, list[Path]]:
    """Three nodes, each with its own records, policy and ledger; the run would have them look elsewhere."""
    config = config.with_overrides("privacy.seeded_noise=false", "privacy.accountant=pld")
    grid, folders = LocalGrid(config), [tmp_path / f"site{client}" for client in range(3)]
    model = config.model.name
    for client, folder in enumerate(folders):
        folder.mkdir()
        rows = {"sentence": [f"the plot was {'very ' * (n % 5)}good" for n in range(190 + client)]}
        rows["label"] = [n % 2 for n in range(190 + client)]
        pyarrow.parquet.write_table(pyarrow.table(rows), folder / "train.parquet")
        policy = f'[site]\ndevice = "cpu"\n[models]\n"{model}" = "{locate_model(model).digest}"\n'
        policy += "[limits]\nsmallest_noise_multiplier = 0.2\n"
        policy += '[data.ward]\ntask = "sst2"\nsource = "."\nmax_epsilon = 6.5\nmax_delta = 1e-3\n'
        (folder / "site.toml").write_text(policy)
        grid.contexts[1000 - client].node_config = {"partition-id": client, "policy": str(folder / "site.toml")}
        grid.contexts[1000 - client].run_config |= {"data.source": "/nowhere/at/all", "run.device": "cuda:99"}
    return config, grid, folders


def charges(folder: Path) -> list[tuple[int | None, str]]:
    return [(row.round, row.kind) for row in Ledger.open(folder / "ledger.sqlite").entries()]


def trained(grid: LocalGrid) -> list[Message]:
    return [message for message in grid.sent if message.metadata.message_type == "train"]


@pytest.mark.parametrize("forgetful", [False, True], ids=["one process", "a process per message"])
def test_a_site_charges_its_own_ledger_and_trains_on_its_own_records(guarded: Any, forgetful: bool) -> None:
    config, grid, folders = guarded
    grid.forgetful = forgetful
    record = json.loads((run(config, grid) / "record.json").read_text())
    assert [facts["num_examples"] for facts in record["clients"]] == [190, 191, 192]
    for folder in folders:
        assert charges(folder) == [row for index in range(3) for row in ((index, "reserved"), (None, "spent"))]


@pytest.mark.parametrize("select", ["alignment", "bilevel"])
def test_sites_charge_every_round_of_a_search_that_their_policies_allow(guarded: Any, select: str) -> None:
    config, grid, folders = guarded
    settings = {"adapter.select": select, "adapter.search_rounds": 1, "federation.rounds": 4}
    for number, folder in enumerate(folders):
        phases = ["prototype", "warmup", "alignment", "bilevel", "finetune"]
        allowed = phases if number < 2 else [phase for phase in phases if phase != select]
        policy = folder / "site.toml"
        policy.write_text(policy.read_text() + f"[allow]\nphases = {allowed}\n")
        grid.contexts[1000 - number].run_config |= settings
    grid.forgetful = True
    overrides = [f"{key}={value}" for key, value in settings.items()]
    done = rounds(run(config.with_overrides(*overrides, "privacy.accountant=pld"), grid))
    assert [line["phase"] for line in done].count(select) == 1
    assert [line["failures"] for line in done] == [{"2": "refused"}] * len(done), "it refuses the run, not a phase"
    for folder in folders[:2]:
        wanted = [row for index in range(len(done)) for row in ((index, "reserved"), (None, "spent"))]
        assert charges(folder) == wanted
    assert not (folders[2] / "ledger.sqlite").exists()


def test_a_node_that_names_no_policy_takes_part_in_nothing(
    guarded: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, grid, folders = guarded
    monkeypatch.setattr(clients.app, "_in_simulation_engine", lambda: False)
    del grid.contexts[1000].node_config["policy"]
    grid.contexts[1000].node_config["num-partitions"] = 3  # as Flower's examples start real nodes
    replies: list[RecordDict] = []

    def record(client: int, answer: Message) -> Message:
        replies.extend([answer.content] * (client == 0))
        return answer

    grid.tamper = record
    assert rounds(run(config, grid))[0]["failures"] == {"0": "refused"}
    assert [dict(reply["failure"]) for reply in replies if "failure" in reply] == [{"code": "refused"}] * 3  # type: ignore[arg-type]
    assert b"policy" not in pickle.dumps(replies), "why is nobody else's business"
    assert "this node names no policy" in caplog.text
    assert not (folders[0] / "ledger.sqlite").exists()


@pytest.mark.parametrize("damage", ["missing", "broken", "stricter"])
def test_a_policy_that_cannot_be_used_or_does_not_allow_the_run_refuses_it(guarded: Any, damage: str) -> None:
    config, grid, folders = guarded
    policy = folders[1] / "site.toml"
    text = policy.read_text()
    policy.write_text("[site" if damage == "broken" else text.replace("max_epsilon = 6.5", "max_epsilon = 5.9"))
    if damage == "missing":
        policy.unlink()
    assert rounds(run(config, grid))[0]["failures"] == {"1": "refused"}
    assert not (folders[1] / "ledger.sqlite").exists()


def test_an_edited_policy_counts_from_the_next_message_on(guarded: Any) -> None:
    config, grid, folders = guarded

    def edit(client: int, answer: Message) -> Message:
        if len(trained(grid)) == 3 and client == 2:
            policy = folders[2] / "site.toml"
            policy.write_text(policy.read_text().replace("max_epsilon = 6.5", "max_epsilon = 5.9"))
        return answer

    grid.tamper = edit
    assert [entry["failures"] for entry in rounds(run(config, grid))] == [{}, {"2": "refused"}, {"2": "refused"}]
    assert charges(folders[2]) == [(0, "reserved"), (None, "spent")]


def test_a_restarted_node_that_lost_its_memory_does_no_round_again(guarded: Any) -> None:
    config, grid, folders = guarded
    run(config, grid)
    before = [charges(folder) for folder in folders]
    for context in grid.contexts.values():
        context.state = RecordDict()
    grid.forgetful = True
    for message in trained(grid):
        assert dict(grid.deliver(message).content["failure"]) == {"code": "protocol"}  # type: ignore[arg-type]
    assert [charges(folder) for folder in folders] == before


def test_a_second_run_that_the_budget_does_not_allow_is_refused(guarded: Any, tmp_path: Path) -> None:
    config, grid, folders = guarded
    run(config, grid)
    before = [charges(folder) for folder in folders]
    for context in grid.contexts.values():
        context.state, context.run_id = RecordDict(), RUN_ID + 1
    with pytest.raises(FedloraError, match=r"\(refused\)"):
        run(config.with_overrides(f"run.out='{tmp_path / 'second'}'"), grid)
    assert [charges(folder) for folder in folders] == before
