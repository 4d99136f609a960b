"""Inputs of the step benchmark: padded batches of a given shape, and one ragged logical batch of real lengths."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.contenders import Base, Batch
from fedlora.data.encode import EncodedDataset, encode
from fedlora.data.glue import load_records
from fedlora.randomness import PublicSeed

FIRST_WORD, WORDS = 1000, 28000  # of BERT's vocabulary, past its special and unused tokens


def padded_batch(records: int, tokens: int, seed: int = 0) -> tuple[Batch, Tensor]:
    """Random words, padded on the right to `tokens`; at least half of every row is text and one row is full."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_WORD, WORDS, (records, tokens), generator=draw)
    lengths = torch.randint(tokens // 2, tokens + 1, (records, 1), generator=draw)
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return batch, torch.randint(0, 2, (records,), generator=draw)


def parse_shape(shape: str) -> tuple[int, int]:
    """Records and tokens of "8x16"."""
    records, _, tokens = shape.partition("x")
    return int(records), int(tokens)


def logical_batch(base: Base, records: int) -> EncodedDataset:
    """`records` of the generated SST-2-like corpus: what one Poisson draw looks like."""
    corpus = load_records("sst2", "generated", "train", generated_records=6000, seed=PublicSeed.from_int(0))
    dataset = encode(corpus, base.classifier.tokenizer, 128)
    return dataset.subset(np.random.default_rng(0).choice(len(dataset), size=records, replace=False))


def pad_to(batch: Batch, tokens: int) -> Batch:
    """`batch` with more padding on the right (0 is BERT's padding token, mask and segment)."""
    more = tokens - batch["input_ids"].shape[1]
    return {name: torch.nn.functional.pad(tensor, (0, more)) for name, tensor in batch.items()}
