"""python -m benchmarks.step: one private step of FFA-LoRA on MiniLM-L6 against what else could take it.

First every contender has to make the same clipped sum. Then all take turns, in random order in one process, on the
same padded batches; figures are ratios inside one turn. Aims: a private fedlora step costs at most 0.95 of a
non-private PEFT step of the same dtype and attention and takes no more memory; Opacus takes 1.1 times as long by hooks
and 1.5 times by ghost clipping, and 2 and 3 times beside fedlora's default on a CPU with AMX.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.agreement import check_agreement
from benchmarks.batches import padded_batch, parse_shape
from benchmarks.contenders import CONTENDERS, Base, Contender, Execution, Settings
from benchmarks.machine import describe_machine, load_average
from benchmarks.memory import step_memory
from benchmarks.operations import count_operations
from benchmarks.ragged import ragged_job
from benchmarks.report import RESULTS, command, conditions, save, table
from benchmarks.spread import Spread, ratios, take_turns

USUAL, EAGER, HALF = Execution("float32", "sdpa"), Execution("float32", "eager"), Execution("bfloat16", "eager")
LINE_UP = {
    USUAL: ["peft", "fedlora", "opacus_hooks", "opacus_ghost"],
    EAGER: ["peft", "fedlora"],
    HALF: ["peft", "fedlora", "opacus_hooks", "opacus_ghost"],
}
AIMS = {"peft": 0.95, "opacus_hooks": 1 / 1.1, "opacus_ghost": 1 / 1.5}
"""Largest share of another's time, in the same dtype and attention."""
DEFAULT_AIMS = {"opacus_hooks": 1 / 2, "opacus_ghost": 1 / 3}
"""The same of a CPU with AMX as fedlora uses it by default, to what one would write: float32, sdpa."""
MEMORY_AIM = 1.03
SHAPES = ["16x16", "128x16", "32x64", "32x128", "128x64"]
COUNTED, WEIGHED = (32, 64), (32, 128)  # shapes at which operations and memory are taken
FULL_WORK = 2048  # padded tokens; smaller batches take more turns, up to three times as many


@dataclass(frozen=True)
class Entry:
    """A contender under an execution."""

    name: str
    execution: Execution

    def __str__(self) -> str:
        return f"{self.name}, {self.execution}"


Times = dict[Entry, list[float]]


