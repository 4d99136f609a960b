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


@pytest.mark.parametrize(
    ("noise", "whom", "seen"),
    [("server", "whoever is not the server, which is trusted", "no noise"), ("shared", "sees sums alone", "its part")],
)
def test_a_guarantee_of_clients_names_them_and_whom_it_does_not_hold_against(noise: str, whom: str, seen: str) -> None:
    settings = ("model.head=frozen", "privacy.unit=client", f"privacy.client_noise={noise}")
    guarantee = Guarantee.from_config(RunConfig().with_overrides(*settings, "federation.minimum_clients=3"))
    assert (guarantee.unit, guarantee.noise_by) == ("client", noise)
    assert str(guarantee).startswith("ε = 6 at δ = 1e-05 for the whole data of one client (add/remove), by PLD")
    assert whom in str(guarantee)
    assert f"anything against the server, which sees each client's move with {seen}" in guarantee.not_covered
    assert "record of one site" not in str(guarantee)


def test_a_guarantee_of_records_is_in_the_words_that_earlier_records_have() -> None:
    guarantee = Guarantee.from_config(RunConfig())
    assert str(guarantee) == "ε = 6 at δ = 1e-05 for one record of one site (add/remove), by PLD accounting"
    assert guarantee.from_whom == "against the server and every other site"
