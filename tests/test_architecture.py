"""The house keeps its shape: who imports whom, and what starts without a GPU stack."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fedlora", "clients", "server", "simulations", "benchmarks", "deploy")

WITHOUT_TORCH = (
    "fedlora",
    "fedlora.cli",
    "fedlora.config",
    "fedlora.errors",
    "fedlora.experiments.budget",
    "fedlora.privacy.accounting",
    "fedlora.privacy.calibration",
    "fedlora.privacy.ledger",
    "fedlora.privacy.ledger_file",
    "fedlora.privacy.policy",
    "fedlora.privacy.units",
    "fedlora.experiments.report",
    "fedlora.experiments.watch",
    "fedlora.federation.schedule",
    "fedlora.monitoring.logs",
    "fedlora.monitoring.metrics",
    "fedlora.privacy.phases",
    "fedlora.site.health",
)

FORBIDDEN = {
    "fedlora/data/planted.py": ("import flwr", "fedlora knows neither Flower nor the programs around it"),
    "fedlora/federation/planted.py": (
        "from server import app",
        "fedlora knows neither Flower nor the programs around it",
    ),
    "fedlora/adapters/planted.py": ("import fedlora.privacy", "Rooms of fedlora"),
    "fedlora/privacy/planted.py": ("import fedlora.engine", "Rooms of fedlora"),
    "fedlora/planted.py": ("", "Rooms of fedlora"),
    "clients/planted.py": ("import server", "clients and server never import each other"),
    "fedlora/engine/planted.py": ("import peft", "peft only in fedlora.adapters.peft"),
    "fedlora/privacy/mechanisms/planted.py": ("import opacus", "Opacus only in fedlora.engine.opacus"),
    "fedlora/errors.py": ("import torch", "A privacy officer reads and runs these without torch"),
}


def lint_imports(checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "pyproject.toml", copy)
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package,
            copy / package,
            ignore=lambda folder, names: {
                name for name in names if not (name.endswith(".py") or (Path(folder) / name).is_dir())
            },
        )
    return copy


def test_imports_obey_the_contracts(checkout: Path) -> None:
    linted = lint_imports(checkout)
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize("path", FORBIDDEN)
def test_a_forbidden_import_is_caught(checkout: Path, path: str) -> None:
    line, contract = FORBIDDEN[path]
    planted = checkout / path
    before = planted.read_text() if planted.exists() else None
    planted.write_text(f"{before or ''}\n{line}\n")
    try:
        linted = lint_imports(checkout)
    finally:
        planted.unlink() if before is None else planted.write_text(before)
    assert linted.returncode != 0
    broken = [shown for shown in linted.stdout.splitlines() if " BROKEN" in shown]
    assert any(shown.startswith(contract) for shown in broken), linted.stdout


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_starts_without_torch_and_flower(module: str) -> None:
    source = ROOT.joinpath(*module.split("."))
    if not (source.with_suffix(".py").exists() or (source / "__init__.py").exists()):
        pytest.skip(f"{module} does not exist yet")
    heavy = "{'torch', 'transformers', 'datasets', 'peft', 'opacus', 'flwr', 'ray'}"
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split() == []
