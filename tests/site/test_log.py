"""A daemon's log tells what was asked and what came of it, and nothing of the records, whatever goes wrong."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fedlora.data.fingerprint import fingerprint
from fedlora.data.glue import Records
from fedlora.site.connection import DaemonAddress
from fedlora.site.protocol import Request
from tests.site.conftest import Asking, SiteFolder, update_in

LABELS = Counter({0: 86, 1: 61})  # numbers that occur nowhere by chance
PLACES = ("St Mary", "Elm House", "North Wing")
SECRET_ROOT = bytes(range(100, 132))
THETA = 0.1234567

# Serves like `fedlora site serve`, with a secret root that is known, and fails as asked by a file: in its own way, in
# the way of a library, with a thread that nobody waits for.
DAEMON = f"""
import logging, pathlib, sys, threading, warnings
from fedlora import randomness
randomness.secrets.token_bytes = lambda size: bytes({list(SECRET_ROOT)})[:size]
folder = pathlib.Path(sys.argv[1])

def arrange():
    from fedlora.federation import cohort
    train = cohort.train
    def failing(*arguments, **how):
        if not (folder / "fail").exists():
            return train(*arguments, **how)
        quoted = (folder / "fail").read_text()
        logging.getLogger("transformers.tokens").warning("sequence of %d tokens: %s", len(quoted), quoted)
        warnings.warn(quoted)
        thread = threading.Thread(target=lambda: int(quoted))
        thread.start(), thread.join()
        raise ValueError(quoted)
    cohort.train = failing

from fedlora.site import desk
opened = desk.Desk.__init__
desk.Desk.__init__ = lambda self, settings: (arrange(), opened(self, settings))[1]
sys.argv = ["fedlora", "site", "serve", str(folder / "site.toml"), *sys.argv[2:]]
from fedlora.cli import main
main()
"""


def write_records(folder: SiteFolder, hidden: int = 0) -> Records:
    """The site's own, each with words of its own; the first `hidden` labels are those of no class."""
    labels = [-1] * hidden + list(LABELS.elements())[hidden:]
    texts = [f"patient {number * 7919:06d} of {PLACES[number % 3]} was fine" for number in range(len(labels))]
    table = pyarrow.table({"sentence": texts, "label": labels})
    pyarrow.parquet.write_table(table, folder.path / "records" / "train.parquet")
    return Records(texts=(texts,), labels=np.array(labels))


@contextmanager
def daemon(folder: SiteFolder, *options: str) -> Iterator[tuple[DaemonAddress, Path]]:
    """Address of a daemon in a process of its own, and the file of all that it says."""
    said = folder.path / "log"
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", DAEMON, folder.path, *options], stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield DaemonAddress(place=str(folder.socket)), said
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, said.read_text()
    finally:
        process.kill()
        process.wait()


def private_texts(records: Records, folder: SiteFolder) -> Iterator[str]:
    yield from (rf"\b{re.escape(word)}\b" for text in records.texts[0] for word in text.split()[1:2])
    yield from PLACES
    yield from (rf"\b{count}\b" for count in (len(records), *LABELS.values()))
    yield fingerprint(records)[:12]
    yield SECRET_ROOT.hex()[:12]
    yield re.escape(repr(SECRET_ROOT)[2:12])
    yield rf"{THETA:.5f}"


@pytest.mark.parametrize("form", ["text", "json"])
def test_neither_records_nor_secrets_nor_numbers_of_either_are_logged(
    site_folder: SiteFolder, asking: Asking, form: str
) -> None:
    records = write_records(site_folder)
    site_folder.write_policy(("max_epsilon = 6.0", "max_epsilon = 60.0"))
    with daemon(site_folder, *(["--json-logs"] if form == "json" else [])) as (address, said):

        def ask(request: Request) -> str:
            return address.ask(request, limit=120, patience=120).code

        assert ask(asking.enrol()) == "ok"
        assert ask(asking.round(0)) == "ok"
        done = address.ask(asking.round(1, theta=THETA), limit=120)
        assert ask(asking.round(1, theta=THETA)) == "ok"
        assert ask(asking.round(1)) == "over"
        (site_folder.path / "fail").write_text(records.texts[0][7])
        assert ask(asking.round(2, theta=THETA)) == "internal"
        assert ask(asking.under("privacy.epsilon=100").round()) == "refused"
        write_records(site_folder, hidden=1)
        site_folder.write_policy(("max_epsilon = 6.0", "max_epsilon = 61.0"))  # so that it reads them anew
        assert ask(asking.enrol()) == "bad_input"
        write_records(site_folder)
        assert ask(asking.under("training.expected_batch_size=5000").enrol()) == "bad_input"
        assert ask(replace(asking.round(3), instruction=b"no instruction")) == "protocol"
        site_folder.write_policy(("max_epsilon = 6.0", "max_epsilon = 0.001"))
        assert ask(asking.round(3)) == "refused"
        values = [f"{value:.6g}" for value in update_in(done).vector.tolist()[:40] if len(f"{value:.6g}") > 7]
    log = said.read_text()
    for word in ("serving", "enrolled", "answered as before", "RoundRepeated", "refused by the rule", "too large for"):
        assert word in log, f"{word}\n{log}"
    for word in ("ValueError", "some labels are outside", "withheld", "was not caught", "stopped"):
        assert word in log, f"{word}\n{log}"
    for private in (*private_texts(records, site_folder), *map(re.escape, values)):
        assert re.search(private, log) is None, f"{private}\n{log}"
    assert re.search("second|duration|elapsed|took", log.lower()) is None, "a batch's size shows in time"
    if form == "json":
        lines = [json.loads(line) for line in log.splitlines()]
        assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
        fields = {name for line in lines for name in line} - {"time", "level", "logger", "message"}
        assert fields == {"ask", "client", "code", "configuration", "phase", "round", "run", "socket", "task"}
