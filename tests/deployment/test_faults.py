"""What breaks in a deployment, through real processes: nothing is lost, and no ε is stated below what ledgers hold.

Each test leaves the federation as it found it. What was seen, and how long recovery took, is in docs/faults.md:
`FEDLORA_FAULT_TIMES=FILE python -m pytest -m slow tests/deployment/test_faults.py` writes the times.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from deploy.services import Service
from fedlora.config import RunConfig
from tests.deployment.conftest import Clocks, Deploy, Stopwatch
from tests.deployment.deployed import Deployment, failures, listens, rounds_charged, wait_for
from tests.deployment.garbage_site import RUBBISH

pytestmark = [pytest.mark.slow, pytest.mark.flower, pytest.mark.xdist_group("flower")]

HOUR = 3600
SMALL_DISK = 2
"""The site whose ledger has a small disk of its own, where the system lets us make one."""


@pytest.fixture(scope="module")
def clocks() -> Iterator[Clocks | None]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Clocks.make(Path(folder))


@pytest.fixture(scope="module")
def small_disk() -> int | None:
    probe = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "mount",
        "-t",
        "tmpfs",
        "-o",
        "size=64k",
        "none",
        "/mnt",
    ]
    possible = subprocess.run(probe, capture_output=True).returncode == 0
    return SMALL_DISK if possible else None


@pytest.fixture(scope="module")
def federation(
    deploy: Deploy, deployed_config: Callable[..., RunConfig], clocks: Clocks | None, small_disk: int | None
) -> Deployment:
    return deploy(deployed_config(), small_disk=small_disk, clocks=clocks)


@pytest.fixture
def deployment(federation: Deployment, clocks: Clocks | None) -> Iterator[Deployment]:
    """Everything is up again afterwards, whatever a test has left behind."""
    yield federation
    if clocks is not None:
        clocks.right()
    federation.restore()


def test_a_daemon_killed_while_it_computes_has_spent_the_round(deployment: Deployment, stopwatch: Stopwatch) -> None:
    """Its answer is gone with it, and what it charged is not."""
    site = deployment.sites[1]
    run = deployment.submit("daemon", "federation.local_steps=40")
    run.until(lambda lines: len(lines) == 1)
    wait_for(site.at_work, on=run)
    site.service.kill()
    stopwatch.begin()
    assert rounds_charged(site, run.run)[1] == ["reserved"], "caught in the act"
    site.service.start()
    stopwatch.note("daemon started again")
    run.until(lambda lines: bool(lines) and lines[-1]["round"] == 2)
    stopwatch.note("next round with all sites")
    assert failures(deployment.check(run)) == [{}, {"1": "over"}, {}]
    assert rounds_charged(site, run.run)[1] == ["reserved"]


def test_a_supernode_that_was_killed_is_waited_for(deployment: Deployment, stopwatch: Stopwatch) -> None:
    site, supernode = deployment.sites[1], deployment.federation.supernodes[1]
    run = deployment.submit("supernode")
    run.until(lambda lines: len(lines) == 1)
    wait_for(lambda: 1 in rounds_charged(site, run.run), on=run)
    supernode.kill()
    stopwatch.begin()
    supernode.restart()
    stopwatch.note("SuperNode let in again")
    run.until(lambda lines: len(lines) >= 2)
    stopwatch.note("round done with all sites")
    assert failures(deployment.check(run)) == [{}, {}, {}]


def test_a_superlink_that_was_killed_loses_the_run_and_no_round(deployment: Deployment, stopwatch: Stopwatch) -> None:
    """Flower gives the run up; submitted again it goes on, and nobody is asked for what is there."""
    superlink = deployment.federation.superlink
    first = deployment.submit("superlink")
    first.until(lambda lines: len(lines) == 1)
    wait_for(deployment.sites[1].at_work, on=first)
    superlink.kill()
    stopwatch.begin()
    superlink.start()
    stopwatch.note("SuperLink started again")
    wait_for(lambda: not deployment.server_app())
    second = deployment.submit("superlink")
    second.until(lambda lines: len(lines) >= 2)
    stopwatch.note("round done by the run submitted again")
    assert failures(deployment.check(second)) == [{}, {}, {}]
    code, said = first.ended()
    stopwatch.note("first submission ended")
    assert code == 1, said
    assert "finished:failed" in said
    for site in deployment.sites:
        assert site.said("answered", first.run) == {0: 1, 1: 1, 2: 1}
        assert set(site.said("answered as before", first.run)) <= {1}, "round 0 was done"


def test_a_server_app_killed_before_its_checkpoint_asks_nobody_again(
    deployment: Deployment, stopwatch: Stopwatch
) -> None:
    """It is killed with all answers on its disk, while it evaluates what it made of them."""
    many_public_records = "data.generated_records=6000"
    first = deployment.submit("server", many_public_records)
    first.until(lambda lines: len(lines) == 1)
    answers, at_work = (
        first.folder.path / "answers",
        deployment.server_app(),
    )  # to look for it takes a busy machine long
    wait_for(lambda: len([*answers.glob("1-*.safetensors")]) == 3, on=first)
    end(at_work)
    stopwatch.begin()
    assert len(first.folder.read_rounds()) == 1, "killed in time"
    second = deployment.submit("server", many_public_records)
    second.until(lambda lines: len(lines) >= 2)
    stopwatch.note("round done by the run submitted again")
    assert failures(deployment.check(second)) == [{}, {}, {}]
    code, said = first.ended()
    stopwatch.note("first submission ended")
    assert code == 1, said
    for site in deployment.sites:
        assert site.said("answered", first.run) == {0: 1, 1: 1, 2: 1}
        assert site.said("answered as before", first.run) == {}


def test_a_full_disk_under_a_ledger_refuses_before_anything_is_computed(
    deployment: Deployment, small_disk: int | None, stopwatch: Stopwatch
) -> None:
    if small_disk is None:
        pytest.skip("this system lets nobody make a file system of their own")
    site = deployment.sites[small_disk]
    run = deployment.submit("disk")
    run.until(lambda lines: len(lines) == 1)
    filler = site.seen("disk/filler")
    fill(filler)
    run.until(lambda lines: len(lines) == 2)
    filler.unlink()
    stopwatch.begin()
    run.until(lambda lines: len(lines) == 3)
    stopwatch.note("next round with all sites")
    told = failures(deployment.check(run))
    assert {"2": "refused"} in told
    assert told[0] == {}
    assert told[2] == {}
    charged = rounds_charged(site, run.run)
    assert charged == {index: ["reserved", "spent"] for index, failed in enumerate(told) if not failed}
    assert "LedgerUnavailable" in site.service.log()


def test_a_site_whose_clock_jumps_is_left_out_until_it_is_right_again(
    deployment: Deployment, clocks: Clocks | None, stopwatch: Stopwatch
) -> None:
    if clocks is None:
        pytest.skip("no C compiler")
    site, supernode = deployment.sites[0], deployment.federation.supernodes[0]
    run = deployment.submit("clock", "federation.rounds=8", "federation.rejoin_deadline=2", "federation.local_steps=1")
    run.until(lambda lines: len(lines) == 1)
    clocks.put_ahead("site-0", -200)
    run.until(lambda lines: len(lines) == 3)
    clocks.put_ahead("site-0", HOUR)
    stopwatch.begin()
    wait_for(lambda: not supernode.alive, on=run)
    stopwatch.note("SuperNode ended itself")
    assert supernode.exit_code == 0
    run.until(lambda lines: bool(lines[-1]["failures"]))
    stopwatch.note("round done without the site")
    clocks.put_ahead("site-0", 0)
    stopwatch.begin()
    supernode.restart()
    stopwatch.note("SuperNode let in again, from the correction on")
    run.until(lambda lines: not lines[-1]["failures"])
    stopwatch.note("round done with all sites, from the correction on")
    told = failures(deployment.check(run))
    assert told[:3] == [{}, {}, {}], "five minutes behind harm nobody"
    assert {tuple(failed.items()) for failed in told} == {(), (("0", "no_reply"),)}
    times = [row.time for row in site.entries()]
    assert times != sorted(times), "the ledger's order is not that of its clock"


def test_a_server_whose_clock_jumps_loses_the_run_and_no_round(
    deployment: Deployment, clocks: Clocks | None, stopwatch: Stopwatch
) -> None:
    if clocks is None:
        pytest.skip("no C compiler")
    federation = deployment.federation
    first = deployment.submit("server clock")
    first.until(lambda lines: len(lines) == 1)
    clocks.put_ahead("server", HOUR)
    stopwatch.begin()
    code, said = first.ended()
    stopwatch.note("submission ended")
    assert code == 1, said
    wait_for(lambda: not any(supernode.alive for supernode in federation.supernodes))
    stopwatch.note("SuperNodes ended themselves")
    clocks.put_ahead("server", 0)
    stopwatch.begin()
    for supernode in federation.supernodes:
        supernode.restart()
    stopwatch.note("SuperNodes let in again, from the correction on")
    second = deployment.submit("server clock")
    second.until(lambda lines: len(lines) >= 2)
    stopwatch.note("round done by the run submitted again, from the correction on")
    assert failures(deployment.check(second)) == [{}, {}, {}]


def test_a_site_that_never_answers_is_left_out(deployment: Deployment, stopwatch: Stopwatch) -> None:
    site = deployment.sites[1]
    run = deployment.submit("silent", "federation.round_deadline=15")
    run.until(lambda lines: len(lines) == 1)
    site.service.pause()
    stopwatch.begin()
    run.until(lambda lines: len(lines) == 2)
    stopwatch.note("round done without the site")
    site.service.resume()
    stopwatch.begin()
    run.until(lambda lines: len(lines) == 3)
    stopwatch.note("next round with all sites, from its waking on")
    assert failures(deployment.check(run)) == [{}, {"1": "no_reply"}, {}]


def test_a_site_that_answers_rubbish_is_left_out(deployment: Deployment, stopwatch: Stopwatch) -> None:
    site = deployment.sites[1]
    site.service.stop()
    command = [sys.executable, "-P", str(Path(__file__).with_name("garbage_site.py")), str(site.socket)]
    stand_in = Service(
        name="rubbish",
        command=command,
        folder=deployment.folder / "stand-in",
        environment=deployment.federation.environment,
        ready=lambda _: listens(site.socket),
    )
    deployment.federation.sites.append(stand_in)
    stand_in.start()
    stopwatch.begin()
    limits = ("federation.local_steps=1", "federation.rejoin_deadline=2")
    run = deployment.submit("rubbish", f"federation.rounds={len(RUBBISH)}", *limits)
    code, said = run.ended()
    stopwatch.note("all rounds done without the site")
    stand_in.stop()
    site.socket.unlink()
    site.service.start()
    assert code == 0, said
    verdicts = {"cut short": "no_reply", "out of range": "outlier"}  # the first is asked again, as after a crash
    assert failures(deployment.check(run)) == [{"1": verdicts.get(kind, "protocol")} for kind in RUBBISH]
    record = json.loads(run.folder.record_file.read_text())
    asked = record["config"]["privacy"]["epsilon"]
    assert record["clients"][1]["epsilon"] == asked, "not the 0 that it claimed: what is not used is not believed"


def test_a_run_that_every_site_refuses_ends_and_can_go_on(deployment: Deployment, stopwatch: Stopwatch) -> None:
    first = deployment.submit("refused")
    first.until(lambda lines: len(lines) == 1)
    for site in deployment.sites:
        site.edit("max_epsilon = 40.0", "max_epsilon = 0.1")
    stopwatch.begin()
    code, said = first.ended()
    stopwatch.note("submission ended")
    assert code == 1, said
    assert "(refused)" in said
    done = len(first.folder.read_rounds())
    stopwatch.begin()
    code, said = deployment.submit("refused").ended()
    stopwatch.note("second submission ended")
    assert code == 1, said
    assert "0 of 3 clients joined" in said
    assert "nodes answered refused" in said
    for site in deployment.sites:
        assert rounds_charged(site, first.run).keys() == set(range(done)), "nothing is charged for what is refused"
        site.edit("max_epsilon = 0.1", "max_epsilon = 40.0")
    stopwatch.begin()
    third = deployment.submit("refused")
    third.until(lambda lines: len(lines) > done)
    stopwatch.note("round done by the run submitted again")
    assert failures(deployment.check(third)) == [{}, {}, {}]


def test_a_network_cut_for_a_minute_is_waited_for(
    deploy: Deploy, deployed_config: Callable[..., RunConfig], stopwatch: Stopwatch
) -> None:
    """In a federation of its own, whose SuperNodes reach the SuperLink through a wire."""
    deployment = deploy(deployed_config("federation.clients=2"), cuttable=True)
    wire = deployment.federation.wire
    assert wire is not None
    run = deployment.submit("cut")
    run.until(lambda lines: len(lines) == 1)
    wait_for(deployment.sites[1].at_work, on=run)
    wire.cut()
    time.sleep(60)
    wire.mend()
    stopwatch.begin()
    run.until(lambda lines: len(lines) >= 2)
    stopwatch.note("round done with all sites, from the mending on")
    assert failures(deployment.check(run)) == [{}, {}, {}]


def fill(path: Path) -> None:
    """Until there is no space left."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)


def end(processes: list[psutil.Process]) -> None:
    assert processes
    for process in processes:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=10)
