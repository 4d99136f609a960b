"""RunConfig: one frozen description of a run, in three notations that say the same.

    TOML file  ⇄  frozen dataclasses  ⇄  Flower's flat run_config ("privacy.epsilon" = 6.0)

Every key has a default and the defaults are the quickstart; what is not a key is an error that names the nearest one.
Knows no torch and starts fast.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from fedlora.errors import ConfigError
from fedlora.schema import Section, build_section, parse_settings, read_settings, require_known, setting, shown

Scalar = bool | int | float | str
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
    method: Literal["ffa"] = setting("ffa", "ffa: A frozen, only B is trained and sent")
    rank: int = setting(8, "inner dimension r of B A", at_least=1)
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
    weights: Literal["uniform"] = setting("uniform", "weights of the clients in the mean")
    server_optimizer: Literal["none"] = setting("none", "none: the mean is the next global state")
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


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section, section="training"):
    optimizer: Literal["sgd", "momentum", "adam", "adamw"] = setting("sgd", "local optimiser")
    learning_rate: float = setting(8.0, "of the local optimiser", above=0)
    schedule: Literal["constant", "linear"] = setting(
        "linear", "of the learning rate over rounds; linear falls to zero after the last"
    )
    noise_filter: Literal["none", "doppler", "disk", "james_stein"] = setting(
        "none", "post-processing of each noised gradient: low-pass over steps | Kalman | shrinkage by slot"
    )
    filter_gain: float = setting(0.5, "share of the new gradient in what doppler and disk keep", above=0, at_most=1)
    momentum: float = setting(0.9, "of optimizer = momentum", at_least=0, at_most=1)
    weight_decay: float = setting(0.0, "of adamw (decoupled) and of the others (added to the gradient)", at_least=0)
    expected_batch_size: int = setting(128, "mean of the Poisson batch size, the public divisor", at_least=1)
    keep_state: bool = setting(False, "keep optimiser state at the client between rounds")


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig(Section, section="privacy"):
    unit: Literal["record"] = setting("record", "what is protected: one record of one site (add/remove)")
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


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, complete: two equal configs and one public seed describe the same experiment."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    federation: FederationConfig = dataclasses.field(default_factory=FederationConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    run: RunSection = dataclasses.field(default_factory=RunSection)

    def __post_init__(self) -> None:
        _check_relations(self)

    @property
    def private(self) -> bool:
        """Whether the run asks for a guarantee at all; False also for a mechanism that can give none."""
        return math.isfinite(self.privacy.epsilon) and not self.unsound

    @property
    def unsound(self) -> bool:
        """Whether the mechanism protects nothing, however much noise it adds."""
        return self.privacy.mechanism == "gredp" and self.privacy.gredp_noise == "real"

    @property
    def warmup_rounds(self) -> int:
        """Rounds that train all candidates before modules are chosen."""
        return self.adapter.warmup_rounds if self.adapter.select in ("alignment", "warmup", "bilevel") else 0

    @property
    def search_rounds(self) -> int:
        """Rounds that train weights and gates in turn."""
        return self.adapter.search_rounds if self.adapter.select == "bilevel" else 0

    @classmethod
    def from_mapping(cls, tables: Mapping[str, Any], overrides: Sequence[str] = ()) -> Self:
        """Build from nested tables, then apply `section.key=value` overrides.

        Raises:
            ConfigError: unknown section or key, wrong type, value out of range or at odds with another.
        """
        merged: dict[str, dict[str, Any]] = {}
        for section, table in tables.items():
            require_known(section, SECTIONS, "section", f"[{section}]")
            if not isinstance(table, Mapping):
                raise ConfigError(
                    f"[{section}] is {shown(table)}, wanted a table of keys; write [{section}] above them"
                )
            merged[section] = dict(table)
        for override in overrides:
            section, key, value = parse_override(override)
            merged.setdefault(section, {})[key] = value
        built: dict[str, Any] = {section: build_section(SECTIONS[section], table) for section, table in merged.items()}
        return cls(**built)

    @classmethod
    def from_toml(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe; see `from_mapping` for what is refused."""
        return cls.from_mapping(parse_settings(read_settings(path, "recipe"), f"recipe {path}"), overrides)

    def to_mapping(self) -> dict[str, dict[str, Any]]:
        """Nested tables of plain values, tuples as lists; `from_mapping` inverts it."""
        tables = dataclasses.asdict(self)
        return {
            section: {key: list(value) if isinstance(value, tuple) else value for key, value in table.items()}
            for section, table in tables.items()
        }

    def to_toml(self) -> str:
        import tomli_w

        return tomli_w.dumps(self.to_mapping())

    @classmethod
    def from_flower(cls, run_config: Mapping[str, Scalar]) -> Self:
        """Build from Flower's flat run_config; tuples travel as comma-separated text."""
        tables: dict[str, dict[str, Any]] = {}
        for flat_key, value in run_config.items():
            section, _, key = flat_key.partition(".")
            tables.setdefault(section, {})[key] = value
        return cls.from_mapping(tables)

    def to_flower(self) -> dict[str, Scalar]:
        return {
            f"{section}.{key}": ",".join(value) if isinstance(value, list) else value
            for section, table in self.to_mapping().items()
            for key, value in table.items()
        }

    def digest(self) -> str:
        """SHA-256 of what decides the result: not where it goes, how, and how long anyone waits."""
        tables = self.to_mapping()
        for section, key in _NO_PART_OF_THE_RESULT:
            del tables[section][key]
        canonical = json.dumps(tables, sort_keys=True, default=str)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def with_overrides(self, *overrides: str) -> Self:
        return type(self).from_mapping(self.to_mapping(), overrides)


