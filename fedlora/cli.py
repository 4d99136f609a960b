"""The command line. Commands import what they need, so that help and budgets answer at once.

Exit codes: 0 done, 1 failed run, 2 bad input, 3 budget or policy refused, 130 interrupted (resumable).
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import click
import typer

from fedlora.errors import ConfigError, FedloraError, InputError, RunInterrupted

if TYPE_CHECKING:
    from fedlora.config import RunConfig

app = typer.Typer(
    name="fedlora",
    help="Fine-tune language models across sites that keep their records, under differential privacy.",
    add_completion=False,
    suggest_commands=False,  # click does
    pretty_exceptions_enable=False,
)


@app.command()
def simulate(
    recipe: Annotated[Path | None, typer.Argument(help="TOML recipe; none is the quickstart")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, repeatable")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder, new or empty")] = None,
    transport: Annotated[str | None, typer.Option(help="cohort (this process) or flower (its engine)")] = None,
    resume: Annotated[Path | None, typer.Option(help="run folder of an interrupted run to go on with")] = None,
) -> None:
    """Run a federation on this machine: private training, accuracy on public data, adapter in PEFT format."""
    if resume is not None:
        if recipe or overrides or out or transport:
            raise ConfigError(
                "--resume goes on with a run as it was configured; give no recipe, --set, --out or --transport"
            )
        _resume(resume)
        return
    config = _read_config(recipe, overrides or [], out, transport)
    from fedlora.experiments.progress import TerminalProgress

    if config.run.transport == "flower":
        from fedlora.experiments.flower_process import simulate_under_flower

        finished = simulate_under_flower(config)
    else:
        from fedlora.experiments.simulate import simulate as run

        with TerminalProgress() as progress:
            finished = run(config, progress)
    _print_result(finished)


def _resume(folder: Path) -> None:
    from fedlora.experiments.run_folder import RunFolder

    if RunFolder.open(folder).read_config().run.transport == "flower":
        from fedlora.experiments.flower_process import run_under_flower

        run_under_flower(folder)
    else:
        from fedlora.experiments.progress import TerminalProgress
        from fedlora.experiments.simulate import resume

        with TerminalProgress() as progress:
            resume(folder, progress)
    _print_result(folder)


def _read_config(recipe: Path | None, overrides: list[str], out: Path | None, transport: str | None) -> RunConfig:
    from fedlora.config import RunConfig

    if out is not None:
        overrides = [*overrides, f"run.out={json.dumps(str(out), ensure_ascii=False)}"]
    if transport is not None:
        overrides = [*overrides, f"run.transport={transport}"]
    return RunConfig.from_toml(recipe, overrides) if recipe else RunConfig.from_mapping({}, overrides)


def _print_result(folder: Path) -> None:
    from fedlora.experiments.progress import print_result

    print_result(folder)


@app.command()
def calibrate(
    records: Annotated[int, typer.Option(help="records of the site, n", min=1)],
    epsilon: Annotated[float, typer.Option(help="target ε of the whole run")] = 6.0,
    delta: Annotated[float, typer.Option(help="δ, below 1/n")] = 1e-5,
    batch: Annotated[int, typer.Option(help="expected batch size", min=1)] = 128,
    steps: Annotated[int, typer.Option(help="private steps of the whole run, rounds × local steps", min=1)] = 300,
    prototype: Annotated[float, typer.Option(help="noise multiplier of a prototype release; 0: none", min=0)] = 0.0,
    accountant: Annotated[str, typer.Option(help="pld (tight) or rdp (fast bound)")] = "pld",
) -> None:
    """Which noise multiplier σ makes a site's run cost ε? The same answer that a run would use."""
    from fedlora.privacy.accounting import Charge
    from fedlora.privacy.calibration import calibrate_noise_multiplier

    if batch > records:
        raise ConfigError(f"--batch {batch} is more than --records {records}; give at most {records}")
    if delta >= 1 / records:
        raise ConfigError(f"--delta {delta:g} is not below 1/n = {1 / records:.3g}; give less")
    fixed = [Charge(1.0, prototype, 1)] if prototype else []
    sigma = calibrate_noise_multiplier(
        epsilon=epsilon,
        delta=delta,
        sampling_probability=batch / records,
        num_steps=steps,
        fixed=fixed,
        accountant=accountant,
    )
    typer.echo(f"noise_multiplier = {sigma:.4f}")
    if math.isinf(epsilon):
        typer.echo("no guarantee: ε = ∞, a run without noise")
        return
    typer.echo(
        f"ε <= {epsilon:g} at δ = {delta:g}, one record added or removed, {accountant.upper()}; "
        f"q = {batch / records:.6f}, {steps} steps"
        + (f", after one prototype release at σ = {prototype:g}" if prototype else "")
    )


@app.command()
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="run folder or its adapter folder")],
    task: Annotated[str, typer.Option(help="GLUE task; a run folder knows its own")] = "",
    source: Annotated[str, typer.Option(help='"hub", "generated" or a folder; a run folder knows its own')] = "",
    split: Annotated[str, typer.Option(help="public validation split; empty: the task's first")] = "",
) -> None:
    """Official metrics of a trained adapter on public validation data."""
    import fedlora
    from fedlora.data.glue import available_validation_splits, load_records
    from fedlora.data.tasks import TASKS
    from fedlora.evaluation import glue_metrics
    from fedlora.experiments.run_folder import RunFolder
    from fedlora.randomness import PublicSeed

    is_run = RunFolder(adapter).config_file.is_file()
    if not is_run and not (task and source):
        raise ConfigError(f"{adapter} is no run folder, which would know its data; give --task and --source")
    config = RunFolder(adapter).read_config() if is_run else fedlora.RunConfig()
    task, source = task or config.data.task, source or config.data.source
    split = split or available_validation_splits(task, source)[0]
    records = load_records(
        task,
        source,
        split,
        generated_records=config.data.generated_records,
        seed=PublicSeed.from_int(config.run.seed),  # so that the generated corpus is the run's
    )
    classifier = fedlora.load(adapter)
    if classifier.classifier.num_labels != TASKS[task].num_labels:
        raise InputError(
            f"{adapter} answers with {classifier.classifier.num_labels} labels, task {task} has "
            f"{TASKS[task].num_labels}; name the task it was trained for"
        )
    logits = classifier.logits(*records.texts)
    predictions = logits[:, 0] if TASKS[task].regression else logits.argmax(dim=1)
    for name, value in glue_metrics(task, predictions.numpy(), records.labels).items():
        typer.echo(f"{name} = {value:.4f}")


@app.command()
def predict(
    adapter: Annotated[Path, typer.Argument(help="run folder or its adapter folder")],
    texts: Annotated[list[str], typer.Argument(help="texts to classify")],
    pair: Annotated[list[str] | None, typer.Option(help="second text of each, for pair tasks; repeatable")] = None,
) -> None:
    """Classify texts with a trained adapter."""
    import fedlora

    if pair and len(pair) != len(texts):
        raise InputError(f"{len(texts)} texts but {len(pair)} --pair; give one for each text")
    for text, label in zip(texts, fedlora.load(adapter).predict(texts, pair or None), strict=True):
        typer.echo(f"{label}\t{text}")


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
