"""What settings may not be together, and why: refused when a configuration is made, so before anything is loaded."""

from __future__ import annotations

from fedlora.config.sections import (
    AdapterConfig,
    DataConfig,
    FederationConfig,
    ModelConfig,
    PrivacyConfig,
    TrainingConfig,
)
from fedlora.errors import ConfigError
from fedlora.schema import shown

_MIX_RANKS = ("flora", "flexlora", "hetlora")
_READ_BY = {
    # which train A
    "rate_of_a": ("lora", "rolora", "la_lora", "fedex", "fedsa", "flora", "flexlora", "hetlora", "fed_sb_svd"),
    "rate_of_r": ("fed_sb_svd",),
    "svd_split": ("ffa_svd",),
    "svd_every": ("ffa_svd",),
    "subspace": ("fed_sb",),
}
"""Keys of [adapter] that only some methods look at."""
_OF_EACH = ("fedex", "flora", "flexlora")
"""Methods whose server looks at each client's own factors."""
_REMAKE = ("ffa_svd", "fed_sb_svd", *_OF_EACH)
"""Methods whose server makes other factors of the clients' products: a coordinate is not the same next round."""


def check_combinations(
    model: ModelConfig,
    adapter: AdapterConfig,
    data: DataConfig,
    federation: FederationConfig,
    training: TrainingConfig,
    privacy: PrivacyConfig,
) -> None:
    """Refuse what makes no sense together.

    Raises:
        ConfigError: with the reason and what to change.
    """
    _check_selection(adapter, federation, training)
    _check_method(model, adapter, federation, training)
    _check_aggregation(adapter, federation)
    if privacy.unit == "client":
        _check_client_unit(model, adapter, federation, training, privacy)
    else:
        _check_client_keys(privacy)
    _check_task(model, data, federation)
    if federation.minimum_clients > (asked := federation.cohort_size):
        raise ConfigError(
            f"federation.minimum_clients = {federation.minimum_clients}, but a round asks {asked} of "
            f"{federation.clients} clients; lower it, or raise federation.participation"
        )


def _check_task(model: ModelConfig, data: DataConfig, federation: FederationConfig) -> None:
    if data.task == "stsb" and model.head == "prototype":
        raise ConfigError(
            "model.head = prototype needs classes, but data.task = stsb is a regression; "
            "set model.head=trained or model.head=frozen"
        )
    if data.task == "stsb" and data.partition in ("dirichlet", "label_skew"):
        raise ConfigError(
            f"data.partition = {data.partition} divides by class, but data.task = stsb has none; set data.partition=iid"
        )
    if data.task == "stsb" and federation.private_evaluation:
        raise ConfigError(
            "federation.private_evaluation counts classes, but data.task = stsb has none; leave it off for this task"
        )
    if data.partition == "column" and not data.partition_column:
        raise ConfigError("data.partition = column needs data.partition_column; name the column that holds the client")


def _check_method(
    model: ModelConfig, adapter: AdapterConfig, federation: FederationConfig, training: TrainingConfig
) -> None:
    method = adapter.method
    if adapter.ranks and method not in _MIX_RANKS:
        raise ConfigError(
            f"adapter.ranks = {shown(adapter.ranks)}, but adapter.method = {method} averages factors of one rank; "
            f"leave it empty, or use {', '.join(_MIX_RANKS)}"
        )
    if len(adapter.client_ranks) > federation.clients:
        raise ConfigError(
            f"adapter.ranks = {shown(adapter.ranks)} names {len(adapter.client_ranks)} ranks for "
            f"federation.clients = {federation.clients}; leave some out"
        )
    if adapter.ranks and (largest := max(adapter.client_ranks)) < adapter.rank:
        raise ConfigError(
            f"adapter.ranks = {shown(adapter.ranks)}, but no client has adapter.rank = {adapter.rank}, which the "
            f"server keeps and the scale divides by; set adapter.rank={largest}"
        )
    untouched = AdapterConfig()
    for key, readers in _READ_BY.items():
        if (value := getattr(adapter, key)) != getattr(untouched, key) and method not in readers:
            raise ConfigError(
                f"adapter.{key} = {shown(value)}, but adapter.method = {method} does not look at it; leave it out, or "
                f"use {', '.join(readers)}"
            )
    if method != "ffa" and adapter.select != "none":
        raise ConfigError(
            f"adapter.select = {adapter.select} scores modules by what is trained under one frozen A, and "
            f"adapter.method = {method} trains something else; set adapter.method=ffa, or adapter.select=none"
        )
    if adapter.wants_exact_base and model.dtype == "bfloat16":
        use = "makes its outer factors of" if method == "fed_sb" else "adds what was learnt to"
        raise ConfigError(
            f"adapter.method = {method} {use} the base model's weights, which model.dtype = bfloat16 rounds to three "
            "digits; set model.dtype=float32"
        )
    if method in _REMAKE and training.keep_state:
        raise ConfigError(
            f"training.keep_state = true, but under adapter.method = {method} a coordinate of the adapter means "
            "something else in the next round; set training.keep_state=false"
        )
    if method == "la_lora" and federation.local_steps < 2:
        raise ConfigError(
            "adapter.method = la_lora trains B and A in turn within a round, and federation.local_steps = 1 leaves "
            "none for A; set it to at least 2, or use adapter.method=rolora"
        )
    if method == "fed_sb_svd" and federation.rounds < 3:
        raise ConfigError(
            "adapter.method = fed_sb_svd looks for its outer factors in two rounds, and federation.rounds = "
            f"{federation.rounds} leaves none for R; set it to at least 3, or use adapter.method=fed_sb"
        )


