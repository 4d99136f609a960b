"""python -m benchmarks.ledger: what it takes to add a round to a site's ledger, as long as it may be.

Each row is one ledger: so many rounds, of one kind or of twenty, and a cap far above or just above what they cost.
*open* checks every row; *cold* is the first round in a process, which composes all that was charged; *warm* is each
round after it. Importing dp-accounting is told apart: a site has it loaded for its plan. Aim: warm under 0.2 s at 1,000
rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, load_average
from benchmarks.report import RESULTS, command, conditions, save, table
from benchmarks.spread import Spread
from fedlora.privacy.accounting import Charge, epsilon
from fedlora.privacy.ledger import Cap, DataSet, Ledger, Request

AIM_SECONDS, AIM_ROUNDS = 0.2, 1000
DELTA = 1e-6
WARD = DataSet(fingerprint="f" * 64, name="ward")
STEPS = 10


def main() -> None:
    options = _options()
    if options.measure:
        print(
            json.dumps(
                _measure(Path(options.measure), options.rounds[0], options.kinds[0], options.cap, options.repeats)
            )
        )
        return
    machine = {"command": command("benchmarks.ledger")} | describe_machine()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fedlora-benchmark-") as scratch:
        for rounds in options.rounds:
            for kinds in options.kinds:
                rows += _shape(Path(scratch), rounds, kinds, options.repeats)
    machine["load_average_after"] = load_average()
    facts = {"machine": machine, "delta": DELTA, "steps_per_round": STEPS, "rows": rows}
    facts["missed"] = [
        row["name"] for row in rows if row["rounds"] <= AIM_ROUNDS and row["warm"]["median"] > AIM_SECONDS
    ]
    markdown = _markdown(facts)
    print(markdown)
    save(options.out, "ledger", facts, markdown)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description="Adding a round to a ledger.")
    parser.add_argument("--rounds", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--kinds", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--repeats", type=int, default=5, help="rounds added in each process")
    parser.add_argument("--measure", help="(internal) a ledger to measure in this process")
    parser.add_argument("--cap", type=float, default=0.0, help="(internal) ε of its cap")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def _charge(number: int, rounds: int, kinds: int) -> Charge:
    """Rounds of one kind follow one another, as the runs of a site do; later kinds have more noise."""
    kind = min(number * kinds // rounds, kinds - 1)
    return Charge(0.01, 1.0 + 0.05 * kind, STEPS)


def _shape(scratch: Path, rounds: int, kinds: int, repeats: int) -> list[dict[str, Any]]:
    """A ledger of `rounds` in `kinds`, and rounds added to it far from the cap and near it, each in a fresh process."""
    path = scratch / f"{rounds}-{kinds}.sqlite"
    ledger = Ledger.open(path)
    for number in range(rounds):
        ledger.settle(ledger.reserve([_request(number, _charge(number, rounds, kinds), None)]))
    ledger.close()
    after = [_charge(number, rounds, kinds) for number in range(rounds + 3 * repeats)]
    whole = epsilon(after, DELTA)
    found = []
    for name, cap in (("far", 10 * whole), ("near", 1.001 * whole)):
        asked = ["--measure", str(path), "--rounds", str(rounds), "--kinds", str(kinds), "--repeats", str(repeats)]
        ended = subprocess.run(
            [sys.executable, "-m", "benchmarks.ledger", *asked, "--cap", str(cap)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        measured = json.loads(ended.stdout)
        found.append({"name": f"{rounds} rounds, {kinds} kinds, {name}", "rounds": rounds, "kinds": kinds} | measured)
        print(found[-1], flush=True)
    return found


def _measure(path: Path, rounds: int, kinds: int, cap: float, repeats: int) -> dict[str, Any]:
    """Seconds to import, open, and add a first and further rounds. Runs in a process of its own."""
    seconds = [_clock()]
    epsilon([Charge(1.0, 10.0, 1)], DELTA)
    seconds.append(_clock())
    ledger = Ledger.open(path)
    seconds.append(_clock())
    first = len({entry.round for entry in ledger.entries() if entry.round is not None})
    settle, started = [], _clock()
    added = []
    for number in range(first, first + repeats):
        request = _request(number, _charge(number, rounds, kinds), Cap(epsilon=cap, delta=DELTA))
        started = _clock()
        reservations = ledger.reserve([request])
        added.append(_clock() - started)
        started = _clock()
        ledger.settle(reservations)
        settle.append(_clock() - started)
    ledger.close()
    spread = Spread.of(added[1:])
    return {
        "imports": round(seconds[1] - seconds[0], 4),
        "open": round(seconds[2] - seconds[1], 4),
        "cold": round(added[0], 4),
        "warm": spread.to_json(),
        "settle": Spread.of(settle).to_json(),
    }


def _request(number: int, charge: Charge, cap: Cap | None) -> Request:
    return Request(
        data_set=WARD, charge=charge, run=f"run-{number // 100}", round_index=number, purpose="finetune", cap=cap
    )


def _clock() -> float:
    return time.perf_counter()


def _markdown(facts: dict[str, Any]) -> str:
    rows: Sequence[Sequence[object]] = [
        [
            row["name"],
            f"{row['open']:.3f}",
            f"{row['cold']:.3f}",
            "{min:.3f} / **{median:.3f}** / {max:.3f}".format(**row["warm"]),
            "{min:.3f} / **{median:.3f}** / {max:.3f}".format(**row["settle"]),
        ]
        for row in facts["rows"]
    ]
    return "\n\n".join(
        [
            "# Adding a round to a ledger",
            conditions(facts["machine"]),
            f"Seconds; rounds of {STEPS} steps, q = 0.01, δ = {DELTA:g}. *far*: the cap is ten times what all costs, "
            "so that a cheap bound is enough; *near*: a thousandth above it, where only the exact ε decides. *cold*: "
            "the first round in a process; *warm*: those after it; both with the fsync of the charge. *settle*: "
            "noting that the update may leave. Smallest / **median** / largest.",
            table(["ledger", "open", "cold", "warm", "settle"], rows),
            f"Warm rounds above {AIM_SECONDS:g} s at {AIM_ROUNDS:,} rounds: {'; '.join(facts['missed']) or 'none'}",
        ]
    )


if __name__ == "__main__":
    main()
