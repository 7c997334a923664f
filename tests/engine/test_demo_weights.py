"""The engine against LAVIS on the demo weights, whose outputs mean something: 324 results in batches of every size."""

from typing import Any

import pytest
import torch

from benchmarks.scenes import draw, engine_results, lavis_results, load_exact, texts_of
from blip import engine
from blip.config import DEMO
from blip.engine.model import Model
from blip.weights.bundle import open_bundle
from blip.weights.load import load_models

CPU = torch.device("cpu")
TASKS = ("caption", "answer", "match")
SIZES = range(1, 9)


@pytest.fixture(scope="module")
def exact() -> dict[str, Model]:
    return load_exact(open_bundle(DEMO), CPU)


@pytest.fixture(scope="module")
def prepared() -> dict[str, Model]:
    return load_models(open_bundle(DEMO), CPU, "float32")


def same(task: str, one: list[Any], other: list[Any]) -> bool:
    if task != "match":
        return one == other
    return all(a == pytest.approx(b, abs=1e-5) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", TASKS)
def test_batches_of_every_size_get_what_lavis_gives(
    exact: dict[str, Model], prepared: dict[str, Model], task: str, seed: int
) -> None:
    for size in SIZES:
        scenes = draw(size, 100 * seed + size, exact[task].image_size)
        assert same(task, engine_results(prepared, task, scenes), lavis_results(exact, task, scenes))


def test_streamed_captions_and_answers_end_as_the_results(prepared: dict[str, Model]) -> None:
    model = prepared["caption"]
    scenes = draw(8, 0, model.image_size)
    *_, last = engine.stream_caption(model.net, scenes.pixels)
    assert texts_of(model.net, last) == engine_results(prepared, "caption", scenes)
    model = prepared["answer"]
    scenes = draw(8, 0, model.image_size)
    *_, last = engine.stream_answer(model.net, scenes.pixels, scenes.questions)
    assert texts_of(model.net, last) == engine_results(prepared, "answer", scenes)


@pytest.mark.parametrize("task", TASKS)
def test_a_request_gets_the_same_result_alone_and_in_a_batch(prepared: dict[str, Model], task: str) -> None:
    scenes = draw(8, 1, prepared[task].image_size)
    together = engine_results(prepared, task, scenes)
    alone = [engine_results(prepared, task, scenes[i : i + 1])[0] for i in range(8)]
    assert alone == together
