"""Whether a site could do a round now, as far as can be seen at a glance. `fedlora site check` looks closely."""

from __future__ import annotations

import os
import shutil

from fedlora.errors import PolicyRefused
from fedlora.privacy.policy import SitePolicy

LEAST_ROOM = 64 * 2**20
"""Bytes on the disk of the ledger, below which the next answer may not fit."""


def health(policy: SitePolicy) -> str:
    """What keeps every round from being done, in one word: ledger, answers, disk or policy; empty where nothing does.

    Waits for nobody: neither for the round at work nor for who holds the ledger.
    """
    for word, path in (("ledger", policy.ledger), ("answers", policy.beside(policy.site.answers))):
        if not all(os.access(place, os.W_OK) for place in (path, path.parent)):  # SQLite makes a file beside it
            return word
    if shutil.disk_usage(policy.ledger.parent).free < LEAST_ROOM:
        return "disk"
    try:
        SitePolicy.from_toml(policy.path)
    except PolicyRefused:
        return "policy"
    return ""
