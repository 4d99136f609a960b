"""A run is watched from its folder alone: what is there is shown, what is broken is not, and nothing is changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedlora.config import RunConfig
from fedlora.errors import RunFolderError
from fedlora.experiments import watch as watching
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.run_view import RunView, read_run
from fedlora.experiments.simulate import simulate
from fedlora.experiments.watch import curve, frame, watch
from fedlora.federation.checkpoint import save_checkpoint
from fedlora.federation.server import RoundReport, ServerState
from tests.command_line import typed

NOW = 1_800_000_000.0


def run_folder(path: Path, *overrides: str, rounds: int = 2, **lines: Any) -> RunFolder:
    """A deployed run of five clients, whose round `rounds` was asked for ten seconds ago."""
    known = ("federation.clients=5", "run.transport=flower", f"run.out={json.dumps(str(path))}")
    folder = RunFolder.create(RunConfig().with_overrides(*known, *overrides))
    for number in range(rounds):
        line = {"round": number, "phase": "finetune", "metrics": {"accuracy": 0.5 + 0.1 * number}, "seconds": 20.0}
        folder.append_round({**line, "epsilon_max": 1.0 + number, "failures": {}, **lines})
    folder.mark_asked(rounds)
    os.utime(folder.asked_file, (NOW - 10, NOW - 10))
    facts = {client: {"client": client, "epsilon": 1.25 + client} for client in range(4)}
    save_checkpoint(folder.checkpoint_file, ServerState(run_id="r", theta=torch.zeros(3), facts=facts), ())
    return folder


def shown(view: RunView, *, most_sites: int | None = None) -> str:
    console = Console(file=StringIO(), width=200, markup=False, highlight=False)
    console.print(frame(view, most_sites=most_sites))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def rows(text: str) -> dict[str, list[str]]:
    """Cells by client."""
    cells = [line.split() for line in text.splitlines()]
    return {row[0]: row[1:] for row in cells if row and row[0].isdigit() and "of" not in row}


def test_a_round_under_way_shows_who_is_waited_for(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", rounds=2, failures={"3": "no_reply"})
    folder.answers_folder.mkdir()
    for name in ("2-0.safetensors", "2-4.safetensors", "1-1.safetensors", "2-2.partial", "asked"):
        (folder.answers_folder / name).touch()
    with folder.claimed():
        view = read_run(folder.path, now=NOW)
    text = shown(view)
    assert "run: running" in text
    assert "sst2 from generated: 5 clients, ffa rank 8" in text
    assert "asked: ε = 6 at δ = 1e-05 for one record" in text
    assert "2 of 11 rounds, finetune since 10 s, 2 of 5 have answered, about 2.8 min left" in text
    assert "accuracy 0.6000 on public data, best 0.6000 ▁█" in text
    assert rows(text) == {
        "0": ["1.25", "6", "round", "1", "answered"],
        "1": ["2.25", "6", "round", "1", "waiting"],
        "2": ["3.25", "6", "round", "1", "waiting"],
        "3": ["4.25", "6", "waiting", "no_reply", "2"],
        "4": ["6", "round", "1", "answered"],
    }


def test_who_is_not_asked_is_not_waited_for(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "federation.participation=0.4", rounds=3)
    with folder.claimed():
        view = read_run(folder.path, now=NOW)
    asked = set(view.schedule[3].clients)
    assert len(asked) == 2
    assert {client for client in range(5) if view.standing(client) == "waiting"} == asked
    assert {client for client in range(5) if view.standing(client) == "not asked"} == set(range(5)) - asked
    last = {client: view.last_answered(client) for client in range(5)}
    assert last == {
        client: max(entry.index for entry in view.schedule[:3] if client in entry.clients) for client in range(5)
    }


def test_in_one_process_all_are_at_work_together(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "run.transport=cohort")
    with folder.claimed():
        assert [row[-1] for row in rows(shown(read_run(folder.path, now=NOW))).values()] == ["work"] * 5


def test_between_two_rounds_nobody_is_waited_for(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", rounds=2)
    folder.mark_asked(1)
    with folder.claimed():
        view = read_run(folder.path, now=NOW)
    assert view.under_way is None
    assert "2 of 11 rounds, last finetune, about 3.0 min left" in shown(view)


@pytest.mark.parametrize(
    ("transport", "advice"),
    [
        ("cohort", "to go on: fedlora simulate --resume"),
        ("flower", "submit it once more with the same recipe and run.out"),
    ],
)
def test_a_run_that_nobody_is_at_work_on_says_how_to_go_on(tmp_path: Path, transport: str, advice: str) -> None:
    folder = run_folder(tmp_path / "a run", f"run.transport={transport}")
    text = shown(read_run(folder.path, now=NOW))
    assert "nobody is at work on it" in text
    assert advice in text
    assert f"--resume '{folder.path}'" in text
    assert ("--policy FILE" in text) == (transport == "cohort"), "no ledger in the folder: it obeys a policy"
    assert ("may be waiting for sites to join, for up to 10 min" in text) == (transport == "flower")
    assert "at least 1.25" in text, "a round that died is charged"
    folder.ledger_file.touch()
    assert "--policy" not in shown(read_run(folder.path, now=NOW))


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    folder.failure_file.write_text("round 2 (finetune): none of 5 clients answered usably\n")
    view = read_run(folder.path, now=NOW)
    assert view.state == "failed"
    text = shown(view)
    assert "failed: round 2 (finetune): none of 5 clients answered usably" in text
    assert "submit it once more" in text
    assert "may be waiting" not in text


def test_a_run_that_is_done_is_told_by_its_record(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", rounds=11)
    folder.checkpoint_file.unlink()
    folder.write_record({"clients": [{"client": 0, "epsilon": 5.75}, {"client": 1, "epsilon": float("inf")}]})
    view = read_run(folder.path, now=NOW)
    text = shown(view)
    assert (view.state, view.done, view.seconds_left) == ("done", 11, None)
    assert rows(text)["0"] == ["5.75", "6", "round", "10"]
    assert rows(text)["1"][0] == "∞"


def test_where_there_is_little_room_trouble_comes_first(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "federation.clients=40", failures={"17": "no_reply", "33": "outlier"})
    folder.answers_folder.mkdir()
    for client in set(range(40)) - {5}:
        (folder.answers_folder / f"2-{client}.safetensors").touch()
    with folder.claimed():
        view = read_run(folder.path, now=NOW)
    text = shown(view, most_sites=5)
    assert {"5", "17", "33"} <= rows(text).keys()
    assert len(rows(text)) == 4
    assert "and 36 more" in text
    assert len(rows(shown(view))) == 40


DAMAGE = (
    b"", b"\xff\xfe\x00", b"{", b"null", b"[1, 2]", b'{"round": 1}', b'{"round": "x"}', b'{"round": 10000000000000}',
    b'{"round": 0, "metrics": [1], "failures": {"x": 3}}', b'{"round": 0, "metrics": {"a": NaN, "b": 1e999}}',
    b'{"round": 0, "seconds": ' + b"9" * 400 + b"}", b"[" * 100_000, b"9" * 5000, b"-5",
    b'{"clients": [null, {"client": []}]}',
    b"\x10\x00\x00\x00\x00\x00\x00\x00" + b"{" * 16, b"\xff" * 64,
)  # fmt: skip
FILES = ("config.toml", "rounds.jsonl", "asked", "checkpoint.safetensors", "record.json", "failure")


@pytest.mark.parametrize("name", FILES)
def test_no_damage_breaks_the_view(tmp_path: Path, name: str) -> None:
    folder = run_folder(tmp_path / "run")
    path = folder.path / name
    whole = path.read_bytes() if path.exists() else b'{"clients": []}'
    cuts = [whole[:length] for length in range(0, len(whole), max(1, len(whole) // 40))]
    with folder.config_file.open("rb"):
        for content in (*DAMAGE, *cuts):
            path.write_bytes(content)
            text = shown(read_run(folder.path, now=NOW))
            assert str(folder.path) in text
        path.unlink()
        path.mkdir()
        shown(read_run(folder.path, now=NOW))


def test_a_line_cut_off_costs_no_earlier_one(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", rounds=3)
    whole = folder.rounds_file.read_text()
    folder.rounds_file.write_text(whole[:-20])
    assert [line.index for line in read_run(folder.path, now=NOW).rounds] == [0, 1]


def test_names_from_elsewhere_are_no_commands_to_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\r\nfaked: done\u202e"
    folder = run_folder(tmp_path / "run\x1b[31m", f"data.source={json.dumps(evil)}", phase=evil, metrics={evil: 0.5})
    lines = [json.loads(line) for line in folder.rounds_file.read_text().splitlines()]
    folder.rounds_file.write_text("".join(json.dumps(line | {"failures": {"1": evil}}) + "\n" for line in lines))
    folder.failure_file.write_text(evil)
    text = shown(read_run(folder.path, now=NOW))
    assert "faked" in text, "it is shown"
    assert not any(line.strip().startswith("faked") for line in text.splitlines())
    assert {sign for sign in text if not sign.isprintable()} == {"\n"}


def test_watching_changes_nothing_and_keeps_nobody_out(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.path.iterdir()}
    stopped = threading.Event()

    def look() -> None:
        while not stopped.is_set():
            read_run(folder.path, now=NOW)
            folder.is_claimed()

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(30):
            with folder.claimed():
                assert folder.is_claimed()
                with pytest.raises(RunFolderError, match="another process is at work"), folder.claimed():
                    pass
    finally:
        stopped.set()
        for looker in lookers:
            looker.join()
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.path.iterdir()} == before


@contextmanager
def then(monkeypatch: pytest.MonkeyPatch, *happen: Callable[[], object]) -> Iterator[None]:
    """One after the other in the pauses of the view, which ends of itself after the last."""
    pending = list(happen)
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: pending.pop(0)())
    yield
    assert pending == []


def test_the_view_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder = run_folder(tmp_path / "run")
    with then(monkeypatch, lambda: None, lambda: folder.write_record({"clients": []})):
        assert watch(folder.path) is True
    folder.record_file.unlink()
    with then(monkeypatch, lambda: folder.failure_file.write_text("the disk is full")):
        assert watch(folder.path) is False
    assert "failed: the disk is full" in capsys.readouterr().out


def test_the_command_ends_as_the_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run")

    def said(*arguments: object) -> tuple[int, str]:
        told = typed(("watch", *arguments), monkeypatch, capfd)
        return told.code, told.out

    assert said(folder.path, "--once")[0] == 0
    folder.failure_file.write_text("the disk is full")
    assert said(folder.path)[0] == 1
    code, text = said(folder.path, "--once")
    assert (code, "failed: the disk is full" in text) == (1, True)
    folder.failure_file.unlink()
    folder.write_record({"clients": []})
    assert said(folder.path)[0] == 0
    assert said(tmp_path)[0] == 2
    assert said(tmp_path / "nowhere", "--once")[0] == 2


def test_ctrl_c_ends_the_view_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", interrupted)
    told = typed(("watch", run_folder(tmp_path / "run").path), monkeypatch, capfd)
    assert (told.code, told.err) == (0, "")


class Looks:
    """A progress that looks at the folder after every round."""

    def __init__(self) -> None:
        self.seen: list[RunView] = []

    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None:
        self.folder = folder

    def round(self, report: RoundReport) -> None:
        self.seen.append(read_run(self.folder, now=NOW))

    def finish(self, record: Any) -> None: ...


def test_a_real_run_is_seen_as_it_is(tmp_path: Path, tiny_config: Callable[..., RunConfig]) -> None:
    looks = Looks()
    folder = simulate(tiny_config(f"run.out='{tmp_path}/run'"), looks)
    record, last = json.loads((folder / "record.json").read_text()), read_run(folder, now=NOW)
    assert [(view.state, view.done, len(view.rounds)) for view in looks.seen] == [("running", n, n) for n in (1, 2, 3)]
    spent = [view.epsilons[0] for view in looks.seen]
    assert spent == sorted(spent)
    assert len(set(spent)) == 3
    assert last.state == "done"
    assert last.epsilons == {client["client"]: client["epsilon"] for client in record["clients"]}
    assert last.metric == ("accuracy", [view.metric[1][-1] for view in looks.seen])


def test_curves_use_the_whole_height() -> None:
    assert curve([0.0, 1.0]) == "▁█"
    assert curve([3.0, 3.0]) == "▄▄"
    assert len(curve([float(number) for number in range(500)])) == 40


def test_it_answers_without_torch(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    script = "import sys; from fedlora.cli import app; app(['watch', sys.argv[1], '--once'], standalone_mode=False)"
    heavy = f"{script}; print('HEAVY', *{{'torch', 'transformers', 'datasets', 'scipy'}} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", heavy, folder.path], capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[-1] == "HEAVY"
