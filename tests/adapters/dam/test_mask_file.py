from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from fedlora.adapters.dam import Candidate, ModuleMask, Selection, read_mask
from fedlora.errors import ConfigError

Candidates = tuple[Candidate, ...]
QUERY, KEY, UP = "encoder.layer.0.query", "encoder.layer.1.key", "encoder.layer.1.up"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mask"


def selection_of(candidates: Candidates, *modules: str) -> dict[str, Any]:
    mask = ModuleMask(candidates, tuple(candidate.module in modules for candidate in candidates))
    return Selection(
        mask=mask,
        method="warmup",
        discretise="cost_aware",
        ratio=len(modules) / len(candidates),
        scores=(1.0,) * len(candidates),
        noise_to_signal=2.0,
        stability=0.75,
        diagnostics={},
        note="",
    ).to_json()


@pytest.mark.parametrize(
    "text",
    [
        f"{UP}\n{QUERY}\n{KEY}\n",
        f"# the best\r\n\r\n  {QUERY}  # first\r\n{KEY}\r\n{UP}",
        f"\ufeff{QUERY}\n{KEY}\n{UP}",
        json.dumps([KEY, QUERY, UP]),
        "\n " + json.dumps([KEY, QUERY, UP], indent=2),
    ],
)
def test_modules_by_name(file: Path, candidates: Candidates, text: str) -> None:
    file.write_bytes(text.encode())
    mask = read_mask(file, candidates)
    assert mask.candidates == candidates
    assert mask.modules == (QUERY, KEY, UP)


def test_the_selection_of_another_run_of_the_model(file: Path, candidates: Candidates) -> None:
    file.write_text(json.dumps(selection_of(candidates, QUERY, UP)))
    assert read_mask(file, candidates).modules == (QUERY, UP)


def test_only_modules_and_choices_of_an_object_count(file: Path, candidates: Candidates) -> None:
    rows = [{"module": candidate.module, "selected": candidate.module == KEY} for candidate in reversed(candidates)]
    file.write_text(json.dumps({"candidates": rows}))
    assert read_mask(file, candidates).modules == (KEY,)


def refused(file: Path, candidates: Candidates, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        read_mask(file, candidates)
    assert len(str(raised.value)) < 1000 + len(str(file))
    assert "\n" not in str(raised.value)


def test_what_cannot_be_read_is_refused(file: Path, candidates: Candidates) -> None:
    refused(file, candidates, "cannot read adapter.mask .*No such file")
    refused(file.parent, candidates, "it is a folder")
    file.write_bytes(b" " * (2**20 + 1))
    refused(file, candidates, "more than 1048576 bytes")
    file.write_bytes(QUERY.encode("utf-16"))
    refused(file, candidates, "not UTF-8 text: byte 0")
    refused(Path("a\0name"), candidates, "cannot read adapter.mask")
    os.mkfifo(file.with_suffix(".pipe"))
    refused(file.with_suffix(".pipe"), candidates, "a pipe")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "chooses no module"),
        ("# nothing yet\n\n", "chooses no module"),
        ("[]", "chooses no module"),
        ("{", "not valid JSON"),
        (f'["{QUERY}",]', "not valid JSON"),
        ("[" * 200_000, "not valid JSON: nested too deeply"),
        ("[" + "1" * 10_000 + "]", "not valid JSON"),
        ("[1, 2]", "other things than module paths"),
        ("{}", 'is no selection: wanted "candidates"'),
        ('{"candidates": {}}', "is no selection"),
        ('{"candidates": [3]}', "is no selection"),
        (f'{{"candidates": [{{"module": "{QUERY}"}}]}}', "is no selection"),
        (f'{{"candidates": [{{"module": "{QUERY}", "selected": 1}}]}}', "is no selection"),
        ('{"candidates": []}', "about 0 modules, wanted this model's 12"),
        ("encoder.layer.0.qurey", f'no module "encoder.layer.0.qurey" .* nearest it has is "{QUERY}"'),
        (json.dumps([QUERY, "encoder.layer.9.up"]), 'no module "encoder.layer.9.up"'),
        ("x" * 100_000, 'no module "xxx'),
        ('["\\ud800"]', "no module"),
        (f"{QUERY}\n{KEY}\n{QUERY}\n", f'names "{QUERY}" twice'),
        (json.dumps([KEY, KEY]), f'names "{KEY}" twice'),
    ],
)
def test_content_that_is_no_choice_is_refused(file: Path, candidates: Candidates, text: str, reason: str) -> None:
    file.write_text(text)
    refused(file, candidates, reason)


def test_a_selection_of_another_model_is_refused(file: Path, candidates: Candidates) -> None:
    file.write_text(json.dumps(selection_of(candidates[:6], QUERY)))
    refused(file, candidates, "about 6 modules, wanted this model's 12 candidates; it was made for another model")
    file.write_text(json.dumps(selection_of(candidates, QUERY)))
    refused(file, candidates[:6], r"about 12 modules \(6 do not fit, the first .encoder.layer.1.query.\), wanted .* 6")
    wider = tuple(dataclasses.replace(candidate, in_features=2 * candidate.in_features) for candidate in candidates)
    refused(file, wider, r"about 12 modules \(12 do not fit")


def test_a_selection_lists_every_module_once_and_chooses_one(file: Path, candidates: Candidates) -> None:
    content = selection_of(candidates, QUERY)
    content["candidates"][5] = content["candidates"][0]
    file.write_text(json.dumps(content))
    refused(file, candidates, f'names "{QUERY}" twice')
    for row in (content := selection_of(candidates, QUERY))["candidates"]:
        row["selected"] = False
    file.write_text(json.dumps(content))
    refused(file, candidates, "chooses no module")
