"""What is installed, pinned, shipped and pushed to sites is what pyproject.toml says."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedlora.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = ("fedlora", "clients", "server", "simulations", "benchmarks", "docs")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md", ".gitignore"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    return copy


def run(*command: str, cwd: Path, **environment: str) -> None:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_holds_fedlora_and_nothing_else(checkout: Path, tmp_path: Path) -> None:
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(tmp_path), ".", cwd=checkout)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        assert "fedlora = fedlora.cli:main" in archive.read(entry_points).decode()
    version = PYPROJECT["project"]["version"]
    assert {name.split("/")[0] for name in names} == {"fedlora", f"fedlora-{version}.dist-info"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedlora").rglob("*.py")}
    page = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedlora/experiments/report/page").iterdir()}
    assert sources | page | {"fedlora/py.typed"} <= set(names)


@pytest.mark.flower
@pytest.mark.xdist_group("flower")
def test_bundle_holds_code_and_license_only(checkout: Path, tmp_path: Path) -> None:
    flwr = Path(sys.executable).with_name("flwr")
    if not flwr.exists():
        pytest.skip("flwr is not installed")
    if not (checkout / "clients" / "app.py").exists() or not (checkout / "server" / "app.py").exists():
        pytest.skip("the Flower apps do not exist yet")
    run(
        str(flwr),
        "build",
        "--app",
        str(checkout),
        cwd=tmp_path,
        FLWR_HOME=str(tmp_path / "flwr"),
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    )
    (bundle,) = tmp_path.rglob("*.fab")
    assert bundle.stat().st_size < 10 * 1024**2
    with zipfile.ZipFile(bundle) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert tops == {"fedlora", "clients", "server", "pyproject.toml", "LICENSE", ".info"}


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as Flower flattens them."""
    keys: dict[str, Any] = {}
    for name, value in table.items():
        keys |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return keys


def test_flower_config_is_the_default_run_config() -> None:
    declared = flat(PYPROJECT["tool"]["flwr"]["app"]["config"])
    assert declared == RunConfig().to_flower(), "write the defaults of config/sections.py into [tool.flwr.app.config]"
    assert RunConfig.from_flower(declared) == RunConfig()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    split = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in split}


PROJECT = PYPROJECT["project"]
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
]


@pytest.mark.parametrize("line", REQUIREMENTS)
def test_every_dependency_is_pinned_within_its_range(line: str) -> None:
    requirement = Requirement(line)
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_no_local_path_or_build_in_the_pins() -> None:
    assert not [version for version in pins().values() if not re.fullmatch(r"[\w.]+", version)]
