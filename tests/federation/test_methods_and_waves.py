"""What a process does to save time or memory shows in no bit of a method's result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.adapters.methods import METHODS
from fedlora.engine.confusion import confusion_counts
from fedlora.engine.prefix import PrefixedDataset
from fedlora.engine.training import train
from fedlora.federation.cohort import Cohort
from fedlora.federation.prefixes import prefix_cache

UPPER = "adapter.target_modules='1.attention.self.query,1.attention.self.value'"
RUN = (UPPER, "privacy.accountant=rdp", "federation.local_steps=6", "engine.token_budget=128")
KEEP = [name for name in METHODS if name not in ("ffa_svd", "fed_sb_svd", "fedex", "flora", "flexlora")]


class OneProcess:
    """A transport whose sites share a process, with states kept or not."""

    def __init__(self, federation: Any, *, prefixes: bool = False) -> None:
        self.federation = federation
        bench, dataset, sites = federation.workbench, federation.dataset, federation.sites
        self.prefixes = prefix_cache(bench, dataset, sites) if prefixes else None

    def exchange(self, instruction: Any, clients: tuple[int, ...]) -> list[Any]:
        whole = self.federation
        asked = [site for site in whole.sites if site.client in clients]
        given = {"workbench": whole.workbench, "dataset": whole.dataset, "ledger": whole.ledger}
        return [*Cohort(**given, sites=asked, prefixes=self.prefixes).run(instruction)]


def ended(federation: Any, transport: Any) -> list[Tensor]:
    state = federation.server(transport).run(federation.start())
    kept = [site.kept for site in federation.sites if site.kept is not None]
    states = [value for site in federation.sites for value in (site.optimizer_state or {}).values()]
    return [state.theta, *([] if state.folded is None else [state.folded]), *kept, *states]


def assert_same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_states_kept_of_the_blocks_below_change_no_bit(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Neither where A of the lowest adapted block is trained nor where its weights are added to."""
    served: list[int] = []
    genuine = PrefixedDataset.batch

    def spy(self: PrefixedDataset, indices: np.ndarray, *arguments: Any, **how: Any) -> Any:
        served.append(len(indices))
        return genuine(self, indices, *arguments, **how)

    monkeypatch.setattr(PrefixedDataset, "batch", spy)
    found = []
    for prefixes in (True, False):
        federation = make_federation(f"adapter.method={method}", "training.learning_rate=0.1", *RUN)
        found.append(ended(federation, OneProcess(federation, prefixes=prefixes)))
        assert bool(served) == prefixes
        served.clear()
    assert_same_bits(*found)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_waves_change_no_bit(make_federation: Any, monkeypatch: pytest.MonkeyPatch, method: str, size: int) -> None:
    keeps = ("training.keep_state=true", "training.optimizer=momentum") if method in KEEP else ()
    overrides = (f"adapter.method={method}", "model.head=trained", "training.learning_rate=0.05", *keeps)
    whole = make_federation(*overrides)
    wanted = ended(whole, OneProcess(whole))
    monkeypatch.setattr("fedlora.federation.cohort.wave_size", lambda *_: size)
    waved = make_federation(*overrides)
    assert_same_bits(ended(waved, OneProcess(waved)), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_a_wave_that_does_not_fit_is_tried_again_on_the_same_base(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    overrides = (f"adapter.method={method}", "model.head=trained", "training.learning_rate=0.05")
    whole = make_federation(*overrides)
    wanted = ended(whole, OneProcess(whole))
    genuine = train

    def crowded(backend: Any, dataset: Any, jobs: Any, *arguments: Any, **how: Any) -> Any:
        if len(jobs) > 1:
            raise torch.OutOfMemoryError
        return genuine(backend, dataset, jobs, *arguments, **how)

    monkeypatch.setattr("fedlora.federation.cohort.train", crowded)
    waved = make_federation(*overrides)
    assert_same_bits(ended(waved, OneProcess(waved)), wanted)


def test_a_site_answers_with_its_own_part_in_the_evaluation(make_federation: Any) -> None:
    """fedsa: what is counted on held-out records is the model that the site would use; noise and charge as ever."""
    federation = make_federation("adapter.method=fedsa", "federation.private_evaluation=true")
    bench, seen = federation.workbench, []
    genuine = confusion_counts

    def watched(backend: Any, dataset: Any, heldout: Any, theta: Tensor, *arguments: Any) -> Tensor:
        seen.append(theta.clone())
        return genuine(backend, dataset, heldout, theta, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlora.federation.cohort.confusion_counts", watched)
        state = federation.server().run(federation.start())
    for site, theta in zip(federation.sites, seen, strict=True):
        assert torch.equal(theta[bench.layout.positions(bench.method.local)], site.kept)
        assert torch.equal(theta[bench.layout.positions("A")], state.theta[bench.layout.positions("A")])
    names = [phase["name"] for phase in state.facts[0]["phases"]]
    assert "evaluation" in names
    assert replace(federation.sites[0], kept=None).plan.epsilon() <= 6
