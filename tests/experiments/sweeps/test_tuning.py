"""[tune]: which trials there are, what is chosen of them, that killing a sweep changes neither, and every mistake."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import ConfigError
from fedlora.experiments.runs.stored_run import StoredRun
from fedlora.experiments.sweeps.search_space import Range, Space
from fedlora.experiments.sweeps.sweep import Cell, Sweep
from fedlora.experiments.sweeps.tuning import Tuning

SWEEP = """
[axes.task]
sst2 = { data.task = "sst2" }
mrpc = { data.task = "mrpc" }
[grid]
privacy.epsilon = [inf, 6, 1.0]
run.seed = [0, 1]
"""
GRID = """
[tune]
seeds = [1000, 1001]
[tune.set]
privacy.epsilon = 3.0
[tune.space]
training.learning_rate = [2.0, 8.0]
privacy.clip_norm = [0.5, 1.0]
"""
PARZEN = """
[tune]
how = "optuna"
trials = 14
batch = 4
[tune.set]
privacy.epsilon = 3.0
[tune.space]
training.learning_rate = { low = 0.1, high = 100.0, log = true }
adapter.rank = { low = 2, high = 16 }
privacy.clipping = ["flat", "automatic"]
"""
Score = Callable[[Cell], float]


def sweep_of(folder: Path, text: str) -> Sweep:
    file = folder / "sweep.toml"
    file.write_text(text)
    return Sweep.from_toml(file)


def tuning_of(folder: Path, text: str) -> Tuning:
    tuning = Tuning.of(sweep_of(folder, text))
    assert tuning is not None
    return tuning


def ran(cell: Cell, value: float | None, q: float = 0.02) -> StoredRun:
    """What a run leaves; None: it failed."""
    phase = {"name": "finetune", "sampling_probability": q, "effective_noise_multiplier": 0.8, "num_steps": 100}
    record = {
        "config": cell.config.to_mapping(),
        "private": cell.config.private and not cell.config.privacy.seeded_noise,
        "metric": {"name": "accuracy", "value": value},
        "clients": [{"client": 0, "phases": [phase]}],
        "privacy": {"sites": [{"client": 0, "rounds_asked": 10, "rounds_charged": 10}]},
    }
    return StoredRun(
        folder=cell.folder,
        digest=cell.digest,
        role=cell.role,
        axes=cell.axes,
        error="" if value is not None else "RuntimeError: no memory left",
        record=None if value is None else record,
    )


def by_rate(cell: Cell) -> float:
    return -abs(math.log(cell.config.training.learning_rate / 8.0))


def finished(tuning: Tuning, score: Score = by_rate) -> dict[str, StoredRun]:
    """All trials, run in the order in which they become ready."""
    results: dict[str, StoredRun] = {}
    while new := [cell for cell in tuning.ready(results) if cell.digest not in results]:
        results |= {cell.digest: ran(cell, score(cell)) for cell in new}
    return results


def test_a_sweep_without_the_table_tunes_nothing(tmp_path: Path) -> None:
    assert Tuning.of(sweep_of(tmp_path, SWEEP)) is None


def test_the_documents_example_is_what_it_says(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "tuning.md").read_text()
    example = text.split("```toml\n")[1].split("```")[0]
    assert tuning_of(tmp_path, example).total() == 32
    assert len(sweep_of(tmp_path, example).cells()) == 18
    assert "= 32 trials, then 18 cells" in text


def test_a_grid_tries_every_combination_for_each_task_with_each_seed(tmp_path: Path) -> None:
    tuning = tuning_of(tmp_path, SWEEP + GRID)
    trials = tuning.ready({})
    found = {
        (c.config.data.task, c.config.training.learning_rate, c.config.privacy.clip_norm, c.config.run.seed)
        for c in trials
    }
    wanted = {(t, r, n, s) for t in ("sst2", "mrpc") for r in (2.0, 8.0) for n in (0.5, 1.0) for s in (1000, 1001)}
    assert found == wanted
    assert len(trials) == tuning.total() == 16
    assert {(c.role, c.config.data.validation_part, c.config.privacy.epsilon) for c in trials} == {
        ("trial", "tuning", 3.0)
    }
    assert trials[0].name == "task sst2, clip_norm 0.5, learning_rate 2, seed 1000"


def test_trials_and_cells_share_neither_seeds_nor_validation_records(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, SWEEP + GRID)
    tuning = Tuning.of(sweep)
    assert tuning is not None
    cells = sweep.cells(tuning.chosen(finished(tuning)))
    assert len(cells) == 12
    assert {cell.config.data.validation_part for cell in cells} == {"reporting"}
    assert not {cell.config.run.seed for cell in cells} & {cell.config.run.seed for cell in tuning.ready({})}
    assert {cell.config.training.learning_rate for cell in cells} == {8.0}, "the best value"
    assert {cell.config.privacy.epsilon for cell in cells} == {math.inf, 6.0, 1.0}, "[tune.set] is of trials only"


def test_each_label_gets_its_own_choice_as_soon_as_its_trials_have_ended(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, SWEEP + GRID)
    tuning = Tuning.of(sweep)
    assert tuning is not None

    def score(cell: Cell) -> float:
        wanted = {"sst2": 2.0, "mrpc": 8.0}[cell.config.data.task]
        return float(cell.config.training.learning_rate == wanted)

    results = finished(tuning, score)
    rates = {cell.config.data.task: cell.config.training.learning_rate for cell in sweep.cells(tuning.chosen(results))}
    assert rates == {"sst2": 2.0, "mrpc": 8.0}
    last = next(cell for cell in reversed(tuning.ready({})) if cell.config.data.task == "mrpc")
    del results[last.digest]
    assert {cell.config.data.task for cell in sweep.cells(tuning.chosen(results))} == {"sst2"}
    assert sweep.cells(tuning.chosen({})) == []


def test_the_mean_over_seeds_decides_and_the_first_of_equals_wins(tmp_path: Path) -> None:
    tuning = tuning_of(tmp_path, SWEEP + GRID)

    def lucky(cell: Cell) -> float:  # 2.0 is best with one seed and worse on average
        return {(2.0, 1000): 1.0, (2.0, 1001): 0.0}.get((cell.config.training.learning_rate, cell.config.run.seed), 0.6)

    chosen = tuning.chosen(finished(tuning, lucky))
    assert {(c["training.learning_rate"], c["privacy.clip_norm"]) for c in chosen.values()} == {(8.0, 0.5)}


def test_a_trial_that_fails_in_any_way_is_never_chosen(tmp_path: Path) -> None:
    tuning = tuning_of(tmp_path, SWEEP + GRID)
    results = finished(tuning)
    best = [c for c in tuning.ready({}) if c.config.training.learning_rate == 8.0 and c.config.run.seed == 1000]
    for cell in best:
        failure = None if cell.config.privacy.clip_norm == 0.5 else math.nan
        results[cell.digest] = ran(cell, failure)
    chosen = tuning.chosen(results)
    assert {settings["training.learning_rate"] for settings in chosen.values()} == {2.0}
    assert tuning.failed(results) == {}


def test_where_every_trial_failed_the_cells_have_a_reason(tmp_path: Path) -> None:
    tuning = tuning_of(tmp_path, SWEEP + GRID)
    results = finished(tuning)
    for cell in tuning.ready({}):
        if cell.config.data.task == "mrpc":
            results[cell.digest] = ran(cell, None)
    assert {labels[0] for labels in tuning.chosen(results)} == {"sst2"}
    failed = tuning.failed(results)
    assert {labels[0] for labels in failed} == {"mrpc"}
    assert len(failed) == 6
    assert all("4 configurations" in reason for reason in failed.values())
    assert tuning.failed({}) == {}


def test_one_choice_for_everything(tmp_path: Path) -> None:
    tuning = tuning_of(tmp_path, SWEEP + GRID.replace("[tune]", "[tune]\nper = []"))
    assert tuning.total() == 8
    assert {cell.config.data.task for cell in tuning.ready({})} == {"sst2"}, "the first label of an axis outside per"
    assert len(tuning.chosen(finished(tuning))) == 12


def test_axes_outside_per_take_the_first_label_that_no_exclusion_takes(tmp_path: Path) -> None:
    text = SWEEP + '[[exclude]]\ntask = "sst2"\n' + GRID.replace("[tune]", "[tune]\nper = []")
    assert {cell.config.data.task for cell in tuning_of(tmp_path, text).ready({})} == {"mrpc"}


RANDOM = PARZEN.replace('how = "optuna"', 'how = "random"').replace("batch = 4\n", "")


def values(tuning: Tuning, results: Mapping[str, StoredRun] | None = None) -> list[tuple[Any, ...]]:
    return [
        (c.config.data.task, c.config.training.learning_rate, c.config.adapter.rank, c.config.privacy.clipping)
        for c in tuning.ready(results or {})
    ]


def test_chance_is_the_same_every_time_and_more_trials_keep_the_first(tmp_path: Path) -> None:
    first = values(tuning_of(tmp_path, SWEEP + RANDOM))
    assert first == values(tuning_of(tmp_path, SWEEP + RANDOM))
    assert len(set(first)) == len(first) == 28
    more = values(tuning_of(tmp_path, SWEEP + RANDOM.replace("trials = 14", "trials = 20")))
    assert set(first) < set(more)
    wider = values(tuning_of(tmp_path, SWEEP + RANDOM.replace("high = 16", "high = 15")))
    assert set(first).isdisjoint(wider), "another space is another draw"
    assert {v[1:] for v in first if v[0] == "sst2"}.isdisjoint({v[1:] for v in first if v[0] == "mrpc"})


def test_a_range_is_drawn_evenly_and_never_left() -> None:
    """Shares 0 … 1 in steps of 1/1000 land evenly; a logarithm halves the way at the geometric mean."""
    shares = [k / 1000 for k in range(1000)]
    whole = Range.of("adapter.rank", {"low": 2, "high": 6})
    assert [sum(whole.at(share) == value for share in shares) for value in range(2, 7)] == pytest.approx(
        [200] * 5, abs=1
    )
    log = Range.of("training.learning_rate", {"low": 0.01, "high": 100, "log": True})
    assert log.at(0.5) == 1.0
    assert (log.at(0.0), log.at(0.999999)) == (0.01, 100.0)
    assert Range.of("training.learning_rate", {"low": 1, "high": 3}).at(0.5) == 2.0
    narrow = Range.of("training.learning_rate", {"low": 1.00001, "high": 1.00002})
    assert narrow.low <= narrow.at(0.5) <= narrow.high
    large = Range.of("adapter.rank", {"low": 1, "high": 64, "log": True})
    assert {large.at(share) for share in (0.0, 0.9999)} == {1, 64}


def test_a_finite_space_is_drawn_without_repeats() -> None:
    space = Space.of({"adapter.rank": [2, 4, 8], "privacy.clipping": ["flat", "automatic"]})
    drawn = space.drawn("any key", 6)
    assert len({json.dumps(values) for values in drawn}) == 6 == space.size


ONE_TASK = SWEEP.replace('mrpc = { data.task = "mrpc" }\n', "")


def test_optuna_goes_where_values_are_good(tmp_path: Path) -> None:
    text = ONE_TASK + PARZEN.replace("trials = 14", "trials = 40")

    def distance(score: Score) -> float:
        """Of the second half, in the mean, from a learning rate of 8."""
        later = list(finished(tuning_of(tmp_path, text), score).values())[20:]
        rates = [run.record["config"]["training"]["learning_rate"] for run in later if run.record]
        return sum(abs(math.log(rate / 8.0)) for rate in rates) / len(rates)

    assert distance(by_rate) < 0.5 * distance(lambda cell: -by_rate(cell))


def test_optuna_proposes_batch_by_batch(tmp_path: Path) -> None:
    tuning = tuning_of(tmp_path, ONE_TASK + PARZEN)
    results: dict[str, StoredRun] = {}
    sizes = []
    while new := [cell for cell in tuning.ready(results) if cell.digest not in results]:
        assert tuning.chosen(results) == {}
        sizes.append(len(new))
        results |= {cell.digest: ran(cell, by_rate(cell)) for cell in new}
    assert sizes == [4, 4, 4, 2]
    assert len(results) == tuning.total() == 14
    rates = [cell.config.training.learning_rate for cell in tuning.ready(results)]
    (chosen,) = {json.dumps(settings) for settings in tuning.chosen(results).values()}
    assert json.loads(chosen)["training.learning_rate"] == min(rates, key=lambda rate: abs(math.log(rate / 8.0)))


def test_optuna_goes_on_after_a_kill_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """At every moment a new process proposes what the old one would have, whatever order trials ended in."""
    whole = finished(tuning_of(tmp_path, SWEEP + PARZEN))
    results: dict[str, StoredRun] = {}
    chance = random.Random(5)
    while new := [cell for cell in tuning_of(tmp_path, SWEEP + PARZEN).ready(results) if cell.digest not in results]:
        some = chance.sample(new, k=min(3, len(new)))
        results |= {cell.digest: ran(cell, by_rate(cell)) for cell in some}
    assert results.keys() == whole.keys()
    again = [
        sys.executable,
        "-c",
        "import sys; from pathlib import Path; from fedlora.experiments.sweeps.sweep import Sweep;"
        "from fedlora.experiments.sweeps.tuning import Tuning;"
        "print(*[c.digest for c in Tuning.of(Sweep.from_toml(Path(sys.argv[1]))).ready({})])",
        str(tmp_path / "sweep.toml"),
    ]
    other = subprocess.run(again, capture_output=True, text=True, check=True).stdout.split()
    assert other == [cell.digest for cell in tuning_of(tmp_path, SWEEP + PARZEN).ready({})]


def test_optuna_hears_of_failures_and_tries_no_more_for_them(tmp_path: Path) -> None:
    tuning = tuning_of(tmp_path, SWEEP + PARZEN)
    results: dict[str, StoredRun] = {}
    while new := [cell for cell in tuning.ready(results) if cell.digest not in results]:
        results |= {c.digest: ran(c, None if c.config.training.learning_rate > 8 else by_rate(c)) for c in new}
    assert len(results) == 28
    assert all(settings["training.learning_rate"] <= 8 for settings in tuning.chosen(results).values())


def test_the_first_trials_stay_where_a_sweep_grows(tmp_path: Path) -> None:
    small = {cell.digest for cell in tuning_of(tmp_path, SWEEP + PARZEN).ready({})}
    text = SWEEP.replace("[0, 1]", "[0, 1, 2]").replace("[grid]", 'rte = { data.task = "rte" }\n[grid]')
    assert small < {cell.digest for cell in tuning_of(tmp_path, text + PARZEN).ready({})}


def test_without_optuna_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else find(name, *rest)
    )
    with pytest.raises(ConfigError, match=r"pip install 'fedlora\[tune\]'") as refused:
        tuning_of(tmp_path, SWEEP + PARZEN)
    assert refused.value.exit_code == 2


def test_neither_torch_nor_optuna_is_loaded_to_read_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sweep.toml").write_text(SWEEP + GRID)
    look = (
        "import sys; from pathlib import Path; from fedlora.experiments.sweeps.sweep import Sweep;"
        "from fedlora.experiments.sweeps.tuning import Tuning; Tuning.of(Sweep.from_toml(Path(sys.argv[1])));"
        "print(*{'torch', 'optuna', 'dp_accounting'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", look, str(tmp_path / "sweep.toml")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == []


# What a record says ----------------------------------------------------------------------------------------------


def facts_of(
    folder: Path, text: str, results_of: Callable[[Tuning], dict[str, StoredRun]] = finished
) -> dict[str, Any]:
    sweep = sweep_of(folder, text)
    tuning = Tuning.of(sweep)
    assert tuning is not None
    results = results_of(tuning)
    cell = next(c for c in sweep.cells(tuning.chosen(results)) if c.config.privacy.epsilon == 6.0)
    own = ran(cell, 0.9).record
    assert own is not None
    facts = tuning.facts(cell, results, own, folder)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    return facts


PRIVATE = SWEEP + '[set]\ndata.source = "hub"\n' + GRID


def test_a_record_says_how_its_settings_were_chosen(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, PRIVATE)
    expected = {
        "how": "grid",
        "per": {"task": "sst2"},
        "values": {"training.learning_rate": 8.0, "privacy.clip_norm": 0.5},
        "space": {"training": {"learning_rate": [2.0, 8.0]}, "privacy": {"clip_norm": [0.5, 1.0]}},
        "configurations": 4,
        "runs": 8,
        "runs_charged": 8,
        "costs_nothing": "",
        "failed": 0,
        "seeds": [1000, 1001],
        "trained_on": "the hub's records, which count as private",
        "chosen_on": "the tuning half of the public validation records of sst2",
    }
    assert {key: facts[key] for key in expected} == expected
    assert "4 configurations in 8 trial runs" in facts["note"]


def test_trials_on_private_records_are_composed_with_the_run(tmp_path: Path) -> None:
    from fedlora.privacy.accounting import Charge, epsilon

    facts = facts_of(tmp_path, PRIVATE)
    assert facts["epsilon_with_trials"] == pytest.approx(epsilon([Charge(0.02, 0.8, 900)], 1e-5), rel=1e-3)
    assert (facts["delta"], facts["accountant"], facts["reason"]) == (1e-5, "pld", "")
    assert "at most ε = " in facts["note"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[tune]", '[tune]\nrecords = "public"'), "public by the word of the sweep's author"),
        (("[tune.set]", '[tune.set]\ndata.source = "generated"'), "a generated corpus, public by itself"),
    ],
    ids=["declared", "generated"],
)
def test_trials_on_public_records_cost_nothing(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    from fedlora.privacy.accounting import Charge, epsilon

    facts = facts_of(tmp_path, PRIVATE.replace(*change))
    assert facts["epsilon_with_trials"] == pytest.approx(epsilon([Charge(0.02, 0.8, 100)], 1e-5), rel=1e-3)
    assert facts["trained_on"].endswith(said)
    assert facts["runs_charged"] == 0
    why = {True: "on the word of the sweep's author", False: "since they trained on a generated corpus"}
    assert facts["costs_nothing"] == why["author" in said]
    assert f"The trials cost these sites nothing, {facts['costs_nothing']}." in facts["note"]
    assert "All of them" not in facts["note"], "they are in no sum"


def test_a_generated_corpus_that_stands_for_private_records_is_charged(tmp_path: Path) -> None:
    """Where the cells train on it as well, as in a first try."""
    charged, facts = facts_of(tmp_path, PRIVATE), facts_of(tmp_path, PRIVATE.replace('"hub"', '"generated"'))
    assert facts["epsilon_with_trials"] == charged["epsilon_with_trials"]
    assert facts["trained_on"] == "records of a generated corpus, which count as private"


@pytest.mark.parametrize("flaw", ["privacy.epsilon = inf", "privacy.seeded_noise = true\nprivacy.epsilon = 3.0"])
def test_trials_without_a_guarantee_leave_none(tmp_path: Path, flaw: str) -> None:
    facts = facts_of(tmp_path, PRIVATE.replace("privacy.epsilon = 3.0", flaw))
    assert facts["epsilon_with_trials"] == "inf"
    assert "promises nothing" in facts["note"]


def test_a_failed_trial_is_counted_and_charged(tmp_path: Path) -> None:
    def with_failures(tuning: Tuning) -> dict[str, StoredRun]:
        results = finished(tuning)
        for cell in tuning.ready({}):
            if cell.config.training.learning_rate == 2.0:
                results[cell.digest] = ran(cell, None)
        return results

    whole, facts = facts_of(tmp_path, PRIVATE), facts_of(tmp_path, PRIVATE, with_failures)
    assert (facts["runs"], facts["failed"]) == (8, 4)
    assert facts["epsilon_with_trials"] == whole["epsilon_with_trials"]
    assert "4 of which failed" in facts["note"]


def test_a_trial_that_would_not_be_proposed_now_is_charged_all_the_same(tmp_path: Path) -> None:
    """As after a change of Optuna's version: it was released, and the author saw it."""

    def with_a_stray(tuning: Tuning) -> dict[str, StoredRun]:
        results = finished(tuning)
        stray = tuning.ready({})[0]
        other = tuning.sweep.cell(
            {**stray.axes, "training.learning_rate": "4"},
            {"data.source": "hub", "run.seed": 1000, "training.learning_rate": 4.0},
            role="trial",
        )
        return results | {other.digest: ran(other, 0.1)}

    whole, facts = facts_of(tmp_path, PRIVATE), facts_of(tmp_path, PRIVATE, with_a_stray)
    assert (facts["configurations"], facts["runs"]) == (5, 9)
    assert facts["epsilon_with_trials"] > whole["epsilon_with_trials"]


