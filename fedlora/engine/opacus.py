"""Per-record gradients from Opacus' GradSampleModule: the general and the reference back end.

Same layout, plan, clipping, noise and optimiser as every back end; only the gradients come from Opacus' hooks. One
client at a time, since a module has one weight.

Modules that share an adapter share its weight, each in a linear of its own. Of one linear inside several modules Opacus
would hook every occurrence, and count each use as often as there are modules.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlora.adapters.methods import Turn
from fedlora.adapters.methods.layout import Places, check_places, factors_in
from fedlora.adapters.slots import AdapterLayout
from fedlora.engine.attachment import Attachment, Replacement
from fedlora.engine.backend import Batch, record_losses
from fedlora.engine.expanded import refuse_shared_inputs
from fedlora.models import Classifier


class _LoraLinear(Replacement):
    """y = base(x) + scale * B(R(x Aᵀ)) with each factor an ordinary linear, which Opacus knows how to sample."""

    def __init__(self, base: nn.Linear, factors: Mapping[str, nn.Parameter], scale: float) -> None:
        super().__init__(base)
        self.scale = scale
        chain = []
        for factor in ("A", "R", "B"):
            if factor in factors:
                height, width = factors[factor].shape
                linear = nn.Linear(width, height, bias=False, device="meta")
                linear.weight = factors[factor]
                chain.append(linear)
        self.chain = nn.Sequential(*chain)

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.scale * self.chain(x.float())
        return self.base(x) + update.to(x.dtype)  # type: ignore[no-any-return]


class OpacusBackend:
    """Wraps `classifier` in GradSampleModule with the layout's slots as its only trainable parameters."""

    fuses_clients = False

    def __init__(
        self,
        classifier: Classifier,
        layout: AdapterLayout,
        factors: Mapping[str, Tensor],
        places: Places,
        *,
        outer: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Attach; arguments and errors as in `ExpandedBackend`."""
        from opacus import GradSampleModule

        check_places(layout, places)
        refuse_shared_inputs(classifier, [path for own in places.values() for path in own])
        self._attachment = Attachment(classifier)
        self.classifier, self.layout = classifier, layout
        self.slot_sizes = tuple(slot.size for slot in layout.slots)
        trained = self._adapt({"A": factors, "B": outer or {}}, places) | self._copy_head()
        self._parameters = [trained[slot.name].requires_grad_() for slot in layout.slots]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Opacus warns of hooks it sets itself
            self._wrapped = GradSampleModule(classifier, loss_reduction="sum").train()

    def gradients(
        self, theta: Tensor, batch: Batch, labels: Tensor, owner: Tensor, turn: Turn | None = None
    ) -> list[Tensor]:
        self._load(theta[int(owner[0])])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Using a non-full backward hook": Opacus' own choice
            record_losses(self._wrapped(batch), labels).sum().backward()
        gradients = [
            parameter.grad_sample.flatten(1).float()  # type: ignore[attr-defined]
            for slot, parameter in zip(self.layout.slots, self._parameters, strict=True)
            if turn is None or slot.part in turn.parts
        ]
        for parameter in self._parameters:
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
        return gradients

    def detach(self) -> None:
        if self._attachment.holds:  # else Opacus would clean up after whoever is attached now
            self._wrapped.to_standard_module()
            self._attachment.undo()
            self.classifier.eval()

    @torch.no_grad()
    def logits(self, theta: Tensor, batch: Batch) -> Tensor:
        self._load(theta)
        return self._wrapped(batch)  # type: ignore[no-any-return]

    def _adapt(self, frozen: Mapping[str, Mapping[str, Tensor]], places: Places) -> dict[str, nn.Parameter]:
        """Replace the adapted linears; their trained factors by slot name, zero until a vector is loaded."""
        trained: dict[str, nn.Parameter] = {}
        slots = {slot.name: slot for slot in self.layout.slots}
        for name, own in places.items():
            linears = self.classifier.target_modules(own)
            device = linears[own[0]].weight.device
            factors = {
                factor: nn.Parameter(kept[name].to(device), requires_grad=False)
                for factor, kept in frozen.items()
                if name in kept
            }
            for factor in factors_in(self.layout):
                slot = slots[f"{name}/{factor}"]
                trained[slot.name] = factors[factor] = nn.Parameter(torch.zeros(slot.shape, device=device))
            for path in own:
                replacement = _LoraLinear(linears[path], factors, self.layout.scale)
                self._attachment.replace(path, linears[path], replacement)
        return trained

    def _copy_head(self) -> dict[str, nn.Parameter]:
        """Replace a trained head's linears by copies, since vectors are loaded into them; theirs by slot name."""
        names = {slot.name for slot in self.layout.slots}
        trained: dict[str, nn.Parameter] = {}
        for path, module in self.classifier.head_modules().items():
            if f"head:{path}/weight" in names:
                own = copy.deepcopy(module)
                self._attachment.replace(f"head:{path}", module, own)
                trained |= {f"head:{path}/{suffix}": parameter for suffix, parameter in own.named_parameters()}
        return trained

    @torch.no_grad()
    def _load(self, theta: Tensor) -> None:
        self._attachment.confirm()
        for slot, parameter in zip(self.layout.slots, self._parameters, strict=True):
            parameter.copy_(self.layout.view(theta, slot))
