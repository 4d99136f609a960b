"""Start scripts, units and compose file: they are valid, start what they should, and keep users and networks apart."""

from __future__ import annotations

import configparser
import itertools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
NODE_CONFIG = 'partition-id=0 site="/run/fedlora-site/site.sock"'
STUB = """#!/bin/sh
for argument in "$@"; do printf 'argument %s\\n' "$argument"; done
printf 'here %s\\n' "$PWD"
umask
env
"""


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    folder = tmp_path / "keys of ours"
    folder.mkdir()
    for name in ("ca.crt", "superlink.crt", "superlink.key", "key"):
        (folder / name).touch()
    return folder


def run(script: str, *arguments: object, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """The script, with a stub in the place of Flower's commands that prints what it is given."""
    stubs = tmp_path / "stubs"
    stubs.mkdir(exist_ok=True)
    for name in ("flower-superlink", "flower-supernode"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    environment = {"PATH": f"{stubs}:{os.environ['PATH']}", "PYTHONPATH": "/somewhere", "HOME": str(tmp_path)}
    command = [str(DEPLOY / script), *map(str, arguments)]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30)


def given(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.removeprefix("argument ") for line in done.stdout.splitlines() if line.startswith("argument ")]


def test_a_superlink_has_tls_node_authentication_and_a_database(keys: Path, tmp_path: Path) -> None:
    done = run("superlink.sh", keys, "state", "--host", "0.0.0.0", "--port", "9092", tmp_path=tmp_path)
    arguments = given(done)
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} < set(arguments)
    assert "--insecure" not in arguments
    options = dict(itertools.pairwise(arguments))
    assert options["--ssl-keyfile"] == str(keys / "superlink.key")
    assert options["--database"] == str(tmp_path / "state" / "state.db")
    assert arguments[-4:] == ["--host", "0.0.0.0", "--port", "9092"]
    check_surroundings(done, tmp_path / "state")


def test_a_supernode_has_tls_and_its_key(keys: Path, tmp_path: Path) -> None:
    places = ("host:9092", keys / "ca.crt", keys / "key", "state")
    done = run("supernode.sh", *places, NODE_CONFIG, "--port", "9095", tmp_path=tmp_path)
    arguments = given(done)
    options = dict(itertools.pairwise(arguments))
    assert options["--superlink"] == "host:9092"
    assert options["--root-certificates"] == str(keys / "ca.crt")
    assert options["--auth-supernode-private-key"] == str(keys / "key")
    assert options["--node-config"] == NODE_CONFIG
    assert "--insecure" not in arguments
    assert "--allow-runtime-dependency-installation" not in arguments
    check_surroundings(done, tmp_path / "state")


