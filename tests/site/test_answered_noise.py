"""Whatever a hostile courier asks for, what it gets has the noise that the policy demands and was charged for.

Statistical tests raise a false alarm with a chance of at most 1e-6, and are red where σ is a tenth too small.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from fedlora.config import RunConfig
from fedlora.engine.prototypes import LARGEST_LOGIT
from fedlora.federation import sites, wire
from fedlora.federation.workbench import build_workbench
from fedlora.privacy.ledger import Entry, Ledger
from fedlora.randomness import SecretRoot
from fedlora.site.desk import Desk
from fedlora.site.protocol import Request
from tests.site.conftest import RECORDS, Asking, SiteFolder, update_in

LEAST = 0.3
"""The σ that the policy demands."""
FALSE_ALARM = 1e-6


@pytest.fixture
def desk(site_folder: SiteFolder) -> Iterator[Desk]:
    opened = Desk(site_folder.settings)
    yield opened
    opened.close()


def charges(folder: SiteFolder) -> list[Entry]:
    ledger = Ledger.read(folder.path / "ledger.sqlite")
    try:
        return [entry for entry in ledger.entries() if entry.kind == "reserved"]
    finally:
        ledger.close()


class CountedRoots:
    """Secret roots that are the same in every run of the tests, and no two alike."""

    def __init__(self) -> None:
        self._made = 0

    def __call__(self) -> SecretRoot:
        self._made += 1
        return SecretRoot(self._made.to_bytes(32, "big"))


@pytest.fixture
def counted_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites.SecretRoot, "from_os", CountedRoots())


def asking_for(config: RunConfig) -> Asking:
    bench = build_workbench(config.with_overrides("engine.token_budget=64"))
    return Asking(config=config, workbench=bench, run_id=f"{config.digest()[:16]}-{0:016}")


def with_head(request: Request, weight: float) -> Request:
    """The same question, with a head of this value everywhere in its first row and none elsewhere.

    At zero every gradient is zero, so that the answer is its noise and nothing else.
    """
    instruction = wire.decode_instruction(request.instruction)
    assert instruction.head is not None
    first, bias = (torch.zeros_like(part) for part in instruction.head)
    first[0] = weight
    return replace(request, instruction=wire.encode_instruction(replace(instruction, head=(first, bias))))


def unit_noise(asking: Asking, request: Request, update: torch.Tensor, sigma: float) -> np.ndarray:
    """The noise in an answer to `with_head(request, 0)`, whose standard deviation should be 1."""
    config = asking.config
    entry = asking.workbench.schedule[wire.decode_instruction(request.instruction).round_index]
    step = entry.learning_rate * config.privacy.clip_norm / config.training.expected_batch_size
    return np.asarray(update.double() / (sigma * step * math.sqrt(entry.num_steps)))


def is_too_small(noise: np.ndarray) -> bool:
    """Whether its variance is below 1, by a one-sided test on N(0, 1) samples."""
    return bool(stats.chi2.cdf((noise**2).sum(), len(noise)) < FALSE_ALARM)


def test_a_tenth_less_noise_would_be_seen() -> None:
    draws = np.random.default_rng(0).normal(size=(20, 6000))
    assert not any(is_too_small(draw) for draw in draws)
    assert all(is_too_small(0.9 * draw) for draw in draws)


HOSTILE_CONFIGS = {
    "as it is": (),
    "as much as the cap": ("privacy.epsilon=600",),
    "a tiny clip norm": ("privacy.clip_norm=0.001",),
    "automatic clipping": ("privacy.clipping=automatic",),
    "one step": ("federation.local_steps=1", "federation.rounds=1"),
    "every record in every batch": (f"training.expected_batch_size={RECORDS}",),
    "tiny batches": ("training.expected_batch_size=1",),
    "a large step": ("training.learning_rate=1e6",),
    "another seed": ("run.seed=12345", "training.schedule=constant"),
}


@pytest.mark.parametrize("kind", HOSTILE_CONFIGS)
@pytest.mark.usefixtures("counted_roots")
def test_every_answer_has_the_noise_it_was_charged_for(site_folder: SiteFolder, kind: str) -> None:
    """Over 13,000 numbers of an answer that is nothing but its noise."""
    site_folder.write_policy(("max_epsilon = 6.0", "max_epsilon = 1e6"))
    tables = site_folder.config.to_mapping()
    tables["adapter"] |= {"rank": 64, "target_modules": ["all"]}
    asking = asking_for(RunConfig.from_mapping(tables, HOSTILE_CONFIGS[kind]))
    desk = Desk(site_folder.settings)
    try:
        answer = desk.answer(asking.round(0))
        if answer.code == "refused":
            assert kind == "as much as the cap"
            assert charges(site_folder) == []
            return
        request = with_head(asking.round(1), 0.0)
        update = update_in(desk.answer(request))
    finally:
        desk.close()
    sigma = charges(site_folder)[-1].noise_multiplier
    assert sigma is not None
    assert sigma >= LEAST
    assert update.facts["effective_noise_multiplier"] == sigma
    noise = unit_noise(asking, request, update.vector, sigma)
    assert len(noise) > 13_000
    assert not is_too_small(noise)
    assert stats.kstest(noise, "norm").pvalue > FALSE_ALARM


def test_less_noise_than_the_policy_wants_is_refused_whatever_the_run_says(
    site_folder: SiteFolder, asking: Asking
) -> None:
    """ε as large as the cap, over so few steps that almost no noise is needed."""
    site_folder.write_policy(("max_epsilon = 6.0", "max_epsilon = 1e6"))
    desk = Desk(site_folder.settings)
    codes = {}
    for epsilon in (1, 6, 30, 100, 1000, 1e5):
        generous = asking.under(f"privacy.epsilon={epsilon}", "privacy.prototype_noise_multiplier=1")
        codes[epsilon] = desk.answer(generous.round(0)).code
    desk.close()
    assert codes[6] == "ok"
    assert codes[1e5] == "refused"
    assert [entry.round for entry in charges(site_folder)] == [0] * list(codes.values()).count("ok")


@pytest.mark.usefixtures("counted_roots")
def test_the_prototypes_have_their_noise(site_folder: SiteFolder, tiny_model: Callable[..., Path]) -> None:
    """The same records have the same sums: two runs differ by noise alone, of twice the variance."""
    site_folder.config = site_folder.config.with_overrides(f"model.name={tiny_model('bert', hidden_size=256)}")
    site_folder.write_policy(("max_epsilon = 6.0", "max_epsilon = 1e6"), ("token_budget = 4096", "token_budget = 64"))
    asking, desk = asking_for(site_folder.config), Desk(site_folder.settings)
    runs = [replace(asking, run_id=f"{asking.run_id[:-4]}{number:04}") for number in range(24)]
    released = [update_in(desk.answer(run.round(0))).vector.double() for run in runs]
    desk.close()
    std = 2 * asking.config.privacy.prototype_noise_multiplier  # √2 of sensitivity times √2 of two draws
    pairs = zip(released[::2], released[1::2], strict=True)
    noise = np.concatenate([(one - other).numpy() / std for one, other in pairs])
    assert len(noise) > 6000
    assert not is_too_small(noise)


@pytest.mark.usefixtures("counted_roots")
def test_no_answer_is_unclipped(site_folder: SiteFolder, asking: Asking) -> None:
    """The steepest head that a site takes: records' gradients are hundreds of clip norms long, and count for one."""
    strict = asking.under("federation.local_steps=1", "privacy.clip_norm=0.001")
    desk = Desk(site_folder.settings)
    update_in(desk.answer(strict.round(0)))
    update = update_in(desk.answer(with_head(strict.round(1), LARGEST_LOGIT)))
    desk.close()
    sigma, entry = update.facts["effective_noise_multiplier"], strict.workbench.schedule[1]
    step = entry.learning_rate * strict.config.privacy.clip_norm / strict.config.training.expected_batch_size
    moved = float(update.vector.double().norm()) / step
    noise = sigma * (math.sqrt(len(update.vector)) + math.sqrt(-2 * math.log(FALSE_ALARM)))
    assert moved <= RECORDS + noise


