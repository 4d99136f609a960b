from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

mpl.use("Agg")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they were when they were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def watched(self: Figure, *arguments: Any, **how: Any) -> None:
        figures.append(self)
        save(self, *arguments, **how)

    monkeypatch.setattr(Figure, "savefig", watched)
    return figures
