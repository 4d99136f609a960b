"""Frozen-prefix cache: what the blocks below the lowest adapted one make of a record, computed once and kept.

The base is frozen and without dropout, so these blocks give the same hidden states for a record at every step. They
are computed in the largest shapes of training (`engine.batching`), and only those of a record's own tokens are kept,
since nobody attends to padding. Then gradients are the same to the last bit with the cache and without, which is
looked at on the machine at hand: whether and where states are kept depends on how many tokens there are, and must not
show.

What it saves. With L of D blocks below the lowest adapted one, a step takes D block forwards and D - L backwards of
about a forward's cost each: the base is frozen, so that only gradients of inputs and of B are taken. The cache leaves
L out of these 2 D - L. Filling it takes L once per record, so that it is even after one visit of each record.
"""

from __future__ import annotations

import dataclasses
import mmap
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import GradientBackend
from fedlora.engine.batching import Shapes, fixed_shapes
from fedlora.engine.device_memory import free_bytes, free_host_bytes
from fedlora.errors import PrivacyError
from fedlora.models import Classifier
from fedlora.randomness import PublicSeed

_FEWEST_VISITS = 2.0
"""One for filling, one for gathering and moving the states and for runs that end early."""
_WIDTHS = (8, 24)  # at which the cache is compared with none


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes that kept states may take, by place and in the order in which the places are tried; 0 closes a place."""

    accelerator: int = 0
    """On the device of the base, unless that is the CPU."""
    memory: int
    disk: int = 0
    """In a file without a name, in the folder for temporary files ($TMPDIR)."""

    @classmethod
    def beside(cls, device: torch.device) -> Room:
        """A quarter of what is free on `device` and on the host by now, and nothing on disk."""
        free = free_bytes(device) if device.type == "cuda" else 0
        return cls(accelerator=free // 4, memory=free_host_bytes() // 4)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PrefixedDataset(EncodedDataset):
    """Records with the hidden states that a block is given; their memory goes with the last reference.

    Attributes:
        states: [total kept tokens, h] in the base's dtype, every kept record's tokens one after the other.
        states_from: int64 [n], where a record begins in `states`; -1 where it is not kept.
        block: the one that is given them.
    """

    states: Tensor
    states_from: np.ndarray
    block: int

    def subset(self, indices: np.ndarray) -> PrefixedDataset:
        part = cast(PrefixedDataset, super().subset(indices))
        return dataclasses.replace(part, states_from=self.states_from[indices])

    def batch(
        self, indices: np.ndarray, device: torch.device | str = "cpu", *, shape: tuple[int, int] | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """As without a cache, and the records' states [rows, columns, h], zeros where nothing is attended to.

        Raises:
            PrivacyError: one of them is not kept. To leave the states of all out would show in theirs.
        """
        starts = self.states_from[indices]
        if (starts < 0).any():
            raise PrivacyError("records of a batch have no states kept; keep those of all")  # how many is private
        inputs, labels = super().batch(indices, device, shape=shape)
        rows, columns = inputs["input_ids"].shape
        real = np.arange(columns) < self.lengths[indices, None]
        sources = torch.from_numpy((starts[:, None] + np.arange(columns))[real]).to(self.states.device)
        own = self.states.index_select(0, sources).to(device)
        padded = own.new_zeros(rows * columns, own.shape[1])
        padded.index_copy_(0, torch.from_numpy(np.flatnonzero(real)).to(device), own)
        inputs[Classifier.states_key(self.block)] = padded.view(rows, columns, -1)
        return inputs, labels


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The blocks below the lowest adapted one, and how training runs them.

    Attributes:
        classifier: nothing is adapted in its first `blocks` blocks.
        blocks: how many; `models.families.blocks_below` tells.
        shapes, clients, expected: how training cuts its micro-batches, as in `Shapes.cut`.
        device: of the classifier.
    """

    classifier: Classifier
    blocks: int
    shapes: Shapes
    clients: int
    expected: float
    device: torch.device

    def blocks_of(self) -> tuple[Classifier, int, Shapes]:
        """What the states depend on; how a call cuts its shapes must not show in them."""
        return self.classifier, self.blocks, self.shapes

    def pays(self, visits: float) -> bool:
        """Whether keeping states is faster than making them anew, from public facts alone.

        Args:
            visits: how often a record will still be drawn: sampling probability times steps to come.
        """
        return self.blocks > 0 and visits >= _FEWEST_VISITS

    def changes_nothing(self, backend: GradientBackend, longest: int, made_by: Prefix | None = None) -> bool:
        """Compare gradients with kept states and without, to the last bit, on public random tokens.

        Args:
            backend: attached to the classifier.
            longest: tokens that the model can take.
            made_by: of the same blocks, in whose shapes the states were made; by default in these.
        """
        made_by = made_by or self
        draw, tokenizer = PublicSeed.from_int(0).torch("prefix"), self.classifier.tokenizer
        # As in training: the adapters of a lone client are not copied for each record.
        copies = min(self.clients, 2) if backend.fuses_clients else 1
        theta = 0.3 * torch.randn(copies, sum(backend.slot_sizes), generator=draw)
        for columns in sorted({min(columns, longest) for columns in _WIDTHS}):
            rows = self._rows(columns)
            mask = torch.arange(columns) < columns - torch.arange(rows)[:, None] % 4
            mask[:, 0] = True
            ids = torch.randint(len(tokenizer), (rows, columns), generator=draw)
            ids = torch.where(mask, ids, tokenizer.pad_token_id)  # by which some heads find the last token
            batch = {"input_ids": ids.to(self.device), "attention_mask": mask.long().to(self.device)}
            states = self._states_in_rows_of(made_by._rows(columns), batch) * batch["attention_mask"].unsqueeze(2)
            labels = torch.zeros(rows, dtype=torch.int64 if self.classifier.num_labels > 1 else torch.float32)
            owner = torch.arange(rows, device=self.device) % copies
            own = (theta.to(self.device), labels.to(self.device), owner)
            plain, kept = (
                backend.gradients(own[0], given, *own[1:])
                for given in (batch, batch | {Classifier.states_key(self.blocks): states})
            )
            if not all(torch.equal(one, other) for one, other in zip(plain, kept, strict=True)):
                return False
        return True

    def keep(self, dataset: EncodedDataset, records: np.ndarray, room: Room) -> EncodedDataset:
        """`dataset` with the states of `records` (positions, int64), or as it is where there is no room for them."""
        records = np.unique(records)
        dummies, _ = dataset.batch(records[:0], self.device, shape=(2, 1))
        like = self.classifier.states_before(self.blocks, dummies)[0, :0]
        tokens = int(dataset.lengths[records].sum())
        needed = tokens * like.shape[1] * like.element_size()
        cut = fixed_shapes(
            dataset.lengths[records], self.shapes.token_budget, dataset.longest, lambda columns: (self._rows(columns),)
        )
        groups = [(records[group.positions], (group.rows, group.columns)) for group in cut]
        parts = (self._own_states(dataset, members, shape) for members, shape in groups)
        states: Tensor | None = None
        if self.device.type != "cpu" and needed <= room.accelerator:
            states = _in_memory(parts, like.new_empty(tokens, like.shape[1]))
        elif needed <= room.memory:
            states = _in_memory(parts, like.new_empty(tokens, like.shape[1], device="cpu"))
        elif needed <= room.disk:
            states = _on_disk(parts, needed, like)
        if states is None:
            return dataset
        order = np.concatenate([records[:0], *(members for members, _ in groups)])
        states_from = np.full(len(dataset), -1)
        states_from[order] = np.cumsum(dataset.lengths[order]) - dataset.lengths[order]
        return PrefixedDataset(**{**vars(dataset), "states": states, "states_from": states_from, "block": self.blocks})

    def _rows(self, columns: int) -> int:
        """Of the micro-batches in which states are made: the most that training takes, however few are left to fill."""
        return self.shapes.row_counts(columns, self.clients, self.expected)[-1]

    def _own_states(self, dataset: EncodedDataset, members: np.ndarray, shape: tuple[int, int]) -> Tensor:
        """Of the tokens of `members`, one record after the other: [tokens, h]."""
        batch, _ = dataset.batch(members, self.device, shape=shape)
        states = self.classifier.states_before(self.blocks, batch)
        return states[: len(members)][batch["attention_mask"][: len(members)].bool()]

    def _states_in_rows_of(self, rows: int, batch: dict[str, Tensor]) -> Tensor:
        """As they come out of micro-batches of `rows` rows, the last filled up with what the first began with."""
        count = len(batch["input_ids"])
        parts = [torch.arange(start, start + rows) % count for start in range(0, count, rows)]
        taken = [{name: tensor[part.to(self.device)] for name, tensor in batch.items()} for part in parts]
        return torch.cat([self.classifier.states_before(self.blocks, part) for part in taken])[:count]


