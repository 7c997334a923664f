"""What can be said about a scene: captions, questions with answers, true and false statements.

Everything is computed from the `Scene` itself, so it is right by construction.
"""

import random
from dataclasses import dataclass, replace

from demo.scenes import COLOURS, SHAPES, SIZES, Object, Scene, Tone

TONES: tuple[Tone, ...] = ("light", "dark")
# Things no scene shows, so that statements about anything else are learnt to be false.
ABSENT = (
    "dog cat horse bird fish cow man woman boy girl child person people car bus train bicycle boat "
    "plane house tree flower street table chair bed kitchen beach mountain river city food pizza "
    "cake apple book phone computer clock ball hat window door sign heart hexagon arrow moon sun"
).split()
COUNT_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}

OPPOSITE = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}


def relation(first: Object, second: Object) -> str:
    """Where `first` is, seen from `second`, along the axis on which they are further apart."""
    dx = first.centre[0] - second.centre[0]
    dy = first.centre[1] - second.centre[1]
    if abs(dx) > abs(dy):
        return "to the left of" if dx < 0 else "to the right of"
    return "above" if dy < 0 else "below"


@dataclass(frozen=True)
class Phrase:
    """A noun phrase such as "large red circle"; parts left None are not said."""

    shape: str | None
    colour: str | None = None
    size: str | None = None
    noun: str = "object"

    def matches(self, item: Object) -> bool:
        """Whether every part that is said is true of the object."""
        pairs = ((self.shape, item.shape), (self.colour, item.colour), (self.size, item.size))
        return all(said in (None, real) for said, real in pairs)

    def text(self, plural: bool = False) -> str:
        """The phrase as words, without an article."""
        words = [w for w in (self.size, self.colour, self.shape or self.noun) if w]
        return " ".join(words) + ("s" if plural else "")

    def with_article(self) -> str:
        """The phrase after "a" or "an"."""
        text = self.text()
        return ("an " if text[0] in "aeiou" else "a ") + text


@dataclass(frozen=True)
class Statement:
    """A sentence with a truth value: objects, how many, how they lie, on which background."""

    subject: Phrase
    count: int | None = None
    link: str | None = None  # a relation, or "and"
    other: Phrase | None = None
    tone: Tone | None = None

    def holds(self, scene: Scene) -> bool:
        """Whether the sentence is true of the scene."""
        if self.tone not in (None, scene.background.tone):
            return False
        found = [item for item in scene.objects if self.subject.matches(item)]
        if self.count is not None:
            return len(found) == self.count
        if self.other is None:
            return bool(found)
        return any(
            first is not second and self.other.matches(second) and self.link in ("and", relation(first, second))
            for first in found
            for second in scene.objects
        )

    def text(self, digits: bool = False) -> str:
        """The sentence as words, "three" or, with `digits`, "3"."""
        if self.count is None:
            text = self.subject.with_article()
        else:
            number = str(self.count) if digits else COUNT_WORDS[self.count]
            text = f"{number} {self.subject.text(plural=self.count > 1)}"
        if self.link is not None and self.other is not None:
            text += f" {self.link} {self.other.with_article()}"
        return text + (f" on a {self.tone} background" if self.tone else "")

    def one_word_wrong(self, scene: Scene) -> list["Statement"]:
        """Every false statement that differs in one word (articles and plurals follow it)."""
        changed = [replace(self, subject=phrase) for phrase in _one_word_changes(self.subject)]
        if self.other is not None:
            changed += [replace(self, other=phrase) for phrase in _one_word_changes(self.other)]
        if self.count is not None:
            changed += [replace(self, count=n) for n in COUNT_WORDS if n != self.count]
        if self.link in OPPOSITE:
            # As often as colours and shapes, which have several wrong words each.
            changed += [replace(self, link=OPPOSITE[self.link])] * 4
        if self.tone is not None:
            changed += [replace(self, tone=tone) for tone in TONES if tone != self.tone]
        return [statement for statement in changed if not statement.holds(scene)]


def _one_word_changes(phrase: Phrase) -> list[Phrase]:
    changed = []
    if phrase.shape is not None:
        changed += [replace(phrase, shape=shape) for shape in SHAPES if shape != phrase.shape]
    if phrase.colour is not None:
        changed += [replace(phrase, colour=c) for c in COLOURS if c != phrase.colour]
    if phrase.size is not None:
        changed += [replace(phrase, size=size) for size in SIZES if size != phrase.size] * 2
    return changed


def _full(item: Object) -> Phrase:
    return Phrase(item.shape, item.colour, item.size)


def _is_pair(scene: Scene) -> bool:
    return len({(item.shape, item.colour) for item in scene.objects}) == 2


