"""python -m benchmarks.accelerator: private steps on a GPU, on models of random weights in bfloat16.

A step: RoBERTa-large's shape, 200 records of 128 tokens, LoRA r = 8 on query and value with A frozen. fedlora's whole
private step (`engine.training.train`) against plain PEFT without privacy, each as it is and with the model compiled,
and against the floor: what the step's matrix products take. K clients: 16 and 64 fused against one after another, 8
records of 32 tokens each. Aims: the compiled private step within 1.25 of a floor of 53 ms (an H100), at most 1.02 of
the step without privacy; fused clients at least ten times as fast.

Needs torch, transformers and PEFT; neither Opacus nor Flower nor dp-accounting. Without a GPU it says so and measures
nothing; --tiny runs the same code on a tiny model, anywhere.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.contenders import Base, Execution, PlainPeft, Settings
from benchmarks.fused import APART, CENTRALISED, Engine, Work, contest, run, settle, uniform_records
from benchmarks.machine import describe_machine, load_average
from benchmarks.operations import count_operations
from benchmarks.random_models import SHAPES, random_base
from benchmarks.report import RESULTS, command, conditions, save, table
from benchmarks.spread import Spread, ratios, take_turns
from fedlora.data.encode import EncodedDataset
from fedlora.engine.batching import Shapes
from fedlora.engine.company import Company
from fedlora.engine.execution import BUDGETS, DTYPES
from fedlora.engine.expanded import ExpandedBackend

EXECUTION = Execution("bfloat16", "sdpa")
PEFT, PEFT_COMPILED = "PEFT without privacy", "PEFT without privacy, compiled"
OURS, OURS_COMPILED, OURS_PARTS = "fedlora", "fedlora, compiled", "fedlora, default micro-batches"
BASELINES = {OURS: PEFT, OURS_PARTS: PEFT, OURS_COMPILED: PEFT_COMPILED}
FLOOR, WITHIN, TO_PLAIN, SPEED_UP = 0.053, 1.25, 1.02, 10.0
"""Seconds of matrix work of a step on an H100 at the rate that large products reach in practice; and the aims."""
FULL = {"model": "RoBERTa-large", "records": 200, "tokens": 128, "clients": [16, 64], "share": "8x32", "matrix": 8192}
TINY = {"model": "tiny", "records": 5, "tokens": 16, "clients": [2, 3], "share": "2x8", "matrix": 64}
PRODUCTS = 20


def main() -> None:
    options = _options()
    if not (torch.cuda.is_available() or options.tiny):
        print("no accelerator here; not measured")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size: dict[str, Any] = TINY if options.tiny else FULL
    machine, started = {"command": command("benchmarks.accelerator")} | describe_machine(), time.perf_counter()
    facts: dict[str, Any] = {"machine": machine, "tiny": options.tiny, "execution": str(EXECUTION), "size": size}
    for measure in (_measure_step, _measure_clients):
        facts |= measure(options, size, device)
        machine["load_average_after"], facts["seconds"] = load_average(), round(time.perf_counter() - started)
        facts["missed"] = [] if options.tiny else missed(facts)
        markdown = _markdown(facts)
        if not options.tiny or options.out != RESULTS:  # after each part: a lent machine may be gone before the next
            save(options.out, "accelerator", facts, markdown)
    print(markdown)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description="Private steps on a GPU.")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--steps", type=int, default=2, help="private steps in a call")
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU too; kept only with --out")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def _measure_step(options: argparse.Namespace, size: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    work = Work(clients=1, records=size["records"], tokens=size["tokens"], steps=options.steps)
    vocabulary = int(SHAPES[size["model"]]["vocab_size"])
    dataset = uniform_records(work.records, work.tokens, vocabulary)
    whole = Shapes(token_budget=(work.records + 1) * work.tokens)
    base = partial(random_base, size["model"], EXECUTION, device)
    engines = {
        OURS: _engine(base(), whole, vocabulary),
        OURS_PARTS: _engine(base(), Shapes(token_budget=BUDGETS["cuda"][0]), vocabulary),
        OURS_COMPILED: _engine(base(), whole, vocabulary, options.compiler),
    }
    plain = _plain(base(), work, dataset)
    seconds: dict[str, Callable[[], float]] = {
        PEFT: partial(_timed, plain, device),
        PEFT_COMPILED: partial(_timed, _plain(base(), work, dataset, options.compiler), device),
        **{way: partial(_ours, engine, work, dataset) for way, engine in engines.items()},
    }
    order = random.Random(options.seed)
    take_turns(seconds, 1, order)
    times = {way: [s / work.steps for s in found] for way, found in take_turns(seconds, options.repeats, order).items()}
    matrix_work = count_operations(plain)["flops"] // work.steps
    rate = _matrix_rate(size["matrix"], device)
    return {
        "step": {
            "flops": matrix_work,
            "matrix_rate": rate,
            "floor_seconds": matrix_work / rate,
            "apart": {way: _apart(engine, work) for way, engine in engines.items()},
            "ways": {
                way: _step_facts(times[way], times[BASELINES.get(way, way)], _peak(task, device))
                for way, task in seconds.items()
            },
        }
    }


def _plain(base: Base, work: Work, dataset: EncodedDataset, compiler: str | None = None) -> Callable[[], None]:
    """`work.steps` steps of PEFT on the whole batch, which lies on the device already."""
    taker = PlainPeft(base, Settings())
    if compiler:
        _compile(taker.model, compiler)
    batch, labels = dataset.batch(np.arange(work.records), base.classifier.device)
    batch["attention_mask"][-1, -1] = 0  # as in any real batch: a mask that masks nothing takes another kernel

    def task() -> None:
        for _ in range(work.steps):
            taker.step(batch, labels)

    return task


def _engine(base: Base, shapes: Shapes, vocabulary: int, compiler: str | None = None) -> Engine:
    device = base.classifier.device
    backend = ExpandedBackend(base.classifier, base.layout, base.factors, base.places)
    if compiler:
        _compile(base.classifier.network, compiler)
    noise, theta = ("device" if device.type == "cuda" else "host"), base.theta.to(device)
    return Engine(backend=backend, theta=theta, shapes=shapes, vocabulary=vocabulary, noise=noise)  # type: ignore[arg-type]


def _compile(network: nn.Module, compiler: str) -> None:
    network.compile(backend=compiler, dynamic=False)


def _ours(engine: Engine, work: Work, dataset: EncodedDataset) -> float:
    return run(engine, work, dataset, CENTRALISED)[0]


def _timed(task: Callable[[], None], device: torch.device) -> float:
    settle(device)
    start = time.perf_counter()
    task()
    settle(device)
    return time.perf_counter() - start


def _company(engine: Engine) -> Company:
    return Company(backend=engine.backend, vocabulary=engine.vocabulary, num_labels=2, device=engine.device)


def _apart(engine: Engine, work: Work) -> bool:
    """Whether, in micro-batches as they were timed, no record has influence on another's gradient."""
    rows = engine.shapes.row_counts(work.tokens, 1, work.records)[-1]
    return bool(_company(engine).agreeing_rows(work.tokens, (rows,), clients=1))


