"""The server uses what fits the round, survives the rest, and loses nobody's contribution."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.engine.prototypes import LARGEST_LOGIT
from fedlora.errors import FedloraError
from fedlora.federation.failures import FAILURE_CODES
from fedlora.federation.messages import ClientFailure, ClientUpdate, RoundInstruction
from fedlora.federation.server import Reply
from fedlora.randomness import SecretRoot

Change = Callable[[ClientUpdate], list[Reply]]


@dataclasses.dataclass
class Tampering:
    """Hands client 1's reply of round `at` to `change`, and every list of replies to `order`."""

    federation: Any
    change: Change = lambda update: [update]
    order: Callable[[list[Reply]], list[Reply]] = list
    at: int = 0

    def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        replies: list[Reply] = []
        for update in self.federation.exchange(instruction, clients):
            tampered = update.client == 1 and instruction.round_index == self.at
            replies += self.change(update) if tampered else [update]
        return self.order(replies)


def replaced(**changes: Any) -> Change:
    return lambda update: [dataclasses.replace(update, **changes)]


def with_nan(update: ClientUpdate) -> list[Reply]:
    update.vector[0] = torch.nan
    return [update]


UNUSABLE: dict[str, tuple[Change, str]] = {
    "another digest": (replaced(layout_digest="0" * 64), "protocol"),
    "too short": (lambda update: [dataclasses.replace(update, vector=update.vector[:-1])], "protocol"),
    "a matrix": (lambda update: [dataclasses.replace(update, vector=update.vector[None])], "protocol"),
    "half precision": (lambda update: [dataclasses.replace(update, vector=update.vector.half())], "protocol"),
    "not a number": (with_nan, "protocol"),
    "another run": (replaced(run_id="other"), "protocol"),
    "another round": (replaced(round_index=1), "protocol"),
    "another phase": (replaced(phase="prototype"), "protocol"),
    "nothing": (lambda update: [], "no_reply"),
    "a failure": (lambda update: [ClientFailure(1, "refused")], "refused"),
    "somebody unasked": (replaced(client=17), "no_reply"),
    "the name of another": (
        lambda update: [dataclasses.replace(update, client=0, vector=update.vector + 1)],
        "no_reply",
    ),
}


@pytest.fixture
def federation(make_federation: Any) -> Any:
    return make_federation("federation.rounds=2")


def run(federation: Any, transport: Any = None) -> tuple[Any, list[Any]]:
    reports: list[Any] = []
    state = federation.server(transport, lambda report, _: reports.append(report)).run(federation.start())
    return state, reports


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_reply_is_not_used_and_stops_nothing(make_federation: Any, kind: str) -> None:
    change, code = UNUSABLE[kind]
    tampered, without = make_federation("federation.rounds=2"), make_federation("federation.rounds=2")
    state, reports = run(tampered, Tampering(tampered, change))
    wanted, _ = run(without, Tampering(without, lambda update: []))
    assert torch.equal(state.theta, wanted.theta)
    assert (reports[0].clients_ok, reports[0].clients_failed, dict(reports[0].failures)) == (2, 1, {1: code})
    assert (reports[1].clients_ok, reports[1].clients_failed) == (3, 0)
    assert code in FAILURE_CODES


@pytest.mark.parametrize(
    "change",
    [
        lambda update: [update, dataclasses.replace(update, vector=update.vector * 100)],
        lambda update: [update, ClientFailure(1, "internal")],
        lambda update: [update, update, update],
        lambda update: [update, dataclasses.replace(update, client=99), ClientFailure(98, "internal")],
    ],
    ids=["another vector", "a failure", "thrice", "strangers"],
)
def test_a_second_answer_or_a_strangers_changes_nothing(make_federation: Any, change: Change) -> None:
    tampered, plain = make_federation("federation.rounds=2"), make_federation("federation.rounds=2")
    state, reports = run(tampered, Tampering(tampered, change))
    assert torch.equal(state.theta, run(plain)[0].theta)
    assert [report.clients_ok for report in reports] == [3, 3]
    assert set(state.facts) == {0, 1, 2}


