"""An audit of a recipe: what its claims say, what an attack on the real code shows, and where they contradict.

Nothing here leaves the process but scores of planted gradients and of made-up canaries, so nothing is charged.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, RunFolderError
from fedlora.experiments.audit_mechanism import audit_mechanism, mechanism_work
from fedlora.experiments.audit_noise import noise_config, noise_schedule, released_noise
from fedlora.experiments.audit_plot import plot_scores
from fedlora.experiments.audit_training import audit_training, small_config
from fedlora.experiments.run_folder import to_json
from fedlora.experiments.simulate import resolve
from fedlora.federation.schedule import make_schedule, planned_steps
from fedlora.federation.sites import load_simulated_data
from fedlora.federation.workbench import build_workbench
from fedlora.privacy.audit.finding import ERROR, Evidence, Finding, judge
from fedlora.privacy.audit.noise import NoiseFinding, ReleasedNoise, judge_noise
from fedlora.privacy.phases import TRAINING
from fedlora.privacy.plan import make_plan
from fedlora.randomness import SecretRoot

Level = Literal["mechanism", "training", "all"]
FRESH_NOISE = "fresh noise, every round and site"
INDEPENDENT = "independent, σ·C"
"""What is claimed of it; σ is the charged one."""
FEWEST_TRIALS, FEWEST_CANARIES = 100, 20
MOST_TRIALS, MOST_CANARIES = 1_000_000, 20_000
"""The uncertainty of a bound falls with their square root: more of them gain next to nothing and fill the memory."""


class AuditProgress(Protocol):
    """Whoever watches an audit."""

    def start(self, level: str, total: int) -> None: ...

    def advance(self, count: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Audited:
    """What an audit found, in the order of the table.

    Attributes:
        folder: where it is written down.
        findings: lower bounds on ε.
        noise: the test of the noise that sites sent; None where the level has none or no noise is claimed.
    """

    folder: Path
    findings: Sequence[Finding]
    noise: NoiseFinding | None

    @property
    def rows(self) -> list[Finding | NoiseFinding]:
        """All of the table."""
        return [*self.findings, *([self.noise] if self.noise else [])]


def audit(
    config: RunConfig, *, level: Level, trials: int, canaries: int, out: Path | None, progress: AuditProgress
) -> Audited:
    """Audit `config` as its busiest client would run it; writes audit.json, audit.png and config.toml.

    Batches, noise and the canaries' coins come from the operating system, or from the run's seed with
    `privacy.seeded_noise`.

    Args:
        config: the recipe.
        level: "mechanism", "training" or "all".
        trials: of each world, at the mechanism level.
        canaries: of the training level.
        out: folder, new or empty; None is audits/<task>-<method>-<time>.
        progress: told of the work.

    Raises:
        InputError: anything the user can correct; nothing was written.
        PrivacyError: the recipe's guarantee cannot be given, so that there is nothing to audit.
    """
    if trials < FEWEST_TRIALS or canaries < FEWEST_CANARIES:
        raise ConfigError(
            f"{trials} trials and {canaries} canaries, wanted at least {FEWEST_TRIALS} and {FEWEST_CANARIES}: "
            "fewer can show nothing"
        )
    if trials > MOST_TRIALS or canaries > MOST_CANARIES:
        raise ConfigError(
            f"{trials} trials and {canaries} canaries, wanted at most {MOST_TRIALS} and {MOST_CANARIES}: "
            "more would show next to nothing more"
        )
    if config.privacy.unit == "client":
        raise ConfigError(
            "privacy.unit = client protects a client's whole data, and an audit attacks single records, of which such "
            "a run promises nothing; set privacy.unit=record, or leave the audit"
        )
    folder = _free_folder(config, out)
    evidence, releases = _collect(config, level, trials, canaries, progress)
    error = ERROR / (len(evidence) + bool(releases))
    noise = judge_noise(releases, level="training", name=FRESH_NOISE, error=error) if releases else None
    found = Audited(folder=folder, findings=judge(evidence, error=error), noise=noise)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    plot_scores(folder / "audit.png", found.findings)
    report = _report(config, found, level=level, trials=trials, canaries=canaries)
    (folder / "audit.json").write_text(json.dumps(to_json(report), indent=2) + "\n", encoding="utf-8")
    return found


def _collect(
    config: RunConfig, level: Level, trials: int, canaries: int, progress: AuditProgress
) -> tuple[list[Evidence], list[ReleasedNoise]]:
    schedule = make_schedule(config)
    rounds = [
        sum(entry.phase in TRAINING and client in entry.clients for entry in schedule)
        for client in range(config.federation.clients)
    ]
    client = rounds.index(max(rounds))
    data = load_simulated_data(config)
    secret = SecretRoot.seeded(config.run.seed) if config.privacy.seeded_noise else SecretRoot.from_os()
    found: list[Evidence] = []
    releases: list[ReleasedNoise] = []
    if level in ("mechanism", "all"):
        size = len(data.parts[client])
        plan = make_plan(config, num_examples=size, num_steps=planned_steps(schedule, client), client=client)
        progress.start("mechanism", mechanism_work(config, plan, trials))
        found += audit_mechanism(config, plan, trials=trials, secret=secret, advance=progress.advance)
    if level in ("training", "all"):
        resolved, own = resolve(config), data.records.subset(data.parts[client])
        small, silent = small_config(resolved, rounds[client]), noise_config(resolved, rounds[client])
        progress.start("training", len(make_schedule(small)) + len(noise_schedule(silent)))
        bench = build_workbench(small)
        releases = released_noise(silent, bench, own, progress.advance)
        found.append(audit_training(small, bench, own, canaries=canaries, secret=secret, advance=progress.advance))
    return found, releases


def _free_folder(config: RunConfig, out: Path | None) -> Path:
    """Where to write, checked before any work is done.

    Raises:
        RunFolderError: there is something already, or it cannot be made.
    """
    name = f"{config.data.task}-{config.adapter.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = out or Path("audits") / name
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunFolderError(f"{folder} is there already and is left as it is; choose another with --out")
        _try_to_make(folder)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise RunFolderError(f"cannot make the audit folder {folder}: {reason}; choose another with --out") from error
    return folder


def _try_to_make(folder: Path) -> None:
    """Make it and whatever is missing above it, write a file, and leave nothing of that."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for path in missing:
            with suppress(OSError):  # not made
                path.rmdir()


def _report(config: RunConfig, found: Audited, *, level: str, trials: int, canaries: int) -> dict[str, Any]:
    """All that the table says and how it was come by; scores stay in the plot."""
    return {
        "version": 2,
        "config_digest": config.digest(),
        "level": level,
        "trials": trials,
        "canaries": canaries,
        "confidence": 1 - ERROR,
        "noise_seeded": config.privacy.seeded_noise,
        "accountant": config.privacy.accountant,
        "delta": config.privacy.delta,
        "contradicted": any(row.contradicts for row in found.rows),
        "findings": [
            {
                "level": finding.evidence.level,
                "name": finding.evidence.name,
                "method": finding.evidence.method,
                "epsilon_claimed": finding.evidence.claimed,
                "epsilon_lower_bound": finding.bound,
                "confidence": finding.confidence,
                "verdict": finding.verdict,
                "attack": finding.attack,
                "thresholds": finding.thresholds,
                "scores_without": len(finding.evidence.without[finding.attack]),
                "scores_with": len(finding.evidence.with_record[finding.attack]),
            }
            for finding in found.findings
        ],
        "noise": found.noise and {**asdict(found.noise), "claimed": INDEPENDENT, "verdict": found.noise.verdict},
    }
