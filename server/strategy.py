"""fedlora's rounds as a Strategy of Flower's: `FedloraStrategy(config).start(grid)` in anyone's ServerApp.

The round loop is fedlora's own, as under `server.app`. Flower's default one cannot drive it: it asks every node once
and takes silence for an answer, where ours asks again, waits for who comes back and keeps what has come; it knows
training only, where ours has class means, a search for modules and a private evaluation around it; and it cannot go on
where an interrupted run stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, FedloraError, ProtocolError
from fedlora.experiments.progress import TerminalProgress
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.simulate import Progress
from fedlora.federation.checkpoint import load_checkpoint
from fedlora.federation.server import RoundReport, ServerState
from fedlora.federation.workbench import Workbench
from fedlora.privacy.phases import EVALUATION, PROTOTYPE, TRAINING
from server.app import prepare, serve
from server.slot_arrays import from_arrays, to_arrays

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
"""Flower's central evaluation: from the number of a round, 0 before the first, and the global arrays."""

log = logging.getLogger("flwr")


class FedloraStrategy(Strategy):
    """A run of `config` with the nodes of a grid, which run `clients.app`."""

    def __init__(self, config: RunConfig, progress: Progress | None = None) -> None:
        """Remember what to run.

        Args:
            config: of the run; in a ServerApp, `RunConfig.from_flower(context.run_config)`, which its nodes have too.
            progress: watches the run; None for a bar on the terminal.
        """
        self.config = config.with_overrides("run.transport=flower")
        self._progress = progress

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Do the rounds that the folder `run.out` lacks, all of them in a new one.

        What nodes do is in the configuration that they have themselves, and the noise is chosen for it; so arguments
        that would have them do something else are refused.

        Args:
            grid: whose nodes do the rounds.
            initial_arrays: those that a run with this configuration starts from, or None, which means them.
            num_rounds: `federation.rounds`, or None.
            timeout: seconds until a round goes on without who has not answered; None: `federation.round_deadline`.
            train_config: nothing, since nobody would heed it.
            evaluate_config: likewise.
            evaluate_fn: called before the first round that is done here and after every round of training; what it
                finds stands beside fedlora's own metrics in `evaluate_metrics_serverapp`.

        Returns:
            The trained slots by name, and by the number of a round of training, 0 for what comes before the first: what
            happened (`train_metrics_clientapp`), metrics on public validation data (`evaluate_metrics_serverapp`) and
            at the last, where there is one, the private evaluation (`evaluate_metrics_clientapp`). The adapter with its
            head, the record and the privacy report are in the run folder.

        Raises:
            ConfigError: an argument contradicts the configuration.
            FedloraError: too few nodes become clients of this run, or the run failed.
        """
        config = self._agreed(num_rounds, timeout, train_config, evaluate_config)
        self.summary()
        workbench = prepare(config)
        if initial_arrays:
            _check_start(initial_arrays, workbench)
        folder = RunFolder.of(workbench.config)
        log.info("run folder: %s", folder.path.absolute())
        if self._progress is not None:
            return _run(grid, workbench, folder, self._progress, evaluate_fn)
        with TerminalProgress() as progress:
            return _run(grid, workbench, folder, progress, evaluate_fn)

    def summary(self) -> None:
        """Say what is asked for, where Flower's strategies do."""
        config = self.config
        log.info(
            "FedloraStrategy: %s rank %d, %d clients, %d rounds of %d private steps, ε ≤ %g at δ = %g for each client",
            config.adapter.method,
            config.adapter.rank,
            config.federation.clients,
            config.federation.rounds,
            config.federation.local_steps,
            config.privacy.epsilon,
            config.privacy.delta,
        )

    def _agreed(
        self,
        num_rounds: int | None,
        timeout: float | None,
        train_config: ConfigRecord | None,
        evaluate_config: ConfigRecord | None,
    ) -> RunConfig:
        planned = self.config.federation.rounds
        if num_rounds not in (None, planned):
            raise ConfigError(
                f"num_rounds = {num_rounds}, but federation.rounds = {planned}, for which the sites choose their "
                "noise; set federation.rounds, and leave num_rounds out"
            )
        for name, given in (("train_config", train_config), ("evaluate_config", evaluate_config)):
            if given:
                raise ConfigError(
                    f"{name} has {', '.join(sorted(given))}, which no site heeds: what it does, and with how much "
                    f"noise, is in the run's configuration; leave {name} out and set training.learning_rate or "
                    "whatever it names there"
                )
        if timeout is None:
            return self.config
        return self.config.with_overrides(f"federation.round_deadline={float(timeout)!r}")

    # What Flower's own loop would call ----------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        _refuse_to_be_driven()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        _refuse_to_be_driven()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        _refuse_to_be_driven()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        _refuse_to_be_driven()


