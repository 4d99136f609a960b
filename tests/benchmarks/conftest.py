"""Benchmarks are run in their smallest form; no test looks at how long anything took."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Measured = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    """`measured(benchmark, *options)` runs its main and gives what it has written: facts and Markdown."""

    def run(benchmark: ModuleType, *options: str) -> tuple[dict[str, Any], str]:
        name = benchmark.__name__.rpartition(".")[2]
        monkeypatch.setattr(sys, "argv", [name, *options, "--out", str(tmp_path)])
        benchmark.main()
        facts: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
        markdown = (tmp_path / f"{name}.md").read_text()
        assert str(tmp_path) not in markdown
        return facts, markdown

    return run
