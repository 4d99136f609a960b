"""Deal the records of one data set to the clients of a simulation.

Every strategy returns index arrays that are disjoint, cover all records and leave nobody empty; `partition` checks
this, whatever the strategy, because a record at two sites would be protected at neither. Only the public seed is
used: every participant can deal again and get the same hands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fedlora.config import DataConfig
from fedlora.data.glue import Records
from fedlora.data.tasks import TASKS
from fedlora.errors import DataError
from fedlora.randomness import PublicSeed


@dataclass(frozen=True, kw_only=True)
class _Deal:
    """What a strategy needs to deal."""

    config: DataConfig
    clients: int
    records: Records
    generator: np.random.Generator


def partition(config: DataConfig, clients: int, records: Records, seed: PublicSeed) -> list[np.ndarray]:
    """One sorted int64 index array per client, disjoint and together all of `records`.

    Strategies (`config.partition`):
        iid: a random permutation cut into parts whose sizes differ by at most one.
        dirichlet: for each class, the clients' shares are one draw from Dirichlet(`dirichlet_alpha`) (Hsu, Qi, Brown
            2019, but per class). A client left without records takes one from the then largest client.
        label_skew: the shares are given, by preset or matrix; see `_label_skew`.
        column: client i holds the i-th of the sorted values of `partition_column`.

    Raises:
        DataError: more clients than records, or a division that cannot be made as asked.
    """
    if clients > len(records):
        raise DataError(f"{clients} clients for {len(records)} records; wanted at least one record each: ask for fewer")
    deal = _Deal(config=config, clients=clients, records=records, generator=seed.numpy("partition", config.partition))
    parts = [np.sort(part).astype(np.int64) for part in _STRATEGIES[config.partition](deal)]
    _check(parts, deal)
    return parts


def _check(parts: list[np.ndarray], deal: _Deal) -> None:
    empty = [client for client, part in enumerate(parts) if not len(part)]
    if empty:
        raise DataError(
            f"data.partition = {deal.config.partition} leaves client {empty[0]} without records; "
            "ask for fewer clients, more records or other shares"
        )
    if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(deal.records))):
        raise AssertionError(f"the {deal.config.partition} partition is not disjoint and covering: a bug in fedlora")


def _iid(deal: _Deal) -> list[np.ndarray]:
    return np.array_split(deal.generator.permutation(len(deal.records)), deal.clients)


def _dirichlet(deal: _Deal) -> list[np.ndarray]:
    concentration = np.full(deal.clients, deal.config.dirichlet_alpha)
    shares = deal.generator.dirichlet(concentration, size=_num_classes(deal)).T
    if not np.isfinite(shares).all():
        raise DataError(f"data.dirichlet_alpha = {deal.config.dirichlet_alpha} is too small to compute; try 0.01")
    parts = _deal_by_label(deal, shares)
    while min(map(len, parts)) == 0:
        poorest, richest = int(np.argmin([len(part) for part in parts])), int(np.argmax([len(part) for part in parts]))
        parts[poorest], parts[richest] = parts[richest][-1:], parts[richest][:-1]
    return parts


def _label_skew(deal: _Deal) -> list[np.ndarray]:
    """Deal every class out by given shares: rows are clients, columns are labels, columns are scaled to sum to one."""
    text, num_classes = deal.config.label_skew, _num_classes(deal)
    shares = _severe(deal.clients, num_classes) if text.strip() == "severe" else _parse_matrix(text)
    if shares.shape != (deal.clients, num_classes):
        raise DataError(
            f"data.label_skew has {shares.shape[0]} rows and {shares.shape[1]} columns; "
            f"wanted a row for each of {deal.clients} clients and a column for each of {num_classes} labels"
        )
    if not np.isfinite(shares).all() or (shares < 0).any():
        raise DataError("data.label_skew has a negative or infinite share; wanted shares from 0 upwards")
    totals = shares.sum(axis=0)
    if (totals == 0).any():
        label = int(np.argmin(totals))
        raise DataError(f"data.label_skew gives label {label} to nobody; wanted a share above 0 in column {label}")
    return _deal_by_label(deal, shares / totals)


def _severe(clients: int, num_classes: int) -> np.ndarray:
    """Shares [clients, classes] of the preset "severe".

    As many clients as classes: client i holds 90 % of class i, the others share the rest evenly (for three classes
    0.9, 0.05, 0.05, the usual "severe" of federated MNLI). Two classes among three clients have no such diagonal;
    that matrix is our own choice: two opposed clients and a balanced one.
    """
    if clients == num_classes >= 2:
        rest = 0.1 / (num_classes - 1)
        return np.full((clients, num_classes), rest) + np.eye(clients) * (0.9 - rest)
    if (clients, num_classes) == (3, 2):
        return np.array([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]])
    raise DataError(
        f"data.label_skew = severe is not defined for {clients} clients and {num_classes} labels; "
        'give the shares, rows by client and columns by label: "0.9,0.1; 0.1,0.9; 0.5,0.5"'
    )


def _parse_matrix(text: str) -> np.ndarray:
    try:
        rows = [[float(share) for share in row.split(",")] for row in text.split(";") if row.strip()]
    except ValueError:
        rows = []
    if not rows or len({len(row) for row in rows}) != 1:
        raise DataError(
            f'data.label_skew = {text!r} is no preset and no matrix; wanted severe, or rows such as "0.9,0.1; 0.1,0.9"'
        )
    return np.array(rows)


def _deal_by_label(deal: _Deal, shares: np.ndarray) -> list[np.ndarray]:
    """Cut each shuffled class at the cumulated `shares` [clients, classes], whose columns sum to one."""
    hands: list[list[np.ndarray]] = [[] for _ in range(deal.clients)]
    for label in range(shares.shape[1]):
        members = deal.generator.permutation(np.flatnonzero(deal.records.labels == label))
        cuts = np.rint(np.cumsum(shares[:-1, label]) * len(members)).astype(np.int64)
        for hand, dealt in zip(hands, np.split(members, cuts), strict=True):
            hand.append(dealt)
    return [np.concatenate(hand) for hand in hands]


def _num_classes(deal: _Deal) -> int:
    spec = TASKS[deal.config.task]
    if spec.regression:
        raise DataError(f"data.partition = {deal.config.partition} divides by class; {spec.name} has none: use iid")
    return spec.num_labels


def _column(deal: _Deal) -> list[np.ndarray]:
    name = deal.config.partition_column
    if name not in deal.records.columns:
        known = ", ".join(deal.records.columns) or "none"
        raise DataError(f"data.partition_column = {name} is no further column of these records; they have: {known}")
    values = deal.records.columns[name]
    try:
        distinct = sorted(set(values), key=lambda value: (type(value).__name__, value))
    except TypeError as error:  # lists and other nested values neither hash nor sort
        raise DataError(f"column {name} holds nested values; wanted one name or number per record") from error
    if len(distinct) != deal.clients:
        raise DataError(
            f"column {name} has {len(distinct)} distinct values for {deal.clients} clients; "
            f"set federation.clients={len(distinct)} or choose another column"
        )
    client_of = {value: client for client, value in enumerate(distinct)}
    owner = np.fromiter((client_of[value] for value in values), dtype=np.int64, count=len(values))
    return [np.flatnonzero(owner == client) for client in range(deal.clients)]


_STRATEGIES: Mapping[str, Callable[[_Deal], list[np.ndarray]]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "label_skew": _label_skew,
    "column": _column,
}