def test_the_order_of_arrival_changes_no_bit(make_federation: Any) -> None:
    results = []
    for order in (list, lambda replies: replies[::-1], lambda replies: [replies[i] for i in (1, 2, 0)]):
        federation = make_federation("model.head=prototype")
        results.append(run(federation, Tampering(federation, order=order))[0])
    assert torch.equal(results[0].theta, results[1].theta)
    assert torch.equal(results[0].theta, results[2].theta)
    assert all(torch.equal(a, b) for a, b in zip(results[0].head, results[2].head, strict=True))


def test_without_any_usable_reply_the_run_stops_with_one_line_and_the_state_of_before(federation: Any) -> None:
    state = federation.start()
    before = copy.deepcopy(state)

    class Silent:
        def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
            return [ClientFailure(0, "internal"), ClientFailure(1, "refused")]

    with pytest.raises(
        FedloraError, match=r"none of 3 clients answered usably \(internal, no_reply, refused\)"
    ) as caught:
        federation.server(Silent()).run(state)
    assert caught.value.exit_code == 1
    assert (state.next_round, state.facts, state.bytes_up, state.bytes_down) == (0, {}, 0, 0)
    assert torch.equal(state.theta, before.theta)


@pytest.mark.parametrize("head", ["prototype", "trained"])
@pytest.mark.parametrize("client", [0, 1, 2])
def test_every_clients_data_change_the_result(make_federation: Any, head: str, client: int) -> None:
    options = (f"model.head={head}", "federation.rounds=1")
    plain, changed = make_federation(*options), make_federation(*options)
    own = changed.sites[client].records
    changed.dataset.labels[own] = 1 - changed.dataset.labels[own]
    before, after = run(plain)[0], run(changed)[0]
    assert (before.theta - after.theta).norm() > 1e-4


def test_the_global_state_is_the_mean_of_what_the_clients_sent(make_federation: Any) -> None:
    server_side, by_hand = make_federation("federation.rounds=1"), make_federation("federation.rounds=1")
    updates = by_hand.exchange(by_hand.instruction(by_hand.workbench.schedule[0]), (0, 1, 2))
    state, _ = run(server_side)
    assert torch.allclose(state.theta, torch.stack([update.vector for update in updates]).mean(dim=0), atol=1e-7)


def test_the_prototype_head_is_installed_and_travels_with_every_later_instruction(make_federation: Any) -> None:
    federation = make_federation("model.head=prototype")
    sent: list[RoundInstruction] = []

    class Spy:
        def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
            sent.append(instruction)
            return federation.exchange(instruction, clients)  # type: ignore[no-any-return]

    state, _ = run(federation, Spy())
    assert sent[0].head is None
    assert all(instruction.head is not None for instruction in sent[1:])
    weight, bias = federation.workbench.classifier.head.linear.weight, federation.workbench.classifier.head.linear.bias
    assert torch.equal(state.head[0], weight)
    assert torch.equal(state.head[1], bias)
    assert weight.any()
    assert not sent[0].theta.any(), "the prototype round leaves theta where it was"
    assert not sent[1].theta.any()


@pytest.mark.parametrize("records", [60, 100, 200])
def test_sites_of_few_records_live_through_the_noise_of_their_prototypes(make_federation: Any, records: int) -> None:
    """A head that the sites then refuse would end a run that is charged already; 20 draws of the noise each."""
    options = (f"data.generated_records={records}", "training.expected_batch_size=8", "federation.rounds=1")
    federation = make_federation("model.head=prototype", "privacy.accountant=rdp", *options)
    for draw in range(20):
        for site in federation.sites:
            site.secret, site.next_round, site.run_id = SecretRoot.seeded(draw), 0, None
        state = dataclasses.replace(federation.start(), run_id=f"run-{draw}")
        assert federation.server().run(state).next_round == 2
        assert max(part.abs().max() for part in state.head) < 0.1 * LARGEST_LOGIT


def test_bytes_are_counted_up_and_down_over_all_clients(make_federation: Any) -> None:
    federation = make_federation("federation.clients=4", "federation.participation=0.5")
    state, reports = run(federation)
    size = 4 * federation.workbench.layout.size
    assert [(report.bytes_up, report.bytes_down) for report in reports] == [(2 * size, 2 * size)] * 3
    assert (state.bytes_up, state.bytes_down) == (6 * size, 6 * size)


