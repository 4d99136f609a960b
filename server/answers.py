"""What clients have answered in the round under way, on the server's disk: nobody is asked again for what is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import ProtocolError
from fedlora.experiments.run_folder import replace_file
from fedlora.federation import wire
from fedlora.federation.messages import ClientUpdate, RoundInstruction


@dataclass(frozen=True)
class RoundAnswers:
    """RUN_DIR/answers: one file for each client that has answered, as it came over the wire."""

    folder: Path

    def begin(self, instruction: RoundInstruction) -> dict[int, ClientUpdate]:
        """What is there of this round already, by client; what belongs to another instruction goes."""
        self.folder.mkdir(exist_ok=True)
        asked = self.folder / "asked"
        if not asked.is_file() or asked.read_text(encoding="utf-8") != instruction.digest:
            for path in self.folder.iterdir():
                path.unlink()
            replace_file(asked, instruction.digest.encode())
        found = [_read(path) for path in sorted(self.folder.glob("*.safetensors"))]
        return {update.client: update for update in found if update is not None}

    def keep(self, update: ClientUpdate, data: bytes) -> None:
        """`data` is `update` as it came."""
        replace_file(self.folder / f"{update.round_index}-{update.client}.safetensors", data)


def _read(path: Path) -> ClientUpdate | None:
    """None for a file that is damaged: its client is asked again, and gives the same answer."""
    try:
        return wire.decode_update(path.read_bytes())
    except (ProtocolError, OSError):
        return None
