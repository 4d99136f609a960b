"""Real sites behind Flower's apps: courier, socket, daemon, and a server that may be stopped at any moment."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, Message

import clients.app
import fedlora.experiments.simulate
import server.roster
import server.transport
from fedlora.config import RunConfig
from fedlora.errors import FedloraError, RunFolderError
from fedlora.experiments.run_folder import RunFolder
from fedlora.federation import wire
from fedlora.models import locate_model
from fedlora.privacy.ledger import Ledger
from fedlora.site import connection
from fedlora.site.daemon import Daemon
from fedlora.site.desk import Desk
from tests.flower.local_grid import LocalGrid, rounds, run, trained

pytestmark = pytest.mark.flower


@dataclass(kw_only=True)
class RealSite:
    """A data owner's folder, and the daemon that serves it from a thread of this process."""

    folder: Path

    def start(self) -> None:
        self.desk = Desk(self.folder / "site.toml")
        self.daemon = Daemon(self.desk)
        self.thread = threading.Thread(target=self.daemon.serve)
        self.thread.start()

    def stop(self) -> None:
        self.daemon.stop()
        self.thread.join()
        self.desk.close()

    def edit(self, old: str, new: str) -> None:
        policy = self.folder / "site.toml"
        assert policy.read_text().count(old) == 1
        policy.write_text(policy.read_text().replace(old, new))

    @property
    def charges(self) -> list[tuple[int | None, str]]:
        with closing(Ledger.read(self.folder / "ledger.sqlite")) as ledger:
            return [(row.round, row.kind) for row in ledger.entries()]


Guarded = tuple[RunConfig, LocalGrid, list[RealSite]]


