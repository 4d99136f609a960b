"""All methods: what trains, what is sent, whether the server's model is the mean of the clients' models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.adapters.methods import METHODS
from fedlora.adapters.peft import export_adapter, load_classifier_from_export
from fedlora.federation import cohort
from fedlora.federation.checkpoint import load_checkpoint, save_checkpoint
from fedlora.federation.evaluator import personal_theta
from fedlora.federation.messages import RoundInstruction
from fedlora.privacy.phases import FINETUNE
from fedlora.randomness import PublicSeed

METHOD_NAMES = [*METHODS]
EXACT = [name for name, method in METHODS.items() if method.exact]
NOISELESS = ("privacy.epsilon=inf", "training.learning_rate=2.0", "federation.rounds=3", "federation.local_steps=4")
MIXED = ("flora", "flexlora", "hetlora")


class Listener:
    """A transport that keeps what crosses it."""

    def __init__(self, federation: Any) -> None:
        self.federation, self.heard = federation, []

    def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Any]:
        replies = self.federation.exchange(instruction, clients)
        self.heard.append((instruction, replies))
        return replies


def products(bench: Any, theta: Tensor, folded: Tensor | None) -> Tensor:
    """What theta [P] and the folded part add to the adapted weights, flat, [F] float64: the model, in short."""
    layout, slots = bench.layout, {slot.name: slot for slot in bench.layout.slots}
    found = []
    for name in bench.places:
        own = {part: layout.view(theta, slots[f"{name}/{part}"]).double() for part in METHODS[layout.method].factors}
        frozen = frozen_factors_of(bench)[name]
        outer, inner = own.get("B", frozen.get("B")), own.get("A", frozen.get("A"))
        core = own.get("R", torch.eye(layout.rank, dtype=torch.float64))
        found.append((layout.scale * outer @ core @ inner).flatten())
    total = torch.cat(found)
    return total if folded is None else total + folded.double()


def frozen_factors_of(bench: Any) -> dict[str, dict[str, Tensor]]:
    linears = {path: module for path, module in bench.classifier.backbone.named_modules() if hasattr(module, "_frozen")}
    return {
        name: {factor: value.double() for factor, value in linears[paths[0]]._frozen.items()}
        for name, paths in bench.places.items()
    }


def trained(federation: Any, state: Any = None) -> tuple[Any, list[Any]]:
    listener = Listener(federation)
    state = federation.server(listener).run(state or federation.start())
    return state, listener.heard


@pytest.mark.parametrize("method", EXACT)
def test_an_exact_methods_model_is_the_mean_of_the_clients_models(make_federation: Any, method: str) -> None:
    ranks = ("adapter.ranks=4,1,2",) if method in MIXED else ()
    federation = make_federation(f"adapter.method={method}", *NOISELESS, *ranks)
    bench, seen = federation.workbench, []

    def on_round(report: Any, state: Any) -> None:
        seen.append((state.theta.clone(), None if state.folded is None else state.folded.clone()))

    listener = Listener(federation)
    start = federation.start()
    before = [(start.theta.clone(), None)]
    federation.server(listener, on_round=on_round).run(start)
    for entry, (instruction, updates), began, ended in zip(
        bench.schedule, listener.heard, [*before, *seen], seen, strict=False
    ):
        clients = []
        for update in updates:
            vector = began[0].clone()
            if METHODS[method].folds:  # factors beyond a client's rank are none
                vector[bench.layout.positions(METHODS[method].factors)] = 0.0
            vector[bench.sent_positions(entry, update.client)] = update.vector
            clients.append(products(bench, vector, instruction.folded))
        mean, model = torch.stack(clients).mean(dim=0), products(bench, *ended)
        moved = (mean - products(bench, *began)).norm()
        assert moved > 1e-4
        assert (model - mean).norm() <= 1e-5 * mean.norm()


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_clients_records_decide_the_result(make_federation: Any, method: str) -> None:
    def model(labels: Callable[[Any], None]) -> Tensor:
        federation = make_federation(f"adapter.method={method}", *NOISELESS)
        labels(federation)
        state, _ = trained(federation)
        return state.theta if state.folded is None else torch.cat([state.theta, state.folded])

    reference = model(lambda federation: None)
    for client in range(3):

        def flip(federation: Any, client: int = client) -> None:
            own = federation.sites[client].records
            federation.dataset.labels[own] = 1 - federation.dataset.labels[own]

        assert (model(flip) - reference).norm() > 1e-3 * reference.norm(), f"client {client} counts for nothing"


# ------------------------------------------------------------------------------------------------------------ contract

SENT = {  # by method: parts that leave in the first three rounds
    "ffa": ("B", "B", "B"),
    "ffa_svd": ("B", "B", "B"),
    "rolora": ("B", "A", "B"),
    "fedsa": ("A", "A", "A"),
    "fed_sb": ("R", "R", "R"),
    "fed_sb_svd": ("B", "A", "R"),
} | dict.fromkeys(("la_lora", "lora", "fedex", "flora", "flexlora", "hetlora"), ("BA", "BA", "BA"))


@pytest.mark.parametrize("epsilon", ["inf", "6"])
@pytest.mark.parametrize("head", ["prototype", "trained"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_what_is_declared_leaves_and_nothing_else(
    make_federation: Any, tmp_path: Path, method: str, head: str, epsilon: str
) -> None:
    ranks = ("adapter.ranks=4,2",) if method in MIXED else ()
    overrides = (f"adapter.method={method}", f"model.head={head}", f"privacy.epsilon={epsilon}", *ranks)
    federation = make_federation(*overrides, "federation.local_steps=2", "training.learning_rate=0.1")
    bench, start = federation.workbench, federation.start()
    state, heard = trained(federation, replace(start, theta=start.theta.clone()))
    training = [(instruction, updates) for instruction, updates in heard if instruction.phase == FINETUNE]
    assert len(training) == 3
    for number, (instruction, updates) in enumerate(training):
        parts = {*SENT[method][number]} | ({"head"} if head == "trained" and method != "fedsa" else set())
        for update in updates:
            rank = bench.config.adapter.rank_of(update.client)
            wanted = sum(
                slot.size * (rank / 4) ** (2 * (slot.part == "R") + (slot.part in "AB"))
                for slot in bench.layout.slots
                if slot.part in parts
            )
            assert update.vector.numel() == wanted
        kept = sum(slot.size for slot in bench.layout.slots if method == "fedsa" and slot.part != "A")
        assert instruction.theta.numel() == bench.layout.size - kept
        assert (instruction.folded is not None) == (METHODS[method].folds and number > 0)
    assert not torch.equal(state.theta, start.theta), "it learnt something"
    assert all(site.kept is not None for site in federation.sites) == (method == "fedsa")
    assert {facts["epsilon"] < 6 for facts in state.facts.values()} == {epsilon == "6"}
    for site in federation.sites:
        theta = personal_theta(bench, state.theta, site) if method == "fedsa" else state.theta
        assert_exported(federation, state, theta, tmp_path / f"{site.client}")


def assert_exported(federation: Any, state: Any, theta: Tensor, folder: Path) -> None:
    """What plain PEFT makes of the folder has the logits of the model that was trained."""
    bench, config = federation.workbench, federation.config
    export_adapter(
        folder,
        model=config.model,
        seed=PublicSeed.from_int(config.run.seed),
        layout=bench.layout,
        places=bench.places,
        theta=theta,
        folded=state.folded,
        subspace=config.adapter.subspace,
        num_labels=bench.classifier.num_labels,
        head=state.head,
    )
    texts = ["a good film", "bad", "not a bad book at all"]
    batch = dict(bench.classifier.tokenizer(texts, padding=True, return_tensors="pt"))
    ready = load_classifier_from_export(folder)
    wanted = bench.backend.logits(theta, batch)
    torch.testing.assert_close(ready.logits(texts), wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(make_federation: Any, tmp_path: Path, method: str) -> None:
    keeps = "false" if method in ("ffa_svd", "fed_sb_svd", "fedex", "flora", "flexlora") else "true"
    rule = ("federation.server_optimizer=adam", "federation.server_learning_rate=0.1")
    overrides = (
        f"adapter.method={method}", f"training.keep_state={keeps}", "training.optimizer=adam", "federation.rounds=4",
        "training.learning_rate=0.02", *(rule if keeps == "true" else ()),
        "federation.participation=0.67", "model.head=trained",
    )  # fmt: skip
    whole, _ = trained(make_federation(*overrides))
    first, second = make_federation(*overrides), make_federation(*overrides)

    def save_and_stop(report: Any, state: Any) -> None:
        save_checkpoint(tmp_path / "c", state, first.sites)
        if report.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.server(on_round=save_and_stop).run(first.start())
    state, _ = trained(second, load_checkpoint(tmp_path / "c", second.sites))
    assert torch.equal(state.theta, whole.theta)
    assert (state.folded is None) == (whole.folded is None) == (not METHODS[method].folds)
    if whole.folded is not None:
        assert torch.equal(state.folded, whole.folded)


def test_the_base_is_given_back_as_it_was(make_federation: Any) -> None:
    federation = make_federation("adapter.method=flora", *NOISELESS)
    weights = [linear.weight.clone() for linear in federation.workbench.classifier.target_modules(["query"]).values()]
    trained(federation)
    federation.workbench.detach()
    modules = federation.workbench.classifier.target_modules(["query"]).values()
    assert all(torch.equal(linear.weight, weight) for linear, weight in zip(modules, weights, strict=True))


@pytest.mark.parametrize("method", MIXED)
def test_a_client_of_a_smaller_rank_has_nothing_beyond_it(make_federation: Any, method: str) -> None:
    """Neither in what it starts from nor in its noise: without the mask, noise would fill the rest."""
    federation = make_federation(f"adapter.method={method}", "adapter.ranks=4,1", "federation.local_steps=3")
    bench, rows = federation.workbench, []
    genuine = cohort.train

    def watched(*given: Any, **how: Any) -> Any:
        found = genuine(*given, **how)
        rows.append([row.theta for row in found])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohort, "train", watched)
        trained(federation)
    beyond = ~bench.active(1)
    for round_rows in rows[-3:]:
        assert (round_rows[1][beyond] == 0).all()
        assert (round_rows[0][beyond] != 0).any()


@pytest.mark.parametrize("method", MIXED)
def test_every_client_evaluates_the_global_model_whatever_its_rank(make_federation: Any, method: str) -> None:
    overrides = ("adapter.ranks=4,1", "federation.private_evaluation=true", "model.head=trained")
    federation = make_federation(f"adapter.method={method}", *NOISELESS, *overrides)
    seen, genuine = [], cohort.confusion_counts

    def watched(backend: Any, dataset: Any, records: Any, theta: Tensor, *rest: Any) -> Tensor:
        seen.append(theta.clone())
        return genuine(backend, dataset, records, theta, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohort, "confusion_counts", watched)
        state, _ = trained(federation)
    assert len(seen) == 3
    assert all(torch.equal(theta, state.theta) for theta in seen)
