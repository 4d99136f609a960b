"""Who else on this machine can read or write what belongs to a site, and who reaches its socket.

By owners and modes alone: what the process may do itself says nothing about others, and nothing at all under root.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedlora.privacy.policy import NO_FOLDER, SitePolicy
from fedlora.site.daemon import LONGEST_SOCKET_PATH
from fedlora.site.finding import Finding, bad, good, warning

_SHOWN = 3


def check_permissions(policy: SitePolicy) -> Iterator[Finding]:
    """Of policy, ledger, answers, records and the folders above them."""
    group = _group_id(policy.site.socket_group)
    ledger, answers = policy.ledger, policy.beside(policy.site.answers)
    beside = [path.with_name(path.name + end) for path in (ledger, answers) for end in ("-wal", "-shm", "-journal")]
    yield _owned("permissions of the policy", [policy.path], group)
    yield _owned("permissions of the ledger", [path for path in (ledger, answers, *beside) if path.exists()], group)
    for name, data in policy.data.items():
        if data.source not in NO_FOLDER and policy.beside(data.source).is_dir():
            place = policy.beside(data.source)
            yield _owned(f"permissions of records {name}", [place, *sorted(place.rglob("*"))], group)
    if policy.tls is not None:
        key = policy.beside(policy.tls.key)
        yield _owned("permissions of the TLS key", [key] if key.exists() else [], group)
    yield _folders({path.absolute().parent for path in (policy.path, ledger, answers)})


def check_socket(policy: SitePolicy) -> Finding:
    """Whether the daemon can listen at its socket, and whom the policy lets in can reach it."""
    check, path, name = "socket", policy.beside(policy.site.socket).absolute(), policy.site.socket_group
    length = len(os.fsencode(policy.beside(policy.site.socket)))
    if length > LONGEST_SOCKET_PATH:
        return bad(
            check, f"its path has {length} bytes, at most {LONGEST_SOCKET_PATH} are allowed", "name a shorter one"
        )
    if not path.parent.is_dir():
        return bad(check, f"there is no folder {path.parent}", "make it, or name another site.socket")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return bad(check, f"this user cannot make it in {path.parent}", "give the folder to the daemon's user")
    if path.exists() and not path.is_socket():
        return bad(check, f"{path} is there and is no socket", "name another site.socket")
    if not name:
        return good(check, f"{path}, for this user alone")
    return _for_group(check, path, name)


def _for_group(check: str, path: Path, name: str) -> Finding:
    group = _group_id(name)
    if group is None:
        return bad(check, f"there is no group {name}", f"make it: groupadd {name}; and put the courier's user into it")
    if os.geteuid() != 0 and group not in (*os.getgroups(), os.getegid()):
        return bad(check, f"this user is not in the group {name}", f"usermod -aG {name} {_user(os.geteuid())}")
    closed = [folder for folder in path.parents if not _can_pass(folder, group)]
    if closed:
        return bad(
            check,
            f"the group {name} does not get through {closed[0]} (mode {_mode(closed[0])})",
            "put the socket into a folder of its own, such as /run/fedlora with "
            f"install -d -o {_user(os.geteuid())} -g {name} -m 0750 /run/fedlora",
        )
    return good(check, f"{path}, for the group {name}")


def _owned(check: str, paths: list[Path], courier_group: int | None) -> Finding:
    """Files and folders that nobody else may write, and strangers and couriers not read."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        for problem in _problems(path, courier_group):
            found.setdefault(problem, []).append(path)
    if not found:
        return good(check, "for their owner alone" if paths else "there are none yet")
    text = "; ".join(f"{_listed(paths)} {problem}" for problem, paths in found.items())
    if any("belongs" in problem for problem in found):
        user = _user(os.geteuid())
        return bad(check, text, f"this check runs as {user}: run it as the daemon's user, or chown -R {user} them")
    return bad(check, text, _closing(sorted({path for paths in found.values() for path in paths})))


def _problems(path: Path, courier_group: int | None) -> Iterator[str]:
    status = path.stat()
    mode, open_to_all = status.st_mode, all(_can_pass(folder, None) for folder in path.absolute().parents)
    if status.st_uid not in (os.geteuid(), 0):  # root can do anything anyhow
        yield f"belongs to {_user(status.st_uid)}"
    if mode & stat.S_IWGRP or (mode & stat.S_IWOTH and open_to_all):
        yield "can be written by others"
    if mode & stat.S_IROTH and open_to_all:
        yield "can be read by everybody"
    elif mode & stat.S_IRGRP and status.st_gid == courier_group:
        yield "can be read by the courier's group"


def _folders(folders: Iterable[Path]) -> Finding:
    """Who can write to a folder above the policy or the ledger can put others in their place."""
    check = "folders above them"
    there = sorted(place for place in folders if place.is_dir())  # one that is missing has a row of its own
    for folder in sorted({above for place in there for above in (place, *place.parents)}):
        status = folder.stat()
        foreign = status.st_uid not in (os.geteuid(), 0)
        writable = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
        if foreign:
            return bad(check, f"{folder} belongs to {_user(status.st_uid)}", "move the site below a folder of its own")
        if writable:
            return bad(check, f"everybody can write to {folder} (mode {_mode(folder)})", f"chmod o-w {folder}")
    own = there[0]
    if own.stat().st_mode & stat.S_IWGRP:
        return warning(check, f"a group can write to {own} (mode {_mode(own)})", f"chmod g-w {own}")
    return good(check, "only this user and root can write to them")


def _can_pass(folder: Path, group: int | None) -> bool:
    """Whether everybody, or else members of `group`, may pass through `folder`."""
    status = folder.stat()
    if group is not None and status.st_gid == group:
        return bool(status.st_mode & stat.S_IXGRP)
    return bool(status.st_mode & stat.S_IXOTH)


def _group_id(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid if name else None
    except KeyError:
        return None


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _mode(path: Path) -> str:
    return f"{stat.S_IMODE(path.stat().st_mode):04o}"


def _listed(paths: list[Path]) -> str:
    names = ", ".join(str(path) for path in paths[:_SHOWN])
    return f"{names} and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else names


def _closing(paths: list[Path]) -> str:
    if len(paths) <= _SHOWN:
        return f"chmod go-rwx {' '.join(map(str, paths))}"
    return f"chmod -R go-rwx {os.path.commonpath(paths)}"
