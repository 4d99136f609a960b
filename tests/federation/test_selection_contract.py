"""What every way of choosing modules promises, whichever it is: one choice for the whole run, and only that leaves."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedlora
from fedlora.adapters.dam import Selection
from fedlora.adapters.methods.layout import frozen_factor
from fedlora.config import RunConfig
from fedlora.experiments import simulate as module
from fedlora.experiments.simulate import simulate
from fedlora.federation.messages import ClientUpdate, RoundInstruction
from fedlora.privacy.phases import FINETUNE
from fedlora.randomness import PublicSeed

SELECTS = ("all", "random", "probe", "alignment", "warmup", "bilevel", "mask")
SEARCHES = {
    "alignment": ["warmup", "warmup", "alignment"],
    "warmup": ["warmup", "warmup"],
    "bilevel": ["warmup", "warmup", "bilevel"],
}
TEXTS = ["a good film", "the plot was dull but the cast was fine", "it is very long", "bad"]
GIVEN = ["encoder.layer.1.output.dense", "encoder.layer.0.attention.self.key"]


class Silent:
    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None: ...

    def round(self, report: Any) -> None: ...

    def finish(self, record: Any) -> None: ...


@dataclass
class Seen:
    """All that crossed between server and clients, and what was exported in the end."""

    sent: list[RoundInstruction] = field(default_factory=list)
    answered: list[ClientUpdate] = field(default_factory=list)
    workbench: Any = None
    exported: dict[str, Any] = field(default_factory=dict)

    def sizes(self, phase: str) -> set[int]:
        return {update.vector.numel() for update in self.answered if update.phase == phase}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen, exchange, export = Seen(), module.CohortTransport.exchange, module.export_adapter

    def watched(self: Any, instruction: RoundInstruction, clients: tuple[int, ...]) -> Any:
        replies = exchange(self, instruction, clients)
        seen.sent.append(instruction)
        seen.answered += replies  # type: ignore[arg-type]
        seen.workbench = self.workbench
        return replies

    def exporting(folder: Path, **how: Any) -> Any:
        seen.exported = how
        return export(folder, **how)

    monkeypatch.setattr(module.CohortTransport, "exchange", watched)
    monkeypatch.setattr(module, "export_adapter", exporting)
    return seen


QUICK = {("prototype", "type", "6"), ("trained", "none", "inf")}
COMBINATIONS = [
    pytest.param(select, *rest, marks=[] if rest in QUICK else pytest.mark.slow)
    for select in SELECTS
    for rest in itertools.product(("prototype", "trained"), ("none", "type"), ("inf", "6"))
]


@pytest.mark.parametrize(("select", "head", "sharing", "epsilon"), COMBINATIONS)
def test_one_choice_for_everyone_and_only_what_was_chosen_leaves(
    tiny_config: Callable[..., RunConfig],
    tmp_path: Path,
    seen: Seen,
    select: str,
    head: str,
    sharing: str,
    epsilon: str,
) -> None:
    (tmp_path / "given.txt").write_text("\n".join(GIVEN))
    config = tiny_config(
        f"adapter.select={select}", f"model.head={head}", f"adapter.sharing={sharing}", f"privacy.epsilon={epsilon}",
        "federation.rounds=4", "federation.local_steps=1", "adapter.search_rounds=1", "privacy.accountant=rdp",
        "training.learning_rate=0.05", f"run.out='{tmp_path / 'run'}'",
        *([f"adapter.mask='{tmp_path / 'given.txt'}'"] if select == "mask" else []),
    )  # fmt: skip
    folder = simulate(config, Silent())
    record = json.loads((folder / "record.json").read_text())

    masks = {instruction.mask for instruction in seen.sent if instruction.phase == FINETUNE}
    assert len(masks) == 1, "one choice for the whole run"
    (chosen,) = masks
    assert chosen is not None
    searching = [instruction for instruction in seen.sent if instruction.phase != FINETUNE]
    assert {instruction.mask for instruction in searching} <= {None}, "and none before it"
    assert [one.phase for one in searching] == ["prototype"] * (head == "prototype") + SEARCHES.get(select, [])

    candidates = seen.workbench.candidates
    assert (len(candidates), sum(chosen)) == (12, {"all": 12, "mask": 2}.get(select, 6))
    own = {one.module: one.out_features for one, taken in zip(candidates, chosen, strict=True) if taken}
    if select == "mask":
        assert sorted(own) == sorted(GIVEN)
    shared = {
        f"shared/{one.kind}/{one.in_features}x{one.out_features}": one.out_features
        for one, taken in zip(candidates, chosen, strict=True)
        if not taken and sharing == "type"
    }
    of_head = 2 * 16 + 2 if head == "trained" else 0
    assert seen.sizes(FINETUNE) == {4 * sum({**own, **shared}.values()) + of_head}
    whole = 4 * sum(one.out_features for one in candidates) + of_head
    assert seen.sizes("warmup") <= {whole}
    assert seen.sizes("bilevel") <= {whole + 12}
    assert seen.sizes("alignment") <= {12}
    digests = {update.layout_digest for update in seen.answered if update.phase == FINETUNE}
    assert digests == {seen.workbench.layout.digest}
    slots = [f"{name}/B" for name in (*own, *shared)]
    assert [slot.name for slot in seen.workbench.layout.slots if slot.name.endswith("/B")] == slots

    selection = Selection.from_json(record["selection"])
    assert selection.to_json() == record["selection"]
    assert (selection.mask.chosen, selection.method) == (chosen, select)
    for client in record["clients"]:
        assert client["epsilon"] == "inf" if epsilon == "inf" else 0 < client["epsilon"] <= 6
    seen.workbench.adopt(chosen)  # again: a run gives the base model back as it was
    check_export(folder, seen, own, shared)


def check_export(folder: Path, seen: Seen, own: dict[str, int], shared: dict[str, int]) -> None:
    """Plain PEFT sees the chosen modules, and those that share, under the A of the public seed; and the same logits."""
    batch = seen.workbench.classifier.tokenizer(TEXTS, padding=True, return_tensors="pt")
    wanted = seen.workbench.backend.logits(seen.exported["theta"], batch)
    torch.testing.assert_close(fedlora.load(folder).logits(TEXTS), wanted, rtol=0, atol=1e-5)
    places = {path: path for path in own}
    for candidate in seen.workbench.candidates:
        name = f"shared/{candidate.kind}/{candidate.in_features}x{candidate.out_features}"
        if candidate.module not in own and name in shared:
            places[candidate.module] = name
    stored = load_file(next((folder / "adapter").glob("adapter*.safetensors")))
    factors = {name: tensor for name, tensor in stored.items() if ".lora_A." in name}
    assert len(factors) == len(places)
    for path, base in places.items():
        (factor,) = (tensor for name, tensor in factors.items() if f".{path}.lora_A" in name)
        drawn = frozen_factor(PublicSeed.from_int(0), base, 4, factor.shape[1])
        torch.testing.assert_close(factor, drawn, rtol=0, atol=0)
