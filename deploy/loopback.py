"""A whole deployment on this machine: SuperLink, SuperNodes and site daemons, with TLS and SuperNode authentication.

    with Loopback(folder) as federation:
        federation.start_superlink()
        federation.start_supernodes(["partition-id=0", "partition-id=1"])
        run = federation.submit({"run.out": "/absolute/path"})
        status = federation.wait(run, limit=300)

Every part is a `Service`: `federation.superlink.kill()`, `federation.supernodes[1].start()`, `.log()`, `.processes()`.
Only 127.0.0.1 is used. On leaving the block every process is ended, and what processes left behind with it.
"""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import tomli_w

from deploy.certificates import Certificates, make_certificates
from deploy.network import Wire
from deploy.services import Service, quiet_environment
from fedlora.errors import FedloraError
from server.superlink import COMMAND_LIMIT, RunStatus, SuperLink

ROOT = Path(__file__).resolve().parents[1]
EXECUTABLES = Path(sys.executable).parent
CONNECTION = "loopback"
"""Name of the SuperLink in the `flwr` command's configuration."""
NODE_ID_LINE, SERVING = "SuperNode ID: ", "serving"
"""What SuperNode and daemon log once they can be used."""


class Loopback:
    """Keys, addresses and processes of one federation below `folder`, which is new or empty.

    Attributes:
        superlink: started by `start_superlink`.
        supernodes: in the order in which they were added.
        sites: site daemons, in the order in which they were started.
        wire: between SuperNodes and SuperLink, with `cuttable=True`; `federation.wire.cut()`, `.mend()`.
    """

    def __init__(
        self, folder: Path, *, sites: int = 3, cuttable: bool = False, environment: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            folder: for keys, logs, database and what Flower keeps.
            sites: number of SuperNode key pairs.
            cuttable: lead the SuperNodes through a wire that can be cut; submitters reach the SuperLink directly.
            environment: further variables for every process.
        """
        self.folder = folder.absolute()
        self.port = free_port()
        self.certificates: Certificates = make_certificates(
            self.folder / "keys", hosts=["localhost", "127.0.0.1"], sites=sites
        )
        self._more = dict(environment or {})
        self.superlink = self._superlink()
        self.supernodes: list[Service] = []
        self.sites: list[Service] = []
        self.wire: Wire | None = None
        self._cuttable = cuttable
        self._closing = ExitStack()
        self._registered: set[Path] = set()
        self._write_connection()

    def __enter__(self) -> Self:
        if self._cuttable:
            self.wire = Wire(self.port)
            self._closing.callback(self.wire.close)
        self._closing.callback(self._stop_all)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    @property
    def environment(self) -> dict[str, str]:
        """For commands of whoever submits runs: `flwr …`, `python -m server.submit`."""
        return quiet_environment(EXECUTABLES, **self._more, FLWR_HOME=str(self.folder / "submitter"))

    @property
    def _seen_by_submitters(self) -> SuperLink:
        return SuperLink(connection=CONNECTION, environment=self.environment)

    def start_superlink(self) -> None:
        self.superlink.start()

    def start_supernodes(self, node_configs: Sequence[str]) -> list[Service]:
        """Register as many keys and start as many SuperNodes, at the same time.

        Args:
            node_configs: what `--node-config` gets, such as `partition-id=0 site="/srv/site.sock"`.
        """
        added = []
        for node_config in node_configs:
            number = len(self.supernodes)
            self.register(self.certificates.site_public_key(number))
            added.append(self.add_supernode(node_config, key=self.certificates.site_key(number)))
        for supernode in added:
            supernode.launch()
        for supernode in added:
            supernode.wait_ready()
        return added

    def add_supernode(self, node_config: str, *, key: Path, authority: Path | None = None) -> Service:
        """A SuperNode that is yet to be started, by deploy/supernode.sh.

        Args:
            node_config: what `--node-config` gets.
            key: its private key, registered or not.
            authority: another than the federation's own.
        """
        trust, state = authority or self.certificates.authority, self.folder / f"supernode-{len(self.supernodes)}"
        command = [str(ROOT / "deploy" / "supernode.sh"), self._fleet_address, str(trust), str(key), str(state)]
        return self._add_supernode([*command, node_config, "--port", str(free_port())])

    def add_stranger(self, *options: str) -> Service:
        """`flower-supernode` with nothing but the SuperLink's address and `options`, yet to be started."""
        return self._add_supernode(
            ["flower-supernode", "--superlink", self._fleet_address, "--port", str(free_port()), *options]
        )

    def start_site(self, policy: Path) -> Service:
        """`fedlora site serve POLICY`, ready when it says so."""
        name = f"site-{len(self.sites)}"
        command = [sys.executable, "-m", "fedlora", "site", "serve", str(policy.absolute())]
        service = self._service(name, command, lambda service: SERVING in service.log())
        self.sites.append(service)
        service.start()
        return service

    def register(self, public_key: Path) -> None:
        """Let the SuperNode with this key in; a key that is in already is left."""
        if public_key not in self._registered:
            self.flwr("supernode", "register", str(public_key), CONNECTION)
            self._registered.add(public_key)

    def submit(self, config: Mapping[str, Any], app: Path = ROOT) -> int:
        """`flwr run`; the run's id.

        Args:
            config: dotted keys of `[tool.flwr.app.config]` and their values.
            app: the folder to send; this checkout.
        """
        return self._seen_by_submitters.submit(config, app)

    def status(self, run: int) -> RunStatus:
        return self._seen_by_submitters.status(run)

    def wait(self, run: int, limit: float) -> RunStatus:
        """Until the run has finished, well or not.

        Raises:
            FedloraError: it has not after `limit` seconds.
        """
        end = time.monotonic() + limit
        while not (status := self.status(run)).finished:
            if time.monotonic() > end:
                raise FedloraError(f"run {run} is {status.status} after {limit:g} s:\n{self.superlink.log()[-3000:]}")
            time.sleep(1.0)
        return status

    def nodes(self) -> list[dict[str, Any]]:
        """What the SuperLink knows of its SuperNodes: `node-id`, `status` (registered, online, offline), …"""
        answer = json.loads(self.flwr("supernode", "ls", CONNECTION, "--format", "json").stdout)
        return list(answer["nodes"])

    def flwr(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Flower's command, as whoever submits runs.

        Raises:
            FedloraError: with `check`, it ended with another code than 0.
        """
        done = subprocess.run(
            [str(EXECUTABLES / "flwr"), *arguments],
            cwd=self.folder / "submitter",
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT,
        )
        if check and done.returncode != 0:
            raise FedloraError(f"flwr {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def _superlink(self) -> Service:
        script, state = ROOT / "deploy" / "superlink.sh", self.folder / "superlink"
        listen = ["--host", "127.0.0.1", "--port", str(self.port)]
        command = [str(script), str(self.certificates.folder), str(state), *listen]
        return self._service("superlink", command, lambda _: _accepts(self.port))

    @property
    def _fleet_address(self) -> str:
        return f"127.0.0.1:{self.port if self.wire is None else self.wire.port}"

    def _add_supernode(self, command: Sequence[str]) -> Service:
        service = self._service(
            f"supernode-{len(self.supernodes)}", command, lambda service: NODE_ID_LINE in service.log()
        )
        self.supernodes.append(service)
        return service

    def _service(self, name: str, command: Sequence[str], ready: Callable[[Service], bool]) -> Service:
        """Each has a Flower home of its own, as on machines of their own."""
        folder = self.folder / name
        environment = quiet_environment(EXECUTABLES, **self._more, FLWR_HOME=str(folder / "home"))
        return Service(name=name, command=command, folder=folder, environment=environment, ready=ready)

    def _write_connection(self) -> None:
        connection = {"address": f"127.0.0.1:{self.port}", "root-certificates": str(self.certificates.authority)}
        home = self.folder / "submitter"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}}))

    def _stop_all(self) -> None:
        """SuperNodes first, which say goodbye; every service gets its turn whatever happens to another."""
        with ExitStack() as stack, ThreadPoolExecutor() as together:
            for service in (*self.sites, self.superlink):
                stack.callback(service.stop)
            for goodbye in [together.submit(supernode.stop) for supernode in self.supernodes]:
                stack.callback(goodbye.result)


def free_port() -> int:
    """Below the ports that the system hands out: a client that keeps trying a dead one of those can meet itself."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise FedloraError("no free port between 20000 and 32000 on 127.0.0.1")


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
