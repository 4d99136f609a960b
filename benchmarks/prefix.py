"""python -m benchmarks.prefix: a private step of FFA-LoRA on MiniLM-L6 where lower blocks are not adapted.

What these blocks make of a record is the same at every step: computed anew, or kept (`fedlora.engine.prefix`). First
both have to give the same clipped sums to the last bit. Then the lowest adapted block at 0, 1/2 and 5/6 of the model's
depth, with states and without, take turns in random order in one process; figures are ratios inside one turn.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.machine import describe_machine, load_average
from benchmarks.report import RESULTS, command, conditions, save, table
from benchmarks.spread import Spread, ratios, take_turns
from fedlora.config import RunConfig, TrainingConfig
from fedlora.data.encode import EncodedDataset, encode
from fedlora.data.glue import load_records
from fedlora.engine.prefix import Prefix, PrefixedDataset, Room
from fedlora.engine.sums import clipped_sums
from fedlora.engine.training import TrainingJob, train
from fedlora.federation.workbench import Workbench, build_workbench
from fedlora.models.families import blocks_below
from fedlora.privacy.clipping import Clipping
from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.noise import make_noise_source
from fedlora.privacy.phases import FINETUNE
from fedlora.privacy.plan import PhasePlan
from fedlora.privacy.sampling import PoissonSampler
from fedlora.randomness import PublicSeed

PLANS = {
    "the machine's plan": {},
    "float32 sdpa": {"dtype": "float32", "attention": "sdpa"},
}
LOWEST = (0, 1 / 2, 5 / 6)  # of the depth
ANEW, MEMORY, DISK = "computed anew", "kept in memory", "kept on disk"
ROOMS = {MEMORY: Room(accelerator=2**34, memory=2**34), DISK: Room(memory=0, disk=2**34)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model adapted from one block upwards."""

    bench: Workbench
    blocks: int
    expected: int
    """Records in a step."""
    noise: Literal["host", "device"]

    def dataset(self, plain: EncodedDataset, way: str) -> EncodedDataset:
        """`plain`, with the states of all its records where `way` keeps them.

        Raises:
            SystemExit: they are not kept, or change a gradient.
        """
        if way == ANEW:
            return plain
        bench = self.bench
        prefix = Prefix(
            classifier=bench.classifier,
            blocks=self.blocks,
            shapes=bench.shapes,
            clients=1,
            expected=self.expected,
            device=bench.execution.device,
        )
        if not prefix.changes_nothing(bench.backend, plain.longest):
            raise SystemExit(f"kept states of {self.blocks} blocks change a gradient on this machine")
        found = prefix.keep(plain, np.arange(len(plain)), ROOMS[way])
        if not isinstance(found, PrefixedDataset):
            raise SystemExit(f"states of {self.blocks} blocks find no room: {way}")
        return found

    def sums(self, dataset: EncodedDataset) -> torch.Tensor:
        """Clipped sums [1, P] of the first records, away from B = 0."""
        bench, members = self.bench, np.arange(self.expected)
        theta = torch.randn(1, bench.layout.size, generator=torch.Generator().manual_seed(0))
        rows, phase = theta.to(bench.execution.device), _phase(1.0)
        return clipped_sums(
            bench.backend, dataset, [members], rows, phase, shapes=bench.shapes, expected=self.expected
        ).cpu()

    def step(self, dataset: EncodedDataset) -> Callable[[], float]:
        """Seconds of one logical step over a new Poisson draw."""
        bench, device = self.bench, self.bench.execution.device
        seed = PublicSeed.from_int(0)  # a benchmark protects nobody
        job = TrainingJob(
            records=np.arange(len(dataset)),
            phase=_phase(self.expected / len(dataset)),
            sampling=seed.numpy("sampling"),
            noise=make_noise_source(self.noise, seed.numpy("noise"), device),
        )
        training = TrainingConfig(optimizer="sgd", expected_batch_size=self.expected)

        def run() -> float:
            return _seconds(
                device,
                lambda: train(
                    bench.backend,
                    dataset,
                    [job],
                    bench.initial_theta,
                    num_steps=1,
                    learning_rate=0.1,
                    training=training,
                    shapes=bench.shapes,
                ),
            )

        return run


