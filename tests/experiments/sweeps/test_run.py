"""A sweep runs every cell once, keeps what has ended, and goes on from where it stopped."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlora.errors import RunFolderError, StoreError
from fedlora.experiments.account import write_account
from fedlora.experiments.model_card import model_card
from fedlora.experiments.privacy_report import privacy_report
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.runs.store import Store
from fedlora.experiments.runs.stored_run import StoredRun
from fedlora.experiments.sweeps import worker as worker_module
from fedlora.experiments.sweeps.folder import SweepFolder
from fedlora.experiments.sweeps.run import SweepRun
from fedlora.experiments.sweeps.sweep import Cell, Sweep
from fedlora.experiments.sweeps.worker import Job, Worker
from fedlora.experiments.sweeps.workers import LocalWorkers, Workers
from fedlora.privacy.accounting import epsilon
from fedlora.privacy.ledger import DataSet, Ledger

MakeSweep = Callable[..., Path]
GRID = "[grid]\nprivacy.epsilon = [inf, 6.0]\nrun.seed = [0, 1]\n"


class Here:
    """One worker, in this process."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self._worker = Worker()

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str] | None]:
        for job in jobs:
            self.jobs.append(job)
            yield job, self._worker.run(job)
            yield None


class Log:
    """What a watcher was told."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.ends: list[tuple[Cell, StoredRun]] = []

    def start(self, *, total: int, done: int) -> None:
        self.total, self.done = total, done

    def ended(self, cell: Cell, run: StoredRun) -> None:
        self.ends.append((cell, run))

    def look(self, started: float) -> None:
        assert 0 <= started <= self.total


def go(file: Path, out: Path, workers: Workers, log: Log | None = None) -> dict[str, StoredRun]:
    sweep = Sweep.from_toml(file)
    with SweepFolder.claimed(out, sweep) as folder, Store.create(out) as store:
        running = SweepRun.open(sweep, folder, store)
        running.go(workers, log or Log())
        return {run.digest: run for run in store.runs()}


def outcome(runs: dict[str, StoredRun]) -> dict[str, Any]:
    """What must not depend on how a sweep was run."""
    assert all(run.record for run in runs.values()), runs
    return {
        digest: (run.axes, run.record and run.record["metrics"], [line["metrics"] for line in run.rounds])
        for digest, run in runs.items()
    }


@pytest.fixture(scope="module")
def whole(tiny_config: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, StoredRun]]:
    """GRID, run through in this process."""
    place = tmp_path_factory.mktemp("whole")
    file = make_file(tiny_config, place, GRID)
    return place / "out", go(file, place / "out", Here())


def make_file(tiny_config: Any, place: Path, text: str, *settings: str) -> Path:
    config = tiny_config(
        "federation.rounds=2", "federation.local_steps=1", "privacy.accountant=rdp", "model.head=prototype", *settings
    )
    (place / "tiny.toml").write_text(config.to_toml())
    (place / "sweep.toml").write_text(f'recipe = "tiny.toml"\n{text}')
    return place / "sweep.toml"


# ------------------------------------------------------------------------------------------------------------ once each


def test_every_cell_leaves_a_run_folder_and_a_row(whole: tuple[Path, dict[str, StoredRun]]) -> None:
    out, runs = whole
    assert sorted(tuple(run.axes.values()) for run in runs.values()) == [
        ("6", "0"),
        ("6", "1"),
        ("inf", "0"),
        ("inf", "1"),
    ]
    for run in runs.values():
        record = json.loads((out / run.folder / "record.json").read_text())
        assert run.record == record
        assert record["config"]["privacy"]["epsilon"] in (6.0, "inf")
        assert record["config"]["run"]["seed"] == int(run.axes["run.seed"])
        assert (out / run.folder / "PRIVACY.md").is_file()


def test_what_is_done_is_not_done_again(whole: tuple[Path, dict[str, StoredRun]], tmp_path: Path) -> None:
    out, runs = whole
    again, log = Here(), Log()
    assert outcome(go(out.parent / "sweep.toml", out, again, log)) == outcome(runs)
    assert (again.jobs, log.total, log.done) == ([], 4, 4)


def test_cells_of_one_worker_share_no_noise_and_no_batches(tiny_config: Any, tmp_path: Path) -> None:
    """The secret root of a run is none of the things that a worker keeps."""
    settings = ("privacy.seeded_noise=false", "privacy.accountant=rdp", "model.head=prototype", "federation.rounds=1")
    worker, config = Worker(), tiny_config(*settings)
    for name in ("first", "second"):
        assert worker.run(Job(config=config, folder=tmp_path / name)) == ""
    first, second = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("first", "second")
    )
    trained = [name for name in first if ".lora_B." in name]
    assert trained
    for name in first:
        assert torch.equal(first[name], second[name]) == (name not in trained), name


def test_more_values_are_more_cells_and_nothing_else(tiny_config: Any, tmp_path: Path) -> None:
    file = make_file(tiny_config, tmp_path, "[grid]\nrun.seed = [0, 1]\n")
    go(file, tmp_path / "out", Here())
    more = Here()
    runs = go(make_file(tiny_config, tmp_path, "[grid]\nrun.seed = [1, 2]\n"), tmp_path / "out", more)
    assert [job.config.run.seed for job in more.jobs] == [2]
    assert len(runs) == 3


def test_a_store_that_was_lost_is_made_again_from_the_folders(
    whole: tuple[Path, dict[str, StoredRun]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, runs = whole
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    (copy / "runs.sqlite").unlink()
    monkeypatch.setattr(Worker, "_run", lambda *_: pytest.fail("a whole run is not run again"))
    assert outcome(go(out.parent / "sweep.toml", copy, Here())) == outcome(runs)


# ------------------------------------------------------------------------------------------------------------- failures


def test_a_cell_that_fails_stops_no_other_and_is_tried_again_by_the_next_command(
    tiny_config: Any, tmp_path: Path
) -> None:
    labels = '[axes.data]\nhere = {}\nelsewhere = { data.source = "%s" }\n'
    place = tmp_path / "glue"
    file = make_file(tiny_config, tmp_path, labels % place)
    log = Log()
    runs = go(file, tmp_path / "out", Here(), log)
    by_label = {run.axes["data"]: run for run in runs.values()}
    assert by_label["here"].status == "done"
    assert "glue" in by_label["elsewhere"].error
    assert "\n" not in by_label["elsewhere"].error
    assert not (tmp_path / "out" / by_label["elsewhere"].folder).exists()
    assert [run.status for _, run in log.ends] == ["done", "failed"]
    again = Here()
    go(file, tmp_path / "out", again)
    assert [job.config.data.source for job in again.jobs] == [str(place)]


def test_a_mistake_of_ours_fails_one_cell_and_keeps_the_traceback(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Worker._run

    def sometimes(self: Worker, job: Job, folder: RunFolder) -> None:
        if job.config.run.seed == 0:
            raise ZeroDivisionError("a record: by\nzero")
        run(self, job, folder)

    monkeypatch.setattr(Worker, "_run", sometimes)
    file = make_file(tiny_config, tmp_path, "[grid]\nrun.seed = [0, 1, 2]\n")
    runs = go(file, tmp_path / "out", Here())
    (failed,) = (run for run in runs.values() if run.status == "failed")
    assert failed.error == f"ZeroDivisionError; {Path(failed.folder).name}.log beside its folder has all of it"
    assert "a record: by\nzero" in (tmp_path / "out" / f"{failed.folder}.log").read_text()
    assert b"a record" not in (tmp_path / "out" / "runs.sqlite").read_bytes(), "which may be published"
    monkeypatch.undo()
    assert {run.status for run in go(file, tmp_path / "out", Here()).values()} == {"done"}
    assert not (tmp_path / "out" / f"{failed.folder}.log").exists()


def test_a_damaged_record_fails_its_cell_and_no_other(whole: tuple[Path, dict[str, StoredRun]], tmp_path: Path) -> None:
    out, runs = whole
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    (copy / "runs.sqlite").unlink()
    victim = next(iter(runs.values()))
    record = copy / victim.folder / "record.json"
    record.write_text(record.read_text()[:1000])
    found = go(out.parent / "sweep.toml", copy, Here())
    assert [run.digest for run in found.values() if run.status == "failed"] == [victim.digest]
    assert "record.json is damaged" in found[victim.digest].error
    assert f"delete {copy / victim.folder} to run it again" in found[victim.digest].error
    shutil.rmtree(copy / victim.folder)
    assert outcome(go(out.parent / "sweep.toml", copy, Here())) == outcome(runs)


def test_what_a_kill_left_of_a_folder_without_a_config_is_no_obstacle(tiny_config: Any, tmp_path: Path) -> None:
    file = make_file(tiny_config, tmp_path, "")
    (cell,) = Sweep.from_toml(file).cells()
    with SweepFolder.claimed(tmp_path / "out", Sweep.from_toml(file)):
        left = tmp_path / "out" / cell.folder / "config.partial"
    left.parent.mkdir(parents=True)
    left.write_text("[model]\nna")
    assert {run.status for run in go(file, tmp_path / "out", Here()).values()} == {"done"}


def test_a_full_disk_stops_the_sweep_and_loses_nothing(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, put = make_file(tiny_config, tmp_path, "[grid]\nrun.seed = [0, 1, 2]\n"), Store.put

    def full(self: Store, run: StoredRun) -> None:
        if run.axes["run.seed"] == "1":
            raise StoreError("database or disk is full")
        put(self, run)

    monkeypatch.setattr(Store, "put", full)
    with pytest.raises(StoreError, match="full"):
        go(file, tmp_path / "out", Here())
    monkeypatch.undo()
    again = Here()
    runs = go(file, tmp_path / "out", again)
    assert {run.status for run in runs.values()} == {"done"}
    assert [job.config.run.seed for job in again.jobs] == [1, 2]


# -------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (GRID, ["federation.local_steps=2"], "holds a sweep with federation.local_steps = 1, not 2"),
        ("[grid]\nrun.seed = [0, 1]\n", [], "holds a sweep with axes privacy.epsilon, run.seed"),
        (GRID + "[tune]\nhow = 'grid'\n[tune.space]\ntraining.learning_rate = [1.0]", [], r"another \[tune\]"),
    ],
)
def test_a_folder_takes_no_other_sweep(
    whole: tuple[Path, dict[str, StoredRun]],
    tiny_config: Any,
    tmp_path: Path,
    text: str,
    settings: list[str],
    message: str,
) -> None:
    out, _ = whole
    before = (out / "sweep.toml").read_text()
    other = Sweep.from_toml(make_file(tiny_config, tmp_path, text, *settings))
    with pytest.raises(RunFolderError, match=message), SweepFolder.claimed(out, other):
        pass
    assert (out / "sweep.toml").read_text() == before


def test_a_label_keeps_its_meaning(tiny_config: Any, tmp_path: Path) -> None:
    text = "[axes.method]\na = {{}}\nb = {{ adapter.rank = {} }}\n"
    first, other = (Sweep.from_toml(make_file(tiny_config, tmp_path, text.format(rank))) for rank in (2, 3))
    with SweepFolder.claimed(tmp_path / "out", first):
        pass
    refusal = pytest.raises(RunFolderError, match="other settings for method b")
    with refusal, SweepFolder.claimed(tmp_path / "out", other):
        pass


@pytest.mark.parametrize("what", ["file", "full folder"])
def test_what_is_no_sweeps_folder_is_left_as_it_is(tiny_config: Any, tmp_path: Path, what: str) -> None:
    sweep, out = Sweep.from_toml(make_file(tiny_config, tmp_path, GRID)), tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    refusal = pytest.raises(RunFolderError, match="no sweep's folder; choose another with --out")
    with refusal, SweepFolder.claimed(out, sweep):
        pass
    assert (out if what == "file" else out / "thesis.txt").read_text() == "mine"


def test_two_processes_do_not_run_one_sweep(whole: tuple[Path, dict[str, StoredRun]]) -> None:
    out, _ = whole
    sweep = Sweep.from_toml(out.parent / "sweep.toml")
    refusal = pytest.raises(RunFolderError, match="another process runs the sweep")
    with SweepFolder.claimed(out, sweep), refusal, SweepFolder.claimed(out, sweep):
        pass
    with SweepFolder.claimed(out, sweep) as folder:
        assert folder.read_sweep() == sweep


HALF = "data.validation_part=reporting"
TUNE = "[tune]\nper = []\n[tune.space]\ntraining.learning_rate = [0.5, 1.0]\n"
METHODS = "[axes.method]\n%s\n%s\n"
A, B = "a = { adapter.rank = 2 }", "b = { adapter.rank = 3 }"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (METHODS % (B, A) + TUNE, "trials at method a, not b"),
        (METHODS % (A, B) + '[[exclude]]\nmethod = "a"\n' + TUNE, "trials at method a, not b"),
        (METHODS % (B, "") + TUNE, "trials at method a, not b"),
        (METHODS % (A, B) + TUNE, ""),
        (METHODS % (B, A) + TUNE + "[tune.set]\nadapter.rank = 4\n", r"another \[tune\]"),
    ],
    ids=["in front", "excluded", "gone", "behind", "another tune"],
)
def test_trials_that_were_run_are_not_replaced(tiny_config: Any, tmp_path: Path, text: str, message: str) -> None:
    """They were released, and the choice would forget them."""
    first, other = (
        Sweep.from_toml(make_file(tiny_config, tmp_path, t, HALF)) for t in (METHODS % (A, "") + TUNE, text)
    )
    with SweepFolder.claimed(tmp_path / "out", first):
        pass
    refusal = pytest.raises(RunFolderError, match=message) if message else contextlib.nullcontext()
    with refusal as refused, SweepFolder.claimed(tmp_path / "out", other):
        pass
    assert refused is None or "\n" not in str(refused.value)


def test_labels_may_change_places_where_trials_do_not_depend_on_them(tiny_config: Any, tmp_path: Path) -> None:
    for table in (TUNE + "[tune.set]\nadapter.rank = 4\n", TUNE.replace("per = []", 'per = ["method"]')):
        sweeps = [
            Sweep.from_toml(make_file(tiny_config, tmp_path, METHODS % x + table, HALF)) for x in ((A, B), (B, A))
        ]
        out = tmp_path / str(len(table))
        for sweep in sweeps:
            with SweepFolder.claimed(out, sweep):
                pass


# ------------------------------------------------------------------------------------------------------------- tuning

ONE_CELL = "[grid]\nrun.seed = [0]\n" + TUNE
SECRET = ("privacy.seeded_noise=false", "privacy.epsilon=6", HALF)


class Killed(BaseException):
    pass


def said(out: Path, run: StoredRun) -> tuple[str, str, dict[str, Any]]:
    """PRIVACY.md, the adapter's card and the record."""
    place = out / run.folder
    record = json.loads((place / "record.json").read_text())
    return (place / "PRIVACY.md").read_text(), (place / "adapter" / "README.md").read_text(), record


