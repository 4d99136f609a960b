"""`fedlora evaluate` and `fedlora predict`: what a trained adapter can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora.errors import ConfigError, InputError


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
    _say_if_shared(adapter)
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


def predict(
    adapter: Annotated[Path, typer.Argument(help="run folder or its adapter folder")],
    texts: Annotated[list[str], typer.Argument(help="texts to classify")],
    pair: Annotated[list[str] | None, typer.Option(help="second text of each, for pair tasks; repeatable")] = None,
) -> None:
    """Classify texts with a trained adapter."""
    import fedlora

    if pair and len(pair) != len(texts):
        raise InputError(f"{len(texts)} texts but {len(pair)} --pair; give one for each text")
    _say_if_shared(adapter)
    for text, label in zip(texts, fedlora.load(adapter).predict(texts, pair or None), strict=True):
        typer.echo(f"{label}\t{text}")


def _say_if_shared(adapter: Path) -> None:
    """A run whose sites each keep a part has no whole model in its own adapter folder."""
    from fedlora.adapters.methods import method_of
    from fedlora.experiments.run_folder import RunFolder

    folder = RunFolder(adapter.parent if adapter.name == "adapter" else adapter)
    if folder.config_file.is_file() and method_of(folder.read_config().adapter).local:
        typer.echo(
            f"{adapter} has the part alone that its sites share, and zeros for what each keeps; whole models are the "
            f"sites' own, in {folder.personal_folder} where they ran in one process",
            err=True,
        )