def main() -> None:
    options = _options()
    warnings.simplefilter("ignore")  # Opacus warns of its own hooks at every step
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = {"command": command("benchmarks.step")} | describe_machine()
    started = time.perf_counter()
    facts: dict[str, Any] = {"machine": machine, "agreement": check_agreement()}
    print("all contenders take the same clipped step:", facts["agreement"])
    line_up = [Entry(name, execution) for execution, names in LINE_UP.items() for name in names]
    contenders = {entry: CONTENDERS[entry.name](Base.load(entry.execution), Settings()) for entry in line_up}
    measured = {
        shape: _time(contenders, *parse_shape(shape), options.repeats, random.Random(options.seed))
        for shape in options.shapes
    }
    facts["shapes"] = {shape: _shape_facts(shape, times) for shape, times in measured.items()}
    facts["operations"] = {
        str(entry): count_operations(_bound(contender, *COUNTED)) for entry, contender in contenders.items()
    }
    del contenders
    facts["ragged"] = ragged_job(options.ragged_repeats, random.Random(options.seed)) if options.ragged_repeats else {}
    facts["extra_memory"] = {
        str(entry): step_memory(entry.name, entry.execution.dtype, entry.execution.attention, *WEIGHED)
        for entry in (line_up if options.memory else [])
    }
    facts["missed"] = _missed(measured, facts["extra_memory"])
    machine["load_average_after"], facts["seconds"] = load_average(), round(time.perf_counter() - started)
    markdown = _markdown(facts, measured)
    print(markdown)
    save(options.out, "step", facts, markdown)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description="One private step against others.")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxT", help="records x tokens")
    parser.add_argument("--repeats", type=int, default=9, help="turns at large shapes; up to three times more at small")
    parser.add_argument("--ragged-repeats", type=int, default=5, help="turns of the ragged batch; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="no fresh process per contender")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def _bound(contender: Contender, records: int, tokens: int) -> Callable[[], None]:
    batch, labels = padded_batch(records, tokens)
    return lambda: contender.step(batch, labels)


def _time(
    contenders: Mapping[Entry, Contender], records: int, tokens: int, repeats: int, order: random.Random
) -> Times:
    """Seconds of each contender's step, turn by turn, after one turn to warm up."""
    turns = repeats * max(1, min(3, FULL_WORK // (records * tokens)))
    tasks = {str(entry): _timed(_bound(contender, records, tokens)) for entry, contender in contenders.items()}
    take_turns(tasks, 1, order)
    times = take_turns(tasks, turns, order)
    print(f"{records}x{tokens}: {turns} turns")
    return {entry: times[str(entry)] for entry in contenders}


def _timed(task: Callable[[], None]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        task()
        return time.perf_counter() - start

    return run


def _shape_facts(shape: str, times: Times) -> dict[str, Any]:
    records, _ = parse_shape(shape)
    facts = {}
    for entry, seconds in times.items():
        facts[str(entry)] = {
            "seconds": Spread.of(seconds).to_json(),
            "samples_per_second": round(records / Spread.of(seconds).median, 1),
            "to_peft_same_execution": _to_peft(times, entry, entry.execution).to_json(),
            "to_peft_float32_sdpa": _to_peft(times, entry, USUAL).to_json(),
        }
    return facts


def _to_peft(times: Times, entry: Entry, execution: Execution) -> Spread:
    return ratios(times[entry], times[Entry("peft", execution)])


def _missed(measured: Mapping[str, Times], memory: Mapping[str, int | None]) -> list[str]:
    """Every aim that the median ratio does not meet."""
    missed = []
    for shape, times in measured.items():
        for execution, names in LINE_UP.items():
            for other in set(names) & AIMS.keys():
                ratio = ratios(times[Entry("fedlora", execution)], times[Entry(other, execution)]).median
                if ratio > AIMS[other]:
                    missed.append(f"{shape}, {execution}: {ratio:.3f} of {other}, wanted {AIMS[other]:.3f}")
        for other, aim in DEFAULT_AIMS.items():
            ratio = ratios(times[Entry("fedlora", HALF)], times[Entry(other, USUAL)]).median
            if ratio > aim:
                missed.append(f"{shape}: {ratio:.3f} of {other} in {USUAL} for fedlora in {HALF}, wanted {aim:.3f}")
    for execution in LINE_UP:
        ours, plain = (memory.get(str(Entry(name, execution))) for name in ("fedlora", "peft"))
        if ours and plain and ours > MEMORY_AIM * plain:
            missed.append(f"{execution}: {ours / plain:.3f} of peft's extra memory, wanted {MEMORY_AIM}")
    return missed


def _markdown(facts: dict[str, Any], measured: Mapping[str, Times]) -> str:
    parts = ["# One training step", conditions(facts["machine"])]
    parts.append(
        "MiniLM-L6, LoRA r = 8 on query and value, A frozen, SGD. Ratios of wall time inside one turn, smallest / "
        "**median** / largest; below 1 is faster. Checked first: all make the same clipped sum (largest distance "
        f"{max(facts['agreement'].values()):.0e} of its norm)."
    )
    for execution, names in LINE_UP.items():
        parts.append(f"## {execution}: to plain PEFT without privacy in {execution}")
        rows = [
            [shape, *(_to_peft(times, Entry(name, execution), execution) for name in names[1:])]
            for shape, times in measured.items()
        ]
        parts.append(table(["records x tokens", *names[1:]], rows))
    parts.append("## To plain PEFT without privacy in float32 sdpa, what one would write; and records per second")
    entries = [
        Entry(name, execution) for name, execution in (("fedlora", USUAL), ("fedlora", EAGER), ("fedlora", HALF))
    ]
    entries += [Entry("opacus_hooks", USUAL), Entry("opacus_ghost", USUAL)]
    rows = []
    for shape, times in measured.items():
        records, _ = parse_shape(shape)
        speeds = " / ".join(f"{records / Spread.of(times[entry]).median:.0f}" for entry in entries)
        rows.append([shape, *(_to_peft(times, entry, USUAL) for entry in entries), speeds])
    parts.append(table(["records x tokens", *entries, "records/s, in this order"], rows))
    parts.append("## Operations and memory")
    parts.append(table(["", *_cost_header()], _cost_rows(facts)))
    if facts["ragged"]:
        parts.append(_ragged_markdown(facts["ragged"]))
    parts.append("## Aims missed by the median")
    parts.append("\n".join(f"* {line}" for line in facts["missed"]) or "none")
    return "\n\n".join(parts)


def _cost_header() -> list[str]:
    counted, weighed = ("x".join(map(str, shape)) for shape in (COUNTED, WEIGHED))
    return [f"torch operations, {counted}", "matrix FLOPs to PEFT's", f"extra peak memory, {weighed}"]


def _cost_rows(facts: dict[str, Any]) -> Sequence[Sequence[object]]:
    rows = []
    for entry, counts in facts["operations"].items():
        base = facts["operations"][f"peft, {entry.partition(', ')[2]}"]["flops"]
        extra = facts["extra_memory"].get(entry)
        memory = f"{extra / 1e6:.0f} MB" if extra else "not measured"
        rows.append([entry, counts["operations"], f"{counts['flops'] / base:.3f}", memory])
    return rows


def _ragged_markdown(facts: dict[str, Any]) -> str:
    rows = [
        [name, row["parts"], row["padded_tokens"], f"{row['seconds']['median']:.2f} s", row["shown"]]
        for name, row in facts["ways"].items()
    ]
    title = (
        f"## One logical batch of {facts['records']} records, {facts['mean_tokens']:.1f} tokens on average, "
        f"{facts['max_tokens']} at most\n\n"
    )
    return title + table(
        ["", "micro-batches", "padded tokens", "a step takes", f"times as fast as {facts['reference']}"], rows
    )


if __name__ == "__main__":
    main()