def test_reports_name_the_worst_sites_epsilon_and_end_at_the_plans(make_federation: Any) -> None:
    federation = make_federation("data.partition=label_skew", 'data.label_skew="0.7,0.1; 0.2,0.2; 0.1,0.7"')
    assert len({len(site.records) for site in federation.sites}) > 1, "the sites should differ"
    _, reports = run(federation)
    spent = [report.epsilon_max for report in reports]
    assert spent == sorted(spent)
    assert spent[-1] == max(site.plan.epsilon() for site in federation.sites) <= 6.0
    for report, entry in zip(reports, federation.workbench.schedule, strict=True):
        assert report.epsilon_max == max(site.facts(entry)["epsilon"] for site in federation.sites)


def test_public_metrics_come_every_so_many_rounds_and_after_the_last(make_federation: Any) -> None:
    federation = make_federation("federation.rounds=5", "run.evaluate_every=2", "federation.local_steps=1")
    asked: list[torch.Tensor] = []
    reports: list[Any] = []

    def evaluate(theta: torch.Tensor) -> dict[str, float]:
        asked.append(theta)
        return {"accuracy": 0.5, "f1": 0.4}

    server = federation.server(None, lambda report, _: reports.append(report), evaluate)
    state = server.run(federation.start())
    assert [report.metric for report in reports] == [None, 0.5, None, 0.5, 0.5]
    assert reports[1].metrics == {"accuracy": 0.5, "f1": 0.4}
    assert reports[0].metrics == {}
    assert torch.equal(asked[-1], state.theta)


def test_the_callback_sees_the_state_to_go_on_from(federation: Any) -> None:
    seen: list[tuple[int, int]] = []
    federation.server(None, lambda report, state: seen.append((report.round, state.next_round))).run(federation.start())
    assert seen == [(0, 1), (1, 2)]


def test_a_finished_state_runs_nothing_more(federation: Any) -> None:
    state, _ = run(federation)
    theta = state.theta.clone()
    federation.server(transport=object()).run(state)
    assert torch.equal(state.theta, theta)


def test_learning_really_happens_without_noise(make_federation: Any) -> None:
    """The loop as a whole descends: on data whose label is its first word, the loss falls."""
    federation = make_federation(
        "privacy.epsilon=inf", "model.head=trained", "training.learning_rate=2", "federation.rounds=6",
        "federation.local_steps=5", "training.schedule=constant",
    )  # fmt: skip
    data, bench = federation.dataset, federation.workbench
    data.ids[data.starts + 1] = np.where(data.labels == 1, 12, 13)

    def loss(theta: torch.Tensor) -> float:
        batch, labels = data.batch(np.arange(len(data)))
        return float(torch.nn.functional.cross_entropy(bench.backend.logits(theta, batch), labels))

    state = federation.start()
    before = loss(state.theta)
    federation.server().run(state)
    assert loss(state.theta) < 0.6 * before


def test_a_client_whose_answers_never_arrive_is_charged_all_the_same(make_federation: Any) -> None:
    """It may have released what got lost: the worst case is that it did, every time."""
    federation = make_federation("federation.rounds=2")
    known, _ = run(federation)
    lost = make_federation("federation.rounds=2")
    late = Tampering(lost, lambda update: [], at=1)
    state, reports = run(lost, late)
    assert state.facts[1]["num_steps"] == known.facts[1]["num_steps"]
    assert state.facts[1]["epsilon"] == pytest.approx(known.facts[1]["epsilon"], rel=1e-3)
    assert reports[-1].epsilon_max == pytest.approx(max(f["epsilon"] for f in known.facts.values()), rel=1e-3)


def test_a_client_that_never_said_a_word_is_charged_what_was_asked(make_federation: Any) -> None:
    federation = make_federation("federation.rounds=1")

    class Silent(Tampering):
        def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
            return [reply for reply in self.federation.exchange(instruction, clients) if reply.client != 1]

    state, reports = run(federation, Silent(federation))
    assert state.facts[1]["epsilon"] == federation.workbench.config.privacy.epsilon
    assert reports[-1].epsilon_max == federation.workbench.config.privacy.epsilon
