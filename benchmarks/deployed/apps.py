"""Folders that `flwr run` sends: the code of one of Flower's contenders, and a pyproject.toml for it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

BENCHMARKS = Path(__file__).resolve().parents[1]


def make_app(folder: Path, package: str, settings: Mapping[str, Any]) -> Path:
    """An app of benchmarks/`package`.

    Args:
        folder: new; receives the app.
        package: has client_app.py and server_app.py.
        settings: every key of its run configuration, with a default.
    """
    code = folder / "benchmarks"
    shutil.copytree(BENCHMARKS / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    (code / "deployed").mkdir()
    for module in ("__init__.py", "deployed/__init__.py", "deployed/clock.py"):
        shutil.copy(BENCHMARKS / module, code / module)
    named = package.replace("_", "-")
    project = {
        "project": {"name": named, "version": "1.0.0", "description": named, "license": "Apache-2.0"},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedlora",
                    "components": {
                        "serverapp": f"benchmarks.{package}.server_app:app",
                        "clientapp": f"benchmarks.{package}.client_app:app",
                    },
                    "config": dict(settings),
                }
            }
        },
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps(project), encoding="utf-8")
    return folder
