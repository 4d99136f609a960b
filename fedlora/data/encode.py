"""Token ids of a data set, stored ragged and padded one batch at a time.

All ids lie in one flat array; a record is a start and a length. A subset shares the flat array, so a client's part
costs two numbers per record, and a batch is one gather, without a Python loop over its records.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedlora.data.glue import Records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RECORDS_PER_CALL = 4096  # the tokenizer's Python lists are ten times the size of the arrays kept


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EncodedDataset:
    """Tokenised records.

    Attributes:
        ids: int32 [total tokens], every record's tokens one after the other.
        starts: int64 [n], where a record begins in `ids`.
        lengths: int64 [n], its number of tokens.
        labels: int64 class ids or float32 scores, shape [n].
        pad_token_id: fills a batch to the right of short records.
        token_type_ids: int32 [total tokens], or None where the tokenizer gives none.
        pad_token_type_id: the same for `token_type_ids`.
        longest: tokens of the longest record that there could be; public.
    """

    ids: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    pad_token_id: int
    token_type_ids: np.ndarray | None = None
    pad_token_type_id: int = 0
    longest: int = 512

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:  # private tokens must not reach a log by way of a repr
        return f"EncodedDataset({len(self)} records)"

    def subset(self, indices: np.ndarray) -> EncodedDataset:
        """The records at `indices` (int64 [m]), in that order; the tokens are shared, not copied."""
        return dataclasses.replace(
            self, starts=self.starts[indices], lengths=self.lengths[indices], labels=self.labels[indices]
        )

    def batch(
        self, indices: np.ndarray, device: torch.device | str = "cpu", *, shape: tuple[int, int] | None = None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The records at `indices`, padded on the right to the longest of them, or to a given shape.

        Args:
            indices: int64 [m]; may be empty and may repeat.
            device: where the tensors go.
            shape: rows >= m and columns >= longest; rows that no record fills are dummies of one padding token.

        Returns:
            `input_ids`, `attention_mask` and, if the tokenizer gives them, `token_type_ids`, int64 [rows, columns]; and
            the labels [rows], int64 for classes, float32 for scores, 0 for dummies.
        """
        lengths = self.lengths[indices]
        rows, width = shape or (len(indices), int(lengths.max(initial=0)))
        dummies = rows - len(indices)
        columns = np.arange(width)
        real = columns < np.pad(lengths, (0, dummies))[:, None]
        positions = np.pad(self.starts[indices], (0, dummies))[:, None] + columns
        inputs = {
            "input_ids": _gather(self.ids, positions, real, self.pad_token_id),
            "attention_mask": real.astype(np.int64),
        }
        inputs["attention_mask"][len(indices) :, :1] = 1  # a row that attends to nothing would be no number
        if self.token_type_ids is not None:
            inputs["token_type_ids"] = _gather(self.token_type_ids, positions, real, self.pad_token_type_id)
        tensors = {name: _put(array, device) for name, array in inputs.items()}
        return tensors, _put(np.pad(self.labels[indices], (0, dummies)), device)


def _put(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    # From pageable memory a copy waits for all that the device has still to do. torch keeps a pinned block until it is
    # copied, so that the tensor may be dropped at once.
    return tensor.pin_memory().to(device, non_blocking=True)


def _gather(flat: np.ndarray, positions: np.ndarray, real: np.ndarray, padding: int) -> np.ndarray:
    # The last record's padding points past the end of `flat`; clipped, it reads a token that `where` discards.
    return np.where(real, flat.take(positions, mode="clip"), np.int64(padding)) if positions.size else positions


def encode(records: Records, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedDataset:
    """Tokenise single texts or pairs as the model expects them, special tokens included.

    Args:
        records: n records of one or two texts.
        tokenizer: of the base model; its padding side does not matter.
        max_length: longest row in tokens; a longer text is cut, of a pair the longer one first. A model that takes
            fewer tokens cuts there.
    """
    limit = min(max_length, tokenizer.model_max_length)
    ids, types, lengths = [np.empty(0, np.int32)], [], [np.empty(0, np.int64)]
    for start in range(0, len(records), _RECORDS_PER_CALL):
        chunk = tuple(column[start : start + _RECORDS_PER_CALL] for column in records.texts)
        rows = tokenizer(*chunk, truncation=True, max_length=limit, padding=False, return_attention_mask=False)
        lengths.append(np.fromiter(map(len, rows["input_ids"]), np.int64))
        ids.append(_flat(rows["input_ids"]))
        if "token_type_ids" in rows:
            types.append(_flat(rows["token_type_ids"]))
    all_lengths = np.concatenate(lengths)
    # Decoders often have no padding token; what fills masked places does not matter to them.
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    return EncodedDataset(
        ids=np.concatenate(ids),
        starts=np.cumsum(all_lengths) - all_lengths,
        lengths=all_lengths,
        labels=records.labels,
        pad_token_id=pad,
        token_type_ids=np.concatenate(types) if types else None,
        pad_token_type_id=tokenizer.pad_token_type_id,
        longest=limit,
    )


def _flat(rows: list[list[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), np.int32)
