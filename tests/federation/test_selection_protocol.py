"""A choice of modules in the middle of a run: what sites make of it, and what they refuse to make of anything else."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fedlora.adapters.dam import UpdateProducts
from fedlora.errors import AdapterError, FedloraError, PrivacyError, ProtocolError
from fedlora.federation import cohort, selection, workbench
from fedlora.federation.memory import recall, remember
from fedlora.federation.messages import ClientUpdate, RoundInstruction
from fedlora.federation.server import Reply
from fedlora.federation.sites import make_site
from fedlora.federation.wire import decode_instruction, decode_update, encode_instruction, encode_update
from fedlora.privacy.phases import ALIGNMENT, BILEVEL, FINETUNE, WARMUP
from fedlora.randomness import SecretRoot

SHORT = (
    "federation.rounds=5", "federation.local_steps=1", "adapter.search_rounds=1", "privacy.accountant=rdp",
    "training.learning_rate=0.05",
)  # fmt: skip
KEPT_ADAM = ("training.optimizer=adam", "training.keep_state=true")
SEARCHING = ("alignment", "warmup", "bilevel")
EVERYONE = (0, 1, 2)

Exchange = Callable[[RoundInstruction, tuple[int, ...]], list[Reply]]


@dataclasses.dataclass
class Recording:
    """A transport that keeps what crosses it."""

    exchange_genuine: Exchange
    rounds: list[tuple[RoundInstruction, list[ClientUpdate]]] = dataclasses.field(default_factory=list)

    def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        replies = self.exchange_genuine(instruction, clients)
        self.rounds.append((instruction, [reply for reply in replies if isinstance(reply, ClientUpdate)]))
        return replies

    def first(self, phase: str) -> RoundInstruction:
        return next(instruction for instruction, _ in self.rounds if instruction.phase == phase)


def record(federation: Any, exchange: Exchange | None = None) -> tuple[Any, Recording, list[Any]]:
    """The end of a run, all that crossed, and the state after each round."""
    recording, states = Recording(exchange or federation.exchange), []

    def on_round(report: Any, state: Any) -> None:
        states.append(dataclasses.replace(state, search=dataclasses.replace(state.search)))

    return federation.server(recording, on_round).run(federation.start()), recording, states


def same(ours: list[Any], theirs: list[Any]) -> bool:
    return all(torch.equal(one.vector, other.vector) for one, other in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------------------------------------- joining

LATE = ("adapter.select=warmup", "federation.participation=0.34", "federation.rounds=8", "run.seed=1")


def test_a_site_that_joins_after_the_choice_gets_it_with_the_model(make_federation: Any) -> None:
    federation = make_federation(*SHORT, *LATE)
    schedule = federation.workbench.schedule
    after = next(entry.index for entry in schedule if entry.phase == FINETUNE)
    first = {site.client: site.schedule[0].index for site in federation.sites}
    late = {client for client, index in first.items() if index > after}
    missed = {client for entry in schedule[:after] for client in entry.clients} - {*schedule[after].clients}
    returning = {client for client in missed if any(client in entry.clients for entry in schedule[after + 1 :])}
    assert late, "the schedule has somebody who joins late"
    assert returning, "and somebody who misses the round that tells the choice"
    state, recording, _ = record(federation)
    assert all(len(updates) == len(schedule[i].clients) for i, (_, updates) in enumerate(recording.rounds))
    for site in federation.sites:
        assert site.mask == state.chosen
    for client in late:
        steps = {phase["name"]: phase["num_steps"] for phase in state.facts[client]["phases"]}
        assert steps[WARMUP] == 0 < steps[FINETUNE]


def test_a_site_in_a_new_process_for_every_message_keeps_the_choice_and_drops_the_optimisers_state(
    make_federation: Any,
) -> None:
    options = (*SHORT, *KEPT_ADAM, "adapter.select=alignment")
    lasting, rebuilt = make_federation(*options), make_federation(*options)
    memories: dict[int, bytes] = {}

    def exchange(instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        arrived, replies = decode_instruction(encode_instruction(instruction)), []
        for client in clients:
            site = make_site(rebuilt.config, rebuilt.data, rebuilt.workbench.schedule, client)
            rebuilt.sites[client] = site
            if client in memories:
                recall(site, memories[client])
            (update,) = rebuilt.exchange(arrived, (client,))
            memories[client] = remember(site)
            replies.append(decode_update(encode_update(update)))
        return replies

    (state, _, _), (other, recording, _) = record(lasting), record(rebuilt, exchange)
    assert state.chosen == other.chosen
    torch.testing.assert_close(state.theta, other.theta, rtol=0, atol=1e-5)
    rounds = sum(instruction.phase == FINETUNE for instruction, _ in recording.rounds)
    for site in rebuilt.sites:
        assert site.mask == state.chosen
        assert site.optimizer_state["B/step"] == rounds, "the steps of the warm-up are forgotten"


@pytest.mark.parametrize("select", ["alignment", "bilevel"])
def test_the_optimiser_starts_anew_with_other_modules(make_federation: Any, select: str) -> None:
    """What it had gathered belongs to slots that are no more: a site that never warmed up does the same steps."""
    options = (*SHORT, *KEPT_ADAM, f"adapter.select={select}")
    federation, newcomer = make_federation(*options), make_federation(*options)
    _, recording, _ = record(federation)
    instruction, updates = next(one for one in recording.rounds if one[0].phase == FINETUNE)
    for site in newcomer.sites:
        site.schedule = tuple(entry for entry in site.schedule if entry.phase == FINETUNE)
    assert same(newcomer.exchange(instruction, EVERYONE), updates)
    assert {site.optimizer_state["B/step"].item() for site in newcomer.sites} == {1}


# ---------------------------------------------------------------------------------------------------------- warm start


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("select", SEARCHING)
def test_chosen_modules_keep_what_the_search_has_trained_where_asked(
    make_federation: Any, select: str, warm: bool
) -> None:
    federation = make_federation(
        *SHORT, f"adapter.select={select}", "adapter.sharing=type", f"adapter.warm_start={str(warm).lower()}"
    )
    full = federation.workbench.layout
    state, recording, states = record(federation)
    start, layout = recording.first(FINETUNE).theta, federation.workbench.layout
    before = next(one for one, later in itertools.pairwise(states) if later.chosen and not one.chosen)
    trained = {slot.name: full.view(before.theta, slot) for slot in full.slots}
    gates = torch.ones(12) if select != "bilevel" else 2 * torch.sigmoid(before.search.gates)
    if select == "bilevel":
        assert (gates - 1).abs().max() > 1e-3, "the gates have moved"
    kept = {f"{one.module}/B": gate for one, gate in zip(federation.workbench.candidates, gates, strict=True)}
    assert [slot.name for slot in layout.slots if slot.name in kept] == [
        f"{module}/B" for module in state.search.selection.mask.modules
    ]
    for slot in layout.slots:
        wanted = trained[slot.name] * kept[slot.name] if warm and slot.name in kept else torch.zeros(slot.shape)
        torch.testing.assert_close(layout.view(start, slot), wanted, rtol=1e-6, atol=0)
        assert wanted.any() == (warm and slot.name in kept)


# -------------------------------------------------------------------------------------------------- hostile or mistaken


def flipped(mask: tuple[bool, ...]) -> tuple[bool, ...]:
    return tuple(not chosen for chosen in mask)


def attacks(good: RoundInstruction, bench: Any, told: bool) -> Iterator[tuple[str, RoundInstruction]]:
    """What no sound server sends in the place of `good`. `bench` is nobody's: it builds what a liar would build."""

    def bad(**changes: Any) -> RoundInstruction:
        return dataclasses.replace(good, **changes)

    theta, mask = good.theta, good.mask
    count = len(bench.candidates)
    yield "too long", bad(theta=torch.cat([theta, torch.zeros(1)]))
    yield "too short", bad(theta=theta[:-1])
    yield "a gate for each module more", bad(theta=torch.cat([theta, torch.zeros(count)]))
    yield "another layout", bad(layout_digest="0" * 64)
    for value in (10.1, -10.1, torch.nan, torch.inf):
        yield f"ends with {value}", bad(theta=torch.cat([theta[:-1], torch.tensor([value])]))
    if mask is None:
        yield "everything is chosen already", bad(mask=(True,) * count)
        yield "one module is chosen already", bad(mask=(True,) + (False,) * (count - 1))
        if good.phase == ALIGNMENT:
            yield "no direction", bad(theta=torch.zeros_like(theta))
            no_slot = theta.clone()
            bench.layout.view(no_slot, bench.layout.slots[3]).zero_()
            yield "no direction for one module", bad(theta=no_slot)
        if good.phase == BILEVEL:
            yield "no gates", bad(theta=theta[:-count])
        return
    yield "no choice", bad(mask=None)
    yield (
        "no choice, and everything of it",
        bad(mask=None, theta=torch.zeros(bench.full_layout.size), layout_digest=bench.full_layout.digest),
    )
    yield "nothing chosen", bad(mask=(False,) * count)
    yield "too few", bad(mask=mask[:-1])
    yield "too many", bad(mask=(*mask, True))
    yield "of one", bad(mask=(True,))
    yield "another choice, the layout of this", bad(mask=flipped(mask))
    yield "this choice, the layout of everything", bad(layout_digest=bench.full_layout.digest)
    bench.adopt(flipped(mask))
    yield "this choice, the layout of another", bad(layout_digest=bench.layout.digest)
    if told:
        zeros = torch.zeros(bench.layout.size)
        yield "another choice, whole", bad(mask=flipped(mask), layout_digest=bench.layout.digest, theta=zeros)
        bench.adopt((True,) * count)
        zeros = torch.zeros(bench.layout.size)
        yield "everything, whole", bad(mask=(True,) * count, layout_digest=bench.layout.digest, theta=zeros)
    bench.adopt(None)


