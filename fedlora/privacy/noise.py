"""Where the normal numbers of a mechanism come from: a cipher on the CPU, or the device's own generator.

Torch's CPU generator is neither: its key has 32 bits and its float32 normals end at 5.77 standard deviations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fedlora.errors import ConfigError


class NoiseSource(Protocol):
    """A secret stream of normal numbers. Every call goes on where the last one stopped."""

    def standard_normal(self, count: int, device: torch.device) -> Tensor:
        """`count` independent N(0, 1) numbers, [count] float64 on `device`."""
        ...


@dataclass(frozen=True)
class HostNoise:
    """Drawn on the CPU from a generator under a secret key (`SecretRoot.numpy`: ChaCha20), then moved to the device."""

    generator: np.random.Generator = field(repr=False)

    def standard_normal(self, count: int, device: torch.device) -> Tensor:
        return torch.from_numpy(self.generator.standard_normal(count)).to(device)


@dataclass(frozen=True)
class DeviceNoise:
    """Drawn on the accelerator, under a fresh key of 64 secret bits from `generator` for every draw.

    Nothing is copied and the CPU draws one number instead of millions. The price: torch's CUDA generator is Philox
    4x32-10, a counter generator that passes statistical tests but is no cipher, and its key has 64 bits where
    `HostNoise` has 256. A key opens one draw only, since the next one comes from the cipher again. Its normals are
    Box-Muller's from uniforms of 53 bits (cuRAND), which end at 8.6 standard deviations: a chance of 10⁻¹⁷.
    """

    generator: np.random.Generator = field(repr=False)

    def standard_normal(self, count: int, device: torch.device) -> Tensor:
        require_accelerator(device)
        key = int(self.generator.integers(2**64, dtype=np.uint64))
        fresh = torch.Generator(device).manual_seed(key)
        return torch.randn(count, dtype=torch.float64, device=device, generator=fresh)


def make_noise_source(
    kind: Literal["host", "device"], generator: np.random.Generator, device: torch.device
) -> NoiseSource:
    """The source that `engine.noise` asks for, over the secret `generator`.

    Raises:
        ConfigError: `device` noise without an accelerator.
    """
    if kind == "host":
        return HostNoise(generator)
    require_accelerator(device)
    return DeviceNoise(generator)


def require_accelerator(device: torch.device) -> None:
    """Raise ConfigError unless `device` can draw its own noise."""
    if device.type != "cuda":
        raise ConfigError(
            f"engine.noise = device draws with the accelerator's generator, but this run is on {device.type}, whose "
            "generator in torch may have a key of 32 bits only; set engine.noise=host"
        )