DULL = """
[tune]
how = "optuna"
trials = 20
seeds = [1000, 1001]
[tune.set]
privacy.epsilon = 3.0
[tune.space]
training.learning_rate = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
privacy.clip_norm = [0.3, 0.5, 1.0, 2.0]
"""


def test_proposals_that_are_alike_are_charged_as_planned(tmp_path: Path) -> None:
    """How many are alike follows from what was released; the number of charged runs must not."""
    from fedlora.privacy.accounting import Charge, epsilon

    def by_chance(number: int) -> Score:
        return lambda cell: random.Random(f"{number} {cell.name.partition(', seed')[0]}").random()

    made = set()
    for number in range(6):
        score = by_chance(number)
        facts = facts_of(tmp_path, PRIVATE.replace(GRID, DULL), lambda tuning, score=score: finished(tuning, score))
        made.add(facts["runs"])
        assert facts["runs"] == 2 * facts["configurations"]
        assert facts["runs_charged"] == 40
        assert facts["epsilon_with_trials"] == pytest.approx(epsilon([Charge(0.02, 0.8, 4100)], 1e-5), rel=1e-3)
        assert "The 40 trial runs that were planned with this run cost" in facts["note"]
        assert f"{facts['configurations']} configurations in {facts['runs']} trial runs" in facts["note"]
    assert max(made) < 40
    assert len(made) > 1, "or this shows nothing"


