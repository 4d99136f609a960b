"""`fedlora simulate`: a whole federation on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.config import RunConfig
    from fedlora.experiments.trackers.tracker import Tracked
    from fedlora.privacy.policy import SitePolicy


def simulate(
    recipe: Annotated[Path | None, typer.Argument(help="TOML recipe; none is the quickstart")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, repeatable")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder, new or empty")] = None,
    transport: Annotated[str | None, typer.Option(help="cohort (this process) or flower (its engine)")] = None,
    policy: Annotated[Path | None, typer.Option(help="site.toml that every simulated site obeys and charges")] = None,
    resume: Annotated[Path | None, typer.Option(help="run folder of an interrupted run to go on with")] = None,
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard, mlflow or wandb, which is told of every round; repeatable")
    ] = None,
) -> None:
    """Run a federation on this machine: private training, accuracy on public data, adapter in PEFT format."""
    if resume is not None:
        if recipe or overrides or out or transport:
            raise ConfigError(
                "--resume goes on with a run as it was configured; give no recipe, --set, --out or --transport"
            )
        _resume(resume, policy, track or [])
        return
    config = _read_config(recipe, overrides or [], out, transport)
    if config.run.transport == "flower":
        _refuse_policy_under_flower(policy)
        _refuse_trackers_under_flower(track)
        from fedlora.experiments.flower_process import simulate_under_flower

        finished = simulate_under_flower(config)
    else:
        from fedlora.experiments.simulate import simulate as run

        with _watched(track or []) as progress:
            finished = run(config, progress, _read_policy(policy))
    _print_result(finished)


def _resume(folder: Path, policy_file: Path | None, track: list[str]) -> None:
    from fedlora.experiments.run_folder import RunFolder

    if RunFolder.open(folder).read_config().run.transport == "flower":
        _refuse_policy_under_flower(policy_file)
        _refuse_trackers_under_flower(track)
        from fedlora.experiments.flower_process import run_under_flower

        run_under_flower(folder)
    else:
        from fedlora.experiments.simulate import resume

        with _watched(track) as progress:
            resume(folder, progress, _read_policy(policy_file))
    _print_result(folder)


@contextmanager
def _watched(track: list[str]) -> Iterator[Tracked]:
    """What shows a run in the terminal and to the trackers of these names."""
    from fedlora.experiments.progress import TerminalProgress
    from fedlora.experiments.trackers import open_trackers
    from fedlora.experiments.trackers.tracker import Tracked

    trackers = open_trackers(track)
    with TerminalProgress() as progress, Tracked(progress, trackers, _warn) as tracked:
        yield tracked


def _warn(text: str) -> None:
    typer.echo(f"fedlora: {text}", err=True)


def _refuse_trackers_under_flower(track: list[str] | None) -> None:
    if track:
        raise ConfigError(
            "--track is for the cohort transport; under Flower the rounds are in rounds.jsonl of the run folder"
        )


def _read_policy(path: Path | None) -> SitePolicy | None:
    from fedlora.privacy.policy import SitePolicy

    return SitePolicy.from_toml(path) if path else None


def _refuse_policy_under_flower(policy: Path | None) -> None:
    if policy is not None:
        raise ConfigError(
            "--policy is for the cohort transport; under Flower every site's daemon has its own "
            "(fedlora site serve), and a simulation has none"
        )


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
