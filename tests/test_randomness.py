from __future__ import annotations

import copy
import pickle
import secrets
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.randomness import PublicSeed, SecretRoot, _stream_key

PARTS = st.one_of(st.text(max_size=8), st.integers(-5, 10**9))
PATHS = st.lists(PARTS, max_size=4).map(tuple)


def first_numbers(streams: Any, *path: str | int) -> tuple[list[float], list[float]]:
    return streams.numpy(*path).random(4).tolist(), torch.rand(4, generator=streams.torch(*path)).tolist()


@given(PATHS, PATHS)
def test_different_paths_are_different_streams(first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
    same = [(type(part), part) for part in first] == [(type(part), part) for part in second]
    assert (_stream_key(b"root", first) == _stream_key(b"root", second)) == same


def test_parts_cannot_run_into_one_another() -> None:
    root = SecretRoot.seeded(0)
    paths: list[tuple[str | int, ...]] = [
        ("a", "b"),
        ("ab",),
        ("a", "b", ""),
        ("", "a", "b"),
        ("b", "a"),
        ("a", 1),
        ("a", "1"),
    ]
    for one, other in combinations(paths, 2):
        assert first_numbers(root, *one) != first_numbers(root, *other)


def test_a_stream_depends_neither_on_the_order_of_calls_nor_on_other_streams() -> None:
    root = SecretRoot.seeded(0)
    alone = first_numbers(root, "noise", 3)
    root.numpy("other").random(1000)
    torch.rand(1000, generator=root.torch("other"))
    assert first_numbers(root, "noise", 3) == alone == first_numbers(SecretRoot.seeded(0), "noise", 3)


def test_numpy_streams_are_keyed_with_all_256_bits() -> None:
    """Two roots whose keys share any 224 bits still give different streams: the key fills the seed sequence."""
    generator = SecretRoot.seeded(0).numpy("x")
    entropy = generator.bit_generator.seed_seq.entropy  # type: ignore[attr-defined]
    key = np.frombuffer(_stream_key(SecretRoot.seeded(0).root, ("x",)), dtype=np.uint32)
    assert list(entropy) == key.tolist()
    assert len(entropy) == 8


def test_public_and_secret_streams_of_one_seed_differ() -> None:
    assert first_numbers(PublicSeed.from_int(0), "x") != first_numbers(SecretRoot.seeded(0), "x")
    assert PublicSeed.from_int(0) != SecretRoot(PublicSeed.from_int(0).root)
    assert PublicSeed.from_int(0) == PublicSeed.from_int(0) != PublicSeed.from_int(1)


def test_public_streams_are_golden() -> None:
    """Every participant derives them: they must never change between versions."""
    numbers, tensor = first_numbers(PublicSeed.from_int(0), "cohort", 1)
    assert numbers == pytest.approx(
        [0.87906005456137, 0.960692707937692, 0.4983878778357853, 0.35419645656552745], abs=1e-12
    )
    assert tensor == pytest.approx([0.9614381, 0.0734337, 0.3314731, 0.5647491], abs=1e-6)


def test_a_secret_root_is_32_bytes_of_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    genuine = secrets.token_bytes
    monkeypatch.setattr(secrets, "token_bytes", lambda count: asked.append(count) or genuine(count))
    roots = {SecretRoot.from_os().root for _ in range(20)}
    assert asked == [32] * 20
    assert len(roots) == 20
    assert all(len(root) == 32 for root in roots)


@pytest.mark.parametrize("streams", [SecretRoot.from_os(), SecretRoot.seeded(4)])
def test_a_secret_root_does_not_show_itself(streams: SecretRoot) -> None:
    shown = f"{streams} {streams!r} {[streams]} {streams.numpy('a')!r} {streams.torch('a')!r}"
    for secret in (streams.root.hex(), repr(streams.root), repr(streams.root)[2:-1]):
        assert secret not in shown


def test_roots_are_immutable() -> None:
    root = SecretRoot.seeded(0)
    with pytest.raises(AttributeError):
        root.root = b"0"  # type: ignore[misc]
    assert copy.deepcopy(root) == root
    assert pickle.loads(pickle.dumps(root)) == root


def test_global_generators_are_left_alone(untouched_global_generator: None) -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first_numbers(SecretRoot.from_os(), "a")
    first_numbers(PublicSeed.from_int(1), "a")
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
