"""A run that keeps what its frozen lower blocks make of records ends at the very bits of one that does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.engine.prefix import PrefixedDataset
from fedlora.experiments.simulate import simulate
from fedlora.federation import prefixes

UPPER = ["encoder.layer.1.attention.self.query", "encoder.layer.1.attention.self.value"]


class Silent:
    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None: ...

    def round(self, report: Any) -> None: ...

    def finish(self, record: Mapping[str, Any]) -> None: ...


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches with kept states, by their number of records."""
    asked: list[int] = []
    genuine = PrefixedDataset.batch

    def spy(self: PrefixedDataset, indices: Any, *arguments: Any, **how: Any) -> Any:
        asked.append(len(indices))
        return genuine(self, indices, *arguments, **how)

    monkeypatch.setattr(PrefixedDataset, "batch", spy)
    return asked


@pytest.fixture
def run(tiny_config: Callable[..., RunConfig], tmp_path: Path, served: list[int]) -> Callable[..., tuple[bytes, int]]:
    (tmp_path / "mask.txt").write_text("\n".join(UPPER))

    def simulated(name: str, *options: str) -> tuple[bytes, int]:
        """The adapter's file, and how many batches had kept states."""
        served.clear()
        mask = "adapter.select=mask", f"adapter.mask='{tmp_path / 'mask.txt'}'"
        folder = simulate(tiny_config(*mask, f"run.out='{tmp_path / name}'", *options), Silent())
        weights = next(path for path in sorted(folder.rglob("*.safetensors")) if "checkpoint" not in path.name)
        return weights.read_bytes(), len(served)

    return simulated


LONG = ("federation.local_steps=6", "privacy.accountant=rdp", "engine.token_budget=128")


@pytest.mark.parametrize("options", [(), ("federation.participation=0.7", "training.keep_state=true")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits(run: Callable[..., tuple[bytes, int]], dtype: str, options: tuple[str, ...]) -> None:
    given = (*LONG, f"model.dtype={dtype}", *options)
    kept, batches = run("kept", *given)
    anew, none = run("anew", *given, "engine.prefix_cache=off")
    assert batches > 0 == none
    assert kept == anew


def test_nothing_is_kept_for_a_few_visits_or_where_the_lowest_block_is_adapted(
    run: Callable[..., tuple[bytes, int]], tiny_config: Callable[..., RunConfig], tmp_path: Path, served: list[int]
) -> None:
    assert run("short", "privacy.accountant=rdp", "federation.local_steps=1")[1] == 0
    simulate(tiny_config(*LONG, f"run.out='{tmp_path / 'all'}'"), Silent())
    assert served == []


def test_where_no_block_can_be_left_out_no_round_looks_for_what_would_pay(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation(*LONG)
    bench, cache = (
        federation.workbench,
        prefixes.prefix_cache(federation.workbench, federation.dataset, federation.sites),
    )
    assert cache is not None
    monkeypatch.setattr(prefixes, "planned_steps", lambda *_: pytest.fail("counted"))
    assert prefixes.with_prefix(cache, bench, bench.schedule[-1], federation.sites) is federation.dataset
