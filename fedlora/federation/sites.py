"""From a run's configuration to its sites: whose records, which plan, what the owner's policy says to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlora.config import RunConfig
from fedlora.data.encode import EncodedDataset, encode
from fedlora.data.fingerprint import fingerprint
from fedlora.data.glue import Records
from fedlora.data.holdout import gate_half, held_out
from fedlora.data.partition import partition
from fedlora.engine.execution import find_device
from fedlora.errors import ConfigError, DataError, PolicyRefused
from fedlora.federation.protection import client_level_of
from fedlora.federation.schedule import ScheduledRound, planned_steps
from fedlora.federation.shelf import Shelf
from fedlora.federation.site import Site
from fedlora.federation.workbench import Workbench
from fedlora.models import locate_model
from fedlora.privacy.ledger import DataSet
from fedlora.privacy.plan import make_plan
from fedlora.privacy.policy import NO_FOLDER, SitePolicy
from fedlora.randomness import PublicSeed, SecretRoot


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Training records, and which of them each client holds."""

    records: Records
    parts: Mapping[int, np.ndarray]
    """Positions into `records`, int64, by client."""


def load_simulated_data(config: RunConfig, shelf: Shelf | None = None) -> TrainingData:
    """Training records and their partition among all clients, disjoint by construction.

    Args:
        shelf: that the records may lie on already.

    Raises:
        DataError: records cannot be found or divided as asked.
    """
    records = (shelf or Shelf()).records(config, "train")
    parts = partition(config.data, config.federation.clients, records, PublicSeed.from_int(config.run.seed))
    return TrainingData(records=records, parts=dict(enumerate(parts)))


def load_own_data(config: RunConfig, client: int, shelf: Shelf) -> TrainingData:
    """A real site's records, once for all runs of a process: all are its own, however a run divides simulated ones.

    Raises:
        ConfigError: the run wants a share of them, whose size would tell about them.
        DataError: they cannot be found.
    """
    if config.data.train_share < 1:
        raise ConfigError(
            f"data.train_share = {config.data.train_share:g} is for simulations: how many records of a site fall into "
            "a share depends on their texts; set data.train_share=1"
        )
    records = shelf.records(config, "train")
    return TrainingData(records=records, parts={client: np.arange(len(records), dtype=np.int64)})


def localised(config: RunConfig, policy: SitePolicy | None) -> RunConfig:
    """`config` as a site under `policy` runs it, refused before a record or a model is touched.

    Raises:
        PolicyRefused: the configuration, or the model's weights, are not what the policy allows.
        DataError, ConfigError: there is no such folder or device as the policy names.
    """
    if policy is None:
        return config
    policy.check_config(config)
    own = policy.localised(config)
    policy.check_model(config.model.name, locate_model(own.model.name).digest)
    _check_own_settings(own, policy)
    return own


def _check_own_settings(config: RunConfig, policy: SitePolicy) -> None:
    """Later the run's keys would be blamed for what the policy put into them."""
    name, data = policy.data_set(config.data.task)
    if data.source not in NO_FOLDER and not Path(config.data.source).is_dir():
        raise DataError(
            f"data.{name}.source = {data.source} in the policy {policy.path}: {config.data.source} is no folder; "
            "put the records there, or correct the policy"
        )
    try:
        find_device(config.run.device)
    except ConfigError as error:
        raise ConfigError(
            f"site.device = {policy.site.device} in the policy {policy.path} is not available here; use auto or cpu"
        ) from error


def make_sites(
    config: RunConfig, data: TrainingData, schedule: tuple[ScheduledRound, ...], policy: SitePolicy | None = None
) -> list[Site]:
    """One site per part, each with its own plan and its own secret streams.

    Raises:
        PolicyRefused: a policy for several sites, whose parts would each have the whole budget; or by a site.
        DataError, BudgetRefused: as `make_site`.
    """
    if policy is not None and len(data.parts) > 1 and config.data.source != "generated":
        raise PolicyRefused(
            f"federation.clients = {len(data.parts)}, but the policy {policy.path} is one site's, with one "
            'budget for its records; set federation.clients=1, or try several with source = "generated" in the policy',
            rule="data",
        )
    return [make_site(config, data, schedule, client, policy) for client in data.parts]


def make_site(
    config: RunConfig,
    data: TrainingData,
    schedule: tuple[ScheduledRound, ...],
    client: int,
    policy: SitePolicy | None = None,
) -> Site:
    """The site of `client`, simulated where there is no policy.

    Raises:
        DataError: δ is not below 1/n, or over the number of clients where those are protected; or the expected batch
            does not fit the site's size.
        PolicyRefused: the plan is not what the policy allows, or its δ is too large for the data set.
        BudgetRefused: ε cannot be met.
    """
    own = data.parts[client]
    records = data.records.subset(own)
    kept_back, mark = _kept_back(config, records), fingerprint(records)
    for_gates = _for_gates(config, records) & ~kept_back
    mine = tuple(entry for entry in schedule if client in entry.clients)
    name, declared = f"client {client}", None  # of this run; its ledger may be passed on, with no mark of the records
    if policy is not None:
        own_name, rules = policy.data_set(config.data.task)
        name = f"{own_name}/{client}" if len(data.parts) > 1 else own_name
        declared = None if rules.public_size == "exact" else rules.public_size
        policy.check_size(config.data.task, len(own))
    size = declared or len(own)
    how = client_level_of(config, schedule)  # of all clients, not of what this one is scheduled for
    try:
        plan = make_plan(
            config, num_examples=size, num_steps=planned_steps(mine, client), client=client, client_level=how
        )
    except DataError as error:
        if policy is None:
            raise
        if declared is None:  # how many records there are is not said: logs travel
            batch = config.training.expected_batch_size
            raise DataError(
                f"training.expected_batch_size = {batch} is too large for the records of this site; the run has to ask "
                "for less"
            ) from error
        raise DataError(f"{error}. The policy {policy.path} sets this number: public_size = {declared}") from error
    if policy is not None:
        policy.check_plan(plan)
    return Site(
        client=client,
        records=own[~kept_back],
        heldout=own[kept_back],
        gate_records=own[for_gates],
        public_size=None if declared or how else size,
        plan=plan,
        schedule=mine,
        secret=SecretRoot.seeded(config.run.seed) if config.privacy.seeded_noise else SecretRoot.from_os(),
        data_set=DataSet(
            fingerprint=mark if policy is not None else name,
            name=name,
            unit="client" if how and policy is None else "record",  # an owner's ledger tells of its records
        ),
        fingerprint=mark,
        cap=policy.cap(config.data.task) if policy is not None and how is None else None,
        policy_digest=policy.digest if policy is not None else None,
    )


def _kept_back(config: RunConfig, records: Records) -> np.ndarray:
    """Which of a site's records are kept from training, bool [n].

    The split decides nothing else: n, and with it q and every divisor, stay those of all records, so that nobody learns
    how many were kept back.
    """
    if not config.federation.private_evaluation:
        return np.zeros(len(records), dtype=bool)
    return held_out(records, config.data.heldout_share, PublicSeed.from_int(config.run.seed))


def _for_gates(config: RunConfig, records: Records) -> np.ndarray:
    """Which of a site's records teach the gates of a bilevel search, bool [n]."""
    if config.adapter.select != "bilevel":
        return np.zeros(len(records), dtype=bool)
    return gate_half(records, PublicSeed.from_int(config.run.seed))


def encode_training_data(workbench: Workbench, data: TrainingData) -> EncodedDataset:
    return encode(data.records, workbench.classifier.tokenizer, workbench.config.data.max_length)
