"""The least noise for a target: never too little, hardly too much, and remembered without being trusted."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import BudgetRefused, ConfigError
from fedlora.privacy import calibration
from fedlora.privacy.accounting import Charge, epsilon
from fedlora.privacy.calibration import calibrate_noise_multiplier

DELTA = 1e-5
PROTOTYPE = Charge(1.0, 20.0, 1)
QUESTION: dict[str, Any] = {"epsilon": 6.0, "delta": DELTA, "sampling_probability": 0.2, "num_steps": 500}

CASES: list[dict[str, Any]] = [
    {"sampling_probability": 0.001, "num_steps": 1000, "epsilon": 3},
    {"sampling_probability": 0.01, "num_steps": 1000, "epsilon": 6},
    {"sampling_probability": 0.02, "num_steps": 300, "epsilon": 6, "fixed": [PROTOTYPE]},
    {"sampling_probability": 0.02, "num_steps": 300, "epsilon": 0.2, "fixed": [PROTOTYPE]},
    {"sampling_probability": 0.2, "num_steps": 500, "epsilon": 1},
    {"sampling_probability": 1.0, "num_steps": 1, "epsilon": 8},
    {"sampling_probability": 1.0, "num_steps": 100, "epsilon": 0.1},
    {"sampling_probability": 0.5, "num_steps": 5000, "epsilon": 6},
    {"sampling_probability": 0.01, "num_steps": 300, "epsilon": 0.1},
    {"sampling_probability": 0.01, "num_steps": 1000, "epsilon": 1, "delta": 1e-12},
    {"sampling_probability": 0.001, "num_steps": 1, "epsilon": 50},
    {"sampling_probability": 0.01, "num_steps": 1000, "epsilon": 500},
    {"sampling_probability": 0.01, "num_steps": 1000, "epsilon": 3, "accountant": "rdp"},
]


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of remembered answers."""
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Targets of the searches that really ran."""
    ran: list[float] = []
    search = calibration._smallest_noise

    def counted(price: Any, target: float, guess: float, stride: float) -> float:
        ran.append(target)
        return search(price, target, guess, stride)

    monkeypatch.setattr(calibration, "_smallest_noise", counted)
    return ran


@pytest.mark.parametrize("case", CASES, ids=str)
def test_meets_the_target_and_not_by_much(case: dict[str, Any]) -> None:
    question = {"delta": DELTA, "fixed": [], "accountant": "pld", **case}
    started = time.process_time()
    sigma = calibrate_noise_multiplier(**question)
    assert time.process_time() - started < 10  # naive bisection takes up to 22 s; this takes about one

    def price(multiplier: float) -> float:
        release = Charge(question["sampling_probability"], multiplier, question["num_steps"])
        return epsilon([*question["fixed"], release], question["delta"], question["accountant"])

    assert price(sigma) <= question["epsilon"]
    assert price(sigma * 0.998) > question["epsilon"]


@pytest.mark.parametrize(
    ("probability", "steps", "target", "sigma"),
    [(0.01, 1000, 1, 1.415), (0.01, 1000, 3, 0.814), (0.01, 1000, 6, 0.643), (0.1, 1000, 3, 4.50), (0.2, 500, 6, 3.53)],
)
def test_golden_numbers(probability: float, steps: int, target: float, sigma: float) -> None:
    found = calibrate_noise_multiplier(epsilon=target, delta=DELTA, sampling_probability=probability, num_steps=steps)
    assert found == pytest.approx(sigma, rel=2e-3)


FURTHER: list[dict[str, Any]] = [
    {"sampling_probability": 0.05, "num_steps": 50, "further": [(0.1, 30)], "epsilon": 2.0},
    {"sampling_probability": 0.02, "num_steps": 300, "further": [(0.04, 40)], "fixed": [PROTOTYPE], "epsilon": 6.0},
    {"sampling_probability": 0.01, "num_steps": 10, "further": [(0.2, 400), (1.0, 2)], "epsilon": 4.0},
    {"sampling_probability": 0.05, "num_steps": 0, "further": [(0.1, 30)], "epsilon": 1.0},
]


@pytest.mark.parametrize("case", FURTHER, ids=str)
def test_blocks_that_share_the_noise_are_priced_with_it(case: dict[str, Any]) -> None:
    """The same σ as a bisection over dp-accounting's own composition, and never less than it asks for."""
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant

    def price(sigma: float) -> float:
        exact = PLDAccountant(value_discretization_interval=1e-3)
        blocks = [(case["sampling_probability"], sigma, case["num_steps"])]
        blocks += [(probability, sigma, steps) for probability, steps in case["further"]]
        blocks += [(c.sampling_probability, c.noise_multiplier, c.num_steps) for c in case.get("fixed", [])]
        for probability, noise, steps in blocks:
            event: Any = dp_event.GaussianDpEvent(noise)
            if probability < 1:
                event = dp_event.PoissonSampledDpEvent(probability, event)
            if steps:
                exact.compose(dp_event.SelfComposedDpEvent(event, steps))
        return float(exact.get_epsilon(DELTA))

    low, high = 0.3, 30.0
    while high / low > 1 + 1e-4:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if price(middle) <= case["epsilon"] else (middle, high)
    found = calibrate_noise_multiplier(delta=DELTA, **case)
    assert low * (1 - 1e-3) <= found <= high * (1 + 1.5e-3)  # dp-accounting's price depends on its grid by so much
    blocks = [(case["sampling_probability"], case["num_steps"]), *case["further"]]
    charges = [*case.get("fixed", []), *(Charge(q, found, steps) for q, steps in blocks)]
    assert epsilon(charges, DELTA) <= case["epsilon"]


