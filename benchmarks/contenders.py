"""One training step of FFA-LoRA, four ways, over the same weights, loss, batch and learning rate.

peft           plain PEFT with A frozen, no privacy: forward with labels, backward, SGD
opacus_hooks   the same model under PrivacyEngine, per-sample gradients by hooks
opacus_ghost   the same under ghost clipping; the loss goes through the criterion that make_private returns, since with
               the model's own `labels=` loss nothing would be clipped
fedlora        our engine: expanded leaves, clipping, Gaussian mechanism, SGD
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedlora.adapters.methods import layout as layouts
from fedlora.adapters.slots import AdapterLayout
from fedlora.config import RunConfig
from fedlora.engine.execution import DTYPES
from fedlora.engine.expanded import ExpandedBackend
from fedlora.models import Classifier, load_classifier
from fedlora.privacy.clipping import Clipping
from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.noise import HostNoise
from fedlora.randomness import PublicSeed, SecretRoot

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Execution:
    """Dtype of the frozen base and attention kernel; what trains is float32 always."""

    dtype: str
    attention: Any

    def __str__(self) -> str:
        return f"{self.dtype} {self.attention}"


@dataclass(frozen=True)
class Settings:
    """Bound, noise and rate of one step."""

    clip_norm: float = 1.0
    noise_multiplier: float = 1.0
    learning_rate: float = 0.1


@dataclass(frozen=True)
class Base:
    """A frozen classifier with its own random head, and the adapter's public parts."""

    classifier: Classifier
    layout: AdapterLayout
    factors: dict[str, Tensor]
    places: layouts.Places

    @classmethod
    def load(cls, execution: Execution) -> Base:
        config = RunConfig.from_mapping({}, ["model.head=frozen"])
        seed = PublicSeed.from_int(0)
        classifier = load_classifier(
            config.model,
            num_labels=2,
            seed=seed,
            dtype=DTYPES[execution.dtype],
            attention=execution.attention,
        )
        modules = classifier.target_modules(config.adapter.targets)
        places = {path: (path,) for path in modules}
        layout = layouts.build_layout(modules, {}, places=places, rank=config.adapter.rank, alpha=config.adapter.alpha)
        return cls(classifier, layout, layouts.frozen_factors(seed, modules, places, layout.rank), places)

    @cached_property
    def theta(self) -> Tensor:
        """[P] a B away from zero, the same for every contender."""
        return 0.3 * torch.randn(self.layout.size, generator=torch.Generator().manual_seed(1))


class Contender(Protocol):
    """Holds a model and takes steps on it."""

    def step(self, batch: Batch, labels: Tensor) -> None:
        """One whole step, from inputs to changed B, dividing by the number of records."""
        ...

    def theta(self) -> Tensor:
        """[P] the current B, in the layout's order."""
        ...


class Fedlora:
    """Our engine, step by step as `engine.training` does it for one client, over a batch that is given."""

    def __init__(self, base: Base, settings: Settings) -> None:
        self.backend = ExpandedBackend(base.classifier, base.layout, base.factors, base.places)
        self.rows = base.theta.repeat(1, 1)
        self.parameter = nn.Parameter(self.rows[0])
        self.optimizer = torch.optim.SGD([self.parameter], lr=settings.learning_rate)
        self.clipping = Clipping("flat", settings.clip_norm)
        self.mechanism = GaussianMechanism(settings.noise_multiplier)
        self.noise = HostNoise(SecretRoot.seeded(0).numpy("noise"))

    def step(self, batch: Batch, labels: Tensor) -> None:
        self.step_in_parts([(batch, labels)])

    def step_in_parts(self, parts: list[tuple[Batch, Tensor]]) -> None:
        """One step over the micro-batches of one logical batch."""
        total = torch.zeros_like(self.rows, dtype=torch.float64)
        for batch, labels in parts:
            owner = torch.zeros(len(labels), dtype=torch.int64)
            gradients = self.backend.gradients(self.rows.detach(), batch, labels, owner)
            self.clipping.add_clipped(total, gradients, owner)
        released = self.mechanism.privatize(
            total[0], sensitivity=self.clipping.clip_norm, noise=self.noise, slot_sizes=self.backend.slot_sizes
        )
        self.parameter.grad = released.div_(sum(len(labels) for _, labels in parts))
        self.optimizer.step()

    def theta(self) -> Tensor:
        return self.rows[0].detach().clone()


