"""A site in a worker of Flower's simulation engine: the round in this process, on this node's part of common records.

Flower may hand every message to another process: what must last lies in `context.state`.
"""

from __future__ import annotations

import functools

from flwr.app import Array, ArrayRecord, Context

from fedlora.config import RunConfig
from fedlora.data.encode import EncodedDataset
from fedlora.federation import memory, wire
from fedlora.federation.cohort import Cohort
from fedlora.federation.sites import TrainingData, encode_training_data, load_simulated_data, make_site
from fedlora.federation.workbench import Workbench, build_workbench
from fedlora.privacy.ledger import Ledger
from fedlora.provenance import code_digest
from fedlora.site.protocol import Answer, Request


def answer(request: Request, context: Context) -> Answer:
    """What a daemon would answer; the ledger is in memory, since a simulated site has no budget to guard.

    Raises:
        FedloraError: whatever a daemon would have made a code of.
    """
    config = RunConfig.from_flower(request.config)
    if request.ask == "enrol":
        return Answer(facts={"client": request.client, "code_digest": code_digest()})
    instruction = wire.decode_instruction(request.instruction)
    cohort = _cohort(config, context.run_id, request.client)
    (site,) = cohort.sites
    if "site" in context.state:
        memory.recall(site, bytes(context.state["site"]["memory"].data))  # type: ignore[union-attr]
    try:
        (update,) = cohort.run(instruction)
    finally:  # an admitted round is spent, whatever came of it
        kept = memory.remember(site)
        context.state["site"] = ArrayRecord({"memory": Array("uint8", (len(kept),), "bytes", kept)})
    return Answer(update=wire.encode_update(update))


@functools.lru_cache(maxsize=1024)
def _cohort(config: RunConfig, run_id: int, client: int) -> Cohort:
    """A cohort of one site, kept as long as this process lives: the key names the run, as a site has one."""
    workbench, data, encoded = _common(config)
    site = make_site(config, data, workbench.schedule, client)
    return Cohort(workbench=workbench, dataset=encoded, sites=[site], ledger=Ledger.in_memory())


@functools.lru_cache(maxsize=1)
def _common(config: RunConfig) -> tuple[Workbench, TrainingData, EncodedDataset]:
    """Base model and encoded records: what is dear to build and the same for every simulated site in this process."""
    workbench, data = build_workbench(config), load_simulated_data(config)
    return workbench, data, encode_training_data(workbench, data)
