"""A flat vector as Flower's strategies know models: an ArrayRecord with an array of float32 for each slot, by name."""

from __future__ import annotations

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedlora.adapters.slots import AdapterLayout
from fedlora.errors import ProtocolError


def to_arrays(flat: Tensor, layout: AdapterLayout) -> ArrayRecord:
    """`flat` [P] slot by slot, in the layout's order; shares no memory with it."""
    views = {slot.name: layout.view(flat, slot) for slot in layout.slots}
    return ArrayRecord({name: Array(view.detach().cpu().float().numpy()) for name, view in views.items()})


def from_arrays(arrays: ArrayRecord, layout: AdapterLayout) -> Tensor:
    """The flat vector [P] of float32 that `arrays` spell out, in whichever order.

    Raises:
        ProtocolError: there are other arrays than the layout's slots, of another shape, or of no floating numbers.
    """
    wanted = {slot.name: slot.shape for slot in layout.slots}
    if differing := sorted(arrays.keys() ^ wanted.keys()):
        shown = ", ".join(differing[:3]) + (", …" if len(differing) > 3 else "")
        raise ProtocolError(
            f"the arrays have {len(arrays)} names, wanted the {len(wanted)} trained slots; they differ in {shown}. "
            "Start from the initial arrays of this run"
        )
    flat = torch.empty(layout.size)
    for slot in layout.slots:
        try:
            array = arrays[slot.name].numpy()
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"array {slot.name} cannot be read, wanted a NumPy array") from error
        if array.shape != slot.shape or not np.issubdtype(array.dtype, np.floating):
            raise ProtocolError(
                f"array {slot.name} has shape {array.shape} of {array.dtype}, wanted {slot.shape} of float32"
            )
        layout.view(flat, slot).copy_(torch.from_numpy(array.astype(np.float32)))
    return flat
