"""Whole runs in which a client's whole data is protected: the noise that is claimed is in what is released, once.

Statistics reject noise that is 10 % off what the run's facts say, from which ε is computed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from fedlora.config import RunConfig
from fedlora.engine.training import train
from fedlora.errors import FedloraError, ProtocolError, RunInterrupted
from fedlora.experiments.audit import audit
from fedlora.experiments.simulate import CohortTransport, resume, simulate
from fedlora.experiments.sweeps.forecast import forecast
from fedlora.experiments.sweeps.sweep import Cell
from fedlora.federation.messages import ClientUpdate, RoundInstruction
from fedlora.federation.protection import protected_vector
from fedlora.federation.schedule import make_schedule
from fedlora.federation.server import Reply
from fedlora.federation.shelf import Shelf
from fedlora.federation.sites import load_simulated_data, make_site
from fedlora.privacy.accounting import Charge, epsilon
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.phases import FINETUNE

C, N, ROUNDS = 0.125, 3, 3
FALSE_ALARM = 1e-6
CLIENT = ("privacy.unit=client", f"privacy.client_clip_norm={C}", "privacy.epsilon=8")
NOISELESS = (*CLIENT, "privacy.epsilon=inf")
MODES = {"server": CLIENT, "shared": (*CLIENT, "privacy.client_noise=shared", f"federation.minimum_clients={N}")}
METHODS = ("ffa", "lora", "ffa_svd")
Change = Callable[[ClientUpdate, Tensor], list[Reply]]


def own_noise(seeded: bool) -> str:
    return f"privacy.seeded_noise={str(seeded).lower()}"


@dataclasses.dataclass
class Wire:
    """A transport that remembers what crossed it and hands client 1's replies to `change`."""

    federation: Any
    change: Change = lambda update, start: [update]
    heard: list[tuple[RoundInstruction, list[Reply]]] = dataclasses.field(default_factory=list)

    def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        bench = self.federation.workbench
        replies: list[Reply] = []
        for update in self.federation.exchange(instruction, clients):
            start = bench.moved_from(instruction.theta, bench.schedule[instruction.round_index], update.client)
            replies += self.change(update, start) if update.client == 1 else [update]
        self.heard.append((instruction, replies))
        return replies


@dataclasses.dataclass
class Run:
    state: Any
    reports: list[Any]
    starts: list[Tensor]
    """[P] of what is sent, by round."""
    reached: list[Tensor]
    """The same after the round."""
    heard: list[tuple[RoundInstruction, list[Any]]]

    @property
    def claimed(self) -> float:
        """σ from which every ε of the run is computed."""
        phases = [phase for facts in self.state.facts.values() for phase in facts["phases"]]
        (told,) = {phase["effective_noise_multiplier"] for phase in phases}
        return float(told)


