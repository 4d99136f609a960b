"""report.html as a reader meets it, in Chromium: filters, charts, keyboard, phone, and silence on the network."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedlora.experiments.report import build_report
from fedlora.experiments.runs.stored_run import StoredRun

browser_module = pytest.importorskip("tests.experiments.report.browser", reason="websockets is not installed")
PROGRAM = browser_module.executable()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium on the path, so that the page is seen by nobody"),
]
HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browser_module.Browser(PROGRAM) as found:
        yield found


@pytest.fixture
def page(folder_of: Callable[..., Path], sweep_runs: list[StoredRun], stored: Callable[..., StoredRun]) -> Path:
    more = [stored(0.5 + seed / 50, task="cola", method=HOSTILE, seed=seed) for seed in range(3)]
    folder = folder_of([*sweep_runs, *more])
    run = folder / "cells" / "sst2-plain-1.0-0"
    run.mkdir(parents=True)
    (run / "PRIVACY.md").write_text("what this run promises")
    return build_report(folder, folder / "report")


@pytest.fixture(autouse=True)
def quiet(browser: Any) -> Iterator[None]:
    """No test may leave a word on the console, or ask for anything but the page."""
    browser.console.clear()
    browser.requests.clear()
    yield
    assert browser.run("document.title") != "hacked"
    assert browser.console == []
    assert all(address.startswith("file:") and address.endswith("report.html") for address in browser.requests)


def marks(browser: Any) -> int:
    found = browser.run("document.querySelectorAll('.run').length")
    assert isinstance(found, int)
    return found


def shown(browser: Any, selector: str) -> int:
    found = browser.run(f"[...document.querySelectorAll({selector!r})].filter(e => e.offsetParent).length")
    assert isinstance(found, int)
    return found


def test_filters_act_on_charts_and_tables(browser: Any, page: Path) -> None:
    browser.open(page)
    assert marks(browser) == 21
    assert shown(browser, "#all-runs tbody tr") == 21
    browser.run("document.querySelector('[data-filter=task][value=\"0\"]').click()")  # cola
    assert (marks(browser), shown(browser, "#all-runs tbody tr")) == (18, 18)
    assert not browser.run("document.querySelector('#task-0').offsetParent")
    browser.run("document.querySelector('[data-filter=epsilon][value=\"2\"]').click()")  # without privacy
    assert (marks(browser), shown(browser, "#all-runs tbody tr")) == (12, 12)
    assert "no privacy" not in browser.run("document.querySelector('[data-chart=\"1\"]').textContent")
    browser.run("document.querySelector('[data-none=label]').click()")
    assert (marks(browser), browser.run("document.querySelector('#nothing').hidden")) == (0, False)
    browser.run("document.querySelectorAll('[data-all]').forEach(button => button.click())")
    assert browser.run("document.querySelector('#shown').textContent") == "21 of 21 runs shown"


@pytest.mark.parametrize(("across", "count"), [("bytes", 21), ("round", 21)])
def test_other_charts(browser: Any, page: Path, across: str, count: int) -> None:
    browser.open(page)
    browser.run(f"document.querySelector('[value={across}]').click()")
    assert marks(browser) == count
    assert "NaN" not in browser.run("document.querySelector('main').innerHTML")


def test_keyboard_alone_reaches_filters_and_records(browser: Any, page: Path) -> None:
    browser.open(page)
    reached = []
    for _ in range(60):
        browser.press("Tab")
        reached.append(browser.run("document.activeElement.dataset.filter || document.activeElement.classList[0]"))
        if reached[-1] == "run":
            break
    assert {"task", "label", "epsilon", "run"} <= set(reached)
    assert not browser.run("document.querySelector('#card').hidden")  # focus alone shows the record
    browser.press("ArrowRight")
    name = browser.run("document.activeElement.getAttribute('aria-label')")
    browser.press("Enter", "\r")
    assert browser.run("document.activeElement.closest('#card') !== null")
    browser.press("Escape")
    assert browser.run("document.activeElement.getAttribute('aria-label')") == name
    assert browser.run("document.querySelector('#card').hidden")
    browser.run("document.querySelector('[data-filter=task]').focus()")
    browser.press(" ", " ")
    assert browser.run("document.querySelector('#shown').textContent") == "18 of 21 runs shown"


def test_a_point_shows_its_record_and_its_privacy_report(browser: Any, page: Path) -> None:
    browser.open(page)
    place = browser.run(
        "(() => { const runs = [...document.querySelectorAll('.run')];"
        "const run = runs.find(run => run.ariaLabel.startsWith('plain, ε = 1, seed 0'));"
        "run.scrollIntoView({block: 'center', behavior: 'instant'}); const box = run.getBoundingClientRect();"
        "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    browser.move(*place)
    text = browser.run("document.querySelector('#card').innerText")
    assert "0.6960" in text
    assert "0.9994" in text
    assert "δ = 1e-05" in text
    browser.tap(*place)
    address = browser.run("document.querySelector('#card a').getAttribute('href')")
    assert address == "../cells/sst2-plain-1.0-0/PRIVACY.md"
    browser.move(5, 5)
    assert not browser.run("document.querySelector('#card').hidden")  # a tap pins it


def test_columns_sort_by_number(browser: Any, page: Path) -> None:
    browser.open(page)
    read = "[...document.querySelectorAll('#all-runs tbody tr')].map(row => +row.cells[4].textContent)"
    browser.run("document.querySelector('[data-sort=\"4\"]').click()")
    first = browser.run(read)
    assert first == sorted(first)
    browser.run("document.querySelector('[data-sort=\"4\"]').click()")
    assert browser.run(read) == sorted(first, reverse=True)
    assert browser.run("document.querySelector('[aria-sort]').getAttribute('aria-sort')") == "descending"


@pytest.mark.parametrize("width", [360, 390])
def test_a_phone_needs_no_sideways_scrolling(browser: Any, page: Path, width: int) -> None:
    browser.open(page, width=width, height=780)
    assert browser.run("document.documentElement.scrollWidth") <= width
    sizes = browser.run("[...document.querySelectorAll('.chart text')].map(t => t.getBoundingClientRect().height)")
    assert min(sizes) >= 10  # the chart is drawn for the width, not shrunk to it
    assert marks(browser) == 21


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_have_contrast(browser: Any, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    picture = np.asarray(Image.open(io.BytesIO(browser.picture())).convert("L"), dtype=float)
    assert (np.median(picture) < 60) == dark
    assert picture.max() - picture.min() > 180
    assert picture.std() > 10  # not an empty page
