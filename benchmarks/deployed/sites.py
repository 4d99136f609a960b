"""Sites with made-up records, each with a daemon that has a clock, and the federation that they make."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, disable_progress_bars

from deploy.loopback import ROOT, SERVING, Loopback
from deploy.services import Service
from fedlora.config import RunConfig
from fedlora.federation.sites import load_simulated_data
from fedlora.models.source import locate_model


@dataclass(frozen=True, kw_only=True)
class Site:
    """A folder with records for fedlora's daemon and for an app of Flower's, and a file for the times of both."""

    client: int
    folder: Path

    @property
    def notes(self) -> Path:
        return self.folder / "notes.jsonl"

    @property
    def policy(self) -> Path:
        return self.folder / "site.toml"

    @property
    def node_config(self) -> str:
        places = {"site": self.folder / "site.sock", "data": self.folder / "records", "notes": self.notes}
        return " ".join([f"partition-id={self.client}", *(f'{key}="{path}"' for key, path in places.items())])


def make_sites(folder: Path, config: RunConfig) -> list[Site]:
    """Every site has its part of the simulation's records; its policy allows what is measured."""
    disable_progress_bars()
    data = load_simulated_data(config)
    digest = locate_model(config.model.name).digest
    sites = [Site(client=client, folder=folder / f"site-{client}") for client in data.parts]
    for site in sites:
        own = data.records.subset(data.parts[site.client])
        rows = {"sentence": list(own.texts[0]), "label": own.labels}
        site.folder.mkdir(parents=True)
        pq.write_table(pa.table(rows), site.folder / "train.parquet")
        Dataset.from_dict(rows).save_to_disk(site.folder / "records")
        site.policy.write_text(
            f'[site]\ndevice = "cpu"\ntoken_budget = {config.engine.token_budget}\n'
            f'[models]\n"{config.model.name}" = "{digest}"\n[limits]\nsmallest_noise_multiplier = 0.3\n'
            f'[data.ward]\ntask = "{config.data.task}"\nsource = "."\nmax_epsilon = 1e4\nmax_delta = 1e-3\n',
            encoding="utf-8",
        )
    return sites


def copy_checkout(folder: Path) -> Path:
    """What is sent and what daemons run, so that an edit in the meantime does not come between the two."""
    for package in ("fedlora", "clients", "server", "benchmarks"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for file in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / file, folder / file)
    return folder


def start(
    stack: ExitStack, folder: Path, sites: Sequence[Site], checkout: Path, environment: dict[str, str]
) -> Loopback:
    """SuperLink, and a SuperNode and a daemon for each site, until `stack` is closed."""
    federation = stack.enter_context(Loopback(folder, sites=len(sites), environment=environment))
    for site in sites:
        command = ["env", "-C", str(checkout), sys.executable, "-m", "benchmarks.deployed.timed_site"]
        daemon = Service(
            name=f"site-{site.client}",
            command=[*command, str(site.notes), str(site.policy)],
            folder=folder / f"site-{site.client}",
            environment=federation.environment,
            ready=lambda service: SERVING in service.log(),
        )
        federation.sites.append(daemon)
        daemon.launch()
    federation.start_superlink()
    for daemon in federation.sites:
        daemon.wait_ready()
    federation.start_supernodes([site.node_config for site in sites])
    return federation