def _matrix_rate(size: int, device: torch.device) -> float:
    """Operations per second of a large matrix product: the best of three times PRODUCTS in a row, after one."""
    left, right = (torch.randn(size, size, device=device).to(DTYPES[EXECUTION.dtype]) for _ in range(2))

    def products() -> None:
        for _ in range(PRODUCTS):
            left @ right

    return 2 * size**3 * PRODUCTS / min([_timed(products, device) for _ in range(4)][1:])


def _peak(task: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call needs on the device beyond what is there before it."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    task()
    return torch.cuda.max_memory_allocated(device) - before


def _step_facts(seconds: list[float], plain: list[float], peak: int | None) -> dict[str, Any]:
    to_plain = ratios(seconds, plain)
    spread = Spread.of(seconds)
    return {
        "milliseconds": [round(1e3 * value, 3) for value in (spread.low, spread.median, spread.high)],
        "to_plain": to_plain.to_json(),
        "shown": str(to_plain),
        "peak_bytes": peak,
    }


def _measure_clients(options: argparse.Namespace, size: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    records, tokens = (int(part) for part in size["share"].split("x"))
    engines = {}
    for shape in dict.fromkeys([size["model"], "tiny" if options.tiny else "MiniLM-L6"]):
        base, vocabulary = random_base(shape, EXECUTION, device), int(SHAPES[shape]["vocab_size"])
        engine = _engine(base, Shapes(token_budget=BUDGETS["cuda"][0]), vocabulary)
        shapes = Shapes(token_budget=BUDGETS["cuda"][0], agreeing=_company(engine).agreeing_rows)  # as in a real run
        engines[shape] = Engine(
            backend=engine.backend, theta=engine.theta, shapes=shapes, vocabulary=vocabulary, noise=engine.noise
        )
    rows = []
    for clients in size["clients"]:
        work = Work(clients=clients, records=records, tokens=tokens, steps=options.steps)
        measured = contest(engines, work, options.repeats, random.Random(options.seed))
        rows += [{"model": name, **row} for name, row in measured.items()]
    return {"clients": rows}


def missed(facts: Mapping[str, Any]) -> list[str]:
    """Every aim that the median does not meet."""
    step, lines = facts["step"], []
    for way in (OURS, OURS_COMPILED):
        ratio = step["ways"][way]["to_plain"]["median"]
        if ratio > TO_PLAIN:
            lines.append(f"{way}: {ratio:.3f} of {BASELINES[way]}, wanted at most {TO_PLAIN}")
    to_floor = step["ways"][OURS_COMPILED]["milliseconds"][1] / 1e3 / FLOOR
    if to_floor > WITHIN:
        lines.append(f"{OURS_COMPILED}: {to_floor:.2f} times {FLOOR * 1e3:g} ms, wanted at most {WITHIN}")
    lines += [f"{way}: one record's gradient depends on others: no run may use it" for way in _together(step)]
    for row in facts.get("clients", ()):
        speed_up = row["times_as_fast_as_apart"]["median"]
        if speed_up < SPEED_UP:
            name = f"{row['clients']} clients, {row['shape']}, {row['model']}"
            lines.append(f"{name}: {speed_up:.1f} times as fast as one after another, wanted {SPEED_UP:g}")
    return lines


def _together(step: Mapping[str, Any]) -> list[str]:
    return [way for way, apart in step["apart"].items() if not apart]


def _markdown(facts: Mapping[str, Any]) -> str:
    size, step = facts["size"], facts["step"]
    floor = step["floor_seconds"] * 1e3
    rows = [
        [
            way,
            "{:.1f} / **{:.1f}** / {:.1f}".format(*found["milliseconds"]),
            found["shown"],
            f"{found['milliseconds'][1] / floor:.2f}",
            f"{found['peak_bytes'] / 1e6:.0f} MB" if found["peak_bytes"] is not None else "not measured",
        ]
        for way, found in step["ways"].items()
    ]
    parts = [
        "# On an accelerator",
        conditions(facts["machine"]),
        f"Random weights, {facts['execution']}, LoRA r = 8 on query and value with A frozen, SGD. Smallest / "
        "**median** / largest; ratios inside one turn. fedlora's step is a whole one, from records to changed B, with "
        "noise; PEFT's batch lies on the device already.",
        f"## One step: {size['model']}, {size['records']} records of {size['tokens']} tokens",
        table(["", "ms a step", "to PEFT in the same way", "median to the floor", "extra peak memory"], rows),
        f"Floor: {step['flops'] / 1e12:.2f} TFLOP of matrix products at {step['matrix_rate'] / 1e12:.0f} TFLOP/s, what "
        f"a product of {size['matrix']:,} squared reaches here, are {floor:.1f} ms. The aim counts from "
        f"{FLOOR * 1e3:g} ms.",
        f"A record's gradient depends on others of its micro-batch in: {', '.join(_together(step)) or 'no way'}.",
    ]
    if "clients" in facts:
        header = ["model", "records x tokens", "clients", f"throughput to {CENTRALISED}", f"times as fast as {APART}"]
        clients = [[row["model"], row["shape"], row["clients"], *row["shown"]] for row in facts["clients"]]
        parts += ["## K clients at once", table(header, clients)]
    aims = "\n".join(f"* {line}" for line in facts["missed"]) or "none"
    parts += ["## Aims missed by the median", "a tiny model has none" if facts["tiny"] else aims]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