def test_in_which_order_keys_are_written_changes_no_trial(tmp_path: Path) -> None:
    """Also that of a sweep.toml, in which ranges come after lists."""
    rate = "training.learning_rate = { low = 0.1, high = 100.0, log = true }\n"
    for table in (PARZEN, RANDOM):
        text = ONE_TASK + table.replace(rate, "") + rate
        assert text != ONE_TASK + table
        first, second = tuning_of(tmp_path, ONE_TASK + table), tuning_of(tmp_path, text)
        assert list(finished(first)) == list(finished(second))
        assert first.chosen(finished(first)) == second.chosen(finished(second))


def test_a_choice_of_what_decides_the_noise_has_no_number(tmp_path: Path) -> None:
    text = PRIVATE + "training.expected_batch_size = [64, 128]\n"
    facts = facts_of(tmp_path, text)
    assert facts["epsilon_with_trials"] is None
    assert "training.expected_batch_size was chosen too" in facts["note"]
    public = facts_of(tmp_path, text.replace("[tune]", '[tune]\nrecords = "public"'))
    assert public["epsilon_with_trials"] is not None


# Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("seeds =", "sedes ="), "did you mean tune.seeds"),
        (("[1000, 1001]", "[1000, 1]"), "both have run.seed = 1"),
        (("[1000, 1001]", "[]"), "wanted a list of different whole numbers"),
        (("[1000, 1001]", "[1000, 1000]"), "wanted a list of different whole numbers"),
        (("[1000, 1001]", "[true]"), "wanted a list of different whole numbers"),
        (("[tune]", "[tune]\ntrials = 8"), "tune.trials is given, but tune.how = grid"),
        (("[tune]", "[tune]\nbatch = 8"), "tune.batch is given, but tune.how = grid"),
        (("[tune]", '[tune]\nhow = "random"'), "tune.trials is missing"),
        (("[tune]", '[tune]\nhow = "random"\ntrials = 5'), "has 4 configurations; use how = grid"),
        (("[tune]", '[tune]\nhow = "random"\ntrials = 3\nbatch = 2'), "only tune.how = optuna"),
        (("[tune]", '[tune]\nhow = "bayes"'), "wanted one of grid, random, optuna"),
        (("[tune]", '[tune]\nrecords = "secret"'), "wanted one of private, public"),
        (("[tune]", '[tune]\nper = ["tsak"]'), "did you mean task"),
        (("[tune]", '[tune]\nper = ["task", "task"]'), "each once"),
        (("[tune]", '[tune]\nper = "task"'), "wanted a list of axes"),
        (("[tune]", '[tune]\nper = ["run.seed"]'), "tune.per has run.seed"),
        (("[tune]", '[tune]\nper = ["privacy.epsilon"]'), "tune.per has privacy.epsilon"),
        (("privacy.epsilon = 3.0", ""), "say at which ε its trials run"),
        (("privacy.epsilon = 3.0", "run.seed = 5"), "tune.set.run.seed: tuning decides that"),
        (("privacy.epsilon = 3.0", "privacy.epsilom = 3.0"), "did you mean privacy.epsilon"),
        (("privacy.epsilon = 3.0", "privacy.epsilon = -3.0"), "wanted > 0"),
        (("privacy.epsilon = 3.0", "privacy.epsilon = 3.0\ntraining.learning_rate = 1.0"), "[tune.set] decides"),
        (
            ("training.learning_rate = [2.0, 8.0]", "training.learning_rat = [2.0]"),
            "did you mean training.learning_rate",
        ),
        (("[2.0, 8.0]", "[]"), "has no value"),
        (("[2.0, 8.0]", "[2.0, 2]"), "has a value twice"),
        (("[2.0, 8.0]", "[2.0, -8.0]"), "training.learning_rate = -8.0, wanted > 0"),
        (("[2.0, 8.0]", "3.0"), "wanted a list of values"),
        (("[2.0, 8.0]", "{ low = 1.0, high = 2.0 }"), "is a range, but tune.how = grid"),
        (("privacy.clip_norm = [0.5, 1.0]", "data.task = ['sst2']"), "is no setting to choose"),
        (("privacy.clip_norm = [0.5, 1.0]", "privacy.epsilon = [1.0, 2.0]"), "is no setting to choose"),
        (("privacy.clip_norm = [0.5, 1.0]", "run.out = ['a']"), "a sweep decides that"),
        (("[tune.space]", "[tune.space.x]"), "unknown section x"),
        (("[axes.task]", '[set]\ndata.validation_part = "all"\n[axes.task]'), "the sweep sets data.validation_part"),
        (("run.seed = [0, 1]", "run.seed = [0, 1]\ntraining.learning_rate = [1.0]"), "the axis training.learning_rate"),
        (('{ data.task = "mrpc" }', '{ data.task = "sst2" }'), "the same run"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, change: tuple[str, str], complaint: str) -> None:
    text = (SWEEP + GRID).replace(*change)
    assert text != SWEEP + GRID
    with pytest.raises(ConfigError) as refused:
        tuning_of(tmp_path, text)
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("{ low = 1.0 }", "wanted low and high"),
        ("{ low = 2.0, high = 1.0 }", "low below high"),
        ("{ low = nan, high = 1.0 }", "low below high"),
        ("{ low = 1.0, high = inf }", "low below high"),
        ("{ low = 0.0, high = 1.0, log = true }", "low above 0"),
        ("{ low = 1.0, high = 2.0, log = 3 }", "true or false"),
        ("{ low = 1.0, hihg = 2.0 }", "did you mean high"),
        ("{ low = -1.0, high = 2.0 }", "wanted > 0"),
    ],
)
def test_a_range_that_is_none(tmp_path: Path, entry: str, complaint: str) -> None:
    text = SWEEP + PARZEN.replace("{ low = 0.1, high = 100.0, log = true }", entry)
    with pytest.raises(ConfigError) as refused:
        tuning_of(tmp_path, text)
    assert complaint in str(refused.value)


