"""privacy.unit = client: what would release something beside the noised mean, or move it by more than C, is refused."""

from __future__ import annotations

import pytest

from fedlora.config import RunConfig
from fedlora.errors import ConfigError

CLIENT = ("privacy.unit=client", "model.head=frozen")
SHARED = (*CLIENT, "privacy.client_noise=shared", "federation.minimum_clients=3")


@pytest.mark.parametrize("method", ["ffa", "ffa_svd", "rolora", "la_lora", "lora", "hetlora", "fed_sb"])
def test_methods_whose_server_needs_no_more_than_a_mean_can_protect_clients(method: str) -> None:
    for settings in (CLIENT, SHARED):
        config = RunConfig().with_overrides(*settings, f"adapter.method={method}")
        assert config.private
        assert config.digest() != RunConfig().with_overrides("model.head=frozen", f"adapter.method={method}").digest()


REFUSED = {
    "weights": ("federation.weights=public_size",),
    "aggregator": ("federation.aggregator=median",),
    "mechanism": ("privacy.mechanism=gredp",),
    "search": ("adapter.select=alignment",),
    "ranks": ("adapter.method=hetlora", "adapter.ranks='8, 4'"),
    "filter": ("training.noise_filter=doppler",),
    "low-pass": ("privacy.low_pass=0.5",),
    "evaluation": ("federation.private_evaluation=true",),
    "prototypes": ("model.head=prototype",),
    "fedex": ("adapter.method=fedex",),
    "flora": ("adapter.method=flora",),
    "flexlora": ("adapter.method=flexlora",),
    "fedsa": ("adapter.method=fedsa",),
    "no length": ("privacy.client_clip_norm=1e-7",),
    "any length": ("privacy.client_clip_norm=1e7",),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("settings", [CLIENT, SHARED], ids=["server", "shared"])
def test_what_would_break_a_clients_bound_is_refused_with_what_to_do(case: str, settings: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"\bunit = client|client_clip_norm") as refused:
        RunConfig().with_overrides(*settings, *REFUSED[case])
    message = str(refused.value)
    assert "\n" not in message
    assert any(word in message for word in ("set ", "use ")), message


def test_shared_noise_needs_everybody_and_exact_sums() -> None:
    with pytest.raises(ConfigError, match=r"minimum_clients = 2 lets a round go on with fewer .* set it to 3"):
        RunConfig().with_overrides(*SHARED, "federation.minimum_clients=2")
    for rounded in ("bfloat16", "int8"):
        with pytest.raises(ConfigError, match=rf"wire_dtype = {rounded} rounds every client's part by itself"):
            RunConfig().with_overrides(*SHARED, f"federation.wire_dtype={rounded}")
        RunConfig().with_overrides(*CLIENT, f"federation.wire_dtype={rounded}")


@pytest.mark.parametrize("how", ["federation.clients=1", "federation.participation=0.1"])
def test_shared_noise_needs_others(how: str) -> None:
    with pytest.raises(ConfigError, match=r"a round asks one client; .* set privacy\.client_noise=server"):
        RunConfig().with_overrides(*SHARED, how)


@pytest.mark.parametrize("setting", ["privacy.client_noise=shared", "privacy.client_clip_norm=0.5"])
def test_settings_of_protected_clients_are_refused_where_records_are_protected(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.unit = record protects single records .* set privacy.unit=client"):
        RunConfig().with_overrides(setting)
