"""Client-level privacy: how much a client's whole data can move a round, and the noise on the sum of all moves.

Neighbours differ in one client: in the one world its data are there, in the other it takes part with a move of zero.
A round asks a fixed, public number of clients. Each trains without noise; its move is everything that it sends less
what the round started from, as one vector. Moves are cut to length C, added up, and the sum is released once under
Gaussian noise of standard deviation σC. It is divided by the number *asked*: how many answered may depend on data, and
one client less would then change every other's share. Who is asked follows from the public seed, so that nothing is
amplified by sampling: a client pays for each round that it is scheduled in, as a Gaussian release with multiplier σ.

Source: McMahan, Ramage, Talwar, Zhang 2018, "Learning Differentially Private Recurrent Language Models", Algorithm 1,
with flat clipping and a fixed denominator; without its sampling of clients, which here is no secret.

Who adds the noise is who is trusted (`ServerNoise`, `SharedNoise`). Either way the server sees single moves with less
noise than ε speaks of, or none. Any other client is an adversary: what it knows of the noise is not counted.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.config import RunConfig
from fedlora.errors import BudgetRefused, DataError, PrivacyError, ProtocolError
from fedlora.privacy.accounting import Charge, epsilon
from fedlora.privacy.calibration import calibrate_noise_multiplier
from fedlora.privacy.clipping import Clipping
from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.mechanisms.granular import released_std
from fedlora.privacy.noise import NoiseSource

_FAR_TAIL = 10.0
"""Standard deviations by which the length of honest noise exceeds √P with a chance below 1e-21 (Gaussian
concentration: exp(-t²/2))."""
_WIRE_ROUNDING = 1e-6
"""What float32 rounds off a number below 16, `messages.LARGEST_VALUE` and a move."""


@dataclass(frozen=True, kw_only=True)
class ClientLevel(ABC):
    """What is done to the moves of one round's clients, and what it costs each of them."""

    clip_norm: float
    """C, L2 bound of a client's whole move."""
    noise_multiplier: float
    """σ of the noise on the sum, over C, that no other client knows; 0 for a run without noise."""
    cohort_size: int
    """How many clients a round asks, whoever answers."""
    steps_per_round: int
    """Local steps of a client in a round, which together are one release."""

    def charge(self, num_steps: int) -> Charge:
        """What the accountant sees of the rounds that `num_steps` local steps make, one begun counting as whole."""
        return Charge(1.0, self.noise_multiplier, -(-num_steps // self.steps_per_round))

    def clipped(self, move: Tensor) -> Tensor:
        """`move` [P] over all slots together, scaled to length at most C, [P] float64; zeros if it is not finite."""
        total = torch.zeros(1, len(move), dtype=torch.float64)
        self._add_clipped(total, move)
        return total[0]

    @abstractmethod
    def part(self, move: Tensor, noise: NoiseSource) -> Tensor:
        """What a client sends for its `move` [P]: [P] float64, of which `mean` is made.

        Args:
            noise: the client's own secret source.
        """

    @abstractmethod
    def mean(self, parts: Sequence[Tensor], noise: NoiseSource) -> Tensor:
        """The released mean move [P] float64 of `parts` [P] each, one per client that answered.

        Args:
            noise: the server's own secret source.

        Raises:
            PrivacyError: more parts than clients were asked, none, or too few to protect.
            ProtocolError: a part that no honest client sends.
        """

    def _add_clipped(self, total: Tensor, move: Tensor) -> None:
        """Add to `total` [1, P] float64."""
        own = move.detach().to("cpu", torch.float64, copy=True)  # a bad one is zeroed in place
        Clipping("flat", self.clip_norm).add_clipped(total, [own[None]], torch.zeros(1, dtype=torch.int64))

    def _check_number(self, parts: Sequence[Tensor]) -> None:
        if not 0 < len(parts) <= self.cohort_size:
            raise PrivacyError(
                f"{len(parts)} moves of clients for a round that asks {self.cohort_size}, wanted one of each at most; "
                "one client more would have more than its share of the sum. This is a fault of fedlora"
            )


class ServerNoise(ClientLevel):
    """Clients send clipped moves without noise, and the server, which is trusted with them, adds all of it.

    It clips again: what a client contributes is bounded whatever that client did. One that does not answer contributes
    zero.
    """

    def part(self, move: Tensor, noise: NoiseSource) -> Tensor:
        return self.clipped(move)

    def mean(self, parts: Sequence[Tensor], noise: NoiseSource) -> Tensor:
        self._check_number(parts)
        total = torch.zeros(1, len(parts[0]), dtype=torch.float64)
        for part in parts:
            self._add_clipped(total, part)
        mechanism = GaussianMechanism(self.noise_multiplier)
        released = mechanism.privatize(total[0], sensitivity=self.clip_norm, noise=noise, slot_sizes=(total.numel(),))
        return released.double() / self.cohort_size


@dataclass(frozen=True, kw_only=True)
class SharedNoise(ClientLevel):
    """Each of the n clients asked adds variance (σC)² / (n - 1) to its own clipped move; the server adds none.

    So the parts of all but one are the noise that is charged, and each client faces it in the others' sum: its own part
    it knows. The sum has all of it only if everybody answers, so that a round fails where one is missing. Who knows
    more parts is left with less: c clients that pool what they drew face σ √((n - c) / (n - 1)), and the server, which
    sees every part by itself, σ / √(n - 1). Nothing hides parts from the server here.

    The server cannot clip, as noise has made parts long; it refuses one longer than honest noise ever is.

    Goryczka and Xiong 2017, "A Comprehensive Comparison of Multiparty Secure Additions with Differential Privacy",
    section 4.2, describes such noise (there beneath encryption, which this is not).
    """

    def __post_init__(self) -> None:
        if self.cohort_size < 2:
            raise PrivacyError(
                f"a round asks {self.cohort_size} client, and privacy.client_noise = shared divides the noise among "
                "the others; set privacy.client_noise=server"
            )

    @property
    def noise_multiplier_of_part(self) -> float:
        """Of what one client adds: what protects its move from the server."""
        return self.noise_multiplier / math.sqrt(self.cohort_size - 1)

    def noise_multiplier_against(self, colluding: int) -> float:
        """What is left for who knows the parts of `colluding` other clients of a round, at most all but one."""
        return self.noise_multiplier_of_part * math.sqrt(max(1, self.cohort_size - colluding))

    def part(self, move: Tensor, noise: NoiseSource) -> Tensor:
        mechanism = GaussianMechanism(self.noise_multiplier_of_part)
        clipped = self.clipped(move)
        released = mechanism.privatize(clipped, sensitivity=self.clip_norm, noise=noise, slot_sizes=(len(clipped),))
        return released.double()

    def mean(self, parts: Sequence[Tensor], noise: NoiseSource) -> Tensor:
        self._check_number(parts)
        if len(parts) < self.cohort_size:
            raise PrivacyError(
                f"{len(parts)} of {self.cohort_size} clients answered, and under privacy.client_noise = shared their "
                "parts are enough noise only together; nothing is made of them. See to the clients that are missing, "
                "or set privacy.client_noise=server"
            )
        total = torch.zeros(len(parts[0]), dtype=torch.float64)
        longest = self._longest(total.numel())
        for part in parts:
            own = part.detach().to("cpu", torch.float64)
            if not own.norm() <= longest:  # nan too
                raise ProtocolError(
                    f"a client's noised move is longer than {longest:.3g}, which clipped moves with honest noise never "
                    "are; its site runs other code or other settings"
                )
            total += own
        return total / self.cohort_size

    def _longest(self, size: int) -> float:
        std = released_std(noise_multiplier=self.noise_multiplier_of_part, sensitivity=self.clip_norm, size=size)
        root = math.sqrt(size)
        return self.clip_norm + std * (root + _FAR_TAIL) + _WIRE_ROUNDING * root


def make_client_level(config: RunConfig, most_rounds: int) -> ClientLevel:
    """The protection that `config` asks for, with the σ that the client scheduled most often needs.

    Args:
        most_rounds: rounds of training of that client. All others spend less.

    Raises:
        DataError: δ is not below one over the number of clients.
        BudgetRefused: ε cannot be met.
    """
    privacy, federation = config.privacy, config.federation
    noise_multiplier = 0.0
    if math.isfinite(privacy.epsilon):
        if privacy.delta >= 1 / federation.clients:
            raise DataError(
                f"privacy.delta = {privacy.delta:g} is not below 1/{federation.clients}, one over the number of "
                "clients: at that δ the data of one of them may be published. Set privacy.delta below it"
            )
        noise_multiplier = calibrate_noise_multiplier(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            sampling_probability=1.0,
            num_steps=most_rounds,
            accountant=privacy.accountant,
        )
        # Priced anew: a calibration may come from a cache, and the server has no plan that would look again.
        spends = epsilon([Charge(1.0, noise_multiplier, most_rounds)], privacy.delta, privacy.accountant)
        if spends > privacy.epsilon:
            raise BudgetRefused(
                f"{most_rounds} rounds of a client would spend ε = {spends:.4f}, asked was {privacy.epsilon:g}; "
                "nothing was computed. Delete fedlora's cache folder and try again"
            )
    made = SharedNoise if privacy.client_noise == "shared" else ServerNoise
    return made(
        clip_norm=privacy.client_clip_norm,
        noise_multiplier=noise_multiplier,
        cohort_size=federation.cohort_size,
        steps_per_round=federation.local_steps,
    )
