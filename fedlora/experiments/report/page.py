"""report.html: one file that opens offline, with its style, its script and its numbers inside."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedlora.experiments.report.page_facts import page_facts
from fedlora.experiments.report.results import Results

_PARTS = Path(__file__).parent / "page"


def page_text(results: Results, *, title: str, folder: Path, out: Path) -> str:
    """The page. Every text in it is escaped, and its policy runs no script but its own and asks for nothing outside.

    Args:
        title: of the page.
        folder: that the run folders are in.
        out: where the page will lie, from which links to run folders start.
    """
    style, script = ((_PARTS / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    environment = Environment(
        loader=FileSystemLoader(_PARTS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    return environment.get_template("report.html").render(
        page_facts(results, title=title, folder=folder, out=out),
        style=Markup(style),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
