"""What a step asks of torch: dispatched operations and floating-point operations. Exact, whatever else is running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class _Count(TorchDispatchMode):
    """Counts every operation that reaches the backend, forward and backward."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return function(*args, **(kwargs or {}))


def count_operations(step: Callable[[], None]) -> dict[str, int]:
    """Operations and matrix-product FLOPs of one call of `step`."""
    with _Count() as counter:
        step()
    with FlopCounterMode(display=False) as flops:
        step()
    return {"operations": counter.operations, "flops": flops.get_total_flops()}
