"""`fedlora site check`: would this site take part, and is it safe? Looks only: charges nothing and writes nothing."""

from __future__ import annotations

import sqlite3
import ssl
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from fedlora.claims import is_claimed
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, InputError, ModelError, PolicyRefused, PrivacyError
from fedlora.federation.shelf import Shelf
from fedlora.listening import loopback_address
from fedlora.models import locate_model
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.policy import NO_FOLDER, DataPolicy, SitePolicy, TlsSection
from fedlora.site.daemon import claim_file
from fedlora.site.finding import Finding, bad, good, refused, warning
from fedlora.site.machine import check_clock, check_disk, check_machine
from fedlora.site.permissions import check_permissions, check_socket
from fedlora.site.rehearsal import Rehearsal, check_device, largest_run

RESTORE = "restore it from a backup, and find out what happened: what was spent is known nowhere else"

_CLIENT_UNIT = (
    "allow.units has client: in such a run whole moves leave with no noise of the site's own, or with a part of it; "
    "records are promised nothing, and max_epsilon does not hold it back",
    'only for a server that may see them; else units = ["record"]',
)


def check_site(settings: Path) -> Iterator[Finding]:
    """Everything about the site whose policy is at `settings`, one finding after the other."""
    try:
        policy = SitePolicy.from_toml(settings)
    except PolicyRefused as error:
        yield refused("policy", str(error), "correct it; `fedlora site init` makes one with every key explained")
        yield from check_machine()
        return
    yield good("policy", f"{settings}, SHA-256 {policy.digest}")
    if "client" in policy.allow.units:
        yield warning("units", *_CLIENT_UNIT)
    for name, data in policy.data.items():
        yield check_records(policy, name, data)
    rehearsal = Rehearsal(policy)
    for model in policy.models:
        yield check_weights(policy, model)
    if not policy.models:
        yield refused("model", "[models] names none", "name one: `fedlora site init` and a refusal print its digest")
    yield check_device(policy)
    yield from rehearsal.check()
    found, last_charge = check_ledger(policy)
    yield found
    yield check_answers(policy)
    yield from check_permissions(policy)
    yield check_socket(policy)
    if policy.tls is not None:
        yield check_tls(policy, policy.tls)
    yield check_daemon(policy)
    if policy.site.metrics:
        yield check_metrics(policy.site.metrics)
    yield from check_disk(policy, rehearsal.most_weights)
    yield check_clock(last_charge)
    yield check_offline(policy)
    yield from check_machine()


def check_records(policy: SitePolicy, name: str, data: DataPolicy) -> Finding:
    """One data set for its task, columns and labels of that task, and a δ that suits their number."""
    check = f"records {name}"
    try:
        policy.data_set(data.task)
        config = RunConfig.from_mapping({"data": {"task": data.task}, "model": {"head": "frozen"}})
        records = Shelf().records(policy.localised(config), "train")
        policy.check_size(data.task, len(records))
    except PolicyRefused as error:
        return refused(check, str(error), f"correct [data.{name}]")
    except InputError as error:
        return bad(check, str(error), f"put the records right, or correct data.{name}.source")
    if data.source == "generated":
        return warning(check, "generated texts, which are nobody's", "name the folder of the site's own records")
    size = f"{len(records)} records" if data.public_size == "exact" else "records, whose number stays"
    return good(check, f"{data.task}: {size}; max_delta = {data.max_delta:g} is below one over their number")


def check_weights(policy: SitePolicy, model: str) -> Finding:
    """A model's files, by their digest; a cache of the hub is another user's as soon as the daemon is."""
    check = f"model {model}"
    try:
        task = next(iter(policy.data.values())).task
        source = locate_model(policy.localised(largest_run(policy, model, task)).model.name)
        policy.check_model(model, source.digest)
    except PolicyRefused as error:
        return refused(check, str(error), "compare with what the model's publisher says")
    except ModelError as error:
        advice = f"on a machine with internet: fedlora bundle {model} OUT; put its models/ into site.model_folder"
        return bad(check, str(error), advice)
    if source.kind == "hub":
        advice = f"fedlora bundle {model} OUT, and put its models/ into site.model_folder"
        return warning(check, f"in this user's hub cache, {source.folder}", advice)
    return good(check, f"{source.folder}, digest as in the policy")


def check_metrics(address: str) -> Finding:
    """Whether it is an address that metrics may have; a daemon that runs has it already."""
    try:
        loopback_address(address, "site.metrics")
    except ConfigError as error:
        return bad("metrics", str(error), "correct site.metrics, or leave it empty")
    return warning("metrics", f"at {address} every user of this machine can read what is spent", "empty is safer")


def check_ledger(policy: SitePolicy) -> tuple[Finding, str | None]:
    """Whether its chain holds; and the time of its last row."""
    check, path = "ledger", policy.ledger
    if not path.exists():
        if policy.beside(policy.site.answers).exists():
            return refused(check, f"{path} is missing, but answers are there that were charged to it", RESTORE), None
        advice = "the daemon makes an empty one; if anything was ever charged, restore it from a backup first"
        return warning(check, f"there is none at {path}", advice), None
    try:
        ledger = Ledger.read(path)
        with closing(ledger):
            entries, head = ledger.entries(), ledger.verify()
    except (PrivacyError, InputError) as error:
        return refused(check, str(error), RESTORE), None
    found = f"{len(entries)} rows intact, head {head}"
    return good(check, found), max((entry.time for entry in entries), default=None)


def check_answers(policy: SitePolicy) -> Finding:
    """Whether the file of the last answers can be read, where there is one."""
    check, path = "answers", policy.beside(policy.site.answers)
    if not path.exists():
        return good(check, "none yet")
    if path.with_name(f"{path.name}-journal").exists():
        return warning(check, f"{path} was being written when its daemon ended", "nothing: the daemon puts it right")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            (count,) = connection.execute("SELECT COUNT(*) FROM answer").fetchone()
    except sqlite3.Error as error:
        state, count = str(error), 0
    if state != "ok":
        advice = "move it away; rounds that were answered are then refused where they would have been answered again"
        return bad(check, f"{path}: {' '.join(state.split())}", advice)
    return good(check, f"of {count} runs")


def check_tls(policy: SitePolicy, tls: TlsSection) -> Finding:
    """Whether certificate and key belong together, and the couriers' authority can be read."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(policy.beside(tls.certificate), policy.beside(tls.key))
        context.load_verify_locations(policy.beside(tls.couriers))
    except OSError as error:  # ssl.SSLError among them
        return bad(
            "TLS", f"[tls] cannot be used: {error.strerror or error}", "see whether its three files are PEM and match"
        )
    return good("TLS", f"{tls.address}, for couriers with a certificate")


def check_daemon(policy: SitePolicy) -> Finding:
    """Whether one serves this ledger."""
    running = is_claimed(claim_file(policy))
    return good("daemon", "one is running; memory and device are shared with it" if running else "none is running")


def check_offline(policy: SitePolicy) -> Finding:
    """The daemon sets HF_HUB_OFFLINE for itself; what a policy names has to be here then."""
    wanting = [name for name, data in policy.data.items() if data.source == "hub"]
    if wanting:
        found = f'source = "hub" of {", ".join(wanting)}: the daemon asks no hub, so only its cache serves'
        return warning(
            "offline", found, f"put the records into a folder; besides {', '.join(NO_FOLDER)} source names one"
        )
    return good("offline", "the daemon asks no hub, and nothing in the policy needs one")
