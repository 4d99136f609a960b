"""DeBERTa v2 and v3, where one projection serves the records and the relative positions that all records share.

The shared input has batch size 1, so it has no row for a record's own leaf. Running the unmodified attention under
`torch.func.vmap`, one record a lane, gives each lane its own leaf and lets autograd return them stacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.func import vmap


class Adapted(Protocol):
    """An adapted linear, whose leaves [N, *shape] are set for one forward."""

    expanded: dict[str, Tensor]


class PerRecordAttention(nn.Module):
    """DeBERTa's disentangled self-attention `base`, record by record in one vectorised call."""

    def __init__(self, base: nn.Module, adapted: Sequence[Adapted]) -> None:
        super().__init__()
        self.base = base
        self._adapted = adapted

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """As DeBERTa's own: hidden [N, T, d] to context [N, T, d], without attention weights."""
        shared = (False, query_states, relative_pos, rel_embeddings)
        if not any(module.expanded for module in self._adapted):
            return self.base(hidden, mask, *shared)[0], None
        leaves = [dict(module.expanded) for module in self._adapted]

        def one_record(own: list[dict[str, Tensor]], states: Tensor, own_mask: Tensor) -> Tensor:
            for module, values in zip(self._adapted, own, strict=True):
                module.expanded = {name: value[None] for name, value in values.items()}
            context: Tensor = self.base(states[None], own_mask[None], *shared)[0][0]
            return context

        return vmap(one_record)(leaves, hidden, mask), None
