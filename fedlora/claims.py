"""Files that one process claims for as long as it has them open, and whether one does."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO, Any

from fedlora.errors import FedloraError

_LOOK_SECONDS = 0.1
"""Longer than anybody needs to see whether a file is claimed."""


def claim(file: IO[Any], refusal: FedloraError) -> None:
    """Lock `file` for as long as it is open, so that a claim ends with its process, however that ends.

    Raises:
        FedloraError: `refusal`; another process has it.
    """
    end = time.monotonic() + _LOOK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise refusal from error
        time.sleep(_LOOK_SECONDS / 10)  # somebody may be looking only, as `is_claimed` does


def is_claimed(path: Path) -> bool:
    """Whether some process has claimed the file at `path`; False also where there is nothing to claim."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
