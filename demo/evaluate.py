"""How much of drawn scenes the models get right, through LAVIS's own functions."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip.engine.model import Model
from blip.lavis import import_lavis
from demo import sentences
from demo.bundle import IMAGE_SIZE
from demo.scenes import Scene, draw, random_scene

Score = dict[str, list[bool]]
SCENES_AT_ONCE, QUESTIONS_AT_ONCE = 50, 200


@dataclass(frozen=True)
class Asked:
    """A question about a picture, with its answer and what kind of question it is."""

    image: Tensor
    question: str
    answer: str
    kind: str


@torch.inference_mode()
def evaluate(models: dict[str, Model], seeds: Sequence[str]) -> Score:
    """Right or wrong for every caption, answer and decision on the scenes of `seeds`."""
    processors = import_lavis().blip_processors
    see = processors.BlipImageEvalProcessor(IMAGE_SIZE)
    ask, say = processors.BlipQuestionProcessor(), processors.BlipCaptionProcessor()
    score: Score = defaultdict(list)
    by_length: dict[int, list[Asked]] = defaultdict(list)
    for start in range(0, len(seeds), SCENES_AT_ONCE):
        rngs = [random.Random(seed) for seed in seeds[start : start + SCENES_AT_ONCE]]
        scenes = [random_scene(rng) for rng in rngs]
        images = torch.stack([see(draw(scene)) for scene in scenes])
        _score_captions(models["caption"], scenes, images, score)
        for scene, rng, image in zip(scenes, rngs, images, strict=True):
            for text, answer, kind in sentences.questions(scene, rng):
                question = ask(text)
                length = len(models["answer"].net.tokenizer(question).input_ids)
                by_length[length].append(Asked(image, question, answer, kind))
            texts = [(say(text), truth, form) for text, truth, form in sentences.match_texts(scene, rng)]
            _score_matches(models["match"], image, texts, score)
    # LAVIS's answer decoder attends to padding, so only questions of one length go together.
    for asked in by_length.values():
        for start in range(0, len(asked), QUESTIONS_AT_ONCE):
            _score_answers(models["answer"], asked[start : start + QUESTIONS_AT_ONCE], score)
    return score


def _score_captions(model: Model, scenes: Sequence[Scene], images: Tensor, score: Score) -> None:
    search = model.search
    assert search is not None
    spoken = model.net.generate(
        {"image": images},
        num_beams=search.num_beams,
        max_length=search.max_length,
        min_length=search.min_length,
    )
    score["captions"] += [text == sentences.caption(scene) for text, scene in zip(spoken, scenes, strict=True)]


def _score_matches(model: Model, image: Tensor, texts: Sequence[tuple[str, bool, str]], score: Score) -> None:
    batch = {"image": image.expand(len(texts), -1, -1, -1), "text_input": [text for text, _, _ in texts]}
    decided = model.net(batch, match_head="itm").softmax(1)[:, 1] > 0.5
    for (_, truth, form), decision in zip(texts, decided.tolist(), strict=True):
        score[f"match, {form} {'true' if truth else 'one word wrong'}"].append(decision == truth)
    cosines = model.net(batch, match_head="itc")[0]
    score["cosine, true above false caption"].append(bool(cosines[0] > cosines[1]))


def _score_answers(model: Model, asked: Sequence[Asked], score: Score) -> None:
    search = model.search
    assert search is not None
    replies = model.net.predict_answers(
        {"image": torch.stack([one.image for one in asked]), "text_input": [one.question for one in asked]},
        inference_method="generate",
        num_beams=search.num_beams,
        max_len=search.max_length,
        min_len=search.min_length,
    )
    for one, reply in zip(asked, replies, strict=True):
        score[f"answers, {one.kind}"].append(reply == one.answer)


def report(score: Score) -> None:
    """Print the accuracies as a table in Markdown."""
    for whole in ("answers", "match"):
        score[f"{whole}, all"] = [r for name, rs in score.items() if name.startswith(whole) for r in rs]
    print("| task | right | of | accuracy |\n|---|---:|---:|---:|")
    for name, results in sorted(score.items()):
        share = 100 * sum(results) / len(results)
        print(f"| {name} | {sum(results)} | {len(results)} | {share:.1f} % |", flush=True)
