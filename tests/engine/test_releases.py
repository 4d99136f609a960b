"""Noise of several clients at once: the bits of one after another, and nothing un-noised when it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.engine.releases import privatize_all
from fedlora.errors import PrivacyError
from fedlora.privacy.noise import HostNoise, NoiseSource
from fedlora.privacy.projection import LowPass
from fedlora.randomness import SecretRoot

SIZES = (30, 70)


def sources(count: int) -> list[NoiseSource]:
    root = SecretRoot.seeded(0)
    return [HostNoise(root.numpy("noise", client)) for client in range(count)]


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 4])
def test_the_bits_of_one_after_another(make_phase: Any, set_threads: Callable[[int], None], threads: int) -> None:
    set_threads(threads)
    phases = [make_phase(0.5, 1.0 + client, 0.1) for client in range(9)]
    totals = torch.randn(9, 100, dtype=torch.float64)
    wanted = [
        phase.privatize(total, noise=source, slot_sizes=SIZES)
        for phase, total, source in zip(phases, totals, sources(9), strict=True)
    ]
    found = privatize_all(phases, totals, sources(9), SIZES)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("streams", [1, 2])
def test_clients_that_share_a_stream_draw_in_turn(make_phase: Any, streams: int) -> None:
    phase, totals = make_phase(0.5, 1.0, 0.1), torch.zeros(8, 100, dtype=torch.float64)
    found = privatize_all([phase] * 8, totals, sources(streams) * (8 // streams), SIZES)
    own = sources(streams)
    wanted = [
        phase.privatize(total, noise=own[client % streams], slot_sizes=SIZES) for client, total in enumerate(totals)
    ]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_failure_is_raised_and_nothing_returned(make_phase: Any, set_threads: Callable[[int], None]) -> None:
    set_threads(3)

    class Broken:
        def standard_normal(self, count: int, device: torch.device) -> torch.Tensor:
            return torch.zeros(count - 1, dtype=torch.float64)

    phase, totals = make_phase(0.5, 1.0, 0.1), torch.zeros(3, 100, dtype=torch.float64)
    with pytest.raises(PrivacyError, match="noise of shape"):
        privatize_all([phase] * 3, totals, [*sources(2), Broken()], SIZES)
    assert torch.get_num_threads() == 3


def test_a_projection_rounds_as_it_does_for_a_client_alone(make_phase: Any, set_threads: Callable[[int], None]) -> None:
    """Of large slots it rounds by how many threads it has."""
    size = 24_576
    phase = replace(make_phase(0.5, 1.0, 0.1), projection=LowPass(0.5))
    totals = torch.randn(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    set_threads(4)
    both = privatize_all([phase] * 2, totals, sources(2), [size])
    alone = [
        privatize_all([phase], total[None], [source], [size])[0]
        for total, source in zip(totals, sources(2), strict=True)
    ]
    assert all(torch.equal(one, other) for one, other in zip(both, alone, strict=True))
