"""A federation on loopback: what it says of runs is true, who has no key stays out, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("flwr")

from deploy.certificates import make_certificates
from deploy.loopback import Loopback
from deploy.services import Service, quiet_environment
from fedlora.errors import FedloraError

pytestmark = [pytest.mark.flower, pytest.mark.xdist_group("flower")]

ROOT = Path(__file__).resolve().parents[2]
PROJECT = """
[project]
name = "echo"
version = "0.1.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "fedlora"
[tool.flwr.app.components]
serverapp = "echo.server:app"
clientapp = "echo.client:app"
[tool.flwr.app.config.echo]
fail = false
wait = 0.0
"""
CLIENT = """
from flwr.app import Message
from flwr.clientapp import ClientApp
app = ClientApp()
@app.query()
def query(message, context):
    return Message(message.content, reply_to=message)
"""
SERVER = """
import time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    if context.run_config["echo.fail"]:
        raise RuntimeError("as it was told")
    time.sleep(context.run_config["echo.wait"])
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    asked = {node: grid.push_messages([Message(RecordDict({"is": ConfigRecord({"node": str(node)})}), node, "query")])
             for node in nodes}
    for node, identifiers in asked.items():
        while not (replies := list(grid.pull_messages(identifiers))):
            time.sleep(0.2)
        assert replies[0].content["is"]["node"] == str(node)
"""


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """An app whose server sends every node its own number and wants it back."""
    package = tmp_path / "app" / "echo"
    package.mkdir(parents=True)
    (package.parent / "pyproject.toml").write_text(PROJECT)
    for name, text in (("__init__", ""), ("client", CLIENT), ("server", SERVER)):
        (package / f"{name}.py").write_text(text)
    return package.parent


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Afterwards no process has the test's folder in its command or is at work in it."""
    yield
    assert marked(tmp_path) == []


def marked(folder: Path) -> list[list[str]]:
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if process.pid != os.getpid() and (
                str(folder) in " ".join(command) or process.cwd().startswith(str(folder))
            ):
                found.append(command)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_a_run_that_ends_well_and_one_that_does_not(tmp_path: Path, echo: Path) -> None:
    with Loopback(tmp_path / "federation", sites=2) as federation:
        federation.start_superlink()
        federation.start_supernodes(["partition-id=0", "partition-id=1"])
        good = federation.wait(federation.submit({}, app=echo), limit=120)
        assert good.completed
        bad = federation.wait(federation.submit({"echo.fail": True}, app=echo), limit=120)
        assert (bad.finished, bad.completed) == (True, False)
        assert "as it was told" in bad.details
        assert {node["status"] for node in federation.nodes()} == {"online"}


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_a_superlink_that_is_killed_takes_its_server_app_along_and_comes_back(tmp_path: Path, echo: Path) -> None:
    with Loopback(tmp_path / "federation", sites=2) as federation:
        federation.start_superlink()
        federation.start_supernodes(["partition-id=0", "partition-id=1"])
        run = federation.submit({"echo.wait": 600.0}, app=echo)
        wait_until(lambda: bool(federation.superlink.processes("flwr-serverapp")))
        federation.superlink.kill()
        assert federation.superlink.exit_code == -signal.SIGKILL
        wait_until(lambda: not federation.superlink.processes())
        federation.superlink.restart()
        assert not federation.status(run).completed
        assert federation.wait(federation.submit({}, app=echo), limit=120).completed, "the SuperNodes came back"


@pytest.mark.usefixtures("nothing_left")
def test_whoever_has_no_registered_key_or_the_wrong_authority_stays_out(tmp_path: Path) -> None:
    with Loopback(tmp_path / "federation", sites=2) as federation:
        federation.start_superlink()
        keys = federation.certificates
        federation.register(keys.site_public_key(0))
        other = make_certificates(tmp_path / "other", hosts=["127.0.0.1"], sites=0)
        strangers = {
            "Failed to activate": federation.add_supernode("partition-id=0", key=keys.site_key(1)),
            "must be registered": federation.add_stranger("--root-certificates", str(keys.authority)),
            "handshake": federation.add_supernode("partition-id=0", key=keys.site_key(0), authority=other.authority),
        }
        for said, stranger in strangers.items():
            with pytest.raises(FedloraError, match=said):
                stranger.start(within=60)
            assert stranger.exit_code not in (0, None), said
        plain = federation.add_stranger("--insecure")
        plain.launch()
        wait_until(lambda: "retrying" in plain.log())
        assert [node["status"] for node in federation.nodes()] == ["registered"], "nobody was ever online"


@pytest.mark.usefixtures("nothing_left")
def test_ctrl_c_ends_a_demo_and_everything_it_started(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    demo = subprocess.Popen(
        [sys.executable, "-m", "deploy.demo", "--data", "generated", "--folder", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: (folder / "federation" / "superlink" / "log").exists() or demo.poll() is not None)
        demo.send_signal(signal.SIGINT)
        said, _ = demo.communicate(timeout=120)
    finally:
        demo.kill()
    assert demo.returncode == 130, said
    assert "every process is ended" in said
    assert "Traceback" not in said


# --- services, without Flower ----------------------------------------------------------------------------------------


def service(tmp_path: Path, code: str) -> Service:
    return Service(
        name="part",
        command=[sys.executable, "-c", code],
        folder=tmp_path / "part",
        environment=quiet_environment(Path(sys.executable).parent),
        ready=lambda part: "ready" in part.log(),
    )


CHILD_IN_ANOTHER_SESSION = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"],
                 start_new_session=True)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.usefixtures("nothing_left")
def test_a_child_in_another_session_that_hears_no_signal_is_ended_too(tmp_path: Path) -> None:
    part = service(tmp_path, CHILD_IN_ANOTHER_SESSION)
    part.start()
    wait_until(lambda: len(part.processes()) == 2)
    part.kill()
    assert len(part.processes()) == 1, "a crash leaves what it started"
    part.stop(within=1.0)
    assert part.processes() == []


def test_a_service_that_ends_early_says_what_it_said(tmp_path: Path) -> None:
    part = service(tmp_path, "print('no such file'); raise SystemExit(7)")
    with pytest.raises(FedloraError, match=r"part ended with 7 before it was ready:\nno such file"):
        part.start()


def test_a_service_is_tried_again_until_it_starts(tmp_path: Path) -> None:
    part = service(
        tmp_path,
        "import pathlib, time\n"
        "tried = pathlib.Path('tried')\n"
        "if not tried.exists(): tried.touch(); raise SystemExit(1)\n"
        "print('ready', flush=True); time.sleep(600)",
    )
    part.restart(within=60)
    try:
        assert part.alive
        with pytest.raises(FedloraError, match="runs already"):
            part.launch()
    finally:
        part.stop()
    assert not part.alive


def wait_until(condition: Callable[[], bool], within: float = 90.0) -> None:
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
