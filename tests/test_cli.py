"""What a person meets at the command line: exit codes, one line for every mistake, nothing written by accident."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fedlora.config import RunConfig
from fedlora.experiments import flower_process
from fedlora.experiments.run_folder import RunFolder
from tests.command_line import Said, typed

CommandLine = Callable[..., Said]


@pytest.fixture
def fedlora(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    """`fedlora("simulate", …)` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Said:
        return typed(arguments, monkeypatch, capfd)

    return run


@pytest.fixture(scope="module")
def recipe(tiny_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private run of seconds on a tiny random model, with the heads of the quickstart."""
    config = tiny_config("privacy.seeded_noise=false", "model.head=prototype", "privacy.accountant=rdp")
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(config.to_toml())
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended; its corpus is neither of the default seed nor of the default size."""
    from fedlora.experiments.progress import TerminalProgress
    from fedlora.experiments.simulate import simulate

    out = tmp_path_factory.mktemp("finished") / "run"
    overrides = ("run.seed=5", "data.generated_records=400", "training.learning_rate=20", f"run.out='{out}'")
    return simulate(RunConfig.from_toml(recipe, overrides), TerminalProgress())


def settings(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def refused(said: Said, code: int = 2) -> str:
    """The one line of a refusal, checked to be one."""
    assert (said.code, said.out) == (code, ""), said
    assert said.err.startswith("fedlora: "), said.err
    assert said.err.count("\n") == 1, said.err
    assert said.err.endswith("\n")
    assert "Traceback" not in said.err
    return said.err


# --- bad input -------------------------------------------------------------------------------------------------------

BAD_SETTINGS = {
    "unknown key": (["privacy.epsilom=3"], "did you mean privacy.epsilon?"),
    "unknown section": (["privcy.epsilon=3"], "did you mean"),
    "wrong type": (['federation.rounds="three"'], "wanted a whole number"),
    "fraction for a count": (["federation.rounds=1.5"], "wanted a whole number"),
    "truth for a count": (["federation.rounds=true"], "wanted a whole number"),
    "out of range": (["federation.rounds=0"], ">= 1"),
    "negative epsilon": (["privacy.epsilon=-1"], "> 0"),
    "epsilon is no number": (["privacy.epsilon=nan"], "nan"),
    "infinite clip norm": (["privacy.clip_norm=inf"], "finite"),
    "override without value": (["privacy.epsilon"], "section.key=value"),
    "override without section": (["epsilon=3"], "section.key=value"),
    "override without key": (["privacy.=3"], "section.key=value"),
    "unknown task": (["data.task=sst3"], "did you mean sst2?"),
    "missing data folder": (["data.source=/nowhere/at/all"], "/nowhere/at/all"),
    "delta of 1/n": (["privacy.delta=0.0125"], "not below 1/n = 0.0125"),
    "more clients than records": (["federation.clients=500"], "500 clients for 240 records"),
    "batch larger than the data": (["training.expected_batch_size=81"], "at most 80"),
    "unknown target module": (["adapter.target_modules=quary"], "did you mean 'query'?"),
    "unknown model": (["model.name=no-such/model"], "looked at: folder"),
    "unknown device": (["run.device=toaster"], "run.device = toaster"),
    "absent device": (["run.device=cuda:99"], "run.device = cuda:99"),
    "unknown transport": (["run.transport=pigeon"], "cohort, flower"),
    "prototypes of a regression": (["data.task=stsb", "model.head=prototype"], "model.head=trained"),
    "column partition without column": (["data.partition=column"], "data.partition_column"),
    "column partition of an absent column": (["data.partition=column", "data.partition_column=site"], "site"),
    "skew of another shape": (["data.partition=label_skew", "data.label_skew=0.5,0.5"], "1 rows"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_wrong_setting_is_one_line_and_leaves_nothing(
    fedlora: CommandLine, recipe: Path, tmp_path: Path, case: str
) -> None:
    overrides, hint = BAD_SETTINGS[case]
    assert hint in refused(fedlora("simulate", recipe, *settings(*overrides), "--out", "run"))
    assert [*tmp_path.iterdir()] == []


def test_an_epsilon_that_the_prototypes_alone_exceed_is_refused_as_a_budget(
    fedlora: CommandLine, recipe: Path, tmp_path: Path
) -> None:
    said = fedlora("simulate", recipe, *settings("privacy.epsilon=0.05"), "--out", "run")
    assert "privacy.prototype_noise_multiplier" in refused(said, code=3)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (None, "cannot read recipe"),
        ("[data\n", "not valid TOML"),
        ("\udcff", "not valid TOML"),
        ("data = 3\n", "wanted a table"),
        ("epsilon = 3\n", "unknown section"),
    ],
)
def test_a_recipe_that_is_none_is_one_line(
    fedlora: CommandLine, tmp_path: Path, content: str | None, hint: str
) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_text(content, encoding="utf-8", errors="surrogateescape")
    assert hint in refused(fedlora("simulate", path, "--out", "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_task_whose_columns_do_not_match_is_one_line(
    fedlora: CommandLine, recipe: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, split: str
) -> None:
    source = tmp_path_factory.mktemp("source")
    for name in ("train", "validation"):
        column = "review" if name == split else "sentence"
        table = pyarrow.table({column: ["a good film", "a dull plot"] * 120, "label": [1, 0] * 120})
        pyarrow.parquet.write_table(table, source / f"{name}.parquet")
    message = refused(fedlora("simulate", recipe, *settings(f"data.source={source}"), "--out", "run"))
    assert f"{split}.parquet has no column sentence" in message
    assert [*tmp_path.iterdir()] == []


def test_a_folder_without_validation_split_is_found_before_anything_is_written(
    fedlora: CommandLine, recipe: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = tmp_path_factory.mktemp("source")
    table = pyarrow.table({"sentence": ["a good film", "a dull plot"] * 120, "label": [1, 0] * 120})
    pyarrow.parquet.write_table(table, source / "train.parquet")
    message = refused(fedlora("simulate", recipe, *settings(f"data.source={source}"), "--out", "run"))
    assert "no validation split of sst2" in message
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("taken", ["a folder with something in it", "a file", "a place below a file", "a long name"])
def test_an_output_that_cannot_be_a_new_folder_is_left_as_it_is(
    fedlora: CommandLine, recipe: Path, tmp_path: Path, taken: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    out = {
        "a folder with something in it": "full",
        "a file": "full/file",
        "a place below a file": "full/file/run",
        "a long name": "x" * 300,
    }[taken]
    assert "choose another with --out" in refused(fedlora("simulate", recipe, "--out", out))
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]
    assert (tmp_path / "full" / "file").read_text() == "mine"


WRONG_COMMANDS = {
    "command": (["simulat"], "Did you mean 'simulate'?"),
    "option": (["simulate", "--sett", "a.b=1"], "Did you mean '--set'?"),
    "second recipe": (["simulate", "a.toml", "b.toml"], "b.toml"),
    "option without value": (["simulate", "--out"], "--out"),
    "missing option": (["calibrate"], "--records"),
    "no texts": (["predict", "run"], "TEXTS"),
    "records are no number": (["calibrate", "--records", "many"], "many"),
    "no records": (["calibrate", "--records", "0"], "x>=1"),
    "batch larger than the data": (["calibrate", "--records", "100", "--delta", "1e-3"], "at most 100"),
    "delta of 1/n": (["calibrate", "--records", "1000", "--delta", "1e-3"], "1/n = 0.001"),
    "delta of nothing": (["calibrate", "--records", "1000", "--delta", "0"], "delta = 0"),
    "delta is no number": (["calibrate", "--records", "1000", "--delta", "nan"], "delta = nan"),
    "negative epsilon": (["calibrate", "--records", "1000", "--epsilon", "-1"], "epsilon = -1"),
    "epsilon is no number": (["calibrate", "--records", "1000", "--epsilon", "nan"], "epsilon = nan"),
    "unknown accountant": (["calibrate", "--records", "1000", "--accountant", "prv"], "pld, rdp"),
    "prototype noise is no number": (["calibrate", "--records", "1000", "--prototype", "nan"], "nan"),
    "nothing to predict with": (["predict", "nowhere", "some text"], "does not exist"),
    "nothing to evaluate": (["evaluate", "nowhere", "--task", "sst2", "--source", "generated"], "does not exist"),
    "evaluate what": (["evaluate", "nowhere"], "--task"),
    "nothing to resume": (["simulate", "--resume", "nowhere"], "not a run folder"),
    "resume with recipe": (["simulate", "a.toml", "--resume", "nowhere"], "--resume"),
    "resume with settings": (["simulate", "--resume", "nowhere", "--set", "run.seed=1"], "--resume"),
    "resume with out": (["simulate", "--resume", "nowhere", "--out", "there"], "--resume"),
    "resume with transport": (["simulate", "--resume", "nowhere", "--transport", "cohort"], "--resume"),
}


@pytest.mark.parametrize("case", WRONG_COMMANDS)
def test_a_wrong_command_is_one_line(fedlora: CommandLine, tmp_path: Path, case: str) -> None:
    arguments, hint = WRONG_COMMANDS[case]
    message = refused(fedlora(*arguments))
    assert message.count(hint) == 1, message
    assert [*tmp_path.iterdir()] == []


def test_a_prototype_release_beyond_the_budget_is_refused_before_any_run(fedlora: CommandLine) -> None:
    said = fedlora("calibrate", "--records", "1000", "--epsilon", "0.01", "--prototype", "1", "--accountant", "rdp")
    assert "nothing is left" in refused(said, code=3)


def test_flower_outside_a_checkout_is_one_line(
    fedlora: CommandLine, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_process, "CHECKOUT", tmp_path)
    assert "checkout" in refused(fedlora("simulate", recipe, "--transport", "flower", "--out", "run"))
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--task", "sst3"], "unknown task"),
        (["--task", "mnli"], "answers with 2 labels, task mnli has 3"),
        (["--split", "test"], "no split"),
        (["--source", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_evaluating_on_what_is_not_there_is_one_line(
    fedlora: CommandLine, finished: Path, arguments: list[str], hint: str
) -> None:
    assert hint in refused(fedlora("evaluate", finished, *arguments))


def test_a_pair_for_every_text(fedlora: CommandLine, finished: Path) -> None:
    assert "2 texts but 1 --pair" in refused(fedlora("predict", finished, "a", "b", "--pair", "c"))


# --- what works ------------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_gained_and_what_it_cost(fedlora: CommandLine, recipe: Path, tmp_path: Path) -> None:
    said = fedlora("simulate", recipe, "--out", "my run")
    assert (said.code, said.err) == (0, "")
    record = json.loads((tmp_path / "my run" / "record.json").read_text())
    assert f"accuracy     {record['metric']['value']:.4f} on public validation\n" in said.out
    assert "at δ = 0.001 for one record of one site (add/remove), by RDP accounting\n" in said.out
    assert "fedlora predict 'my run' \"some text\"\n" in said.out, "it can be pasted into a shell"
    assert record["config"]["run"]["out"] == "my run"


def test_evaluate_agrees_with_the_record(fedlora: CommandLine, finished: Path) -> None:
    value = json.loads((finished / "record.json").read_text())["metric"]["value"]
    for arguments in ([], ["--task", "sst2", "--source", "generated"]):
        assert fedlora("evaluate", finished, *arguments) == Said(0, f"accuracy = {value:.4f}\n", "")
    elsewhere = fedlora("evaluate", finished / "adapter", "--task", "sst2", "--source", "generated")
    assert elsewhere.code == 0
    assert elsewhere.out != f"accuracy = {value:.4f}\n", "another corpus, or this test shows nothing"


def test_predict_names_a_label_for_every_text(fedlora: CommandLine, finished: Path) -> None:
    said = fedlora("predict", finished, "a good film", "a dull plot")
    assert (said.code, said.err) == (0, "")
    rows = [line.split("\t") for line in said.out.splitlines()]
    assert [text for _, text in rows] == ["a good film", "a dull plot"]
    assert {label for label, _ in rows} <= {"negative", "positive"}


@pytest.mark.parametrize("folder", [".", "adapter"])
def test_where_sites_keep_a_part_it_is_said_what_is_used(
    fedlora: CommandLine, finished: Path, tmp_path: Path, folder: str
) -> None:
    shared = tmp_path / "shared"
    shutil.copytree(finished, shared)
    settings = (shared / "config.toml").read_text()
    (shared / "config.toml").write_text(settings.replace('method = "ffa"', 'method = "fedsa"'))
    said = fedlora("predict", shared / folder, "a good film")
    assert said.code == 0
    assert "the part alone that its sites share" in said.err
    assert str(shared / "personal") in said.err


def test_calibrate_answers_what_a_run_would_use(fedlora: CommandLine, finished: Path) -> None:
    facts = json.loads((finished / "record.json").read_text())["clients"][0]
    data = ["--records", facts["num_examples"], "--delta", facts["delta"], "--batch", 16, "--steps", 6]
    said = fedlora("calibrate", *data, "--prototype", 20, "--accountant", "rdp")
    assert said.out.startswith(f"noise_multiplier = {facts['noise_multiplier']:.4f}\nε <= 6 at δ = 0.001")


def test_calibrating_for_no_privacy_says_so(fedlora: CommandLine) -> None:
    said = fedlora("calibrate", "--records", 1000, "--epsilon", "inf")
    assert said.out == "noise_multiplier = 0.0000\nno guarantee: ε = ∞, a run without noise\n"


def test_resuming_what_has_ended_is_refused(fedlora: CommandLine, finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert "has ended" in refused(fedlora("simulate", "--resume", finished))
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_ctrl_c_before_the_run_folder_says_that_nothing_was_written(
    fedlora: CommandLine, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "check_free", interrupted)
    said = fedlora("simulate", recipe, "--out", "run")
    assert said.code == 130
    assert said.err.strip() == "fedlora: interrupted before a run folder was made; nothing was written"
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("arguments", [[], ["--help"], ["simulate", "--help"]])
def test_help_helps(fedlora: CommandLine, arguments: list[str]) -> None:
    said = fedlora(*arguments)
    assert (said.code, said.err) == (0, "")
    assert "Usage: fedlora" in said.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["simulate", "--set", "privacy.epsilom=3"],
        ["calibrate", "--records", "1000", "--steps", "10", "--batch", "10"],
    ],
    ids=["help", "a wrong setting", "calibrate"],
)
def test_answers_that_need_no_torch_load_none(arguments: list[str]) -> None:
    script = f"""
import sys
from fedlora.cli import main
sys.argv = ["fedlora", *{arguments!r}]
try:
    main()
finally:
    print("loaded:", *sorted({{"torch", "transformers", "peft", "datasets"}} & sys.modules.keys()), file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.stderr.splitlines()[-1] == "loaded:", ended.stderr
