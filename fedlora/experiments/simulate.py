"""A whole run: prepare, train over a transport, leave a run folder. Both transports end in `run_server`."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fedlora.adapters.peft import export_adapter
from fedlora.config import RunConfig
from fedlora.data.encode import EncodedDataset
from fedlora.data.public_texts import refuse_training_records
from fedlora.data.tasks import TASKS
from fedlora.engine.execution import choose_execution
from fedlora.engine.prefix import PrefixCache
from fedlora.errors import RunFolderError
from fedlora.experiments.account import write_account
from fedlora.experiments.plots import plot_curve
from fedlora.experiments.privacy_facts import Resumption, oversight_facts, privacy_facts, resumption_of
from fedlora.experiments.record import guarantee_of, make_record
from fedlora.experiments.run_folder import RunFolder, to_json
from fedlora.experiments.selection_plot import plot_selection
from fedlora.experiments.slot_noise import slot_facts
from fedlora.federation.checkpoint import load_checkpoint, save_checkpoint
from fedlora.federation.cohort import Cohort
from fedlora.federation.evaluator import Evaluator, personal_theta
from fedlora.federation.messages import RoundInstruction
from fedlora.federation.module_scores import public_texts
from fedlora.federation.prefixes import prefix_cache
from fedlora.federation.schedule import ScheduledRound, make_schedule
from fedlora.federation.selection import check_selection
from fedlora.federation.server import (
    Reply,
    RoundReport,
    Server,
    ServerState,
    Transport,
    evaluated,
    initial_state,
)
from fedlora.federation.shelf import Shelf
from fedlora.federation.site import Site
from fedlora.federation.sites import load_simulated_data, localised, make_sites
from fedlora.federation.workbench import Workbench, build_workbench
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.phases import EVALUATION, FINETUNE
from fedlora.privacy.policy import SitePolicy
from fedlora.randomness import PublicSeed


class Progress(Protocol):
    """Whoever watches a run; every value shown to it is public."""

    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None: ...

    def round(self, report: RoundReport) -> None: ...

    def finish(self, record: Mapping[str, Any]) -> None:
        """The run has ended well; `record` is its record.json."""
        ...


@dataclass(frozen=True, kw_only=True)
class CohortTransport:
    """All clients of a simulation in this process, fused in one engine call."""

    workbench: Workbench
    dataset: EncodedDataset
    sites: Sequence[Site]
    ledger: Ledger
    prefixes: PrefixCache | None = None

    def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        asked = [site for site in self.sites if site.client in clients]
        cohort = Cohort(
            workbench=self.workbench,
            dataset=self.dataset,
            sites=asked,
            ledger=self.ledger,
            prefixes=self.prefixes,
        )
        return [*cohort.run(instruction)]


def simulate(
    config: RunConfig, progress: Progress, policy: SitePolicy | None = None, shelf: Shelf | None = None
) -> Path:
    """Run `config` in this process; everything is checked before the run folder is made.

    Args:
        policy: that every simulated site obeys, and whose ledger they charge; without one, their plans are the only
            limit and the ledger lies in the run folder.
        shelf: with what this run has in common with others of this process.

    Returns:
        The run folder.

    Raises:
        InputError: anything the user can correct; nothing was written.
        PrivacyError: the asked ε cannot be met, or the policy refuses; nothing was written.
    """
    RunFolder.check_free(config)
    with _prepared(config, policy, shelf or Shelf()) as prepared:
        if policy is not None:
            _check_budgets(prepared.sites, policy)
        folder = RunFolder.create(prepared.workbench.config)
        _run_cohort(prepared, folder, progress, policy)
    return folder.path


def resume(path: Path, progress: Progress, policy: SitePolicy | None = None, shelf: Shelf | None = None) -> Path:
    """Go on with an interrupted run of the cohort transport after its last whole round.

    Args:
        policy: the one it was begun under.
        shelf: as for `simulate`.

    Raises:
        RunFolderError: there is nothing at `path` to go on with, or it was run under a policy and now is not.
    """
    folder = RunFolder.open(path)
    config = folder.read_config()
    if folder.last_asked() >= 0 and folder.ledger_file.is_file() != (policy is None):
        raise RunFolderError(
            f"cannot resume {path}: it was begun {'without' if policy else 'under'} a policy; "
            f"{'leave --policy out' if policy else 'name the same one with --policy'}"
        )
    with (
        folder.resumable(policy.path if policy else None),
        _prepared(config, policy, shelf or Shelf()) as prepared,
    ):
        _run_cohort(prepared, folder, progress, policy)
    return folder.path


def resolve(config: RunConfig) -> RunConfig:
    """`config` with every `auto` of the execution replaced by what this machine runs fastest."""
    chosen = choose_execution(config).describe()
    return config.with_overrides(
        f'model.dtype="{chosen["dtype"]}"',
        f'model.attention="{chosen["attention"]}"',
        f'run.device="{chosen["device"]}"',
        f"engine.token_budget={chosen['token_budget']}",
        f'engine.matmul_precision="{chosen["matmul_precision"]}"',
        f'engine.compile="{"on" if chosen["compiled"] else "off"}"',
    )


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    workbench: Workbench
    dataset: EncodedDataset
    sites: Sequence[Site]
    evaluator: Evaluator


@contextmanager
def _prepared(config: RunConfig, policy: SitePolicy | None, shelf: Shelf) -> Iterator[_Prepared]:
    """All that a run needs, so that nothing the user can correct is left to be found later; cheap mistakes first.

    The base model is given back as it was.
    """
    config = localised(config, policy)
    data = load_simulated_data(config, shelf)
    sites = make_sites(config, data, make_schedule(config), policy)
    workbench = build_workbench(resolve(config), shelf)
    try:
        check_selection(workbench)
        if config.adapter.probe_texts:
            refuse_training_records(public_texts(config), data.records)
        dataset = shelf.encoded(config, "train", workbench.classifier)
        yield _Prepared(workbench=workbench, dataset=dataset, sites=sites, evaluator=Evaluator(workbench, shelf))
    finally:
        workbench.detach()


def _check_budgets(sites: Sequence[Site], policy: SitePolicy) -> None:
    """Refuse a run that some site's budget does not allow to finish, before anything is written but the ledger.

    Raises:
        BudgetRefused: with the sum spelled out.
        LedgerUnavailable, LedgerBroken: the policy's ledger cannot be used.
    """
    with closing(Ledger.open(policy.ledger)) as ledger:
        for site in sites:
            if site.cap is not None:
                ledger.check_room(site.data_set, site.planned_charges(), site.cap)


def _run_cohort(prepared: _Prepared, folder: RunFolder, progress: Progress, policy: SitePolicy | None) -> None:
    workbench, sites = prepared.workbench, prepared.sites
    with closing(Ledger.open(policy.ledger if policy else folder.ledger_file)) as ledger:
        transport = CohortTransport(
            workbench=workbench,
            dataset=prepared.dataset,
            sites=sites,
            ledger=ledger,
            prefixes=prefix_cache(workbench, prepared.dataset, sites),
        )
        run_server(workbench.config, folder, workbench, transport, sites, progress, prepared.evaluator, ledger, policy)


def run_server(
    config: RunConfig,
    folder: RunFolder,
    workbench: Workbench,
    transport: Transport,
    sites: Sequence[Site],
    progress: Progress,
    evaluator: Evaluator | None = None,
    ledger: Ledger | None = None,
    policy: SitePolicy | None = None,
) -> None:
    """Do the rounds that `folder` does not have yet and write what a run leaves behind.

    Args:
        sites: those of this process, whose optimiser state goes into the checkpoint; empty where sites live elsewhere.
        evaluator: where the caller has made one already.
        ledger: of the sites in this process; rounds that died with an earlier one are done anew, and stay counted.
        policy: that these sites obey, and that the command to go on with names.

    Raises:
        RunFolderError: what is in the folder is no state of this run, the ledger is not the one that it has charged, or
            another process goes on with it.
        RunInterrupted: by Ctrl-C; the folder can be resumed.
        FedloraError: the run failed.
    """
    with folder.resumable(policy.path if policy else None), folder.claimed(), folder.failing():
        _run_rounds(config, folder, workbench, transport, sites, progress, evaluator or Evaluator(workbench), ledger)


def _run_rounds(
    config: RunConfig,
    folder: RunFolder,
    workbench: Workbench,
    transport: Transport,
    sites: Sequence[Site],
    progress: Progress,
    evaluator: Evaluator,
    ledger: Ledger | None,
) -> None:
    clock, resumed = time.perf_counter(), folder.last_asked() >= 0
    state = _state_to_go_on_from(folder, workbench, sites)
    folder.failure_file.unlink(missing_ok=True)  # it goes on
    if ledger is not None:
        _check_ledger(ledger, folder, state, workbench.schedule)
        ledger.abandon(state.run_id, from_round=state.next_round)
    earlier = sum(entry["seconds"] for entry in folder.read_rounds())
    progress.start(
        config,
        folder=folder.path,
        metric=evaluator.headline,
        num_rounds=len(workbench.schedule),
        done=state.next_round,
    )

    def on_round(report: RoundReport, state: ServerState) -> None:
        state.last_report, state.rounds_done = to_json(asdict(report)), state.rounds_done + 1
        save_checkpoint(folder.checkpoint_file, state, sites)  # first: what is shown of a round must not happen again
        folder.append_round(state.last_report)
        progress.round(report)

    server = Server(
        workbench=workbench,
        transport=transport,
        evaluate=lambda theta: evaluator.of_sites(theta, sites),
        on_round=on_round,
        before_round=lambda entry: folder.mark_asked(entry.index),
        on_choice=lambda state: save_checkpoint(folder.checkpoint_file, state, sites),
    )
    state = server.run(state)
    seconds = earlier + time.perf_counter() - clock
    oversight = oversight_facts(ledger, state.run_id, sites, own_ledger=folder.ledger_file.is_file())
    resumption = resumption_of(ledger, state.run_id, sites, resumed=resumed)
    record = _finish(config, folder, workbench, evaluator, state, sites, seconds, oversight, resumption)
    progress.finish(to_json(record))


def _state_to_go_on_from(folder: RunFolder, workbench: Workbench, sites: Sequence[Site]) -> ServerState:
    """The checkpoint's state, or that of a new run, whose id is on disk before anything is charged to it.

    A run's id starts with the digest of the config.toml it began with. What a policy says today of places, device and
    token budget may differ from what is in there.
    """
    digest = folder.read_config().digest()[:16]
    if folder.checkpoint_file.exists():
        state = load_checkpoint(folder.checkpoint_file, sites)
    else:
        state = initial_state(workbench, f"{digest}-{uuid.uuid4().hex[:16]}")
    if not state.run_id.startswith(f"{digest}-"):
        raise RunFolderError(
            f"cannot resume {folder.path}: its config.toml is not the one that the run began with; "
            "put the original back, or start a new run"
        )
    folder.restore_rounds(state.rounds_done, state.last_report)
    if not folder.checkpoint_file.exists():
        save_checkpoint(folder.checkpoint_file, state, sites)
    return state


def _check_ledger(ledger: Ledger, folder: RunFolder, state: ServerState, schedule: Sequence[ScheduledRound]) -> None:
    """Refuse a ledger in which this run has not charged what it has done, or has gone on further than it knows.

    Raises:
        RunFolderError: it is another ledger, or the folder is an old copy.
    """
    charged = ledger.rounds(state.run_id)
    done = {entry.index for entry in schedule[: state.next_round] if entry.phase != EVALUATION}  # which may be refused
    if not done <= charged:
        raise RunFolderError(
            f"cannot resume {folder.path}: its round {min(done - charged)} is not charged in the ledger at hand; "
            "with --policy, name the policy whose ledger it has charged so far"
        )
    if (last := max(charged, default=-1)) > state.next_round:
        raise RunFolderError(
            f"cannot resume {folder.path}: the ledger has charged its rounds up to {last}, and it knows rounds up to "
            f"{state.next_round - 1}, so that it is an old copy of a run that went on; start a new run"
        )


def _finish(
    config: RunConfig,
    folder: RunFolder,
    workbench: Workbench,
    evaluator: Evaluator,
    state: ServerState,
    sites: Sequence[Site],
    wall_seconds: float,
    oversight: dict[str, Any],
    resumption: Resumption,
) -> dict[str, Any]:
    """Adapter, pictures, privacy report and, last, the record: a folder with a record is a whole one.

    Returns:
        The record.
    """
    export = partial(
        export_adapter,
        model=config.model,
        seed=PublicSeed.from_int(config.run.seed),
        layout=workbench.layout,
        places=workbench.places,
        folded=state.folded,
        subspace=config.adapter.subspace,
        num_labels=workbench.classifier.num_labels,
        labels=TASKS[config.data.task].label_names,
        head=state.head,
        max_length=config.data.max_length,
    )
    export(folder.adapter_folder, theta=state.theta)
    if workbench.method.local:
        for site in sites:
            export(folder.personal_folder / f"client-{site.client}", theta=personal_theta(workbench, state.theta, site))
    rounds, selection = folder.read_rounds(), state.search.selection
    latest: dict[str, float] = next((line["metrics"] for line in reversed(rounds) if line["phase"] == FINETUNE), {})
    metrics = latest or evaluator.of_sites(state.theta, sites)  # evaluated unless rounds were given up
    clients = [state.facts[client] for client in sorted(state.facts)]
    record = make_record(
        config,
        started=folder.started,
        wall_seconds=wall_seconds,
        metric={
            "name": evaluator.headline,
            "value": metrics[evaluator.headline],
            "split": next(iter(evaluator.splits)),
            "of": evaluator.measured(sites),
        },
        metrics=metrics,
        private_evaluation=_private_evaluation(config, workbench, rounds),
        selection=None if selection is None else selection.to_json(),
        slots=slot_facts(config, workbench, theta=state.theta, clients=clients, rounds=rounds),
        bytes_up=state.bytes_up,
        bytes_down=state.bytes_down,
        clients=clients,
        execution=workbench.execution.describe(),
        model_digest=workbench.classifier.source.digest,
        privacy=privacy_facts(
            config, workbench, clients=clients, rounds=rounds, oversight=oversight, resumption=resumption
        ),
    )
    plot_curve(
        folder.curve_file,
        rounds,
        metric=evaluator.headline,
        title=f"{config.data.task}, {config.adapter.method}, {config.federation.clients} clients",
        guarantee=str(guarantee_of(record)),
    )
    if selection is not None:
        folder.write_selection(selection.to_json())
        plot_selection(folder.selection_plot, selection, guarantee=str(guarantee_of(record)))
    write_account(folder, record)
    for file in (folder.checkpoint_file, folder.asked_file):
        file.unlink(missing_ok=True)
    shutil.rmtree(folder.answers_folder, ignore_errors=True)
    return record


def _private_evaluation(
    config: RunConfig, workbench: Workbench, rounds: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """What its round found; nobody's answer where the round was given up, None where none was asked for."""
    if not config.federation.private_evaluation:
        return None
    found = next((line["private_evaluation"] for line in rounds if line["phase"] == EVALUATION), None)
    return found or asdict(evaluated(workbench, []))