class PrefixCache:
    """Keeps the states of a process's records from round to round, for the adapters in use by then."""

    def __init__(self, dataset: EncodedDataset, records: np.ndarray, room: Room) -> None:
        """Nothing is kept yet.

        Args:
            dataset: the records of all clients in this process, and possibly others.
            records: positions of those that any of these clients may train on.
            room: for the states.
        """
        self._plain, self._records, self._room = dataset, records, room
        self._kept: tuple[Prefix, EncodedDataset] | None = None
        self._changes_nothing: dict[Prefix, bool] = {}

    def dataset(self, prefix: Prefix, backend: GradientBackend, visits: float) -> EncodedDataset:
        """The data set, with states where they pay, change nothing and find room; made once for the same blocks.

        Args:
            prefix: what is to be left out. Calls of other clients may cut other shapes: the same states serve all in
                which they change nothing.
            backend: attached to its classifier.
            visits: as in `Prefix.pays`.
        """
        if self._kept is None or self._kept[0].blocks_of() != prefix.blocks_of():
            self.close()
            worth = prefix.pays(visits) and prefix.changes_nothing(backend, self._plain.longest)
            self._changes_nothing = {prefix: worth}
            self._kept = prefix, prefix.keep(self._plain, self._records, self._room) if worth else self._plain
        made_by, kept = self._kept
        if kept is not self._plain and prefix not in self._changes_nothing:
            self._changes_nothing[prefix] = prefix.changes_nothing(backend, self._plain.longest, made_by)
        return kept if self._changes_nothing.get(prefix, False) else self._plain

    def without_states(self) -> EncodedDataset:
        """The data set as it is, for adapters that leave no block below them; room that was taken is given back."""
        self.close()
        return self._plain

    def close(self) -> None:
        """Give the room back; what was handed out keeps its own."""
        self._kept = None


def _in_memory(parts: Iterator[Tensor], states: Tensor) -> Tensor:
    end = 0
    for part in parts:
        states[end : end + len(part)] = part
        end += len(part)
    return states


def _on_disk(parts: Iterator[Tensor], needed: int, like: Tensor) -> Tensor | None:
    """A view of a file that has no name and is gone with the last reference or the process; None if it does not fit."""
    try:
        with tempfile.TemporaryFile() as file:
            if shutil.disk_usage(tempfile.gettempdir()).free < 2 * needed:
                return None
            for part in parts:
                file.write(part.view(torch.uint8).cpu().numpy().data)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # nobody writes, but torch warns of read-only
    except OSError:
        return None  # a full disk, a quota: training goes on without
    return torch.frombuffer(mapped, dtype=like.dtype).view(-1, like.shape[1])
