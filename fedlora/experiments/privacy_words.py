"""The fixed texts of PRIVACY.md. Each is a claim about the code; docs/privacy.md says where it is made true."""

from __future__ import annotations

SPENT_MOST = "That is site {site}, which spent most; no site spent more."
SPENT_ALIKE = "That holds for each site by itself; all that took part spent the same."

TUNED = "**The settings of this run were chosen by trials.**"
TUNED_ALONE = "The ε above is that of this run alone."

PROMISED = """\
Protected is one {unit} of one site: two versions of a site's data that differ in one {unit} ({relation}) are to look
alike from outside. "Outside" is everything that left the site in this run, and everything made of it: the adapter, this
report, whatever is computed from them later.

Take somebody who knows every other {unit} of the site and tests, from all of this, whether a certain {unit} was used.
If the test may wrongly accuse 1 in 100 {unit}s that were not, it finds at most {found} % of those that were.
ε = {epsilon} bounds the worst case over all {unit}s, data and attackers; the smaller it is, the less can be told."""

NOTHING_PROMISED = """\
Treat everything that left the sites, the adapter included, as if the records themselves had been handed over. The
numbers below describe what ran; none of them is a promise."""

AGAINST = {
    "server, honest but curious": "{holds}: it sees every single update, and the guarantee is about each of them",
    "server, malicious": "{holds}, whatever it sends, as long as the site's code and settings are its own: a site does "
    "each scheduled round once, refuses other layouts, numbers out of range and a second choice of modules, clips and "
    "noises whatever it is asked (on rounding see below)",
    "other sites": "{holds}: they see means of updates, from which one of two sites can tell the other's",
    "whoever reads the adapter or this folder": "{holds}, but for times and paths (see below)",
    "someone on the site's own machine": "nothing: records, secrets and ledger lie there in clear",
}

ENFORCED = {
    "none": "not looked at: this was a simulation on one machine, whose sites obeyed no policy; their plans were the "
    "only limit",
    "policy": "limits of the site's own policy: every simulated site obeyed it, and was charged in its ledger",
    "sites": "limits of each site's own policy, as far as it has one. A real node takes part in nothing without a "
    "policy and a ledger on its own disk; a node of Flower's simulation obeys none. The server cannot see which "
    "it was: ask the site",
}

PHASES = """\
A *phase* is a kind of release. σ is the noise's standard deviation over the sensitivity, and the sensitivity is how far
one record can move a step's sum in L2. *Effective* σ is what the weakest direction of the noise is worth, and the only
one that the accountant sees; *nominal* σ is that of the mechanism's own description."""

PHASE = {
    "prototype": "sums of the records' embeddings by class, and counts, released once: a first head",
    "warmup": "training of *all* modules that may be chosen, before any is",
    "alignment": "one number per module, released once: how far its adapter, moved along what warm-up has released, "
    "would lower the loss. A record is a vector of all modules' numbers, of length at most 1",
    "bilevel": "training of all modules in turn with a *gate* for each, which says how much it helps; two kinds of "
    "release on two halves of the records (see below)",
    "finetune": "training of the modules that are adapted in the end",
    "evaluation": "counts of right and wrong predictions on records that were kept from training, released once",
}
"""What is released in it, by phase; in the order in which they run."""

CHOICE = """\
{choice}: one choice for all sites, made by the server (`selection.json`, `dam.png`). A site keeps to the first
that it is told of.

{why}"""

CHOICE_UNPROTECTED = "No guarantee holds for what it was made of, and so none for the choice."

CHOICE_COSTS_NOTHING = {
    "all": "No record was looked at, so it costs nothing.",
    "mask": "It was given with the run, as a file. This run has spent nothing on it. That whoever made the file did "
    "not look at the sites' records, or paid for it in another run, is their word.",
    "random": "It was made of the run's public seed: no record was looked at, so it costs nothing.",
    "probe": "It was made of gradients on texts called public: {texts}. No record of a site was looked at for it, so "
    "it costs nothing.",
    "warmup": "It is made of the noised updates of the phase warmup and of nothing else: products of updates whose "
    "noise is independent. They left the sites anyway and are charged as training, so it costs nothing more.",
    "alignment": "It is made of the noised numbers of the phases warmup and alignment and of nothing else. They are "
    "charged above, so it costs nothing more.",
    "bilevel": "It is made of the noised gates of the phase bilevel and of nothing else. They are charged above, so it "
    "costs nothing more.",
}

PROBE_TEXTS = {
    False: "made by a generator, with nobody's records in it",
    True: "a file that was given with the run. That these texts are public is the word of whoever gave them",
}

BESIDE = """\
**Why one charge pays for weights and gates.** Each record decides by a keyed hash of itself, and of no other record,
which of the two it teaches; the key is public. It is never in both halves: adding or removing it changes releases of
one kind, and the others tell of it only through those (parallel composition). A release of gates costs what one of
weights costs: a record's part in it has length 1 at most, under Gaussian noise of the effective σ above. How many
records a half has is private and stays. A record is drawn for a batch of its half with q = 2 · {batch} / n, twice that
of warm-up, where n is the number of records that the site plans with."""

TOTALS = """\
ε is rounded up. Phases cost less together than the sum of their ε alone. *Released* counts every round that a site was
asked for once, whether its update arrived, was used, or not. *Charged* is what the run takes from the site's budget:
the same, and rounds that died with a stopped process and were done anew."""

RESUMED = "The run was stopped and resumed. No round was charged twice."