def cell_of(runs: dict[str, StoredRun]) -> StoredRun:
    (cell,) = (run for run in runs.values() if run.role == "cell")
    return cell


def test_a_cells_report_and_card_say_what_its_record_says_of_trials(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = make_file(tiny_config, tmp_path, ONE_CELL, *SECRET), tmp_path / "out"
    cell = cell_of(go(file, out, Here()))
    report, card, record = whole = said(out, cell)
    note = record["tuning"]["note"]
    assert "All of them with this run cost a record of a site at most ε = " in note
    assert record["tuning"]["epsilon_with_trials"] > record["privacy"]["guarantee"]["epsilon"]
    verdict = report.split("## In plain words")[0]
    assert "The ε above is that of this run alone." in verdict
    assert note in verdict
    assert note in card
    assert (privacy_report(record), model_card(record)) == (report, card)
    for name in ("README.partial", "PRIVACY.partial", "record.partial"):  # killed when it wrote this
        without = {key: value for key, value in record.items() if key != "tuning"}
        shutil.rmtree(out / cell.folder / "adapter" / name, ignore_errors=True)
        write_account(RunFolder(out / cell.folder), without)
        (out / "runs.sqlite").unlink()
        monkeypatch.setattr(Path, "replace", stopping_at(name))
        with pytest.raises(Killed):
            go(file, out, Here())
        monkeypatch.undo()
        assert "tuning" not in said(out, cell)[2], "it is not done"
        again = Here()
        go(file, out, again)
        assert said(out, cell) == whole


def stopping_at(name: str) -> Callable[[Path, Path], Path]:
    replace = Path.replace

    def stop(self: Path, target: Path) -> Path:
        if self.name == name:
            raise Killed
        return replace(self, target)

    return stop


def test_a_trial_that_was_killed_again_and_again_and_failed_is_charged_for_all_of_it(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the record says is no less than what the ledgers of all runs add up to."""
    from fedlora.federation.cohort import Cohort

    file, out = make_file(tiny_config, tmp_path, ONE_CELL, *SECRET), tmp_path / "out"
    whole_runs = go(file, tmp_path / "undisturbed", Here())
    run, fault = Cohort.run, [Killed] * 5 + [RuntimeError]

    def dying(self: Cohort, instruction: Any) -> Iterator[Any]:
        config = self.workbench.config
        for update in run(self, instruction):
            if config.run.seed == 1000 and config.training.learning_rate == 0.5 and instruction.round_index == 2:
                raise fault.pop(0)("dead")
            yield update

    monkeypatch.setattr(Cohort, "run", dying)
    for _ in range(5):
        with pytest.raises(Killed):
            go(file, out, Here())
    runs = go(file, out, Here())
    assert not fault
    facts = cell_of(runs).record["tuning"]  # type: ignore[index]
    assert facts["failed"] == 1
    charges = []
    for path in sorted(out.glob("*/*/ledger.sqlite")):
        with contextlib.closing(Ledger.read(path)) as ledger:
            charges += ledger.charges(DataSet(fingerprint="client 0", name="client 0"))
    assert sum(charge.num_steps for charge in charges) == 3 * 3 + 5
    assert facts["epsilon_with_trials"] >= epsilon(charges, facts["delta"])
    assert facts["epsilon_with_trials"] > 1.05 * cell_of(whole_runs).record["tuning"]["epsilon_with_trials"]  # type: ignore[index]


def test_a_trials_damaged_record_asks_nobody_to_run_it_again(tiny_config: Any, tmp_path: Path) -> None:
    file, out = make_file(tiny_config, tmp_path, ONE_CELL, *SECRET), tmp_path / "out"
    runs = go(file, out, Here())
    victim = next(run for run in runs.values() if run.role == "trial")
    record = out / victim.folder / "record.json"
    record.write_text(record.read_text()[:1000])
    (out / "runs.sqlite").unlink()
    error = go(file, out, Here())[victim.digest].error
    assert "it counts as tried and failed" in error
    assert "delete" not in error
    assert "remove" not in error


# ------------------------------------------------------------------------------------------------------------ processes


def test_the_number_of_workers_changes_nothing(whole: tuple[Path, dict[str, StoredRun]], tmp_path: Path) -> None:
    out, runs = whole
    with LocalWorkers(3) as workers:
        assert outcome(go(out.parent / "sweep.toml", tmp_path / "out", workers)) == outcome(runs)
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_takes_one_cell_with_it_which_goes_on_later(
    whole: tuple[Path, dict[str, StoredRun]], tmp_path: Path
) -> None:
    out, runs = whole
    log = Log()

    def kill_the_first() -> None:
        while not any(tmp_path.glob("out/cells/*/rounds.jsonl")):
            time.sleep(0.01)
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    with LocalWorkers(1) as workers:
        found = go(out.parent / "sweep.toml", tmp_path / "out", workers, log)
    killer.join()
    failed = [run for run in found.values() if run.status == "failed"]
    assert len(failed) <= 1, "none, where the cell had ended by then"
    assert all(run.error.startswith("its process died") for run in failed)
    assert outcome(go(out.parent / "sweep.toml", tmp_path / "out", Here())) == outcome(runs)


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    context = multiprocessing.get_context("spawn")
    told, tell = context.Pipe(duplex=False)
    parent = context.Process(target=_parent, args=(tell,))
    parent.start()
    child = told.recv()
    os.kill(parent.pid or 0, signal.SIGKILL)
    parent.join()
    for _ in range(500):
        if not _alive(child):
            return
        time.sleep(0.02)
    pytest.fail("the worker outlives the sweep")


def _parent(tell: Any) -> None:
    """A sweep's process, whose worker is busy for an hour."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_busy)
    process.start()
    tell.send(process.pid)
    time.sleep(3600)


def _busy() -> None:
    threading.Thread(target=worker_module._end_with_parent, daemon=True).start()
    time.sleep(3600)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
