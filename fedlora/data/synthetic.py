"""A corpus that needs no download: templates and word lists for all nine tasks, written for this project.

It exists so that the quickstart, the tests and a machine without a network run the real path. It is not a benchmark:
its numbers say that training works, not how good a model is. A fifth of the SST-2-like reviews are hard (negation,
clauses that disagree), so that a sentence embedding alone is not enough; 3 % of the train labels are wrong,
validation labels are right.

Which split a row belongs to is decided by a hash of its first text: no first text occurs in two splits.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from fedlora.errors import DataError
from fedlora.randomness import PublicSeed

T = TypeVar("T")
Row = tuple[tuple[str, ...], float]

LABEL_NOISE = 0.03
_BINS = 8  # of the hash over first texts: one for each validation split, the rest is train
_VALIDATION_BINS = {"validation": 0, "validation_matched": 0, "validation_mismatched": 1}
_ATTEMPTS_PER_RECORD = 200


class _Dice(random.Random):
    """Choices built on `random()` alone, the one method whose sequence Python promises to keep."""

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def two(self, options: Sequence[T]) -> tuple[T, T]:
        """Two different options."""
        first = int(self.random() * len(options))
        step = 1 + int(self.random() * (len(options) - 1))
        return options[first], options[(first + step) % len(options)]

    def chance(self, probability: float) -> bool:
        return self.random() < probability


def generate(task: str, split: str, train_size: int, seed: PublicSeed) -> tuple[tuple[list[str], ...], list[float]]:
    """Rows of one split, without repetition.

    Args:
        task: a GLUE task.
        split: "train", "validation", "validation_matched" or "validation_mismatched".
        train_size: records of the train split; a validation split has a sixth of that, between 64 and 1000.
        seed: decides everything.

    Returns:
        One list of texts per text column, and the labels: class ids, or scores from 0 to 5 for stsb.

    Raises:
        DataError: the templates do not hold that many different rows.
    """
    count = train_size if split == "train" else min(1000, max(64, train_size // 6))
    dice = _Dice(int(seed.numpy("generated", task, split).integers(2**63)))
    make, num_classes = _MAKERS[task]
    rows: dict[tuple[str, ...], float] = {}
    for _ in range(_ATTEMPTS_PER_RECORD * count):
        texts, label = make(dice)
        if _belongs(texts[0], split) and texts not in rows:
            wrong = split == "train" and num_classes > 1 and dice.chance(LABEL_NOISE)
            rows[texts] = (label + 1) % num_classes if wrong else label
            if len(rows) == count:
                columns = tuple(list(column) for column in zip(*rows, strict=True))
                return columns, list(rows.values())
    raise DataError(
        f"the generated {task} corpus has about {len(rows)} different {split} rows, wanted {count}; "
        "lower data.generated_records"
    )


def _belongs(text: str, split: str) -> bool:
    place = zlib.crc32(text.encode()) % _BINS
    return place == _VALIDATION_BINS[split] if split in _VALIDATION_BINS else place > 1


def _words(text: str, between: str | None = None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(between))


def _a(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


# --- reviews: sst2 ---------------------------------------------------------------------------------------------------

_PRAISE = _words(
    """delightful moving funny clever gripping charming brilliant tender inventive graceful warm thrilling
    heartfelt witty dazzling wise honest lively elegant superb engaging fresh touching exciting memorable rich
    sharp splendid rewarding vivid absorbing humane captivating wonderful beautiful stirring radiant"""
)
_BLAME = _words(
    """dull tedious clumsy lifeless bland predictable boring shallow sloppy awful tiresome stale muddled
    ugly pointless dreary witless cheap grating hollow contrived flat annoying lazy painful forgettable
    pretentious leaden ridiculous incoherent dismal stupid soulless irritating mediocre dreadful laughable"""
)
_ASPECTS = _words(
    """plot cast script dialogue ending score direction story acting photography editing premise pacing
    opening soundtrack setting humor romance action finale production design structure narration villain hero"""
)
_WORKS = _words("film movie comedy drama thriller picture documentary romance sequel debut adventure western")
_HOW = _words("very truly often quite consistently surprisingly deeply utterly mostly simply remarkably really")
_OPENINGS = (
    "from the first scene on",
    "whatever you have heard",
    "for two long hours",
    "as a story about family",
    "seen on a large screen",
    "with friends or alone",
    "in the end",
    "by any measure",
    "after ten minutes",
    "as far as summer releases go",
)
_PLAIN_REVIEWS = (
    "{a_good} {work}",
    "{good} and {also}",
    "the {aspect} is {good}",
    "{how} {good} , {how2} {also}",
    "{a_good} and {also} {work}",
    "a {work} with {a_good} {aspect}",
    "the {aspect} is {how} {good} and the {aspect2} is {also}",
    "{opening} , this is {a_good} {work}",
    "{opening} , the {aspect} is {how} {good} and the {aspect2} is {how2} {also}",
    "one of the more {good} {work}s of the year , with {a_also} {aspect} and a {how} {good} {aspect2}",
    "{opening} , it is {a_good} {work} about people you think you know , and the {aspect} is {how} {also}",
)
_HARD_SHARE = 0.2
_HARD_REVIEWS = (
    "the {aspect} is not {bad} at all",
    "not {a_bad} {work}",
    "there is nothing {bad} about the {aspect}",
    "never {bad} , the {work} avoids every {worse} cliche",
    "anything but {bad}",
    "the {aspect} is {bad} , but the {work} as a whole is {good}",
    "despite {a_bad} {aspect} , this is {a_good} {work}",
    "what could have been {a_bad} , {worse} {work} turns out to be {good}",
    "{opening} , i expected something {bad} and {worse} and got {a_good} {work}",
    "the {aspect} is {how} {bad} and the {aspect2} is {worse} , yet none of it matters : the {work} is {good}",
    "people called the {aspect} {bad} and the {aspect2} {worse} , and they are wrong",
)


def _review(dice: _Dice) -> Row:
    positive = dice.chance(0.55)
    liked, disliked = (_PRAISE, _BLAME) if positive else (_BLAME, _PRAISE)
    good, also = dice.two(liked)
    bad, worse = dice.two(disliked)
    aspect, aspect2 = dice.two(_ASPECTS)
    how, how2 = dice.two(_HOW)
    template = dice.pick(_HARD_REVIEWS if dice.chance(_HARD_SHARE) else _PLAIN_REVIEWS)
    text = template.format(
        good=good, also=also, bad=bad, worse=worse, aspect=aspect, aspect2=aspect2, how=how, how2=how2,
        a_good=_a(good), a_also=_a(also), a_bad=_a(bad), work=dice.pick(_WORKS), opening=dice.pick(_OPENINGS),
    )  # fmt: skip
    return (text + dice.pick((" .", "", " !", " ")),), float(positive)


# --- scenes: who did what to which thing, where and when -------------------------------------------------------------

_WHO = _words(
    """teacher nurse farmer pilot lawyer student painter baker engineer driver singer doctor carpenter gardener
    librarian tailor sailor reporter plumber dancer"""
)
_ADJECTIVES = _words("young tall retired friendly tired famous quiet new")
_KINDS = {  # a thing -> what it is
    "violin": "instrument", "piano": "instrument", "guitar": "instrument", "bicycle": "vehicle", "truck": "vehicle",
    "motorcycle": "vehicle", "sofa": "piece of furniture", "wardrobe": "piece of furniture", "hammer": "tool",
    "saw": "tool", "drill": "tool", "novel": "book", "dictionary": "book", "necklace": "piece of jewellery",
    "bracelet": "piece of jewellery", "kettle": "kitchen appliance", "toaster": "kitchen appliance",
}  # fmt: skip
_THINGS = tuple(_KINDS)
_WHERE = _words(
    """in the village, at the market, near the station, in the old harbour, behind the school, in a small shop,
    at the airport, beside the river, in the city hall, on the island""",
    between=",",
)
_WHEN = _words(
    """on Monday, last winter, in the morning, after the storm, during the holidays, before sunrise, two years ago,
    on a rainy day, in April, yesterday""",
    between=",",
)


@dataclass(frozen=True)
class _Deed:
    """A verb: base form, past, a synonym of each, and the past of what rules it out."""

    base: str
    past: str
    base_synonym: str
    past_synonym: str
    past_opposite: str


_DEEDS = (
    _Deed("buy", "bought", "purchase", "purchased", "sold"),
    _Deed("repair", "repaired", "fix", "fixed", "broke"),
    _Deed("find", "found", "discover", "discovered", "lost"),
    _Deed("borrow", "borrowed", "get a loan of", "got a loan of", "lent out"),
    _Deed("hide", "hid", "conceal", "concealed", "put on show"),
    _Deed("keep", "kept", "hold on to", "held on to", "threw away"),
    _Deed("choose", "chose", "pick", "picked", "turned down"),
)


@dataclass(frozen=True)
class _Scene:
    who: str
    deed: _Deed
    thing: str
    where: str
    when: str

    def told(self, *, verb: str | None = None, where: bool = True, when: bool = True, time_first: bool = False) -> str:
        core = f"the {self.who} {verb or self.deed.past} {_a(self.thing)}" + (f" {self.where}" if where else "")
        told = f"{self.when} {core}" if when and time_first else f"{core} {self.when}" if when else core
        return f"{told[0].upper()}{told[1:]}."


def _scene(dice: _Dice) -> _Scene:
    who = f"{dice.pick(_ADJECTIVES)} {dice.pick(_WHO)}"
    return _Scene(who, dice.pick(_DEEDS), dice.pick(_THINGS), dice.pick(_WHERE), dice.pick(_WHEN))


def _other(dice: _Dice, options: Sequence[T], than: T) -> T:
    first, second = dice.two(options)
    return second if first == than else first


def _changed(dice: _Dice, scene: _Scene, slots: Sequence[str]) -> _Scene:
    """The scene with other values in `slots`."""
    pools: Mapping[str, Sequence[object]] = {
        "deed": _DEEDS, "thing": _THINGS, "where": _WHERE, "when": _WHEN,
        "who": [f"{adjective} {person}" for adjective in _ADJECTIVES[:2] for person in _WHO],
    }  # fmt: skip
    return replace(scene, **{slot: _other(dice, pools[slot], getattr(scene, slot)) for slot in slots})


# --- the other tasks -------------------------------------------------------------------------------------------------


def _acceptability(dice: _Dice) -> Row:
    words = _scene(dice).told(time_first=dice.chance(0.5))[:-1].split()
    if acceptable := dice.chance(0.65):
        return (" ".join(words) + ".",), float(acceptable)
    place = 1 + int(dice.random() * (len(words) - 3))
    first, second, third = words[place : place + 3]
    words[place : place + 3] = dice.pick(
        ((second, first, third), (third, first, second), (first, first, second, third), (first, "the", second, "a"))
    )
    return (" ".join(words) + ".",), float(acceptable)


def _paraphrase(dice: _Dice) -> Row:
    scene = _scene(dice)
    same = dice.chance(0.6)
    retold = scene if same else _changed(dice, scene, [dice.pick(("who", "deed", "thing"))])
    second = retold.told(verb=retold.deed.past_synonym if dice.chance(0.7) else None, time_first=dice.chance(0.6))
    return (scene.told(), second), float(same)


def _duplicate_question(dice: _Dice) -> Row:
    scene = _scene(dice)
    same = dice.chance(0.4)
    other = scene if same else _changed(dice, scene, [dice.pick(("deed", "thing", "where"))])
    person = f"As a {scene.who}"
    first = f"{person}, how do I {scene.deed.base} {_a(scene.thing)} {scene.where}?"
    ways = ("what is the best way to {} {} {}?", "how can I {} {} {}?", "is there an easy way to {} {} {}?")
    second = dice.pick(ways).format(other.deed.base_synonym, _a(other.thing), other.where)
    return (first, f"{second[0].upper()}{second[1:]}"), float(same)


_SLOTS = ("who", "deed", "thing", "where", "when")


def _similarity(dice: _Dice) -> Row:
    """The score is the number of slots that agree; a synonym agrees."""
    scene = _scene(dice)
    agreeing = int(dice.random() * 6)
    order = sorted(_SLOTS, key=lambda _: dice.random())
    other = _changed(dice, scene, order[agreeing:])
    return (scene.told(), other.told(verb=other.deed.past_synonym if dice.chance(0.5) else None)), float(agreeing)


def _inference(dice: _Dice) -> Row:
    """0: the hypothesis says less; 1: it adds what the premise does not say; 2: it cannot be true as well."""
    scene = _scene(dice)
    general = replace(scene, thing=_KINDS[scene.thing])
    label = int(dice.random() * 3)
    premise, hypothesis = scene.told(when=False), general.told(where=dice.chance(0.5), when=False)
    if label == 1:
        hypothesis = scene.told(where=dice.chance(0.5))
    elif label == 2:
        hypothesis = dice.pick((scene, general)).told(verb=scene.deed.past_opposite, where=dice.chance(0.5), when=False)
    return (f"{dice.pick(_HEARD)} {premise[0].lower()}{premise[1:]}", hypothesis), float(label)


_HEARD = ("It is known that", "The paper wrote that", "Everybody saw that", "As we heard,", "In fact,")


def _entailment(dice: _Dice) -> Row:
    texts, label = _inference(dice)
    while label == 1 and dice.chance(0.5):  # halve the neutral ones, so that both classes are about as large
        texts, label = _inference(dice)
    return texts, float(label > 0)


def _answer(dice: _Dice) -> Row:
    """0: the sentence answers the question; 1: it is about something else, or lacks what was asked for."""
    scene = _scene(dice)
    word, slot = dice.pick((("Where", "where"), ("When", "when")))
    question = f"{word} did the {scene.who} {scene.deed.base} {_a(scene.thing)}?"
    answered = dice.chance(0.5)
    told = scene if answered or dice.chance(0.5) else _changed(dice, scene, ["who", "thing"])
    missing = not answered and told is scene
    sentence = told.told(where=not (missing and slot == "where"), when=not (missing and slot == "when"))
    return (question, sentence), float(not answered)


_CONTAINERS = _words("box suitcase cupboard drawer bag crate trunk closet basket van")


def _pronoun(dice: _Dice) -> Row:
    """Whom "it" means follows from what would keep a thing out of a container."""
    who, thing = f"{dice.pick(_ADJECTIVES)} {dice.pick(_WHO)}", dice.pick(_THINGS)
    container = dice.pick(_CONTAINERS)
    quality, is_thing = dice.pick((("big", True), ("large", True), ("wide", True), ("small", False), ("narrow", False)))
    fact = f"the {thing} did not fit into the {container} because it was too {quality}"
    claimed = dice.chance(0.5)
    meant = thing if claimed == is_thing else container
    first = f"{dice.pick(_WHEN)} the {who} saw that {fact}."
    return (first[0].upper() + first[1:], f"The {meant} was too {quality}."), float(claimed)


# Maker and number of classes (1: a score, which label noise leaves alone).
_MAKERS: Mapping[str, tuple[Callable[[_Dice], Row], int]] = {
    "cola": (_acceptability, 2),
    "sst2": (_review, 2),
    "mrpc": (_paraphrase, 2),
    "stsb": (_similarity, 1),
    "qqp": (_duplicate_question, 2),
    "mnli": (_inference, 3),
    "qnli": (_answer, 2),
    "rte": (_entailment, 2),
    "wnli": (_pronoun, 2),
}