# A configuration of any kind -----------------------------------------------------------------------------------------

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "privacy.epsilon": st.floats(0.5, 20),
    "privacy.delta": st.floats(1e-9, 0.1),
    "privacy.clip_norm": st.floats(1e-6, 3),
    "privacy.clipping": st.sampled_from(("flat", "automatic")),
    "privacy.mechanism": st.sampled_from(("gaussian", "gredp")),
    "privacy.gredp_noise": st.sampled_from(("complex", "complex_half", "real")),
    "privacy.allow_unsound": st.booleans(),
    "privacy.seeded_noise": st.booleans(),
    "privacy.accountant": st.sampled_from(("pld", "rdp")),
    "privacy.low_pass": st.floats(0.01, 1),
    "privacy.prototype_noise_multiplier": st.floats(0.01, 100),
    "federation.local_steps": st.integers(1, 4),
    "federation.rounds": st.integers(1, 12),
    "federation.clients": st.integers(1, 2000),
    "federation.participation": st.floats(0.01, 1),
    "federation.private_evaluation": st.booleans(),
    "training.expected_batch_size": st.integers(1, 130),
    "training.learning_rate": st.floats(1e-30, 1e30),
    "adapter.rank": st.integers(1, 100),
    "adapter.alpha": st.floats(1e-30, 1e30),
    "adapter.select": st.sampled_from(("none", "all", "alignment", "warmup", "bilevel", "probe")),
    "data.source": st.sampled_from(("generated", "hub", "/etc")),
    "data.train_share": st.floats(0.1, 1),
    "data.task": st.sampled_from(("sst2", "cola")),
    "engine.noise": st.sampled_from(("host", "device")),
    "engine.token_budget": st.integers(1, 10**9),
    "model.head": st.sampled_from(("prototype", "frozen", "trained")),
    "run.seed": st.integers(0, 2**63),
    "run.device": st.sampled_from(("cpu", "cuda", "/dev/null")),
}
ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("inf") | st.just("../x")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(sorted(VALUES)), st.just(None), max_size=5), st.data())
def test_whatever_it_is_configured_as_no_answer_has_too_little_noise(
    desk: Desk, asking: Asking, site_folder: SiteFolder, keys: dict[str, None], data: st.DataObject
) -> None:
    changes = {key: data.draw(st.one_of(VALUES[key], VALUES[key], VALUES[key], ODD), label=key) for key in keys}
    asked = {**asking.config.to_flower(), **changes}
    before = charges(site_folder)
    enrolled = desk.answer(Request(ask="enrol", config=asked))
    assert enrolled.code in ("ok", "refused", "bad_input", "protocol")
    if enrolled.code != "ok":
        unseen = replace(asking.round(), config=asked)
        assert desk.answer(unseen).code != "ok"
        assert charges(site_folder) == before
        return
    config = RunConfig.from_flower(asked)
    first = desk.answer(replace(asking_for(config).round(0), config=asked))
    for entry in charges(site_folder)[len(before) :]:
        assert entry.noise_multiplier is not None
        assert entry.noise_multiplier >= LEAST
    if first.code == "ok":
        update = update_in(first)
        assert all(
            phase["effective_noise_multiplier"] >= LEAST for phase in update.facts["phases"] if phase["num_steps"]
        )
        assert update.facts["epsilon"] <= 6


