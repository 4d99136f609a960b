"""python -m benchmarks.cohort: K clients fused in one call of the engine on MiniLM-L6.

Against one centralised batch of the same samples (one client with an expected batch of K·b), and against the same
clients one after another, each in a call of its own. All three are `fedlora.engine.training.train` with noise. Checked
first: without noise they end at the same place. Aims: at least 0.95 of the centralised throughput; 16 and 64 clients
at least twice as fast as one after another at 8x16 on a CPU, ten times at 8x32 on a GPU.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.batches import parse_shape
from benchmarks.fused import APART, CENTRALISED, WAYS, Engine, Noise, Work, agreement, contest
from benchmarks.machine import describe_machine, load_average
from benchmarks.report import RESULTS, command, conditions, save, table
from fedlora.config import RunConfig
from fedlora.federation.workbench import Workbench, build_workbench

PLANS: dict[str, dict[str, str]] = {
    "the machine's plan": {},
    "float32 sdpa": {"dtype": "float32", "attention": "sdpa"},
}
THROUGHPUT = 0.95
SPEED_UPS = {("cpu", "8x16"): 2.0, ("cuda", "8x32"): 10.0}
"""Times as fast as one after another, by device and shape, for all cohorts of at least FUSION_PAYS clients."""
FUSION_PAYS = 16
DISAGREEMENT = {"float32": 1e-4, "bfloat16": 3e-2}  # rounding, which depends on the shape of a micro-batch


def main() -> None:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    machine, started = {"command": command("benchmarks.cohort")} | describe_machine(), time.perf_counter()
    benches = {name: _bench(options.model, options.device, plan) for name, plan in PLANS.items()}
    plans = {name: bench.execution.describe() for name, bench in benches.items()}
    engines = {name: _engine(bench, options.noise) for name, bench in benches.items()}
    device = next(iter(engines.values())).device.type
    shapes = [parse_shape(shape) for shape in options.shapes]
    probe = Work(clients=min(4, max(options.clients)), records=shapes[0][0], tokens=shapes[0][1], steps=1)
    found = {name: agreement(engine, probe) for name, engine in engines.items()}
    print("the three ways end at the same place:", found)
    for name, distance in found.items():
        if distance > (most := DISAGREEMENT[str(plans[name]["dtype"])]):
            raise SystemExit(f"{name}: the three ways end {distance:.0e} of a step apart, wanted at most {most:.0e}")
    rows = []
    for records, tokens in shapes:
        for clients in options.clients:
            work = Work(clients=clients, records=records, tokens=tokens, steps=options.steps)
            measured = contest(engines, work, options.repeats, random.Random(options.seed))
            rows += [{"plan": name, **facts} for name, facts in measured.items()]
    machine["load_average_after"] = load_average()
    facts: dict[str, Any] = {
        "machine": machine,
        "model": options.model,
        "plans": plans,
        "steps": options.steps,
        "agreement": found,
        "rows": rows,
        "missed": missed(rows, device),
        "not_measured": not_measured(rows, device),
        "seconds": round(time.perf_counter() - started),
    }
    markdown = _markdown(facts)
    print(markdown)
    save(options.out, "cohort", facts, markdown)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cohort", description="K clients at once.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--shapes", nargs="+", default=["8x16", "8x32"], metavar="bxT", help="records x tokens")
    parser.add_argument("--steps", type=int, default=2, help="private steps in a call")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--model", default=RunConfig().model.name)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--noise", choices=["host", "device"], help="default: the device's own where it has one")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def _bench(model: str, device: str, plan: Mapping[str, str]) -> Workbench:
    return build_workbench(
        RunConfig.from_mapping({"model": {"name": model, "head": "frozen", **plan}, "run": {"device": device}})
    )


def _engine(bench: Workbench, noise: Noise | None) -> Engine:
    own = bench.execution.device.type == "cuda"
    return Engine(
        backend=bench.backend,
        theta=bench.initial_theta,
        shapes=bench.shapes,
        vocabulary=len(bench.classifier.tokenizer),
        noise=noise or ("device" if own else "host"),
    )


def missed(rows: Sequence[Mapping[str, Any]], device: str) -> list[str]:
    """Every aim that the median ratio does not meet."""
    lines = []
    for row in rows:
        name = f"{row['clients']} clients, {row['shape']}, {row['plan']}"
        throughput, speed_up = row["throughput_to_one_batch"]["median"], row["times_as_fast_as_apart"]["median"]
        if row["clients"] > 1 and throughput < THROUGHPUT:
            lines.append(f"{name}: {throughput:.2f} of the throughput of one batch, wanted {THROUGHPUT}")
        aim = SPEED_UPS.get((device, row["shape"]), 0.0) if row["clients"] >= FUSION_PAYS else 0.0
        if speed_up < aim:
            lines.append(f"{name}: {speed_up:.1f} times as fast as one after another, wanted {aim:g}")
    return lines


def not_measured(rows: Sequence[Mapping[str, Any]], device: str) -> list[str]:
    """Aims that this machine or these options say nothing about."""
    seen = {(device, row["shape"]) for row in rows if row["clients"] >= FUSION_PAYS}
    return [
        f"at least {aim:g} times as fast as one after another at {shape} on {kind}"
        for (kind, shape), aim in SPEED_UPS.items()
        if (kind, shape) not in seen
    ]


def _markdown(facts: dict[str, Any]) -> str:
    plans = "; ".join(
        f"*{name}*: {plan['dtype']} {plan['attention']} on {plan['device']}" for name, plan in facts["plans"].items()
    )
    parts = [
        "# K clients at once",
        conditions(facts["machine"]),
        f"{facts['model']}, LoRA r = 8 on query and value with A frozen, SGD; a client has as many records as a shape "
        f"says and takes all of them in each of {facts['steps']} steps of a call, with Gaussian noise. {plans}. Ratios "
        "inside one turn, smallest / **median** / largest. Checked first: without noise all three ways end at the same "
        f"place (largest distance {max(facts['agreement'].values()):.0e} of the way).",
    ]
    for plan in facts["plans"]:
        header = ["records x tokens", "clients", f"throughput to {CENTRALISED}", f"times as fast as {APART}"]
        header += ["samples/s: " + " / ".join(WAYS), "padded tokens a step"]
        rows = [
            [
                row["shape"],
                row["clients"],
                *row["shown"],
                " / ".join(f"{row['ways'][way]['samples_per_second']:.0f}" for way in WAYS),
                " / ".join(f"{row['ways'][way]['padded_tokens']}" for way in WAYS),
            ]
            for row in facts["rows"]
            if row["plan"] == plan
        ]
        parts += [f"## {plan[0].upper()}{plan[1:]}", table(header, rows)]
    parts += ["## Aims missed by the median", "\n".join(f"* {line}" for line in facts["missed"]) or "none"]
    if facts["not_measured"]:
        parts += ["## Not measured yet", "\n".join(f"* {line}" for line in facts["not_measured"])]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
