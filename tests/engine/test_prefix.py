"""The frozen-prefix cache changes no bit of a gradient, keeps to its room and leaves no trace."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.data.encode import EncodedDataset
from fedlora.engine.batching import Shapes
from fedlora.engine.prefix import Prefix, PrefixCache, PrefixedDataset, Room
from fedlora.engine.sums import clipped_sums
from fedlora.errors import PrivacyError
from fedlora.federation.workbench import Workbench
from fedlora.models.families import blocks_below
from tests.engine.reference import random_theta

FAMILIES = ["bert", "roberta", "distilbert", "electra", "deberta", "deberta-v2", "llama"]
ONLY_EAGER = ["deberta", "deberta-v2"]
RAGGED = [5, 12, 3, 9, 12, 4, 16, 1, 8, 30]
LAYERS = 3
SHAPES, CPU = Shapes(token_budget=64), torch.device("cpu")
PLENTY = Room(memory=2**30)


def bench_of(make_bench: Any, *overrides: str, family: str = "bert", layers: int = LAYERS) -> Workbench:
    return make_bench("model.head=trained", *overrides, family=family, **_depth(family, layers))  # type: ignore[no-any-return]


def _depth(family: str, layers: int) -> dict[str, int]:
    return {"n_layers" if family == "distilbert" else "num_hidden_layers": layers}


def adopt_upper(bench: Workbench, lowest: int) -> int:
    """Adapt only what lies in block `lowest` and above; how many blocks that leaves below."""
    bench.adopt(tuple(candidate.layer >= lowest for candidate in bench.candidates))
    return blocks_below([path for paths in bench.places.values() for path in paths], bench.classifier.family)


def prefix_of(bench: Workbench, blocks: int, **changes: Any) -> Prefix:
    how: dict[str, Any] = {"shapes": SHAPES, "clients": 1, "expected": 100, "device": CPU}
    return Prefix(classifier=bench.classifier, blocks=blocks, **(how | changes))


def kept(
    bench: Workbench, data: EncodedDataset, blocks: int, records: list[int] | None = None, room: Room = PLENTY
) -> PrefixedDataset:
    chosen = np.arange(len(data)) if records is None else np.array(records, dtype=np.int64)
    with_states = prefix_of(bench, blocks).keep(data, chosen, room)
    assert isinstance(with_states, PrefixedDataset)
    return with_states


def gradients(bench: Workbench, data: EncodedDataset, *, garbage: float = 0.0) -> list[Tensor]:
    """One [n, size] per slot, in the shapes of training; with `garbage` in place of the states of padding."""
    theta = random_theta(bench.layout, 1)
    found = [torch.full((len(data), slot.size), torch.nan) for slot in bench.layout.slots]
    for group in SHAPES.cut(data.lengths, data.longest, expected=100):
        batch, labels = data.batch(group.positions, shape=(group.rows, group.columns))
        for name, states in batch.items():
            if states.is_floating_point():
                padding = (batch["attention_mask"] == 0).unsqueeze(2)
                batch[name] = torch.where(padding, garbage * torch.randn_like(states), states)
        owner = torch.zeros(group.rows, dtype=torch.int64)
        for whole, part in zip(found, bench.backend.gradients(theta, batch, labels, owner), strict=True):
            whole[group.positions] = part[: len(group.positions)]
    return found


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------------------- no bit is changed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "attention"),
    [(f, a) for f in FAMILIES for a in ("eager", "sdpa") if a == "eager" or f not in ONLY_EAGER],
)
@pytest.mark.parametrize("lowest", [1, 2])
def test_gradients_are_the_same_to_the_last_bit(
    make_bench: Any, random_records: Any, family: str, attention: str, dtype: str, lowest: int
) -> None:
    target = 'adapter.target_modules="attention_output,down"' if family == "deberta" else "adapter.rank=4"
    bench = bench_of(make_bench, target, f"model.attention={attention}", f"model.dtype={dtype}", family=family)
    assert adopt_upper(bench, lowest) == lowest
    data = random_records(RAGGED)
    with_cache = kept(bench, data, lowest)
    plain = gradients(bench, data)
    assert all(part.norm() > 0 for part in plain)
    assert same_bits(gradients(bench, with_cache), plain)
    assert same_bits(gradients(bench, with_cache, garbage=10.0), plain), "padding is seen"
    assert prefix_of(bench, lowest).changes_nothing(bench.backend, longest=64)


def test_the_blocks_below_are_left_out_and_their_states_are_used(make_bench: Any, random_records: Any) -> None:
    """Or else the test above would hold for a cache that does nothing."""
    bench = bench_of(make_bench)
    adopt_upper(bench, 2)
    data = random_records(RAGGED)
    with_cache = kept(bench, data, 2)
    plain = gradients(bench, data)
    ran = []
    for number, block in enumerate(bench.classifier.backbone.encoder.layer):  # type: ignore[union-attr, arg-type]
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    gradients(bench, with_cache)
    assert set(ran) == {2}
    other = dataclasses.replace(with_cache, states=with_cache.states.flip(0))
    assert not same_bits(gradients(bench, other), plain)


@pytest.mark.parametrize("options", [{}, {"conv_kernel_size": 3}])
@pytest.mark.parametrize("lowest", [1, 2])
def test_deberta_v2_with_adapted_queries_and_its_convolution(
    make_bench: Any, random_records: Any, options: dict[str, int], lowest: int
) -> None:
    """Adapted query projections replace the whole attention, and the convolution acts between blocks 0 and 1."""
    target = 'adapter.target_modules="query,value"'
    bench = make_bench("model.head=trained", target, family="deberta-v2", num_hidden_layers=LAYERS, **options)
    adopt_upper(bench, lowest)
    data = random_records(RAGGED)
    assert same_bits(gradients(bench, kept(bench, data, lowest)), gradients(bench, data))


@pytest.mark.parametrize("head", ["model.pooling=mean", "model.pooling=cls", "model.pooling=last"])
def test_every_pooling(make_bench: Any, random_records: Any, head: str) -> None:
    bench = bench_of(make_bench, head)
    adopt_upper(bench, 1)
    data = random_records(RAGGED)
    assert same_bits(gradients(bench, kept(bench, data, 1)), gradients(bench, data))


def test_opacus_takes_the_states_too(make_bench: Any, random_records: Any) -> None:
    bench = bench_of(make_bench, "engine.backend=opacus")
    adopt_upper(bench, 1)
    data = random_records(RAGGED)
    assert same_bits(gradients(bench, kept(bench, data, 1)), gradients(bench, data))


def test_clipped_sums_of_a_draw_are_the_same(make_bench: Any, random_records: Any, make_phase: Any) -> None:
    bench = bench_of(make_bench)
    adopt_upper(bench, 1)
    data = random_records(RAGGED)
    drawn = [np.array([7, 2, 9]), np.array([], dtype=np.int64), np.array([4, 0])]
    theta, phase = random_theta(bench.layout, 3), make_phase(1.0, 0.0, 0.01)
    plain, cached = (
        clipped_sums(bench.backend, records, drawn, theta, phase, shapes=SHAPES, expected=100)
        for records in (data, kept(bench, data, 1))
    )
    assert torch.equal(plain, cached)
    assert plain[0].norm() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_upper_half_of_minilm(
    make_bench: Any, random_records: Any, minilm: str, attention: str, dtype: str
) -> None:
    """Wide enough for kernels that cut their work by shape."""
    bench = make_bench(
        f"model.name={minilm}", "model.head=trained", f"model.attention={attention}", f"model.dtype={dtype}"
    )
    assert adopt_upper(bench, 3) == 3
    data = random_records([5, 12, 30, 1, 24])
    assert same_bits(gradients(bench, kept(bench, data, 3)), gradients(bench, data))


# -------------------------------------------------------------------------------------------- a record is for itself


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_of_a_record_does_not_depend_on_its_company(
    make_bench: Any, random_records: Any, dtype: str
) -> None:
    bench = bench_of(make_bench, f"model.dtype={dtype}")
    data = random_records(RAGGED)
    together = kept(bench, data, 2)
    for record, length in enumerate(RAGGED):
        start = together.states_from[record]
        assert torch.equal(kept(bench, data, 2, [record]).states, together.states[start : start + length])


def test_states_are_made_in_the_largest_shapes_alone(make_bench: Any, random_records: Any) -> None:
    """How many records are left over for a smaller one is the others' doing."""
    bench, data = bench_of(make_bench), random_records([5] * 9 + [12] * 4)
    seen: list[tuple[int, ...]] = []
    bench.classifier.backbone.encoder.layer[0].register_forward_hook(  # type: ignore[union-attr, index]
        lambda _module, _inputs, output: seen.append(tuple(output.shape[:2]))
    )
    eager = Shapes(token_budget=64, agreeing=lambda _columns, counts, *_: counts)
    prefix_of(bench, 1, shapes=eager).keep(data, np.arange(len(data)), PLENTY)
    assert seen == [(2, 1), (4, 16), (4, 16), (8, 8), (8, 8)]


