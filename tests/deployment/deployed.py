"""A deployment on this machine: data owners' folders and daemons, submitted runs, and what must hold of each."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dp_accounting
import psutil
import pyarrow
import pyarrow.parquet
from dp_accounting.pld import PLDAccountant
from safetensors.torch import load_file

from deploy.loopback import CONNECTION, ROOT, Loopback
from deploy.services import Service
from fedlora.config import RunConfig
from fedlora.data.glue import Records
from fedlora.experiments.run_folder import RunFolder
from fedlora.models import locate_model
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.ledger_file import Entry

SERVE = (sys.executable, "-m", "fedlora", "site", "serve", "--json-logs")
POLL = 0.02
MOST_EPSILON = 40.0
"""Of all runs that a test file submits, by a site's policy."""


@dataclass(kw_only=True)
class DeployedSite:
    """A data owner's folder, and the daemon that serves it."""

    client: int
    folder: Path
    own_disk: bool = False
    """Whether `disk/`, with the ledger in it, is a file system that only the daemon sees."""
    service: Service = field(init=False)

    @property
    def settings(self) -> Path:
        return self.folder / "site.toml"

    @property
    def socket(self) -> Path:
        return self.folder / "site.sock"

    def write(self, records: Records, model: str) -> None:
        """The owner's records, and a policy that allows what these tests ask for."""
        (self.folder / "disk").mkdir(parents=True)
        table = pyarrow.table({"sentence": records.texts[0], "label": records.labels})
        pyarrow.parquet.write_table(table, self.folder / "train.parquet")
        self.settings.write_text(
            f'[site]\ndevice = "cpu"\ntoken_budget = 4096\nledger = "disk/ledger.sqlite"\n'
            f'[models]\n"{model}" = "{locate_model(model).digest}"\n[limits]\nsmallest_noise_multiplier = 0.3\n'
            f'[data.ward]\ntask = "sst2"\nsource = "."\nmax_epsilon = {MOST_EPSILON}\nmax_delta = 1e-3\n'
        )

    def edit(self, old: str, new: str) -> None:
        text = self.settings.read_text()
        assert text.count(old) == 1, old
        self.settings.write_text(text.replace(old, new))

    def seen(self, name: str) -> Path:
        """A file of its folder as its daemon sees it."""
        return Path(f"/proc/{self.service.pid}/root{self.folder}" if self.own_disk else self.folder) / name

    def entries(self) -> list[Entry]:
        """Its ledger, whole and unaltered."""
        path = self.folder / "disk" / "ledger.sqlite"
        if self.own_disk:  # SQLite follows the links in a path, and so would leave the daemon's view
            path = shutil.copyfile(self.seen("disk/ledger.sqlite"), self.folder / "copy.sqlite")
        with closing(Ledger.read(path)) as ledger:
            ledger.verify()
            return ledger.entries()

    def at_work(self) -> bool:
        """Whether a round is charged and not yet answered: in between, the daemon computes."""
        assert not self.own_disk
        with closing(sqlite3.connect(f"file:{self.folder / 'disk' / 'ledger.sqlite'}?mode=ro", uri=True)) as ledger:
            last = ledger.execute("SELECT kind FROM entry ORDER BY id DESC LIMIT 1").fetchone()
            return bool(last == ("reserved",))

    def said(self, message: str, run: str) -> Counter[int]:
        """How often its daemon logged `message` of each round of `run`, over all its starts."""
        lines = [json.loads(line) for line in self.service.log(whole=True).splitlines() if line.startswith("{")]
        about = [line for line in lines if line["message"] == message and str(line.get("run", "")).startswith(run)]
        return Counter(line["round"] for line in about)


@dataclass(kw_only=True)
class Submission:
    """`python -m server.submit`, and the run folder that it names."""

    folder: RunFolder
    run: str
    """How the run's id begins, by which ledgers know it."""
    process: subprocess.Popen[str]

    def until(self, done: Callable[[Sequence[Mapping[str, Any]]], bool], within: float = 150.0) -> None:
        """Wait until `done` says so of the rounds in the run folder."""
        wait_for(lambda: done(self.folder.read_rounds()), within, on=self)

    def ended(self, within: float = 200.0) -> tuple[int, str]:
        """Exit code, and what it said."""
        said, _ = self.process.communicate(timeout=within)
        return self.process.returncode, said


