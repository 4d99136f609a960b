"""A run folder is made once, holds what DESIGN section 8 says, and is never overwritten or shared."""

from __future__ import annotations

import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.errors import RunFolderError, RunInterrupted
from fedlora.experiments import run_folder
from fedlora.experiments.run_folder import RunFolder, to_json


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig().with_overrides(f"run.out='{tmp_path / 'run'}'")


def report(number: int) -> dict[str, Any]:
    return {"round": number, "epsilon_max": 1.0}


@pytest.mark.parametrize("override", ["privacy.epsilon=inf", "privacy.delta=1e-7", "model.name='''a \"b\" \\ ε'''"])
def test_config_toml_reads_back_as_the_same_config(config: RunConfig, override: str) -> None:
    config = config.with_overrides(override)
    folder = RunFolder.create(config)
    assert folder.read_config() == config
    assert folder.read_config().digest() == config.digest()
    assert [path.name for path in folder.path.iterdir()] == ["config.toml"]


def test_digest_tells_experiments_apart_and_not_where_they_went(config: RunConfig) -> None:
    same = config.with_overrides("run.out=elsewhere", "run.transport=flower")
    assert same.digest() == config.digest()
    assert config.with_overrides("run.seed=1").digest() != config.digest()


def test_runs_without_a_name_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda *_: "now")
    names = [str(RunFolder.create(RunConfig()).path) for _ in range(3)]
    assert names == ["runs/sst2-ffa-now", "runs/sst2-ffa-now-2", "runs/sst2-ffa-now-3"]


def test_an_empty_folder_is_used_and_a_full_one_is_not(config: RunConfig) -> None:
    out = Path(config.run.out)
    out.mkdir()
    RunFolder.create(config)
    with pytest.raises(RunFolderError, match="not empty and is left as it is"):
        RunFolder.create(config.with_overrides("run.seed=1"))
    assert RunFolder(out).read_config() == config


@pytest.mark.parametrize("name", ["\\u0000", "x" * 300])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunFolderError, match="cannot make run folder"):
        RunFolder.create(RunConfig().with_overrides(f'run.out="{tmp_path}/{name}"'))


def test_a_name_that_is_no_text_leaves_no_folder(tmp_path: Path) -> None:
    config = RunConfig.from_mapping({"run": {"out": f"{tmp_path}/\udcff"}})
    with pytest.raises(RunFolderError, match="cannot make run folder"):
        RunFolder.create(config)
    assert [*tmp_path.iterdir()] == []


def test_what_is_no_run_folder_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", Path(__file__)):
        with pytest.raises(RunFolderError, match="not a run folder"):
            RunFolder.open(path)


@pytest.mark.parametrize("content", ["[privacy\n", "[privacy]\nepsilom = 3\n", "\x00"])
def test_a_damaged_config_is_named(config: RunConfig, content: str) -> None:
    folder = RunFolder.create(config)
    folder.config_file.write_text(content)
    with pytest.raises(RunFolderError, match="cannot read the run in"):
        folder.read_config()


def test_rounds_read_back_without_the_line_that_a_crash_cut_off(config: RunConfig) -> None:
    folder = RunFolder.create(config)
    for number in range(3):
        folder.append_round(report(number))
    whole = folder.rounds_file.read_text()
    folder.rounds_file.write_text(whole + '{"round": 3, "eps')
    assert folder.read_rounds() == [report(number) for number in range(3)]
    folder.restore_rounds(3, report(2))
    assert folder.rounds_file.read_text() == whole


@pytest.mark.parametrize(
    ("written", "count", "last"),
    [([], 0, None), ([0, 1, 2], 3, 2), ([0, 1], 3, 2), ([], 1, 0), ([0, 2], 3, 3)],
    ids=["new run", "in line", "stopped before the line", "stopped before the first line", "a round was given up"],
)
def test_rounds_are_brought_in_line_with_the_checkpoint(
    config: RunConfig, written: list[int], count: int, last: int | None
) -> None:
    folder = RunFolder.create(config)
    for number in written:
        folder.append_round(report(number))
    folder.restore_rounds(count, None if last is None else report(last))
    wanted = written if last is None or last in written else [*written, last]
    assert [entry["round"] for entry in folder.read_rounds()] == wanted


@pytest.mark.parametrize(("written", "count", "last"), [([0, 1], 0, None), ([0, 1], 4, 3), ([0, 1, 2, 3], 2, 1)])
def test_rounds_that_do_not_fit_the_checkpoint_are_refused_and_kept(
    config: RunConfig, written: list[int], count: int, last: int | None
) -> None:
    """With its checkpoint lost, a run would spend on its records again what the record counts once."""
    folder = RunFolder.create(config)
    for number in written:
        folder.append_round(report(number))
    before = folder.rounds_file.read_bytes()
    with pytest.raises(RunFolderError, match="lost or damaged"):
        folder.restore_rounds(count, None if last is None else report(last))
    assert folder.rounds_file.read_bytes() == before


def test_the_round_that_was_asked_for_is_remembered(config: RunConfig) -> None:
    folder = RunFolder.create(config)
    assert folder.last_asked() == -1
    folder.mark_asked(0)
    folder.mark_asked(1)
    assert folder.last_asked() == 1


def test_infinity_is_text_in_json(config: RunConfig) -> None:
    folder = RunFolder.create(config)
    folder.append_round({"round": 0, "epsilon_max": math.inf})
    assert json.loads(folder.rounds_file.read_text(), parse_constant=pytest.fail)["epsilon_max"] == "inf"
    assert to_json({"a": (1.5, [-math.inf]), 2: "x"}) == {"a": [1.5, ["-inf"]], "2": "x"}


def _claim(path: Path, answers: Any) -> None:
    try:
        with RunFolder(path).claimed():
            answers.put("claimed")
    except RunFolderError as error:
        answers.put(str(error))


def test_one_process_at_a_time(config: RunConfig) -> None:
    folder = RunFolder.create(config)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()

    def ask() -> str:
        process = context.Process(target=_claim, args=(folder.path, answers))
        process.start()
        answer: str = answers.get(timeout=60)
        process.join()
        return answer

    with folder.claimed():
        assert "another process is at work" in ask()
    assert ask() == "claimed"


def test_ctrl_c_names_a_command_that_can_be_pasted(tmp_path: Path) -> None:
    folder = RunFolder.create(RunConfig().with_overrides(f"run.out='{tmp_path}/my run'"))
    folder.append_round(report(0))
    words = r"^interrupted, rounds done: 1; fedlora simulate --resume '.*/my run' goes on$"
    with pytest.raises(RunInterrupted, match=words), folder.resumable():
        raise KeyboardInterrupt


def test_other_errors_pass_through(config: RunConfig) -> None:
    folder = RunFolder.create(config)
    with pytest.raises(ZeroDivisionError), folder.resumable(), folder.claimed():
        raise ZeroDivisionError