def test_a_record_without_tokens_is_no_trouble_to_others(make_bench: Any, random_records: Any) -> None:
    """Its padding attends to padding, whose states are not kept: its own gradient may be another, and is finite."""
    bench = bench_of(make_bench, "model.pooling=cls")
    adopt_upper(bench, 1)
    data = random_records([5, 0, 7])
    cached, plain = gradients(bench, kept(bench, data, 1)), gradients(bench, data)
    assert same_bits([part[[0, 2]] for part in cached], [part[[0, 2]] for part in plain])
    assert all(part.isfinite().all() for part in cached)


def test_only_asked_records_are_kept_and_no_others_are_drawn(make_bench: Any, random_records: Any) -> None:
    """A micro-batch that left its states out for one record would show it in the rounding of the others."""
    data = kept(bench_of(make_bench), random_records(RAGGED), 1, [3, 1, 3])
    assert len(data.states) == RAGGED[3] + RAGGED[1]
    data.batch(np.array([1, 3]))
    with pytest.raises(PrivacyError, match=r"^records of a batch have no states kept"):
        data.batch(np.array([1, 2]))


def test_a_subset_keeps_its_records_states(make_bench: Any, random_records: Any) -> None:
    bench = bench_of(make_bench)
    data = kept(bench, random_records(RAGGED), 1)
    chosen = np.array([6, 2, 2])
    part, whole = data.subset(chosen).batch(np.arange(3))[0], data.batch(chosen)[0]
    assert part.keys() == whole.keys()
    assert len(part) == 4
    assert all(torch.equal(part[name], whole[name]) for name in part)


