"""What a ledger says to the one who answers for it: per data set what is spent, counted and left, and by which runs.

No torch: a privacy officer reads a ledger anywhere. Every ε here is an upper bound.

An ε once shown is remembered on disk (`fedlora.cache`), so that what has not changed is shown without loading an
accountant: it follows from the releases, δ, accountant and its version, and the text of `privacy.accounting`, all of
which are in the question. It is for reading and grants nothing: a ledger prices what it is asked for anew, and so does
a plan. The ledger itself is read and verified whole each time.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import astuple, dataclass
from importlib import metadata
from pathlib import Path

from fedlora.cache import remembered
from fedlora.errors import ConfigError
from fedlora.privacy import accounting
from fedlora.privacy.accounting import Charge, epsilon, merged
from fedlora.privacy.ledger import Cap, Ledger
from fedlora.privacy.ledger_file import ABANDONED, RESERVED, SPENT, Entry
from fedlora.privacy.policy import SitePolicy

MOST_KINDS = 24
"""Kinds of rounds that are priced by PLD, a quarter of a second each; above, the looser RDP bound is shown."""


@dataclass(frozen=True, kw_only=True)
class RunSpending:
    """Equal rounds of one run: same purpose, σ and q."""

    run: str
    purpose: str
    noise_multiplier: float
    sampling_probability: float
    num_rounds: int
    num_steps: int
    states: Mapping[str, int]
    """Rounds by state: reserved, spent, abandoned."""
    epsilon: float
    """As if nothing else had ever been released."""
    accountant: str


@dataclass(frozen=True, kw_only=True)
class DataSetBudget:
    """Everything that counts against one budget: records that share a name or a fingerprint, directly or by a chain."""

    names: tuple[str, ...]
    fingerprints: tuple[str, ...]
    """First 8 hex digits of each, newest last; even they are for the site's own eyes."""
    unit: str
    relation: str
    num_rounds: int
    epsilon_spent: float
    """Of rounds whose update may have left."""
    epsilon_counted: float
    """Of all that was ever reserved: what the next round is added to."""
    delta: float
    cap_epsilon: float | None
    cap_from: str
    """Where cap and δ come from: the policy, the last charge, or the command line (no cap)."""
    accountant: str
    runs: tuple[RunSpending, ...]

    @property
    def title(self) -> str:
        return ", ".join(self.names) or self.fingerprints[-1]

    @property
    def epsilon_left(self) -> float | None:
        return None if self.cap_epsilon is None else max(0.0, self.cap_epsilon - self.epsilon_counted)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A whole ledger, read once."""

    head: str
    num_rows: int
    data_sets: tuple[DataSetBudget, ...]


def verify_ledger(path: Path, *, known_head: str | None = None) -> tuple[str, int]:
    """Head digest and number of rows of the ledger at `path`, without pricing anything.

    Raises:
        NoLedger, LedgerUnavailable, LedgerBroken: as `read_budget`.
    """
    with closing(Ledger.read(path)) as ledger:
        return ledger.verify(known_head=known_head), len(ledger.entries())


def read_budget(path: Path, *, policy: SitePolicy | None = None, delta: float, known_head: str | None = None) -> Budget:
    """Read the ledger at `path` and price what is in it. No byte of it changes.

    Args:
        policy: its caps hold for the data sets that it names, in place of those in the ledger.
        delta: for data sets without a cap.
        known_head: digest noted earlier that must be in the chain.

    Raises:
        ConfigError: the policy names no data set that was charged here: it is another site's.
        NoLedger: there is no ledger at `path`.
        LedgerUnavailable, LedgerBroken: it cannot be opened, or is not as it was written.
    """
    with closing(Ledger.read(path)) as ledger:
        head = ledger.verify(known_head=known_head)
        entries = ledger.entries()
    state = {entry.id: RESERVED for entry in entries if entry.kind == RESERVED}
    for entry in entries:
        if entry.reservation is not None and state[entry.reservation] != SPENT:  # once it may have left, it stays so
            state[entry.reservation] = entry.kind
    related = _related([entry for entry in entries if entry.kind == RESERVED])
    if policy is not None:
        _check_named(policy, {entry.data_set for entry in entries if entry.data_set})
    data_sets = tuple(_data_set(rounds, state, policy, delta) for rounds in related)
    return Budget(head=head, num_rows=len(entries), data_sets=data_sets)


def _check_named(policy: SitePolicy, charged: Set[str]) -> None:
    if charged and not any(_is_of(name, known) for name in policy.data for known in charged):
        raise ConfigError(
            f"the policy {policy.path} names {', '.join(policy.data)}, but what was charged to this ledger is "
            f"{', '.join(sorted(charged))}: give the policy of the ledger's own site, or no --policy"
        )


def _is_of(name: str, charged: str) -> bool:
    """Whether `charged` is the policy's data set `name`; simulated parts of it are `name/client`."""
    return charged == name or charged.startswith(f"{name}/")


