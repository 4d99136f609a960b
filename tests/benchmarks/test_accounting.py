"""The benchmark of accounting runs, in small, and what it writes adds up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accounting


def test_every_way_pays_for_the_whole_run_and_shares_are_of_it(
    tiny_model: Callable[..., Path], measured: Callable[..., tuple[dict[str, Any], str]]
) -> None:
    small = ["--clients", "2", "--rounds", "3", "--local-steps", "1", "--batch", "16", "--trained-rounds", "1"]
    ways = [accounting.IN_MEMORY, accounting.TIGHT]
    model = str(tiny_model("bert", vocab_size=128))
    facts, markdown = measured(accounting, *small, "--ways", *ways, "--model", model)
    assert list(facts["ways"]) == ways
    whole = facts["training"]["round_seconds"]["median"] * 3
    for name, way in facts["ways"].items():
        assert way["parts"].keys() == {"calibration", "requests", "ledger", "ε for the facts", "settling"}
        assert sum(way["parts"].values()) == pytest.approx(way["seconds"], abs=0.04)
        assert way["share"] == pytest.approx(way["seconds"] / (way["seconds"] + whole), rel=0.1)
        assert f"{way['share']:.2%}" in markdown, name
