"""Where a client's whole data is protected: from the schedule to σ, from a client's vector to its part, to the mean.

What is sent stays a vector like any other, the round's start plus the client's part, and is opened again by the server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor

from fedlora.config import RunConfig
from fedlora.federation.messages import ClientUpdate
from fedlora.federation.schedule import ScheduledRound
from fedlora.privacy.client_level import ClientLevel, make_client_level
from fedlora.privacy.noise import NoiseSource


def client_level_of(config: RunConfig, schedule: Iterable[ScheduledRound]) -> ClientLevel | None:
    """How clients are protected in a run with this schedule, all of them by one σ; None where records are.

    Raises:
        DataError, BudgetRefused: as `make_client_level`.
    """
    if config.privacy.unit == "record":
        return None
    rounds = Counter(client for entry in schedule for client in entry.clients)
    return make_client_level(config, max(rounds.values()))


def protected_vector(how: ClientLevel, vector: Tensor, start: Tensor, noise: NoiseSource) -> Tensor:
    """What a client sends in place of its trained `vector` [P], [P] float32.

    Args:
        start: [P], the same numbers as they were when the round began.
        noise: the client's own, of this round.
    """
    begun = start.to("cpu").double()
    return (begun + how.part(vector.to("cpu").double() - begun, noise)).float()


def protected_mean(how: ClientLevel, updates: Sequence[ClientUpdate], start: Tensor, noise: NoiseSource) -> Tensor:
    """What a round releases, [P] float32: `start` plus the noised mean move of the clients that were asked.

    Args:
        updates: one at most of each client asked, whatever its vector is.
        start: [P], what the vectors moved from.
        noise: the server's own, of this round.

    Raises:
        PrivacyError, ProtocolError: as `ClientLevel.mean`.
    """
    begun = start.double()
    ordered = sorted(updates, key=lambda update: update.client)  # no bit depends on arrival
    return (begun + how.mean([update.vector.double() - begun for update in ordered], noise)).float()
