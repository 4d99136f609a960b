"""When what happened in the rounds of a deployed run, seen from outside: by its run folder and by its sites' clocks."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.experiments.run_folder import RunFolder

Note = Mapping[str, float]
PARTS = {
    "waiting": "until the app's process begins: SuperNode sleeps 3 s whenever it finds nothing, SuperExec 0.1 s or 1 s",
    "starting": "Flower's imports, the app unpacked, the courier's imports, until it is at the daemon's socket",
    "daemon": "socket, request, policy, ledger, kept answer; not training",
    "training": "training",
    "returning": "until the server has the answer: SuperNode looks for it every 0.5 s, then the server does",
    "server": "check, average, checkpoint, until it asks for the next round",
    "importing": "Flower's imports, the app unpacked, the app's imports",
    "loading": "model, records",
}
"""Of a round, along the client that answered last. fedlora's add up to the round."""
LOOK = 0.003
"""Seconds between two looks; the times themselves are those of the files."""


@dataclass
class RunWatch:
    """Times of one run, from the files that its server writes."""

    folder: RunFolder
    asked: dict[int, float] = field(default_factory=dict)
    """When each round began."""
    answered: dict[int, dict[int, float]] = field(default_factory=dict)
    """When each client's answer was on the server's disk, by round."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look on in a thread of its own: a round's answers are there for hundredths of a second."""
        over = threading.Event()

        def look_on() -> None:
            while not over.wait(LOOK):
                self._look()

        thread = threading.Thread(target=look_on)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _look(self) -> None:
        """Note what is new, before the next round's takes its place."""
        with suppress(FileNotFoundError):  # as it is replaced at this moment, or removed with the run's end
            begun = self.folder.last_asked()
            if begun >= 0 and begun not in self.asked:
                self.asked[begun] = _written(self.folder.asked_file)
            for path in self.folder.answers_folder.glob("*.safetensors"):
                index, client = map(int, path.stem.split("-"))
                if client not in self.answered.setdefault(index, {}):
                    self.answered[index][client] = _written(path)

    def rounds(self, sites: Sequence[Sequence[Note]], *, count: int) -> list[dict[str, float]]:
        """Seconds of each of the first `count` rounds, whole, of the longest training in it, and of its parts.

        Args:
            sites: what each site's clock noted of this run, in the order of clients.
        """
        of_round = [{int(line["round"]): line for line in notes} for notes in sites]
        return [self._round(index, [notes[index] for notes in of_round]) for index in range(count)]

    def _round(self, index: int, notes: Sequence[Note]) -> dict[str, float]:
        begun, over = self.asked[index], self.asked[index + 1]
        site = max(notes, key=lambda note: note["answered"])
        arrived = self.answered.get(index, {}).get(notes.index(site))
        training = site["ended"] - site["began"]
        longest = max(note["ended"] - note["began"] for note in notes)
        return {
            "round": over - begun,
            "longest_training": longest,
            "overhead": over - begun - longest,
            "waiting": site["process_started"] - begun,
            "starting": site["connected"] - site["process_started"],
            "daemon": site["answered"] - site["connected"] - training,
            "training": training,
            **({} if arrived is None else {"returning": arrived - site["answered"], "server": over - arrived}),
        }


def flower_rounds(ends: Sequence[float], sites: Sequence[Sequence[Note]]) -> list[dict[str, float]]:
    """The same of an app of Flower's, as far as its clocks tell; parts along the site that had trained last.

    Args:
        ends: of every round, and before them the beginning of the first.
        sites: what each site noted, a line for each round, or nothing where nothing is trained.
    """
    rounds = []
    for index, (begun, over) in enumerate(itertools.pairwise(ends)):
        notes = [lines[index] for lines in sites if lines]
        longest = max((note["ended"] - note["began"] for note in notes), default=0.0)
        found = {"round": over - begun, "longest_training": longest, "overhead": over - begun - longest}
        if notes:
            site = max(notes, key=lambda note: note["ended"])
            found |= {
                "waiting": site["process_started"] - begun,
                "importing": site["imported"] - site["process_started"],
                "loading": site["began"] - site["called"],
                "training": site["ended"] - site["began"],
                "returning": over - site["ended"],
            }
        rounds.append(found)
    return rounds


def _written(path: Path) -> float:
    return path.stat().st_mtime_ns / 1e9
