"""What is published beside a store is what the store gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.experiments.report import build_report
from fedlora.experiments.runs.store import Store

RESULTS = Path(__file__).parents[2] / "simulations" / "results"
PUBLISHED = sorted(store.parent for store in RESULTS.glob("*/runs.sqlite"))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_tables_made_of_the_store_are_those_that_are_published(folder: Path, tmp_path: Path) -> None:
    build_report(folder, tmp_path / "report")
    for published in sorted((folder / "report").glob("*.md")) + sorted((folder / "report").glob("*.csv")):
        made = tmp_path / "report" / published.name
        assert made.read_text() == published.read_text(), f"fedlora report {folder} made another {published.name}"


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_what_is_published_names_no_folder_of_a_machine(folder: Path) -> None:
    with Store.open(folder, read_only=True) as store:
        for run in store.runs():
            assert run.settings["data"]["source"] in ("hub", "generated", "PATH_TO_DATA", "PATH_TO_GLUE")
            assert not run.settings["run"]["out"]
            assert run.status == "done", run.error


@pytest.mark.parametrize(("document", "rows"), [("README.md", 7), ("docs/methods.md", 57)])
def test_documents_show_rows_of_published_tables(document: str, rows: int) -> None:
    checked = 0
    for block in (RESULTS.parents[1] / document).read_text().split("<!-- rows of ")[1:]:
        source, _, rest = block.partition(" -->\n")
        published = (RESULTS.parents[1] / source).read_text().splitlines()
        shown = rest.partition("\n\n")[0].splitlines()
        assert [line for line in shown if line not in published] == []
        checked += len(shown)
    assert checked == rows
