"""A site's own model, where a method has it keep a part of the adapter for itself: a PEFT folder beside the ledger."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedlora.data.tasks import TASKS
from fedlora.federation.cohort import Cohort
from fedlora.federation.messages import ClientUpdate, RoundInstruction
from fedlora.privacy.phases import FINETUNE
from fedlora.randomness import PublicSeed


def export_personal(folder: Path, cohort: Cohort, instruction: RoundInstruction, update: ClientUpdate) -> Path | None:
    """Write the model as the site's last round of fine-tuning has left it, to a folder of the run's own in `folder`.

    It is made of noised gradients only, as what is sent, so that whoever is given it learns no more than ε allows.

    Args:
        folder: for all runs.
        cohort: the site, with the run's adapters attached.
        instruction: of the round.
        update: its answer.

    Returns:
        Where it lies; None where nothing is kept, or more rounds come.

    Raises:
        OSError: the folder cannot be written.
    """
    bench, (site,) = cohort.workbench, cohort.sites
    last = max(entry.index for entry in site.schedule if entry.phase == FINETUNE)
    if site.kept is None or instruction.round_index != last:
        return None
    from fedlora.adapters.peft import export_adapter  # peft takes seconds, which other methods need not wait for

    name = hashlib.sha256(instruction.run_id.encode()).hexdigest()[:16]  # the server chose the id: it is no path
    config, path = bench.config, folder / name
    export_adapter(
        path,
        model=config.model,
        seed=PublicSeed.from_int(config.run.seed),
        layout=bench.layout,
        places=bench.places,
        theta=bench.model(update.vector.to(bench.execution.device), site.kept).cpu(),
        num_labels=bench.classifier.num_labels,
        labels=TASKS[config.data.task].label_names,
        head=instruction.head,
        max_length=config.data.max_length,
    )
    (path / "README.md").write_text(_CARD.format(config=config), encoding="utf-8")
    return path


_CARD = """\
---
base_model: {config.model.name}
library_name: peft
---

# {config.data.task}: this site's own model

- **Method**: {config.adapter.method}
- **Guarantee**: made of clipped and noised gradients alone, which the site's ledger has charged: whoever is given this
  folder learns no more of the records than the ε that `fedlora site status` shows.

`fedlora.load(FOLDER)` returns the ready classifier.
"""
