"""Sections of a run's configuration: every key with its type, default, range and meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedlora.errors import ConfigError
from fedlora.schema import Section, setting, shown

Method = Literal[
    "ffa",
    "lora",
    "rolora",
    "la_lora",
    "ffa_svd",
    "fed_sb",
    "fed_sb_svd",
    "fedex",
    "fedsa",
    "flora",
    "flexlora",
    "hetlora",
]
Task = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section, section="model"):
    name: str = setting(
        "sentence-transformers/all-MiniLM-L6-v2",
        "local folder, installed weights package or hub id, looked up in that order",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of the frozen base; private arithmetic is always float32"
    )
    attention: Literal["auto", "eager", "sdpa"] = setting("auto", "attention kernel; auto measures")
    head: Literal["prototype", "frozen", "trained"] = setting(
        "prototype", "noisy class means | random from the public seed | part of the clipped vector"
    )
    pooling: Literal["auto", "cls", "mean", "last"] = setting(
        "auto", "auto: the model's own head for frozen and trained, the model card's pooling for prototype"
    )
    temperature: float = setting(10.0, "scale of the prototype head's logits", above=0, at_most=500)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Section, section="adapter"):
    method: Method = setting("ffa", "which factors of B A train, which are sent and what the server makes of them")
    rank: int = setting(8, "inner dimension r of B A", at_least=1)
    ranks: str = setting(
        "", 'of the clients, over and over in this order, for flora, flexlora and hetlora: "8, 4"; empty: all have rank'
    )
    rate_of_a: float = setting(1.0, "learning rate of A over that of B, where a method trains A", above=0)
    rate_of_r: float = setting(1.0, "learning rate of R over that of B, where a method trains both", above=0)
    svd_split: Literal["orthonormal", "balanced"] = setting(
        "orthonormal", "of ffa_svd: singular values go to B | their roots to both factors"
    )
    svd_every: int = setting(1, "rounds of ffa_svd between two divisions of B A", at_least=1)
    subspace: Literal["random", "weights"] = setting(
        "random", "fixed outer factors of fed_sb: random orthonormal | leading singular vectors of the frozen weight"
    )
    alpha: float = setting(8.0, "the adapter's output is scaled by alpha / rank", above=0)
    target_modules: tuple[str, ...] = setting(
        ("auto",),
        "module types (query, key, value, attention_output, up, down, gate), name endings, or all: every linear of a "
        "block; auto: query and value, or all where modules are selected",
    )
    select: Literal["none", "all", "random", "probe", "alignment", "warmup", "bilevel", "mask"] = setting(
        "none", "how modules are chosen among the targets: DiffoRA's search by several scores, and its controls"
    )
    ratio: float = setting(0.5, "share of the targets that is chosen", above=0, at_most=1)
    discretise: Literal["per_layer_topk", "global_topk", "cost_aware"] = setting(
        "per_layer_topk", "from scores to a choice: best of each layer | best of all | energy against noise, own ratio"
    )
    sharing: Literal["none", "type"] = setting("none", "type: modules not chosen share one adapter with their type")
    warm_start: bool = setting(True, "chosen modules keep the B of the search; false: they start at zero")
    warmup_rounds: int = setting(
        2, "of federation.rounds, on all targets, before alignment, warmup or bilevel choose", at_least=0
    )
    alignment_records: int = setting(
        2048,
        "expected number of a client's records that alignment scores modules on; all if there are fewer",
        at_least=1,
        at_most=50_000,
    )
    search_rounds: int = setting(2, "of federation.rounds, of select = bilevel: weights and gates in turn", at_least=1)
    gate_learning_rate: float = setting(1.0, "of the gates of select = bilevel", above=0)
    mask: str = setting("", "file with the choice itself, for select = mask: a selection.json, or a list of modules")
    probe_texts: str = setting("", "file of public texts by line for select = probe; empty: generated ones")

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates of factors, over that of B and of everything else."""
        return {"A": self.rate_of_a, "R": self.rate_of_r}

    @property
    def planned_warmup_rounds(self) -> int:
        """Rounds that train all candidates before modules are chosen."""
        return self.warmup_rounds if self.select in ("alignment", "warmup", "bilevel") else 0

    @property
    def planned_search_rounds(self) -> int:
        """Rounds that train weights and gates in turn."""
        return self.search_rounds if self.select == "bilevel" else 0

    @property
    def wants_exact_base(self) -> bool:
        """Whether the base is to be float32: it is added to, or factors that all agree on are made of it."""
        return self.method in ("fedex", "flora") or (self.method == "fed_sb" and self.subspace == "weights")

    @property
    def client_ranks(self) -> tuple[int, ...]:
        """`ranks` as numbers, `rank` alone where there are none.

        Raises:
            ConfigError: they are something else.
        """
        parts = [part.strip() for part in self.ranks.split(",")] if self.ranks.strip() else [str(self.rank)]
        if not all(part.isdecimal() and 1 <= int(part) <= self.rank for part in parts):
            raise ConfigError(
                f"adapter.ranks = {shown(self.ranks)}, wanted whole numbers from 1 to adapter.rank = {self.rank} with "
                'commas between them, such as "8, 4, 2"'
            )
        return tuple(int(part) for part in parts)

    def rank_of(self, client: int) -> int:
        """Of the adapters that `client` trains."""
        return self.client_ranks[client % len(self.client_ranks)]

    @property
    def targets(self) -> tuple[str, ...]:
        """`target_modules` with auto spelled out."""
        spelled_out = ("query", "value") if self.select == "none" else ("all",)
        return tuple(
            dict.fromkeys(
                word for entry in self.target_modules for word in (spelled_out if entry == "auto" else (entry,))
            )
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section, section="data"):
    task: Task = setting("sst2", "GLUE task: its columns, labels and official metric")
    source: str = setting("generated", '"hub", "generated", or a folder with one sub-folder per task')
    generated_records: int = setting(6000, "training records of the generated corpus", at_least=8)
    partition: Literal["iid", "dirichlet", "label_skew", "column"] = setting("iid", "how clients share the records")
    dirichlet_alpha: float = setting(0.5, "concentration of the dirichlet partition", above=0)
    label_skew: str = setting("severe", 'a preset, or rows by client of shares by label: "0.9,0.1; 0.1,0.9; 0.5,0.5"')
    partition_column: str = setting("", "column whose values name the client, for partition = column")
    max_length: int = setting(128, "tokens; longer inputs are cut", at_least=4)
    train_share: float = setting(
        1.0, "share of the training records that a simulation uses, for short experiments", above=0, at_most=1
    )
    validation_part: Literal["all", "tuning", "reporting"] = setting(
        "all", "of the public validation records: all | the half to choose settings on | the half to report after that"
    )
    heldout_share: float = setting(
        0.1, "of a client's records, kept from training; only with federation.private_evaluation", above=0, at_most=0.9
    )