def _canonical(scene: Scene) -> Statement:
    first = scene.objects[0]
    if not _is_pair(scene):
        count = len(scene.objects)
        return Statement(_full(first), count if count > 1 else None, tone=scene.background.tone)
    second = scene.objects[1]
    if relation(first, second) in ("to the right of", "below"):
        first, second = second, first
    return Statement(_full(first), None, relation(first, second), _full(second))


def caption(scene: Scene) -> str:
    """The one caption of a scene; in a pair the left or the upper object comes first."""
    return _canonical(scene).text()


def _thin(phrase: Phrase, rng: random.Random) -> Phrase:
    """The phrase with the size, the colour, both or neither left out."""
    keep_colour, keep_size = rng.choice(((True, False), (True, True), (True, False), (False, True)))
    return replace(
        phrase,
        colour=phrase.colour if keep_colour else None,
        size=phrase.size if keep_size else None,
    )


def _true_statement(scene: Scene, rng: random.Random) -> Statement:
    """A random true statement, shorter or the other way round than the caption."""
    if not _is_pair(scene):
        phrase = _thin(_full(scene.objects[0]), rng)
        count = len(scene.objects)
        tone = scene.background.tone if rng.random() < 0.2 else None
        return Statement(phrase, None if count == 1 and rng.random() < 0.7 else count, tone=tone)
    first, second = rng.sample(scene.objects, 2)
    subject, other = _thin(_full(first), rng), _thin(_full(second), rng)
    form = rng.choices(("relation", "and", "alone"), (5, 2, 2))[0]
    if form == "alone" or subject == other:
        return Statement(subject)
    return Statement(subject, None, "and" if form == "and" else relation(first, second), other)


def match_texts(scene: Scene, rng: random.Random) -> list[tuple[str, bool, str]]:
    """Two true statements (the caption first), each followed by a hard negative.

    Returns (text, whether it is true, "caption" or "short") four times.
    """
    texts = []
    for form in ("caption", "short"):
        statement = _canonical(scene) if form == "caption" else _true_statement(scene, rng)
        wrong = rng.choice(statement.one_word_wrong(scene))
        if form == "short" and rng.random() < 0.1:
            wrong = replace(statement, subject=replace(statement.subject, shape=rng.choice(ABSENT)))
        digits = form == "short" and rng.random() < 0.15
        opening = ""
        if form == "short" and rng.random() < 0.35:
            plural = statement.count is not None and statement.count > 1
            opening = rng.choice(("there are ",) if plural else ("there is ", "a picture of ", "an image of "))
        for sentence, truth in ((statement, True), (wrong, False)):
            start = opening
            if opening.startswith("there"):
                start = "there are " if (sentence.count or 1) > 1 else "there is "
            texts.append((start + sentence.text(digits), truth, form))
    return texts


Question = tuple[str, str, str]


def _reference(scene: Scene, item: Object, hidden: str, rng: random.Random) -> str | None:
    """A description of `item`, like "the large circle", without `hidden`, that fits nothing unlike it."""
    options = []
    for shape in (item.shape, None):
        for colour in (item.colour, None):
            for size in (item.size, None):
                phrase = Phrase(shape, colour, size, rng.choice(("object", "shape")))
                if hidden and getattr(phrase, hidden) is not None:
                    continue
                if all(
                    phrase.matches(other) == (other.colour == item.colour and other.shape == item.shape)
                    for other in scene.objects
                ):
                    options.append(phrase)
    if not options:
        return None
    return "the " + rng.choice(options).text(plural=len(scene.objects) > 1 and not _is_pair(scene))


