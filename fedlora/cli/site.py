"""`fedlora site`: what a data owner runs."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from fedlora.errors import FedloraError

Settings = Annotated[Path, typer.Argument(help="the site's policy, site.toml", show_default=True)]

site = typer.Typer(name="site", help="The data owner's side: a daemon that holds records, policy and ledger.")


@site.command()
def serve(settings: Settings = Path("site.toml")) -> None:
    """Answer the courier's requests until stopped (Ctrl-C, SIGTERM); a round at work is ended first."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # read on import: no hub is ever asked
    from fedlora.site.daemon import Daemon
    from fedlora.site.desk import Desk

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    desk = Desk(settings)
    try:
        daemon = Daemon(desk)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: daemon.stop())
        logging.getLogger("fedlora.site").info("serving %s", desk.policy.beside(desk.policy.site.socket))
        daemon.serve()
    finally:
        desk.close()


@site.command()
def status(settings: Settings = Path("site.toml")) -> None:
    """What the daemon is doing and what is spent."""
    from fedlora.privacy.policy import SitePolicy
    from fedlora.site.connection import DaemonAddress
    from fedlora.site.protocol import Request

    policy = SitePolicy.from_toml(settings)
    address = DaemonAddress(place=str(policy.beside(policy.site.socket)))
    answer = address.ask(Request(ask="status"), limit=60.0, patience=0.0)
    if answer.code != "ok":
        raise FedloraError(f"the daemon answered {answer.code}: only its own user and root may ask for its status")
    typer.echo(json.dumps(dict(answer.facts), indent=2))
