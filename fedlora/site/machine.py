"""What a site's machine has to be: disks that keep what is written, a clock, entropy, the software at hand."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from fedlora.privacy.policy import SitePolicy
from fedlora.provenance import code_digest, versions
from fedlora.randomness import SecretRoot
from fedlora.site.answers import KEPT_RUNS
from fedlora.site.finding import Finding, bad, good, warning

_MOUNTS = Path("/proc/self/mountinfo")
# SQLite's locks do not hold on these, or nobody can tell.
_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "9p", "ceph", "glusterfs", "lustre", "beegfs", "gpfs"}
_PASSING = {"tmpfs": "is gone when the machine restarts", "overlay": "goes when the container does"}
_NUMBERS_PER_WEIGHT = 3
"""float32: the update, and the two moments that Adam keeps where a run has training.keep_state."""
_MARGIN = 64 * 2**20
"""Bytes, for logs, the ledger's growth and SQLite's journals."""
_PATIENCE = 0.05


def check_machine() -> Iterator[Finding]:
    """What does not depend on a policy."""
    yield check_software()
    yield check_secrets()


def check_software() -> Finding:
    found = versions(("fedlora", "torch"))
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    return good("software", f"{listed}, code {code_digest()[:16]}")


def check_secrets() -> Finding:
    """Noise and batches come from it: the system's generator is ready, and no two roots are alike."""
    check = "secrets"
    try:
        os.getrandom(32, os.GRND_NONBLOCK)
    except BlockingIOError:
        return bad(
            check, "the system has not gathered entropy yet", "wait, or give the machine a generator: rngd, virtio"
        )
    first, second = (SecretRoot.from_os().numpy("check").bytes(32) for _ in range(2))
    if first == second or secrets.token_bytes(32) == bytes(32):
        return bad(check, "two secrets are alike", "let nothing run here: the system's random numbers are broken")
    return good(check, "32 bytes of the operating system, ChaCha20")


def check_clock(last_charge: str | None) -> Finding:
    """Against what is known to be past: the ledger's last row, and the files of this package.

    Args:
        last_charge: time of the ledger's last row in UTC, as stored.
    """
    check, now = "clock", time.time()
    advice = "set the clock, best by NTP: rows of the ledger say when something was spent"
    built = max(path.stat().st_mtime for path in Path(__file__).parents[1].rglob("*.py"))
    if last_charge is not None and now < datetime.fromisoformat(last_charge).timestamp():
        return bad(check, f"{_shown(now)} is before the ledger's last row, {last_charge}", advice)
    if now < built:
        return bad(check, f"{_shown(now)} is before this package's files, {_shown(built)}", advice)
    start, started = time.time(), time.monotonic()
    time.sleep(_PATIENCE)
    if abs((time.time() - start) - (time.monotonic() - started)) > _PATIENCE:
        return warning(check, "it jumped during this check", "find out what sets it; NTP should slew and not step")
    return good(check, _shown(now))


def check_disk(policy: SitePolicy, num_weights: int | None) -> Iterator[Finding]:
    """Where the ledger and the answers lie: a local disk that can be written, with room.

    Args:
        num_weights: trained numbers of the largest adapter that the policy allows; None where that is not known.
    """
    for name, path in (("ledger", policy.ledger), ("answers", policy.beside(policy.site.answers))):
        yield _check_place(f"disk of the {name}", path)
    folder = policy.beside(policy.site.answers).absolute().parent
    if num_weights is not None and folder.is_dir():
        yield _check_room(folder, num_weights)


def _check_place(check: str, path: Path) -> Finding:
    folder = path.absolute().parent
    if not folder.is_dir():
        return bad(check, f"there is no folder {folder}", "make it, or correct the policy")
    kind = filesystem(folder)
    if kind in _REMOTE or (kind or "").startswith("fuse"):
        return bad(check, f"{folder} is {kind}, where locks do not hold", "move it to a local disk")
    closed = [place for place in (path, folder) if place.exists() and not os.access(place, os.W_OK)]
    if closed:
        return bad(check, f"this user cannot write to {closed[0]}", "give it to the daemon's user, on a writable disk")
    if kind in _PASSING:
        return warning(check, f"{folder} is {kind}, which {_PASSING[kind]}", "move it to a disk that stays")
    if kind is None:
        return warning(check, f"no telling what {folder} is", "see for yourself that it is a local disk")
    return good(check, f"{kind}, can be written")


def filesystem(path: Path) -> str | None:
    """Type of the file system that an existing folder is on; None where the system does not tell."""
    place, found, longest = path.resolve(), None, -1
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    for line in lines:
        before, _, after = line.partition(" - ")
        mount = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split()[4])
        if place.is_relative_to(mount) and len(mount) >= longest:  # of two on one place the later one counts
            found, longest = after.split()[0], len(mount)
    return found


def _check_room(folder: Path, num_weights: int) -> Finding:
    """For the last answers of all runs that are kept, once more while one of them is replaced."""
    needed = (KEPT_RUNS + 2) * 4 * num_weights * _NUMBERS_PER_WEIGHT + _MARGIN
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.2f} GB free in {folder}; answers of {KEPT_RUNS} runs and the ledger need {needed / 1e9:.2f}"
    if free < needed:
        return bad("room", found, "make room: where nothing can be written, rounds are refused")
    return good("room", found)


def _shown(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
