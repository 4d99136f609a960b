"""PRIVACY.md: a finished run's privacy on one page, for somebody who has never seen the code.

Made from the record alone, so that anyone can make it anew from record.json and nothing is in it that is not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedlora.adapters.dam import Selection
from fedlora.adapters.methods import METHODS
from fedlora.experiments import privacy_words as words
from fedlora.experiments.record import guarantee_of
from fedlora.experiments.wording import wording_of
from fedlora.privacy.units import Guarantee, rounded_up

Record = Mapping[str, Any]


def privacy_report(record: Record) -> str:
    """The report in Markdown, from the record of a finished run as it was made or as read from record.json."""
    config, guarantee = record["config"], guarantee_of(record)
    said_so, source = wording_of(guarantee), record["privacy"]["noise_source"]
    title = f"# Privacy report: {config['data']['task']}, {config['adapter']['method']}, {_count(record)}"
    sections = {
        "In plain words": [_plain_words(guarantee)],
        "Against whom": [_against_whom(record)],
        "What each site spent": [_phases(record), _totals(record), _resumed(record), _silent(record)],
        "How the modules were chosen": [_choice(record), _beside(record)],
        "What the ledger says": [_ledger(record)],
        "What left the sites": [_vectors(record), _facts(record), words.ENVELOPE],
        "What stayed": [said_so.stayed, *_kept(record)],
        "How the noise is made": [said_so.noise_source[source], said_so.granular],
        "What was done with noised values": [_post_processing(record)],
        "Check ε yourself": [_snippet(guarantee)],
        "What is not covered": [said_so.not_covered],
        "Digests (SHA-256)": [_digests(record)],
    }
    parts = [title, *filter(None, (_verdict(guarantee, record), _tuned(guarantee, record)))]
    for heading, texts in sections.items():
        if said := [*filter(None, texts)]:
            parts += [f"## {heading}", *said]
    return "\n\n".join(parts) + "\n"


def _count(record: Record) -> str:
    asked, all_sites = len(record["clients"]), record["config"]["federation"]["clients"]
    return f"{all_sites} sites" if asked == all_sites else f"{asked} of {all_sites} sites took part"


def _verdict(guarantee: Guarantee, record: Record) -> str:
    if guarantee.flaws:
        return "\n\n".join(f"# NO GUARANTEE: {flaw}" for flaw in guarantee.flaws)
    alike = len({float(facts["epsilon"]) for facts in record["clients"]}) == 1
    whose = (
        wording_of(guarantee).spent_alike if alike else words.SPENT_MOST.format(site=record["privacy"]["worst_client"])
    )
    return "\n\n".join(filter(None, (f"**{guarantee}.** {whose}", _resumed(record))))


def _tuned(guarantee: Guarantee, record: Record) -> str:
    """A sweep's trials come before the run, and what they cost is no part of its own ε."""
    if not (facts := record.get("tuning")):
        return ""
    return " ".join(filter(None, (words.TUNED, "" if guarantee.flaws else words.TUNED_ALONE, facts["note"])))


def _plain_words(guarantee: Guarantee) -> str:
    if guarantee.flaws:
        return words.NOTHING_PROMISED
    found = math.ceil(1000 * most_detected(guarantee.epsilon, guarantee.delta)) / 10
    return wording_of(guarantee).promised.format(
        unit=guarantee.unit, relation=guarantee.relation, epsilon=_number(guarantee.epsilon), found=f"{found:g}"
    )


def most_detected(epsilon: float, delta: float, false_alarms: float = 0.01) -> float:
    """The largest chance of finding a record that was there, for a test with that chance of a false alarm.

    Source: Kairouz, Oh and Viswanath 2015, "The Composition Theorem for Differential Privacy", theorem 2.1.
    """
    few = math.exp(min(epsilon, 700.0)) * false_alarms + delta
    return min(1.0, few, 1 - math.exp(-epsilon) * (1 - delta - false_alarms))


