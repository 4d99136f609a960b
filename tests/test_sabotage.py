"""The ways in which published code for private federated training has been wrong, planted in a scratch copy of ours.

Every lie turns at least one ordinary check red; on the sound copy all of them are green. A lie names the exact text it
replaces, so that it cannot quietly stop meaning what it says when the code moves on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED = 0, 1  # pytest's exit codes; anything else would mean that the copy does not even start


@dataclass(frozen=True, kw_only=True)
class Lie:
    """One planted error, and the checks of this suite that must turn red under it."""

    file: str
    sound: str
    planted: str
    checks: tuple[str, ...]


_NOISE = "tests/engine/test_noise.py"
_TRAINING = "tests/engine/test_training.py"
_CLIPPING = "tests/privacy/test_clipping.py"
_SAMPLING = "tests/privacy/test_sampling.py"
_MECHANISMS = "tests/privacy/test_mechanisms.py"
_LEDGER = "tests/privacy/test_ledger.py"
_COHORT = "tests/federation/test_cohort.py"

LIES = {
    "no noise": Lie(
        file="fedlora/privacy/mechanisms/granular.py",
        sound="+ (unit_noise * std / grid).round_()",
        planted="+ (unit_noise * 0).round_()",
        checks=(_NOISE, _MECHANISMS),
    ),
    "ten percent too little noise": Lie(
        file="fedlora/privacy/mechanisms/granular.py",
        sound="std = noise_multiplier * (",
        planted="std = 0.9 * noise_multiplier * (",
        checks=(_NOISE, _MECHANISMS),
    ),
    "noise over the root of the batch size": Lie(
        file="fedlora/privacy/plan.py",
        sound="total, sensitivity=self.sensitivity, noise=noise",
        planted="total, sensitivity=self.sensitivity / 4**0.5, noise=noise",  # the batch size of the check is 4
        checks=(_NOISE,),
    ),
    "noise before clipping": Lie(
        file="fedlora/privacy/clipping.py",
        sound="        # float64: a float32 norm",
        planted="        gradients = [p + torch.randn_like(p) for p in gradients]\n        # float64: a float32 norm",
        checks=(_CLIPPING, _TRAINING),
    ),
    "the mean of the batch is clipped": Lie(
        file="fedlora/privacy/clipping.py",
        sound="self.weights(norms)\n        offset",
        planted="self.weights(sum(gradients[0]).norm().double().expand(len(owner)))\n        offset",
        checks=(_CLIPPING, _TRAINING),
    ),
    "shuffled batches of fixed size": Lie(
        file="fedlora/privacy/sampling.py",
        sound="return np.flatnonzero(generator.random(num_examples) < self.sampling_probability)",
        planted="return generator.permutation(num_examples)[: round(self.sampling_probability * num_examples)]",
        checks=(_SAMPLING,),
    ),
    "an outlier is not clipped": Lie(
        file="fedlora/privacy/clipping.py",
        sound="return torch.where(norms < _LARGEST_NORM, factor * _ROUNDING, torch.zeros_like(norms))",
        planted="return torch.where(norms < 1e3, factor * _ROUNDING, torch.ones_like(norms))",
        checks=(_CLIPPING,),
    ),
    "one slot is left out of the norm": Lie(
        file="fedlora/privacy/clipping.py",
        sound="dtype=torch.float64) for part in gradients]",
        planted="dtype=torch.float64) for part in gradients[:1]]",
        checks=(_CLIPPING,),
    ),
    "one noise draw for every round": Lie(
        file="fedlora/federation/cohort.py",
        sound='site.secret.numpy("noise", site.client, index)',
        planted='site.secret.numpy("noise", site.client)',
        checks=(_COHORT,),
    ),
    "one noise draw for every client": Lie(
        file="fedlora/federation/cohort.py",
        sound='site.secret.numpy("noise", site.client, index)',
        planted='site.secret.numpy("noise", index)',
        checks=(_COHORT,),
    ),
    "GReDP with real noise passes as private": Lie(
        file="fedlora/privacy/mechanisms/gredp.py",
        sound='"real": 0.0}',
        planted='"real": math.sqrt(0.5)}',
        checks=(_MECHANISMS,),
    ),
    "GReDP with half the variance is charged as if it were whole": Lie(
        file="fedlora/privacy/mechanisms/gredp.py",
        sound='"complex_half": math.sqrt(0.5)',
        planted='"complex_half": 1.0',
        checks=(_MECHANISMS,),
    ),
    "a new budget in every round": Lie(
        file="fedlora/privacy/ledger.py",
        sound="(data_set, fingerprint) IN kin\nGROUP BY",
        planted="(data_set, fingerprint) IN kin AND round < 0\nGROUP BY",
        checks=(_LEDGER,),
    ),
    "a new budget in every run": Lie(
        file="fedlora/federation/site.py",
        sound="            data_set=self.data_set,\n",
        planted="            data_set=replace(self.data_set, name='', fingerprint=instruction.run_id),\n",
        checks=("tests/federation/test_site.py",),
    ),
    "charged after it is computed": Lie(
        file="fedlora/federation/cohort.py",
        sound="        reservations = self.ledger.reserve(requests)  # on disk before the first private step\n",
        planted="        reservations: list[int] = []\n",
        checks=("tests/federation/test_kill.py",),
    ),
    "an empty batch is skipped": Lie(
        file="fedlora/engine/training.py",
        sound="    totals = torch.zeros_like(rows, dtype=torch.float64)\n",
        planted=(
            "    totals = torch.zeros_like(rows, dtype=torch.float64)\n"
            "    if not len(records):\n        return list(torch.zeros_like(rows))\n"
        ),
        checks=(_TRAINING,),
    ),
    "division by the realised batch size": Lie(
        file="fedlora/engine/training.py",
        sound=".div_(training.expected_batch_size)",
        planted=".div_(max(1, len(records)))",
        checks=(_TRAINING, _NOISE),
    ),
    "δ from the number of steps": Lie(
        file="fedlora/privacy/plan.py",
        sound="            delta=privacy.delta,\n            sampling_probability",
        planted="            delta=1 / num_steps,\n            sampling_probability",
        checks=("tests/privacy/test_plan.py",),
    ),
}


def copy_of_the_project(folder: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "results")
    for name in ("fedlora", "clients", "server", "simulations", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run_checks(project: Path, checks: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", "not slow", *checks]
    return subprocess.run(
        [sys.executable, *command],
        cwd=project,
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
def test_the_checks_pass_on_the_sound_code(tmp_path: Path) -> None:
    checks = tuple(sorted({check for lie in LIES.values() for check in lie.checks}))
    ended = run_checks(copy_of_the_project(tmp_path), checks)
    assert ended.returncode == PASSED, ended.stdout[-3000:]
    assert "passed" in ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", LIES)
def test_a_planted_lie_is_caught(name: str, tmp_path: Path) -> None:
    lie = LIES[name]
    project = copy_of_the_project(tmp_path)
    plant(project, lie)
    ended = run_checks(project, lie.checks)
    assert ended.returncode == FAILED, f"{name} went unnoticed:\n{ended.stdout[-3000:]}"


@pytest.mark.parametrize("name", LIES)
def test_a_lie_still_says_what_it_replaces(name: str) -> None:
    lie = LIES[name]
    assert (ROOT / lie.file).read_text().count(lie.sound) == 1, "the code has moved on: rewrite this lie"


def plant(project: Path, lie: Lie) -> None:
    path = project / lie.file
    text = path.read_text()
    assert text.count(lie.sound) == 1
    path.write_text(text.replace(lie.sound, lie.planted))
