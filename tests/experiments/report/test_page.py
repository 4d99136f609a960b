"""report.html without a browser: whole, escaped, linked, and with a box on ε that says what holds."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedlora.experiments.report import build_report, read_results
from fedlora.experiments.report.csv_files import runs_csv
from fedlora.experiments.report.guarantees import odds
from fedlora.experiments.runs.stored_run import StoredRun
from fedlora.privacy.units import Guarantee

HOSTILE = "</script><img src=x onerror=alert(1)><!--\" ' & {{7*7}}"


class Tags(HTMLParser):
    """All tags with their attributes, texts, and whether open tags are closed in order."""

    VOID = ("meta", "link", "input", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder: Path, out: Path) -> str:
    return build_report(folder, out).read_text(encoding="utf-8")


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_page_needs_nothing_from_outside(
    folder_of: Callable[..., Path], sweep_runs: list[StoredRun], tmp_path: Path
) -> None:
    page = page_of(folder_of(sweep_runs), tmp_path / "out")
    tags = Tags(page)
    assert tags.open == []
    assert not [name for name, _ in tags.tags if name in ("iframe", "object", "embed", "img", "base")]
    addresses = [a[key] or "" for _, a in tags.tags for key in ("src", "href", "action") if key in a]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?://(?!www\.w3\.org)", page)
    (policy,) = [meta["content"] for meta in tags.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in str(policy)
    assert "default-src 'none'" in str(policy)


def test_hostile_labels_are_text(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun], recorded: Callable[..., Any], tmp_path: Path
) -> None:
    tuning = {"configurations": HOSTILE, "chosen_on": HOSTILE, "values": {HOSTILE: HOSTILE}, "note": HOSTILE}
    bad = stored(
        method=HOSTILE,
        task=HOSTILE,
        folder=f"cells/{HOSTILE}",
        tuning=tuning,
        metric={"name": HOSTILE, "value": 0.5},
        code_digest=HOSTILE,
        selection={"candidates": [{"layer": 0, "type": HOSTILE, "selected": s} for s in (True, False)]},
    )
    dead = StoredRun(folder="cells/dead", digest=HOSTILE, axes={HOSTILE: HOSTILE}, error=HOSTILE)
    page = page_of(folder_of([bad, dead, stored()]), tmp_path / "out")
    tags = Tags(page)
    assert tags.open == []
    assert [name for name, _ in tags.tags].count("script") == 2
    assert not tags.of("img")
    assert not [key for _, attributes in tags.tags for key in attributes if key.startswith("on")]
    assert HOSTILE in embedded(page)["labels"]
    assert any(HOSTILE in text for text in tags.texts)
    assert "49" not in [text.strip() for text in tags.texts]


def test_numbers_for_the_charts_are_the_records(
    folder_of: Callable[..., Path], sweep_runs: list[StoredRun], tmp_path: Path
) -> None:
    data = embedded(page_of(folder_of(sweep_runs), tmp_path / "out"))
    assert [epsilon["text"] for epsilon in data["epsilons"]] == ["1", "6", "∞"]
    assert data["epsilons"][2]["value"] is None
    wanted = {run.digest[:16]: (run.record or {})["metric"]["value"] for run in sweep_runs}
    assert {run[9] for run in data["runs"]} == set(wanted)
    assert all(run[4] == pytest.approx(wanted[run[9]], abs=1e-6) for run in data["runs"])
    assert len(data["cells"]) == 6


def test_runs_that_are_there_are_linked(
    folder_of: Callable[..., Path], stored: Callable[..., StoredRun], tmp_path: Path
) -> None:
    folder = folder_of([stored(folder="cells/a b"), stored(seed=1)])
    (folder / "cells" / "a b").mkdir(parents=True)
    (folder / "cells" / "a b" / "PRIVACY.md").write_text("report")
    page = page_of(folder, folder / "report")
    links = [link["href"] for link in Tags(page).of("a") if "cells" in (link["href"] or "")]
    assert links == ["../cells/a%20b/PRIVACY.md", "../cells/a%20b"]
    assert ((folder / "report") / "../cells/a b/PRIVACY.md").exists()


def test_the_box_says_what_epsilon_bounds_and_what_not(
    folder_of: Callable[..., Path], sweep_runs: list[StoredRun], tmp_path: Path
) -> None:
    text = " ".join(" ".join(Tags(page_of(folder_of(sweep_runs), tmp_path / "out")).texts).split())
    assert "one record of one site (add/remove)" in text
    assert "δ = 1e-05" in text
    assert Guarantee(epsilon=1, delta=1e-5, accountant="pld").not_covered in text


def test_odds_are_upper_bounds(folder_of: Callable[..., Path], stored: Callable[..., StoredRun]) -> None:
    rows = odds(read_results(folder_of([stored(epsilon=e) for e in (0.5, 1.0, 6.0, "inf")])))
    assert [row[0] for row in rows] == ["0.5", "1", "6"]
    for (_, times, right), epsilon in zip(rows, (0.5, 1.0, 6.0), strict=True):
        assert math.exp(epsilon) <= float(times.replace(",", "")) < math.exp(epsilon) + 0.1
        exact = 100 * (math.exp(epsilon) + 1e-5) / (1 + math.exp(epsilon))
        assert exact <= float(right.removesuffix(" %")) < exact + 0.1


def test_the_download_is_the_csv(folder_of: Callable[..., Path], sweep_runs: list[StoredRun], tmp_path: Path) -> None:
    folder = folder_of(sweep_runs)
    tags = Tags(page_of(folder, tmp_path / "out"))
    (link,) = [link["href"] or "" for link in tags.of("a") if "download" in link]
    assert base64.b64decode(link.partition("base64,")[2]).decode() == runs_csv(read_results(folder))