@pytest.fixture
def guarded(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    """Three nodes, each with its own records, policy, ledger and daemon."""
    monkeypatch.setattr(clients.app, "_in_simulation_engine", lambda: False)
    config = config.with_overrides("privacy.seeded_noise=false", "privacy.accountant=pld")
    grid, sites = LocalGrid(config), []
    model = config.model.name
    for client in range(3):
        folder = Path(tempfile.mkdtemp(prefix="fedlora-site-", dir="/tmp"))  # the path of a socket has to be short
        rows = {"sentence": [f"the plot was {'very ' * (n % 5)}good" for n in range(190 + client)]}
        rows["label"] = [n % 2 for n in range(190 + client)]
        pyarrow.parquet.write_table(pyarrow.table(rows), folder / "train.parquet")
        policy = f'[site]\ndevice = "cpu"\n[models]\n"{model}" = "{locate_model(model).digest}"\n'
        policy += "[limits]\nsmallest_noise_multiplier = 0.2\n"
        policy += '[allow]\nphases = ["prototype", "finetune", "warmup", "alignment", "bilevel"]\n'
        policy += '[data.ward]\ntask = "sst2"\nsource = "."\nmax_epsilon = 6.5\nmax_delta = 1e-3\n'
        (folder / "site.toml").write_text(policy)
        grid.contexts[1000 - client].node_config = {"partition-id": client, "site": str(folder / "site.sock")}
        sites.append(RealSite(folder=folder))
        sites[-1].start()
    yield config, grid, sites
    for site in sites:
        site.stop()
        shutil.rmtree(site.folder)


def under(config: RunConfig, grid: LocalGrid, *overrides: str) -> RunConfig:
    """`config` with `overrides`, told to every node, as Flower does."""
    config = config.with_overrides(*overrides)
    for context in grid.contexts.values():
        context.run_config = dict(config.to_flower())
    return config


def test_a_site_charges_its_own_ledger_and_trains_on_its_own_records(guarded: Guarded) -> None:
    config, grid, sites = guarded
    record = json.loads((run(config, grid) / "record.json").read_text())
    assert [facts["num_examples"] for facts in record["clients"]] == [190, 191, 192]
    for site in sites:
        assert site.charges == [row for index in range(3) for row in ((index, "reserved"), (None, "spent"))]


@pytest.mark.parametrize("select", ["alignment", "bilevel"])
def test_sites_charge_every_round_of_a_search_that_their_policies_allow(guarded: Guarded, select: str) -> None:
    config, grid, sites = guarded
    sites[2].edit(f'"{select}"', '"evaluation"')
    config = under(config, grid, f"adapter.select={select}", "adapter.search_rounds=1", "federation.rounds=4")
    done = rounds(run(config, grid))
    assert [line["phase"] for line in done].count(select) == 1
    assert [line["failures"] for line in done] == [{"2": "refused"}] * len(done), "it refuses the run, not a phase"
    for site in sites[:2]:
        assert site.charges == [row for index in range(len(done)) for row in ((index, "reserved"), (None, "spent"))]
    assert sites[2].charges == []


def test_a_node_that_names_no_site_takes_part_in_nothing(guarded: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    config, grid, sites = guarded
    del grid.contexts[1000].node_config["site"]
    grid.contexts[1000].node_config["num-partitions"] = 3  # as Flower's examples start real nodes
    assert rounds(run(config, grid))[0]["failures"] == {"0": "no_reply"}
    assert "this node names no site" in caplog.text
    assert sites[0].charges == []


@pytest.mark.parametrize("damage", ["missing", "broken", "stricter"])
def test_a_policy_that_cannot_be_used_or_does_not_allow_the_run_refuses_it(guarded: Guarded, damage: str) -> None:
    config, grid, sites = guarded
    if damage == "missing":
        (sites[1].folder / "site.toml").unlink()
    elif damage == "broken":
        sites[1].edit("[site]", "[site")
    else:
        sites[1].edit("max_epsilon = 6.5", "max_epsilon = 5.9")
    assert rounds(run(config, grid))[0]["failures"] == {"1": "refused"}
    assert sites[1].charges == []


def test_an_edited_policy_counts_from_the_next_message_on(guarded: Guarded) -> None:
    config, grid, sites = guarded

    def edit(client: int, answer: Message) -> Message:
        if len(trained(grid)) == 3 and client == 2:
            sites[2].edit("max_epsilon = 6.5", "max_epsilon = 5.9")
        return answer

    grid.tamper = edit
    assert [entry["failures"] for entry in rounds(run(config, grid))] == [{}, {"2": "refused"}, {"2": "refused"}]
    assert sites[2].charges == [(0, "reserved"), (None, "spent")]


def test_a_daemon_that_was_restarted_does_no_round_again(guarded: Guarded) -> None:
    config, grid, sites = guarded
    run(config, grid)
    before = [site.charges for site in sites]
    for site in sites:
        site.stop()
        site.start()
    told = [
        "update" if "update" in (got := grid.deliver(one).content) else dict(got["failure"]) for one in trained(grid)
    ]  # type: ignore[arg-type]
    assert told == [{"code": "over"}] * 6 + ["update"] * 3, "the last round's answer is given again"
    assert [site.charges for site in sites] == before


def test_a_second_run_that_the_budget_does_not_allow_is_refused(guarded: Guarded, tmp_path: Path) -> None:
    config, grid, sites = guarded
    run(config, grid)
    before = [site.charges for site in sites]
    with pytest.raises(FedloraError, match=r"\(refused\)"):
        run(config.with_overrides(f"run.out='{tmp_path / 'second'}'"), grid)
    assert [site.charges for site in sites] == before


class Killed(BaseException):
    """As far as the server knows."""


def test_a_server_killed_before_its_checkpoint_asks_nobody_twice(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last answer and the checkpoint: answers are on its disk."""
    config, grid, sites = guarded
    save = fedlora.experiments.simulate.save_checkpoint

    def killed(path: Path, state: Any, own: Any) -> None:
        if state.next_round == 2:
            raise Killed
        save(path, state, own)

    with monkeypatch.context() as patch:
        patch.setattr(fedlora.experiments.simulate, "save_checkpoint", killed)
        with pytest.raises(Killed):
            run(config, grid)
    asked = len(trained(grid))
    folder = run(config, grid)
    assert len(trained(grid)) == asked + 3, "only the third round"
    assert [line["round"] for line in rounds(folder)] == [0, 1, 2]
    for site in sites:
        assert site.charges == [row for index in range(3) for row in ((index, "reserved"), (None, "spent"))]
    assert not (folder / "answers").exists()


def test_answers_that_the_server_lost_are_given_again(guarded: Guarded) -> None:
    """The host of the server dies while replies are under way; sites have spent, and spend no more."""
    config, grid, sites = guarded
    first: dict[int, bytes] = {}

    def lose(client: int, answer: Message) -> Message:
        if answer.metadata.message_type != "train" or len(trained(grid)) <= 3:
            return answer
        first[client] = bytes(answer.content["update"]["bytes"].data)  # type: ignore[union-attr]
        raise Killed

    grid.tamper = lose
    with pytest.raises(Killed):
        run(config, grid)
    grid.tamper = lambda client, answer: answer
    folder = run(config, grid)
    assert [line["clients_failed"] for line in rounds(folder)] == [0, 0, 0]
    for site in sites:
        assert site.charges == [row for index in range(3) for row in ((index, "reserved"), (None, "spent"))]


def test_a_round_with_too_few_answers_ends_the_run_which_goes_on_when_they_are_back(guarded: Guarded) -> None:
    config, grid, sites = guarded
    config = under(config, grid, "federation.minimum_clients=3")

    def leave(client: int, answer: Message) -> Message:
        if len(trained(grid)) == 3:
            grid.silent = {1}
        return answer

    grid.tamper = leave
    short = under(config, grid, "federation.round_deadline=1")
    with pytest.raises(FedloraError, match=r"round 1 \(finetune\): 2 of 3 clients answered usably \(no_reply\)"):
        run(short, grid)
    reason = (Path(config.run.out) / "failure").read_text()
    assert reason.startswith("round 1 (finetune): 2 of 3 clients")
    grid.silent = set()
    grid.tamper = lambda client, answer: answer
    folder = run(short, grid)
    assert [line["clients_failed"] for line in rounds(folder)] == [0, 0, 0]
    assert not (folder / "failure").exists()
    for site in sites:
        assert site.charges == [row for index in range(3) for row in ((index, "reserved"), (None, "spent"))]


@pytest.mark.parametrize("other", ["privacy.epsilon=5", "run.transport=flower"])
def test_a_folder_of_another_run_is_left_as_it_is(guarded: Guarded, other: str) -> None:
    config, grid, _ = guarded
    folder = RunFolder.create(config)
    with pytest.raises(RunFolderError, match="another configuration or transport"):
        run(config.with_overrides(other), grid)
    assert folder.read_config() == config
    assert grid.sent == []


def test_a_daemon_that_is_away_for_a_while_is_asked_again(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    config, grid, sites = guarded
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(server.transport, "ASK_AGAIN", 0.2)
    config = under(config, grid, "federation.rejoin_deadline=60")
    codes: list[str] = []

    def watch(client: int, answer: Message) -> Message:
        if client == 1 and "failure" in answer.content:
            codes.append(str(answer.content["failure"]["code"]))
            if len(codes) == 2:
                sites[1].start()
        elif client == 0 and len(trained(grid)) == 4:
            sites[1].stop()
        return answer

    grid.tamper = watch
    assert [line["clients_failed"] for line in rounds(run(config, grid))] == [0, 0, 0]
    assert codes[:2] == ["unavailable", "unavailable"]


def test_a_node_that_comes_back_under_another_id_is_the_same_client(guarded: Guarded) -> None:
    config, grid, _ = guarded

    def move(client: int, answer: Message) -> Message:
        if len(trained(grid)) == 3 and 999 in grid.contexts:
            grid.contexts[99] = grid.contexts.pop(999)
        return answer

    grid.tamper = move
    config = under(config, grid, "federation.rejoin_deadline=30")
    assert [line["clients_failed"] for line in rounds(run(config, grid))] == [0, 0, 0]


def test_a_client_that_moves_absurdly_far_is_not_used(guarded: Guarded) -> None:
    config, grid, _ = guarded

    def blow_up(client: int, answer: Message) -> Message:
        if client == 2 and len(trained(grid)) > 3 and "update" in answer.content:
            update = wire.decode_update(bytes(answer.content["update"]["bytes"].data))  # type: ignore[union-attr]
            data = wire.encode_update(replace(update, vector=update.vector * 100))
            answer.content["update"] = ArrayRecord({"bytes": Array("uint8", (len(data),), "bytes", data)})
        return answer

    grid.tamper = blow_up
    assert [line["failures"] for line in rounds(run(config, grid))] == [{}, {"2": "outlier"}, {"2": "outlier"}]


@pytest.mark.parametrize("kind", ["somebody else's partition-id", "other code"])
def test_a_node_that_comes_late_and_does_not_fit_is_kept_out_and_the_run_goes_on(
    guarded: Guarded, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the start it would be a mistake to be put right; in the middle one node could end everybody's run."""
    config, grid, sites = guarded
    monkeypatch.setattr(server.roster, "LOOK", 0.0)

    def intrude(client: int, answer: Message) -> Message:
        if client == -99 and kind == "other code":
            answer.content["enrolment"]["code_digest"] = "0" * 64  # type: ignore[index]
        elif len(trained(grid)) == 3:
            grid.contexts[1099] = grid.contexts[999]
        return answer

    grid.tamper = intrude
    assert [line["clients_failed"] for line in rounds(run(config, grid))] == [0, 0, 0]
    assert "a node that came late is kept out" in caplog.text
    for site in sites:
        assert site.charges == [row for index in range(3) for row in ((index, "reserved"), (None, "spent"))]
