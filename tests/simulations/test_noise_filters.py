"""The table of docs/noise_filters.md comes from records alone, pairs runs by seed and code, and does not overclaim."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlora.config import RunConfig
from simulations import noise_filters
from simulations.noise_filters import COMMON, RECIPE, VARIANTS, record_file, table
from simulations.page import write_between


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(noise_filters, "RESULTS", tmp_path)
    return tmp_path


def write(variant: str, *values: float, code: str = "a") -> None:
    for seed, value in enumerate(values):
        record = {"metric": {"value": value}, "code_digest": code}
        record_file(variant, seed).write_text(json.dumps(record))


def row(variant: str) -> list[str]:
    lines = [line for line in table(["none", variant]).splitlines() if line.startswith(f"| {variant} |")]
    return [cell.strip() for cell in lines[0].strip("|").split("|")] if lines else []


def test_every_variant_is_a_config_of_its_own() -> None:
    digests = {RunConfig.from_toml(RECIPE, [*COMMON, *overrides]).digest() for overrides in VARIANTS.values()}
    assert len(digests) == len(VARIANTS)


def test_differences_are_taken_seed_by_seed() -> None:
    """Apart by more than the seeds are, but always alike: 0.02, 0.021, 0.019, so mean ± 4.303 · 0.001 / √3."""
    write("none", 0.70, 0.80, 0.75)
    write("disk-0.5", 0.72, 0.821, 0.769)
    assert row("disk-0.5")[1:] == ["3", "0.7700 ± 0.0505", "+0.0200 ± 0.0010", "+0.0175 to +0.0225", "gains"]


@pytest.mark.parametrize(
    ("values", "verdict"), [((0.68, 0.779, 0.731), "loses"), ((0.72, 0.79, 0.76), "no difference seen")]
)
def test_a_verdict_needs_an_interval_that_leaves_out_zero(values: tuple[float, ...], verdict: str) -> None:
    write("none", 0.70, 0.80, 0.75)
    write("james_stein", *values)
    assert row("james_stein")[-1] == verdict


def test_one_or_two_seeds_prove_nothing() -> None:
    write("none", 0.70)
    write("disk-0.5", 0.90)
    assert row("disk-0.5")[-2:] == ["unknown", "too few seeds"]
    write("none", 0.75, 0.5)
    write("disk-0.5", 1.0, 0.75)
    assert row("disk-0.5")[-2:] == ["+0.2500 to +0.2500", "too few seeds"]


def test_runs_of_other_code_are_not_compared() -> None:
    write("none", 0.70, 0.80, 0.75)
    write("disk-0.5", 0.72, 0.82, 0.77, code="b")
    assert row("disk-0.5") == []


def test_only_what_stands_between_the_marks_is_replaced(results: Path) -> None:
    page = results / "page.md"
    page.write_text(f"before\n{noise_filters.START}\nold\n{noise_filters.END}\nafter\n")
    for text in ("new", "newer"):
        write_between(page, noise_filters.START, noise_filters.END, text)
        assert page.read_text() == f"before\n{noise_filters.START}\n\n{text}\n\n{noise_filters.END}\nafter\n"
