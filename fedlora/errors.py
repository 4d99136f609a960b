"""Everything fedlora raises on purpose, and the exit code each maps to at the command line.

    FedloraError                 1   a run that failed
    ├── InputError               2   the user can fix it: what, got, wanted, what to do
    │   ├── ConfigError              a key, type or range in a configuration
    │   ├── DataError                records, columns, labels, partitions
    │   ├── ModelError               base model, tokenizer, target modules
    │   ├── RunFolderError           an output or resume folder
    │   ├── StoreError               a store of runs that is missing, damaged or of a newer version
    │   └── NoLedger                 a path to read a ledger from that has none
    ├── PrivacyError             3   budget or policy refused; nothing was trained or released
    │   ├── BudgetRefused            a charge would pass what was planned or what the site allows
    │   ├── UnsoundMechanism         a mechanism that protects nothing, however much noise it adds
    │   ├── PolicyRefused            the site's own policy does not allow what was asked
    │   ├── LedgerUnavailable        a ledger cannot be opened, locked or written
    │   └── LedgerBroken             a ledger whose rows were removed or altered
    ├── AdapterError             1   layouts that do not match
    ├── ProtocolError            1   a message that does not fit the round
    │   └── RoundRepeated            a round that was done before
    ├── DaemonUnreachable        1   a site's daemon that does not answer
    ├── AuditContradiction       4   an audit refutes what a recipe claims
    └── RunInterrupted         130   stopped by hand; the run folder holds what is needed to go on

A message never contains text, labels, gradients or norms of private records.
"""


class FedloraError(Exception):
    """Base of every deliberate error."""

    exit_code = 1


class InputError(FedloraError):
    """Something the user gave is wrong and can be corrected."""

    exit_code = 2


class ConfigError(InputError, ValueError):
    """A configuration key is unknown, of the wrong type, out of range or at odds with another."""


class DataError(InputError):
    """Records cannot be found, read or divided as asked."""


class ModelError(InputError):
    """A base model, its tokenizer or a named module cannot be found or used."""


class RunFolderError(InputError):
    """A run folder exists already, is missing or cannot be read."""


class StoreError(InputError):
    """A store of runs is missing, damaged, full or of a newer version."""


class NoLedger(InputError):
    """What a ledger was to be read from is none, and never was."""


class PrivacyError(FedloraError):
    """The asked guarantee cannot be given; nothing private was computed."""

    exit_code = 3


class BudgetRefused(PrivacyError):
    """A charge would exceed what was planned or allowed."""


class UnsoundMechanism(PrivacyError):
    """The mechanism releases something without noise; no ε holds, and the config does not say that this is wanted."""


class PolicyRefused(PrivacyError):
    """The site's policy does not allow what was asked, or there is no policy to ask; `rule` names what refused."""

    def __init__(self, message: str, *, rule: str = "policy") -> None:
        super().__init__(message)
        self.rule = rule


class LedgerUnavailable(PrivacyError):
    """A ledger cannot be opened, locked or written, so nothing may be computed."""


class LedgerBroken(PrivacyError):
    """A ledger is not what was written: it counts for nothing until somebody finds out why."""


class AdapterError(FedloraError):
    """Two sides disagree about slots, shapes or digest."""


class AuditContradiction(FedloraError):
    """An audit's lower bound exceeds the claimed ε: what was claimed is false, or a rare false alarm."""

    exit_code = 4


class RunInterrupted(FedloraError):
    """A person stopped the run; every whole round is on disk."""

    exit_code = 130


class ProtocolError(FedloraError):
    """A message does not belong to the round, phase or layout at hand."""


class RoundRepeated(ProtocolError):
    """A round that was asked for before; each is done, and charged, once."""


class DaemonUnreachable(FedloraError):
    """Nobody answers at a site's socket."""
