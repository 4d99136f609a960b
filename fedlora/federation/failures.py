"""What a server learns when a site cannot answer: one of a few fixed codes. No torch, so that couriers know them too.

An exception's text may quote a record. It stays in the site's own log, and there only where it is one of fedlora's own
errors, which never quote records; of others the log has the place in the code.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping

from fedlora.errors import AdapterError, FedloraError, PolicyRefused, ProtocolError, RoundRepeated

FAILURE_CODES = (
    "bad_input",  # the configuration, the records or the model, for the site's or the run's owner to correct
    "refused",  # by the site's policy or budget; nothing was charged
    "protocol",  # a message that fits no round of this run
    "over",  # the round is over at this site, and its answer is not at hand or was to another instruction
    "busy",  # more is waiting than the site takes; ask again
    "unavailable",  # the courier found no daemon; ask again
    "internal",  # the site's log says what and where
    "no_reply",  # nothing came in time
    "outlier",  # the server's own verdict: far from all others, so not used
)
TRY_AGAIN = ("busy", "unavailable")
"""Nothing was asked of the site's engine, so the same question may do better later."""


def failure_code(error: BaseException) -> str:
    """The code under which `error` may be told to others."""
    if isinstance(error, RoundRepeated):
        return "over"
    if isinstance(error, ProtocolError | AdapterError):
        return "protocol"
    exit_code = error.exit_code if isinstance(error, FedloraError) else 1
    return {2: "bad_input", 3: "refused"}.get(exit_code, "internal")


def log_failure(log: logging.Logger, error: BaseException, request: Mapping[str, str | int] | None = None) -> None:
    """Say at the site what happened, without what a foreign exception's text may quote.

    Args:
        log: of the site, or of who carries for it.
        error: that ended a request.
        request: public facts of it.
    """
    fields = {**(request or {}), "code": failure_code(error)}
    if isinstance(error, PolicyRefused):
        log.error("refused by the rule %s: %s", error.rule, error, extra=fields)
    elif isinstance(error, FedloraError):
        log.error("%s: %s", type(error).__name__, error, extra=fields)
    else:
        where = "".join(traceback.format_list(traceback.extract_tb(error.__traceback__)))
        log.error("%s\n%s", type(error).__name__, where.rstrip(), extra=fields)
