"""Where a run keeps what the frozen blocks below the lowest adapted one make of its records (`engine.prefix`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlora.data.encode import EncodedDataset
from fedlora.engine.prefix import Prefix, PrefixCache, Room
from fedlora.federation.schedule import ScheduledRound, planned_steps
from fedlora.federation.site import Site
from fedlora.federation.workbench import Workbench, any_head
from fedlora.models.families import blocks_below


def prefix_cache(workbench: Workbench, dataset: EncodedDataset, sites: Sequence[Site]) -> PrefixCache | None:
    """For all rounds of all sites of a process, in memory alone; None where the run wants none."""
    if workbench.config.engine.prefix_cache == "off":
        return None
    records = np.concatenate([site.records for site in sites])
    return PrefixCache(dataset, records, Room.beside(workbench.execution.device))


def with_prefix(
    prefixes: PrefixCache, bench: Workbench, entry: ScheduledRound, sites: Sequence[Site]
) -> EncodedDataset:
    """The data set for a round of training, with the states of records where keeping them pays and changes nothing.

    Args:
        prefixes: of the process.
        bench: with the round's adapters attached.
        entry: the round.
        sites: the round's whole cohort.
    """
    modules = [path for paths in bench.places.values() for path in paths]
    blocks = blocks_below(modules, bench.classifier.family)
    if not blocks:
        return prefixes.without_states()
    batch_size, clients = bench.config.training.expected_batch_size, len(sites)
    prefix = Prefix(
        classifier=bench.classifier,
        blocks=blocks,
        shapes=bench.shapes,
        clients=clients,
        expected=batch_size * (clients if bench.backend.fuses_clients else 1),
        device=bench.execution.device,
    )
    to_come = bench.schedule[entry.index :]
    visits = [
        site.plan[entry.phase].sampler.sampling_probability * planned_steps(to_come, site.client)[entry.phase]
        for site in sites
    ]
    with any_head(bench.config, bench.classifier):
        return prefixes.dataset(prefix, bench.backend, sum(visits) / clients)