def run(federation: Any, change: Change = lambda update, start: [update]) -> Run:
    bench, wire = federation.workbench, Wire(federation, change)
    reports: list[Any] = []
    reached: list[Tensor] = []

    def on_round(report: Any, state: Any) -> None:
        reports.append(report)
        reached.append(state.theta[bench.sent_positions(bench.schedule[report.round])].clone())

    state = federation.server(wire, on_round).run(federation.start())
    entries = bench.schedule
    starts = [bench.moved_from(told.theta, entries[told.round_index], 0) for told, _ in wire.heard]
    return Run(state, reports, starts, reached, wire.heard)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Moves of all clients as they were trained, before anything protects them: [P] float64, in order."""
    genuine, moves = protected_vector, []

    def seen(how: Any, vector: Tensor, start: Tensor, noise: Any) -> Tensor:
        moves.append(vector.double() - start.double())
        return genuine(how, vector, start, noise)

    monkeypatch.setattr("fedlora.federation.cohort.protected_vector", seen)
    return moves


def clipped(move: Tensor) -> Tensor:
    return move * min(1.0, C / float(move.norm()))


def undivided(method: str) -> tuple[str, ...]:
    """Settings under which the server leaves the mean as it is."""
    return (f"adapter.method={method}", *(["adapter.svd_every=10"] if method == "ffa_svd" else []))


def looks_like(values: Tensor, std: float) -> bool:
    squares, count = float(values.square().sum()) / std**2, values.numel()
    spread = chi2.ppf(FALSE_ALARM, count) < squares < chi2.isf(FALSE_ALARM, count)
    return spread and abs(float(values.mean())) < 6 * std / math.sqrt(count)


# -------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("seeded", [True, False], ids=["seeded", "unseeded"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_released_is_the_mean_of_clipped_moves_with_the_claimed_noise_on_their_sum(
    make_federation: Any, trained: list[Tensor], mode: str, method: str, seeded: bool
) -> None:
    settings = (*undivided(method), "adapter.rank=16", "federation.rounds=5")
    found = run(make_federation(*MODES[mode], *settings, "training.learning_rate=5.0", own_noise(seeded)))
    claimed = found.claimed * C
    assert max(float(move.norm()) for move in trained) > C, "or clipping would not be seen"
    of_rounds, unknown = [], []
    for number, (start, reached, (_, sent)) in enumerate(zip(found.starts, found.reached, found.heard, strict=True)):
        moves = [clipped(move) for move in trained[N * number : N * (number + 1)]]
        noise = (reached.double() - start.double()) * N - torch.stack(moves).sum(dim=0)
        parts = [update.vector.double() - start.double() - move for update, move in zip(sent, moves, strict=True)]
        for part in parts:
            if mode == "server":
                assert float(part.abs().max()) < 1e-5, "a client adds nothing"
            else:
                assert looks_like(part, claimed / math.sqrt(N - 1))
        of_rounds.append(noise)
        unknown.append(noise - (parts[0] if mode == "shared" else 0.0))
    assert torch.cat(of_rounds).numel() > 4000, "fewer numbers could not tell 10 %"
    against_one_other = torch.cat(unknown)
    assert looks_like(against_one_other, claimed)
    assert not looks_like(against_one_other, 0.9 * claimed)
    assert not looks_like(against_one_other, 1.1 * claimed)
    assert looks_like(torch.cat(of_rounds), claimed * (math.sqrt(N / (N - 1)) if mode == "shared" else 1.0))
    for one in range(len(of_rounds)):
        for other in range(one):
            together = torch.nn.functional.cosine_similarity(of_rounds[one], of_rounds[other], dim=0)
            assert abs(float(together)) < 6 / math.sqrt(of_rounds[0].numel()), "fresh noise in every round"


@pytest.mark.parametrize("mode", MODES)
def test_every_epsilon_is_that_of_the_claimed_noise_once_a_round(make_federation: Any, mode: str) -> None:
    found = run(make_federation(*MODES[mode], "federation.local_steps=4"))
    for number, report in enumerate(found.reports, 1):
        spent = epsilon([Charge(1.0, found.claimed, number)], 1e-3)
        assert spent * (1 - 1e-6) <= report.epsilon_max <= spent * (1 + 2e-3)
    for facts in found.state.facts.values():
        assert (facts["unit"], facts["num_steps"], facts["sampling_probability"]) == ("client", ROUNDS, 1.0)
        assert "num_examples" not in facts, "the number of records is part of what is protected"
    assert 0.98 * 8 < found.reports[-1].epsilon_max <= 8


@pytest.mark.parametrize("mode", MODES)
def test_unseeded_noise_is_new_in_every_run_and_seeded_noise_the_same(make_federation: Any, mode: str) -> None:
    for seeded in (True, False):
        first, second = (run(make_federation(*MODES[mode], own_noise(seeded))).reached[0] for _ in range(2))
        assert torch.equal(first, second) == seeded


def test_one_server_never_uses_its_noise_twice(make_federation: Any) -> None:
    """Two runs by one server object: moves without noise are the same, and what is released is not."""
    federation = make_federation(*CLIENT, own_noise(False), "training.learning_rate=1e-9", "federation.rounds=1")
    server = federation.server()
    first = server.run(federation.start()).theta.clone()
    federation.ledger = Ledger.in_memory()
    federation.sites = [dataclasses.replace(site, run_id=None, next_round=0) for site in federation.sites]
    assert not torch.isclose(server.run(federation.start()).theta, first).any()


# ------------------------------------------------------------------------------------------------- who did not answer


def silent(update: ClientUpdate, start: Tensor) -> list[Reply]:
    return []


@pytest.mark.parametrize("method", ["lora", "ffa_svd"])
def test_a_silent_client_changes_neither_divisor_nor_noise(make_federation: Any, method: str) -> None:
    settings = (*CLIENT, f"adapter.method={method}")
    absent = run(make_federation(*settings), silent)
    still = run(make_federation(*settings), lambda update, start: [dataclasses.replace(update, vector=start)])
    assert torch.equal(absent.state.theta, still.state.theta)
    assert [report.clients_failed for report in absent.reports] == [1] * ROUNDS


def test_without_noise_the_divisor_is_seen(make_federation: Any, trained: list[Tensor]) -> None:
    found = run(make_federation(*NOISELESS, "federation.rounds=1"), silent)
    wanted = sum(clipped(move) for client, move in enumerate(trained) if client != 1) / N
    moved = found.reached[0].double() - found.starts[0].double()
    assert torch.allclose(moved, torch.as_tensor(wanted), rtol=1e-4, atol=1e-7)


def test_a_silent_client_is_charged_in_rounds_as_if_it_had_answered(make_federation: Any) -> None:
    """It may have told its facts before, or never."""
    asked = (*CLIENT, "federation.local_steps=4")
    late = run(make_federation(*asked), lambda update, start: [update] if update.round_index == 0 else []).state.facts
    assert late[1]["num_steps"] == late[0]["num_steps"] == ROUNDS
    assert late[1]["epsilon"] == pytest.approx(late[0]["epsilon"], rel=1e-9)
    never = run(make_federation(*asked), silent).state.facts
    assert (never[1]["num_steps"], never[1]["epsilon"]) == (ROUNDS, 8)


def test_shared_noise_ends_the_run_where_a_part_is_missing(make_federation: Any) -> None:
    federation = make_federation(*MODES["shared"])
    state = federation.start()
    before = state.theta.clone()
    with pytest.raises(FedloraError, match=r"2 of 3 clients answered usably \(no_reply\), wanted at least 3"):
        federation.server(Wire(federation, silent)).run(state)
    assert torch.equal(state.theta, before)
    assert state.next_round == 0


# ---------------------------------------------------------------------------------------------------- hostile clients


HOSTILE: dict[str, Callable[[Tensor], Tensor]] = {
    "huge": lambda start: start + 1e9,
    "beyond float32 when squared": lambda start: torch.full_like(start, 3e38),
    "long the other way": lambda start: start - 1e4 * torch.arange(len(start)).float(),
    "one coordinate": lambda start: torch.cat([start[:-1], start[-1:] + 5.0]),
    "none at all": lambda start: start,
}


@pytest.mark.parametrize("method", ["lora", "ffa_svd"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_client_moves_the_mean_by_its_share_alone(make_federation: Any, kind: str, method: str) -> None:
    settings = (*CLIENT, *undivided(method), "federation.rounds=1")

    def hostile(update: ClientUpdate, start: Tensor) -> list[Reply]:
        return [dataclasses.replace(update, vector=HOSTILE[kind](start))]

    honest, bent = run(make_federation(*settings)), run(make_federation(*settings), hostile)
    apart = float((bent.reached[0].double() - honest.reached[0].double()).norm())
    assert 0 < apart <= 2 * C / N * (1 + 1e-3)
    assert bent.reports[0].failures == {}


@pytest.mark.parametrize("bad", ["nan", "claims more noise"])
def test_what_no_honest_client_sends_counts_as_silence(make_federation: Any, bad: str) -> None:
    def broken(update: ClientUpdate, start: Tensor) -> list[Reply]:
        if bad == "nan":
            return [dataclasses.replace(update, vector=torch.full_like(start, math.nan))]
        louder = update.facts | {"effective_noise_multiplier": 2 * update.facts["effective_noise_multiplier"]}
        return [dataclasses.replace(update, facts=louder)]

    found, absent = run(make_federation(*CLIENT), broken), run(make_federation(*CLIENT), silent)
    assert [dict(report.failures) for report in found.reports] == [{1: "protocol"}] * ROUNDS
    assert torch.equal(found.state.theta, absent.state.theta)


def test_a_hostile_part_of_shared_noise_ends_the_run(make_federation: Any) -> None:
    federation = make_federation(*MODES["shared"])
    wire = Wire(federation, lambda update, start: [dataclasses.replace(update, vector=start + 1e3)])
    with pytest.raises(ProtocolError, match="longer than"):
        federation.server(wire).run(federation.start())


@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_no_clients_code_depends_on_anothers_data(make_federation: Any, scale: float) -> None:
    """Beside two that hardly move, an honest third is far away; beside one that is far away, two hardly move."""

    def moved(update: ClientUpdate, start: Tensor) -> ClientUpdate:
        return dataclasses.replace(update, vector=start + scale * (update.vector - start))

    federation = make_federation(*CLIENT)
    genuine = federation.exchange

    def exchange(instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        entry = federation.workbench.schedule[instruction.round_index]
        return [
            update
            if update.client == 1
            else moved(update, federation.workbench.moved_from(instruction.theta, entry, update.client))
            for update in genuine(instruction, clients)
        ]

    federation.exchange = exchange
    found = run(federation)
    assert [report.failures for report in found.reports] == [{}] * ROUNDS


def test_an_honest_client_whose_training_breaks_sends_no_move_and_no_sign_of_it(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **how: Any) -> Any:
        rows = train(*arguments, **how)
        rows[1].theta[0] = math.nan
        return rows

    monkeypatch.setattr("fedlora.federation.cohort.train", broken)
    found = run(make_federation(*CLIENT))
    assert [report.failures for report in found.reports] == [{}] * ROUNDS
    for (_, sent), start in zip(found.heard, found.starts, strict=True):
        assert torch.equal(sent[1].vector, start)


# ------------------------------------------------------------------------------------------------- sites and policies


def test_the_sigma_of_a_site_is_that_of_the_client_asked_most(make_federation: Any) -> None:
    settings = ("federation.clients=6", "federation.participation=0.5", "federation.rounds=5", "privacy.delta=1e-4")
    federation = make_federation(*CLIENT, *settings)
    assert len({site.plan[FINETUNE].charge().noise_multiplier for site in federation.sites}) == 1
    rounds = [len(site.schedule) for site in federation.sites]
    spent = [site.plan.epsilon() for site in federation.sites]
    assert len(set(rounds)) > 1
    assert spent.index(max(spent)) == rounds.index(max(rounds))
    assert 0.98 * 8 < max(spent) <= 8


def test_a_ledger_of_clients_counts_rounds(make_federation: Any) -> None:
    federation = make_federation(*CLIENT, own_noise(False), "federation.local_steps=4")
    found = run(federation)
    for site in federation.sites:
        assert site.data_set.unit == "client"
        assert federation.ledger.charges(site.data_set) == [Charge(1.0, found.claimed, ROUNDS)]


def test_clients_that_are_too_few_for_delta_are_told_so_and_not_of_a_batch(make_federation: Any) -> None:
    with pytest.raises(FedloraError, match=r"one over the number of clients") as refused:
        make_federation(*CLIENT, "privacy.delta=0.4")
    assert "batch" not in str(refused.value)


def test_the_server_refuses_before_anyone_is_asked(make_federation: Any) -> None:
    federation = make_federation(*CLIENT)
    federation.workbench.config = federation.config.with_overrides("privacy.delta=0.4")
    with pytest.raises(FedloraError, match="one over the number of clients"):
        federation.server()


# ----------------------------------------------------------------------------------------------------- finished runs


class Silent:
    def start(self, config: RunConfig, **public: Any) -> None: ...

    def round(self, report: Any) -> None: ...

    def finish(self, *public: Any) -> None: ...


@pytest.mark.parametrize("method", ["lora", "ffa_svd"])
@pytest.mark.parametrize("mode", MODES)
def test_record_and_report_of_a_finished_run_say_whom_it_protects_from_whom(
    tiny_config: Any, tmp_path: Path, mode: str, method: str
) -> None:
    place = f"run.out='{tmp_path / 'run'}'"
    config = tiny_config(*MODES[mode], f"adapter.method={method}", own_noise(False), place)
    folder = simulate(config, Silent())
    record = json.loads((folder / "record.json").read_text())
    report = " ".join((folder / "PRIVACY.md").read_text().split())
    guarantee = record["privacy"]["guarantee"]
    assert record["private"] is True
    assert (guarantee["unit"], guarantee["noise_by"]) == ("client", mode)
    told = record["clients"][0]
    assert (told["num_steps"], told["clip_norm"]) == (ROUNDS, C)
    charge = Charge(1.0, told["effective_noise_multiplier"], ROUNDS)
    assert guarantee["epsilon"] == pytest.approx(epsilon([charge], 1e-3), rel=1e-6)
    assert all(site["epsilon_charged"] == pytest.approx(guarantee["epsilon"]) for site in record["privacy"]["sites"])
    assert all(row["epsilon"] == pytest.approx(guarantee["epsilon"]) for row in record["privacy"]["ledger"])
    assert record["slots"] is None
    assert "privacy.unit = client adds noise to moves" in record["slots_note"]
    assert "Protected is the whole data of one client" in report
    assert "one record of one site" not in report
    if mode == "server":
        assert "| server | nothing: it is trusted with every client's move as it is" in report
        assert record["privacy"]["less_noise"] is None
    else:
        of_part = Charge(1.0, charge.noise_multiplier / math.sqrt(N - 1), ROUNDS)
        faces = record["privacy"]["less_noise"]["server"]
        assert faces == pytest.approx(epsilon([of_part], 1e-3), rel=1e-6)
        assert f"ε = {faces:.2f}"[:7] in report


@pytest.mark.parametrize("mode", MODES)
def test_a_round_done_anew_is_charged_again_and_has_fresh_noise(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    genuine, stops = CohortTransport.exchange, [1]
    sent: list[list[Tensor]] = []

    def stopped(self: Any, instruction: Any, clients: Any) -> Any:
        replies = genuine(self, instruction, clients)
        if instruction.round_index == 1:
            sent.append([update.vector.clone() for update in replies if isinstance(update, ClientUpdate)])
            if stops:
                stops.pop()
                raise KeyboardInterrupt
        return replies

    monkeypatch.setattr(CohortTransport, "exchange", stopped)
    config = tiny_config(*MODES[mode], own_noise(False), f"run.out='{tmp_path / 'run'}'")
    with pytest.raises(RunInterrupted):
        simulate(config, Silent())
    record = json.loads((resume(Path(config.run.out), Silent()) / "record.json").read_text())
    sigma = record["clients"][0]["effective_noise_multiplier"]
    for site in record["privacy"]["sites"]:
        assert (site["rounds_asked"], site["rounds_charged"]) == (ROUNDS, ROUNDS + 1)
        assert site["epsilon_charged"] == pytest.approx(epsilon([Charge(1.0, sigma, ROUNDS + 1)], 1e-3), rel=1e-6)
    if mode == "shared":
        assert not any(torch.isclose(one, other).all() for one, other in zip(*sent, strict=True))
    with closing(sqlite3.connect(Path(config.run.out) / "ledger.sqlite")) as ledger:
        rows = ledger.execute("SELECT DISTINCT unit, num_steps FROM entry WHERE kind = 'reserved'").fetchall()
    assert rows == [("client", 1)]


def test_a_resumed_run_ends_where_it_would_have(tiny_config: Any, tmp_path: Path) -> None:
    class Stopped(Silent):
        def round(self, report: Any) -> None:
            if report.round == 0:
                raise KeyboardInterrupt

    def adapters(folder: Path) -> list[bytes]:
        return [file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))]

    whole, cut = (tiny_config(*CLIENT, "adapter.method=lora", f"run.out='{tmp_path / name}'") for name in ("a", "b"))
    finished = simulate(whole, Silent())
    with pytest.raises(RunInterrupted):
        simulate(cut, Stopped())
    assert adapters(resume(Path(cut.run.out), Silent())) == adapters(finished)


# --------------------------------------------------------------------------------------------------- what looks ahead


def test_a_forecast_shows_the_noise_on_moves(tiny_config: Any) -> None:
    config = tiny_config(*CLIENT, own_noise(False))
    (found,) = forecast([Cell(axes={}, config=config)], Shelf())
    site = make_site(config, load_simulated_data(config), make_schedule(config), 0)
    assert found.noise_multiplier == (site.plan[FINETUNE].charge().noise_multiplier,) * 2
    assert 0.98 * 8 < found.epsilon <= 8


def test_an_audit_of_records_is_refused(tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config(*CLIENT)
    with pytest.raises(FedloraError, match=r"attacks single records.*set privacy\.unit=record"):
        audit(config, level="mechanism", trials=1000, canaries=100, out=tmp_path / "audit", progress=None)  # type: ignore[arg-type]
    assert not (tmp_path / "audit").exists()
