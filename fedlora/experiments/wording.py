"""What PRIVACY.md says in other words where a client's whole data is protected, and by whom the noise is added."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.experiments import privacy_words as words
from fedlora.privacy.units import Guarantee


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The texts that depend on what is protected; the others are in `privacy_words`."""

    promised: str
    spent_alike: str
    against: Mapping[str, str]
    phases: str
    finetune: str
    all_taken: str
    """In place of a sampler."""
    vectors: str
    stayed: str
    always: str
    noise_source: Mapping[str, str]
    granular: str
    not_covered: str


def wording_of(guarantee: Guarantee) -> Wording:
    """The texts for a run with this guarantee, or with none."""
    return _WORDINGS[guarantee.noise_by]


_OF_RECORDS = Wording(
    promised=words.PROMISED,
    spent_alike=words.SPENT_ALIKE,
    against=words.AGAINST,
    phases=words.PHASES,
    finetune=words.PHASE["finetune"],
    all_taken="none: all records of the phase",
    vectors=words.VECTORS,
    stayed=words.STAYED,
    always=words.ALWAYS,
    noise_source=words.NOISE_SOURCE,
    granular=words.GRANULAR,
    not_covered=words.NOT_COVERED,
)

_PROMISED = """\
Protected is the whole data of one client: two runs that differ only in whether that client's data are there or its
moves are zero ({relation}) are to look alike from outside. "Outside" is the model after every round and everything made
of it: the adapter, this report, whatever is computed from them later. It is *not* what a client sends: that the server
sees, and it is not protected by this ε.

Take somebody who knows all other clients' data and tests, from the models of all rounds, whether a certain {unit}'s
were used. If the test may wrongly accuse 1 in 100 {unit}s whose data were not, it finds at most {found} % of those
whose were. ε = {epsilon} bounds the worst case over all {unit}s, data and attackers; the smaller it is, the less can be
told."""

_PHASES = """\
A *phase* is a kind of release; a step here is a whole round. σ is the noise's standard deviation over the sensitivity,
and the sensitivity is how far one client's whole data can move the sum of a round's moves in L2. There is no noise on
the steps within a round: clipping of records (`privacy.clip_norm`) is mere regularisation there, and promises
nothing."""

_NOT_COVERED = """\
- **The server.** It sees each client's move by itself, with {noise}; so does whoever breaks into it.
- **Single records** have no guarantee of their own, only that of all of their client's data together.
- **That a client takes part**, in which rounds, whether it answered and when: all of that is public.
- **One person's data at several clients.** At k of them it has about k times this ε.
- **Choices made outside the run.** Hyper-parameters chosen by looking at private data cost what no run can see.
- **Other runs on the same data.** The ledger of a simulation knows of this run alone.
- **Time.** How long a round takes depends a little on the batches that were drawn.
- **Names and paths** in `config.toml` and `record.json` stand there as they were given; look before you
publish.{more}"""

_STAYED = """\
Records, their labels, fingerprints and number; losses, gradients and their norms; the sizes of the batches that were
really drawn; the keys of sampling{keys}."""

_ALWAYS = (
    "Always: division by the number of clients that a round asks, whoever answered, the server's optimiser and what "
    "the method makes of the mean. What is computed from a release alone tells no more than it, and costs nothing."
)

_FINETUNE = "training of the modules that are adapted: per round, the noised sum of all clients' clipped moves"
_ALIKE = "That holds for each client by itself; all that took part spent the same."
_TAKEN = "none: every round that the public schedule asks the client for"
_READERS = "{holds}, but for times and paths (see below)"
_MACHINE = "nothing: records and secrets lie there in clear"
_SEEDED = words.NOISE_SOURCE["seeded"]

_SERVER = Wording(
    promised=_PROMISED,
    spent_alike=_ALIKE,
    against={
        "server": "nothing: it is trusted with every client's move as it is, and with the noise",
        "other clients": "{holds}: they see the models after each round. That holds for all of them together, as long "
        "as the server is not among them",
        "whoever reads the adapter or this folder": _READERS,
        "someone on a client's own machine, or the server's": _MACHINE,
    },
    phases=_PHASES,
    finetune=_FINETUNE,
    all_taken=_TAKEN,
    vectors="One vector per update: where the round started, plus the client's move, cut to the sensitivity above and "
    "*without noise*. Only the server sees it; it clips once more and adds all noise to the sum.",
    stayed=_STAYED.format(keys=""),
    always=_ALWAYS,
    noise_source={
        "host": "The server's normal numbers (float64) come from ChaCha20, a cipher, under a key of 256 bits that the "
        "operating system gave to the server for this round alone and that never left its memory. Clients draw their "
        "batches likewise, and no noise.",
        "seeded": _SEEDED,
    },
    granular=words.GRANULAR,
    not_covered=_NOT_COVERED.format(noise="no noise at all", more=""),
)

_SHARED = Wording(
    promised=_PROMISED,
    spent_alike=_ALIKE,
    against={
        "server": "less: it sees each move under the client's own part of the noise alone, σ / √(n - 1) with n clients "
        "in a round (n is {asked} here): ε = {server}. Nothing hides the parts from it",
        "one other client": "{holds}: of the noise it knows its own part, and the others' parts alone are σ",
        "other clients that pool what they drew": "less: c of them leave σ √((n - c) / (n - 1)), all but one as little "
        "as the server faces",
        "whoever reads the adapter or this folder": _READERS,
        "someone on a client's own machine": _MACHINE,
    },
    phases=_PHASES,
    finetune=_FINETUNE,
    all_taken=_TAKEN,
    vectors="One vector per update: where the round started, plus the client's move, cut to the sensitivity above, "
    "plus the client's part of the noise. Only all parts of a round together have the noise that ε speaks of, so "
    "a round with one missing fails.",
    stayed=_STAYED.format(keys=" and noise"),
    always=_ALWAYS,
    noise_source={
        "host": "Batches and each client's part of the noise (float64) come from ChaCha20, a cipher, under a key of "
        "256 bits that the operating system gave to the client and that never left its memory; a fresh stream for "
        "every client and round.",
        "seeded": _SEEDED,
    },
    granular=words.GRANULAR,
    not_covered=_NOT_COVERED.format(
        noise="its own part of the noise",
        more="\n- **Rounding of parts.** Each is rounded to float32 by itself, about 10⁻⁷ of it, before the sum is "
        "made: ε includes nothing for that.\n- **Clients that do not add their part.** The others' noise is then "
        "less, and nobody can see it.",
    ),
)

_WORDINGS = {"site": _OF_RECORDS, "server": _SERVER, "shared": _SHARED}
