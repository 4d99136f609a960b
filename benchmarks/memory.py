"""Peak memory: of one step in a fresh process, and of a whole tree of processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def step_memory(contender: str, dtype: str, attention: str, records: int, tokens: int) -> int | None:
    """Bytes that one step needs beyond the loaded, warmed-up model; None where the system does not tell (not Linux)."""
    if not CLEAR.exists():
        return None
    arguments = [contender, dtype, attention, str(records), str(tokens)]
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        text=True,
    )
    return int(json.loads(answer.stdout))


def _measure(contender: str, dtype: str, attention: str, records: str, tokens: str) -> int:
    """What the child process does: warm up on a small batch, reset the peak, take one step."""
    from benchmarks.batches import padded_batch
    from benchmarks.contenders import CONTENDERS, Base, Execution, Settings

    taker = CONTENDERS[contender](Base.load(Execution(dtype, attention)), Settings())
    taker.step(*padded_batch(2, 8))
    batch = padded_batch(int(records), int(tokens))
    before, peak = peak_during(lambda: taker.step(*batch))
    return peak - before


def peak_during(task: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that this process has resident before `task`, and the most while it runs. Linux only."""
    CLEAR.write_text("5", encoding="ascii")  # resets VmHWM to VmRSS
    before = _status("VmRSS")
    task()
    return before, _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
