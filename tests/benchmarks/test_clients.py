"""The same samples among more clients: every size is there, and the parts of a round add up."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import clients
from benchmarks.memory import CLEAR

TINY = ["--samples", "16", "--device", "cpu"]


def test_the_smallest_run_has_all_sizes_and_parts(
    tiny_model: Callable[..., Path], measured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(clients, "CLEAR", tmp_path / "nowhere")  # as where the system does not tell memory
    monkeypatch.setattr(clients, "SLOWER", 1e9)
    options = [
        "--clients",
        "2",
        "4",
        "--steps",
        "1",
        "--repeats",
        "1",
        "--model",
        str(tiny_model("bert", vocab_size=128)),
    ]
    facts, markdown = measured(clients, *options, *TINY)
    assert facts["sizes"].keys() == {"2", "4"}
    assert facts["where"]["clients"] == 4
    assert all(seconds > 0 for seconds in facts["where"]["seconds"].values()), "a part is no longer called by a round"
    assert facts["missed"] == []
    assert "Memory was not measured." in markdown


@pytest.mark.skipif(not CLEAR.exists(), reason="the system does not tell peak memory")
def test_a_round_is_weighed(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--weigh", "4", "--clients", "4", "--model", str(tiny_model("bert", vocab_size=128))]
    monkeypatch.setattr(sys, "argv", ["clients", *options, *TINY])
    clients.main()
    weighed = json.loads(capsys.readouterr().out)
    assert 0 < weighed["before"] <= weighed["peak"]


def test_samples_that_cannot_be_divided_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["clients", "--clients", "3", "--samples", "16"])
    with pytest.raises(SystemExit):
        clients.main()
    assert "cannot be divided among 3 clients" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ratio", "grown", "count"), [(1.2, 1_000_000, 0), (1.3, 1_000_000, 1), (1.2, 1_100_000, 1), (1.0, None, 0)]
)
def test_an_aim_is_missed_above_it(ratio: float, grown: int | None, count: int) -> None:
    sizes = {"10": {"to_fewest": {"median": 1.0}}, "100": {"to_fewest": {"median": ratio}}}
    assert len(clients.missed({"sizes": sizes, "bytes_per_client": grown})) == count
