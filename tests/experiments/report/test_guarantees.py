"""No ε stands without what it is about, and none is called a bound that is not."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.experiments.report import build_report, read_results
from fedlora.experiments.report.csv_files import csv_files
from fedlora.experiments.report.guarantees import figure_note, guarantee_words, odds
from fedlora.experiments.report.notes import notes_of
from fedlora.experiments.runs.stored_run import StoredRun

Stated = Callable[..., StoredRun]


@pytest.fixture
def stated(stored: Callable[..., StoredRun], recorded: Callable[..., dict[str, Any]]) -> Stated:
    """A cell whose record states a guarantee with these fields other than usual."""

    def make(guarantee: dict[str, Any] | None, *, charged: float = 5.9964, **more: Any) -> StoredRun:
        privacy = recorded()["privacy"]
        privacy["guarantee"] = None if guarantee is None else privacy["guarantee"] | guarantee
        privacy["sites"] = [{"epsilon_charged": charged}]
        return stored(privacy=privacy | more.pop("privacy", {}), **more)

    return make


SEEDED, UNSOUND = {"noise_seeded": True}, {"unsound": True, "epsilon": "inf"}


@pytest.mark.parametrize("guarantee", [SEEDED, UNSOUND, None])
def test_where_no_run_has_a_guarantee_nothing_is_called_a_bound(
    folder_of: Callable[..., Path], stated: Stated, tmp_path: Path, guarantee: dict[str, Any] | None
) -> None:
    folder = folder_of([stated(guarantee, seed=seed) for seed in range(2)])
    results = read_results(folder)
    (said,) = guarantee_words(results)
    assert figure_note(results.runs).startswith("Nothing is promised by any ε here: ")
    assert said.startswith("No run here has a guarantee: nothing is promised about any record")
    assert "(2 runs)" in said
    assert odds(results) == []
    page = build_report(folder, tmp_path / "out").read_text(encoding="utf-8")
    for text in (page, (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")):
        assert "is an upper bound" not in text
        assert "nothing is promised about any record" in text
    assert "would have been nearly as likely" not in page


def test_noise_that_the_record_calls_seeded_promises_nothing(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun]
) -> None:
    """Its guarantee may be an old one, which does not say."""
    results = read_results(folder_of([stored(noise_seeded=True)]))
    assert "noise seeded, not private" in guarantee_words(results)[0]


def test_where_some_runs_have_none_the_bound_is_that_of_the_others(
    folder_of: Callable[..., Path], stated: Stated
) -> None:
    runs = [stated({}, seed=0), stated({}, seed=1)]
    runs += [stated(SEEDED | {"delta": 1e-3}, seed=2, epsilon=1.0), stated(UNSOUND, seed=3), stated({}, epsilon="inf")]
    results = read_results(folder_of(runs))
    bound, others, uncovered = guarantee_words(results)
    assert bound.startswith("Every ε of the 2 runs with a guarantee is an upper bound for one record of one site")
    assert "at δ = 1e-05, by PLD" in bound
    assert others.startswith("Nothing is promised by 2 other runs: ")
    assert "noise seeded, not private (1 run)" in others
    assert "GReDP with real noise" in others
    assert uncovered.startswith("Not covered: several records of one person")
    assert [row[0] for row in odds(results)] == ["6"], "ε = 1 was asked for by a seeded run only"


def test_odds_are_those_of_what_was_charged(folder_of: Callable[..., Path], stated: Stated) -> None:
    assert [row[0] for row in odds(read_results(folder_of([stated({}, charged=7.25)])))] == ["7.25"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"delta": 1e-3}, "Different δ in one table: 1e-05 (2 runs), 0.001 (1 run)"),
        ({"accountant": "rdp"}, "Different accountants in one table: PLD (2 runs), RDP (1 run)"),
        ({"unit": "client"}, "Different units of privacy in one table: record by add/remove (2 runs), client"),
    ],
)
def test_epsilon_of_different_kinds_in_one_table_is_said(
    folder_of: Callable[..., Path], stated: Stated, other: dict[str, Any], said: str
) -> None:
    alike = [stated({}, seed=0), stated({}, seed=1), stated({"delta": 1e-3, "epsilon": "inf"}, epsilon="inf")]
    assert notes_of(read_results(folder_of(alike)).runs) == []
    (note,) = notes_of(read_results(folder_of([*alike, stated(other, seed=2)])).runs)
    assert note.startswith(said)


def test_figures_that_are_of_no_one_model_are_said(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun]
) -> None:
    plain = {"name": "accuracy", "value": 0.5}
    runs = [stored(metric=plain | {"of": of}, seed=seed) for seed, of in enumerate(("own", "global", "own", "shared"))]
    notes = notes_of(read_results(folder_of([*runs, stored(metric=plain, seed=4)])).runs)
    assert "2 of 5 runs: the metric is the mean over the sites' own models, which no one adapter has." in notes
    assert "1 of 5 runs: the metric is of the part alone that the sites share." in notes


def test_runs_that_were_stopped_and_what_it_cost_them_are_said(folder_of: Callable[..., Path], stated: Stated) -> None:
    runs = [
        stated({}, seed=0),
        stated({}, seed=1, privacy={"resumed": True}),
        stated({}, seed=2, privacy={"resumed": True}, charged=7.10001),
    ]
    notes = notes_of(read_results(folder_of(runs)).runs)
    assert notes == [
        "2 of 3 runs were stopped and went on; rounds that died are charged all the same.",
        "1 of 3 runs were charged more than the ε that was asked for, up to ε = 7.101: see what they cost.",
    ]


def test_every_epsilon_of_a_csv_file_names_what_it_is_about(folder_of: Callable[..., Path], stated: Stated) -> None:
    runs = [stated({}, method=method, seed=seed) for method in ("a", "b") for seed in range(2)]
    runs += [stated(SEEDED, method="b", seed=2), stated(SEEDED, method="c", epsilon=1.0)]
    runs += [stated({"epsilon": "inf"}, method="c", epsilon="inf"), stated(None, method="d")]
    files = csv_files(read_results(folder_of(runs)))
    bound = "ε upper bound, one record of one site, add/remove, δ = 1e-05, PLD; not covered: see tables.md"
    seeded = "no guarantee: noise seeded, not private"
    for name in ("metric.csv", "costs.csv"):
        found = {(row["label"], row["epsilon"]): row["guarantee"] for row in csv.DictReader(io.StringIO(files[name]))}
        assert found == {
            ("a", "6"): bound,
            ("b", "6"): f"2 of 3 runs: {bound} | 1 of 3 runs: {seeded}",
            ("c", "1"): seeded,
            ("c", "inf"): "no guarantee: ε = ∞, run without noise",
            ("d", "6"): "no guarantee: the record states no guarantee",
        }
    differences = {row["label"]: row["guarantee"] for row in csv.DictReader(io.StringIO(files["differences.csv"]))}
    assert differences["b"] == bound, "of the seeds that are paired"
    assert differences["d"].startswith("1 of 2 runs: no guarantee")


@pytest.fixture
def caption(drawn: list[Any]) -> Callable[[int], str]:
    """What stands at the foot of a figure, as one line."""
    return lambda place: " ".join(drawn[place].texts[-1].get_text().split())


def test_figures_say_what_their_epsilon_bounds(
    folder_of: Callable[..., Path], stated: Stated, tmp_path: Path, drawn: list[Any], caption: Callable[[int], str]
) -> None:
    slots = [{"name": "m.query/B", "layer": 0, "kind": "query", "energy": 2.0, "noise_energy": 1.0}]
    kinds = [{"layer": 0, "type": kind, "selected": kind == "query"} for kind in ("query", "value")]
    runs = [stated({}, seed=seed, slots=slots, selection={"candidates": kinds}) for seed in range(2)]
    build_report(folder_of(runs), tmp_path / "out")
    assert len(drawn) == 10, "five figures, each as PNG and SVG"
    bound = "ε: upper bound for one record of one site (add/remove) at δ = 1e-05, by PLD accounting; not covered: see"
    assert all(bound in caption(place) for place in range(10))
    assert "The paler a mark, the more private" in caption(2)


def test_figures_of_seeded_runs_call_them_not_private(
    folder_of: Callable[..., Path], stated: Stated, tmp_path: Path, drawn: list[Any], caption: Callable[[int], str]
) -> None:
    runs = [stated(SEEDED, seed=0), stated({}, epsilon=1.0), stated({"epsilon": "inf"}, epsilon="inf")]
    build_report(folder_of(runs), tmp_path / "out")
    said = "Nothing is promised by 1 other run (costs.csv says which): noise seeded, not private"
    assert all(said in caption(place) for place in range(len(drawn)))
    assert all("upper bound" in caption(place) for place in range(len(drawn)))
    assert "more private" not in caption(2)
    assert "the smaller the ε that was asked for" in caption(2)
