"""The generated corpus: every task, reproducible, splits apart, sizes as asked."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest

from fedlora.data.glue import Records, available_validation_splits, load_records
from fedlora.data.tasks import TASKS
from fedlora.errors import DataError
from fedlora.randomness import PublicSeed


def generated(task: str, split: str = "train", size: int = 600, seed: int = 0) -> Records:
    return load_records(task, "generated", split, generated_records=size, seed=PublicSeed.from_int(seed))


def rows(records: Records) -> list[tuple[str, ...]]:
    return list(zip(*records.texts, strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_columns_and_labels_are_the_tasks(task: str) -> None:
    spec, records = TASKS[task], generated(task)
    assert len(records) == 600
    assert len(records.texts) == len(spec.text_columns)
    assert records.labels.dtype == (np.float32 if spec.regression else np.int64)
    counts = Counter(records.labels.tolist())
    assert len(counts) == (6 if spec.regression else spec.num_labels)
    assert min(counts.values()) > 60


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_first_text_and_repeat_no_row(task: str) -> None:
    splits = [generated(task, split) for split in ("train", *TASKS[task].validation_splits)]
    for number, records in enumerate(splits):
        assert len(set(rows(records))) == len(records)
        for other in splits[number + 1 :]:
            assert not set(records.texts[0]) & set(other.texts[0])


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides(task: str) -> None:
    first, again, other = generated(task, seed=1), generated(task, seed=1), generated(task, seed=2)
    assert rows(first) == rows(again)
    assert np.array_equal(first.labels, again.labels)
    assert rows(first) != rows(other)


def test_noise_is_in_train_labels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = [generated("sst2", split, size=3000).labels for split in ("train", "validation")]
    monkeypatch.setattr("fedlora.data.synthetic.LABEL_NOISE", 0.0)
    clean = [generated("sst2", split, size=3000).labels for split in ("train", "validation")]
    assert 0.02 < np.mean(noisy[0] != clean[0]) < 0.04
    assert np.array_equal(noisy[1], clean[1])


def test_reviews_vary_in_length() -> None:
    lengths = [len(text.split()) for text in generated("sst2", size=3000).texts[0]]
    assert min(lengths) <= 4
    assert max(lengths) >= 20


def test_validation_is_a_sixth_within_bounds() -> None:
    assert [len(generated("rte", "validation", size)) for size in (8, 1200, 9000)] == [64, 200, 1000]
    assert available_validation_splits("mnli", "generated") == TASKS["mnli"].validation_splits


def test_six_thousand_records_take_no_time() -> None:
    start = time.perf_counter()
    generated("sst2", size=6000)
    assert time.perf_counter() - start < 3  # 0.05 s alone; loose, since others may use the machine


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(DataError, match="it has train, validation"):
        generated("sst2", "test")
    with pytest.raises(DataError, match="unknown task"):
        generated("sst3")


def test_more_rows_than_the_templates_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.data.synthetic._ATTEMPTS_PER_RECORD", 1)
    with pytest.raises(DataError, match=r"lower data\.generated_records"):
        generated("sst2")
