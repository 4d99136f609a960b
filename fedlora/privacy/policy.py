"""A site's policy: what its owner allows, read from the owner's own disk. Whoever asks can be stricter, never looser.

    [site]      ledger = "ledger.sqlite", socket = "site.sock"           # beside this file
    [limits]    smallest_noise_multiplier = 0.4, largest_clip_norm = 2.0, most_steps_per_round = 50, most_rounds = 100
    [allow]     methods = ["ffa"], mechanisms = ["gaussian"], phases = ["prototype", "finetune"]
    [models]    "sentence-transformers/all-MiniLM-L6-v2" = "<SHA-256 of its weights>"
    [data.ward] task = "sst2", source = "/srv/ward", max_epsilon = 6.0, max_delta = 1e-6, public_size = "exact"

It fails closed: a missing file, an unknown key or a value out of range refuses every run. A refusal names its rule at
the site; the server learns no more than that it was refused. Every rule is explained in docs/policy.md. No torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from fedlora.config import AdapterConfig, EngineConfig, PrivacyConfig, RunConfig, Task
from fedlora.errors import ConfigError, PolicyRefused
from fedlora.privacy.ledger import Cap
from fedlora.schema import (
    Section,
    build_section,
    options_of,
    parse_settings,
    read_settings,
    require_known,
    required,
    setting,
    shown,
)

if TYPE_CHECKING:
    from fedlora.privacy.plan import PrivacyPlan

NO_FOLDER = ("hub", "generated")
"""Sources of records that are no folder."""

_TABLES = ("site", "tls", "limits", "allow", "models", "data")
_PHASES = ("prototype", "warmup", "alignment", "bilevel", "finetune", "evaluation")
_ALLOWABLE = {
    "methods": options_of(AdapterConfig, "method"),
    "mechanisms": options_of(PrivacyConfig, "mechanism"),
    "noise": options_of(EngineConfig, "noise"),
    "phases": _PHASES,
    "units": options_of(PrivacyConfig, "unit"),
}
"""What a policy may name under [allow]."""


@dataclass(frozen=True, kw_only=True)
class SiteSection(Section, section="site"):
    ledger: str = setting("ledger.sqlite", "the site's ledger; a relative path starts at the policy's folder")
    device: str = setting("auto", "what this site computes on: auto, cpu, cuda, cuda:1")
    token_budget: int | Literal["auto"] = setting("auto", "padded tokens that it computes at once", at_least=1)
    socket: str = setting("site.sock", "where couriers reach the daemon, from the policy's folder")
    socket_group: str = setting("", "operating-system group whose members may; empty: the daemon's own user alone")
    answers: str = setting("answers.sqlite", "the last answer of each run, to be given again; from the policy's folder")
    model_folder: str = setting("models", "folder of base models by name, looked into first; from the policy's folder")
    metrics: str = setting("", "loopback address of health and metrics, such as 127.0.0.1:9464; empty: none")


@dataclass(frozen=True, kw_only=True)
class TlsSection(Section, section="tls"):
    """A second way to the daemon, for couriers that cannot reach its socket. Loopback only, certificates on both sides.

    Paths start at the policy's folder.
    """

    address: str = required("loopback address and port, such as 127.0.0.1:7443")
    certificate: str = required("the daemon's certificate, PEM")
    key: str = required("its private key, PEM")
    couriers: str = required("certificate of the authority that signed those of the couriers, PEM")


@dataclass(frozen=True, kw_only=True)
class Limits(Section, section="limits"):
    smallest_noise_multiplier: float = setting(0.4, "effective σ of every phase, at least", above=0)
    largest_clip_norm: float = setting(10.0, "L2 bound of one record's gradient, at most", above=0)
    most_steps_per_round: int = setting(100, "private steps between two releases, at most", at_least=1)
    # No question of privacy: what a run can make this site spend in memory and time.
    most_rounds: int = setting(1000, "federation.rounds, at most", at_least=1)
    most_clients: int = setting(1000, "federation.clients, at most", at_least=1)
    largest_rank: int = setting(64, "adapter.rank, at most", at_least=1)
    longest_input: int = setting(512, "data.max_length in tokens, at most", at_least=4)


@dataclass(frozen=True, kw_only=True)
class Allow(Section, section="allow"):
    methods: tuple[str, ...] = setting(("ffa",), "adapter.method")
    mechanisms: tuple[str, ...] = setting(("gaussian",), "privacy.mechanism")
    noise: tuple[str, ...] = setting(("host",), "engine.noise: host is a cipher, device a faster counter generator")
    phases: tuple[str, ...] = setting(
        ("prototype", "finetune"), "what may leave, by phase: also warmup, alignment, bilevel and evaluation"
    )
    units: tuple[str, ...] = setting(
        ("record",), "privacy.unit; client lets moves leave without a record's noise: the budget is then spent for good"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, known in _ALLOWABLE.items():
            for name in getattr(self, key):
                require_known(name, known, key.removesuffix("s"), f"allow.{key} = {shown(name)}")


@dataclass(frozen=True, kw_only=True)
class DataPolicy(Section, section="data"):
    """One data set of the site. All but the size must be given."""

    task: Task = required("the GLUE task whose columns and labels it has")
    source: str = required("folder it lies in, from the policy's folder; the run's own data.source is not looked at")
    max_epsilon: float = required("the most that all runs together may spend", above=0)
    max_delta: float = required("δ of that budget, below 1/n; a run's own can be smaller", above=0, at_most=0.5)
    public_size: int | Literal["exact"] = setting(
        "exact", "exact: n leaves with every update | a number to plan with in place of n, which then stays", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """What this site allows. Two policies are equal if they allow the same."""

    path: Path
    site: SiteSection
    limits: Limits
    allow: Allow
    models: Mapping[str, str] = field(hash=False)
    """SHA-256 of the weights by model name, as `ModelSource.digest` gives it."""
    data: Mapping[str, DataPolicy] = field(hash=False)
    """By the site's own name for the data set."""
    tls: TlsSection | None = None
    digest: str = field(default="", compare=False)
    """SHA-256 of the file, as `sha256sum` prints it. Follows from nothing but the owner's own words."""

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """Read a policy.

        Raises:
            PolicyRefused: there is none at `path`, or anything in it is not as it should be.
        """
        try:
            content = read_settings(path, "the policy")
            tables = parse_settings(content, f"the policy {path}")
        except ConfigError as error:
            raise PolicyRefused(f"{error}; nothing runs") from error
        try:
            return cls._from_tables(path, tables, hashlib.sha256(content).hexdigest())
        except ConfigError as error:
            raise PolicyRefused(f"the policy {path} is broken: {error}; nothing runs") from error

    @classmethod
    def _from_tables(cls, path: Path, tables: Mapping[str, Any], digest: str) -> Self:
        for name, table in tables.items():
            require_known(name, _TABLES, "section", f"[{name}]")
            if not isinstance(table, Mapping):
                raise ConfigError(f"{name} is {shown(table)}, wanted a table; write [{name}] above its keys")
        models, data = tables.get("models", {}), tables.get("data", {})
        for name, weights in models.items():
            if not (isinstance(weights, str) and len(weights) == 64 and set(weights) <= set("0123456789abcdef")):
                raise ConfigError(f'models."{name}" = {shown(weights)}, wanted the SHA-256 of its weights in hex')
        if not data:
            raise ConfigError("there is no [data.NAME]; name at least one data set")
        for name, table in data.items():
            if not isinstance(table, Mapping):
                raise ConfigError(f"data.{name} is {shown(table)}, wanted a table; write [data.NAME] above its keys")
        return cls(
            path=path,
            site=build_section(SiteSection, tables.get("site", {})),
            limits=build_section(Limits, tables.get("limits", {})),
            allow=build_section(Allow, tables.get("allow", {})),
            models=dict(models),
            data={name: build_section(DataPolicy, table, f"data.{name}") for name, table in data.items()},
            tls=build_section(TlsSection, tables["tls"]) if "tls" in tables else None,
            digest=digest,
        )

    @property
    def ledger(self) -> Path:
        return self.beside(self.site.ledger)

    def beside(self, place: str) -> Path:
        """A path of the policy, which starts at the policy's own folder."""
        return self.path.parent / place

    def data_set(self, task: str) -> tuple[str, DataPolicy]:
        """Name and policy of the data set for `task`.

        Raises:
            PolicyRefused: there is none, or more than one.
        """
        found = [(name, entry) for name, entry in self.data.items() if entry.task == task]
        if len(found) != 1:
            raise PolicyRefused(
                f"the policy {self.path} has {len(found)} data sets for task {task}, wanted one",
                rule="data",
            )
        return found[0]

    def cap(self, task: str) -> Cap:
        _, data = self.data_set(task)
        return Cap(epsilon=data.max_epsilon, delta=data.max_delta)

    def localised(self, config: RunConfig) -> RunConfig:
        """`config` with what only the site decides: where records and model lie, what it computes on, how much at once.

        The model is not looked for anywhere else if its name is a folder below `site.model_folder`.
        """
        _, data = self.data_set(config.data.task)
        source = data.source if data.source in NO_FOLDER else str(self.beside(data.source))
        bundled = self.beside(self.site.model_folder) / config.model.name
        return replace(
            config,
            model=replace(config.model, name=str(bundled) if bundled.is_dir() else config.model.name),
            data=replace(config.data, source=source),
            engine=replace(config.engine, token_budget=self.site.token_budget, compile="off", matmul_precision="auto"),
            run=replace(config.run, device=self.site.device),
        )

    def check_config(self, config: RunConfig) -> None:
        """Refuse what can be told from the configuration alone, before a record or a model is touched.

        Raises:
            PolicyRefused: naming the rule.
        """
        privacy, federation, limits = config.privacy, config.federation, self.limits
        _, data = self.data_set(config.data.task)
        _member("methods", "adapter.method", config.adapter.method, self.allow.methods)
        _member("units", "privacy.unit", privacy.unit, self.allow.units)
        _member("mechanisms", "privacy.mechanism", privacy.mechanism, self.allow.mechanisms)
        _member("noise", "engine.noise", config.engine.noise, self.allow.noise)
        _member("models", "model.name", config.model.name, tuple(self.models))
        _at_most("data.max_epsilon", "privacy.epsilon", privacy.epsilon, data.max_epsilon)
        _at_most("data.max_delta", "privacy.delta", privacy.delta, data.max_delta)
        _at_most("limits.largest_clip_norm", "privacy.clip_norm", privacy.clip_norm, limits.largest_clip_norm)
        steps = federation.local_steps
        _at_most("limits.most_steps_per_round", "federation.local_steps", steps, limits.most_steps_per_round)
        _at_most("limits.most_rounds", "federation.rounds", federation.rounds, limits.most_rounds)
        _at_most("limits.most_clients", "federation.clients", federation.clients, limits.most_clients)
        _at_most("limits.largest_rank", "adapter.rank", config.adapter.rank, limits.largest_rank)
        _at_most("limits.longest_input", "data.max_length", config.data.max_length, limits.longest_input)
        if config.data.train_share < 1:
            raise PolicyRefused(
                f"data.train_share = {config.data.train_share:g}: how many records fall into a share would tell about "
                "them; a site takes part with all or not at all",
                rule="data",
            )
        for phase in _asked_phases(config):
            _member("phases", "phase", phase, self.allow.phases)
        if privacy.seeded_noise or config.unsound:
            key = "privacy.seeded_noise" if privacy.seeded_noise else "privacy.gredp_noise = real"
            raise PolicyRefused(f"{key} protects nothing; no site with a policy takes part", rule="sound")

    def check_model(self, name: str, digest: str) -> None:
        """Refuse weights other than those the policy names.

        Raises:
            PolicyRefused: with both digests, so that the owner can compare and allow.
        """
        if self.models.get(name) != digest:
            raise PolicyRefused(
                f"model {name} has weights {digest}, the policy allows {self.models.get(name)}; "
                f"if they are meant, put them under [models] in {self.path}",
                rule="models",
            )

    def check_size(self, task: str, num_examples: int) -> None:
        """Refuse a data set whose budget lets one record in n be published, whatever a run asks for.

        A run's own δ is below `max_delta`; to compare that one with 1/n would tell whoever tries several δ the size.

        Raises:
            PolicyRefused: without the number of records, which may be one that stays.
        """
        name, data = self.data_set(task)
        if data.max_delta >= 1 / num_examples:
            raise PolicyRefused(
                f"data.{name}.max_delta = {data.max_delta:g} in {self.path} is not below one over the number of its "
                "records: at that δ one of them may be published. Set it below that",
                rule="data.max_delta",
            )

    def check_plan(self, plan: PrivacyPlan) -> None:
        """Refuse a plan with a phase that may not leave, or with less noise than the site wants.

        Where clients are protected, that is the noise which the federation says it adds to the sum of their moves.

        Raises:
            PolicyRefused: naming the rule.
        """
        least = self.limits.smallest_noise_multiplier
        for phase in (phase for phase in plan.phases if phase.num_steps):
            _member("phases", "phase", phase.name, self.allow.phases)
            for release in filter(None, (phase, phase.beside)):
                noise = release.charge().noise_multiplier
                if not noise >= least:
                    raise PolicyRefused(
                        f"phase {release.name} has noise multiplier {noise:.4g}, the policy wants at least {least:g}",
                        rule="limits.smallest_noise_multiplier",
                    )


def _asked_phases(config: RunConfig) -> tuple[str, ...]:
    """What a run would have this site release."""
    asked = {
        "prototype": config.model.head == "prototype",
        "warmup": config.warmup_rounds > 0,
        "alignment": config.adapter.select == "alignment",
        "bilevel": config.search_rounds > 0,
        "finetune": True,
        "evaluation": config.federation.private_evaluation,
    }
    return tuple(phase for phase in _PHASES if asked[phase])


def _member(rule: str, what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise PolicyRefused(f"{what} = {shown(value)}, the policy allows {', '.join(allowed) or 'none'}", rule=rule)


def _at_most(rule: str, what: str, value: float, most: float) -> None:
    if not value <= most:
        raise PolicyRefused(f"{what} = {value:g}, the policy allows at most {most:g}", rule=rule)
