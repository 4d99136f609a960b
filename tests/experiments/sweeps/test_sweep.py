"""SWEEP.toml: which cells it stands for, and every mistake in one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from fedlora.errors import ConfigError
from fedlora.experiments.sweeps.sweep import Sweep

SWEEP = """
[set]
run.evaluate_every = 5
training.learning_rate = 2.0
[axes.task]
sst2 = { data.task = "sst2" }
mrpc = { data.task = "mrpc", training.expected_batch_size = 96 }
[grid]
privacy.epsilon = [inf, 6, 1.0]
run.seed = [0, 1]
"""

MANY = list(range(4, 404))


def read(folder: Path, text: str, *overrides: str) -> Sweep:
    file = folder / "sweep.toml"
    file.write_text(text)
    return Sweep.from_toml(file, overrides)


def test_every_combination_once_with_the_last_key_varying_fastest(tmp_path: Path) -> None:
    cells = read(tmp_path, SWEEP).cells()
    labels = [tuple(cell.axes.values()) for cell in cells]
    assert labels == [
        (task, epsilon, seed) for task in ("sst2", "mrpc") for epsilon in ("inf", "6", "1") for seed in ("0", "1")
    ]
    last = cells[-1].config
    assert (last.data.task, last.training.expected_batch_size, last.privacy.epsilon, last.run.seed) == (
        "mrpc",
        96,
        1,
        1,
    )
    assert {cell.config.training.learning_rate for cell in cells} == {2.0}
    assert {cell.config.training.expected_batch_size for cell in cells[:6]} == {128}, (
        "linked values stay with their label"
    )
    assert len({cell.digest for cell in cells}) == len({cell.folder for cell in cells}) == 12


def test_a_recipe_lies_below_what_the_sweep_sets(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "base.toml").write_text("[adapter]\nrank = 4\n[training]\nlearning_rate = 1.0\n")
    (cell,) = read(tmp_path, 'recipe = "recipes/base.toml"\n[set]\ntraining.learning_rate = 3.0').cells()
    assert (cell.config.adapter.rank, cell.config.training.learning_rate) == (4, 3.0)


def test_settings_from_outside_hold_for_all_cells(tmp_path: Path) -> None:
    cells = read(tmp_path, SWEEP, "federation.rounds=3", "data.source=/glue").cells()
    assert {(cell.config.federation.rounds, cell.config.data.source) for cell in cells} == {(3, "/glue")}


@pytest.mark.parametrize(
    ("condition", "left"),
    [
        ('task = "mrpc"', 6),
        ('task = "mrpc"\nprivacy.epsilon = [1.0, 6.0]', 8),
        ("privacy.epsilon = inf", 8),
        ('data.task = "mrpc"\nrun.seed = 1', 9),
        ('"privacy.epsilon" = 6', 8),
        ("training.expected_batch_size = 128\nrun.seed = [0, 7]", 9),
    ],
)
def test_exclusions_take_the_cells_for_which_all_of_them_holds(tmp_path: Path, condition: str, left: int) -> None:
    sweep = read(tmp_path, f"{SWEEP}\n[[exclude]]\n{condition}")
    assert len(sweep.cells()) == left


def test_a_sweep_is_read_again_from_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("[adapter]\nrank = 4\n")
    text = f'recipe = "base.toml"\n{SWEEP}\n[[exclude]]\ntask = "mrpc"\nrun.seed = 1\n[report]\nbaseline = "sst2"'
    text += '\ncompare = "task"\n[axes."the method"]\n"a, b" = {}\n'
    sweep = read(tmp_path, text, "federation.rounds=3")
    again = read(tmp_path, tomli_w.dumps(sweep.to_mapping()))
    assert again == sweep
    assert again.cells() == sweep.cells()


def test_what_is_compared(tmp_path: Path) -> None:
    assert read(tmp_path, SWEEP).compared is None
    text = SWEEP + '[axes.method]\n"query, value" = {}\nall = { adapter.target_modules = "all" }\n'
    compared = read(tmp_path, text).compared
    assert compared is not None
    assert (compared[0].name, compared[1]) == ("method", "query, value")
    named = read(tmp_path, text + '[report]\ncompare = "method"\nbaseline = "all"').compared
    assert named is not None
    assert named[1] == "all"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grid]\nprivacy.epsilno = [1.0]", r"unknown key privacy.epsilno in grid; did you mean privacy.epsilon\?"),
        ("[grid]\nprivcy.epsilon = [1.0]", r"unknown section privcy in grid; did you mean privacy\?"),
        ("[gird]\nprivacy.epsilon = [1.0]", r"unknown table \[gird\] in sweep .*; did you mean grid\?"),
        ("[grid]\nprivacy.epsilon = []", "grid.privacy.epsilon = .* wanted a list of values with at least one"),
        ("[grid]\nprivacy.epsilon = 6.0", "wanted a list of values with at least one"),
        ("[grid]\nprivacy.epsilon = [6, 6.0]", "has a value twice"),
        ("[grid]\nprivacy = 3", "privacy = 3 in grid, wanted privacy.KEY = VALUE"),
        ('[grid]\nprivacy.epsilon = [6.0, "much"]', r"cell of the sweep \(epsilon much\): .*wanted a number"),
        ("[grid]\nprivacy.epsilon = [-1.0]", "cell of the sweep .*epsilon = -1.0, wanted > 0"),
        ("[grid]\nrun.out = ['a', 'b']", "run.out in grid: a sweep decides that"),
        ("[set]\nrun.transport = 'flower'", "run.transport in set: a sweep decides that"),
        ("[axes.method]\na = {}\nb = {}", "two cells of the sweep are the same run: method a and method b"),
        ("[axes.method]\na = 3", "axes.method.a = 3, wanted settings"),
        ("[axes.method]", "axes.method is {}, wanted labels"),
        ("[axes.'my.method']\na = {}", "the name of an axis has no dot"),
        ("[axes]\nmethod = 3", "axes.method is 3, wanted labels"),
        ("[axes.a]\nx = {run.seed = 1}\n[axes.b]\ny = {run.seed = 2}", "axes a and b .* both decide run.seed"),
        ("[axes.a]\nx = {run.seed = 1}\n[grid]\nrun.seed = [2]", "axes a and run.seed .* both decide run.seed"),
        (SWEEP + "[[exclude]]\nrun.seed = [0, 1]", "the sweep has no cell"),
        (SWEEP + "[[exclude]]\nmethod = 'x'", r"unknown axis or key method in \[\[exclude\]\]"),
        (SWEEP + "[[exclude]]\nfoo = 'x'", r"unknown axis or key foo in \[\[exclude\]\]; known: .*task"),
        (SWEEP + "[[exclude]]\nrun.seed = 7", r"\[\[exclude\]\] with .* is about no cell"),
        ("[axes.epsilon]\na = {}\n[grid]\nprivacy.epsilon = [1.0]", "an axis of the grid is called so as well"),
        ('[axes.m]\n"a\\u001b[31mb" = {}', "wanted 1 to 80 printable characters"),
        ('[axes.m]\n"" = {}', "wanted 1 to 80 printable characters"),
        ('[axes.m]\n" a" = {}', "without blanks at its ends"),
        ('[axes.m]\n"a\\u202Eb" = {}', "wanted 1 to 80 printable characters"),
        (SWEEP + "[exclude]\nrun.seed = 0", "exclude is .* wanted tables"),
        (SWEEP + "[report]\ncompare = 'tusk'", r"unknown axis report.compare = \"tusk\"; did you mean task\?"),
        (SWEEP + "[report]\ncompare = 'task'\nbaseline = 'sst'", r"unknown label .*; did you mean sst2\?"),
        (SWEEP + "[report]\nbasline = 'sst'", "unknown key report.basline"),
        ("recipe = 'nowhere.toml'", "cannot read recipe .*nowhere.toml"),
        ("recipe = 3", "recipe = 3 in sweep"),
        ("set = 3", "set is 3, wanted a table"),
        ("[set", "not valid TOML"),
        (f"[grid]\nrun.seed = {MANY}\ndata.max_length = {MANY}", "160000 cells"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, text).cells()
    assert "\n" not in str(caught.value)


def test_an_override_does_not_undo_an_axis(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set privacy.epsilon=3: the sweep's axis privacy.epsilon decides"):
        read(tmp_path, SWEEP, "privacy.epsilon=3")
    tuned = SWEEP + '[tune]\nper = ["task"]\n[tune.space]\nadapter.rank = [4, 8]\n'
    with pytest.raises(ConfigError, match=r"--set adapter.rank=4: \[tune\] of the sweep chooses adapter.rank"):
        read(tmp_path, tuned, "adapter.rank=4")
    with pytest.raises(ConfigError, match=r"unknown key federation.round in --set"):
        read(tmp_path, SWEEP, "federation.round=3")
