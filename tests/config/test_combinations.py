"""What makes no sense together is refused with its reason, and what comes nearest to it is taken."""

from __future__ import annotations

import pytest

from fedlora.config import RunConfig
from fedlora.errors import ConfigError

REFUSALS = {  # by case: settings, the reason in the message, and what more of settings makes them acceptable
    "alignment unwarmed": (
        "adapter.select=alignment adapter.warmup_rounds=0",
        "scores the directions",
        "adapter.warmup_rounds=1",
    ),
    "one warm-up": (
        "adapter.select=warmup adapter.warmup_rounds=1",
        "compares the updates of",
        "adapter.warmup_rounds=2",
    ),
    "bilevel unwarmed": (
        "adapter.select=bilevel adapter.warmup_rounds=0",
        "learns nothing at B = 0",
        "adapter.warmup_rounds=1",
    ),
    "only a search": (
        "adapter.select=bilevel federation.rounds=4",
        "leaves none for fine-tuning",
        "federation.rounds=5",
    ),
    "no noise measured": (
        "adapter.select=probe adapter.discretise=cost_aware",
        "does not measure",
        "adapter.discretise=global_topk",
    ),
    "noise of one round": (
        "adapter.select=alignment adapter.discretise=cost_aware adapter.warmup_rounds=1",
        "cost_aware compares the updates of different rounds",
        "adapter.warmup_rounds=2",
    ),
    "noise carried on": (
        "adapter.select=warmup training.keep_state=true",
        "carries the noise of",
        "adapter.select=alignment",
    ),
    "no file": ("adapter.select=mask", "needs both", "adapter.mask=a.json"),
    "unread file": ("adapter.mask=a.json", "needs both", "adapter.select=mask"),
    "unread texts": ("adapter.probe_texts=a.txt", "does not read it", "adapter.select=probe"),
    "ranks of one rank": (
        "adapter.ranks='8,4'",
        "averages factors of one rank",
        "adapter.method=flora model.dtype=float32",
    ),
    "ranks of nobody": ("adapter.method=hetlora adapter.ranks='8,4,2,1'", "names 4 ranks for", "federation.clients=4"),
    "rank beyond": ("adapter.method=hetlora adapter.ranks='9,4'", "from 1 to adapter.rank = 8", "adapter.rank=9"),
    "rank of nobody": ("adapter.method=hetlora adapter.ranks='4,2'", "no client has", "adapter.rank=4"),
    "A is frozen": ("adapter.rate_of_a=2", "does not look at it", "adapter.method=rolora"),
    "R alone": ("adapter.method=fed_sb adapter.rate_of_a=2", "does not look at it", "adapter.rate_of_a=1"),
    "R without B": ("adapter.method=fed_sb adapter.rate_of_r=2", "use fed_sb_svd", "adapter.rate_of_r=1"),
    "no round for R": (
        "adapter.method=fed_sb_svd federation.rounds=2",
        "leaves none for R",
        "federation.rounds=3",
    ),
    "divides nothing": ("adapter.svd_every=2", "use ffa_svd", "adapter.method=ffa_svd"),
    "splits nothing": ("adapter.svd_split=balanced adapter.method=lora", "use ffa_svd", "adapter.method=ffa_svd"),
    "trains no R": ("adapter.subspace=weights", "use fed_sb", "adapter.method=fed_sb model.dtype=float32"),
    "memory of nothing": ("federation.server_momentum=0.5", "remembers no move", "federation.server_optimizer=yogi"),
    "search of A": ("adapter.method=lora adapter.select=probe", "under one frozen A", "adapter.method=ffa"),
    "rounded base": ("adapter.method=fedex model.dtype=bfloat16", "adds what was learnt to", "model.dtype=float32"),
    "rounded factors": (
        "adapter.method=fed_sb adapter.subspace=weights model.dtype=bfloat16",
        "makes its outer factors of",
        "adapter.subspace=random",
    ),
    "state of another basis": (
        "adapter.method=ffa_svd training.keep_state=true",
        "means something else",
        "adapter.method=rolora",
    ),
    "no step for A": (
        "adapter.method=la_lora federation.local_steps=1",
        "leaves none for A",
        "federation.local_steps=2",
    ),
    "inexact": (
        "adapter.method=flexlora federation.aggregator=median",
        "of the mean of all their products",
        "adapter.method=hetlora",
    ),
    "unlike coordinates": (
        "adapter.method=hetlora adapter.ranks='8,4' federation.aggregator=norm_bound",
        "compares clients coordinate by coordinate",
        "adapter.ranks=''",
    ),
    "heads and records": (
        "federation.weights=public_size federation.aggregator=norm_bound",
        "outvote",
        "federation.aggregator=mean",
    ),
    "uncounted": ("federation.attackers=1", "counts none", "federation.aggregator=trimmed_mean"),
    "no bound": ("federation.norm_bound=0.1", "but federation.aggregator = mean", "federation.aggregator=norm_bound"),
    "half are hostile": (
        "federation.aggregator=trimmed_mean federation.attackers=2 federation.clients=4",
        "withstand 2 among at least 5 clients, and a round asks 4",
        "federation.clients=5",
    ),
    "too few for Krum": (
        "federation.aggregator=multi_krum federation.clients=10 federation.participation=0.4",
        "withstand 1 among at least 5 clients, and a round asks 4",
        "federation.participation=0.5",
    ),
    "median of two": ("federation.aggregator=median federation.clients=2", "withstands nobody", "federation.clients=3"),
    "rate of nothing": ("federation.server_learning_rate=0.1", "as it is", "federation.server_optimizer=yogi"),
    "memory of another basis": (
        "adapter.method=ffa_svd federation.server_optimizer=adam",
        "remembers moves by coordinate",
        "adapter.method=la_lora",
    ),
    "classes of scores": ("data.task=stsb", "needs classes", "model.head=trained"),
    "parts by class": (
        "data.task=stsb model.head=frozen data.partition=label_skew",
        "divides by class",
        "data.partition=iid",
    ),
    "counts of scores": (
        "data.task=stsb model.head=frozen federation.private_evaluation=true",
        "counts classes",
        "federation.private_evaluation=false",
    ),
    "no column": ("data.partition=column", "needs data.partition_column", "data.partition_column=site"),
    "more than are asked": (
        "federation.clients=10 federation.participation=0.25 federation.minimum_clients=3",
        "but a round asks 2 of 10 clients",
        "federation.participation=0.3",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_makes_no_sense_is_refused_and_what_is_nearest_to_it_taken(case: str) -> None:
    settings, reason, remedy = REFUSALS[case]
    with pytest.raises(ConfigError) as refused:
        RunConfig().with_overrides(*settings.split())
    assert reason in (message := str(refused.value))
    assert "\n" not in message
    RunConfig().with_overrides(*settings.split(), *remedy.split())


@pytest.mark.parametrize("rule", ["momentum", "adam", "yogi"])
def test_a_servers_rule_that_would_never_forget_is_refused(rule: str) -> None:
    chosen = RunConfig().with_overrides(f"federation.server_optimizer={rule}", "federation.server_momentum=0.9999")
    with pytest.raises(ConfigError, match=r"federation\.server_momentum = 1\.0, wanted"):
        chosen.with_overrides("federation.server_momentum=1")


@pytest.mark.parametrize(("rule", "rate"), [("none", 1.0), ("momentum", 1.0), ("adam", 0.01), ("yogi", 0.01)])
def test_the_servers_rate_suits_its_rule_unless_it_is_given(rule: str, rate: float) -> None:
    chosen = RunConfig().with_overrides(f"federation.server_optimizer={rule}")
    assert chosen.federation.server_rate == rate
    if rule != "none":
        assert chosen.with_overrides("federation.server_learning_rate=0.3").federation.server_rate == 0.3


CLIENT = ("privacy.unit=client", "model.head=frozen")
SHARED = (*CLIENT, "privacy.client_noise=shared", "federation.minimum_clients=3")


@pytest.mark.parametrize("method", ["ffa", "ffa_svd", "rolora", "la_lora", "lora", "hetlora", "fed_sb", "fed_sb_svd"])
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