# ------------------------------------------------------------------------------------------------ where it is kept


def test_room_is_kept_to(make_bench: Any, random_records: Any) -> None:
    bench = bench_of(make_bench)
    data = random_records(RAGGED)
    needed = sum(RAGGED) * bench.classifier.hidden_size * 4
    in_memory = kept(bench, data, 1, room=Room(memory=needed))
    assert in_memory.states.untyped_storage().nbytes() == needed
    on_disk = kept(bench, data, 1, room=Room(memory=needed - 1, disk=needed))
    assert torch.equal(on_disk.states, in_memory.states)
    small = Room(memory=needed - 1, disk=needed - 1, accelerator=needed)
    assert prefix_of(bench, 1).keep(data, np.arange(len(data)), small) is data


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_spilled_has_no_name_and_goes_with_the_last_reference(
    make_bench: Any, random_records: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    modes: list[int] = []
    genuine = Prefix._own_states

    def spy(*arguments: Any) -> Tensor:
        assert list(tmp_path.iterdir()) == []
        modes.extend(descriptor.stat().st_mode & 0o777 for descriptor in opened_in(tmp_path))
        states: Tensor = genuine(*arguments)
        return states

    monkeypatch.setattr(Prefix, "_own_states", spy)
    bench = bench_of(make_bench, f"model.dtype={dtype}")
    adopt_upper(bench, 1)
    data = random_records(RAGGED)
    spilled: EncodedDataset | None = kept(bench, data, 1, room=Room(memory=0, disk=2**30))
    assert spilled is not None
    assert set(modes) == {0o600}
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) in Path("/proc/self/maps").read_text(), "it lies elsewhere"
    assert same_bits(gradients(bench, spilled), gradients(bench, data))
    spilled = None
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert opened_in(tmp_path) == []


def opened_in(folder: Path) -> list[Path]:
    """This process's descriptors of files that lie, or lay, in `folder`."""
    descriptors = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [path for path in descriptors if str(path.readlink()).startswith(str(folder))]


@pytest.mark.parametrize("fault", ["no space", "nearly none", "no folder"])
def test_a_disk_that_does_not_take_it_is_no_error(
    make_bench: Any, random_records: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None: ...

        def write(self, _: object) -> None:
            raise OSError(28, "No space left on device")

    if fault == "no space":
        monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    elif fault == "nearly none":
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10_000}))
    else:
        monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    bench = bench_of(make_bench)
    data = random_records(RAGGED)
    assert prefix_of(bench, 1).keep(data, np.arange(len(data)), Room(memory=0, disk=2**30)) is data


def test_states_reach_no_log_by_a_repr(make_bench: Any, random_records: Any) -> None:
    assert repr(kept(bench_of(make_bench), random_records(RAGGED), 1)) == f"EncodedDataset({len(RAGGED)} records)"