def test_ranges_are_for_numbers(tmp_path: Path) -> None:
    for entry, complaint in (("adapter.rank = { low = 2.5, high = 16 }", "two whole numbers"),):
        with pytest.raises(ConfigError, match=complaint):
            tuning_of(tmp_path, SWEEP + PARZEN.replace("adapter.rank = { low = 2, high = 16 }", entry))
    with pytest.raises(ConfigError, match="the key is no number"):
        tuning_of(tmp_path, SWEEP + PARZEN.replace('["flat", "automatic"]', "{ low = 1, high = 2 }"))


@pytest.mark.parametrize("text", ["[tune]\nseeds = [5]", "[tune.space]", "[tune]\nspace = 3\n"])
def test_a_table_with_nothing_to_choose(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="tune"):
        Tuning.of(sweep_of(tmp_path, SWEEP + text))


def test_too_many_trials(tmp_path: Path) -> None:
    rates, norms = [k / 8 for k in range(1, 400)], [k / 8 for k in range(1, 40)]
    with pytest.raises(ConfigError, match="15561 combinations"):
        tuning_of(tmp_path, SWEEP + GRID.replace("[2.0, 8.0]", str(rates)).replace("[0.5, 1.0]", str(norms)))
    text = SWEEP + RANDOM.replace("trials = 14", "trials = 6000").replace("privacy.clipping", "training.optimizer")
    with pytest.raises(ConfigError, match="12000 trials"):
        tuning_of(tmp_path, text.replace('["flat", "automatic"]', '["sgd", "adam"]'))
