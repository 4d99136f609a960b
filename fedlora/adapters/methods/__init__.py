"""Federated LoRA methods: what each trains and sends (`method`), its slots (`layout`), algebra of products."""

from fedlora.adapters.methods.layout import (
    Places,
    Subspace,
    build_layout,
    check_places,
    factors_in,
    frozen_factor,
    frozen_factors,
    frozen_parts,
    slot_shapes,
    subspace,
)
from fedlora.adapters.methods.method import METHODS, Method, Parts, Turn, method_of

__all__ = [
    "METHODS",
    "Method",
    "Parts",
    "Places",
    "Subspace",
    "Turn",
    "build_layout",
    "check_places",
    "factors_in",
    "frozen_factor",
    "frozen_factors",
    "frozen_parts",
    "method_of",
    "slot_shapes",
    "subspace",
]