@pytest.mark.parametrize("room", [Room(memory=1), Room(memory=0, disk=1)])
def test_no_record_or_none_with_tokens(make_bench: Any, random_records: Any, room: Room) -> None:
    bench, data = bench_of(make_bench), random_records([0, 5])
    for chosen in ([], [0]):
        batch, _ = kept(bench, data, 1, chosen, room).batch(np.array(chosen, dtype=np.int64), shape=(2, 8))
        assert batch[bench.classifier.states_key(1)].tolist() == torch.zeros(2, 8, 16).tolist()


# ------------------------------------------------------------------------------------------------------ round by round


def cache_of(data: EncodedDataset, room: Room = PLENTY) -> PrefixCache:
    return PrefixCache(data, np.arange(len(data)), room)


def test_states_are_made_once_and_anew_for_other_adapters(make_bench: Any, random_records: Any) -> None:
    bench, data = bench_of(make_bench), random_records(RAGGED)
    cache = cache_of(data)
    adopt_upper(bench, 1)
    first = cache.dataset(prefix_of(bench, 1), bench.backend, visits=9.0)
    assert isinstance(first, PrefixedDataset)
    assert cache.dataset(prefix_of(bench, 1), bench.backend, visits=1.0) is first, "few visits are left to cheap states"
    adopt_upper(bench, 2)
    second = cache.dataset(prefix_of(bench, 2), bench.backend, visits=9.0)
    assert isinstance(second, PrefixedDataset)
    assert second.block == 2
    gone = weakref.ref(second)
    del second
    cache.close()
    assert gone() is None


@pytest.mark.parametrize("room", [Room(memory=1), PLENTY])
def test_calls_of_other_clients_have_the_same_states_where_they_change_nothing(
    make_bench: Any, random_records: Any, monkeypatch: pytest.MonkeyPatch, room: Room
) -> None:
    bench, data = bench_of(make_bench), random_records(RAGGED)
    adopt_upper(bench, 1)
    cache, fewer = cache_of(data, room), prefix_of(bench, 1, clients=3, expected=2)
    wave = cache.dataset(prefix_of(bench, 1), bench.backend, visits=9.0)
    asked: list[Prefix] = []

    def refuse(prefix: Prefix, *_: Any) -> bool:
        asked.append(prefix)
        return False

    monkeypatch.setattr(Prefix, "changes_nothing", refuse)
    for _ in range(2):
        assert cache.dataset(prefix_of(bench, 1), bench.backend, visits=9.0) is wave
        assert cache.dataset(fewer, bench.backend, visits=9.0) is data, "what is known is not asked again"
    assert asked == ([] if wave is data else [fewer])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_of_large_micro_batches_in_small_ones_are_compared_as_such(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    bench = bench_of(make_bench, f"model.dtype={dtype}")
    adopt_upper(bench, 1)
    large, small = prefix_of(bench, 1), prefix_of(bench, 1, expected=1)
    genuine, rows = bench.classifier.states_before, []

    def spy(block: int, batch: dict[str, Tensor]) -> Tensor:
        rows.append(tuple(batch["input_ids"].shape))
        return genuine(block, batch)

    monkeypatch.setattr(bench.classifier, "states_before", spy)
    small.changes_nothing(bench.backend, 64, large)
    large.changes_nothing(bench.backend, 64, small)
    assert rows == [(8, 8), (2, 24), *[(2, 8)] * 4, (2, 24)]


@pytest.mark.parametrize(
    ("blocks", "visits", "wanted"), [(0, 100.0, False), (3, 100.0, True), (1, 2.0, True), (5, 1.0, False)]
)
def test_when_it_pays(make_bench: Any, blocks: int, visits: float, wanted: bool) -> None:
    assert prefix_of(bench_of(make_bench), blocks).pays(visits) == wanted


def test_nothing_is_kept_where_it_does_not_pay_or_is_seen(
    make_bench: Any, random_records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, data = bench_of(make_bench), random_records(RAGGED)
    assert cache_of(data).dataset(prefix_of(bench, 0), bench.backend, visits=9.0) is data
    adopt_upper(bench, 1)
    assert cache_of(data).dataset(prefix_of(bench, 1), bench.backend, visits=1.0) is data
    assert cache_of(data, Room(memory=1)).dataset(prefix_of(bench, 1), bench.backend, visits=9.0) is data
    genuine = bench.classifier.states_before
    monkeypatch.setattr(bench.classifier, "states_before", lambda *asked: genuine(*asked) * (1 + 1e-6))
    assert cache_of(data).dataset(prefix_of(bench, 1), bench.backend, visits=9.0) is data
