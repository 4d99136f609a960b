"""A check, on the machine at hand, that no record can tell in another's gradient.

Clipping bounds what a record adds to a sum, and not what its presence changes in the contributions of others.
In micro-batches of fixed shape (`engine.batching`) it changes nothing if the kernels treat every row alike. They do
wherever this was measured, but no library promises it, so it is looked at before a private run, with public tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import GradientBackend
from fedlora.errors import PrivacyError
from fedlora.privacy.projection import LowPass
from fedlora.randomness import PublicSeed

_WIDTHS = (8, 24)


def check_company(
    backend: GradientBackend, *, vocabulary: int, num_labels: int, token_budget: int, longest: int, device: torch.device
) -> None:
    """Compare one record's gradient alone, beside others, and in another row, to the last bit.

    And what is made of gradients before they are clipped: their low frequencies, inner products of them.

    Args:
        backend: whose gradients are to be private.
        vocabulary: size of the model's vocabulary.
        num_labels: C; 1 for scores.
        token_budget: as in training; from it follow the shapes.
        longest: tokens that the model can take.

    Raises:
        PrivacyError: the gradients differ.
    """
    draw = PublicSeed.from_int(0).numpy("company")
    theta = torch.from_numpy(draw.normal(0, 0.3, (2, sum(backend.slot_sizes)))).float().to(device)
    for width in sorted({min(width, longest) for width in _WIDTHS}):
        rows = max(2, token_budget // width)
        dataset = _random_records(draw, 2 * rows, width, vocabulary, num_labels)
        crowd, others = np.arange(rows - 1), np.arange(rows, 2 * rows - 2)
        alone, *beside = (
            _gradient(backend, theta, dataset, members, row, (rows, width), device)
            for members, row in ((crowd[:1], 0), (crowd, 0), (np.append(others, 0), len(others)))
        )
        if not all(torch.equal(alone, seen) for seen in beside):
            raise PrivacyError(
                f"on this machine a record's gradient depends on the records beside it (micro-batches of {rows} by "
                f"{width} tokens on {device}), so that clipping does not bound what one record changes; "
                "set engine.token_budget=1 to take records one by one, or try model.dtype=float32 or another "
                "model.attention"
            )


def _random_records(
    draw: np.random.Generator, count: int, width: int, vocabulary: int, num_labels: int
) -> EncodedDataset:
    lengths = draw.integers(max(1, width - 3), width + 1, count)
    labels = draw.integers(0, num_labels, count) if num_labels > 1 else draw.normal(size=count).astype(np.float32)
    ids = draw.integers(0, vocabulary, lengths.sum()).astype(np.int32)
    return EncodedDataset(ids=ids, starts=np.cumsum(lengths) - lengths, lengths=lengths, labels=labels, pad_token_id=0)


def _gradient(
    backend: GradientBackend,
    theta: Tensor,
    dataset: EncodedDataset,
    members: np.ndarray,
    row: int,
    shape: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """Of the record in `row` of a micro-batch of `members`, the others another client's where that can be.

    Its gradient [P], the projection of each slot, and each slot's product with a vector.
    """
    batch, labels = dataset.batch(members, device, shape=shape)
    owner = torch.full(shape[:1], int(backend.fuses_clients), device=device)
    owner[row] = 0
    seen = []
    for part in backend.gradients(theta, batch, labels, owner):
        wide = part.double()
        seen += [part[row], LowPass(0.5)(part)[row], torch.linalg.vecdot(wide, wide.new_ones(wide.shape))[row, None]]
    return torch.cat(seen)
