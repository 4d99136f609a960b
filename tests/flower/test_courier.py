"""The courier is started anew for every message: it loads nothing that computes, reads or prices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr")

CHECKOUT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "opacus",
    "datasets",
    "pyarrow",
    "scipy",
    "dp_accounting",
    "safetensors",
    "ray",
}


def test_the_courier_loads_nothing_heavy() -> None:
    code = "import sys, clients.app; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert HEAVY & set(done.stdout.split()) == set()
    ours = {name for name in done.stdout.split() if name.startswith("fedlora.")}
    wanted = {"errors", "federation", "federation.failures", "site", "site.connection", "site.protocol"}
    assert ours == {f"fedlora.{name}" for name in wanted}