def _check_aggregation(adapter: AdapterConfig, federation: FederationConfig) -> None:
    method, aggregator = adapter.method, federation.aggregator
    if aggregator != "mean" and method in _OF_EACH:
        raise ConfigError(
            f"federation.aggregator = {aggregator} drops or changes single clients' factors, but adapter.method = "
            f"{method} makes its model of the mean of all their products; set federation.aggregator=mean"
        )
    if aggregator != "mean" and adapter.ranks:
        raise ConfigError(
            f"federation.aggregator = {aggregator} compares clients coordinate by coordinate, but adapter.ranks gives "
            "them different ones; leave adapter.ranks empty, or set federation.aggregator=mean"
        )
    if aggregator != "mean" and federation.weights != "uniform":
        raise ConfigError(
            f"federation.weights = {federation.weights} would let who claims many records outvote the rest under "
            f"federation.aggregator = {aggregator}; set federation.weights=uniform"
        )
    if federation.attackers != "auto" and aggregator not in ("trimmed_mean", "multi_krum"):
        raise ConfigError(
            f"federation.attackers = {federation.attackers}, but federation.aggregator = {aggregator} counts none; "
            "leave it out, or use trimmed_mean or multi_krum"
        )
    if federation.norm_bound != "auto" and aggregator != "norm_bound":
        raise ConfigError(
            f"federation.norm_bound = {federation.norm_bound:g}, but federation.aggregator = {aggregator}; "
            "set federation.aggregator=norm_bound"
        )
    attackers, asked = federation.assumed_attackers, federation.cohort_size
    if aggregator == "median" and asked < 3:
        raise ConfigError(
            f"federation.aggregator = median of {asked} clients is their mean and withstands nobody; "
            "ask at least 3, or set federation.aggregator=mean"
        )
    least = {"trimmed_mean": 2 * attackers + 1, "multi_krum": 2 * attackers + 3}.get(aggregator, 0)
    if asked < least:
        raise ConfigError(
            f"federation.aggregator = {aggregator} is to withstand {attackers} among at least {least} clients, "
            f"and a round asks {asked}; lower federation.attackers, or ask more clients"
        )
    if federation.server_learning_rate != "auto" and federation.server_optimizer == "none":
        raise ConfigError(
            f"federation.server_learning_rate = {federation.server_learning_rate:g}, but federation.server_optimizer = "
            "none takes the aggregated move as it is; leave it out, or use momentum, adam or yogi"
        )
    if federation.server_momentum != FederationConfig().server_momentum and federation.server_optimizer == "none":
        raise ConfigError(
            f"federation.server_momentum = {federation.server_momentum:g}, but federation.server_optimizer = none "
            "remembers no move; leave it out, or use momentum, adam or yogi"
        )
    if federation.server_optimizer != "none" and method in _REMAKE:
        raise ConfigError(
            f"federation.server_optimizer = {federation.server_optimizer} remembers moves by coordinate, but under "
            f"adapter.method = {method} a coordinate means something else in the next round; set it to none"
        )


_LEAST_MOVE, _LONGEST_MOVE = 1e-6, 1e6
"""Between them noise and its grid are ordinary float32 numbers."""


def _check_client_keys(privacy: PrivacyConfig) -> None:
    """Whoever sets them thinks that clients are protected."""
    untouched = PrivacyConfig()
    for key in ("client_noise", "client_clip_norm"):
        if (value := getattr(privacy, key)) != getattr(untouched, key):
            raise ConfigError(
                f"privacy.{key} = {shown(value)}, but privacy.unit = record protects single records and does not look "
                "at it; set privacy.unit=client, or leave it out"
            )


