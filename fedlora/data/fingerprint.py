"""What a site's ledger belongs to: a name for the data that does not depend on the order of its records."""

from __future__ import annotations

import hashlib

from fedlora.data.glue import Records


def fingerprint(records: Records) -> str:
    """SHA-256, as 64 hex digits, of the multiset of (texts, label).

    Shuffling changes nothing; changing, adding, removing or repeating one record does. Further columns do not count:
    no training sees them. It is a hash of private text: it stays at the site.
    """
    texts = zip(*records.texts, strict=True)
    digests = sorted(record_digest(row, label) for row, label in zip(texts, records.labels.tolist(), strict=True))
    return hashlib.sha256(b"fedlora records 1" + b"".join(digests)).hexdigest()


def record_digest(row: tuple[str, ...], label: int | float) -> bytes:
    """SHA-256 of one record's texts and label."""
    digest = hashlib.sha256(repr(label).encode())
    for text in row:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)  # the length keeps ("ab", "c") from ("a", "bc")
    return digest.digest()
