"""A hostile app to submit: its server asks a site for what it should not, and notes what came of it.

Its client part is fedlora's own courier; the folder is made by `write_app`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import tomli_w

from deploy.loopback import ROOT
from fedlora.config import RunConfig

_SERVER = """
import json, time
from pathlib import Path
import torch
from flwr.serverapp import ServerApp
from fedlora.config import RunConfig
from fedlora.federation import wire
from fedlora.federation.messages import RoundInstruction
from fedlora.federation.workbench import build_workbench
from server.post import Post, failure_in
from server.transport import _packed

app = ServerApp()
NOTES = Path({notes!r})

@app.main()
def main(grid, context):
    config = RunConfig.from_flower(context.run_config).with_overrides("run.transport=flower")
    bench, own = build_workbench(config), config.digest()[:16] + "-" + "0" * 16

    def question(index, theta=0.0, run=own):
        entry = bench.schedule[index]
        layout = bench.payload_layout(entry.phase).digest
        return wire.encode_instruction(RoundInstruction(run_id=run, round_index=index, phase=entry.phase,
            layout_digest=layout, theta=torch.full((bench.layout.size,), theta)))

    def ask(data):
        post, heard = Post(grid=grid), []
        while not (nodes := list(grid.get_node_ids())):
            time.sleep(0.1)
        post.send(_packed(data), nodes[0], "train", "", ttl=120.0)
        while not heard:
            time.sleep(0.05)
            heard = post.fetch()
        reply = heard[0][1]
        if (code := failure_in(reply)) is not None:
            return code
        return bytes(reply.content["update"]["bytes"].data).hex()

    def questions():
        yield "first", question(0)
        yield "replayed", question(0)
        yield "another for the same round", question(0, theta=0.1)
        yield "passing one over", question(2)
        yield "out of order", question(1)
        yield "an old one replayed", question(0)
        yield "a run of another configuration", question(0, run="f" * 16 + own[16:])
        yield "out of range", question(2, theta=11.0, run=own[:-1] + "1")
        yield "rubbish", b"rubbish"

    notes = {{name: {{"asked": data.hex(), "answered": ask(data)}} for name, data in questions()}}
    NOTES.with_suffix(".partial").write_text(json.dumps(notes))
    NOTES.with_suffix(".partial").replace(NOTES)
"""


def write_app(folder: Path, config: RunConfig, notes: Path) -> Path:
    """An app in `folder` whose run has `config` and writes to `notes` what the first node answered."""
    folder.mkdir()
    for package in ("clients", "server"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "server" / "hostile.py").write_text(_SERVER.format(notes=str(notes)))
    project = {
        "project": {"name": "hostile", "version": "0.1.0", "license": "Apache-2.0"},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "stranger",
                    "components": {"serverapp": "server.hostile:app", "clientapp": "clients.app:app"},
                    "config": _nested(config),
                }
            }
        },
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps(project))
    return folder


def _nested(config: RunConfig) -> dict[str, dict[str, object]]:
    tables: dict[str, dict[str, object]] = {}
    for key, value in config.to_flower().items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    return tables
