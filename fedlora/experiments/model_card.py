"""An adapter folder's README.md: what the adapter is, and the guarantee that it must not be passed on without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fedlora.adapters.methods import METHODS
from fedlora.config import AdapterConfig
from fedlora.experiments.record import guarantee_of, shown_metric
from fedlora.schema import build_section


def model_card(record: Mapping[str, Any], owner: str = "") -> str:
    """Markdown from a finished run's record; base model and library are named as PEFT's own cards do.

    Args:
        owner: whose own model it is, where a method has each site keep one.
    """
    guarantee = guarantee_of(record)
    config, federation = record["config"], record["config"]["federation"]
    whose = f": {owner}'s own" if owner else ""
    return f"""---
base_model: {config["model"]["name"]}
library_name: peft
---

# {config["data"]["task"]}: a {config["adapter"]["method"]} adapter of {federation["clients"]} federated clients{whose}

- **Guarantee**: {guarantee}
- **Not covered**: {"anything" if guarantee.flaws else guarantee.not_covered}
{_tuned(record)}- **{record["metric"]["name"]}**: {_metric(record, owner)}
- **Adapted**: {_adapted(record)}
- **Trained**: {_ranks(config["adapter"])}, {federation["rounds"]} rounds of {federation["local_steps"]} private steps,
  by fedlora {record["fedlora_version"]}
  (config {record["config_digest"][:16]}, code {record["code_digest"][:16]}, base {record["model_digest"][:16]})

`fedlora.load(FOLDER)` returns the ready classifier. `head.json` says what plain PEFT needs to know beside it.
"""


def _tuned(record: Mapping[str, Any]) -> str:
    """How a sweep chose the run's settings and what that cost besides, where it did."""
    return f"- **Chosen by trials**: {record['tuning']['note']}\n" if record.get("tuning") else ""


def _metric(record: Mapping[str, Any], owner: str) -> str:
    if not owner:
        return shown_metric(record)
    metric = record["metric"]
    return (
        f"{metric['value']:.4f} on public {metric['split']}, the mean over all sites' own models, this one among them"
    )


def _ranks(adapter: Mapping[str, Any]) -> str:
    ranks = f"ranks {adapter['ranks']} by client" if adapter["ranks"] else f"rank {adapter['rank']}"
    folded = ", in one adapter of a higher rank with all that was added to the base"
    return ranks + (folded if METHODS[adapter["method"]].folds else "")


def _adapted(record: Mapping[str, Any]) -> str:
    """The modules with an adapter: by the names asked for, or by what was chosen among them."""
    adapter = record["config"]["adapter"]
    selection = record.get("selection")
    if selection is None:
        return ", ".join(build_section(AdapterConfig, adapter).targets)
    rows = selection["candidates"]
    of_all, chosen = (Counter(row["type"] for row in part) for part in (rows, [r for r in rows if r["selected"]]))
    types = ", ".join(f"{chosen[kind]} of {count} {kind}" for kind, count in of_all.items())
    rest = "; the others share one adapter with their type" if adapter["sharing"] == "type" else ""
    return (
        f"{chosen.total()} of {of_all.total()} modules ({selection['ratio']:.0%}), "
        f"chosen by {selection['method']} ({types}){rest}"
    )
