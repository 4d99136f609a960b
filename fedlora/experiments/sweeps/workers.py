"""Who runs the cells of a sweep: processes of this machine. `cluster` has the same for Ray."""

from __future__ import annotations

import itertools
import multiprocessing
import queue
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Protocol, Self

from fedlora.experiments.sweeps.worker import Job, serve

PROCESS_DIED = "its process died: killed, or out of memory; try fewer workers"


class Workers(Protocol):
    """Does jobs, several at once."""

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str] | None]:
        """Each job with its error ("" if it is done) as it ends; None now and then, so that the caller can look up."""
        ...


class LocalWorkers:
    """Processes of this machine, each with what its cells share; one that dies takes its cell with it and no other."""

    def __init__(self, count: int, *, threads: int = 1, accelerators: int = 0) -> None:
        """Start nothing yet.

        Args:
            count: of processes.
            threads: of each on the CPU.
            accelerators: of this machine; with several, workers take them in turn.
        """
        names = itertools.cycle(map(str, range(accelerators))) if accelerators > 1 else itertools.repeat(None)
        self._processes = [_Process(threads, name) for _, name in zip(range(count), names, strict=False)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.close()

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str] | None]:
        """As `Workers.run`."""
        waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        ended: queue.SimpleQueue[tuple[Job, str]] = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)
        for process in self._processes[: len(jobs)]:
            threading.Thread(target=process.work, args=(waiting, ended), daemon=True).start()
        left = len(jobs)
        while left:
            try:
                yield ended.get(timeout=1)
                left -= 1
            except queue.Empty:
                yield None


class _Process:
    """One worker's process, started when it is needed and again after it died."""

    def __init__(self, threads: int, accelerator: str | None) -> None:
        self._how = (threads, accelerator)
        self._running: tuple[BaseProcess, Connection] | None = None
        self._closed = False

    def work(self, waiting: queue.SimpleQueue[Job], ended: queue.SimpleQueue[tuple[Job, str]]) -> None:
        """In a thread of the sweep's process: hand over one job after the other while there are any."""
        while not self._closed:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            ended.put((job, self._do(job)))

    def _do(self, job: Job) -> str:
        try:
            _, jobs = self._running or self._start()
            jobs.send(job)
            error: str = jobs.recv()
        except (EOFError, OSError):
            self._end()
            return PROCESS_DIED
        return error

    def _start(self) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")  # a fork would copy threads of torch that are not there any more
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, *self._how), daemon=True)
        process.start()
        theirs.close()  # or its death would go unnoticed
        self._running = process, ours
        return self._running

    def close(self) -> None:
        """Stop it where it is, for good. What it was at goes on from its last whole round."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        if self._running is not None:
            process, jobs = self._running
            self._running = None
            process.terminate()
            process.join()
            jobs.close()
