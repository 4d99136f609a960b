"""Fused clients, one batch and one after another do the same work, and the aims are judged by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cohort, fused

Row = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def engine(make_bench: Callable[..., Any]) -> fused.Engine:
    bench = make_bench()
    vocabulary = len(bench.classifier.tokenizer)
    theta = bench.initial_theta
    return fused.Engine(backend=bench.backend, theta=theta, shapes=bench.shapes, vocabulary=vocabulary, noise="host")


def test_all_ways_end_at_the_same_place(engine: fused.Engine) -> None:
    assert fused.agreement(engine, fused.Work(clients=3, records=2, tokens=8, steps=1)) < 1e-5


def test_every_way_takes_every_record_and_its_noise(engine: fused.Engine) -> None:
    work = fused.Work(clients=3, records=4, tokens=8, steps=2)
    dataset = fused.uniform_records(12, 8, engine.vocabulary)
    asked = {way: fused.padding(engine, work, dataset, way) for way in fused.WAYS}
    assert asked[fused.FUSED] == asked[fused.CENTRALISED]
    assert asked[fused.APART]["parts"] == 3
    assert all(found["padded_tokens"] > 12 * 8 for found in asked.values())
    quiet = fused.Work(clients=3, records=4, tokens=8, steps=2, noise_multiplier=0.0)
    for way in fused.WAYS:
        assert not fused.run(engine, work, dataset, way)[1].equal(fused.run(engine, quiet, dataset, way)[1])


def test_the_smallest_run_has_all_rows(tiny_model: Callable[..., Path], measured: Callable[..., Any]) -> None:
    options = ["--shapes", "2x8", "--steps", "1", "--repeats", "1", "--device", "cpu"]
    facts, markdown = measured(
        cohort, "--clients", "1", "3", "--model", str(tiny_model("bert", vocab_size=128)), *options
    )
    assert [(row["plan"], row["clients"]) for row in facts["rows"]] == [(p, k) for k in (1, 3) for p in cohort.PLANS]
    assert all(row["ways"].keys() == set(fused.WAYS) for row in facts["rows"])
    assert len(facts["not_measured"]) == 2
    assert "## Not measured yet" in markdown


@pytest.fixture
def row() -> Row:
    def make(clients: int, shape: str, throughput: float, speed_up: float) -> dict[str, Any]:
        ratios = {"throughput_to_one_batch": {"median": throughput}, "times_as_fast_as_apart": {"median": speed_up}}
        return {"plan": "float32 sdpa", "clients": clients, "shape": shape, **ratios}

    return make


@pytest.mark.parametrize(
    ("given", "device", "count"),
    [
        ((16, "8x16", 0.95, 2.0), "cpu", 0),
        ((16, "8x16", 0.94, 2.0), "cpu", 1),
        ((16, "8x16", 0.95, 1.9), "cpu", 1),
        ((4, "8x16", 0.95, 1.0), "cpu", 0),  # so few clients gain little
        ((1, "8x16", 0.90, 1.0), "cpu", 0),  # one client is one batch
        ((16, "8x32", 0.95, 1.0), "cpu", 0),  # an aim of GPUs
        ((64, "8x32", 0.95, 9.0), "cuda", 1),
    ],
)
def test_an_aim_is_missed_below_it(row: Row, given: tuple[Any, ...], device: str, count: int) -> None:
    assert len(cohort.missed([row(*given)], device)) == count


def test_what_was_not_measured_is_said(row: Row) -> None:
    assert len(cohort.not_measured([row(16, "8x16", 1.0, 2.0)], "cpu")) == 1
    assert len(cohort.not_measured([row(4, "8x16", 1.0, 2.0)], "cpu")) == 2