def _refuse_to_be_driven() -> NoReturn:
    """For wrappers, such as Flower's own of differential privacy, which would add noise to what is noised already.

    Raises:
        FedloraError: always.
    """
    raise FedloraError(
        "FedloraStrategy has a round loop of its own and cannot be driven step by step or wrapped in another strategy; "
        "call its start, or run that strategy over server.fused_grid.FusedGrid"
    )


def _check_start(arrays: ArrayRecord, workbench: Workbench) -> None:
    layout = workbench.layout
    try:
        same = torch.equal(from_arrays(arrays, layout), workbench.initial_theta.cpu())
    except ProtocolError as error:
        raise ConfigError(f"initial_arrays are not those of this run: {error}") from error
    if not same:
        raise ConfigError(
            "initial_arrays have other values than this run starts from, which its configuration and public seed "
            "decide, so that its record tells all; leave initial_arrays out"
        )


def _run(
    grid: Grid, workbench: Workbench, folder: RunFolder, progress: Progress, evaluate_fn: EvaluateFn | None
) -> Result:
    recorded = _Recorded(workbench=workbench, folder=folder, progress=progress, evaluate_fn=evaluate_fn)
    serve(grid, workbench, folder, recorded)
    return recorded.result


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """A Progress that makes Flower's Result of what it is told, and passes it on."""

    workbench: Workbench
    folder: RunFolder
    progress: Progress
    evaluate_fn: EvaluateFn | None
    result: Result = field(default_factory=Result)

    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None:
        self.progress.start(config, folder=folder, metric=metric, num_rounds=num_rounds, done=done)
        for line in self.folder.read_rounds():  # of the run that is gone on with
            self._enter(line)
        self._take(self._state(), done)

    def round(self, report: RoundReport) -> None:
        self._enter(asdict(report))
        if report.phase in TRAINING:
            self._take(self._state(), report.round + 1)
        self.progress.round(report)

    def finish(self, record: Mapping[str, Any]) -> None:
        self.progress.finish(record)

    def _state(self) -> ServerState:
        """As of now: the round loop writes it to disk before it tells anyone of a round."""
        state = load_checkpoint(self.folder.checkpoint_file, ())
        self.workbench.adopt(state.chosen)
        return state

    def _take(self, state: ServerState, done: int) -> None:
        """The arrays after `done` scheduled rounds."""
        self.result.arrays = to_arrays(state.theta, self.workbench.layout)
        if self.evaluate_fn is None:
            return
        number = self._number(done)
        if (found := self.evaluate_fn(number, self.result.arrays)) is not None:
            own = self.result.evaluate_metrics_serverapp.get(number, MetricRecord())
            self.result.evaluate_metrics_serverapp[number] = MetricRecord({**own, **found})

    def _number(self, done: int) -> int:
        """How many of the first `done` scheduled rounds are rounds of training, as Flower counts."""
        return sum(entry.phase in TRAINING for entry in self.workbench.schedule[:done])

    def _enter(self, line: Mapping[str, Any]) -> None:
        """A round's report, or what rounds.jsonl has of one."""
        number, phase, result = self._number(line["round"] + 1), line["phase"], self.result
        if phase in (*TRAINING, PROTOTYPE):
            result.train_metrics_clientapp[number] = MetricRecord(
                {
                    "clients-ok": line["clients_ok"],
                    "clients-failed": line["clients_failed"],
                    "epsilon-max": float(line["epsilon_max"]),  # in a file infinity is a word
                    "bytes-up": line["bytes_up"],
                    "bytes-down": line["bytes_down"],
                    "seconds": line["seconds"],
                }
            )
        if phase == EVALUATION and line["private_evaluation"] is not None:
            counted = line["private_evaluation"]
            told = {"accuracy": counted["accuracy"], "standard-error": counted["standard_error"]}
            known = {name: value for name, value in told.items() if value is not None}
            result.evaluate_metrics_clientapp[number] = MetricRecord({**known, "clients": counted["clients"]})
        if line["metrics"]:
            found = result.evaluate_metrics_serverapp.get(number, MetricRecord())  # before the first round
            result.evaluate_metrics_serverapp[number] = MetricRecord({**line["metrics"], **found})