def _property_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Colour, shape and size of one object or group, each where a description leaves it open."""
    item = rng.choice(scene.objects)
    verb = "are" if len(scene.objects) > 1 and not _is_pair(scene) else "is"
    found: list[Question] = []
    forms: tuple[str, ...]
    word = rng.choice(("color", "colour"))
    if name := _reference(scene, item, "colour", rng):
        forms = (f"what {word} {verb} {name}?", f"what is the {word} of {name}?")
        found.append((rng.choice(forms), item.colour, "colour"))
    if name := _reference(scene, item, "shape", rng):
        forms = (f"what shape {verb} {name}?", f"what is the shape of {name}?")
        if all(other is item or other.colour != item.colour for other in scene.objects):
            forms += (f"what shape is {item.colour}?", f"which shape is {item.colour}?")
        found.append((rng.choice(forms), item.shape, "shape"))
    if name := _reference(scene, item, "size", rng):
        order = rng.choice(("large or small", "small or large"))
        found.append((f"{verb} {name} {order}?", item.size, "size"))
    return found


def _count_question(scene: Scene, rng: random.Random) -> Question:
    noun = rng.choice(("object", "shape"))
    phrase = Phrase(None, noun=noun)
    if rng.random() < 0.6:
        phrase = rng.choice((_thin(_full(rng.choice(scene.objects)), rng), phrase))
        if phrase.shape is not None and rng.random() < 0.15:
            phrase = rng.choice(_one_word_changes(phrase))
    elif rng.random() < 0.5:
        phrase = Phrase(rng.choice(scene.objects).shape)
    place = rng.choice(("are there", "are there", "are in the picture", "are in the image"))
    answer = sum(phrase.matches(item) for item in scene.objects)
    return f"how many {phrase.text(plural=True)} {place}?", str(answer), "count"


def _relation_question(scene: Scene, rng: random.Random) -> Question | None:
    """Where something is; None where the scene has no clear answer."""
    if not _is_pair(scene):
        x, y = (c / side - 0.5 for c, side in zip(scene.objects[0].centre, scene.canvas, strict=True))
        name = _reference(scene, scene.objects[0], "", rng)
        if len(scene.objects) > 1 or name is None or max(abs(x), abs(y)) < 0.12:
            return None
        if abs(x) > 2 * abs(y):
            return f"where is {name}?", "left" if x < 0 else "right", "relation"
        if abs(y) > 2 * abs(x):
            return f"where is {name}?", "top" if y < 0 else "bottom", "relation"
        return None
    first, second = rng.sample(scene.objects, 2)
    subject = _reference(scene, first, "", rng)
    other = _reference(scene, second, "", rng)
    place = relation(first, second)
    form = rng.randrange(4)
    if form == 0:
        sides = ("above", "below") if place in ("above", "below") else ("left", "right")
        one, two = rng.sample(sides, 2)
        if sides[0] == "left":
            text = f"is {subject} to the {one} or to the {two} of {other}?"
        else:
            text = f"is {subject} {one} or {two} {other}?"
        return text, next(side for side in sides if side in place), "relation"
    if form == 1:
        noun = rng.choice(("object", "shape"))
        word = rng.choice(("color", "colour"))
        return f"what {word} is the {noun} {place} {other}?", first.colour, "relation"
    return f"what is {place} {other}?", f"{first.colour} {first.shape}", "relation"


def _yes_no_question(scene: Scene, rng: random.Random) -> Question:
    """A balanced yes/no question; the wrong ones are wrong in one word."""
    truth = rng.random() < 0.5
    answer = "yes" if truth else "no"
    item = rng.choice(scene.objects)
    group = len(scene.objects) > 1 and not _is_pair(scene)
    if rng.random() < 0.35:
        hidden, right, choices = rng.choice(
            (
                ("colour", item.colour, tuple(COLOURS)),
                ("size", item.size, SIZES),
                ("shape", item.shape, SHAPES),
            )
        )
        name = _reference(scene, item, hidden, rng)
        if name is not None:
            said = right if truth else rng.choice([c for c in choices if c != right])
            verb = "are" if group else "is"
            if hidden == "shape":
                said = f"{said}s" if group else f"a {said}"
            return f"{verb} {name} {said}?", answer, "yes-no"
    if rng.random() < 0.08:
        tone = scene.background.tone
        said = tone if truth else next(t for t in TONES if t != tone)
        return f"is the background {said}?", answer, "yes-no"
    statement = _true_statement(scene, rng)
    if not truth:
        statement = rng.choice(statement.one_word_wrong(scene))
    if statement.link in OPPOSITE and rng.random() < 0.7 and statement.other is not None:
        # "the" needs both descriptions to fit one object each; a wrong colour fits none.
        pair = (statement.subject, statement.other)
        if all(sum(p.matches(o) for o in scene.objects) == 1 for p in pair):
            text = f"is the {pair[0].text()} {statement.link} the {pair[1].text()}?"
            return text, answer, "yes-no"
    verb = "are" if (statement.count or 1) > 1 else "is"
    return f"{verb} there {statement.text(rng.random() < 0.15)}?", answer, "yes-no"


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """One (question, answer, kind) of each kind that has a unique answer in this scene.

    Kinds: colour, shape, size, count, relation, yes-no.
    """
    found = _property_questions(scene, rng)
    found.append(_count_question(scene, rng))
    where = _relation_question(scene, rng)
    if where is not None:
        found.append(where)
    found.append(_yes_no_question(scene, rng))
    return found


def words() -> list[str]:
    """Every word the grammar can produce, in a fixed order."""
    said = (
        "a an the one two three four five 0 1 2 3 4 5 of on to and or in left right above below "
        "top bottom light dark background object objects shape shapes picture image there is are "
        "what which how many where color colour yes no"
    ).split()
    return [*said, *SHAPES, *(f"{shape}s" for shape in SHAPES), *COLOURS, *SIZES]
