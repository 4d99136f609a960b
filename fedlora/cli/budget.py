"""`fedlora budget`: what a site's ledger says, and whether it is whole."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fedlora.experiments.budget import Budget, DataSetBudget


def budget(
    ledger: Annotated[Path, typer.Argument(help="a site's ledger file")],
    verify: Annotated[bool, typer.Option("--verify", help="only check every row and print the head digest")] = False,
    head: Annotated[str | None, typer.Option(help="head digest noted earlier, which must be in the ledger")] = None,
    policy: Annotated[Path | None, typer.Option(help="site.toml whose caps hold")] = None,
    delta: Annotated[float, typer.Option(help="δ for data sets without a cap")] = 1e-5,
    as_json: Annotated[bool, typer.Option("--json", help="for programs; ε = ∞ is written as inf")] = False,
) -> None:
    """What has each data set spent, what is left, and which runs spent it? Reads the ledger and never changes it."""
    from rich.console import Console

    from fedlora.errors import ConfigError
    from fedlora.experiments.budget import read_budget, verify_ledger
    from fedlora.privacy.accounting import check_delta
    from fedlora.privacy.policy import SitePolicy

    check_delta(delta)
    if head is not None and not re.fullmatch("[0-9a-f]{64}", head):
        raise ConfigError(f"--head {head!r} is no digest; wanted the 64 digits (0-9, a-f) that --verify printed")
    if verify and policy:
        raise ConfigError("--verify looks at rows and not at caps, so --policy has no say in it; leave one of them out")
    if verify:
        digest, rows = verify_ledger(ledger, known_head=head)
        typer.echo(json.dumps({"head": digest, "rows": rows}) if as_json else f"{rows} rows intact\nhead {digest}")
        return
    rules = SitePolicy.from_toml(policy) if policy else None
    with Console(stderr=True).status("pricing"):  # seconds where a data set has seen many kinds of rounds
        found = read_budget(ledger, policy=rules, delta=delta, known_head=head)
    if as_json:
        typer.echo(json.dumps(_finite(_to_json(found)), ensure_ascii=False, indent=1))
    else:
        _print(found)


def _to_json(found: Budget) -> dict[str, Any]:
    data_sets = [asdict(one) | {"epsilon_left": one.epsilon_left} for one in found.data_sets]
    return {"head": found.head, "rows": found.num_rows, "data_sets": data_sets}


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def _print(found: Budget) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False)  # a name may hold brackets
    if not found.data_sets:
        console.print("nothing has been charged to this ledger")
    for one in found.data_sets:
        _print_data_set(console, one)
    if any(one.fingerprints for one in found.data_sets if not one.names):
        console.print("Data sets without a name go by the first digits of their fingerprint.")
    console.print(
        "Counted: spent, reserved and abandoned rounds alike. Left: cap less counted; every ε is an upper bound. "
        "A fingerprint must not leave the site: who knows all records but one can test the last by it."
    )
    console.print(f"{found.num_rows} rows intact, head {found.head}", soft_wrap=True)


def _print_data_set(console: Console, one: DataSetBudget) -> None:
    from rich import box
    from rich.table import Table

    source = f"δ from the {one.cap_from}" if one.cap_epsilon is None else f"cap and δ from the {one.cap_from}"
    total = Table(title=f"{one.title}: one {one.unit}, {one.relation}, {one.accountant.upper()}", title_justify="left")
    for name in ("ε spent", "ε counted", "cap", "left", "δ", "rounds"):
        total.add_column(name, justify="right")
    cap = "none" if one.cap_epsilon is None else f"{one.cap_epsilon:g}"
    left = "" if one.epsilon_left is None else f"{math.floor(one.epsilon_left * 1e4) / 1e4:g}"
    total.add_row(
        _shown(one.epsilon_spent), _shown(one.epsilon_counted), cap, left, f"{one.delta:g}", str(one.num_rounds)
    )
    console.print(total)
    console.print(f"{source}; fingerprints {', '.join(one.fingerprints)}")
    runs = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    runs.add_column("run", overflow="fold")  # never cut: what tells two runs apart is at the end of their ids
    for name in ("purpose", "state"):
        runs.add_column(name, no_wrap=True)
    for name in ("rounds", "steps", "σ", "q", "ε alone"):
        runs.add_column(name, justify="right", no_wrap=True)
    for run in one.runs:
        states = "\n".join(f"{count} {kind}" for kind, count in run.states.items())
        numbers = f"{run.noise_multiplier:.4g}", f"{run.sampling_probability:.4g}", _shown(run.epsilon)
        runs.add_row(run.run, run.purpose, states, str(run.num_rounds), str(run.num_steps), *numbers)
    console.print(runs)


def _shown(epsilon: float) -> str:
    from fedlora.privacy.units import rounded_up

    return "∞" if math.isinf(epsilon) else f"{rounded_up(epsilon):g}"
