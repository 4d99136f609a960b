"""One call from a folder of runs to its report; what it replaces is an earlier report and nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fedlora.errors import StoreError
from fedlora.experiments.report.csv_files import csv_files
from fedlora.experiments.report.figures import draw_figures
from fedlora.experiments.report.module_figures import draw_module_figures
from fedlora.experiments.report.page import page_text
from fedlora.experiments.report.results import Results, read_results
from fedlora.experiments.report.tables import tables_text

LISTED = ".fedlora-report"
"""Names of all files of a report, one a line: what a later one may replace."""
PAGE = "report.html"
_KINDS = (".csv", ".html", ".md", ".png", ".svg")


def build_report(folder: Path, out: Path) -> Path:
    """Write tables, figures and the page of a store of runs.

    Args:
        folder: of a sweep or of runs, or its store.
        out: folder of the report: new, empty, or an earlier report, which is replaced.

    Returns:
        The page, `out`/report.html.

    Raises:
        StoreError: there is nothing to report, or `out` holds something else.
        ConfigError: the sweep beside the store is no sweep.
    """
    return write_report(read_results(folder), folder, out)


def write_report(results: Results, folder: Path, out: Path) -> Path:
    """As `build_report`, of results that were read."""
    earlier = _earlier(out)
    home = folder if folder.is_dir() else folder.parent
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".report-") as place:
        made = Path(place)
        draw_figures(results, made)
        draw_module_figures(results, made)
        title = f"Privacy and utility: {home.resolve().name}"
        texts = csv_files(results) | {
            "tables.md": tables_text(results),
            PAGE: page_text(results, title=title, folder=home.resolve(), out=out.resolve()),
        }
        for name, text in texts.items():
            (made / name).write_text(text, encoding="utf-8")
        _replace(made, out, earlier)
    return out / PAGE


def _earlier(out: Path) -> set[str]:
    """Names of the earlier report in `out`."""
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out} is a file, wanted a folder for the report; choose another with --out")
    if not out.is_dir() or not any(out.iterdir()):
        return set()
    if not (out / LISTED).is_file():
        raise StoreError(
            f"{out} holds something that is no report of fedlora, and nothing is overwritten; "
            "choose an empty folder with --out, or empty this one"
        )
    lines = (out / LISTED).read_text(encoding="utf-8", errors="replace").splitlines()
    return {line for line in lines if Path(line).name == line and Path(line).suffix in _KINDS}


def _replace(made: Path, out: Path, earlier: set[str]) -> None:
    """Put the files of `made` where those of an earlier report are; what else is in `out` stays."""
    names = {file.name for file in made.iterdir()}
    if strange := sorted(name for name in names - earlier if (out / name).exists()):
        raise StoreError(f"{out / strange[0]} is no part of the earlier report there; move it, or choose another --out")
    out.mkdir(exist_ok=True)
    (out / LISTED).write_text("".join(f"{name}\n" for name in sorted(names | earlier)), encoding="utf-8")
    for name in sorted(names):
        (made / name).replace(out / name)
    for name in sorted(earlier - names):
        (out / name).unlink(missing_ok=True)
    (out / LISTED).write_text("".join(f"{name}\n" for name in sorted(names)), encoding="utf-8")