DONE_ANEW = """\
The run was stopped and resumed. Rounds that a stopped process had begun were charged, and then done anew: together
ε = {epsilon} is charged to the site that was charged most. That is what holds against whoever got hold of what the
stopped process had made; nothing of it is in this folder."""

SILENT = """\
Of site {sites} no update ever arrived. Nobody but the site knows what it released, so that the ε asked of the
run is written down for it; its own ledger has what it was charged."""

LEDGER_HERE = """\
Every round was charged here before it was computed. "Released" are rounds whose update may have left, though they were
done anew later. The others are counted like them, so that a crash wastes budget and hides none; ε of the ledger can
therefore be above that of the run."""

LEDGER_ELSEWHERE = """\
The ledger belongs to the site and stays with it: it adds up all runs on its data and is not in this report. The site
reads it with its own copy of fedlora; there, charged, released and abandoned rounds stand one by one."""

VECTORS = """\
One vector of noised numbers per update, in slots agreed upon before the run: float32, or what `federation.wire_dtype`
makes of its distance from where the round started. It may leave because every number in it is
a function of noised sums, public settings and what the server sent."""

FACTS = """\
Beside it, facts from a fixed list. None is computed from what records say."""

ENVELOPE = """\
Every update also repeats the run's id, round, phase, client number and digest of the layout, as the server gave them.
A site that fails answers with one of a few fixed codes, never with an error's text."""

STAYED = """\
Records, their labels and their fingerprints; losses, gradients and their norms; the sizes of the batches that were
really drawn; sums and counts without noise; the keys of sampling and noise; the ledger of a site with a policy."""

KEPT = """\
Of what was trained, each site keeps its own {parts}. Where all sites ran in one process their models lie under
`personal/` in this folder; otherwise each is at its site."""

KEPT_IS_PAID_FOR = """\
Gradients of what a site keeps were clipped and noised together with the others, so that the ε above has paid for them:
whoever is given a site's own model learns no more of its records than that ε allows."""

NOISE_SOURCE = {
    "host": "Batches and normal numbers (float64) come from ChaCha20, a cipher, under a key of 256 bits that the "
    "operating system gave to the site and that never left its memory; a fresh stream for every site and round.",
    "device": "Normal numbers in float64 from the accelerator's own generator (Philox), which is fast and no cipher, "
    "under a fresh key of 64 bits for every draw. The keys come from ChaCha20 under a key of 256 bits that the "
    "operating system gave to the site. Batches are drawn by ChaCha20 itself.",
    "seeded": "**From the run's public seed, for reproducible research: anyone can repeat it and take it away.**",
}

GRANULAR = """\
Sum and noise are rounded to multiples of one power of two, which no record decides, before they are added: the low bits
of what is released tell nothing of the sum. The noise is widened by the little that rounding adds to the
sensitivity. Runs without noise release their sums as they are."""

ALWAYS = (
    "Always: division by the *expected* batch size, the optimiser's steps, rounding for the way, what the server makes "
    "of the sites' vectors by its rule of aggregation, its optimiser and the method, the head made of prototypes. What "
    "a method has a site keep of its adapter is made of the same noised values. What is computed from a release alone "
    "tells no more than the release, and costs nothing."
)
FILTERED = (
    "`training.noise_filter = {noise_filter}`: smooths noised gradients. It costs nothing either: it never sees a "
    "record or a sum without noise."
)
LOW_PASS = (
    "`privacy.low_pass = {share:g}`: each record's gradient keeps that share of its frequencies *before* it is "
    "clipped. Which ones does not depend on data, so the sensitivity is the clip norm still; afterwards the noise on "
    "all other frequencies is dropped, which costs nothing."
)

ACCOUNTANTS = {"pld": "PLDAccountant", "rdp": "RdpAccountant"}

SNIPPET = """\
In the folder of `record.json`, with `pip install dp-accounting` and nothing of fedlora; the two agree to about 0.1 %.

```python
import json, dp_accounting as dp, dp_accounting.{module} as accounting
for site in json.load(open("record.json", encoding="utf-8"))["clients"]:
    ran = [(p["sampling_probability"], p["effective_noise_multiplier"], p["num_steps"]) for p in site.get("phases", ())]
    steps = [dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(s)), n) for q, s, n in ran if n]
    print(site["client"], accounting.{name}().compose(dp.ComposedDpEvent(steps)).get_epsilon(site["delta"]))
```"""

SEEDED_SNIPPET = "It prints the ε that the same run would have had with secret noise. This one has none."

NO_SNIPPET = "There is nothing to derive: no finite ε holds."

NOT_COVERED = """\
- **Choices made outside the run.** Hyper-parameters chosen by looking at private data cost what no run can see.
- **The number of a site's records**, where it is public: it is then among the facts above. Where the site's policy
  keeps it, q and σ follow from the size that the policy declares.
- **Several records of one person.** k of them have about k times this ε.
- **The same record at another site.** Each site's ε is its own.
- **Other runs on the same data**, unless the site's ledger is shared by all of them. It then adds them up.
- **Time.** How long a round takes depends a little on the batch that was drawn. The server has a clock of its own;
  `rounds.jsonl` and `record.json` hold durations. That a site fails in a round can depend on its data, too.
- **Rounding within the model.** Records are computed side by side, in shapes that no other record decides. There a
  record's gradient was found to be the same to the last bit whatever its company; no library promises that.
- **Names and paths** in `config.toml` and `record.json` stand there as they were given; look before you publish."""

DIGESTS = """\
Made by fedlora {version} from `record.json` alone. Two runs with equal digests did the same thing to data they may not
share; the weights' digest is what a site's policy lists under `[models]`."""
