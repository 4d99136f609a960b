"""RunConfig: three notations that say the same, and one clear line for everything that is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config import SECTIONS, ModelConfig, PrivacyConfig, RunConfig
from fedlora.errors import ConfigError, PolicyRefused
from fedlora.privacy.policy import SitePolicy
from fedlora.schema import LARGEST_FILE

NAMES = st.from_regex(r"[a-z][a-z0-9_.]{0,10}", fullmatch=True)
# What a person may type; Flower's and TOML's values are Unicode text without surrogates.
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)


def values_of(spec: dataclasses.Field[Any], annotation: Any) -> st.SearchStrategy[Any]:
    """Values that a field takes, from its annotation and range alone."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([values_of(spec, option) for option in arguments])
    if origin is tuple:
        return st.lists(NAMES, min_size=1, max_size=4).map(tuple)
    low, high = spec.metadata["at_least"], spec.metadata["at_most"]
    above = spec.metadata["above"]
    if annotation is int:
        return st.integers(low if low is not None else 0, high if high is not None else 10**6)
    if annotation is float:
        start = above if above is not None else low if low is not None else 0.0
        end = high if high is not None else 1e6
        found = st.floats(start, end, exclude_min=above is not None)
        return found | st.just(math.inf) if spec.name == "epsilon" else found
    return {bool: st.booleans(), str: TEXTS}[annotation]


def section_tables() -> st.SearchStrategy[dict[str, dict[str, Any]]]:
    tables = {}
    for name, section in SECTIONS.items():
        hints = typing.get_type_hints(section)
        fields = {spec.name: values_of(spec, hints[spec.name]) for spec in dataclasses.fields(section)}
        tables[name] = st.fixed_dictionaries({}, optional=fields)
    return st.fixed_dictionaries({}, optional=tables)


def valid(tables: dict[str, dict[str, Any]]) -> bool:
    try:
        RunConfig.from_mapping(tables)
    except ConfigError:  # sections that contradict one another
        return False
    return True


CONFIGS = section_tables().filter(valid).map(RunConfig.from_mapping)


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig().with_overrides(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- notations


@settings(max_examples=80)
@given(CONFIGS)
def test_toml_gives_back_the_same_config(config: RunConfig) -> None:
    import tomllib

    assert RunConfig.from_mapping(tomllib.loads(config.to_toml())) == config


@settings(max_examples=80)
@given(CONFIGS)
def test_flower_gives_back_the_same_config_as_scalars(config: RunConfig) -> None:
    flat = config.to_flower()
    assert all(type(value) in (bool, int, float, str) for value in flat.values())
    assert all(key.count(".") == 1 for key in flat)
    again = RunConfig.from_flower(flat)
    assert again == config
    assert again.digest() == config.digest()


def test_a_recipe_is_read_with_its_overrides(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[privacy]\nepsilon = 3\n[adapter]\ntarget_modules = ["query"]\n')
    config = RunConfig.from_toml(recipe, ["privacy.delta=1e-6", "federation.rounds = 4"])
    assert (config.privacy.epsilon, config.privacy.delta, config.federation.rounds) == (3.0, 1e-6, 4)
    assert config.adapter.target_modules == ("query",)
    assert RunConfig.from_toml(recipe, ["privacy.epsilon=1"]).privacy.epsilon == 1.0, "overrides win"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("privacy.epsilon=inf", math.inf),
        ("privacy.epsilon=6", 6.0),
        ("privacy.seeded_noise=true", True),
        ("data.task=rte", "rte"),
        ('data.task="rte"', "rte"),
        ("adapter.target_modules=query,key , value", ("query", "key", "value")),
        ('adapter.target_modules=["up"]', ("up",)),
        ("engine.token_budget=auto", "auto"),
        ("engine.token_budget=512", 512),
        ("data.label_skew=0.9,0.1; 0.1,0.9", "0.9,0.1; 0.1,0.9"),
        ("run.out=runs/a b", "runs/a b"),
        ("model.name=org/model-7", "org/model-7"),
        ("data.source=2024", "2024"),
        ("run.out=1e3", "1e3"),
    ],
)
def test_overrides_are_typed_as_in_a_shell(override: str, value: Any) -> None:
    section, key = override.partition("=")[0].split(".")
    got = getattr(getattr(RunConfig().with_overrides(override), section), key)
    assert got == value
    assert type(got) is type(value)


