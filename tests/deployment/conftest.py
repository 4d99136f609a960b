"""Deployments to test: sites that hold parts of one generated corpus, and are otherwise as owners would have them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest

pytest.importorskip("flwr")

from deploy.loopback import Loopback
from deploy.services import Service
from fedlora.config import RunConfig
from fedlora.federation.sites import load_simulated_data
from tests.deployment.deployed import SERVE, DeployedSite, Deployment, listens


@pytest.fixture(scope="session")
def deployed_config(tiny_model: Callable[..., Path]) -> Callable[..., RunConfig]:
    """`deployed_config("section.key=value", …)` is a short run of three clients on a tiny random model."""

    def make(*overrides: str) -> RunConfig:
        tables = {
            "model": {"name": str(tiny_model("bert")), "dtype": "float32", "attention": "eager", "head": "frozen"},
            "adapter": {"rank": 4, "alpha": 8.0},
            "data": {"generated_records": 240, "max_length": 16},
            "federation": {"clients": 3, "rounds": 3, "local_steps": 2, "rejoin_deadline": 120.0},
            "training": {"expected_batch_size": 16, "learning_rate": 0.01},
            "privacy": {"epsilon": 1.0, "delta": 1e-3},
            "engine": {"token_budget": 4096, "matmul_precision": "highest", "compile": "off"},
            "run": {"device": "cpu"},
        }
        return RunConfig.from_mapping(tables, overrides)

    return make


class Deploy(Protocol):
    """Starts a deployment of `config`; see `deploy`."""

    def __call__(
        self,
        config: RunConfig,
        *,
        serve: Sequence[str] = SERVE,
        small_disk: int | None = None,
        clocks: Clocks | None = None,
        cuttable: bool = False,
    ) -> Deployment: ...


@dataclass(kw_only=True)
class Clocks:
    """Calendar clocks of a site's host and of the server's, which can be put wrong."""

    folder: Path
    shim: Path

    @classmethod
    def make(cls, folder: Path) -> Clocks | None:
        """None where there is no C compiler."""
        if (compiler := shutil.which("cc")) is None:
            return None
        shim = folder / "clock.so"
        source = Path(__file__).with_name("clock.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(shim), str(source), "-ldl"], check=True)
        clocks = cls(folder=folder, shim=shim)
        clocks.right()
        return clocks

    def right(self) -> None:
        for host in ("server", "site-0"):
            self.put_ahead(host, 0)

    def put_ahead(self, host: str, seconds: int) -> None:
        partial = self.folder / "partial"
        partial.write_text(str(seconds))
        partial.replace(self.folder / host)

    def of(self, host: str) -> dict[str, str]:
        """Variables of a process on `host`."""
        ahead = self.folder.joinpath(host)
        return {"LD_PRELOAD": str(self.shim), "FEDLORA_CLOCK_AHEAD": str(ahead)}


@pytest.fixture(scope="module")
def deploy() -> Iterator[Deploy]:
    """Starts SuperLink, SuperNodes and daemons, and ends them with the tests of the file."""
    with ExitStack() as stack:

        def start(
            config: RunConfig,
            *,
            serve: Sequence[str] = SERVE,
            small_disk: int | None = None,
            clocks: Clocks | None = None,
            cuttable: bool = False,
        ) -> Deployment:
            folder = Path(tempfile.mkdtemp(prefix="fedlora-", dir="/tmp"))  # the path of a socket has to be short
            stack.callback(shutil.rmtree, folder)
            federation = Loopback(folder / "federation", sites=config.federation.clients, cuttable=cuttable)
            stack.enter_context(federation)
            sites = write_sites(folder, config)
            for site in sites:
                command = [*serve, str(site.settings)]
                if site.client == small_disk:
                    site.own_disk = True
                    command = on_a_small_disk(site.folder / "disk", command)
                site.service = Service(
                    name=f"site-{site.client}",
                    command=command,
                    folder=folder / f"site-{site.client}-process",
                    environment=federation.environment,
                    ready=lambda _, socket=site.socket: listens(socket),
                )
                federation.sites.append(site.service)
                key = federation.certificates.site_key(site.client)
                federation.add_supernode(f'partition-id={site.client} site="{site.socket}"', key=key)
            if clocks is not None:
                federation.superlink.environment |= clocks.of("server")
                for service in (sites[0].service, federation.supernodes[0]):
                    service.environment |= clocks.of("site-0")
            start_all(federation)
            deployment = Deployment(federation=federation, sites=sites, config=config, folder=folder)
            stack.callback(deployment.give_up)
            return deployment

        yield start


def write_sites(folder: Path, config: RunConfig) -> list[DeployedSite]:
    """Each has its part of the simulation's records, in the simulation's order."""
    data = load_simulated_data(config)
    sites = [DeployedSite(client=client, folder=folder / f"site-{client}") for client in data.parts]
    for site in sites:
        site.write(data.records.subset(data.parts[site.client]), config.model.name)
    return sites


def on_a_small_disk(folder: Path, command: Sequence[str]) -> list[str]:
    """`command` in a mount namespace of its own, where `folder` is a file system of 256 KiB."""
    script = 'mount -t tmpfs -o size=256k small "$1" && shift && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(folder), *command]


def start_all(federation: Loopback) -> None:
    for daemon in federation.sites:
        daemon.launch()
    federation.superlink.start()
    for number, supernode in enumerate(federation.supernodes):
        federation.register(federation.certificates.site_public_key(number))
        supernode.launch()
    for service in (*federation.sites, *federation.supernodes):
        service.wait_ready()


@dataclass(kw_only=True)
class Stopwatch:
    """Seconds since a fault, for the table of docs/faults.md; no test asserts any."""

    seconds: dict[str, float] = field(default_factory=dict)
    _begun: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        self._begun = time.monotonic()

    def note(self, what: str) -> None:
        self.seconds[what] = round(time.monotonic() - self._begun, 1)


@pytest.fixture(scope="session")
def fault_times() -> Iterator[dict[str, dict[str, float]]]:
    """By test; written to the file $FEDLORA_FAULT_TIMES where it is set."""
    times: dict[str, dict[str, float]] = {}
    yield times
    if path := os.environ.get("FEDLORA_FAULT_TIMES"):
        Path(path).write_text(json.dumps(times, indent=1) + "\n")


@pytest.fixture
def stopwatch(fault_times: dict[str, dict[str, float]], request: pytest.FixtureRequest) -> Stopwatch:
    watch = Stopwatch()
    fault_times[request.node.name] = watch.seconds
    return watch
