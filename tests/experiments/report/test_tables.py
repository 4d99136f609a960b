"""tables.md and the CSV files say what the records say, no more and no less."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.experiments.report import read_results
from fedlora.experiments.report.csv_files import csv_files
from fedlora.experiments.report.tables import tables_text
from fedlora.experiments.runs.stored_run import StoredRun


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def line(text: str, *starts: str) -> list[str]:
    """Cells of the first table row that starts so."""
    found = next(row for row in text.splitlines() if row.startswith(f"| {' | '.join(starts)} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_means_deviations_and_numbers_of_seeds(folder_of: Callable[..., Path], sweep_runs: list[StoredRun]) -> None:
    results = read_results(folder_of(sweep_runs))
    values = [run.value for run in results.of("sst2", "plain", 6.0)]
    text = tables_text(results)
    assert line(text, "plain")[2] == f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f} (3)"
    assert "| method | ε = 1 | ε = 6 | ε = ∞ (no privacy) |" in text
    (found,) = [r for r in rows(csv_files(results)["metric.csv"]) if (r["label"], r["epsilon"]) == ("plain", "6")]
    assert float(found["mean"]) == pytest.approx(statistics.mean(values))
    assert float(found["std"]) == pytest.approx(statistics.stdev(values))
    assert (found["n"], found["metric"]) == ("3", "accuracy")


def test_the_highest_mean_is_bold_and_so_are_all_that_tie(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun]
) -> None:
    runs = [stored(v, method=m) for v, m in ((0.7, "low"), (0.9, "high"), (0.9, "also high"))]
    text = tables_text(read_results(folder_of(runs)))
    assert line(text, "high")[1] == line(text, "also high")[1] == "**0.9000 (1)**"  # no spread of one value
    assert line(text, "low")[1] == "0.7000 (1)"
    assert "does not say that the difference is significant" in text


def test_differences_are_paired_by_seed_and_pooled_over_private_epsilon(
    folder_of: Callable[..., Path], sweep_runs: list[StoredRun]
) -> None:
    folder = folder_of(sweep_runs)
    (folder / "sweep.toml").write_text(
        '[axes.method]\ngated = {}\nplain = { adapter.select = "all" }\n[report]\nbaseline = "plain"\n'
    )
    results = read_results(folder)
    assert (results.labels, results.baseline) == (("gated", "plain"), "plain")
    found = {row["epsilon"]: row for row in rows(csv_files(results)["differences.csv"])}
    assert {e: (row["seeds"], row["verdict"]) for e, row in found.items()} == {
        "1": ("3", "gains"),
        "6": ("3", "gains"),
        "inf": ("3", "no difference seen"),
        "pooled": ("3", "gains"),
    }
    assert float(found["pooled"]["mean"]) == pytest.approx(0.03, abs=1e-9)  # inf is not in it
    assert float(found["pooled"]["student_low"]) < float(found["pooled"]["bootstrap_low"])
    text = tables_text(results)
    assert line(text, "gated", "all private ε, pooled")[2] == "3"
    assert "with few pairs a bootstrap is too narrow" in text


def test_pairs_need_both_seeds_and_few_of_them_say_nothing(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun]
) -> None:
    runs = [stored(0.8, method="a", seed=seed) for seed in (0, 1, 2)]
    runs += [stored(0.9, method="b", seed=seed) for seed in (1, 2, 3)]
    text = tables_text(read_results(folder_of(runs)))
    assert line(text, "b", "ε = 6")[2:] == ["2", "+0.1000", "too few", "too few", "too few"]


def test_a_printed_epsilon_is_never_less_than_what_was_spent(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun]
) -> None:
    runs = [stored(seed=seed, spent=spent) for seed, spent in enumerate((5.10001, 5.99601, 5.2))]
    results = read_results(folder_of(runs))
    assert line(tables_text(results), "plain", "6")[3] == "5.997"
    printed = [float(row["epsilon_spent"]) for row in rows(csv_files(results)["runs.csv"])]
    assert all(shown >= spent for shown, spent in zip(printed, (5.10001, 5.99601, 5.2), strict=True))
    assert printed[0] == 5.101


def test_what_sites_were_charged_counts_where_it_is_more(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun], recorded: Callable[..., dict[str, object]]
) -> None:
    privacy = recorded()["privacy"]
    assert isinstance(privacy, dict)
    privacy["sites"] = [{"epsilon_charged": 5.0}, {"epsilon_charged": 7.25}]  # a resumed run
    results = read_results(folder_of([stored(privacy=privacy)]))
    assert line(tables_text(results), "plain", "6")[3] == "7.25"


def test_without_noise_there_is_no_privacy_and_with_seeded_noise_none_either(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun], recorded: Callable[..., dict[str, object]]
) -> None:
    privacy = recorded()["privacy"]
    assert isinstance(privacy, dict)
    privacy["guarantee"]["noise_seeded"] = True
    runs = [stored(epsilon="inf"), stored(privacy=privacy, noise_seeded=True)]
    text = tables_text(read_results(folder_of(runs)))
    assert line(text, "plain", "∞")[3] == "no privacy"
    assert line(text, "plain", "6")[3].startswith("no guarantee")
    assert "1 of 2 runs: noise seeded, not private" in text


def test_runs_that_do_not_compare_are_said(folder_of: Callable[..., Path], stored: Callable[..., StoredRun]) -> None:
    config = {**(stored().record or {})["config"]}
    other = config | {"data": {"task": "sst2", "validation_part": "reporting"}}
    runs = [stored(), stored(seed=1, code_digest="d" * 64), stored(seed=2, config=other)]
    runs += [stored(0.1, folder="cells/twice")]
    text = tables_text(read_results(folder_of(runs)))
    assert "2 different versions of the code: cccccccccccc (3 runs), dddddddddddd (1 runs)" in text
    assert re.search(r"different parts of the validation data: all \(3 runs\), reporting \(1 runs\)", text)
    assert "1 places of the table have several runs of one seed" in text


def test_answers_that_were_not_used_are_counted(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun]
) -> None:
    short = [{"round": 1, "metric": 0.7, "clients_failed": 2}, {"round": 2, "metric": 0.8, "clients_failed": 1}]
    odd = [{"round": 1, "metric": 0.7, "clients_failed": "inf"}]
    text = tables_text(read_results(folder_of([stored(), stored(seed=1, rounds=short), stored(seed=2, rounds=odd)])))
    assert "1 of 3 runs did without 3 answers of clients" in text


def test_other_axes_make_tables_of_their_own(folder_of: Callable[..., Path], stored: Callable[..., StoredRun]) -> None:
    runs = []
    for partition in ("iid", "skewed"):
        run = stored(folder=f"cells/{partition}")
        axes = {**run.axes, "data.partition": partition}
        runs.append(StoredRun(folder=run.folder, digest=partition, axes=axes, record=run.record))
    assert read_results(folder_of(runs)).tasks == ("sst2, partition iid", "sst2, partition skewed")


def test_failed_runs_trials_and_tuning_are_told(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun]
) -> None:
    tuning = {
        "configurations": 12,
        "runs": 24,
        "chosen_on": "the tuning half of validation data",
        "trained_on": "private records",
        "values": {"training.learning_rate": 4.0},
        "epsilon_with_trials": 11.10001,
        "note": "private selection",
    }
    trial = StoredRun(folder="trials/1", digest="t", role="trial", record=stored(0.99).record)
    dead = StoredRun(folder="cells/dead", digest="d", role="cell", axes={"method": "b"}, error="no client answered")
    cut = StoredRun(folder="cells/cut", digest="e", role="cell", axes={"method": "b"}, rounds=[{"round": 1}])
    results = read_results(folder_of([stored(tuning=tuning), trial, dead, cut]))
    text = tables_text(results)
    assert "0.9900" not in text
    assert "1 trials are in the store and in none of the tables" in text
    assert "12 in 24 runs | the tuning half of validation data | private records" in text
    assert "ε = 11.11 with all trials counted" in text
    assert "1 failed:" in text
    assert "cells/dead (method b): no client answered" in text
    table = rows(csv_files(results)["runs.csv"])
    assert [row["status"] for row in table] == ["done", "failed", "unfinished"]
    assert table[1]["error"] == "no client answered"
    assert "cells/cut (method b): 1 rounds are done" in text


def test_trials_that_cost_privacy_unseen_are_said(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun]
) -> None:
    text = tables_text(read_results(folder_of([stored(tuning={"configurations": 3})])))
    assert "ε of the runs does not include the trials" in text


FREE = [
    ({"trained_on": "a folder", "costs_nothing": "on the author's word"}, "trials cost nothing, on the author's word"),
    ({"trained_on": "a generated corpus", "costs_nothing": "being generated"}, "trials cost nothing, being generated"),
    ({"trained_on": "a folder, public by the author's word"}, "trials cost nothing, on the author's word"),
    ({"trained_on": "a generated corpus, public by itself"}, "trials cost nothing, on the author's word"),
]


@pytest.mark.parametrize(("tuning", "said"), FREE)
def test_trials_that_are_not_counted_are_not_called_counted(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun], tuning: dict[str, object], said: str
) -> None:
    text = tables_text(read_results(folder_of([stored(tuning=tuning | {"epsilon_with_trials": 8.8})])))
    assert text.count(said) == 2, "beside the metric, and where searches are listed"
    assert "with all trials counted" not in text
    assert "8.8" not in text


def test_a_table_says_that_settings_were_chosen_by_trials(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun]
) -> None:
    private = {"trained_on": "the hub's records, which count as private", "delta": 1e-5, "costs_nothing": ""}
    runs = [
        stored(seed=0),
        stored(seed=1, tuning=private | {"epsilon_with_trials": 10.5}),
        stored(seed=2, tuning=private | {"epsilon_with_trials": 11.10001}),
        stored(seed=3, tuning=private | {"epsilon_with_trials": None}),
        stored(seed=4, tuning=private | {"epsilon_with_trials": "inf"}),
    ]
    text = tables_text(read_results(folder_of(runs)))
    before_costs = text[: text.index("What they cost")]
    said = "Settings of 4 of 5 runs were chosen by trials: up to ε = 11.11 at δ = 1e-05 with them; "
    assert said + "ε of the runs does not include the trials; no privacy with the trials counted" in before_costs


def test_labels_cannot_break_out_of_a_table(folder_of: Callable[..., Path], stored: Callable[..., StoredRun]) -> None:
    text = tables_text(read_results(folder_of([stored(method="a|b\n<img src=x> **c** `d`")])))
    assert "a\\|b &lt;img src=x&gt; \\*\\*c\\*\\* \\`d\\`" in text
    assert "<img" not in text


def test_labels_are_no_formulas_in_a_spreadsheet(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun]
) -> None:
    runs = [stored(0.8 - i / 10, method=m, seed=s) for i, m in enumerate(("=1+1", "a")) for s in range(3)]
    dead = StoredRun(folder="cells/dead", digest="d", role="cell", axes={"method": "b"}, error="@SUM(A1)")
    files = csv_files(read_results(folder_of([*runs, dead])))
    for name in ("metric.csv", "differences.csv", "costs.csv", "runs.csv"):
        assert "'=1+1" in {text for row in rows(files[name]) for text in row.values()}, name
        assert not any(text.startswith(("=", "@")) for row in rows(files[name]) for text in row.values()), name
    assert any(float(row["mean"]) == pytest.approx(-0.1) for row in rows(files["differences.csv"])), (
        "numbers are numbers"
    )