def _against_whom(record: Record) -> str:
    guarantee = guarantee_of(record)
    holds = "see the verdict" if guarantee.flaws else "the guarantee above"
    known = {who: _number(epsilon) for who, epsilon in (record["privacy"].get("less_noise") or {}).items()}
    asked = record["privacy"].get("cohort_size")
    rows = [
        (who, text.format(holds=holds, asked=asked, **known)) for who, text in wording_of(guarantee).against.items()
    ]
    rows.append(("whoever configures the run", words.ENFORCED[record["privacy"]["enforced"]]))
    return _table(("who", "what holds"), rows)


def _phases(record: Record) -> str:
    rows, wording = [], wording_of(guarantee_of(record))
    for facts, site in zip(record["clients"], record["privacy"]["sites"], strict=True):
        for phase, extra in zip(facts.get("phases", ()), site["phases"], strict=True):
            probability = phase["sampling_probability"]
            row = (
                phase["name"],
                "Poisson: a coin for each record and step" if probability < 1 else wording.all_taken,
                f"{probability:.6g}",
                phase["mechanism"],
                f"{extra['noise_multiplier']:.6g}",
                f"{phase['effective_noise_multiplier']:.6g}",
                f"{phase['sensitivity']:.6g}",
                str(phase["num_steps"]),
                _number(extra["epsilon_alone"]),
            )
            rows.append((facts["client"], row))
    if not rows:
        return ""
    heads = ("phase", "sampler", "q", "mechanism", "nominal σ", "effective σ", "sensitivity", "steps")
    ran = {row[0] for _, row in rows}  # said by sites: only names that are known are explained
    meant = words.PHASE | {"finetune": wording.finetune}
    meanings = "\n".join(f"- *{name}*: {text}" for name, text in meant.items() if name in ran)
    return "\n\n".join((wording.phases, meanings, _by_sites((*heads, "ε of the phase alone"), rows)))


def _totals(record: Record) -> str:
    rows = []
    for facts, site in zip(record["clients"], record["privacy"]["sites"], strict=True):
        row = (
            _number(facts["epsilon"]),
            _number(site["epsilon_charged"]),
            f"{facts['delta']:g}",
            facts["accountant"].upper(),
            str(site["rounds_asked"]),
            str(site["rounds_charged"]),
            str(site["rounds_answered"]),
        )
        rows.append((facts["client"], row))
    heads = ("ε released", "ε charged", "δ", "accountant", "rounds asked for", "rounds charged", "updates that arrived")
    return f"{_by_sites(heads, rows)}\n\n{words.TOTALS}"


def _choice(record: Record) -> str:
    selection = record.get("selection")
    if selection is None:
        return ""
    if guarantee_of(record).flaws:
        return words.CHOICE.format(choice=Selection.from_json(selection), why=words.CHOICE_UNPROTECTED)
    given = bool(record["config"]["adapter"]["probe_texts"])
    why = words.CHOICE_COSTS_NOTHING[selection["method"]].format(texts=words.PROBE_TEXTS[given])
    return words.CHOICE.format(choice=Selection.from_json(selection), why=why)


def _beside(record: Record) -> str:
    if record["config"]["adapter"]["select"] != "bilevel":
        return ""
    return words.BESIDE.format(batch=record["config"]["training"]["expected_batch_size"])


def _resumed(record: Record) -> str:
    if not record["privacy"]["resumed"]:
        return ""
    sites = record["privacy"]["sites"]
    if all(site["rounds_charged"] == site["rounds_asked"] for site in sites):
        return words.RESUMED
    return words.DONE_ANEW.format(epsilon=_number(max(float(site["epsilon_charged"]) for site in sites)))


def _silent(record: Record) -> str:
    silent = [facts["client"] for facts in record["clients"] if "phases" not in facts]
    return words.SILENT.format(sites=_listed(silent)) if silent else ""


def _ledger(record: Record) -> str:
    ledger = record["privacy"]["ledger"]
    if ledger is None:
        return words.LEDGER_ELSEWHERE
    rows = [
        (
            site["client"],
            (*(str(site[state]) for state in ("spent", "reserved", "abandoned")), _number(site["epsilon"])),
        )
        for site in ledger
    ]
    heads = ("rounds released", "charged, never released", "abandoned, never released", "ε of all that is charged")
    return f"{words.LEDGER_HERE}\n\n{_by_sites(heads, rows)}"


