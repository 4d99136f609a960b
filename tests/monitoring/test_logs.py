"""A log says what fedlora says, in one form; of everybody else in a site's daemon, only where they spoke."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest

from fedlora.errors import ConfigError
from fedlora.monitoring.logs import LONGEST_MESSAGE, configure_logging, configure_logging_from

SECRET = "the patient's name is in this sentence"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Logging is global, and other tests have theirs."""
    root, hooks = logging.getLogger(), (sys.excepthook, threading.excepthook, sys.unraisablehook)
    handlers, level, shown = root.handlers[:], root.level, warnings.showwarning
    root.handlers = []
    yield
    logging.captureWarnings(False)
    warnings.showwarning = shown
    logging.setLogRecordFactory(logging.LogRecord)
    root.handlers, root.level = handlers, level
    logging.getLogger("fedlora").setLevel(logging.NOTSET)
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks


def lines_of(form: str, say: Callable[[], None], *speakers: str) -> list[str]:
    stream = io.StringIO()
    configure_logging(form, speakers=speakers, stream=stream)  # type: ignore[arg-type]
    say()
    return stream.getvalue().splitlines()


def hello() -> None:
    logging.getLogger("fedlora.site").info("answered", extra={"run": "r-1", "round": 3, "ok": True})


def test_text_has_the_time_in_utc_the_speaker_and_the_fields() -> None:
    (line,) = lines_of("text", hello)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ info fedlora\.site: answered run=r-1 round=3 ok=True", line)


def test_json_has_one_object_a_line() -> None:
    (line,) = lines_of("json", hello)
    fields = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", fields.pop("time"))
    known = {"level": "info", "logger": "fedlora.site", "message": "answered", "run": "r-1", "round": 3, "ok": True}
    assert fields == known


@pytest.mark.parametrize("form", ["text", "json"])
def test_text_from_elsewhere_makes_no_line_and_no_field_of_its_own(form: str) -> None:
    forged = 'x\n2026-01-01T00:00:00Z info fedlora.site: all is well\r\x1b[2J", "level": "info"'
    log = logging.getLogger("fedlora.site")
    lines = lines_of(form, lambda: log.error("refused %s", forged, extra={"run": forged}))
    assert not any("\x1b" in line or "\r" in line for line in lines)
    assert [line.startswith("2026-01-01") for line in lines] == [False] * len(lines)
    if form == "json":
        (line,) = lines
        assert json.loads(line)["level"] == "error"


def test_a_message_without_end_is_cut() -> None:
    (line,) = lines_of("json", lambda: logging.getLogger("fedlora.site").error("x" * 10**6))
    assert len(json.loads(line)["message"]) == LONGEST_MESSAGE


def foreign(name: str) -> Callable[[], None]:
    def say() -> None:
        log = logging.getLogger(name)
        log.warning("a sequence is too long: %s", SECRET)
        log.warning(f"a sequence is too long: {SECRET}")
        log.warning("with a field", extra={"sequence": SECRET})
        try:
            raise ValueError(SECRET)
        except ValueError:
            log.exception("it failed", stack_info=True)

    return say


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("name", ["transformers.tokenization", "fedlora.data.readers", "fedlora.sitelike", "root"])
def test_others_in_a_daemon_are_only_pointed_at(form: str, name: str) -> None:
    lines = lines_of(form, foreign(name), "fedlora.site")
    assert len(lines) == 4
    for line in lines:
        assert SECRET not in line
        assert "a message of test_logs.py:" in line
    assert any(SECRET in line for line in lines_of(form, foreign(name))), "a server lets everyone speak"


def test_handlers_that_libraries_bring_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    library = logging.getLogger("library")

    def imported_later() -> None:
        library.addHandler(logging.StreamHandler(sys.stderr))
        library.propagate = False
        logging.getLogger("library.part").warning(SECRET)

    assert len(lines_of("json", imported_later, "fedlora.site")) == 1
    assert capfd.readouterr().err == ""


def test_warnings_are_lines_and_only_pointed_at(recwarn: pytest.WarningsRecorder) -> None:
    def warn() -> None:
        warnings.warn(SECRET, UserWarning, stacklevel=1)

    (line,) = lines_of("text", warn, "fedlora.site")
    assert SECRET not in line


def test_what_nobody_caught_is_named_by_its_place(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        thread = threading.Thread(target=lambda: int(SECRET))
        thread.start()
        thread.join()
        sys.excepthook(ValueError, ValueError(SECRET), None)

    text = "\n".join(lines_of("text", fail, "fedlora.site"))
    assert text.count("ValueError was not caught") == 2
    assert "test_logs.py" in text
    assert SECRET not in text + capfd.readouterr().err


def test_the_environment_asks_for_a_form() -> None:
    before = logging.getLogger().handlers[:]
    configure_logging_from({})
    assert logging.getLogger().handlers == before, "Flower's own logging is left alone"
    configure_logging_from({"FEDLORA_LOG": "json"})
    assert logging.getLogger().handlers != before
    with pytest.raises(ConfigError, match="FEDLORA_LOG = xml, wanted text or json"):
        configure_logging_from({"FEDLORA_LOG": "xml"})
