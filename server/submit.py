"""Submit a run to a SuperLink and end as it ends: `python -m server.submit CONNECTION --out DIR [RECIPE] [--set …]`.

CONNECTION is a name in Flower's own configuration ($FLWR_HOME/config.toml). DIR is the run folder on the SuperLink's
host; with the folder of an interrupted run, and its recipe, that run goes on. Exit codes: 0 the run is done, 1 it
failed or cannot be reached, 2 bad input, 130 interrupted, which leaves the run alone. Flower's own command ends with 0
even where the run fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, FedloraError
from server.superlink import RunStatus, SuperLink

CHECKOUT = Path(__file__).resolve().parent.parent
POLL = 2.0
"""Seconds between two looks at the run."""
OUTAGE = 300.0
"""Seconds that the SuperLink may be out of reach; it may be on its way back, and then knows how the run ended."""


def submit(config: RunConfig, superlink: SuperLink) -> int:
    """Start a run; its number at the SuperLink.

    Raises:
        ConfigError: the run folder is no absolute path.
        FedloraError: Flower does not take the run.
    """
    if not Path(config.run.out).is_absolute():
        raise ConfigError(
            f"--out {config.run.out or '(none)'}, wanted an absolute path: it is a folder on the SuperLink's host, "
            "whose working folder is not yours"
        )
    return superlink.submit(config.to_flower(), CHECKOUT)


def wait(run: int, superlink: SuperLink) -> None:
    """Until the run has ended, saying where it stands.

    Raises:
        FedloraError: it failed, with Flower's words for it.
    """
    found, seen = RunStatus(status="", details=""), time.monotonic()
    while not found.finished:
        time.sleep(POLL if found.status else 0.0)
        told = found.status
        try:
            found, seen = superlink.status(run), time.monotonic()
        except FedloraError:
            if time.monotonic() - seen > OUTAGE:
                raise
            found = RunStatus(status="out of reach", details="")
        if found.status != told:
            print(f"run {run}: {found.status}", flush=True)
    if not found.completed:
        raise FedloraError(f"run {run} is {found.status}: {found.details or 'the SuperLink does not say why'}")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m server.submit", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("connection", help="name of the SuperLink in Flower's configuration")
    parser.add_argument("recipe", type=Path, nargs="?", help="TOML recipe; none is the quickstart")
    parser.add_argument("--out", required=True, help="run folder, an absolute path on the SuperLink's host")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="repeatable")
    chosen = parser.parse_args(arguments)
    overrides = [*chosen.set, f"run.out={json.dumps(chosen.out, ensure_ascii=False)}"]
    try:
        if chosen.recipe:
            config = RunConfig.from_toml(chosen.recipe, overrides)
        else:
            config = RunConfig.from_mapping({}, overrides)
        superlink = SuperLink(connection=chosen.connection)
        wait(submit(config, superlink), superlink)
    except FedloraError as error:
        print(f"fedlora: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"fedlora: no longer watching; the run goes on: flwr ls {chosen.connection}", file=sys.stderr)
        return 130
    print(f"done; the run folder on the SuperLink's host: {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