_NO_PART_OF_THE_RESULT = (
    ("run", "out"),
    ("run", "transport"),
    ("run", "workers"),
    ("federation", "minimum_clients"),
    ("federation", "join_deadline"),
    ("federation", "round_deadline"),
    ("federation", "rejoin_deadline"),
)

SECTIONS: dict[str, type[Section]] = {
    spec.name: typing.cast(type[Section], spec.default_factory) for spec in dataclasses.fields(RunConfig)
}


def parse_override(override: str) -> tuple[str, str, Any]:
    """Section, key and value of "section.key=value", as given with --set.

    Raises:
        ConfigError: it is not of that form.
    """
    path, equals, text = override.partition("=")
    section, dot, key = path.strip().partition(".")
    if not (equals and dot and key):
        raise ConfigError(f"override {override!r} is not section.key=value; write for example privacy.epsilon=3")
    require_known(section, SECTIONS, "section", f"[{section}]")
    try:
        return section, key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return section, key, text.strip()  # bare words are text, as everyone types them in a shell


def _check_relations(config: RunConfig) -> None:
    _check_selection(config)
    if config.federation.minimum_clients > (asked := config.federation.cohort_size):
        raise ConfigError(
            f"federation.minimum_clients = {config.federation.minimum_clients}, but a round asks {asked} of "
            f"{config.federation.clients} clients; lower it, or raise federation.participation"
        )
    if config.data.task == "stsb" and config.model.head == "prototype":
        raise ConfigError(
            "model.head = prototype needs classes, but data.task = stsb is a regression; "
            "set model.head=trained or model.head=frozen"
        )
    if config.data.task == "stsb" and config.data.partition in ("dirichlet", "label_skew"):
        raise ConfigError(
            f"data.partition = {config.data.partition} divides by class, but data.task = stsb has none; "
            "set data.partition=iid"
        )
    if config.data.task == "stsb" and config.federation.private_evaluation:
        raise ConfigError(
            "federation.private_evaluation counts classes, but data.task = stsb has none; leave it off for this task"
        )
    if config.data.partition == "column" and not config.data.partition_column:
        raise ConfigError("data.partition = column needs data.partition_column; name the column that holds the client")


_LEAST_WARMUP = {
    "alignment": (1, "scores the directions that warm-up rounds have released"),
    "warmup": (2, "compares the updates of different rounds"),
    "bilevel": (1, "learns nothing at B = 0, where the gradient of every gate is exactly zero"),
}


def _check_selection(config: RunConfig) -> None:
    adapter, rounds = config.adapter, config.federation.rounds
    least, why = _LEAST_WARMUP.get(adapter.select, (0, ""))
    if adapter.warmup_rounds < least:
        raise ConfigError(
            f"adapter.select = {adapter.select} {why}, but adapter.warmup_rounds = {adapter.warmup_rounds}; "
            f"set it to at least {least}"
        )
    searched = config.warmup_rounds + config.search_rounds
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
    if config.training.keep_state and (adapter.select == "warmup" or (least and adapter.discretise == "cost_aware")):
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