def test_an_infinite_epsilon_is_an_explicit_non_private_run() -> None:
    assert RunConfig().private
    assert not RunConfig().with_overrides("privacy.epsilon=inf").private


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("privacy.epsilom=3", "unknown key privacy.epsilom; did you mean privacy.epsilon?"),
        ("federation.client=3", "unknown key federation.client; did you mean federation.clients?"),
        ("training.lr=3", "unknown key training.lr; known: expected_batch_size, filter_gain, keep_state"),
        ("privcy.epsilon=3", "unknown section [privcy]; did you mean privacy?"),
        ("zzz.epsilon=3", "unknown section [zzz]; known: adapter, data"),
        ("data.task=sst", "data.task = \"sst\", wanted one of cola, sst2"),
        ("data.task=sst3", "did you mean sst2?"),
        ("model.head=protoype", "did you mean prototype?"),
        ("privacy.epsilon=high", 'privacy.epsilon = "high", wanted a number'),
        ("privacy.epsilon=true", "privacy.epsilon = true, wanted a number"),
        ("federation.rounds=2.5", "federation.rounds = 2.5, wanted a whole number"),
        ("federation.rounds=true", "federation.rounds = true, wanted a whole number"),
        ("privacy.seeded_noise=1", "privacy.seeded_noise = 1, wanted true or false"),
        ("engine.token_budget=many", 'engine.token_budget = "many", wanted a whole number or "auto"'),
        ("adapter.target_modules=[]", "adapter.target_modules = [], wanted a non-empty list of names"),
        ("adapter.target_modules=[1]", "adapter.target_modules = [1], wanted a non-empty list of names"),
        ("privacy.epsilon=0", "privacy.epsilon = 0.0, wanted > 0"),
        ("privacy.epsilon=-1", "privacy.epsilon = -1.0, wanted > 0"),
        ("privacy.epsilon=nan", "privacy.epsilon = nan, wanted a number"),
        ("privacy.delta=0.6", "privacy.delta = 0.6, wanted > 0 and <= 0.5"),
        ("privacy.delta=0", "wanted > 0"),
        ("privacy.clip_norm=inf", "privacy.clip_norm = inf, wanted a finite number"),
        ("training.learning_rate=inf", "wanted a finite number"),
        ("federation.participation=1.1", "federation.participation = 1.1, wanted > 0 and <= 1"),
        ("federation.clients=0", "federation.clients = 0, wanted >= 1"),
        ("adapter.rank=0", "adapter.rank = 0, wanted >= 1"),
        ("run.seed=-1", "run.seed = -1, wanted >= 0"),
        ("engine.token_budget=0", "engine.token_budget = 0, wanted >= 1"),
        ("privacy.epsilon", "override 'privacy.epsilon' is not section.key=value"),
        ("epsilon=3", "override 'epsilon=3' is not section.key=value"),
        ("privacy.=3", "is not section.key=value"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(override: str, message: str) -> None:
    assert message in refusal(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.task=stsb"], "model.head = prototype needs classes, but data.task = stsb is a regression"),
        (["data.task=stsb", "model.head=frozen", "data.partition=dirichlet"], "set data.partition=iid"),
        (["data.partition=column"], "needs data.partition_column"),
    ],
)
def test_sections_that_contradict_one_another_are_refused(overrides: list[str], message: str) -> None:
    assert message in refusal(*overrides)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[privacy\nepsilon = 3", "is not valid TOML"),
        (b"\xff\xfe", "is not valid TOML"),
        (b"privacy = 3", "[privacy] is 3, wanted a table of keys"),
        (b"epsilon = 3", "unknown section [epsilon]"),
        (b"[privacy]\nepsilon = 2020-01-01", 'privacy.epsilon = "2020-01-01", wanted a number'),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b"#" * (LARGEST_FILE + 1), "more than 1048576 bytes"),
    ],
)
def test_a_broken_recipe_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_toml(recipe)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path, Path("a\0name")):
        with pytest.raises(ConfigError, match=r"cannot read recipe .*; give the path of a TOML file"):
            RunConfig.from_toml(path)


def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), Path("/dev/full"), tmp_path / "pipe"):
        with pytest.raises(ConfigError, match="it is a folder, a device or a pipe"):
            RunConfig.from_toml(path)
        with pytest.raises(PolicyRefused, match=r"a device or a pipe; .*; nothing runs"):
            SitePolicy.from_toml(path)


