"""Runs a command, watches its whole tree of processes, and leaves none of them behind."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

import psutil  # type: ignore[import-untyped]

POLL = 0.05  # seconds; how exactly the end is seen
WEIGH_EVERY = 1.0  # seconds; reading proportional set sizes is not free
GRACE = 10.0  # seconds that helpers get to end after the command has


class CommandFailed(Exception):
    """The command ended with another status than 0, or ran past its limit."""


@dataclass(frozen=True)
class Outcome:
    """Of one command."""

    seconds: float
    peak_bytes: int
    """Largest sum of proportional set sizes seen: a page that n processes share counts 1/n for each."""
    output: str


@dataclass
class _Tree:
    """The command's process and everything it started, also what has been handed to init meanwhile."""

    root: psutil.Process
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    def weigh(self) -> int:
        for process in (self.root, *self.root.children(recursive=True)):
            self.seen.setdefault(process.pid, process)
        return sum(map(_proportional_size, self.seen.values()))

    def end(self) -> None:
        """Wait for the rest of the tree, then end it."""
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=GRACE)
        for process in alive:
            process.kill()  # checks that the id still belongs to the process that was seen
        psutil.wait_procs(alive, timeout=GRACE)


def run(command: Sequence[str], *, cwd: Path, environment: Mapping[str, str], limit: float) -> Outcome:
    """Run `command` to its end; wall clock includes everything from its start on.

    Raises:
        CommandFailed: with the end of what it printed.
    """
    with TemporaryFile("w+", encoding="utf-8") as printed:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=printed, stderr=subprocess.STDOUT, text=True
        )
        tree = _Tree(psutil.Process(process.pid))
        peak, weighed = 0, 0.0
        try:
            while process.poll() is None and time.perf_counter() - start < limit:
                if time.perf_counter() - weighed >= WEIGH_EVERY:
                    peak, weighed = max(peak, _weigh(tree)), time.perf_counter()
                time.sleep(POLL)
            seconds = time.perf_counter() - start
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            tree.end()
        printed.seek(0)
        output = printed.read()
    if process.returncode != 0:
        raise CommandFailed(f"status {process.returncode} after {seconds:.0f} s:\n{output[-3000:]}")
    return Outcome(seconds, peak, output)


def _weigh(tree: _Tree) -> int:
    try:
        return tree.weigh()
    except psutil.NoSuchProcess:
        return 0


def _proportional_size(process: psutil.Process) -> int:
    try:
        memory = process.memory_full_info()
    except psutil.Error:
        return 0
    return int(getattr(memory, "pss", memory.rss))
