"""`fedlora site status`: what the daemon of this site says of itself."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


def status(
    settings: Annotated[Path, typer.Argument(help="the site's policy, site.toml", show_default=True)] = Path(
        "site.toml"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """What is the daemon doing, how did it answer since its start, and what is spent?

    For the daemon's own user and root. Ends with 0 where it answers, whatever it says, and 2 where it cannot be asked.
    """
    from fedlora.errors import FedloraError

    facts = _asked(settings)
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False, indent=1))
        return
    try:
        _print(facts, settings)
    except (KeyError, TypeError, ValueError) as error:
        raise FedloraError("the daemon is of another version of fedlora; stop it and start it anew") from error


def _asked(settings: Path) -> dict[str, Any]:
    """The daemon's facts.

    Raises:
        InputError: there is no daemon, or this user may not ask it.
    """
    import shlex

    from fedlora.errors import DaemonUnreachable, InputError
    from fedlora.privacy.policy import SitePolicy
    from fedlora.site.connection import DaemonAddress
    from fedlora.site.protocol import Request

    policy = SitePolicy.from_toml(settings)
    socket = policy.beside(policy.site.socket)
    others = f"the daemon at {socket} tells its status to its own user and to root; ask as one of them"
    try:
        answer = DaemonAddress(place=str(socket)).ask(Request(ask="status"), limit=60.0, patience=0.0)
    except DaemonUnreachable as error:
        if isinstance(error.__cause__, PermissionError):
            raise InputError(others) from error
        raise InputError(
            f"no daemon answers at {socket}; start it with: fedlora site serve {shlex.quote(str(settings))}"
        ) from error
    if answer.code != "ok":
        raise InputError(others if answer.code == "refused" else f"the daemon at {socket} answered {answer.code}")
    return dict(answer.facts)


_ILL = {
    "policy": "the policy cannot be used, so that every request is refused",
    "ledger": "the ledger cannot be written, so that every round is refused",
    "answers": "the file of answers cannot be written, so that every round is refused",
    "disk": "the disk of the ledger is almost full",
}


def _print(facts: Mapping[str, Any], settings: Path) -> None:
    from rich.console import Console

    from fedlora.experiments.terminal import one_line

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 200
    doing = "at work" if facts["at_work"] else "waiting for requests"
    console.print(one_line(f"fedlora {facts['fedlora_version']} serves {settings}: {doing}"))
    if (health := facts["health"]) != "ok":
        console.print(one_line(f"not healthy: {_ILL.get(health, health)}; fedlora site check says more"), style="bold")
    console.print(_budgets(facts["data_sets"]))
    if facts["answers"]:
        console.print(_requests(facts["answers"]))
    else:
        console.print("nobody has asked anything since the start")


def _budgets(data_sets: list[Mapping[str, Any]]) -> Table:
    from fedlora.experiments.terminal import one_line, shown_epsilon

    table = _table("data set", "task", right=("ε counted", "cap", "left", "δ"))
    for one in data_sets:
        counted, most = one["epsilon_counted"], one["max_epsilon"]
        cap = math.inf if most is None else float(most)
        spent, left = "unknown", "unknown"
        if counted is not None:
            spent, left = shown_epsilon(counted), f"{math.floor(max(0.0, cap - counted) * 1e4) / 1e4:g}" if most else ""
        shown_cap = "no longer in the policy" if most is None else f"{cap:g}"
        table.add_row(one_line(one["name"]), one_line(one["task"]), spent, shown_cap, left, f"{one['max_delta']:g}")
    return table


def _requests(answers: list[Mapping[str, Any]]) -> Table:
    from fedlora.experiments.terminal import one_line

    table = _table("asked", "answered", right=("times",))
    for one in answers:
        table.add_row(one_line(one["ask"]), one_line(one["code"]), str(int(one["count"])))
    return table


def _table(*columns: str, right: tuple[str, ...]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table
