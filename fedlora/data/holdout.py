"""Which records are kept from training, teach gates or choose settings: decided by each record about itself alone."""

from __future__ import annotations

import hashlib

import numpy as np

from fedlora.data.fingerprint import record_digest
from fedlora.data.glue import Records
from fedlora.randomness import PublicSeed

_EVERY_RUN = PublicSeed.from_int(0)


def held_out(records: Records, share: float, seed: PublicSeed) -> np.ndarray:
    """For each record whether it is kept back, bool [n]: its hash under the public key lies below `share`.

    A split by position or by shuffling would move other records when one is added or removed, so that neighbouring data
    sets would differ in more than one record. Equal records fall on the same side. How many are kept back is about
    `share` of them, depends on the texts, and is private.
    """
    return _share(records, share, seed, b"fedlora held-out")


def gate_half(records: Records, seed: PublicSeed) -> np.ndarray:
    """For each record whether it teaches the gates of a bilevel search rather than the weights, bool [n].

    About half of them; split as by `held_out`, independently of it.
    """
    return _share(records, 0.5, seed, b"fedlora gates")


def training_sample(records: Records, share: float) -> np.ndarray:
    """For each record whether a short experiment uses it, bool [n]; the same ones in every run, whatever its seed.

    For simulations only. How many they are depends on their texts, so that a real site, whose n is public, would give
    away a count of its records.
    """
    return _share(records, share, _EVERY_RUN, b"fedlora sample")


def tuning_half(records: Records) -> np.ndarray:
    """For each public validation record whether settings are chosen on it, bool [n]; the same in every run.

    The other half is what a sweep reports after that, so that nothing is reported on what was chosen by.
    """
    return _share(records, 0.5, _EVERY_RUN, b"fedlora tuning")


def _share(records: Records, share: float, seed: PublicSeed, purpose: bytes) -> np.ndarray:
    """About `share` of the records: those whose keyed hash, of their own texts and label alone, is low enough."""
    limit = share * 2.0**64
    texts = zip(*records.texts, strict=True)
    hashes = (
        _keyed(record_digest(row, label), seed, purpose)
        for row, label in zip(texts, records.labels.tolist(), strict=True)
    )
    return np.fromiter((value < limit for value in hashes), dtype=bool, count=len(records))


def _keyed(digest: bytes, seed: PublicSeed, purpose: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(digest, key=seed.root, digest_size=8, person=purpose).digest())