@pytest.mark.parametrize("select", [*SEARCHING, "random"])
def test_what_no_sound_server_sends_costs_nothing_and_changes_nothing(
    make_federation: Any, make_bench: Any, monkeypatch: pytest.MonkeyPatch, select: str
) -> None:
    options = (*SHORT, f"adapter.select={select}", "adapter.sharing=type", "model.head=prototype")
    honest, attacked, bench = make_federation(*options), make_federation(*options), make_bench(*options)
    _, recording, _ = record(honest)
    computed: list[str] = []

    def spy(name: str) -> None:
        genuine = getattr(cohort, name)

        def counted(*arguments: Any, **how: Any) -> Any:
            computed.append(name)
            return genuine(*arguments, **how)

        monkeypatch.setattr(cohort, name, counted)

    for name in ("train", "search", "alignment_sums", "class_sums"):
        spy(name)
    tried, told = 0, False
    for instruction, updates in recording.rounds:
        for what, bad in attacks(instruction, bench, told):
            before = len(computed), attacked.ledger.entries(), [site.next_round for site in attacked.sites]
            with pytest.raises((ProtocolError, AdapterError)):
                pytest.fail(f"done in phase {instruction.phase}: {what}: {attacked.exchange(bad, EVERYONE)}")
            after = len(computed), attacked.ledger.entries(), [site.next_round for site in attacked.sites]
            assert after == before, f"charged or computed in phase {instruction.phase}: {what}"
            tried += 1
        assert same(attacked.exchange(instruction, EVERYONE), updates), "an attack has changed a site"
        told = instruction.mask is not None
    assert tried >= 60
    assert len({*computed}) == {"alignment": 3, "bilevel": 3}.get(select, 2), "the spies see what is computed"


