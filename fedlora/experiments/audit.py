"""An audit of a recipe: what its claims say, what an attack on the real code shows, and where they contradict.

Nothing here leaves the process but scores of planted gradients and of made-up canaries, so nothing is charged.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, RunFolderError
from fedlora.experiments.audit_mechanism import audit_mechanism, mechanism_work
from fedlora.experiments.audit_plot import plot_scores
from fedlora.experiments.audit_training import audit_training, small_config
from fedlora.experiments.run_folder import to_json
from fedlora.federation.schedule import make_schedule
from fedlora.federation.sites import load_simulated_data
from fedlora.privacy.audit.finding import ERROR, Evidence, Finding, judge
from fedlora.privacy.plan import FINETUNE, make_plan
from fedlora.randomness import SecretRoot

Level = Literal["mechanism", "training", "all"]
FEWEST_TRIALS, FEWEST_CANARIES = 100, 20


class AuditProgress(Protocol):
    """Whoever watches an audit."""

    def start(self, level: str, total: int) -> None: ...

    def advance(self, count: int) -> None: ...


def audit(
    config: RunConfig, *, level: Level, trials: int, canaries: int, out: Path | None, progress: AuditProgress
) -> tuple[Path, list[Finding]]:
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

    Returns:
        The folder and the findings, in the order of the table.

    Raises:
        InputError: anything the user can correct; nothing was written.
        PrivacyError: the recipe's guarantee cannot be given, so that there is nothing to audit.
    """
    if trials < FEWEST_TRIALS or canaries < FEWEST_CANARIES:
        raise ConfigError(
            f"{trials} trials and {canaries} canaries, wanted at least {FEWEST_TRIALS} and {FEWEST_CANARIES}: "
            "fewer can show nothing"
        )
    folder = _free_folder(config, out)
    findings = judge(_collect(config, level, trials, canaries, progress))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    plot_scores(folder / "audit.png", findings)
    report = _report(config, findings, level=level, trials=trials, canaries=canaries)
    (folder / "audit.json").write_text(json.dumps(to_json(report), indent=2) + "\n", encoding="utf-8")
    return folder, findings


def _collect(config: RunConfig, level: Level, trials: int, canaries: int, progress: AuditProgress) -> list[Evidence]:
    schedule = make_schedule(config)
    rounds = [
        sum(entry.phase == FINETUNE and client in entry.clients for entry in schedule)
        for client in range(config.federation.clients)
    ]
    client = rounds.index(max(rounds))
    data = load_simulated_data(config)
    secret = SecretRoot.seeded(config.run.seed) if config.privacy.seeded_noise else SecretRoot.from_os()
    found: list[Evidence] = []
    if level in ("mechanism", "all"):
        size = len(data.parts[client])
        plan = make_plan(config, num_examples=size, num_rounds=rounds[client], client=client)
        progress.start("mechanism", mechanism_work(config, plan, trials))
        found += audit_mechanism(config, plan, trials=trials, secret=secret, advance=progress.advance)
    if level in ("training", "all"):
        small = small_config(config, rounds[client])
        progress.start("training", len(make_schedule(small)))
        own = data.records.subset(data.parts[client])
        found.append(audit_training(small, own, canaries=canaries, secret=secret, advance=progress.advance))
    return found


def _free_folder(config: RunConfig, out: Path | None) -> Path:
    """Where to write, checked before any work is done.

    Raises:
        RunFolderError: there is something already.
    """
    name = f"{config.data.task}-{config.adapter.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = out or Path("audits") / name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} is there already and is left as it is; choose another with --out")
    return folder


def _report(
    config: RunConfig, findings: Sequence[Finding], *, level: str, trials: int, canaries: int
) -> dict[str, Any]:
    """All that the table says and how it was come by; scores stay in the plot."""
    return {
        "version": 1,
        "config_digest": config.digest(),
        "level": level,
        "trials": trials,
        "canaries": canaries,
        "confidence": 1 - ERROR,
        "noise_seeded": config.privacy.seeded_noise,
        "accountant": config.privacy.accountant,
        "delta": config.privacy.delta,
        "contradicted": any(finding.contradicts for finding in findings),
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
            for finding in findings
        ],
    }
