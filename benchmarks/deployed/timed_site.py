"""`fedlora site serve` with a clock: `python -m benchmarks.deployed.timed_site NOTES POLICY`.

fedlora tells nobody how long a round took, since a batch's size is private and shows in time. So this process puts its
clock around fedlora's own functions. The records it serves are made up.
"""

from __future__ import annotations

import functools
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.deployed.clock import note, process_started
from fedlora.cli.site import serve
from fedlora.engine.training import train
from fedlora.federation import cohort
from fedlora.federation.cohort import Cohort
from fedlora.federation.messages import RoundInstruction
from fedlora.site import daemon
from fedlora.site.desk import Desk
from fedlora.site.listeners import LocalListener
from fedlora.site.protocol import Answer, Request


def main(notes: Path, policy: Path) -> None:
    """Serve `policy`, and note the times of every round; a site does one at a time."""
    lap: dict[str, Any] = {}
    run, answer = Cohort.run, Desk.answer

    class TimedListener(LocalListener):
        def process_request(self, request: Any, client_address: Any) -> None:
            lap.clear()
            lap.update(connected=time.time(), process_started=process_started(_courier(request)))
            super().process_request(request, client_address)

    @functools.wraps(train)
    def timed_train(*arguments: Any, **named: Any) -> Any:
        lap["began"] = time.time()
        trained = train(*arguments, **named)
        lap["ended"] = time.time()
        return trained

    def timed_run(self: Cohort, instruction: RoundInstruction) -> Any:
        lap.update(run=instruction.run_id, round=instruction.round_index)
        return run(self, instruction)

    def timed_answer(self: Desk, request: Request) -> Answer:
        lap["asked"] = time.time()
        given = answer(self, request)
        if "ended" in lap:
            note(notes, **lap, answered=time.time())
        return given

    with (
        patch.object(daemon, "LocalListener", TimedListener),
        patch.object(cohort, "train", timed_train),
        patch.object(Cohort, "run", timed_run),
        patch.object(Desk, "answer", timed_answer),
    ):
        serve(policy)


def _courier(line: socket.socket) -> int:
    """The process at the other end."""
    pid, _, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(pid)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
