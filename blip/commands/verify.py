"""Run the cases whose results are published, on the pretrained weights or on other checkpoints. Needs the network.

The weights are fetched first if they are missing (BLIP_CACHE, BLIP_MIRROR, HF_ENDPOINT). Expected and actual results
are printed together; the exit status is 1 when they differ.
"""

import argparse
import asyncio
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import requests

from blip.config import Settings
from blip.errors import UserError
from blip.service import Request, start

MERLION = "https://raw.githubusercontent.com/salesforce/LAVIS/main/docs/_static/merlion.png"
DEMO = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/demo.jpg"
TOLERANCE = 0.01  # of the scores, which were published for another program on the same checkpoint


@dataclass(frozen=True)
class Case:
    """One published result; `image` is a URL."""

    image: str
    task: str
    expected: str
    question: str | None = None
    caption: str | None = None


def match(probability: str, similarity: str) -> str:
    """The output string of a match."""
    return (
        f"The image and text are matched with a probability of {probability}%.\n"
        f"The image feature and text feature has a cosine similarity of {similarity}."
    )


#: Of the pretrained weights: LAVIS's own tests (tests/models/test_blip.py), and SaladCloud's guide for the match.
CASES = (
    Case(MERLION, "image_captioning", "Caption: a large fountain spewing water into the air"),
    Case(
        MERLION,
        "visual_question_answering",
        "Answer: singapore",
        question="Which city is this photo taken?",
    ),
    Case(
        DEMO,
        "image_text_matching",
        match("99.7700", "0.5178"),
        caption="a dog and a women are sitting at the beach",
    ),
)


@dataclass(frozen=True)
class Checkpoint:
    """Another checkpoint, and what is published of it.

    Attributes:
        task: of a bundle.
        source: as `bundle make` takes it.
        cases: its results.
        settings: what `bundle set` is to change for them.
    """

    task: str
    source: str
    cases: tuple[Case, ...]
    settings: tuple[str, ...] = ()


#: LAVIS's from its tests/models/test_blip.py and examples/blip_image_text_matching.ipynb. Hugging Face's from
#: transformers' tests/models/blip/test_modeling_blip.py.
CHECKPOINTS = {
    "large_coco": Checkpoint(
        "caption",
        "large_coco",
        (
            Case(
                MERLION,
                "image_captioning",
                "Caption: a large statue of a person spraying water from a fountain",
            ),
        ),
    ),
    "large": Checkpoint(
        "match",
        "large",
        (Case(MERLION, "image_text_matching", match("99.4660", "0.4474"), caption="merlion in Singapore"),),
    ),
    "blip-image-captioning-base": Checkpoint(
        "caption",
        "Salesforce/blip-image-captioning-base",
        (Case(DEMO, "image_captioning", "Caption: a woman sitting on the beach with her dog"),),
    ),
    "blip-image-captioning-base-prompt": Checkpoint(
        "caption",
        "Salesforce/blip-image-captioning-base",
        (Case(DEMO, "image_captioning", "Caption: a woman and her dog on the beach"),),
        ("caption.prompt=a picture of",),
    ),
    "blip-vqa-base": Checkpoint(
        "answer",
        "Salesforce/blip-vqa-base",
        (Case(DEMO, "visual_question_answering", "Answer: 1", question="how many dogs are in the picture?"),),
    ),
    "blip-itm-base-coco": Checkpoint(
        "match",
        "Salesforce/blip-itm-base-coco",
        (
            Case(
                DEMO,
                "image_text_matching",
                match("99.7100", "0.5162"),
                caption="A woman and her dog sitting in a beach",
            ),
        ),
    ),
}


def main(given: Sequence[str]) -> int:
    """Run the published cases."""
    parser = argparse.ArgumentParser(
        "verify_pretrained", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="NAME",
        help=f"another checkpoint in place of the pretrained weights: all, or of {', '.join(CHECKPOINTS)}",
    )
    names = parser.parse_args(given).checkpoints
    if names == ["all"]:
        names = list(CHECKPOINTS)
    unknown = [name for name in names if name not in CHECKPOINTS]
    if unknown:
        print(f"verify_pretrained: {unknown[0]} is not known; choose of {', '.join(CHECKPOINTS)}.", file=sys.stderr)
        return 1
    if not names:
        return verify(CASES, os.environ)
    return max([verify(CHECKPOINTS[name].cases, os.environ, CHECKPOINTS[name]) for name in names])


def verify(cases: Sequence[Case], environment: Mapping[str, str], checkpoint: Checkpoint | None = None) -> int:
    """Run the cases on a checkpoint, or the pretrained weights, and print the results.

    Returns 1 if they differ, or cannot be run (one sentence says why).
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            images = {url: fetch_image(url, Path(folder)) for url in dict.fromkeys(case.image for case in cases)}
            weights = made(checkpoint, environment) if checkpoint else "pretrained"
            service = start(Settings.from_environment({**environment, "BLIP_WEIGHTS": weights}))
        except requests.RequestException as error:
            url = error.request.url if error.request else "an image"
            problem = f"{url} cannot be fetched ({type(error).__name__}); check the network."
            print(f"verify_pretrained: {problem}", file=sys.stderr)
            return 1
        except UserError as error:
            print(f"verify_pretrained: {error}", file=sys.stderr)
            return 1
        wrong = 0
        for case in cases:
            request = Request(images[case.image], case.task, case.question, case.caption)
            got = str(asyncio.run(service.run(request)).value)
            same = agree(case.expected, got)
            wrong += not same
            print(f"{'ok' if same else 'DIFFERENT'}: {case.task}, {Path(case.image).name}")
            for name, output in (("expected", case.expected), ("got", got)):
                print(f"    {name:<9} {output.replace(chr(10), ' ')}")
        service.close()
    return 1 if wrong else 0


def made(checkpoint: Checkpoint, environment: Mapping[str, str]) -> str:
    """The bundle of a checkpoint, in the cache; made where it is not there yet.

    Raises:
        UserError: it cannot be made.
    """
    from blip.weights.make import change, make
    from blip.weights.sources import find

    def report(line: str) -> None:
        print(line, flush=True)

    cache = Settings.from_environment({**environment, "BLIP_WEIGHTS": "pretrained"}).cache
    path = cache / "verify" / "-".join((checkpoint.source.replace("/", "--"), *checkpoint.settings)).replace(" ", "_")
    make(path, {checkpoint.task: find(checkpoint.task, checkpoint.source)}, "float32", report)
    if checkpoint.settings:
        change(path, checkpoint.settings, report)
    return str(path)


def fetch_image(url: str, folder: Path) -> Path:
    """Download one image."""
    response = requests.get(url, timeout=30)
    response.raise_for_status()
    path = folder / Path(url).name
    path.write_bytes(response.content)
    return path


def agree(expected: str, got: str) -> bool:
    """Whether the texts are the same and their numbers (percentages as fractions) within the tolerance."""
    number = r"(\d+\.\d+)(%?)"
    if re.sub(number, "", expected) != re.sub(number, "", got):
        return False
    pairs = zip(re.findall(number, expected), re.findall(number, got), strict=True)
    return all(
        abs(float(one) - float(other)) / (100 if percent else 1) <= TOLERANCE for (one, percent), (other, _) in pairs
    )