@dataclass(frozen=True, kw_only=True)
class FederationConfig(Section, section="federation"):
    clients: int = setting(3, "number of clients", at_least=1)
    rounds: int = setting(10, "rounds of training, those of a search among them", at_least=1)
    local_steps: int = setting(10, "private steps of a client in a round", at_least=1)
    participation: float = setting(1.0, "share of clients asked in a round", above=0, at_most=1)
    weights: Literal["uniform", "public_size"] = setting(
        "uniform", "of the clients in the mean: equal | by the number of records that each tells"
    )
    aggregator: Literal["mean", "median", "trimmed_mean", "multi_krum", "norm_bound"] = setting(
        "mean", "of the clients' moves: mean | by coordinate | of the closest to one another | each cut to a length"
    )
    attackers: int | Literal["auto"] = setting(
        "auto",
        "clients that trimmed_mean and multi_krum withstand; auto: a fifth of those asked, at least one",
        at_least=0,
    )
    norm_bound: float | Literal["auto"] = setting(
        "auto", "longest move of a client under norm_bound; auto: that of the median client", above=0
    )
    server_optimizer: Literal["none", "momentum", "adam", "yogi"] = setting(
        "none", "what the server does with the aggregated move; none: takes it"
    )
    server_learning_rate: float | Literal["auto"] = setting(
        "auto",
        "of server_optimizer; auto: 1 for momentum, 0.01 for adam and yogi, whose steps are about that long",
        above=0,
    )
    server_momentum: float = setting(0.9, "of server_optimizer, below 1", at_least=0, at_most=0.9999)
    wire_dtype: Literal["float32", "bfloat16", "int8"] = setting(
        "float32", "of a client's noised move on its way to the server; rounded by chance, so without bias"
    )
    minimum_clients: int = setting(
        1, "a round that fewer answer usably ends the run, which can be gone on with", at_least=1
    )
    join_deadline: float = setting(
        600.0, "seconds until a run over a network begins with those who are there, if they are enough", above=0
    )
    round_deadline: float = setting(3600.0, "seconds until a round goes on without who has not answered", above=0)
    rejoin_deadline: float = setting(
        60.0, "seconds that rounds wait for a client that has gone away, its node or its site's daemon", at_least=0
    )
    private_evaluation: bool = setting(
        False, "after the last round each client releases a noised confusion matrix of its held-out records"
    )

    @property
    def cohort_size(self) -> int:
        """How many clients are asked in a round of training."""
        return max(1, round(self.participation * self.clients))

    @property
    def server_rate(self) -> float:
        """`server_learning_rate` with auto spelled out."""
        if self.server_learning_rate != "auto":
            return self.server_learning_rate
        return 1.0 if self.server_optimizer in ("none", "momentum") else 0.01

    @property
    def assumed_attackers(self) -> int:
        """`attackers` with auto spelled out."""
        return max(1, self.cohort_size // 5) if self.attackers == "auto" else self.attackers


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section, section="training"):
    optimizer: Literal["sgd", "momentum", "adam", "adamw"] = setting("sgd", "local optimiser")
    learning_rate: float = setting(8.0, "of the local optimiser", above=0)
    schedule: Literal["constant", "linear"] = setting(
        "linear", "of the learning rate over rounds; linear falls to zero after the last"
    )
    noise_filter: Literal["none", "doppler", "disk", "james_stein", "binomial"] = setting(
        "none", "post-processing of each noised gradient: low-pass over steps | Kalman | shrinkage | smoothing by slot"
    )
    filter_gain: float = setting(0.5, "share of the new gradient in what doppler and disk keep", above=0, at_most=1)
    momentum: float = setting(0.9, "of optimizer = momentum", at_least=0, at_most=1)
    weight_decay: float = setting(0.0, "of adamw (decoupled) and of the others (added to the gradient)", at_least=0)
    expected_batch_size: int = setting(128, "mean of the Poisson batch size, the public divisor", at_least=1)
    keep_state: bool = setting(False, "keep optimiser state at the client between rounds")


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig(Section, section="privacy"):
    unit: Literal["record", "client"] = setting(
        "record",
        "what is protected, add/remove: a record of a site, from everyone | a site's whole data, by the server",
    )
    client_clip_norm: float = setting(1.0, "L2 bound of a client's whole move in a round, for unit = client", above=0)
    client_noise: Literal["server", "shared"] = setting(
        "server", "of unit = client: added once by the server, which is trusted | a part of it by each client"
    )
    epsilon: float = setting(6.0, "target for the whole run, per site; inf is an explicit non-private run", above=0)
    delta: float = setting(1e-5, "must be below 1/n of every site", above=0, at_most=0.5)
    clipping: Literal["flat", "automatic"] = setting("flat", "flat: min(1, C/|g|) | automatic: C/(|g| + 0.01)")
    clip_norm: float = setting(1.0, "L2 bound C of one record's gradient over all trained slots", at_least=1e-6)
    mechanism: Literal["gaussian", "gredp"] = setting("gaussian", "noise on the clipped sum, or on its spectrum")
    gredp_noise: Literal["complex", "complex_half", "real"] = setting(
        "complex", "noise on a coefficient: both parts | both at half the variance | the real part only (unsound)"
    )
    gredp_over: Literal["slot", "flat"] = setting("slot", "what GReDP transforms: each slot, or the whole vector")
    low_pass: float = setting(
        1.0,
        "share of each slot's frequencies that a record's gradient keeps before clipping; 1: all",
        above=0,
        at_most=1,
    )
    accountant: Literal["pld", "rdp"] = setting("pld", "pld is tight; rdp is a fast upper bound")
    prototype_noise_multiplier: float = setting(20.0, "noise of the one prototype release", above=0, at_most=1e6)
    evaluation_noise_multiplier: float = setting(
        10.0, "noise of the one release of evaluation counts", above=0, at_most=1e6
    )
    alignment_noise_multiplier: float = setting(20.0, "noise of the one release of module scores", above=0, at_most=1e6)
    allow_unsound: bool = setting(False, "run gredp_noise = real, which protects nothing; its ε is given as ∞")
    seeded_noise: bool = setting(False, "reproducible research only: noise and batches from run.seed, NOT private")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Section, section="engine"):
    backend: Literal["expanded", "opacus"] = setting("expanded", "source of per-sample gradients")
    token_budget: int | Literal["auto"] = setting("auto", "padded tokens in one micro-batch", at_least=1)
    matmul_precision: Literal["auto", "highest", "high", "medium"] = setting(
        "auto", "of float32 products in the base, as in torch.set_float32_matmul_precision"
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto", "torch.compile: where a run is long enough | always | never"
    )
    prefix_cache: Literal["auto", "off"] = setting(
        "auto", "what blocks below the lowest adapted one make of a record: kept where it pays | made at every step"
    )
    noise: Literal["host", "device"] = setting(
        "host", "generator of the noise: ChaCha20 on the CPU | the device's own counter generator under a secret key"
    )


@dataclass(frozen=True, kw_only=True)
class RunSection(Section, section="run"):
    seed: int = setting(0, "public: frozen A, partition, random head", at_least=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1")
    transport: Literal["cohort", "flower"] = setting("cohort", "cohort: in this process | flower: simulation engine")
    workers: int | Literal["auto"] = setting(
        "auto", "processes that share the clients of transport = flower; auto: one for each GPU, or core", at_least=1
    )
    evaluate_every: int = setting(1, "rounds between evaluations on public validation data", at_least=1)
    out: str = setting("", "run folder; empty: runs/<task>-<method>-<time>")
