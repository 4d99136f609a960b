"""The command line. Commands import what they need, so that help and budgets answer at once.

Exit codes: 0 done, 1 failed run, 2 bad input, 3 budget or policy refused, 4 an audit contradicts the claim, 130
interrupted (resumable).
"""

from __future__ import annotations

import sys
from typing import NoReturn

import click
import typer

from fedlora.cli.adapters import evaluate, predict
from fedlora.cli.audit import audit
from fedlora.cli.budget import budget
from fedlora.cli.bundle import bundle
from fedlora.cli.calibrate import calibrate
from fedlora.cli.report import report
from fedlora.cli.runs import runs
from fedlora.cli.simulate import simulate
from fedlora.cli.site import site
from fedlora.cli.sweep import sweep
from fedlora.cli.watch import watch
from fedlora.errors import FedloraError, RunInterrupted

app = typer.Typer(
    name="fedlora",
    help="Fine-tune language models across sites that keep their records, under differential privacy.",
    add_completion=False,
    suggest_commands=False,  # click does
    pretty_exceptions_enable=False,
)
for command in (simulate, watch, sweep, report, calibrate, budget, audit, evaluate, predict, bundle):
    app.command()(command)
app.add_typer(runs)
app.add_typer(site)


def main() -> NoReturn:
    """Entry point: one clear line for every deliberate error, never a traceback for a user's mistake."""
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="fedlora", standalone_mode=False)
        if code == RunInterrupted.exit_code:  # what typer makes of a Ctrl-C
            raise KeyboardInterrupt
    except FedloraError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted before a run folder was made; nothing was written", 130)
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"fedlora: {' '.join(message.split())}", err=True)
    sys.exit(code)
