"""kill -9 at any instant of a site's life: what left is counted, the ledger holds, and the next process goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedlora.config import RunConfig
from fedlora.models import locate_model
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.ledger_file import RESERVED, SPENT
from tests.federation.doomed_site import PARTS, Whereabouts

CHECKOUT = Path(__file__).parents[2]
ROUNDS, STEPS = 60, 2  # of a run; a new one begins when a site has done most of them
PAUSES = {"opening": 0.01, "computing": 0.05}  # seconds, at most, that a kill waits after a part has begun
POLICY = """
[models]
"{model}" = "{digest}"
[data.ward]
task = "sst2"
source = "generated"
max_epsilon = 1e5
max_delta = 1e-3
"""

Rounds = set[tuple[str, int]]


@dataclass
class Doomed:
    """The template process, and where its children are and leave things."""

    process: subprocess.Popen[str]
    folder: Path
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    def start(self, ledger: Path, run: str, start: int = 0, stop: int = ROUNDS) -> int:
        (self.folder / "outside").mkdir(exist_ok=True)
        Whereabouts.create(self.folder / "whereabouts")
        order = {"ledger": str(ledger), "run": run, "start": start, "stop": stop}
        order |= {name: str(self.folder / name) for name in ("outside", "whereabouts")}
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.hear())

    def hear(self) -> str:
        """The template's next line: a child's process id, later how it ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self, child: int, part: str, pause: float | None = None) -> Whereabouts:
        """Kill it shortly after it has come to `part` of a round, the first or a later one; tells how far it came."""
        where, limit = Whereabouts(self.folder / "whereabouts"), time.monotonic() + 60
        times = 1 if part == "opening" else self.chance.randint(1, 3)
        while where.times(part) < times and time.monotonic() < limit:
            pass  # a pause would be longer than what it waits for
        struck = time.monotonic() + (pause or self.chance.uniform(0, PAUSES.get(part, 0.003)))
        while time.monotonic() < struck:
            pass
        os.kill(child, signal.SIGKILL)
        assert self.hear() == str(-signal.SIGKILL), "the child had ended before it was killed; its output is above"
        return where

    def outside(self) -> Rounds:
        """Run and round of all that ever left; a file that a kill left empty counts too."""
        names = (path.name.split("-") for path in (self.folder / "outside").iterdir())
        return {(run, int(index)) for run, index in names}


@pytest.fixture(scope="module")
def template(
    tiny_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[str]]:
    """A process with everything loaded, to be forked."""
    config = tiny_config(
        "federation.clients=1", f"federation.rounds={ROUNDS}", f"federation.local_steps={STEPS}",
        "privacy.seeded_noise=false", "privacy.accountant=rdp",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("template")
    recipe, policy = folder / "recipe.toml", folder / "site.toml"
    recipe.write_text(config.to_toml(), encoding="utf-8")
    policy.write_text(POLICY.format(model=config.model.name, digest=locate_model(config.model.name).digest))
    command = [sys.executable, "-m", "tests.federation.doomed_site", str(recipe), str(policy)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(
        command, cwd=CHECKOUT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def doomed(template: subprocess.Popen[str], tmp_path: Path) -> Doomed:
    return Doomed(template, tmp_path)


def counted(ledger: Path, outside: Rounds) -> tuple[Rounds, Rounds]:
    """Rounds that the ledger has charged, and those it let out, after checking that it covers all that is outside."""
    with closing(Ledger.open(ledger)) as opened:  # every row is checked
        entries = opened.entries()
    reserved = {entry.id: entry for entry in entries if entry.kind == RESERVED}
    rounds = {number: (entry.run, entry.round) for number, entry in reserved.items()}
    spent = {rounds[entry.reservation] for entry in entries if entry.kind == SPENT}
    assert outside <= spent, "an update left before the ledger said that it might"
    assert sum(entry.num_steps for entry in reserved.values()) >= STEPS * len(outside)
    assert len(rounds) == len({*rounds.values()}), "a round was charged, and so computed, twice"
    return {*rounds.values()}, spent


def kill_many(doomed: Doomed, kills: int) -> Counter[str]:
    """Kill one site again and again, each part of a round in turn; every child goes on where the last one died."""
    ledger, hit, runs = doomed.folder / "ledger.sqlite", Counter[str](), 1
    charged, let_out = Rounds(), Rounds()
    for number in range(kills):
        run = f"run{runs}"
        where = doomed.kill(doomed.start(ledger, run, following(charged, run)), PARTS[number % len(PARTS)])
        hit[where.part] += 1
        earlier, charged, let_out = (len(charged), len(let_out)), *counted(ledger, doomed.outside())
        assert len(charged) >= earlier[0] + where.times("computing"), "computed before it was charged"
        assert len(let_out) >= earlier[1] + where.times("releasing"), "released before it was settled"
        before, start = len(doomed.outside()), following(charged, run)
        doomed.start(ledger, run, max(0, start - 1), start + 1)  # asks once more for the round that was hit
        assert doomed.hear() == "0", "the next process cannot go on"
        assert len(doomed.outside()) == before + 1, "it does the next round, and not the last one again"
        charged, let_out = counted(ledger, doomed.outside())
        runs += following(charged, run) > ROUNDS - 20
    return hit


def following(charged: Rounds, run: str) -> int:
    return 1 + max((index for name, index in charged if name == run), default=-1)


def test_no_kill_hides_a_cost(doomed: Doomed) -> None:
    kill_many(doomed, 15)


@pytest.mark.slow
def test_no_kill_of_two_hundred_hides_a_cost(doomed: Doomed) -> None:
    hit = kill_many(doomed, 204)
    print(f"killed while {dict(hit)}; {len(doomed.outside())} updates outside")
    assert {*hit} == {*PARTS}, "some part of a round was never hit"


def test_a_kill_while_a_ledger_is_made_leaves_one_or_none(doomed: Doomed) -> None:
    """Struck from before the file exists until after its first commit."""
    left = Counter[int]()
    for number in range(25):
        ledger = doomed.folder / f"ledger{number}.sqlite"
        pause = 10 ** doomed.chance.uniform(-5, -1.5)
        doomed.kill(doomed.start(ledger, "run"), "opening", pause)
        left[ledger.stat().st_size if ledger.exists() else -1] += 1
        charged, _ = counted(ledger, set())
        doomed.start(ledger, "run", len(charged), len(charged) + 1)
        assert doomed.hear() == "0", "the next process cannot go on"
    print(f"bytes of the file, -1 for none: {dict(left)}")
