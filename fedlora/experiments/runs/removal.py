"""Removing a run: its row and its folder, and nothing else.

The row goes first. Killed after that, the folder is still a whole run, which the next look at it stores again. Then one
rename takes the folder out of sight, and what a kill leaves of it is cleared by the next removal.
"""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

from fedlora.errors import StoreError
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.runs.gathering import PLACES
from fedlora.experiments.runs.store import FILE_NAME, Store

_REMOVED = ".removed-"


def check_removable(root: Path, name: str) -> None:
    """Refuse what is not the folder of a run right inside `root`, before anything is removed.

    Args:
        root: the folder of runs.
        name: of the run, as the store has it. Stores come from other machines too, so it is not trusted.

    Raises:
        StoreError: it is another place, a link, no run folder, or a trial, which other runs' records count.
    """
    parts = PurePosixPath(name).parts
    if not parts or "/".join(parts[:-1]) not in PLACES or parts[-1] in ("..", "/") or parts[-1].startswith("."):
        raise StoreError(f"{name!r} is not the folder of a run in {root} and is left as it is")
    if PLACES["/".join(parts[:-1])] == "trial":
        raise StoreError(
            f"{name} is a trial and is left as it is: what it released counts in the ε of the cells that were "
            f"chosen by it; the whole sweep can go with its folder, {root}"
        )
    folder = root / name
    if folder.is_symlink() or folder.resolve() != root.resolve() / name:
        raise StoreError(f"{folder} is a link to another place and is left as it is; remove it by hand if you mean it")
    if folder.exists() and not RunFolder(folder).config_file.is_file():
        raise StoreError(f"{folder} is not a run folder (it has no config.toml) and is left as it is")


def remove_run(root: Path, name: str) -> None:
    """Remove a run that `check_removable` lets pass. Of a run whose folder is gone, only the row is left to go.

    Raises:
        StoreError: as there, or the store cannot be changed; nothing was removed.
        RunFolderError: another process is at work on the run; nothing was removed.
    """
    check_removable(root, name)
    folder = root / name
    if not folder.exists():
        _forget(root, name)
        return
    removed = folder.with_name(f"{_REMOVED}{folder.name}")
    with RunFolder(folder).claimed():
        if removed.exists():
            shutil.rmtree(removed)
        _forget(root, name)
        folder.rename(removed)
    shutil.rmtree(removed)


def clear_removed(root: Path) -> None:
    """What removals left that were killed."""
    for place in PLACES:
        for folder in (root / place).glob(f"{_REMOVED}*"):
            shutil.rmtree(folder, ignore_errors=True)


def _forget(root: Path, name: str) -> None:
    if (root / FILE_NAME).is_file():
        with Store.open(root) as store:
            store.remove(name)
