"""What a process says of itself: lines for people, or JSON for machines. Standard library only.

A site's log goes where its owner sends it, and often further than that. So in a daemon only fedlora's own words about
public facts are printed. A library's message may quote what it worked on ("sequence of 600 tokens"), and so may an
exception that nobody caught: of these the log has the place in the code and nothing else.

Seconds are whole, and nobody logs how long a round took: a batch's size is private, and shows in time.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import traceback
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any, Literal, TextIO, get_args

from fedlora.errors import ConfigError

Form = Literal["text", "json"]
VARIABLE = "FEDLORA_LOG"
"""Environment variable in which a process without a command line is told the form."""
LONGEST_MESSAGE = 8000
"""Characters; a courier's request may be quoted in a refusal."""

_KNOWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_WITHHELD = "fedlora_withheld"


def configure_logging(form: Form, *, speakers: Collection[str] = (), stream: TextIO | None = None) -> None:
    """Make this process log to `stream`, standard error unless given, and nowhere else.

    Args:
        form: "text" or "json", one object a line.
        speakers: loggers whose words are printed, with those below them; of all others, only where they spoke. Empty
            lets everyone speak, for a process that never sees a private value.
        stream: of the lines.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_JsonLines() if form == "json" else _TextLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("fedlora").setLevel(logging.INFO)
    logging.captureWarnings(True)
    logging.setLogRecordFactory(_factory(tuple(speakers)))
    if speakers:
        _hide_uncaught_exceptions()


def configure_logging_from(environment: Mapping[str, str]) -> None:
    """As the variable FEDLORA_LOG asks; without it, logging stays as it is.

    Raises:
        ConfigError: it asks for neither text nor json.
    """
    asked, forms = environment.get(VARIABLE, ""), get_args(Form)
    if asked and asked not in forms:
        raise ConfigError(f"{VARIABLE} = {asked}, wanted {' or '.join(forms)}")
    for form in forms:
        if form == asked:
            configure_logging(form)


class _Lines(logging.Formatter):
    def message(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return text[:LONGEST_MESSAGE]

    def time(self, record: logging.LogRecord) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))


class _TextLines(_Lines):
    def format(self, record: logging.LogRecord) -> str:
        """One line, and further ones indented: no text from elsewhere can pass for a line of its own."""
        fields = "".join(f" {name}={_plain(str(value))}" for name, value in _fields(record).items())
        head = f"{self.time(record)} {record.levelname.lower()} {record.name}: "
        return head + "\n    ".join(map(_plain, self.message(record).splitlines())) + fields


class _JsonLines(_Lines):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self.message(record),
        }
        return json.dumps(
            line | {name: value for name, value in _fields(record).items() if name not in line}, default=str
        )


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as `extra`, by one whose words are printed."""
    if _WITHHELD in record.__dict__:
        return {}
    return {name: value for name, value in record.__dict__.items() if name not in _KNOWN}


def _plain(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _factory(speakers: tuple[str, ...]) -> Any:
    """Makes every record of the process, so that no library's own handler prints what is withheld here."""

    def make(name: str, level: int, path: str, line: int, message: object, *rest: Any, **further: Any) -> Any:
        _take_handlers_off(name)
        record = logging.LogRecord(name, level, path, line, message, *rest, **further)
        if speakers and not any(f"{name}.".startswith(f"{speaker}.") for speaker in speakers):
            record.msg = f"a message of {record.filename}:{line}, withheld since it may hold a private value"
            record.args, record.exc_info, record.stack_info = (), None, None
            setattr(record, _WITHHELD, True)  # what it gave as `extra` is added after this
        return record

    return make


def _take_handlers_off(name: str) -> None:
    """Some libraries bring a handler of their own on import, which would print in another form."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None and logger.parent is not None:
        if logger.handlers:
            logger.handlers, logger.propagate = [], True
        logger = logger.parent


def _hide_uncaught_exceptions() -> None:
    """Where they happened, and not what they quote."""
    log = logging.getLogger("fedlora.site")

    def say(kind: type[BaseException] | None, trace: TracebackType | None) -> None:
        name = "an exception" if kind is None else kind.__name__
        log.critical("%s was not caught\n%s", name, "".join(traceback.format_list(traceback.extract_tb(trace))))

    sys.excepthook = lambda kind, error, trace: say(kind, trace)
    threading.excepthook = lambda thread: say(thread.exc_type, thread.exc_traceback)
    sys.unraisablehook = lambda unraisable: say(unraisable.exc_type, unraisable.exc_traceback)
