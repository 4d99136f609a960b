"""Which records are kept from training: decided by each record about itself alone."""

from __future__ import annotations

import hashlib

import numpy as np

from fedlora.data.fingerprint import record_digest
from fedlora.data.glue import Records
from fedlora.randomness import PublicSeed


def held_out(records: Records, share: float, seed: PublicSeed) -> np.ndarray:
    """For each record whether it is kept back, bool [n]: its hash under the public key lies below `share`.

    A split by position or by shuffling would move other records when one is added or removed, so that neighbouring data
    sets would differ in more than one record. Equal records fall on the same side. How many are kept back is about
    `share` of them, depends on the texts, and is private.
    """
    limit = share * 2.0**64
    texts = zip(*records.texts, strict=True)
    hashes = (
        _keyed(record_digest(row, label), seed) for row, label in zip(texts, records.labels.tolist(), strict=True)
    )
    return np.fromiter((value < limit for value in hashes), dtype=bool, count=len(records))


def _keyed(digest: bytes, seed: PublicSeed) -> int:
    return int.from_bytes(hashlib.blake2b(digest, key=seed.root, digest_size=8, person=b"fedlora held-out").digest())
