"""`fedlora watch`: a run as it goes on, from its folder alone. What it shows changes nothing there. No torch."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedlora.config import RunConfig
from fedlora.errors import RunFolderError
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.run_view import RunView, read_run
from fedlora.experiments.terminal import one_line, shown_epsilon, shown_seconds
from fedlora.privacy.units import Guarantee

REFRESH_SECONDS = 1.0
_BARS = "▁▂▃▄▅▆▇█"
_LONGEST_CURVE = 40
_OTHER_LINES = 9
"""Of a frame, beside one for each site."""


def watch(path: Path, *, once: bool = False) -> bool:
    """Show the run in `path` until it ends, or one frame.

    Returns:
        Whether it has not failed.

    Raises:
        RunFolderError: there is no run in `path`.
    """
    folder = RunFolder(path)
    if not any(file.exists() for file in (folder.config_file, folder.record_file, folder.failure_file)):
        raise RunFolderError(f"{path} is not a run folder: it has no config.toml; give the folder of a run")
    console = Console(markup=False, highlight=False)
    view = read_run(path, now=time.time())
    if once:
        if not console.is_terminal:
            console.width = 1000  # who reads it folds it
        console.print(frame(view, most_sites=None))
        return view.state != "failed"
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        while True:
            live.update(frame(view, most_sites=max(3, console.height - _OTHER_LINES)), refresh=True)
            if view.state in ("done", "failed"):
                return view.state == "done"
            time.sleep(REFRESH_SECONDS)
            view = read_run(path, now=time.time())


def frame(view: RunView, *, most_sites: int | None) -> RenderableType:
    """What is known of a run, as a person reads it.

    Args:
        view: of the run.
        most_sites: for which there is room; None shows all.
    """
    parts: list[RenderableType] = [_line(f"{view.path}: {_STATES[view.state]}", "bold")]
    if view.config is None:
        parts.append(_line("its config.toml cannot be read, so that only what its other files say is shown"))
    else:
        parts += [_line(line) for line in _asked(view.config)]
    parts += [_progress(view), *_metric(view)]
    if table := _sites(view, most_sites):
        parts.append(table)
    if view.state == "failed":
        parts.append(_line(f"failed: {view.reason or 'its folder does not say why'}", "bold red"))
    if view.state in ("failed", "left"):
        parts += [_line(line) for line in _how_to_go_on(view)]
    return Group(*parts)


_STATES = {
    "running": "running",
    "done": "done",
    "failed": "failed",
    "left": "nobody is at work on it",
}


def _line(text: str, style: str = "") -> Text:
    """One line without control characters, whatever a file holds; long ones are folded by the terminal."""
    return Text(one_line(text, 1000), style=style)


def _asked(config: RunConfig) -> list[str]:
    return [
        f"{config.data.task} from {config.data.source}: {config.federation.clients} clients, "
        f"{config.adapter.method} rank {config.adapter.rank}",
        f"asked: {Guarantee.from_config(config)}",
    ]


def _progress(view: RunView) -> RenderableType:
    total, done = len(view.schedule), view.done
    words = f"{done} of {total} rounds" if total else f"{done} rounds"
    if (entry := view.under_way) is not None:
        words += f", {entry.phase} since {shown_seconds(view.waited)}"
        if view.answered:
            words += f", {len(view.answered & set(entry.clients))} of {len(entry.clients)} have answered"
    elif view.rounds:
        words += f", last {view.rounds[-1].phase}"
    if (left := view.seconds_left) is not None:
        words += f", about {shown_seconds(left)} left"
    row = Table.grid(padding=(0, 1))
    row.add_row(ProgressBar(total=max(1, total), completed=done, width=_LONGEST_CURVE), _line(words))
    return row


def _metric(view: RunView) -> list[RenderableType]:
    name, values = view.metric
    if not values:
        return []
    return [_line(f"{name} {values[-1]:.4f} on public data, best {max(values):.4f}  {curve(values)}")]


def curve(values: Sequence[float]) -> str:
    """The last values as bars from their lowest to their highest."""
    shown = values[-_LONGEST_CURVE:]
    low, high = min(shown), max(shown)
    if high == low:
        return _BARS[3] * len(shown)
    return "".join(_BARS[min(len(_BARS) - 1, int((value - low) / (high - low) * len(_BARS)))] for value in shown)


def _sites(view: RunView, most: int | None) -> Table | None:
    """A row for each client; where there is no room for all, first those with whom something is wrong."""
    if view.config is None and not view.epsilons:
        return None
    clients = sorted(view.epsilons) if view.config is None else list(range(view.config.federation.clients))
    if most is not None and len(clients) > most:
        wrong = sorted(clients, key=lambda client: (-view.failures(client).total(), view.standing(client) != "waiting"))
        clients, hidden = sorted(wrong[: most - 1]), len(clients) - most + 1
    else:
        hidden = 0
    table = Table(
        box=None, padding=(0, 2, 0, 0), caption=f"and {hidden} more" if hidden else None, caption_justify="left"
    )
    for name in ("client", "ε so far", "of", "last answered"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("this round", "failures"):
        table.add_column(name)
    asked = "" if view.config is None else shown_epsilon(view.config.privacy.epsilon)
    for client in clients:
        last = view.last_answered(client)
        failed = ", ".join(f"{code} {count}" for code, count in view.failures(client).most_common(4))
        table.add_row(
            str(client),
            _spent(view, client),
            asked,
            "" if last is None else f"round {last}",
            _standing(view, client),
            one_line(failed, 60),
        )
    return table


def _spent(view: RunView, client: int) -> str:
    """A round that died half way is charged, too, and nobody here knows of it."""
    epsilon = view.epsilons.get(client)
    least = "at least " if view.state in ("failed", "left") else ""
    return "" if epsilon is None else f"{least}{shown_epsilon(epsilon)}"


def _standing(view: RunView, client: int) -> str:
    """In one process nobody is waited for: all do the round together."""
    standing = view.standing(client)
    in_one_process = view.config is not None and view.config.run.transport == "cohort"
    return "at work" if standing == "waiting" and in_one_process else standing


def _how_to_go_on(view: RunView) -> list[str]:
    command = f"fedlora simulate --resume {shlex.quote(str(view.path))}"
    if view.config is not None and view.config.run.transport == "cohort":
        rules = " --policy FILE, with the policy that it was begun under" if view.under_policy else ""
        return [f"to go on: {command}{rules}"]
    lines = [
        "to go on: submit it once more with the same recipe and run.out",
        f"or, where it ran under Flower's simulation engine: {command}",
    ]
    if view.state == "left" and view.config is not None:
        patience = shown_seconds(view.config.federation.join_deadline)
        lines.insert(0, f"its server may be waiting for sites to join, for up to {patience}; if not:")
    return lines