def _vectors(record: Record) -> str:
    rows = []
    for vector in record["privacy"]["vectors_out"]:
        rows.append((vector["phase"], "all slots as one vector", "", str(vector["bytes"]), str(vector["updates"])))
        for slot in vector["slots"]:
            shape = " × ".join(map(str, slot["shape"]))
            rows.append((vector["phase"], slot["name"], shape, str(slot["bytes"]), ""))
    table = _table(("phase", "slot", "shape", "bytes in one update", "updates that arrived, all sites"), rows)
    return f"{wording_of(guarantee_of(record)).vectors}\n\n{table}"


def _facts(record: Record) -> str:
    names: dict[str, list[str]] = {}
    for fact in record["privacy"]["facts_out"]:
        names.setdefault(fact["why"], []).append(fact["name"])
    table = _table(("facts", "why they may leave"), [(", ".join(facts), why) for why, facts in names.items()])
    return f"{words.FACTS}\n\n{table}"


def _kept(record: Record) -> list[str]:
    """What a method has each site keep of what it trains."""
    config, method = record["config"], METHODS[record["config"]["adapter"]["method"]]
    trained = (*method.factors, "head") if config["model"]["head"] == "trained" else method.factors
    kept = [part for part in trained if part in method.local]
    if not kept:
        return []
    return [words.KEPT.format(parts=" and ".join(kept)), "" if guarantee_of(record).flaws else words.KEPT_IS_PAID_FOR]


def _post_processing(record: Record) -> str:
    config, used = record["config"], [wording_of(guarantee_of(record)).always]
    if (noise_filter := config["training"]["noise_filter"]) != "none":
        used.append(words.FILTERED.format(noise_filter=noise_filter))
    if (share := config["privacy"]["low_pass"]) < 1:
        used.append(words.LOW_PASS.format(share=share))
    return "\n".join(f"- {text}" for text in used)


def _snippet(guarantee: Guarantee) -> str:
    if math.isinf(guarantee.epsilon):
        return words.NO_SNIPPET
    caveat = f"\n\n{words.SEEDED_SNIPPET}" if guarantee.noise_seeded else ""
    return words.SNIPPET.format(module=guarantee.accountant, name=words.ACCOUNTANTS[guarantee.accountant]) + caveat


def _digests(record: Record) -> str:
    names = {"config_digest": "settings", "code_digest": "code of fedlora", "model_digest": "base model's weights"}
    rows = [(text, f"`{record[key]}`") for key, text in names.items()]
    return f"{_table(('of', 'digest'), rows)}\n\n{words.DIGESTS.format(version=record['fedlora_version'])}"


def _number(epsilon: float | str) -> str:
    """ε with four digits, rounded up; the record holds all of them."""
    value = float(epsilon)
    return "∞" if math.isinf(value) else f"{rounded_up(value):g}"


def _listed(sites: Iterable[int]) -> str:
    """Site numbers, runs of them as first–last."""
    runs: list[list[int]] = []
    for site in sorted(sites):
        if runs and site == runs[-1][-1] + 1:
            runs[-1].append(site)
        else:
            runs.append([site])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _by_sites(heads: Sequence[str], rows: Iterable[tuple[int, tuple[str, ...]]]) -> str:
    """A table of `rows` (site, cells), in which sites with the same cells share a line."""
    sites: dict[tuple[str, ...], list[int]] = {}
    for site, cells in rows:
        sites.setdefault(cells, []).append(site)
    return _table(("sites", *heads), [(_listed(found), *cells) for cells, found in sites.items()])


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. Some texts come from other machines: none can end a cell, a line or begin a tag."""

    def line(cells: Sequence[str]) -> str:
        clean = (" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[") for cell in cells)
        return f"| {' | '.join(clean)} |"

    return "\n".join([line(heads), "|" + "---|" * len(heads), *map(line, rows)])
