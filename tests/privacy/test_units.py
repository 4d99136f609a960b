"""A guarantee in words follows from the run's configuration in one way only, whatever goes wrong."""

from __future__ import annotations

import math

import pytest

from fedlora.config import RunConfig
from fedlora.privacy.units import Guarantee

REAL = ("privacy.mechanism=gredp", "privacy.gredp_noise=real", "privacy.allow_unsound=true")


def test_a_guarantee_is_the_configs_but_for_what_was_spent() -> None:
    config = RunConfig().with_overrides("privacy.epsilon=3", "privacy.delta=1e-6", "privacy.accountant=rdp")
    asked = Guarantee.from_config(config)
    assert asked == Guarantee(epsilon=3.0, delta=1e-6, accountant="rdp", unit="record", relation="add/remove")
    assert Guarantee.from_config(config, epsilon=2.5).epsilon == 2.5
    assert asked.flaws == ()


@pytest.mark.parametrize(
    ("overrides", "flaws"),
    [
        (("privacy.seeded_noise=true",), ("noise seeded, not private",)),
        (("privacy.epsilon=inf",), ("ε = ∞, run without noise",)),
        (REAL, ("ε = ∞, GReDP with real noise releases g_j − g_(n−j) as it is",)),
        ((*REAL, "privacy.epsilon=inf"), ("ε = ∞, run without noise",)),
        (
            ("privacy.seeded_noise=true", "privacy.epsilon=inf"),
            ("noise seeded, not private", "ε = ∞, run without noise"),
        ),
    ],
    ids=["seeded", "inf", "unsound", "unsound-inf", "seeded-inf"],
)
@pytest.mark.parametrize("spent", [None, 1.0])
def test_every_flaw_is_named_also_where_something_finite_is_said_to_be_spent(
    overrides: tuple[str, ...], flaws: tuple[str, ...], spent: float | None
) -> None:
    config = RunConfig().with_overrides(*overrides)
    guarantee = Guarantee.from_config(config, epsilon=math.inf if math.isinf(config.privacy.epsilon) else spent)
    assert guarantee.flaws == flaws
    assert str(guarantee) == f"no guarantee: {'; '.join(flaws)}"
    assert math.isinf(guarantee.epsilon) == ("∞" in str(guarantee))
