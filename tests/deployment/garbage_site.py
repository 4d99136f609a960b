"""A site's stand-in that enrols like any other and answers every round with other rubbish: `python … SOCKET CLIENT`."""

from __future__ import annotations

import socket
import socketserver
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from fedlora.federation import wire
from fedlora.federation.messages import ClientUpdate, RoundInstruction
from fedlora.provenance import code_digest
from fedlora.site.protocol import MAGIC, Answer, Request

FACTS = {
    "noise_seeded": False,
    "unit": "record",
    "relation": "add/remove",
    "delta": 1e-3,
    "epsilon": 0.0,
    "accountant": "pld",
    "sampling_probability": 0.1,
    "noise_multiplier": 1.0,
    "effective_noise_multiplier": 1.0,
    "num_steps": 2,
    "mechanism": "gaussian",
    "clip_norm": 1.0,
    "clipping": "flat",
    "phases": [],
}


def sound(instruction: RoundInstruction, client: int) -> ClientUpdate:
    """As a site with nothing to say would answer, but for its ε of 0."""
    return ClientUpdate(
        run_id=instruction.run_id,
        round_index=instruction.round_index,
        phase=instruction.phase,
        client=client,
        layout_digest=instruction.layout_digest,
        vector=instruction.theta + 1e-3,
        facts={"client": client, **FACTS},
    )


def answered(update: ClientUpdate) -> bytes:
    return Answer(update=wire.encode_update(update)).encode()


def not_finite(update: ClientUpdate) -> bytes:
    """Our own encoder refuses such numbers, so they are put into its bytes."""
    data = wire.encode_update(replace(update, vector=torch.full_like(update.vector, 1.0)))
    return Answer(
        update=data.replace(torch.ones(1).numpy().tobytes(), torch.full((1,), torch.nan).numpy().tobytes())
    ).encode()


RUBBISH: dict[str, Callable[[ClientUpdate], bytes]] = {
    "no frame": lambda update: b"\xff" * 4096,
    "a length without bound": lambda update: MAGIC + (20).to_bytes(4, "big") + (2**62).to_bytes(8, "big"),
    "cut short": lambda update: answered(update)[:-100],
    "a wrong shape": lambda update: answered(replace(update, vector=update.vector[:-1])),
    "not finite": not_finite,
    "of another round": lambda update: answered(replace(update, round_index=update.round_index - 1)),
    "of another run": lambda update: answered(replace(update, run_id="0" * 33)),
    "of another client": lambda update: answered(replace(update, client=0, facts={**update.facts, "client": 0})),
    "out of range": lambda update: answered(replace(update, vector=update.vector + 1e6)),
}
"""One for each round."""


class Rubbish(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        request = Request.read(self.rfile)  # type: ignore[arg-type]
        if request.ask == "enrol":
            self.wfile.write(Answer(facts={"client": request.client, "code_digest": code_digest()}).encode())
            return
        instruction = wire.decode_instruction(request.instruction)
        self.wfile.write([*RUBBISH.values()][instruction.round_index](sound(instruction, request.client)))


if __name__ == "__main__":

    class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
        address_family = socket.AF_UNIX

    with Server(sys.argv[1], Rubbish) as server:  # type: ignore[arg-type]
        server.serve_forever()
