"""Flower ClientApp: a courier between Flower and one site's round. It carries bytes in and bytes out.

Whatever goes wrong, the server learns one of a few fixed codes: an exception's text may quote a record, and Flower
would send it on verbatim. The site's own log has the place in the code, and the text of no errors but fedlora's own,
which never quote records. Flower may hand every message to another process: what must last lies in `context.state`.
"""

from __future__ import annotations

import functools
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.config import RunConfig
from fedlora.errors import AdapterError, ConfigError, FedloraError, PolicyRefused, ProtocolError
from fedlora.experiments.record import code_digest
from fedlora.privacy.policy import SitePolicy

if TYPE_CHECKING:
    from fedlora.data.encode import EncodedDataset
    from fedlora.federation.cohort import Cohort
    from fedlora.federation.sites import TrainingData
    from fedlora.federation.workbench import Workbench

Handler = Callable[[Message, Context], RecordDict]

app = ClientApp()
log = logging.getLogger("fedlora.client")


def fixed_code_on_failure(handler: Handler) -> Callable[[Message, Context], Message]:
    """`handler` as Flower calls it, with every exception turned into one of `FAILURE_CODES`."""

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        try:
            content = handler(message, context)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic in a Rust extension is no Exception, and may quote its input too
            _log_here(error)
            content = RecordDict({"failure": ConfigRecord({"code": _code(error)})})
        return Message(content, reply_to=message)

    return answer


@app.query()
@fixed_code_on_failure
def enrol(_: Message, context: Context) -> RecordDict:
    """Which client this node is, of how many where it knows, and which code it runs: node ids say nothing of it."""
    client = _client(context, RunConfig.from_flower(context.run_config))
    known = context.node_config.get("num-partitions")
    nodes = known if isinstance(known, int) else 0
    return RecordDict({"enrolment": ConfigRecord({"client": client, "nodes": nodes, "code_digest": code_digest()})})


@app.train()
@fixed_code_on_failure
def train(message: Message, context: Context) -> RecordDict:
    """One round of this node's site."""
    from fedlora.federation import memory, wire  # torch: not for enrolment

    config = RunConfig.from_flower(context.run_config)
    instruction = wire.decode_instruction(_unpack(message))
    client, policy = _client(context, config), _policy(context)
    if policy is None:
        cohort = _simulated_cohort(config, context.run_id, client)
    else:
        cohort = _own_cohort(config, context.run_id, client, policy)
    (site,) = cohort.sites
    if "site" in context.state:
        memory.recall(site, bytes(context.state["site"]["memory"].data))  # type: ignore[union-attr]
    try:
        (update,) = cohort.run(instruction)
    finally:  # an admitted round is spent, whatever came of it
        context.state["site"] = _pack("memory", memory.remember(site))
    return RecordDict({"update": _pack("bytes", wire.encode_update(update))})


@functools.lru_cache(maxsize=1024)
def _simulated_cohort(config: RunConfig, run_id: int, client: int) -> Cohort:
    """A cohort of one simulated site, kept as long as this process lives: the key names the run, as a site has one."""
    from fedlora.federation.cohort import Cohort
    from fedlora.federation.sites import make_site
    from fedlora.privacy.ledger import Ledger

    workbench, data, encoded = _simulated(config)
    site = make_site(config, data, workbench.schedule, client)
    return Cohort(workbench=workbench, dataset=encoded, sites=[site], ledger=Ledger.in_memory())


@functools.lru_cache(maxsize=1)
def _own_cohort(config: RunConfig, run_id: int, client: int, policy: SitePolicy) -> Cohort:
    """This node's own site in one run, kept until another run, or a change of its policy, asks for another.

    One only: every other run could fill the memory with another base model.

    Raises:
        PolicyRefused: by the site's policy, before its records or a model are touched.
    """
    from fedlora.federation.cohort import Cohort
    from fedlora.federation.schedule import make_schedule
    from fedlora.federation.sites import encode_training_data, load_own_data, localised, make_site
    from fedlora.federation.workbench import build_workbench
    from fedlora.privacy.ledger import Ledger

    config = localised(config, policy)
    data = load_own_data(config, client)
    site = make_site(config, data, make_schedule(config), client, policy)
    workbench, ledger = build_workbench(config), Ledger.open(policy.ledger)
    return Cohort(workbench=workbench, dataset=encode_training_data(workbench, data), sites=[site], ledger=ledger)


@functools.lru_cache(maxsize=1)
def _simulated(config: RunConfig) -> tuple[Workbench, TrainingData, EncodedDataset]:
    """Base model and encoded records: what is dear to build and the same for every simulated site in this process."""
    from fedlora.federation.sites import encode_training_data, load_simulated_data
    from fedlora.federation.workbench import build_workbench

    workbench, data = build_workbench(config), load_simulated_data(config)
    return workbench, data, encode_training_data(workbench, data)


def _policy(context: Context) -> SitePolicy | None:
    """The site's policy, read anew for every message, so that an edit counts at once; None for a simulated node.

    Whoever started this node names it in the node's own configuration. No message from a server can change that.

    Raises:
        PolicyRefused: this is no simulated node and it names no policy, or one that cannot be used.
    """
    policy = context.node_config.get("policy")
    if isinstance(policy, str):
        return SitePolicy.from_toml(Path(policy))
    if policy is None and _in_simulation_engine():
        return None
    raise PolicyRefused(
        "this node names no policy, so it takes part in nothing; start it with "
        """--node-config 'partition-id=… policy="/path/to/site.toml"'""",
    )


def _in_simulation_engine() -> bool:
    """Whether this process is a worker of Flower's simulation engine: one of Ray's, which a real node never is."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _client(context: Context, config: RunConfig) -> int:
    """This node's client index.

    Raises:
        ConfigError: the node was started without a usable partition-id.
    """
    client, clients = context.node_config.get("partition-id"), config.federation.clients
    if not isinstance(client, int) or not 0 <= client < clients:
        raise ConfigError(
            f"this node's partition-id is {client}, wanted 0 to {clients - 1} (federation.clients = {clients}); "
            'start it with --node-config "partition-id=…", or change federation.clients'
        )
    return client


def _unpack(message: Message) -> bytes:
    try:
        return bytes(message.content["instruction"]["bytes"].data)  # type: ignore[union-attr]
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ProtocolError("a message without an instruction; do server and client run the same fedlora?") from error


def _pack(name: str, data: bytes) -> ArrayRecord:
    """Bytes as Flower sends them in chunks; not an array for anyone to load."""
    return ArrayRecord({name: Array("uint8", (len(data),), "bytes", data)})


def _code(error: BaseException) -> str:
    if isinstance(error, ProtocolError | AdapterError):
        return "protocol"
    exit_code = error.exit_code if isinstance(error, FedloraError) else 1
    return {2: "bad_input", 3: "refused"}.get(exit_code, "internal")


def _log_here(error: BaseException) -> None:
    said = f": {error}" if isinstance(error, FedloraError) else ""
    where = traceback.format_list(traceback.extract_tb(error.__traceback__))
    log.error("%s%s\n%s", type(error).__name__, said, "".join(where))