def _check_client_unit(
    model: ModelConfig,
    adapter: AdapterConfig,
    federation: FederationConfig,
    training: TrainingConfig,
    privacy: PrivacyConfig,
) -> None:
    """What would break the sensitivity of a client's part in the sum, or release something beside it."""
    unsuitable = {
        "federation.weights": (federation.weights, "uniform", "a client's share in the sum must not depend on others"),
        "federation.aggregator": (federation.aggregator, "mean", "noise is calibrated for a sum of clipped moves"),
        "privacy.mechanism": (privacy.mechanism, "gaussian", "noise is added to the moves' sum, not to gradients"),
        "adapter.select": (adapter.select, "none", "a search releases sums over records"),
        "adapter.ranks": (adapter.ranks, "", "clients of one rank have one clip bound"),
        "training.noise_filter": (training.noise_filter, "none", "gradients have no noise to filter"),
    }
    for key, (value, wanted, reason) in unsuitable.items():
        if value != wanted:
            raise ConfigError(
                f"{key} = {shown(value)} with privacy.unit = client: {reason}; set {key}={wanted or shown(wanted)}"
            )
    if adapter.method in _OF_EACH:
        raise ConfigError(
            f"adapter.method = {adapter.method} makes its model of each client's own factors, which under privacy.unit "
            "= client nobody may see but as a noised mean; use ffa, ffa_svd, rolora, lora, fed_sb or fed_sb_svd"
        )
    if adapter.method == "fedsa":
        raise ConfigError(
            "adapter.method = fedsa leaves B at each client, trained without noise under privacy.unit = client, and "
            "whatever is made of it later would tell of the client; "
            "use ffa, ffa_svd, rolora, lora, fed_sb or fed_sb_svd"
        )
    if not _LEAST_MOVE <= privacy.client_clip_norm <= _LONGEST_MOVE:
        raise ConfigError(
            f"privacy.client_clip_norm = {privacy.client_clip_norm:g}, wanted from {_LEAST_MOVE:g} to "
            f"{_LONGEST_MOVE:g}; set it to about the length of a client's move in a round"
        )
    if model.head == "prototype":
        raise ConfigError(
            "model.head = prototype releases class means noised for one record, and privacy.unit = client protects a "
            "client's whole data; set model.head=trained or model.head=frozen"
        )
    if privacy.low_pass < 1:
        raise ConfigError(
            f"privacy.low_pass = {privacy.low_pass:g} projects records' gradients, and privacy.unit = client adds no "
            "noise to those; set privacy.low_pass=1"
        )
    if federation.private_evaluation:
        raise ConfigError(
            "federation.private_evaluation counts single records, and privacy.unit = client protects a client's whole "
            "data; set it to false"
        )
    if privacy.client_noise == "shared" and federation.cohort_size < 2:
        raise ConfigError(
            "privacy.client_noise = shared hides each client's move in the noise of the others, and a round asks one "
            "client; raise federation.clients or federation.participation, or set privacy.client_noise=server"
        )
    if privacy.client_noise == "shared" and federation.minimum_clients < federation.cohort_size:
        raise ConfigError(
            "privacy.client_noise = shared: the clients' parts are enough noise only together, but "
            f"federation.minimum_clients = {federation.minimum_clients} lets a round go on with fewer than the "
            f"{federation.cohort_size} asked; set it to {federation.cohort_size}"
        )
    if privacy.client_noise == "shared" and federation.wire_dtype != "float32":
        raise ConfigError(
            f"federation.wire_dtype = {federation.wire_dtype} rounds every client's part by itself, and under "
            "privacy.client_noise = shared only their exact sum has the noise that is charged; "
            "set federation.wire_dtype=float32, or privacy.client_noise=server"
        )


_LEAST_WARMUP = {
    "alignment": (1, "scores the directions that warm-up rounds have released"),
    "warmup": (2, "compares the updates of different rounds"),
    "bilevel": (1, "learns nothing at B = 0, where the gradient of every gate is exactly zero"),
}


def _check_selection(adapter: AdapterConfig, federation: FederationConfig, training: TrainingConfig) -> None:
    rounds = federation.rounds
    least, why = _LEAST_WARMUP.get(adapter.select, (0, ""))
    if adapter.warmup_rounds < least:
        raise ConfigError(
            f"adapter.select = {adapter.select} {why}, but adapter.warmup_rounds = {adapter.warmup_rounds}; "
            f"set it to at least {least}"
        )
    searched = adapter.planned_warmup_rounds + adapter.planned_search_rounds
    if searched >= rounds:
        raise ConfigError(
            f"the search takes {searched} of federation.rounds = {rounds}, which leaves none for fine-tuning; "
            f"set federation.rounds above {searched}, or lower adapter.warmup_rounds"
        )
    if adapter.discretise == "cost_aware" and adapter.select != "none":
        if adapter.select not in ("alignment", "warmup"):
            raise ConfigError(
                f"adapter.discretise = cost_aware weighs signal against noise, which adapter.select = {adapter.select} "
                "does not measure; use select = alignment or warmup, or discretise = global_topk"
            )
        if adapter.warmup_rounds < 2:
            raise ConfigError(
                "adapter.discretise = cost_aware compares the updates of different rounds, but adapter.warmup_rounds = "
                f"{adapter.warmup_rounds}; set it to at least 2"
            )
    if training.keep_state and (adapter.select == "warmup" or (least and adapter.discretise == "cost_aware")):
        raise ConfigError(
            "training.keep_state = true carries the noise of one round's updates into the next, but adapter.select = "
            f"{adapter.select} with adapter.discretise = {adapter.discretise} compares updates whose noise is "
            "independent; set training.keep_state=false, or choose in another way"
        )
    if (adapter.select == "mask") != bool(adapter.mask):
        raise ConfigError(
            f"adapter.select = {adapter.select} with adapter.mask = {shown(adapter.mask)}: a given choice needs both "
            "select = mask and the file; set both or neither"
        )
    if adapter.probe_texts and adapter.select != "probe":
        raise ConfigError(
            f"adapter.probe_texts is given, but adapter.select = {adapter.select} does not read it; leave it out"
        )
