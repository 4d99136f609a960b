"""Per-record gradients from Opacus' GradSampleModule: the general and the reference back end.

Same layout, plan, clipping, noise and optimiser as every back end; only the gradients come from Opacus' hooks. One
client at a time, since a module has one weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlora.adapters.slots import AdapterLayout
from fedlora.engine.backend import Batch, record_losses
from fedlora.engine.expanded import refuse_shared_inputs
from fedlora.models import Classifier


class _LoraLinear(nn.Module):
    """y = base(x) + scale * B(x Aᵀ) with B an ordinary trainable linear, which Opacus knows how to sample."""

    def __init__(self, base: nn.Linear, factor: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.register_buffer("factor", factor.to(base.weight), persistent=False)
        self.lora_b = nn.Linear(factor.shape[0], base.out_features, bias=False, device=base.weight.device)
        nn.init.zeros_(self.lora_b.weight)  # the base model, until a vector is loaded

    def forward(self, x: Tensor) -> Tensor:
        inner = (x @ self.factor.T).float()  # type: ignore[operator]
        update: Tensor = self.scale * self.lora_b(inner)
        return self.base(x) + update.to(x.dtype)  # type: ignore[no-any-return]


class OpacusBackend:
    """Wraps `classifier` in GradSampleModule with the layout's slots as its only trainable parameters."""

    fuses_clients = False

    def __init__(self, classifier: Classifier, layout: AdapterLayout, factors: Mapping[str, Tensor]) -> None:
        """Attach; arguments and errors as in `ExpandedBackend`."""
        from opacus import GradSampleModule

        refuse_shared_inputs(classifier, factors)
        self.layout = layout
        self.slot_sizes = tuple(slot.size for slot in layout.slots)
        parameters: dict[str, Tensor] = {}
        for path, module in classifier.target_modules(list(factors)).items():
            replacement = _LoraLinear(module, factors[path], layout.scale)
            classifier.replace_module(path, replacement)
            parameters[f"{path}/B"] = replacement.lora_b.weight
        for path, module in classifier.head_modules().items():
            parameters[f"head:{path}/weight"] = module.weight
            if module.bias is not None:
                parameters[f"head:{path}/bias"] = module.bias
        self._parameters = [parameters[slot.name].requires_grad_() for slot in layout.slots]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Opacus warns of hooks it sets itself
            self._wrapped = GradSampleModule(classifier, loss_reduction="sum").train()

    def gradients(self, theta: Tensor, batch: Batch, labels: Tensor, owner: Tensor) -> list[Tensor]:
        self._load(theta[int(owner[0])])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Using a non-full backward hook": Opacus' own choice
            record_losses(self._wrapped(batch), labels).sum().backward()
        gradients = [parameter.grad_sample.flatten(1).float() for parameter in self._parameters]  # type: ignore[attr-defined]
        for parameter in self._parameters:
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
        return gradients

    @torch.no_grad()
    def logits(self, theta: Tensor, batch: Batch) -> Tensor:
        self._load(theta)
        return self._wrapped(batch)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _load(self, theta: Tensor) -> None:
        for slot, parameter in zip(self.layout.slots, self._parameters, strict=True):
            parameter.copy_(self.layout.view(theta, slot))
