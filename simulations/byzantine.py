"""What a few hostile sites do to the global model: `python -m simulations.byzantine`.

Trains a short run on the generated corpus with ten sites, of which none, one or two corrupt all they send, the
prototype too, for each rule of `federation.aggregator` and each attack. Round loop, checks and the net against outliers
are those of every run; only the hostile sites' vectors are replaced on their way to the server. Noise and batches are
seeded, so that runs of one seed differ by rule and attack alone. Keeps each run's accuracy and writes the table and the
figure of docs/aggregation.md from those. What is there is not done again, unless the code has changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.config import RunConfig
from fedlora.errors import FedloraError
from fedlora.experiments.simulate import CohortTransport, resolve
from fedlora.federation.evaluator import Evaluator
from fedlora.federation.messages import ClientUpdate, RoundInstruction
from fedlora.federation.server import Reply, RoundReport, Server, Transport, initial_state
from fedlora.federation.shelf import Shelf
from fedlora.federation.sites import load_simulated_data, make_sites
from fedlora.federation.workbench import build_workbench
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.phases import TRAINING
from fedlora.provenance import code_digest
from simulations.page import write_between

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "byzantine"
PAGE = HERE.parent / "docs" / "aggregation.md"
START, END = "<!-- table: python -m simulations.byzantine -->", "<!-- end of table -->"

SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"dtype": "bfloat16", "attention": "eager"},
    "data": {"source": "generated", "generated_records": 2000, "max_length": 32},
    "federation": {"clients": 10, "rounds": 3, "local_steps": 1},
    "training": {"expected_batch_size": 64},
    "privacy": {"epsilon": 6.0, "delta": 1e-4, "prototype_noise_multiplier": 6.0, "seeded_noise": True},
    "engine": {"token_budget": 2048, "compile": "off"},
    "run": {"device": "cpu", "evaluate_every": 3},
}
AGGREGATORS = ("mean", "median", "trimmed_mean", "multi_krum", "norm_bound")
HOSTILE = (3, 7)
"""The hostile sites: the first, or both. `trimmed_mean` and `multi_krum` withstand two of ten by default."""

Attack = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def _random(own: Tensor, _all_moves: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(own.shape, generator=generator)
    sent: Tensor = drawn * (20 * own.norm() / drawn.norm())
    return sent


ATTACKS: Mapping[str, Attack] = {
    "flipped": lambda own, all_moves, generator: -own,
    "flipped × 20": lambda own, all_moves, generator: -20 * own,
    "scaled × 100": lambda own, all_moves, generator: 100 * own,
    "NaN": lambda own, all_moves, generator: torch.full_like(own, torch.nan),
    "random × 20": _random,
    "colluding": lambda own, all_moves, generator: all_moves.mean(dim=0) - 1.5 * all_moves.std(dim=0),
}
"""From what a hostile site would honestly send, a move [P], and what all would, [K, P], to what it does send. The last
is "A Little Is Enough" (Baruch et al. 2019): no coordinate farther off than honest ones are, and all alike."""


@dataclass(frozen=True, order=True)
class Case:
    """One run."""

    attack: str
    """One of ATTACKS, or "none"."""
    hostile: int
    aggregator: str
    seed: int

    def __str__(self) -> str:
        return f"{self.attack}, {self.hostile} hostile, {self.aggregator}, seed {self.seed}"


def cases(seeds: Sequence[int]) -> list[Case]:
    attacked = [("none", 0), *product(ATTACKS, (1, 2))]
    return [Case(*attack, aggregator, seed) for seed in seeds for attack in attacked for aggregator in AGGREGATORS]


@dataclass(frozen=True, kw_only=True)
class HostileTransport:
    """`inner`, but what `hostile` clients send is replaced by what `attack` makes of it."""

    inner: Transport
    hostile: Sequence[int]
    attack: Attack
    generator: torch.Generator

    def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        replies = self.inner.exchange(instruction, clients)
        start = instruction.theta if instruction.phase in TRAINING else torch.zeros(())  # sums start at nothing
        moves = torch.stack([reply.vector - start for reply in replies if isinstance(reply, ClientUpdate)])
        return [
            dataclasses.replace(reply, vector=start + self.attack(reply.vector - start, moves, self.generator))
            if isinstance(reply, ClientUpdate) and reply.client in self.hostile
            else reply
            for reply in replies
        ]


class Federation:
    """What the runs of one seed share: records, base model and adapters."""

    def __init__(self, seed: int) -> None:
        self._config = resolve(RunConfig.from_mapping(SETTINGS, [f"run.seed={seed}"]))
        shelf = Shelf()
        self._data = load_simulated_data(self._config, shelf)
        self._workbench = build_workbench(self._config, shelf)
        self._dataset = shelf.encoded(self._config, "train", self._workbench.classifier)
        self._evaluator = Evaluator(self._workbench, shelf)

    def accuracy(self, case: Case) -> float | None:
        """Of the global model after the last round; None where the run ended before."""
        config = self._config.with_overrides(f"federation.aggregator={case.aggregator}")
        workbench = dataclasses.replace(self._workbench, config=config)
        inner: Transport = CohortTransport(
            workbench=workbench,
            dataset=self._dataset,
            sites=make_sites(config, self._data, workbench.schedule),
            ledger=Ledger.in_memory(),
        )
        if case.hostile:
            inner = HostileTransport(
                inner=inner,
                hostile=HOSTILE[: case.hostile],
                attack=ATTACKS[case.attack],
                generator=torch.Generator().manual_seed(case.seed),
            )
        reports: list[RoundReport] = []
        server = Server(
            workbench=workbench,
            transport=inner,
            evaluate=self._evaluator,
            on_round=lambda report, _state: reports.append(report),
        )
        try:
            server.run(initial_state(workbench, "byzantine"))
        except FedloraError as error:
            print(f"{case}: {error}")
            return None
        return reports[-1].metric


def read() -> dict[Case, float | None]:
    """Accuracies that this code has found."""
    file = RESULTS / "accuracy.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("code_digest") != code_digest() or kept.get("settings") != SETTINGS:
        return {}
    return {Case(**{k: v for k, v in line.items() if k != "accuracy"}): line["accuracy"] for line in kept["runs"]}


def write(found: Mapping[Case, float | None]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    runs = [{**dataclasses.asdict(case), "accuracy": value} for case, value in found.items()]
    lines = ",\n  ".join(json.dumps(run, ensure_ascii=False) for run in runs)
    head = f'{{\n"code_digest": "{code_digest()}",\n"settings": {json.dumps(SETTINGS)},\n"runs": [\n  '
    (RESULTS / "accuracy.json").write_text(f"{head}{lines}\n]\n}}\n", encoding="utf-8")


def mean_accuracy(found: Mapping[Case, float | None], attack: str, hostile: int, aggregator: str) -> float | None:
    """Over seeds; None where a run ended before its last round or was not done."""
    asked = attack, hostile, aggregator
    values = [value for case, value in found.items() if (case.attack, case.hostile, case.aggregator) == asked]
    whole = [value for value in values if value is not None]
    return statistics.mean(whole) if whole and len(whole) == len(values) else None


def table(found: Mapping[Case, float | None]) -> str:
    """Markdown: a row for each attack and number of hostile sites, a column for each rule."""
    lines = [f"| attack | hostile | {' | '.join(AGGREGATORS)} |", f"|---|---|{'---|' * len(AGGREGATORS)}"]
    for attack, hostile in [("none", 0), *product(ATTACKS, (1, 2))]:
        values = [mean_accuracy(found, attack, hostile, aggregator) for aggregator in AGGREGATORS]
        shown = " | ".join("–" if value is None else f"{value:.3f}" for value in values)
        lines.append(f"| {attack} | {hostile} | {shown} |")
    return "\n".join(lines)


def plot(found: Mapping[Case, float | None], path: Path) -> None:
    """A panel for one hostile site and one for two: accuracy by attack, a colour for each rule."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, figsize=(8, 5), dpi=120, sharex=True, sharey=True, layout="constrained")
    apart = 0.6 / len(AGGREGATORS)
    for axes, hostile in zip(panels, (1, 2), strict=True):
        for position, aggregator in enumerate(AGGREGATORS):
            values = [mean_accuracy(found, attack, hostile, aggregator) or math.nan for attack in ATTACKS]
            places = [index + (position - 2) * apart for index in range(len(ATTACKS))]
            axes.plot(places, values, "o", markersize=5, label=aggregator)
        honest = mean_accuracy(found, "none", 0, "mean") or math.nan
        axes.axhline(honest, color="#444444", linewidth=0.8, linestyle="--")
        axes.set_title(f"{hostile} of 10 sites hostile (dashed: none, mean)", fontsize=9, loc="left")
        axes.set_ylabel("accuracy")
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].set_xticks(range(len(ATTACKS)), list(ATTACKS))
    panels[0].legend(ncols=len(AGGREGATORS), fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.1), frameon=False)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    chosen = parser.parse_args()
    found = read()
    for seed in chosen.seeds:
        missing = [case for case in cases([seed]) if case not in found]
        if not missing:
            continue
        federation = Federation(seed)
        for case in missing:
            found[case] = federation.accuracy(case)
            print(f"{case}: {found[case]}", flush=True)
            write(found)
    plot(found, RESULTS / "accuracy.png")
    write_between(PAGE, START, END, table(found))
    print(table(found))


if __name__ == "__main__":
    main()