def test_a_remembered_answer_is_not_given_for_other_blocks(searches: list[float]) -> None:
    """Noise that is enough without a block is too little with it."""
    found = {}
    for further in ((), ((0.2, 100),), ((0.4, 100),), ((0.2, 101),)):
        ran = len(searches)
        found[further] = calibrate_noise_multiplier(**QUESTION, further=further)
        assert len(searches) > ran
        assert calibrate_noise_multiplier(**QUESTION, further=list(further)) == found[further]
    assert found[()] < found[(0.2, 100),] < found[(0.2, 101),] < found[(0.4, 100),]


def test_no_noise_where_none_is_needed(memory: Path) -> None:
    assert calibrate_noise_multiplier(**{**QUESTION, "epsilon": math.inf}) == 0
    assert calibrate_noise_multiplier(**{**QUESTION, "num_steps": 0}) == 0
    assert calibrate_noise_multiplier(**{**QUESTION, "num_steps": 0}, further=[(0.4, 0)]) == 0
    assert not memory.exists()


def test_a_target_already_spent_is_refused_with_both_numbers(memory: Path) -> None:
    with pytest.raises(BudgetRefused, match=r"epsilon = 0\.16.* target is 0\.1"):
        calibrate_noise_multiplier(**{**QUESTION, "epsilon": 0.1}, fixed=[PROTOTYPE])
    with pytest.raises(BudgetRefused, match="inf"):
        calibrate_noise_multiplier(**QUESTION, fixed=[Charge(0.1, 0.0, 1)])
    assert not memory.exists()


def test_a_target_a_hair_above_what_is_fixed_is_met() -> None:
    target = epsilon([PROTOTYPE], DELTA) * 1.0001
    sigma = calibrate_noise_multiplier(**{**QUESTION, "epsilon": target}, fixed=[PROTOTYPE])
    assert epsilon([PROTOTYPE, Charge(0.2, sigma, 500)], DELTA) <= target


def test_a_target_that_no_noise_can_meet_is_refused() -> None:
    """A price that more noise no longer lowers ends the search instead of prolonging it for ever."""
    with pytest.raises(BudgetRefused, match="no noise multiplier up to"):
        calibration._smallest_noise(lambda sigma: 1.0, 0.9, guess=1.0, stride=0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"delta": 1.0},
        {"delta": 0.0},
        {"epsilon": 0.0},
        {"epsilon": math.nan},
        {"epsilon": -1.0},
        {"sampling_probability": 0.0},
        {"num_steps": -1},
        {"further": [(1.5, 10)]},
        {"further": [(0.2, -1)]},
        {"accountant": "gdp"},
    ],
    ids=str,
)
def test_impossible_questions_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="wanted"):
        calibrate_noise_multiplier(**{**QUESTION, **wrong})


def test_a_remembered_answer_is_the_found_one(memory: Path, searches: list[float]) -> None:
    found = calibrate_noise_multiplier(**QUESTION)
    ran = len(searches)
    assert calibrate_noise_multiplier(**QUESTION) == found
    assert len(searches) == ran
    assert [path.suffix for path in memory.iterdir()] == [".json"]
    calibrate_noise_multiplier(**QUESTION, fixed=[PROTOTYPE])
    assert len(searches) > ran


@pytest.mark.parametrize("sabotage", ["less noise", "cut off", "empty", "not a table", "other question", "binary"])
def test_an_altered_entry_is_not_believed(memory: Path, searches: list[float], sabotage: str) -> None:
    found = calibrate_noise_multiplier(**QUESTION)
    (path,) = memory.iterdir()
    text = path.read_text()
    entry = json.loads(text)
    other = json.dumps({**entry, "question": {**entry["question"], "num_steps": 5}})
    path.write_bytes(
        {
            "less noise": json.dumps({**entry, "answer": 0.1}).encode(),
            "cut off": text[: len(text) // 2].encode(),
            "empty": b"",
            "not a table": b"[1]",
            "other question": other.encode(),
            "binary": b"\xff\xfe\x00",
        }[sabotage]
    )
    ran = len(searches)
    assert calibrate_noise_multiplier(**QUESTION) == found
    assert len(searches) > ran
    assert json.loads(path.read_text()) == entry, "the search repairs the entry"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no file modes to check")
def test_an_entry_that_others_may_write_is_not_believed(memory: Path, searches: list[float]) -> None:
    calibrate_noise_multiplier(**QUESTION)
    (path,) = memory.iterdir()
    path.chmod(0o666)
    ran = len(searches)
    calibrate_noise_multiplier(**QUESTION)
    assert len(searches) > ran


def test_a_folder_that_cannot_be_used_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "file"))
    assert calibrate_noise_multiplier(**QUESTION) > 0


def test_a_hit_needs_no_numerics() -> None:
    calibrate_noise_multiplier(**QUESTION)
    code = (
        "import sys; from fedlora.privacy.calibration import calibrate_noise_multiplier;"
        f"print(calibrate_noise_multiplier(**{QUESTION!r}) > 0,"
        "[m for m in ('torch', 'numpy', 'scipy', 'dp_accounting') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True []"