@dataclass(kw_only=True)
class Deployment:
    """A federation, its sites, and who submits runs to it."""

    federation: Loopback
    sites: Sequence[DeployedSite]
    config: RunConfig
    folder: Path
    _submissions: list[Submission] = field(default_factory=list)

    def submit(self, name: str, *overrides: str) -> Submission:
        """Begin the run in the folder `name`, or go on with it."""
        out, recipe = self.folder / name, self.folder / f"{name}.toml"
        seed = sum(name.encode())  # so that no two runs have the configuration, and with it the beginning of their ids
        config = self.config.with_overrides(f"run.seed={seed}", f"run.out='{out}'", *overrides)
        recipe.write_text(config.to_toml())
        process = subprocess.Popen(
            [sys.executable, "-m", "server.submit", CONNECTION, str(recipe), "--out", str(out)],
            cwd=ROOT,
            env=self.federation.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        run = config.with_overrides("run.transport=flower").digest()[:16]
        self._submissions.append(Submission(folder=RunFolder(out), run=run, process=process))
        return self._submissions[-1]

    def server_app(self) -> list[psutil.Process]:
        """Processes of the run at work."""
        return self.federation.superlink.processes("flwr-serverapp")

    def give_up(self) -> None:
        """End what submits, and the run at work."""
        for submission in self._submissions:
            submission.process.kill()
            submission.process.communicate()
        self._submissions.clear()
        for process in self.server_app():
            process.kill()

    def restore(self) -> None:
        """After a test that failed: no run is at work, and everything is up."""
        self.give_up()
        if self.federation.wire is not None:
            self.federation.wire.mend()
        for service in (self.federation.superlink, *(site.service for site in self.sites), *self.federation.supernodes):
            service.resume()
            if not service.alive:
                service.restart()

    def check(self, submission: Submission) -> list[dict[str, Any]]:
        """The rounds of a run that ended well: none lost, none charged twice, and no ε below what ledgers say."""
        lines = self.check_rounds(submission)
        record = json.loads(submission.folder.record_file.read_text())
        adapter = load_file(next((submission.folder.path / "adapter").glob("adapter*.safetensors")))
        b = [tensor for name, tensor in adapter.items() if "lora_B" in name]
        assert all(tensor.isfinite().all() for tensor in b)
        kept = record["config"]["adapter"]["method"] == "fedsa"  # by the sites
        assert any(tensor.abs().max() > 0 for tensor in b) != kept
        stated = {facts["client"]: facts["epsilon"] for facts in record["clients"]}
        for site in self.sites:
            spent = epsilon_of(site, submission.run, record["config"]["privacy"]["delta"])
            assert stated[site.client] >= spent * (1 - 1e-3), "dp-accounting's own grid is coarser by less than that"
        return lines

    def check_rounds(self, submission: Submission) -> list[dict[str, Any]]:
        """As `check`, but for what the rounds cost and what they made."""
        code, said = submission.ended()
        assert code == 0, said
        record = json.loads(submission.folder.record_file.read_text())
        lines = submission.folder.read_rounds()
        assert [line["round"] for line in lines] == list(range(record["config"]["federation"]["rounds"]))
        for site in self.sites:
            charged = rounds_charged(site, submission.run)
            answered = {line["round"] for line in lines if str(site.client) not in line["failures"]}
            assert all(kinds.count("reserved") == 1 for kinds in charged.values()), charged
            assert answered <= {index for index, kinds in charged.items() if kinds == ["reserved", "spent"]}
        return lines


def rounds_charged(site: DeployedSite, run: str) -> dict[int, list[str]]:
    """What the ledger of `site` says of each round of `run`, in order."""
    entries = site.entries()
    round_of = {row.id: row.round for row in entries if row.run is not None and row.run.startswith(run)}
    told: dict[int, list[str]] = {}
    for row in entries:
        index = round_of.get(row.id if row.reservation is None else row.reservation)
        if index is not None:
            told.setdefault(index, []).append(row.kind)
    return told


def epsilon_of(site: DeployedSite, run: str, delta: float) -> float:
    """Of all that the ledger of `site` says `run` was charged, by dp-accounting and none of our code."""
    accountant = PLDAccountant()
    for row in site.entries():
        if row.run is not None and row.run.startswith(run):
            release = dp_accounting.GaussianDpEvent(row.noise_multiplier)
            accountant.compose(dp_accounting.PoissonSampledDpEvent(row.sampling_probability, release), row.num_steps)
    return float(accountant.get_epsilon(delta))


def wait_for(done: Callable[[], bool], within: float = 60.0, *, on: Submission | None = None) -> None:
    """Until `done`; a run that ends before is a failure, and so is a wait that lasts longer."""
    end = time.monotonic() + within
    while not done():
        if on is not None and on.process.poll() is not None and not done():
            raise AssertionError(f"the run ended with {on.ended()}, its rounds: {on.folder.read_rounds()}")
        assert time.monotonic() < end, f"not within {within:g} s"
        time.sleep(POLL)


def failures(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [line["failures"] for line in lines]


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0
