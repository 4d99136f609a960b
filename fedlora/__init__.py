"""fedlora: fine-tune language models across sites that keep their records, under a guarantee anyone can check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["RunConfig", "__version__", "load", "simulate"]

if TYPE_CHECKING:
    from fedlora.adapters.peft import load_classifier_from_export as load
    from fedlora.config import RunConfig
    from fedlora.experiments.simulate import simulate

_LAZY = {
    "RunConfig": ("fedlora.config", "RunConfig"),
    "load": ("fedlora.adapters.peft", "load_classifier_from_export"),
    "simulate": ("fedlora.experiments.simulate", "simulate"),
}


def __getattr__(name: str) -> Any:
    """Public names on first use, so that `import fedlora` loads no torch."""
    if name not in _LAZY:
        raise AttributeError(f"module fedlora has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)
