"""Federated LoRA methods: what each trains and sends (`method`, here), its slots (`layout`), algebra of `products`."""

from fedlora.adapters.methods.method import METHODS, Method, Parts, Turn, method_of

__all__ = ["METHODS", "Method", "Parts", "Turn", "method_of"]
