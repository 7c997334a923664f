"""What soak.py asks: good requests of every kind, what clients get wrong, and how the answers are judged."""

import base64
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Peer
from demo.scenes import draw, random_scene
from demo.sentences import match_texts, questions

FORMATS = ("jpeg", "png", "webp")
FINE = ("answered", "rejected", "canceled", "refused")  # a bad request is rejected; "refused" is a 409
OUTCOMES = (*FINE, "wrong", "differing", "lost")


@dataclass(frozen=True)
class Case:
    """A request; `expected` is the output it got when it was asked alone, None for a bad one."""

    name: str
    body: bytes
    expected: str | None = None


def encoded(image: bytes, kind: str) -> str:
    """A data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def good_inputs(peer: Peer, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each task on each drawn picture, as a data URI and by URL in turn, and one very long question."""
    rng = random.Random(0)
    for number, (size, kind) in enumerate((size, kind) for size in sizes for kind in FORMATS):
        scene, file, name = random_scene(rng), io.BytesIO(), f"{size[0]}x{size[1]}.{kind}"
        draw(scene).resize(size).save(file, kind)
        peer.files[f"/{name}"] = file.getvalue()
        question = {"task": "visual_question_answering", "question": questions(scene, rng)[0][0]}
        match = {"task": "image_text_matching", "caption": match_texts(scene, rng)[0][0]}
        for turn, more in enumerate(({}, question, match)):
            image = f"{peer.url}/{name}" if (number + turn) % 2 else encoded(file.getvalue(), kind)
            yield f"{name}, {more.get('task', 'captioning by default')}", {"image": image, **more}
    yield "10,000 words", {**question, "image": image, "question": "is there a red circle? " * 2000}


def bad_cases(peer: Peer) -> list[Case]:
    """What clients get wrong."""
    picture = peer.files["/320x240.png"]
    image, huge = encoded(picture, "png"), (60_000).to_bytes(4, "big")
    inputs: dict[str, Any] = {
        "no image": {"task": "image_captioning"},
        "not a picture": {"image": encoded(b"hello", "jpeg")},
        "cut off": {"image": encoded(picture[:60], "png")},
        "empty": {"image": "data:image/png;base64,"},
        "60,000 x 60,000": {"image": encoded(picture[:16] + huge + huge + picture[24:], "png")},
        "404": {"image": f"{peer.url}/nothing.png"},
        "nobody listens": {"image": "http://127.0.0.1:9/a.png"},
        "malformed data URI": {"image": "data:image/png;base64"},
        "image is a number": {"image": 7},
        "image is null": {"image": None},
        "misspelt name": {"image": image, "tsak": "visual_question_answering"},
        "unknown task": {"image": image, "task": "translation"},
        "no question": {"image": image, "task": "visual_question_answering"},
    }
    cases = [Case(name, json.dumps({"input": one}).encode()) for name, one in inputs.items()]
    return [*cases, Case("not JSON", b'{"input": ')]


def judge(case: Case, status: int, answer: bytes) -> tuple[str, str]:
    """The outcome of a request that was answered, and what was wrong with it."""
    shown = f"HTTP {status}: {answer[:200]!r}"
    if status == 409:
        return "refused", ""
    if status not in (200, 422):
        return "lost", shown
    prediction = json.loads(answer)
    if case.expected is None:
        error = str(prediction["detail"] if status == 422 else prediction["error"] or "").strip()
        sentence = error and "\n" not in error and "Traceback" not in error
        return ("rejected", "") if sentence and prediction.get("status") != "succeeded" else ("wrong", shown)
    if status != 200 or prediction["status"] != "succeeded":
        return "wrong", shown
    return ("answered", "") if prediction["output"] == case.expected else ("differing", shown)
