"""Noise for the sums of several clients, drawn at the same time.

A client's noise takes longer than all that its records' gradients are put through afterwards, and it is drawn on the
host from the client's own stream, which lets go of Python's lock: clients can draw side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from fedlora.privacy.noise import NoiseSource
from fedlora.privacy.plan import PhasePlan


def privatize_all(
    phases: Sequence[PhasePlan], totals: Tensor, noise: Sequence[NoiseSource], slot_sizes: Sequence[int]
) -> list[Tensor]:
    """`PhasePlan.privatize` of each client's sum, with the bits that one after another would have had.

    Args:
        phases: by client; each one's noise is its own.
        totals: [K, P] float64, sums of clipped records.
        noise: the clients' streams. Who shares one draws from it in the order given.
        slot_sizes: how P divides into slots.

    Returns:
        What may be released of each, [P] float32.
    """
    released: dict[int, Tensor] = {}
    sharing: dict[int, list[int]] = {}
    for client, source in enumerate(noise):
        sharing.setdefault(id(getattr(source, "generator", source)), []).append(client)

    def release(clients: list[int]) -> None:
        for client in clients:
            released[client] = phases[client].privatize(totals[client], noise=noise[client], slot_sizes=slot_sizes)

    threads = min(len(sharing), torch.get_num_threads())
    with one_thread():
        if threads == 1:
            for clients in sharing.values():
                release(clients)
        else:
            with ThreadPoolExecutor(max_workers=threads) as pool:
                list(pool.map(release, sharing.values()))  # a list, so that what one of them raises is raised here
    return [released[client] for client in range(len(totals))]


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, and in Python threads that start there, torch works without a team.

    Each thread would start one of its own, and what is rounded may depend on how many there are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