def test_another_choice_on_the_way_is_refused_by_a_client_of_a_run_that_selects_nothing(make_federation: Any) -> None:
    federation = make_federation()
    instruction = federation.instruction(federation.workbench.schedule[0], mask=(True,) * 4)
    with pytest.raises(ProtocolError, match=r"has a choice of modules, but adapter\.select = none"):
        federation.exchange(instruction, EVERYONE)
    assert federation.ledger.entries() == []


def test_adapters_that_cannot_be_attached_leave_those_that_were(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends the change of modules, the rounds before it can still be done, to the same bits."""
    options = (*SHORT, "adapter.select=warmup")
    honest, interrupted = make_federation(*options), make_federation(*options)
    _, recording, _ = record(honest)
    (one, first), (other, second) = recording.rounds[:2]
    told = recording.first(FINETUNE)
    assert same(interrupted.exchange(one, EVERYONE), first)

    def refused(*_: Any) -> None:
        raise PrivacyError("records of one micro-batch influence one another")

    with monkeypatch.context() as patch:
        patch.setattr(workbench, "_looks_at_company", refused)
        with pytest.raises(PrivacyError):
            interrupted.exchange(dataclasses.replace(told, round_index=2), EVERYONE)
    assert same(interrupted.exchange(other, EVERYONE), second)


# ------------------------------------------------------------------------------------------------------- fewer answers


@pytest.mark.parametrize("phase", ["warmup", "alignment", "bilevel"])
def test_a_site_that_fails_in_the_search_is_left_out_of_it_and_charged(make_federation: Any, phase: str) -> None:
    federation = make_federation(*SHORT, f"adapter.select={phase}")

    def exchange(instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        replies = federation.exchange(instruction, clients)
        return [reply for reply in replies if (reply.client, instruction.phase) != (1, phase)]

    state, recording, _ = record(federation, exchange)
    assert sum(state.chosen) == 6
    assert {len(updates) for instruction, updates in recording.rounds if instruction.phase == FINETUNE} == {3}
    searched = [updates for instruction, updates in recording.rounds if instruction.phase == phase]
    assert {len(updates) for updates in searched} == {2}
    if phase == "alignment":
        (updates,) = searched
        wanted = torch.stack([update.vector.double() for update in updates]).sum(dim=0)
        assert torch.allclose(torch.tensor(state.search.selection.scores, dtype=torch.float64), wanted)
    charged = [{one["name"]: one["num_steps"] for one in state.facts[client]["phases"]} for client in EVERYONE]
    assert charged[1] == charged[0], "what got lost may have been released"


@pytest.mark.parametrize("silent", [(), (1,), (0, 2)])
def test_costs_are_weighed_against_the_noise_of_the_scores_that_arrived(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch, silent: tuple[int, ...]
) -> None:
    federation = make_federation(*SHORT, "adapter.select=alignment", "adapter.discretise=cost_aware")
    weighed: list[list[float]] = []

    def exchange(instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        replies = federation.exchange(instruction, clients)
        return [reply for reply in replies if instruction.phase != ALIGNMENT or reply.client not in silent]

    def weighing(candidates: Any, energies: list[float], **how: Any) -> Any:
        weighed.append(energies)
        return genuine(candidates, energies, **how)

    genuine = selection.cost_aware
    monkeypatch.setattr(selection, "cost_aware", weighing)
    monkeypatch.setattr(UpdateProducts, "noise_to_signal", lambda *_: 1.0)
    state, _, _ = record(federation, exchange)
    noise = (3 - len(silent)) * 20.0**2
    wanted = [math.copysign(score**2, score) - noise for score in state.search.selection.scores]
    assert weighed[0] == pytest.approx(wanted)


@pytest.mark.parametrize("phase", ["warmup", "alignment", "bilevel"])
def test_a_search_that_nobody_answers_ends_the_run_with_the_reason(make_federation: Any, phase: str) -> None:
    federation = make_federation(*SHORT, f"adapter.select={phase}")

    def exchange(instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        return [] if instruction.phase == phase else federation.exchange(instruction, clients)  # type: ignore[no-any-return]

    with pytest.raises(FedloraError, match=rf"\({phase}\): none of 3 clients answered usably \(no_reply\)"):
        record(federation, exchange)


# --------------------------------------------------------------------------------------------------- a shared workbench


@pytest.mark.parametrize("select", SEARCHING)
@pytest.mark.parametrize("head", ["prototype", "trained"])
def test_two_runs_in_turn_on_one_workbench_give_what_they_give_alone(
    make_federation: Any, select: str, head: str
) -> None:
    """As in a process of Flower's, which keeps one base model; the second run is three rounds behind the first."""
    options = (*SHORT, f"adapter.select={select}", f"model.head={head}")
    runs = []
    for number in range(2):
        alone, shared = make_federation(*options), make_federation(*options)
        for site in (*alone.sites, *shared.sites):
            site.secret = SecretRoot.seeded(number)
        runs.append((shared, record(alone)[1].rounds))
    (first, ours), (second, theirs) = runs
    assert first.workbench is not second.workbench
    second.workbench = first.workbench
    assert not same(ours[0][1], theirs[0][1]), "the runs are not one and the same"
    turns = sorted(
        [(index, first, done) for index, done in enumerate(ours)]
        + [(index + 3.5, second, done) for index, done in enumerate(theirs)],
        key=lambda turn: turn[0],
    )
    for _, federation, (instruction, updates) in turns:
        assert same(federation.exchange(instruction, EVERYONE), updates)


def test_a_server_starts_a_new_run_on_a_workbench_that_has_seen_one(make_federation: Any) -> None:
    options = (*SHORT, "adapter.select=warmup", "model.head=prototype")
    used, fresh, alone = (make_federation(*options) for _ in range(3))
    record(used)
    assert used.workbench.mask is not None
    fresh.workbench = used.workbench
    (ours, _, _), (theirs, _, _) = record(fresh), record(alone)
    assert torch.equal(ours.theta, theirs.theta)
    assert ours.chosen == theirs.chosen


def test_a_prototype_head_survives_a_change_of_modules(make_bench: Any) -> None:
    bench = make_bench("model.head=prototype", "adapter.select=random")
    bench.classifier.set_head(torch.full((2, 16), 0.25), torch.tensor([1.0, -1.0]))
    for mask in ((True,) + (False,) * 11, None, (False,) * 11 + (True,)):
        bench.adopt(mask)
        linear = bench.classifier.head.linear
        assert torch.equal(linear.weight, torch.full((2, 16), 0.25))
        assert torch.equal(linear.bias, torch.tensor([1.0, -1.0]))
