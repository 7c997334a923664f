"""What is said about scenes, read here independently of how it was made."""

import random
import re

from demo.scenes import COLOURS, SHAPES, SIZES, Object, Scene, random_scene
from demo.sentences import COUNT_WORDS, caption, match_texts, questions, words

SEEDS = range(200)
NUMBERS = {name: count for count, word in COUNT_WORDS.items() for name in (word, str(count))}
LINKS = ("to the left of", "to the right of", "above", "below", "and")


def described(phrase: list[str], scene: Scene) -> list[Object]:
    """The objects that have everything the words say."""
    return [item for item in scene.objects if set(phrase) <= {item.shape, item.colour, item.size}]


def lies(first: Object, link: str, second: Object) -> bool:
    """Whether the first object is on that side of the second, along the axis on which they are further apart."""
    right, down = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    if abs(right) > abs(down):
        return link == ("to the right of" if right > 0 else "to the left of")
    return link == ("below" if down > 0 else "above")


def is_true(text: str, scene: Scene) -> bool:
    """Read a statement and look whether the scene is so."""
    text = re.sub("^(there is|there are|a picture of|an image of) ", "", text)
    text, _, background = text.partition(" on a ")
    if background and background != f"{scene.background.tone} background":
        return False
    subject, link, other = [*re.split(f" ({'|'.join(LINKS)}) ", text), "", ""][:3]
    number, *phrase = subject.split()
    if number in NUMBERS:
        if NUMBERS[number] > 1:
            phrase[-1] = phrase[-1].removesuffix("s")
        return len(described(phrase, scene)) == NUMBERS[number]
    pairs = [(one, two) for one in described(phrase, scene) for two in described(other.split()[1:], scene)]
    if link:
        return any(one is not two and (link == "and" or lies(one, link, two)) for one, two in pairs)
    return bool(described(phrase, scene))


def test_true_statements_are_true_and_false_ones_are_not() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        scene = random_scene(rng)
        texts = match_texts(scene, rng)
        assert texts[0] == (caption(scene), True, "caption")
        for text, truth, _ in texts:
            assert is_true(text, scene) == truth, (text, scene)


def test_answers_are_what_the_scene_shows() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        scene = random_scene(rng)
        asked = questions(scene, rng)
        assert len({kind for _, _, kind in asked}) == len(asked)
        for question, answer, kind in asked:
            said = question.removesuffix("?").split()
            if kind in ("colour", "shape", "size"):
                named = {word.removesuffix("s") for word in said} & {*SHAPES, *COLOURS, *SIZES}
                named -= set(SIZES) if kind == "size" else set()  # "large or small?"
                found = described([*named], scene)
                assert found and all(answer in (item.shape, item.colour, item.size) for item in found), question
            if kind == "count":  # "how many small red circles are there?"
                phrase = [word.removesuffix("s") for word in said[2 : said.index("are")]]
                if phrase[-1] in ("object", "shape"):
                    phrase.pop()
                assert len(described(phrase, scene)) == int(answer), question


def test_every_word_that_is_true_is_in_the_vocabulary() -> None:
    said: set[str] = set()
    for seed in SEEDS:
        rng = random.Random(seed)
        scene = random_scene(rng)
        texts = [text for text, truth, _ in match_texts(scene, rng) if truth]
        texts += [text for question, answer, _ in questions(scene, rng) for text in (question, answer)]
        said |= {word for text in texts for word in re.findall(r"[\w-]+", text)}
    assert said - set(words()) == set()
