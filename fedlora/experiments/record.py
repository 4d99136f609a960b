"""record.json: what is needed to re-derive ε and to judge or repeat a run. Keys may be added, never change meaning."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from typing import Any

import fedlora
from fedlora.config import RunConfig
from fedlora.privacy.units import Guarantee
from fedlora.provenance import code_digest, versions

SCHEMA_VERSION = 1


def make_record(
    config: RunConfig,
    *,
    started: str,
    wall_seconds: float,
    metric: dict[str, Any],
    metrics: dict[str, float],
    bytes_up: int,
    bytes_down: int,
    clients: list[dict[str, Any]],
    execution: dict[str, Any],
    model_digest: str,
    privacy: dict[str, Any],
    private_evaluation: dict[str, Any] | None,
    selection: dict[str, Any] | None,
    slots: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of a finished run.

    Args:
        clients: the public facts that the sites reported.
        metric: name, value, split and what it is of (`Evaluator.measured`).
        model_digest: of the base model's weights, `ModelSource.digest`.
        privacy: `privacy_facts`.
        selection: `Selection.to_json`; None where no modules were to be chosen.
        private_evaluation: `PrivateEvaluation` as in rounds.jsonl; None where it was not asked for.
        slots: `slot_facts`.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "fedlora_version": fedlora.__version__,
        "code_digest": code_digest(),
        "config_digest": config.digest(),
        "model_digest": model_digest,
        "config": config.to_mapping(),
        "versions": versions(),
        "started": started,
        "wall_seconds": round(wall_seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "noise_seeded": config.privacy.seeded_noise,
        "private": config.private and not config.privacy.seeded_noise,
        "metric": metric,
        "metrics": metrics,
        "private_evaluation": private_evaluation,
        "selection": selection,
        **slots,
        "bytes_up": bytes_up,
        "bytes_down": bytes_down,
        "execution": execution,
        "clients": clients,
        "privacy": privacy,
    }


def guarantee_of(record: Mapping[str, Any]) -> Guarantee:
    """The guarantee that a record states, as it was made or as read from JSON, where ∞ is the text "inf"."""
    stated = record["privacy"]["guarantee"]
    return Guarantee(**{**stated, "epsilon": float(stated["epsilon"])})


def shown_metric(record: Mapping[str, Any]) -> str:
    """The headline of a record in words: on what, and of which model where that is not the one in the folder."""
    metric = record["metric"]
    return f"{metric['value']:.4f} on public {metric.get('split', 'data')}{_OF[metric.get('of', 'global')]}"


_OF = {
    "global": "",
    "own": ", the mean over the sites' own models (personal/); adapter/ has the part alone that they share",
    "shared": ", of the part alone that the sites share: what each keeps for itself is zero in adapter/",
}
"""What is said of `metric.of`, which old records do not have."""


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
