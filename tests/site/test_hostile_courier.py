"""A hostile ClientApp as another user of the machine, with all that a courier may: it meets the operating system."""

from __future__ import annotations

import ctypes
import errno
import grp
import json
import os
import shutil
import signal
import socket
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from fedlora.errors import FedloraError
from fedlora.site.connection import DaemonAddress
from fedlora.site.protocol import Request
from tests.site.conftest import Asking, SiteFolder, update_in
from tests.site.process import DaemonProcess

COURIER = 61_234
"""A user that no system has."""


def as_courier(group: int, do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `do` returns in a process of the courier's user, which is a member of the socket's group and of no other."""
    receiving, sending = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads in a process that forks
        child = os.fork()
    if child == 0:
        try:
            os.setgroups([group])
            os.setresgid(COURIER, COURIER, COURIER)
            os.setresuid(COURIER, COURIER, COURIER)
            told = json.dumps(do())
        except BaseException as error:  # never back into pytest
            told = json.dumps({"failed": f"{type(error).__name__}: {error}"})
        os.write(sending, told.encode())
        os._exit(0)
    os.close(sending)
    with os.fdopen(receiving) as stream:
        found: dict[str, Any] = json.load(stream)
    os.waitpid(child, 0)
    return found


def outcome(attack: Callable[[], object]) -> str:
    """ "done", or the system's name for why not."""
    try:
        attack()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except FedloraError as error:
        return type(error).__name__
    return "done"


def ptrace(process: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(16, process, None, None) != 0:  # PTRACE_ATTACH
        raise OSError(ctypes.get_errno(), "ptrace")


def attacks(folder: SiteFolder, place: Path, process: int) -> dict[str, Callable[[], object]]:
    secret = {
        "records": folder.path / "records" / "train.parquet",
        "policy": folder.settings,
        "ledger": folder.path / "ledger.sqlite",
        "answers": folder.path / "answers.sqlite",
        "claim": folder.path / "ledger.daemon",
        "log": folder.path / "log",
    }
    memory = ("mem", "environ", "maps", "auxv", "stack")
    own = place.parent / "own.sock"
    return {
        **{f"read the {name}": path.read_bytes for name, path in secret.items()},
        **{f"write the {name}": lambda path=path: path.open("r+b") for name, path in secret.items()},
        **{f"remove the {name}": path.unlink for name, path in secret.items()},
        **{f"read /proc/…/{name}": Path(f"/proc/{process}/{name}").read_bytes for name in memory},
        **{
            f"follow /proc/…/{name}": lambda name=name: [*Path(f"/proc/{process}/{name}").iterdir()]
            for name in ("cwd", "fd")
        },
        "list the site's folder": lambda: [*folder.path.iterdir()],
        "open a file in the site's folder": lambda: (folder.path / "x").touch(),
        "trace the daemon": lambda: ptrace(process),
        "end the daemon": lambda: os.kill(process, signal.SIGTERM),
        "remove the socket": place.unlink,
        "rename the socket": lambda: place.rename(place.with_name("x")),
        "open the socket to all": lambda: place.chmod(0o666),
        "put another socket beside it": lambda: socket.socket(socket.AF_UNIX).bind(str(own)),
        "put a link beside it": lambda: (place.parent / "x").symlink_to("/dev/null"),
    }


@pytest.fixture
def group() -> grp.struct_group:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; run the tests as root, in a container for example")
    return next(found for found in grp.getgrall() if found.gr_gid not in (0, *os.getgroups()))


@pytest.fixture
def place(group: grp.struct_group) -> Iterator[Path]:
    """In a folder that the courier's group may pass through, as docs/deployment.md and `fedlora site check` say."""
    folder = Path(tempfile.mkdtemp(prefix="fedlora-run-", dir="/tmp"))
    os.chown(folder, 0, group.gr_gid)
    folder.chmod(0o750)
    yield folder / "site.sock"
    shutil.rmtree(folder)


def test_another_user_reaches_nothing_but_the_socket(
    site_folder: SiteFolder, asking: Asking, group: grp.struct_group, place: Path, tmp_path: Path
) -> None:
    where = f'device = "cpu"\nsocket = "{place}"\nsocket_group = "{group.gr_name}"'
    site_folder.write_policy(('device = "cpu"', where))
    questions = {
        "round": asking.round(),
        "another for the same round": asking.round(theta=0.1),
        "looser": asking.under("privacy.epsilon=8").round(),
        "status": Request(ask="status"),
    }  # made here: torch stays out of the forked process
    with DaemonProcess(folder=site_folder, socket=place, environment=_homes(tmp_path)) as daemon:
        hostile = attacks(site_folder, place, daemon.pid)

        def everything() -> dict[str, Any]:
            door = DaemonAddress(place=str(place))
            codes = {name: door.ask(question, limit=60.0).code for name, question in questions.items()}
            return {"codes": codes} | {name: outcome(attack) for name, attack in hostile.items()}

        found = as_courier(group.gr_gid, everything)
        codes = {"round": "ok", "another for the same round": "over", "looser": "refused", "status": "refused"}
        assert found.pop("codes") == codes
        assert found.keys() == hostile.keys()
        assert {name: code for name, code in found.items() if code not in ("EACCES", "EPERM")} == {}
        assert daemon.ask(Request(ask="status")).code == "ok", "alive, and its owner may ask"
        assert daemon.kinds() == ["reserved", "spent"]
    assert stat.S_IMODE(site_folder.path.stat().st_mode) == 0o700


def _homes(folder: Path) -> dict[str, str]:
    return dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "FEDLORA_CACHE"), str(folder))


def test_no_record_is_written_anywhere_else(site_folder: SiteFolder, asking: Asking, tmp_path: Path) -> None:
    """Libraries keep caches, whose files may be anybody's to read."""
    site_folder.write_records(seed=7)
    with DaemonProcess(folder=site_folder, socket=site_folder.socket, environment=_homes(tmp_path)) as daemon:
        for index in range(2):
            update_in(daemon.ask(asking.round(index)))
    table = pyarrow.parquet.read_table(site_folder.path / "records" / "train.parquet")
    texts = [text.encode() for text in table["sentence"].to_pylist()]
    written = [path for path in (*tmp_path.rglob("*"), site_folder.path / "log") if path.is_file()]
    assert written
    assert not [path for path in written if any(text in path.read_bytes() for text in texts)]


def test_without_the_group_nobody_even_knocks(site_folder: SiteFolder, group: grp.struct_group, place: Path) -> None:
    site_folder.write_policy(('device = "cpu"', f'device = "cpu"\nsocket = "{place}"'))
    place.parent.chmod(0o755)
    with DaemonProcess(folder=site_folder, socket=place):
        found = as_courier(
            group.gr_gid, lambda: {"connect": outcome(lambda: socket.socket(socket.AF_UNIX).connect(str(place)))}
        )
    assert found == {"connect": "EACCES"}
