"""`fedlora runs` at the command line: what is shown, what is removed, and one line for every mistake."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import RunFolderError, StoreError
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.runs import removal
from fedlora.experiments.runs.gathering import gather
from fedlora.experiments.runs.removal import clear_removed, remove_run
from fedlora.experiments.runs.store import FILE_NAME, Store
from fedlora.experiments.runs.stored_run import StoredRun
from tests.command_line import Said, typed

MakeRun = Callable[..., Path]


Runs = Callable[..., Said]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Runs:
    """`runs("list", …, answer="y")` is `fedlora runs list …` in this process, with that on standard input."""

    def run(*arguments: object, answer: str = "") -> Said:
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        return typed(("runs", *arguments), monkeypatch, capfd)

    return run


@pytest.fixture
def folder(tmp_path: Path, make_run: MakeRun) -> Path:
    """Three runs that ended and one that did not."""
    root = tmp_path / "runs"
    make_run(root / "sst2-a", value=0.8125, epsilon=2.00001)
    make_run(root / "sst2-b", "privacy.epsilon=inf", value=0.9)
    make_run(root / "rte", "data.task=rte", "privacy.seeded_noise=true", "run.seed=1", value=0.5)
    make_run(root / "started", finished=False)
    return root


def listed(said: Said) -> list[str]:
    assert (said.code, said.err) == (0, "")
    return [row["folder"] for row in json.loads(said.out)]


def test_the_default_folder_is_runs(folder: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert len(listed(runs("list", "--json"))) == 4
    assert runs("show", "rte").code == 0


def test_in_a_pipe_every_run_is_one_line(folder: Path, runs: Runs) -> None:
    said = runs("list", folder)
    rows = [line.split() for line in said.out.splitlines()]
    assert rows == [
        ["run", "task", "method", "ε", "spent", "value", "metric", "time", "status"],
        ["rte", "rte", "ffa", "not", "private", "(6)", "0.5000", "accuracy", "75", "s", "done"],
        ["sst2-a", "sst2", "ffa", "2.001", "0.8125", "accuracy", "75", "s", "done"],
        ["sst2-b", "sst2", "ffa", "∞", "0.9000", "accuracy", "75", "s", "done"],
        [
            "started",
            "sst2",
            "ffa",
            "at",
            "least",
            "2.001,",
            "not",
            "ended",
            "3",
            "s",
            "unfinished,",
            "rounds",
            "so",
            "far:",
            "2",
        ],
    ]
    assert "\x1b" not in said.out


def test_a_figure_that_is_of_no_one_model_is_marked(folder: Path, runs: Runs) -> None:
    path = folder / "rte" / "record.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"metric": record["metric"] | {"of": "own"}}))
    rows = runs("list", folder).out.splitlines()
    assert ["accuracy, own models" in row for row in rows] == [row.startswith("rte ") for row in rows]
    assert "metric_of" in runs("list", folder, "--csv").out.splitlines()[0].split(",")


@pytest.mark.parametrize("width", [50, 60, 100])
def test_a_narrow_terminal_drops_columns_and_never_the_run(
    folder: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": str(width)}.items():
        monkeypatch.setenv(name, value)
    said = runs("list", folder, "--status", "done")
    lines = said.out.splitlines()[1:]
    assert [line.split("  ")[0] for line in lines] == ["rte", "sst2-a", "sst2-b"]
    assert all(status in line for line, status in zip(lines, ["done"] * 3, strict=True))
    assert all(len(line.rstrip()) <= width for line in lines if "\x1b" not in line)


def test_filters_orders_and_conditions(folder: Path, runs: Runs) -> None:
    def found(*options: str) -> list[str]:
        return listed(runs("list", folder, "--json", *options))

    assert found("--task", "rte") == ["rte"]
    assert found("--epsilon", "inf") == ["sst2-b"]
    assert found("--status", "unfinished") == ["started"]
    assert found("--role", "trial") == []
    assert found("--method", "ffa", "--where", "value > 0.6 -- good ones") == ["sst2-a", "sst2-b"]
    assert found("--sort", "-value") == ["sst2-b", "sst2-a", "rte", "started"]
    assert found("--sort", "value") == ["rte", "sst2-a", "sst2-b", "started"]


def test_a_name_is_no_formula_in_a_spreadsheet(tmp_path: Path, make_run: MakeRun, runs: Runs) -> None:
    make_run(tmp_path / "runs" / "=1+1")
    (row,) = csv.DictReader(io.StringIO(runs("list", tmp_path / "runs", "--csv").out))
    assert (row["folder"], row["seed"]) == ("'=1+1", "0")


def test_programs_get_all_digits_and_no_infinity(folder: Path, runs: Runs) -> None:
    rows = {row["folder"]: row for row in json.loads(runs("list", folder, "--json").out, parse_constant=pytest.fail)}
    assert (rows["sst2-a"]["epsilon_spent"], rows["sst2-b"]["epsilon_spent"]) == (2.00001, "inf")
    assert (rows["rte"]["private"], rows["rte"]["seed"]) == (0, 1)
    table = list(csv.DictReader(io.StringIO(runs("list", folder, "--csv").out)))
    assert {row["folder"]: row["value"] for row in table} == {
        "rte": "0.5",
        "sst2-a": "0.8125",
        "sst2-b": "0.9",
        "started": "",
    }


def test_cells_show_their_labels_and_names_that_are_short_and_enough(
    tmp_path: Path, runs: Runs, make_record: Callable[..., Any]
) -> None:
    with Store.create(tmp_path) as store:
        for name in ("aaaaaaaa00000000", "aaaaaaaa11111111"):
            axes = {"method": f"method {name[-1]}", "privacy.epsilon": "6"}
            run = StoredRun(folder=f"cells/{name}", digest=name, role="cell", axes=axes, record=make_record())
            store.put(run)
    lines = runs("list", tmp_path).out.splitlines()
    assert lines[1].split("  ")[:2] == ["aaaaaaaa0000", "method method 0, epsilon 6"]
    assert runs("show", lines[2].split()[0], "--in", tmp_path).out.startswith("run          cells/aaaaaaaa11111111\n")
    table = list(csv.DictReader(io.StringIO(runs("list", tmp_path, "--csv").out)))
    assert [row["axis method"] for row in table] == ["method 0", "method 1"]


def test_an_empty_folder_and_an_empty_answer_are_said(tmp_path: Path, folder: Path, runs: Runs) -> None:
    (tmp_path / "empty").mkdir()
    assert runs("list", tmp_path / "empty") == (0, f"no runs in {tmp_path / 'empty'} yet\n", "")
    none = f"none of the 4 runs in {folder} is like that; without a filter all are listed\n"
    assert runs("list", folder, "--task", "cola") == (0, none, "")


def test_why_a_run_failed_and_where_sweeps_keep_theirs_stands_below(folder: Path, runs: Runs) -> None:
    with Store.create(folder) as store:
        store.put(StoredRun(folder="broken", digest="", error="no\x1b[2J such\nfile"))
    (folder / "my sweep").mkdir()
    (folder / "my sweep" / "sweep.toml").touch()
    *_, failed, sweep = runs("list", folder).out.splitlines()
    assert failed == "broken failed: no [2J such file"
    assert sweep == f"a sweep: fedlora runs list '{folder}/my sweep'"
    assert len(json.loads(runs("list", folder, "--json").out)) == 5, "and programs get the list alone"


def test_a_corrupt_record_is_named_and_the_rest_is_listed(folder: Path, runs: Runs) -> None:
    (folder / "rte" / "record.json").write_text('{"schema_version": 1, ')
    said = runs("list", folder)
    assert said.code == 0
    assert len(said.out.splitlines()) == 4
    assert said.err.startswith(f"fedlora: {folder / 'rte' / 'record.json'} is damaged")
    assert said.err.count("\n") == 1


def test_show_tells_all_about_one_run(folder: Path, runs: Runs) -> None:
    out = runs("show", "sst2-a", "--in", folder).out
    for line in (
        "guarantee    ε = 2.001 at δ = 1e-05 for one record of one site (add/remove), by PLD accounting",
        "accuracy     0.8125 on public validation",
        "traffic   1.0 kB up, 2.0 kB down",
        "time      75 s, started 2026-11-22T02:58:44+0000",
        "versions  python 3.11.7, torch 2.9.0",
    ):
        assert f"{line}\n" in out
    assert "not covered  several records of one person" in out
    spent = ["0", "2000", "finetune", "gaussian", "0.75", "0.05", "100", "2.001", "1e-05"]
    assert spent in [line.split() for line in out.splitlines()]


def test_show_names_settings_that_are_not_the_default(folder: Path, runs: Runs) -> None:
    rows = [line.split() for line in runs("show", "sst2-b", "--in", folder).out.splitlines()]
    assert ["privacy.epsilon", "inf", "6.0"] in rows
    assert not [row for row in rows if row[:1] == ["privacy.delta"]]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sst2-b", "guarantee  no guarantee: ε = ∞, run without noise"),
        ("rte", "guarantee  no guarantee: noise seeded, not private"),
        ("started", "ε spent  at least 2.001, not ended"),
    ],
)
def test_show_promises_nothing_that_is_not_kept(folder: Path, runs: Runs, name: str, words: str) -> None:
    out = runs("show", name, "--in", folder).out
    assert words in out
    assert "not covered" not in out


def test_a_run_that_has_not_ended_may_have_spent_more_than_its_rounds_say(
    tmp_path: Path, make_run: MakeRun, runs: Runs
) -> None:
    """Rounds that died are charged, and no line of rounds.jsonl tells of them."""
    root = tmp_path / "runs"
    make_run(root / "early", finished=False, rounds=0)
    make_run(root / "late", finished=False, rounds=4)
    make_run(root / "seeded", "privacy.seeded_noise=true", finished=False)
    with Store.create(root) as store:
        store.put(StoredRun(folder="failed", digest="d", error="no client answered", rounds=[{"epsilon_max": 2.5}]))
    said = runs("list", root).out
    spent = {row.split()[0]: row for row in said.splitlines() if " failed: " not in row}
    assert "unknown, not ended" in spent["early"]
    assert "  at least 4.001, not ended" in spent["late"]
    assert "not private (at least 2.001, not ended)" in spent["seeded"]
    assert "  at least 2.5  " in spent["failed"]
    assert "at least 2.5" in runs("show", "failed", "--in", root).out
    assert "at least 4.001, not ended" in runs("diff", "late", "failed", "--in", root).out


def test_diff_shows_what_differs_and_nothing_else(folder: Path, runs: Runs) -> None:
    out = runs("diff", "sst2-a", "rte", "--in", folder).out
    rows = [line.split() for line in out.splitlines()]
    assert [row for row in rows if row and "." in row[0] and not row[0].startswith("metrics")] == [
        ["data.task", "sst2", "rte"],
        ["privacy.seeded_noise", "false", "true"],
        ["run.seed", "0", "1"],
    ]
    assert "code and versions: no difference" in out
    assert ["ε", "spent", "2.00001", "5.9996"] in rows
    assert ["metrics.accuracy", "0.8125", "0.5"] in rows


def test_a_run_is_removed_with_its_row_and_others_stay(folder: Path, runs: Runs) -> None:
    runs("list", folder)
    said = runs("rm", "sst2-a", "started", "--in", folder, answer="y\n")
    assert said.code == 0
    assert "gives no budget back" in said.out
    assert sorted(path.name for path in folder.iterdir()) == ["rte", FILE_NAME, "sst2-b"]
    assert listed(runs("list", folder, "--json")) == ["rte", "sst2-b"]


@pytest.mark.parametrize(("answer", "code"), [("n\n", 0), ("\n", 0), ("", 2)])
def test_nothing_is_removed_without_a_yes(folder: Path, runs: Runs, answer: str, code: int) -> None:
    said = runs("rm", "rte", "--in", folder, answer=answer)
    assert said.code == code
    assert "nothing was removed" in said.out + said.err
    assert (folder / "rte" / "record.json").is_file()


def test_a_row_without_folder_can_be_removed(folder: Path, runs: Runs) -> None:
    runs("list", folder)
    (folder / "rte").rename(folder.parent / "elsewhere")
    assert runs("rm", "rte", "--in", folder, "--yes").code == 0
    assert "rte" not in listed(runs("list", folder, "--json"))
    assert (folder.parent / "elsewhere" / "record.json").is_file()


def test_a_run_that_is_at_work_is_not_removed(folder: Path, runs: Runs) -> None:
    with (folder / "started" / "config.toml").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = runs("rm", "started", "--in", folder, "--yes")
    assert said.code == 2
    assert "another process is at work" in said.err
    assert (folder / "started" / "rounds.jsonl").is_file()


@pytest.mark.parametrize(
    "name", ["../outside", "cells/../../outside", "/etc", "a/b", "..", ".", "", ".hidden", "cells"]
)
def test_what_a_store_calls_a_run_is_not_trusted(tmp_path: Path, make_run: MakeRun, name: str) -> None:
    root = tmp_path / "runs"
    make_run(tmp_path / "outside")
    make_run(root / "cells" / "x")
    make_run(root / ".hidden")
    with Store.create(root) as store:
        store.put(StoredRun(folder=name, digest="", error="x"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match="left as it is"):
        remove_run(root, name)
    assert sorted(tmp_path.rglob("*")) == before


def test_trials_stay_since_other_records_count_them(tmp_path: Path, make_run: MakeRun, runs: Runs) -> None:
    root = tmp_path / "sweep"
    trial, cell = make_run(root / "trials" / "0123"), make_run(root / "cells" / "4567")
    said = runs("rm", "4567", "0123", "--in", root, "--yes")
    assert said.code == 2
    assert "trials/0123 is a trial and is left as it is" in said.err
    assert len(said.err.splitlines()) == 1
    assert trial.is_dir()
    assert cell.is_dir()
    assert runs("rm", "4567", "--in", root, "--yes").code == 0
    assert not cell.exists()


def test_links_and_other_folders_are_left_alone(tmp_path: Path, make_run: MakeRun, runs: Runs) -> None:
    outside, root = make_run(tmp_path / "outside"), tmp_path / "runs"
    make_run(root / "a")
    (root / "link").symlink_to(outside)
    (root / "cells").symlink_to(tmp_path)
    (root / "other").mkdir()
    (root / "other" / "record.json").write_text((outside / "record.json").read_text())
    for name, words in (("link", "is a link"), ("cells/outside", "is a link"), ("other", "not a run folder")):
        said = runs("rm", "a", name, "--in", root, "--yes")
        assert said.code == 2
        assert words in said.err
    assert (outside / "record.json").is_file()
    assert (root / "other" / "record.json").is_file()
    assert (root / "a").is_dir(), "all are looked at before the first is removed"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", ["forget", "rename", "rmtree"])
def test_a_kill_at_any_step_leaves_a_run_or_none(
    folder: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    runs("list", folder)

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if step == "forget":
            patch.setattr(Store, "remove", killed)
        elif step == "rename":
            patch.setattr(Path, "rename", killed)
        else:
            patch.setattr(removal.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            remove_run(folder, "rte")
    there = (folder / "rte" / "record.json").is_file()
    assert there is (step != "rmtree")
    assert ("rte" in listed(runs("list", folder, "--json"))) is there
    assert runs("rm", "rte" if there else "sst2-a", "--in", folder, "--yes").code == 0
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_ledger_elsewhere_and_one_in_another_run_stay(folder: Path) -> None:
    for place in (folder, folder / "rte", folder / "sst2-a"):
        (place / "ledger.sqlite").write_text("a ledger")
    remove_run(folder, "rte")
    clear_removed(folder)
    assert (folder / "ledger.sqlite").read_text() == (folder / "sst2-a" / "ledger.sqlite").read_text() == "a ledger"


def test_two_removals_of_one_run_do_not_both_happen(folder: Path) -> None:
    with RunFolder(folder / "rte").claimed(), pytest.raises(RunFolderError):
        remove_run(folder, "rte")
    remove_run(folder, "rte")
    with gather(folder).store as store:
        assert "rte" not in store.stamps()


WRONG: dict[str, tuple[list[str], str]] = {
    "no folder": (["list", "{}/missing"], "is not there; give a folder of runs"),
    "a run's own folder": (["list", "{}/rte"], "is the folder of one run; give the folder that it lies in"),
    "not a store": (["list", "{}/rte/config.toml"], "another program's file"),
    "a wrong condition": (["list", "{}", "--where", "valu > 3"], "'valu > 3' cannot be used: no such column: valu"),
    "two statements": (["list", "{}", "--where", "1); DROP TABLE runs; --"], "cannot be used"),
    "a wrong column": (["list", "{}", "--sort", "-valu"], "unknown column --sort -valu; did you mean value?"),
    "a wrong status": (["list", "{}", "--status", "finished"], "unknown status --status finished"),
    "a wrong role": (["list", "{}", "--role", "cells"], "unknown role --role cells; did you mean cell?"),
    "two notations": (["list", "{}", "--csv", "--json"], "leave one of them out"),
    "no such run": (["show", "nope", "--in", "{}"], "no run 'nope' in"),
    "several runs": (["diff", "sst2", "rte", "--in", "{}"], "'sst2' could be sst2-a, sst2-b"),
    "none of them": (["rm", "nope", "--in", "{}", "--yes"], "no run 'nope' in"),
    "removal from a store": (["rm", "rte", "--in", "{}/runs.sqlite", "--yes"], "is a store without run folders"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_one_line(folder: Path, runs: Runs, case: str) -> None:
    arguments, words = WRONG[case]
    runs("list", folder)
    said = runs(*(argument.format(folder) for argument in arguments))
    assert said.code == 2
    assert words in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert len(listed(runs("list", folder, "--json"))) == 4


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:5000]), "damaged"),
        (lambda file: file.write_text("some text, and not a database at all " * 100), "another program's file"),
        (lambda file: _set(file, "user_version", 99), "has schema 99, this fedlora reads up to 1"),
        (lambda file: _set(file, "application_id", 1), "is not a store of runs"),
    ],
    ids=["truncated", "text", "newer", "another program's"],
)
def test_a_store_that_cannot_be_used_is_one_line(
    folder: Path, runs: Runs, damage: Callable[[Path], object], words: str
) -> None:
    runs("list", folder)
    damage(folder / FILE_NAME)
    said = runs("list", folder)
    assert said.code == 2
    assert words in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def _set(file: Path, pragma: str, value: int) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f"PRAGMA {pragma} = {value}")
        connection.commit()


def test_listing_loads_no_torch(folder: Path) -> None:
    script = f"""
import sys
from fedlora.cli import main
sys.argv = ["fedlora", "runs", "list", {str(folder)!r}]
try:
    main()
finally:
    print(*sorted({{"torch", "numpy", "transformers"}} & sys.modules.keys()), "loaded", file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.stderr.splitlines()[-1].strip() == "loaded", ended.stderr