def _related(rounds: Sequence[Entry]) -> list[list[Entry]]:
    """Rounds by budget, as the ledger adds them up; oldest budget first."""
    groups: list[tuple[set[tuple[str, ...]], list[Entry]]] = []
    by_owner: defaultdict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in rounds:
        by_owner[_text(entry.unit), _text(entry.relation), _text(entry.data_set), _text(entry.fingerprint)] += [entry]
    for (unit, relation, name, fingerprint), owned in by_owner.items():
        keys: set[tuple[str, ...]] = {(unit, relation, "fingerprint", fingerprint)}
        if name:
            keys.add((unit, relation, "name", name))
        for met in [group for group in groups if group[0] & keys]:
            groups.remove(met)
            keys, owned = keys | met[0], [*met[1], *owned]
        groups.append((keys, owned))
    return sorted((sorted(found, key=lambda entry: entry.id) for _, found in groups), key=lambda found: found[0].id)


def _data_set(
    rounds: Sequence[Entry], state: Mapping[int, str], policy: SitePolicy | None, delta: float
) -> DataSetBudget:
    names = tuple(dict.fromkeys(entry.data_set for entry in rounds if entry.data_set))
    cap, cap_from = _cap(rounds, names, policy)
    delta = cap.delta if cap else delta
    accountant = _accountant(rounds)
    return DataSetBudget(
        names=names,
        fingerprints=tuple(dict.fromkeys(_text(entry.fingerprint)[:8] for entry in rounds)),
        unit=_text(rounds[0].unit),
        relation=_text(rounds[0].relation),
        num_rounds=len(rounds),
        epsilon_spent=_epsilon((entry for entry in rounds if state[entry.id] == SPENT), delta, accountant),
        epsilon_counted=_epsilon(rounds, delta, accountant),
        delta=delta,
        cap_epsilon=cap.epsilon if cap else None,
        cap_from=cap_from,
        accountant=accountant,
        runs=_runs(rounds, state, delta, accountant),
    )


def _cap(rounds: Sequence[Entry], names: Sequence[str], policy: SitePolicy | None) -> tuple[Cap | None, str]:
    """The policy's cap where it names the data set, else the last one."""
    for name, rules in (policy.data if policy else {}).items():
        if any(_is_of(name, known) for known in names):
            return Cap(epsilon=rules.max_epsilon, delta=rules.max_delta), "policy"
    last = rounds[-1]
    if last.cap_epsilon is None or last.cap_delta is None:
        return None, "command line"
    return Cap(epsilon=last.cap_epsilon, delta=last.cap_delta), "last charge"


def _runs(rounds: Sequence[Entry], state: Mapping[int, str], delta: float, accountant: str) -> tuple[RunSpending, ...]:
    equal: defaultdict[tuple[str, str, float, float], list[Entry]] = defaultdict(list)
    for entry in rounds:
        charge = _charge(entry)
        equal[_text(entry.run), _text(entry.purpose), charge.noise_multiplier, charge.sampling_probability] += [entry]
    return tuple(
        RunSpending(
            run=run,
            purpose=purpose,
            noise_multiplier=sigma,
            sampling_probability=q,
            num_rounds=len(found),
            num_steps=sum(_charge(entry).num_steps for entry in found),
            states=_in_order(Counter(state[entry.id] for entry in found)),
            epsilon=_epsilon(found, delta, accountant),
            accountant=accountant,
        )
        for (run, purpose, sigma, q), found in equal.items()
    )


def _in_order(states: Mapping[str, int]) -> dict[str, int]:
    return {kind: states[kind] for kind in (SPENT, RESERVED, ABANDONED) if states[kind]}


def _accountant(rounds: Iterable[Entry]) -> str:
    kinds = {(entry.run, entry.noise_multiplier, entry.sampling_probability) for entry in rounds}
    return "pld" if len(kinds) <= MOST_KINDS else "rdp"


def _epsilon(rounds: Iterable[Entry], delta: float, accountant: str) -> float:
    charges = merged(_charge(entry) for entry in rounds)
    question = {
        "charges": [astuple(charge) for charge in charges],
        "delta": delta,
        "accountant": accountant,
        "dp_accounting": metadata.version("dp-accounting"),
        "pricing": _pricing(),
    }
    found = remembered("epsilon", question, lambda: epsilon(charges, delta, accountant))
    return found if isinstance(found, float) and found >= 0 else epsilon(charges, delta, accountant)


@functools.cache
def _pricing() -> str:
    """SHA-256 of the text that prices: who changes it need not remember that answers are kept."""
    return hashlib.sha256(inspect.getsource(accounting).encode()).hexdigest()


def _charge(entry: Entry) -> Charge:
    return Charge(entry.sampling_probability or 0.0, entry.noise_multiplier or 0.0, entry.num_steps or 0)


def _text(value: str | None) -> str:
    return value or ""
