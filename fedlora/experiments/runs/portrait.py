"""One run in a terminal, and two runs against each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fedlora.config import RunConfig
from fedlora.experiments.record import guarantee_of, shown_metric
from fedlora.experiments.runs.differences import Difference, code_apart, from_defaults, results_apart, settings_apart
from fedlora.experiments.runs.stored_run import StoredRun
from fedlora.experiments.terminal import one_line, print_rows, shown_bytes, shown_epsilon, shown_spent
from fedlora.privacy.units import Guarantee

_SPENT = ("client", "n", "phase", "mechanism", "effective σ", "q", "steps", "ε of all", "δ")


def print_portrait(run: StoredRun) -> None:
    """All that is known of `run`, for a person."""
    print_rows({name: one_line(text, 2000) for name, text in _heading(run).items()})
    _print_differences("settings other than the defaults", from_defaults(run), ("here", "default"))
    if run.record is not None:
        _print_table("what each client spent", _SPENT, _spent(run.record))
        print_rows({name: one_line(text, 2000) for name, text in _ending(run.record).items()})


def print_differences(left: StoredRun, right: StoredRun) -> None:
    """What `left` and `right` did otherwise, for a person."""
    names = (left.folder, right.folder)
    found = {
        "settings": settings_apart(left, right),
        "code and versions": code_apart(left, right),
        "results": results_apart(left, right),
    }
    for title, differences in found.items():
        if differences:
            _print_differences(title, differences, names)
        else:
            print(f"{title}: no difference")  # noqa: T201


def _heading(run: StoredRun) -> dict[str, str]:
    rows = {
        "run": run.folder,
        "status": f"failed: {run.error}" if run.error else run.status,
        "what": ", ".join(f"{axis} = {label}" for axis, label in run.axes.items()) or f"a {run.role} by itself",
        "digest": run.digest,
    }
    if run.role != "run" and run.axes:
        rows["what"] = f"{run.role} {rows['what']}"
    if run.record is None:
        spent = run.epsilon_spent
        rows["rounds"] = f"{len(run.rounds)} so far"
        if spent is not None:
            rows["ε spent"] = shown_spent(spent, run.status)
        if run.settings:
            rows["asked"] = str(Guarantee.from_config(_config(run)))
        return rows
    guarantee = _guarantee(run)
    rows |= {"guarantee": str(guarantee)}
    if not guarantee.flaws:
        rows |= {"not covered": guarantee.not_covered}
    if (charged := run.epsilon_spent) is not None and charged > guarantee.epsilon:
        rows["charged"] = f"ε = {shown_epsilon(charged)}, with rounds that died and were done anew"
    metric = run.record["metric"]
    rows[metric["name"]] = shown_metric(run.record)
    others = {name: value for name, value in run.record.get("metrics", {}).items() if name != metric["name"]}
    return rows | {name: f"{value:.4f}" for name, value in others.items()}


def _guarantee(run: StoredRun) -> Guarantee:
    """What the record states; an old one states only what each client spent."""
    assert run.record is not None  # noqa: S101
    if "guarantee" in run.record.get("privacy", {}):
        return guarantee_of(run.record)
    return Guarantee.from_config(_config(run), epsilon=run.epsilon_spent)


def _config(run: StoredRun) -> RunConfig:
    """Of the run, in which JSON has made ε = ∞ a text."""
    privacy = run.settings["privacy"]
    return RunConfig.from_mapping({**run.settings, "privacy": {**privacy, "epsilon": float(privacy["epsilon"])}})


def _spent(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for facts in record["clients"]:
        for phase in facts.get("phases", ()):
            row = (
                facts["client"],
                facts.get("num_examples", "not public"),
                phase["name"],
                phase["mechanism"],
                f"{phase['effective_noise_multiplier']:.6g}",
                f"{phase['sampling_probability']:.6g}",
                phase["num_steps"],
                shown_epsilon(float(facts["epsilon"])),
                f"{facts['delta']:g}",
            )
            rows.append(tuple(map(str, row)))
    return rows


def _ending(record: Mapping[str, Any]) -> dict[str, str]:
    """Traffic, time, where it ran, and how its settings were found."""
    rows = {
        "traffic": f"{shown_bytes(record['bytes_up'])} up, {shown_bytes(record['bytes_down'])} down",
        "time": f"{record['wall_seconds']:.0f} s, started {record['started']}",
        "memory": f"{shown_bytes(record['peak_memory_bytes'])} peak" if "peak_memory_bytes" in record else "",
        "ran on": _listed(record.get("execution", {})),
        "code": f"fedlora {record['fedlora_version']}, {record['code_digest'][:16]}",
        "versions": _listed(record.get("versions", {})),
        "tuning": _listed(record.get("tuning") or {}),
    }
    return {name: text for name, text in rows.items() if text}


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in facts.items())


def _print_differences(title: str, differences: Sequence[Difference], heads: tuple[str, str]) -> None:
    rows = [(name, _shown(left), _shown(right)) for name, left, right in differences]
    _print_table(title, ("", *heads), rows)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _print_table(title: str, heads: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 10_000
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left", title_style="bold")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*(one_line(cell, 400) for cell in row))
    if rows:
        console.print(table)
