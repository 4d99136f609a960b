"""The adapter folder's README.md: what the adapter is, and the guarantee that it must not be passed on without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.experiments.record import guarantee_of


def model_card(record: Mapping[str, Any]) -> str:
    """Markdown from a finished run's record; base model and library are named as PEFT's own cards do."""
    guarantee = guarantee_of(record)
    config, metric = record["config"], record["metric"]
    adapter, federation = config["adapter"], config["federation"]
    return f"""---
base_model: {config["model"]["name"]}
library_name: peft
---

# {config["data"]["task"]}: a {adapter["method"]} adapter of {federation["clients"]} federated clients

- **Guarantee**: {guarantee}
- **Not covered**: {"anything" if guarantee.flaws else guarantee.not_covered}
- **{metric["name"]}**: {metric["value"]:.4f} on public {metric["split"]}
- **Trained**: rank {adapter["rank"]} on {", ".join(adapter["target_modules"])}, {federation["rounds"]} rounds of
  {federation["local_steps"]} private steps, by fedlora {record["fedlora_version"]}
  (config {record["config_digest"][:16]}, code {record["code_digest"][:16]}, base {record["model_digest"][:16]})

`fedlora.load(FOLDER)` returns the ready classifier. `head.json` says what plain PEFT needs to know beside it.
"""
