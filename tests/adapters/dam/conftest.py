from __future__ import annotations

import pytest

from fedlora.adapters.dam import Candidate

HIDDEN = 4
KINDS = {"query": 4, "key": 4, "value": 4, "output": 4, "up": 16, "down": 4}


@pytest.fixture
def candidates() -> tuple[Candidate, ...]:
    """Two layers of six; as in real models, the way up has four times the B parameters of the others."""
    return tuple(
        Candidate(
            module=f"encoder.layer.{layer}.{kind}",
            layer=layer,
            kind=kind,
            in_features=4 * HIDDEN if kind == "down" else HIDDEN,
            out_features=out_features,
        )
        for layer in range(2)
        for kind, out_features in KINDS.items()
    )
