"""Answers that are dear to find, remembered on disk by the question they answer. Nothing private is ever put here.

* An entry is used only if its text matches its own SHA-256 and the whole question: a typo, a cut-off write or a renamed
  file is a miss, and the answer is found anew.
* It must belong to this user and be writable by nobody else, as ssh asks of its keys. Who can write as this user can
  change this code as well: against him a signature here would protect nothing.
* A folder that cannot be read or written is no error.

The folder is `$FEDLORA_CACHE`, or `fedlora` under `$XDG_CACHE_HOME` or `~/.cache`; in it one sub-folder per kind of
question.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def remembered(kind: str, question: Mapping[str, Any], find: Callable[[], Any]) -> Any:
    """The answer to `question`, from disk or by `find()`. Both are plain JSON values."""
    path = _folder() / kind / f"{_sha256(question)}.json"
    answer = _read(path, question)
    if answer is None:
        answer = find()
        _write(path, {"question": question, "answer": answer})
    return answer


def _folder() -> Path:
    override = os.environ.get("FEDLORA_CACHE")
    if override:
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "fedlora"


def _read(path: Path, question: Mapping[str, Any]) -> Any:
    """The remembered answer, or None where there is none that can be relied on."""
    try:
        with path.open(encoding="utf-8") as file:
            if not _only_ours(os.fstat(file.fileno())):
                return None
            entry = json.load(file)
        content = {"question": entry["question"], "answer": entry["answer"]}
        genuine = entry["sha256"] == _sha256(content) and _sha256(content["question"]) == _sha256(question)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return content["answer"] if genuine else None


def _only_ours(status: os.stat_result) -> bool:
    if not hasattr(os, "getuid"):  # no owners to compare, as on Windows
        return True
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Leave a complete entry or none: written beside its place, then renamed into it."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump({**content, "sha256": _sha256(content)}, file, indent=1)
        Path(file.name).replace(path)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
