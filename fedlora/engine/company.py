"""A check, on the machine at hand, that no record can tell in another's gradient, logits or embedding.

Clipping bounds what a record adds to a sum, and not what its presence changes in the contributions of others.
In micro-batches of fixed shape (`engine.batching`) it changes nothing if the kernels treat every row alike. They do
wherever this was measured, but no library promises it, so it is looked at before a private run, with public tokens.

Which other numbers of rows give the very same bits differs by machine, dtype and width (for MiniLM on one CPU and at 16
tokens, 32 rows beside 64 in bfloat16, 16 too in float32). Where they do, a micro-batch that few records fill may be
smaller, though how many they are is private: nothing of it shows in any gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters.methods import Turn
from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import Batch, GradientBackend
from fedlora.engine.batching import Quantity
from fedlora.engine.prototypes import unit_embeddings
from fedlora.models import Classifier
from fedlora.privacy.projection import LowPass
from fedlora.randomness import PublicSeed

_TOKENS = 1024
"""So many are compared at least between numbers of rows. Another kernel shows in float32 at once. In bfloat16 rounding
hides most of it: a number comes out otherwise with a chance of some 3e-5, so that it takes thousands of numbers to see
one that does. The smallest product of a record, its attention scores, has heads · T² of them in each layer; on MiniLM
every sixth record of 8 tokens showed it."""


@dataclass(frozen=True, kw_only=True)
class Company:
    """Looks at what a back end and its classifier give in different company.

    Attributes:
        backend: whose gradients and logits are to be private.
        vocabulary: size of the model's vocabulary.
        num_labels: C; 1 for scores.
        device: of the back end.
        projection: of gradients before they are clipped, if there is one.
        turns: what steps of training take gradients of; None: of everything.
        classifier: whose embeddings are to be private; without it, none are found to agree.
    """

    backend: GradientBackend
    vocabulary: int
    num_labels: int
    device: torch.device
    projection: LowPass | None = None
    turns: Sequence[Turn | None] = (None,)
    classifier: Classifier | None = None

    def agreeing_rows(
        self, columns: int, counts: Sequence[int], clients: int, quantity: Quantity = "gradients"
    ) -> tuple[int, ...]:
        """Those of `counts` in which every record has the bits that it has in the largest, whoever is beside it.

        What is compared is each record's gradient, projected if it will be, and its product with a vector: a search
        clips such products, whose rounding can be all that is left of them. Logits and embeddings are compared as
        `engine.confusion` and `engine.prototypes` take them, which is by other kernels: of a forward without gradients,
        and under one flat vector or without any.

        Args:
            columns: of the micro-batches.
            counts: numbers of rows, ascending.
            clients: one, or more: their adapters are copied for each record.
            quantity: what is compared.

        Returns:
            None of them if records have influence in the largest.
        """
        *fewer, most = counts
        if most == 2:
            return (most,)  # a record beside a dummy is alone
        if quantity == "embeddings" and self.classifier is None:
            return ()
        draw = PublicSeed.from_int(0).numpy("company", columns)
        size = max(_TOKENS // columns, most - 1) if fewer else most - 1
        shape = (min(clients, 2) if self.backend.fuses_clients else 1, sum(self.backend.slot_sizes))
        theta = torch.from_numpy(draw.normal(0, 0.3, shape)).float().to(self.device)
        dataset = _random_records(draw, 2 * size, columns, self.vocabulary, self.num_labels)
        members, others = np.split(np.arange(2 * size), 2)

        def prints(present: np.ndarray, rows: int) -> dict[int, int]:
            found: dict[int, int] = {}
            for start in range(0, len(present), rows - 1):
                own = present[start : start + rows - 1]
                batch, labels = dataset.batch(own, self.device, shape=(rows, columns))
                owner = torch.from_numpy(np.resize(own, rows) % len(theta)).to(self.device)
                values = _fingerprints(self._computed(quantity, theta, batch, labels, owner))
                found |= zip(own.tolist(), values.tolist(), strict=False)  # without the dummies'
            return found

        wanted = prints(members, most)
        mixed = np.stack([members[::-1], others]).T.ravel()  # every member in other company, half of it not members
        if not all(_agree(prints(present, most), wanted) for present in (mixed, members[-1:])):
            return ()
        return (*(rows for rows in fewer if _agree(prints(members, rows), wanted)), most)

    def _computed(
        self, quantity: Quantity, theta: Tensor, batch: Batch, labels: Tensor, owner: Tensor
    ) -> Sequence[Tensor]:
        """What a release makes of a micro-batch, each [N, …]."""
        if quantity == "logits":
            return [self.backend.logits(theta[0], batch)]
        if quantity == "embeddings" and self.classifier is not None:
            return [unit_embeddings(self.classifier, batch)]
        found = []
        for turn in self.turns:  # each takes its own kernels
            gradients = self.backend.gradients(theta, batch, labels, owner, turn)
            found += gradients if self.projection is None else [self.projection(part) for part in gradients]
        return found


def _agree(found: dict[int, int], wanted: dict[int, int]) -> bool:
    return all(wanted[record] == value for record, value in found.items() if record in wanted)


def _random_records(
    draw: np.random.Generator, count: int, columns: int, vocabulary: int, num_labels: int
) -> EncodedDataset:
    lengths = draw.integers(max(1, columns - 3), columns + 1, count)
    labels = draw.integers(0, num_labels, count) if num_labels > 1 else draw.normal(size=count).astype(np.float32)
    ids = draw.integers(0, vocabulary, lengths.sum()).astype(np.int32)
    return EncodedDataset(ids=ids, starts=np.cumsum(lengths) - lengths, lengths=lengths, labels=labels, pad_token_id=0)


def _fingerprints(parts: Sequence[Tensor]) -> Tensor:
    """[N] int64, of all bits of each record's row and of its product with ones: sums of integers, in whatever order."""
    total = torch.zeros(len(parts[0]), dtype=torch.int64, device=parts[0].device)
    draw = PublicSeed.from_int(0).numpy("fingerprint")
    for part in parts:
        wide = part.double()
        product = torch.linalg.vecdot(wide, wide.new_ones(wide.shape))[:, None].contiguous()
        for bits in (part.view(torch.int32), product.view(torch.int64)):
            weights = draw.integers(-(2**63), 2**63 - 1, bits.shape[1], dtype=np.int64) | 1
            total += (bits.long() * torch.from_numpy(weights).to(bits.device)).sum(dim=1)
    return total
