"""The command line in the process of a test, as people type it."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

from fedlora.cli import main


class Said(NamedTuple):
    """What a command ended with and printed."""

    code: int
    out: str
    err: str


def typed(arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Said:
    """What `fedlora` says to these words."""
    monkeypatch.setattr(sys, "argv", ["fedlora", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return Said(ended.value.code, *capfd.readouterr())
