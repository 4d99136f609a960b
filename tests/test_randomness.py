from __future__ import annotations

import copy
import os
import pickle
import secrets
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import PrivacyError
from fedlora.randomness import PublicSeed, SecretRoot, _stream_key

PARTS = st.one_of(st.text(max_size=8), st.integers(-5, 10**9))
PATHS = st.lists(PARTS, max_size=4).map(tuple)


def first_numbers(streams: Any, *path: str | int) -> list[float]:
    return list(streams.numpy(*path).random(4))


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
    root.numpy("another").standard_normal(1000)
    assert first_numbers(root, "noise", 3) == alone == first_numbers(SecretRoot.seeded(0), "noise", 3)


def test_a_public_stream_has_a_key_of_128_bits() -> None:
    state = PublicSeed.from_int(0).numpy("x").bit_generator.state["state"]
    assert state["key"].astype("<u8").tobytes() == _stream_key(PublicSeed.from_int(0).root, ("x",))[:16]


def test_a_secret_stream_is_chacha20_under_the_whole_key() -> None:
    """Bit for bit the cipher of RFC 8439 with its 256-bit key, its block counter and its nonce at zero."""
    ciphers = pytest.importorskip("cryptography.hazmat.primitives.ciphers")
    root = SecretRoot.seeded(0)
    words = root.numpy("noise", 3).bit_generator.random_raw(512)  # 64 blocks of 64 bytes
    algorithm = ciphers.algorithms.ChaCha20(_stream_key(root.root, ("noise", 3)), nonce=bytes(16))
    keystream = ciphers.Cipher(algorithm, mode=None).encryptor().update(bytes(4096))
    assert words.astype("<u8").tobytes() == keystream


def test_every_bit_of_the_key_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the reference at hand: none of the 256 bits is lost between root and generator."""
    first = set()
    for bit in range(256):
        key = (1 << bit).to_bytes(32, "little")
        monkeypatch.setattr("fedlora.randomness._stream_key", lambda root, path, key=key: key)
        first.add(int(SecretRoot.seeded(0).numpy("x").bit_generator.random_raw()))
    assert len(first) == 256


def test_no_secret_stream_is_torchs() -> None:
    """torch's CPU generator looks at 32 bits of its seed: noise from it can be searched for and taken away."""
    low, high = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5 + 2**32)
    assert torch.equal(torch.randn(20, generator=low), torch.randn(20, generator=high))
    assert not hasattr(SecretRoot.from_os(), "torch")


def test_public_and_secret_streams_of_one_seed_differ() -> None:
    assert first_numbers(PublicSeed.from_int(0), "x") != first_numbers(SecretRoot.seeded(0), "x")
    assert PublicSeed.from_int(0) != SecretRoot(PublicSeed.from_int(0).root)
    assert PublicSeed.from_int(0) == PublicSeed.from_int(0) != PublicSeed.from_int(1)


def test_public_streams_are_golden() -> None:
    """Every participant derives them: they must never change between versions."""
    seed = PublicSeed.from_int(0)
    assert first_numbers(seed, "cohort", 1) == pytest.approx(
        [0.008487180428324304, 0.9830819718829471, 0.5099583702702343, 0.9159123572129062], abs=1e-12
    )
    tensor = torch.rand(4, generator=seed.torch("cohort", 1)).tolist()
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
    shown = f"{streams} {streams!r} {[streams]} {streams.numpy('a')!r}"
    for secret in (streams.root.hex(), repr(streams.root), repr(streams.root)[2:-1]):
        assert secret not in shown


def test_roots_are_immutable() -> None:
    root = SecretRoot.seeded(0)
    with pytest.raises(AttributeError):
        root.root = b"0"  # type: ignore[misc]
    public = PublicSeed.from_int(0)
    assert pickle.loads(pickle.dumps(public)) == public


def test_global_generators_are_left_alone(untouched_global_generator: None) -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first_numbers(SecretRoot.from_os(), "a")
    first_numbers(PublicSeed.from_int(1), "a")
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_a_secret_root_stays_in_its_process_and_is_never_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    root = SecretRoot.from_os()
    for write in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="never written down"):
            write(root)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(PrivacyError, match="another process"):
        root.numpy("noise")
