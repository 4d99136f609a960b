"""Sites in a worker of Flower's simulation engine: a round in this process, on their parts of common records.

A node of the engine stands for one client or for many; its clients' rounds are one engine call. Flower may hand every
message to another process: what must last lies in `context.state`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence

from flwr.app import Array, ArrayRecord, Context

from fedlora.config import RunConfig
from fedlora.data.encode import EncodedDataset
from fedlora.errors import FedloraError
from fedlora.federation import memory, wire
from fedlora.federation.cohort import Cohort
from fedlora.federation.failures import failure_code, log_failure
from fedlora.federation.site import Site
from fedlora.federation.sites import TrainingData, encode_training_data, load_simulated_data, make_site
from fedlora.federation.workbench import Workbench, build_workbench
from fedlora.privacy.ledger import Ledger
from fedlora.provenance import code_digest
from fedlora.site.protocol import Answer, Request

log = logging.getLogger("fedlora.client")


def answer(request: Request, context: Context) -> Answer:
    """What a daemon would answer.

    Raises:
        FedloraError: whatever a daemon would have made a code of.
    """
    if request.ask == "enrol":
        return Answer(facts={"client": request.client, "code_digest": code_digest()})
    return answers(request, [request.client], context)[request.client]


def answers(request: Request, clients: Sequence[int], context: Context) -> dict[int, Answer]:
    """What the daemons of `clients` would answer to one round, which they do together.

    Who cannot take part is given a code, and the others go on; once they have begun they fail together. The ledger is
    in memory, since a simulated site has no budget to guard.

    Raises:
        FedloraError: whatever a daemon would have made a code of; all are given that.
    """
    config, instruction = RunConfig.from_flower(request.config), wire.decode_instruction(request.instruction)
    sites: list[Site] = []
    told: dict[int, Answer] = {}
    for client in clients:
        try:
            site = _site(config, context.run_id, client)
            _recall(site, context)
            site.scheduled(instruction)
        except FedloraError as error:
            log_failure(log, error, {"client": client})
            told[client] = Answer(code=failure_code(error))
        else:
            sites.append(site)
    if sites:
        workbench, _, dataset = _common(config)
        cohort = Cohort(workbench=workbench, dataset=dataset, sites=sites, ledger=_ledger(context.run_id))
        try:
            updates = cohort.run(instruction)
        finally:  # an admitted round is spent, whatever came of it
            _remember(sites, context)
        told |= {update.client: Answer(update=wire.encode_update(update)) for update in updates}
    return told


def _recall(site: Site, context: Context) -> None:
    kept: Mapping[str, Array] = context.state.array_records.get("sites", {})
    if str(site.client) in kept:
        memory.recall(site, bytes(kept[str(site.client)].data))


def _remember(sites: Sequence[Site], context: Context) -> None:
    kept: dict[str, Array] = dict(context.state.array_records.get("sites", {}))
    for site in sites:
        data = memory.remember(site)
        kept[str(site.client)] = Array("uint8", (len(data),), "bytes", data)
    context.state["sites"] = ArrayRecord(kept)


@functools.cache
def _site(config: RunConfig, run_id: int, client: int) -> Site:
    """Kept as long as this process lives: the key names the run, as a site has one."""
    workbench, data, _ = _common(config)
    return make_site(config, data, workbench.schedule, client)


@functools.cache
def _ledger(run_id: int) -> Ledger:
    return Ledger.in_memory()


@functools.lru_cache(maxsize=1)
def _common(config: RunConfig) -> tuple[Workbench, TrainingData, EncodedDataset]:
    """Base model and encoded records: what is dear to build and the same for every simulated site in this process."""
    workbench, data = build_workbench(config), load_simulated_data(config)
    return workbench, data, encode_training_data(workbench, data)