def main() -> None:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = {"command": command("benchmarks.prefix")} | describe_machine()
    started = time.perf_counter()
    plans = {name: _measure(plan, options) for name, plan in PLANS.items()}
    machine["load_average_after"] = load_average()
    facts: dict[str, Any] = {
        "machine": machine,
        "records": options.records,
        "expected_batch_size": options.batch,
        "plans": plans,
        "seconds": round(time.perf_counter() - started),
    }
    markdown = _markdown(facts)
    print(markdown)
    save(options.out, "prefix", facts, markdown)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix", description="A step with states kept.")
    parser.add_argument("--records", type=int, default=2000, help="of the generated corpus, all kept")
    parser.add_argument("--batch", type=int, default=128, help="expected records of a step")
    parser.add_argument("--repeats", type=int, default=9, help="turns")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def _measure(plan: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one execution."""
    tables = {"model": {"head": "frozen", **plan}, "run": {"device": options.device}}
    benches = [build_workbench(RunConfig.from_mapping(tables)) for _ in LOWEST]
    noise: Literal["host", "device"] = "device" if benches[0].execution.device.type == "cuda" else "host"
    cases = {}
    for bench, share in zip(benches, LOWEST, strict=True):
        lowest = round(share * bench.classifier.network.config.num_hidden_layers)
        bench.adopt(tuple(candidate.layer >= lowest for candidate in bench.candidates))
        below = blocks_below([path for paths in bench.places.values() for path in paths], bench.classifier.family)
        cases[below] = Case(bench=bench, blocks=below, expected=options.batch, noise=noise)
    plain = _records(benches[0], options.records)
    tasks, fills, kept_bytes = {}, {}, {}
    for below, case in cases.items():
        wanted = case.sums(plain)
        for way in (ANEW, MEMORY, DISK) if below else (ANEW,):
            start = time.perf_counter()
            dataset = case.dataset(plain, way)
            if isinstance(dataset, PrefixedDataset):
                fills[_name(below, way)] = time.perf_counter() - start
                kept_bytes[below] = dataset.states.nbytes
            if not torch.equal(case.sums(dataset), wanted):
                raise SystemExit(f"{way}: the clipped sums are others with {below} blocks left out")
            tasks[_name(below, way)] = case.step(dataset)
    order = random.Random(options.seed)
    take_turns(tasks, 1, order)
    times = take_turns(tasks, options.repeats, order)
    print(f"{benches[0].execution.describe()}: {options.repeats} turns")
    rows = [
        _row(below, way, times, fills, options)
        for below in cases
        for way in (ANEW, MEMORY, DISK)
        if _name(below, way) in times
    ]
    return {"execution": benches[0].execution.describe(), "kept_bytes": kept_bytes, "rows": rows}


def _row(
    below: int, way: str, times: dict[str, list[float]], fills: dict[str, float], options: argparse.Namespace
) -> dict[str, Any]:
    name, anew = _name(below, way), times[_name(below, ANEW)]
    to_anew = ratios(times[name], anew)
    row = {
        "blocks_left_out": below,
        "way": way,
        "seconds": Spread.of(times[name]).to_json(),
        "to_anew": to_anew.to_json(),
        "to_all_adapted": ratios(times[name], times[_name(0, ANEW)]).to_json(),
        "shown": [str(to_anew), str(ratios(times[name], times[_name(0, ANEW)]))],
    }
    if way != ANEW:
        saved = Spread.of(one - other for one, other in zip(anew, times[name], strict=True)).median / options.batch
        row["fill_seconds"] = round(fills[name], 3)
        row["even_after_visits"] = round(fills[name] / options.records / saved, 2) if saved > 0 else None
    return row


def _name(below: int, way: str) -> str:
    return f"{below} blocks below, {way}"


def _records(bench: Workbench, count: int) -> EncodedDataset:
    corpus = load_records("sst2", "generated", "train", generated_records=count, seed=PublicSeed.from_int(0))
    return encode(corpus, bench.classifier.tokenizer, 128)


def _phase(probability: float) -> PhasePlan:
    return PhasePlan(
        name=FINETUNE,
        sampler=PoissonSampler(probability),
        clipping=Clipping("flat", 1.0),
        mechanism=GaussianMechanism(1.0),
        num_steps=1,
    )


def _seconds(device: torch.device, task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _markdown(facts: dict[str, Any]) -> str:
    parts = ["# A step whose lower blocks are not adapted", conditions(facts["machine"])]
    parts.append(
        f"MiniLM-L6, LoRA r = 8 on query and value from some block upwards, {facts['records']} records of the "
        f"generated corpus, {facts['expected_batch_size']} expected in a step. Ratios of wall time inside one turn, "
        "smallest / **median** / largest; below 1 is faster. Checked first: clipped sums are the same to the last "
        'bit. "Even after": visits of each record after which filling is paid for.'
    )
    for name, plan in facts["plans"].items():
        execution = plan["execution"]
        parts.append(f"## {name}: {execution['dtype']} {execution['attention']} on {execution['device']}")
        rows = [
            [
                f"{row['blocks_left_out']} blocks below, {row['way']}",
                f"{row['seconds']['median']:.3f} s",
                *row["shown"],
                f"{row['fill_seconds']:.2f} s" if "fill_seconds" in row else "",
                row.get("even_after_visits") or "",
            ]
            for row in plan["rows"]
        ]
        parts.append(table(["", "a step takes", "to computed anew", "to all adapted", "filling", "even after"], rows))
        sizes = ", ".join(f"{size / 1e6:.0f} MB" for size in plan["kept_bytes"].values())
        parts.append(f"Kept states: {sizes}.")
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