class PlainPeft:
    """PEFT's LoRA on the Hugging Face model, A frozen, without settings."""

    def __init__(self, base: Base, settings: Settings) -> None:
        self.model, self.parameters = peft_model(base)
        self.optimizer = torch.optim.SGD(self.parameters, lr=settings.learning_rate)

    def step(self, batch: Batch, labels: Tensor) -> None:
        self.model(**batch, labels=labels).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def theta(self) -> Tensor:
        return _flat(self.parameters)


class OpacusHooks:
    """PrivacyEngine's default mode."""

    mode = "hooks"

    def __init__(self, base: Base, settings: Settings) -> None:
        model, self.parameters = peft_model(base)
        self._make_private(model, settings)

    def _make_private(self, model: nn.Module, settings: Settings) -> None:
        from opacus import PrivacyEngine

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Batches are given, so Poisson sampling is off; its loader of one batch only says how to divide.
            made = PrivacyEngine().make_private(
                module=model.train(),
                optimizer=torch.optim.SGD(self.parameters, lr=settings.learning_rate),
                criterion=nn.CrossEntropyLoss(),
                data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1, 1))),
                noise_multiplier=settings.noise_multiplier,
                max_grad_norm=settings.clip_norm,
                poisson_sampling=False,
                grad_sample_mode=self.mode,
            )
        self.model, self.optimizer, self.criterion = made[0], made[1], made[2] if len(made) == 4 else None

    def step(self, batch: Batch, labels: Tensor) -> None:
        self.optimizer.expected_batch_size = len(labels)
        self.optimizer.zero_grad()
        self.model(**batch, labels=labels).loss.backward()
        self.optimizer.step()

    def theta(self) -> Tensor:
        return _flat(self.parameters)


class OpacusGhost(OpacusHooks):
    """PrivacyEngine's ghost clipping: norms first, then a second backward of the weighted loss."""

    mode = "ghost"

    def step(self, batch: Batch, labels: Tensor) -> None:
        assert self.criterion is not None
        self.optimizer.expected_batch_size = len(labels)
        self.optimizer.zero_grad()
        self.criterion(self.model(**batch).logits, labels).backward()
        self.optimizer.step()


CONTENDERS: dict[str, Callable[[Base, Settings], Contender]] = {
    "peft": PlainPeft,
    "fedlora": Fedlora,
    "opacus_hooks": OpacusHooks,
    "opacus_ghost": OpacusGhost,
}


def peft_model(base: Base) -> tuple[nn.Module, list[nn.Parameter]]:
    """`base` under PEFT with our A, frozen, and our B; and the B matrices in layout order."""
    from peft import LoraConfig, get_peft_model

    prefix = f"{base.classifier.network.base_model_prefix}."
    config = LoraConfig(
        r=base.layout.rank,
        lora_alpha=int(base.layout.alpha),
        lora_dropout=0.0,
        target_modules=[prefix + name for name in base.factors],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base.classifier.network, config)
    trained = []
    for slot in base.layout.slots:
        path = slot.name.removesuffix("/B")
        layer: Any = model.base_model.model.get_submodule(prefix + path)
        layer.lora_A["default"].weight.data.copy_(base.factors[path])
        layer.lora_A["default"].weight.requires_grad_(False)
        layer.lora_B["default"].weight.data.copy_(base.layout.view(base.theta, slot))
        trained.append(layer.lora_B["default"].weight)
    return model, trained


def _flat(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters])