def check_surroundings(done: subprocess.CompletedProcess[str], state: Path) -> None:
    """Nothing calls home, nothing is installed, no package lies about, and nobody else reads what is written."""
    lines = done.stdout.splitlines()
    quiet = {"FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1", f"FLWR_HOME={state / 'home'}"}
    assert quiet | {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1", f"here {state / 'empty'}", "0077"} <= set(lines)
    assert not any(line.startswith("PYTHONPATH=") for line in lines)
    assert list((state / "empty").iterdir()) == []


def test_too_few_arguments_show_how(tmp_path: Path) -> None:
    for script in ("superlink.sh", "supernode.sh"):
        done = run(script, "one", tmp_path=tmp_path)
        assert done.returncode == 2
        assert f"deploy/{script}" in done.stderr
        assert "NODE_CONFIG" in done.stderr or "KEYS" in done.stderr


def test_a_key_that_is_missing_is_named(keys: Path, tmp_path: Path) -> None:
    (keys / "superlink.key").unlink()
    done = run("superlink.sh", keys, "state", tmp_path=tmp_path)
    assert (done.returncode, given(done)) == (2, [])
    assert "superlink.key" in done.stderr
    done = run("supernode.sh", "host:9092", keys / "ca.crt", keys / "none", "state", NODE_CONFIG, tmp_path=tmp_path)
    assert (done.returncode, given(done)) == (2, [])
    assert "none" in done.stderr


# --- units -----------------------------------------------------------------------------------------------------------


def service(unit: Path) -> dict[str, str]:
    """The section [Service]; of a key that is repeated, the last."""
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(unit.read_text())
    return dict(parser["Service"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_takes_the_units_and_finds_little_to_attack(tmp_path: Path) -> None:
    programs = tmp_path / "opt"
    for name in ("deploy/superlink.sh", "deploy/supernode.sh", ".venv/bin/fedlora"):
        (programs / name).parent.mkdir(parents=True, exist_ok=True)
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    copies = [tmp_path / unit.name for unit in UNITS]
    for unit, copy in zip(UNITS, copies, strict=True):
        copy.write_text(unit.read_text().replace("/opt/fedlora", str(programs)))
    verify = subprocess.run(["systemd-analyze", "verify", *map(str, copies)], capture_output=True, text=True)
    assert (verify.returncode, verify.stderr) == (0, "")
    for copy in copies:
        command = ["systemd-analyze", "security", "--offline=true", "--threshold=25", "--no-pager", str(copy)]
        secure = subprocess.run(command, capture_output=True, text=True)
        assert secure.returncode == 0, secure.stdout[-300:] + secure.stderr


def test_every_unit_has_a_user_of_its_own_and_comes_back() -> None:
    services = [service(unit) for unit in UNITS]
    users = {found["User"] for found in services}
    assert users == {"fedlora-superlink", "fedlora-courier", "fedlora-site"}
    made = (DEPLOY / "systemd" / "fedlora.sysusers").read_text()
    assert all(f"u {user} " in made for user in users)
    for found in services:
        assert found["Restart"] == "always", "Flower ends a SuperNode with status 0 where clocks disagree"
        assert found["NoNewPrivileges"] == "yes"
        assert found["ProtectSystem"] == "strict"
        assert found["CapabilityBoundingSet"] == ""


def test_the_daemon_has_no_network_and_the_courier_none_of_its_files() -> None:
    site, courier = (service(DEPLOY / "systemd" / f"fedlora-{name}.service") for name in ("site", "supernode"))
    assert site["PrivateNetwork"] == "yes"
    assert site["RestrictAddressFamilies"] == "AF_UNIX"
    assert site["StateDirectoryMode"] == "0700"
    assert f"/var/lib/{site['StateDirectory']}" in courier["InaccessiblePaths"]
    assert "m fedlora-site fedlora-courier" in (DEPLOY / "systemd" / "fedlora.sysusers").read_text()


def test_the_units_call_the_scripts_as_these_want_it(keys: Path, tmp_path: Path) -> None:
    values = {
        "STATE_DIRECTORY": str(tmp_path / "state"),
        "LISTEN": "::1",
        "PORT": "9",
        "SUPERLINK": "a:1",
        "CLIENT": "7",
    }
    for name, last in (("superlink", "9"), ("supernode", 'partition-id=7 site="/run/fedlora-site/site.sock"')):
        line = service(DEPLOY / "systemd" / f"fedlora-{name}.service")["ExecStart"]
        for variable, value in values.items():
            line = line.replace(f"${{{variable}}}", value)
        script, *arguments = shlex.split(line)
        arguments = [argument.replace(f"/etc/fedlora/{name}", str(keys)) for argument in arguments]
        done = run(Path(script).name, *arguments, tmp_path=tmp_path)
        assert done.returncode == 0, done.stderr
        assert last in given(done)


# --- compose ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def services() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"])


def test_in_compose_the_daemon_has_no_network_and_shares_its_socket_only(services: dict[str, Any]) -> None:
    assert services["site"]["network_mode"] == "none"
    shared = {part: {volume.split(":")[0] for volume in services[part]["volumes"]} for part in services}
    assert shared["site"] & shared["supernode"] == {"site-socket"}
    assert [part for part in services if "ports" in services[part]] == ["superlink"]
    assert len({services[part]["user"] for part in services}) == 3


def test_in_compose_every_part_is_confined_and_its_user_is_in_the_image(services: dict[str, Any]) -> None:
    image = (DEPLOY / "Dockerfile").read_text()
    for part in services.values():
        assert part["read_only"]
        assert part["cap_drop"] == ["ALL"]
        assert part["security_opt"] == ["no-new-privileges:true"]
        assert re.search(rf"useradd --uid \d+ .* {part['user']} ", image)
        assert part["command"][0] == "fedlora" or (ROOT / part["command"][0]).is_file()


def test_the_image_gets_what_it_needs_and_no_more() -> None:
    first, *allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert first == "*"
    entries = [line[1:] for line in allowed if line.startswith("!")]
    assert all((ROOT / entry).exists() for entry in entries)
    assert {"fedlora", "clients", "server", "deploy", "pyproject.toml", "constraints.txt"} <= set(entries)
