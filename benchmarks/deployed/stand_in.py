"""Many sites in one process, which compute nothing: `python -m benchmarks.deployed.stand_in RECIPE FOLDER`.

Each has a socket, FOLDER/<client>.sock, speaks as a site's daemon does, and answers an instruction with its theta plus
noise and with the facts that a site of that plan would tell: valid updates, so that what is under load is the server.
"""

from __future__ import annotations

import socketserver
import sys
import threading
from pathlib import Path

import numpy as np
import torch

from fedlora.config import RunConfig
from fedlora.federation import wire
from fedlora.federation.messages import ClientUpdate, RoundInstruction
from fedlora.federation.schedule import make_schedule
from fedlora.federation.site import Site
from fedlora.federation.sites import load_simulated_data, make_sites
from fedlora.provenance import code_digest
from fedlora.site.protocol import Answer, Request

NOISE = 1e-3
"""Standard deviation of an update's numbers, of about the size of the change that a private round makes."""


class StandIn(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """One site's socket."""

    request_queue_size = 8
    daemon_threads = True

    def __init__(self, place: Path, site: Site) -> None:
        self.site = site
        super().__init__(str(place), _Connection)

    def answer(self, request: Request) -> Answer:
        if request.ask == "enrol":
            return Answer(facts={"client": request.client, "code_digest": code_digest()})
        return Answer(update=wire.encode_update(self._update(wire.decode_instruction(request.instruction))))

    def _update(self, instruction: RoundInstruction) -> ClientUpdate:
        index, client = instruction.round_index, self.site.client
        noise = np.random.default_rng([client, index]).standard_normal(len(instruction.theta), dtype=np.float32)
        return ClientUpdate(
            run_id=instruction.run_id,
            round_index=index,
            phase=instruction.phase,
            client=client,
            layout_digest=instruction.layout_digest,
            vector=instruction.theta + NOISE * torch.from_numpy(noise),
            facts=self.site.facts(next(entry for entry in self.site.schedule if entry.index == index)),
        )


class _Connection(socketserver.StreamRequestHandler):
    server: StandIn

    def handle(self) -> None:
        self.wfile.write(self.server.answer(Request.read(self.rfile)).encode())  # type: ignore[arg-type]


def main(recipe: Path, folder: Path) -> None:
    config = RunConfig.from_toml(recipe)
    sites = make_sites(config, load_simulated_data(config), make_schedule(config))
    stand_ins = [StandIn(folder / f"{site.client}.sock", site) for site in sites]
    threads = [threading.Thread(target=stand_in.serve_forever) for stand_in in stand_ins]
    for thread in threads:
        thread.start()
    print("serving", flush=True)
    for thread in threads:  # until the process is ended
        thread.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