# How many records there are ------------------------------------------------------------------------------------------


@pytest.fixture
def half(site_folder: SiteFolder) -> Iterator[SiteFolder]:
    """The same site with half the records; both policies give a number between as theirs."""
    path = Path(tempfile.mkdtemp(prefix="fedlora-half-", dir="/tmp"))
    shutil.copytree(site_folder.path, path, dirs_exist_ok=True)
    for folder in (smaller := replace(site_folder, path=path), site_folder):
        number = f"max_delta = 1e-3\npublic_size = {RECORDS * 3 // 4}"
        folder.write_policy(("max_delta = 1e-3", number), ("token_budget = 4096", "token_budget = 64"))
    records = path / "records" / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(records).slice(0, RECORDS // 2), records)
    yield smaller
    shutil.rmtree(path)


@pytest.fixture
def desk_of_half(half: SiteFolder) -> Iterator[Desk]:
    opened = Desk(half.settings)
    yield opened
    opened.close()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(sorted(VALUES)), st.just(None), max_size=3), st.data())
def test_no_code_and_no_fact_tells_how_many_records_there_are(
    desk_of_half: Desk, desk: Desk, asking: Asking, keys: dict[str, None], data: st.DataObject
) -> None:
    asked = {**asking.config.to_flower(), **{key: data.draw(VALUES[key], label=key) for key in keys}}
    question = Request(ask="enrol", config=asked)
    code = desk.answer(question).code
    assert desk_of_half.answer(question).code == code
    if code != "ok":
        return
    first = replace(asking_for(RunConfig.from_flower(asked)).round(0), config=asked)
    one, other = desk.answer(first), desk_of_half.answer(first)
    assert one.code == other.code
    if one.code == "ok":
        assert update_in(one).facts == update_in(other).facts
        assert "num_examples" not in update_in(one).facts
