"""Partitions are disjoint, cover everything, leave nobody empty, and say why when they cannot be made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config import DataConfig
from fedlora.data.glue import Records
from fedlora.data.partition import partition
from fedlora.data.tasks import TASKS
from fedlora.errors import DataError
from fedlora.randomness import PublicSeed

SEED = PublicSeed.from_int(0)


def records_of(labels: Any, **columns: list[Any]) -> Records:
    labels = np.asarray(labels, np.int64)
    return Records(texts=([f"record {i}" for i in range(len(labels))],), labels=labels, columns=columns)


def balanced(num_classes: int, each: int = 1000) -> Records:
    return records_of(np.arange(num_classes * each) % num_classes)


def check_dealt(parts: list[np.ndarray], clients: int, size: int) -> None:
    assert len(parts) == clients
    assert all(part.dtype == np.int64 and len(part) and (np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(size))


@settings(max_examples=60)
@given(
    task=st.sampled_from(["sst2", "mnli"]),
    strategy=st.sampled_from(["iid", "dirichlet"]),
    clients=st.integers(1, 12),
    spare=st.integers(0, 40),
    alpha=st.sampled_from([0.001, 0.05, 0.5, 50.0]),
    seed=st.integers(0, 99),
)
def test_random_partitions_are_disjoint_and_covering(
    task: str, strategy: Any, clients: int, spare: int, alpha: float, seed: int
) -> None:
    size = clients + spare
    labels = np.random.default_rng(seed).integers(0, TASKS[task].num_labels, size)
    config = DataConfig(task=task, partition=strategy, dirichlet_alpha=alpha)  # type: ignore[arg-type]
    check_dealt(partition(config, clients, records_of(labels), PublicSeed.from_int(seed)), clients, size)


@settings(max_examples=40)
@given(st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=6))
def test_any_positive_matrix_is_dealt_out(rows: list[tuple[int, ...]]) -> None:
    matrix = ";".join(",".join(map(str, row)) for row in rows)
    config = DataConfig(task="mnli", partition="label_skew", label_skew=matrix)
    check_dealt(partition(config, len(rows), balanced(3, 100), SEED), len(rows), 300)


def test_same_seed_same_hands_and_other_seed_others() -> None:
    config, records = DataConfig(partition="dirichlet"), balanced(2)
    first, again = (partition(config, 4, records, PublicSeed.from_int(5)) for _ in range(2))
    other = partition(config, 4, records, PublicSeed.from_int(6))
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))


def test_iid_sizes_differ_by_at_most_one() -> None:
    sizes = [len(part) for part in partition(DataConfig(partition="iid"), 7, balanced(2, 50), SEED)]
    assert max(sizes) - min(sizes) <= 1


def test_severe_gives_each_client_its_class() -> None:
    records = balanced(3)
    parts = partition(DataConfig(task="mnli", partition="label_skew"), 3, records, SEED)
    counts = np.array([np.bincount(records.labels[part], minlength=3) for part in parts])
    assert np.array_equal(counts, 50 + 850 * np.eye(3, dtype=int))


def test_severe_for_two_classes_and_three_clients() -> None:
    records = balanced(2)
    parts = partition(DataConfig(partition="label_skew"), 3, records, SEED)
    positives = [round(float(records.labels[part].mean()), 2) for part in parts]
    assert positives == [0.1, 0.9, 0.5]


def test_column_names_the_client() -> None:
    records = records_of([0, 1, 0, 1], site=[10, 9, 9, 10])
    parts = partition(DataConfig(partition="column", partition_column="site"), 2, records, SEED)
    assert [part.tolist() for part in parts] == [[1, 2], [0, 3]]


@pytest.mark.parametrize(
    ("settings_", "clients", "message"),
    [
        ({"partition": "iid"}, 9, "9 clients for 8 records"),
        ({"partition": "label_skew"}, 5, "not defined for 5 clients"),
        ({"partition": "label_skew", "label_skew": "1,1"}, 2, "1 rows and 2 columns"),
        ({"partition": "label_skew", "label_skew": "1,-1; 1,2"}, 2, "negative"),
        ({"partition": "label_skew", "label_skew": "nan,1; 1,2"}, 2, "negative or infinite"),
        ({"partition": "label_skew", "label_skew": "0,1; 0,2"}, 2, "label 0 to nobody"),
        ({"partition": "label_skew", "label_skew": "0,0; 1,2"}, 2, "client 0 without records"),
        ({"partition": "label_skew", "label_skew": "1,2; 1"}, 2, "no preset and no matrix"),
        ({"partition": "label_skew", "label_skew": "sever"}, 2, "no preset and no matrix"),
        ({"partition": "column", "partition_column": "hospital"}, 2, "they have: site, path"),
        ({"partition": "column", "partition_column": "site"}, 3, "2 distinct values for 3 clients"),
        ({"partition": "column", "partition_column": "path"}, 2, "nested values"),
        ({"task": "stsb", "partition": "dirichlet"}, 2, "stsb has none"),
    ],
)
def test_impossible_divisions_say_what_to_do(settings_: dict[str, str], clients: int, message: str) -> None:
    records = records_of([0, 1] * 4, site=["secret-a", "secret-b"] * 4, path=[["secret"]] * 8)
    with pytest.raises(DataError, match=message) as caught:
        partition(DataConfig(**settings_), clients, records, SEED)  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)