def test_the_largest_file_is_read(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(b"#" * LARGEST_FILE)
    assert RunConfig.from_toml(recipe) == RunConfig()


@settings(max_examples=200)
@given(
    st.sampled_from([(s, f.name) for s, section in SECTIONS.items() for f in dataclasses.fields(section)]),
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.lists(st.integers()), st.just({})),
)
def test_any_value_for_any_key_is_taken_or_refused_in_one_line(place: tuple[str, str], value: Any) -> None:
    section, key = place
    try:
        RunConfig.from_mapping({section: {key: value}})
    except ConfigError as error:
        message = str(error)
    else:
        return
    assert "\n" not in message
    assert f"{section}.{key}" in message


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.delta"):
        PrivacyConfig(delta=2.0)
    assert PrivacyConfig(epsilon=3).epsilon == 3.0
    assert type(PrivacyConfig(epsilon=3).epsilon) is float
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().privacy.epsilon = 100.0  # type: ignore[misc]
    assert ModelConfig().name


# ------------------------------------------------------------------------------------------------------------- digest


def another(value: Any, spec: dataclasses.Field[Any], annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return next((option for option in arguments if option != value), None)
    if origin in (types.UnionType, typing.Union):
        return 777
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, "up")
    if isinstance(value, str):
        return f"{value}x"
    return value / 2 or 0.5 if isinstance(value, float) else value + 1


GOES_WITH = {  # of keys whose other value is refused by itself
    "mask": ("adapter.select=mask", "adapter.mask=other.json"),
    "probe_texts": ("adapter.select=probe",),
    "ranks": ("adapter.method=hetlora",),
    "rate_of_a": ("adapter.method=lora",),
    "rate_of_r": ("adapter.method=fed_sb_svd",),
    "svd_split": ("adapter.method=ffa_svd",),
    "svd_every": ("adapter.method=ffa_svd",),
    "subspace": ("adapter.method=fed_sb", "model.dtype=float32"),
    "attackers": ("federation.aggregator=trimmed_mean",),
    "norm_bound": ("federation.aggregator=norm_bound",),
    "server_learning_rate": ("federation.server_optimizer=adam",),
    "server_momentum": ("federation.server_optimizer=adam",),
    "unit": ("model.head=frozen",),
    "client_clip_norm": ("model.head=frozen", "privacy.unit=client"),
    "client_noise": ("model.head=frozen", "privacy.unit=client", "federation.minimum_clients=3"),
}
VALUES = {"partition": "dirichlet", "ranks": "8", "attackers": 1}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_that_decides_the_result_is_in_the_digest(section: str) -> None:
    hints = typing.get_type_hints(SECTIONS[section])
    for spec in dataclasses.fields(SECTIONS[section]):
        reference = RunConfig().with_overrides(*GOES_WITH.get(spec.name, ()))
        value = VALUES.get(spec.name) or another(
            getattr(getattr(reference, section), spec.name), spec, hints[spec.name]
        )
        if value is None:
            continue  # a single option
        changed = reference.with_overrides(f"{section}.{spec.name}={json.dumps(value)}")
        waiting = {"minimum_clients", "join_deadline", "round_deadline", "rejoin_deadline"}
        same = spec.name in {"out", "transport", "workers", *waiting}
        assert (changed.digest() == reference.digest()) == same, f"{section}.{spec.name}"


def test_the_digest_is_the_same_in_another_process_and_for_equal_configs() -> None:
    code = "from fedlora.config import RunConfig; print(RunConfig().digest())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == RunConfig().digest()
    assert len(RunConfig().digest()) == 64
    whole, fraction = (RunConfig.from_mapping({"privacy": {"epsilon": value}}) for value in (6, 6.0))
    assert whole.digest() == fraction.digest()
    assert RunConfig().with_overrides("privacy.epsilon=inf").digest() != RunConfig().digest()


def test_every_key_is_documented() -> None:
    for section in SECTIONS.values():
        for spec in dataclasses.fields(section):
            assert spec.metadata["help"]


@pytest.mark.parametrize("choice", ["adapter.select=warmup", "adapter.select=alignment,adapter.discretise=cost_aware"])
def test_updates_are_not_compared_whose_optimiser_state_outlives_a_round(choice: str) -> None:
    RunConfig().with_overrides(*choice.split(","))
    with pytest.raises(ConfigError, match=r"training\.keep_state = true carries the noise"):
        RunConfig().with_overrides(*choice.split(","), "training.keep_state=true")
