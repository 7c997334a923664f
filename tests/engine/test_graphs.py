"""The GPU's decoder: its buckets and buffers run eagerly on the CPU here, its graphs where there is a GPU."""

from typing import Any

import pytest
import torch

from benchmarks.random_blip import random_blip, random_pixels, tokenizer
from blip import engine
from blip.engine import Search
from blip.engine.generate import ANSWER, CAPTION
from blip.engine.graphs import GraphedDecoder, bucket_sizes
from blip.engine.model import Model

QUESTIONS = ["what is red ?", "is the big dog on the left of a small red cat ?", "how many ?", "who is it ?"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tokenizer(tmp_path_factory.mktemp("vocabulary"))


def decoder(net: Any, search: Search, *, capture: bool = False) -> GraphedDecoder:
    shape = Model(net, image_size=30, search=search).decoder_shape(max_batch=4)
    return GraphedDecoder(net.text_decoder, shape, capture=capture)


@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (2, [1, 2]), (12, [1, 2, 4, 8, 12]), (16, [1, 2, 4, 8, 16])])
def test_buckets_are_the_powers_of_two_up_to_the_largest_batch(largest: int, sizes: list[int]) -> None:
    assert bucket_sizes(largest) == sizes


def test_one_decoder_gives_the_captions_that_fresh_ones_give(words: Any) -> None:
    model = random_blip("caption", 3, words, end=4.0)
    shared = decoder(model, CAPTION)
    for batch in (3, 1, 4, 2, 3):
        pixels = random_pixels(batch, 10 + batch)
        assert engine.caption(model, pixels, decoder=shared) == engine.caption(model, pixels)


def test_one_decoder_gives_the_answers_that_fresh_ones_give(words: Any) -> None:
    model = random_blip("answer", 4, words, end=4.0)
    shared = decoder(model, ANSWER)
    for batch in (4, 1, 3, 2):
        pixels, questions = random_pixels(batch, 20 + batch), QUESTIONS[:batch]
        assert engine.answer(model, pixels, questions, decoder=shared) == engine.answer(model, pixels, questions)


def test_a_sample_that_was_not_finite_leaves_nothing_behind_in_the_buffers(words: Any) -> None:
    model = random_blip("caption", 3, words, end=4.0)
    shared = decoder(model, CAPTION)
    pixels = random_pixels(2, 5)
    spoilt = pixels.clone()
    spoilt[1] = float("nan")
    good, bad = engine.caption(model, spoilt, decoder=shared)
    assert good == engine.caption(model, pixels)[0]
    assert isinstance(bad, Exception)
    assert engine.caption(model, pixels, decoder=shared) == engine.caption(model, pixels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("task", ["caption", "answer"])
def test_captured_steps_give_what_eager_steps_give(words: Any, task: str) -> None:
    model = random_blip(task, 6, words, end=4.0).to("cuda")
    run: Any = engine.caption if task == "caption" else engine.answer
    search = CAPTION if task == "caption" else ANSWER
    captured, eager = (decoder(model, search, capture=capture) for capture in (True, False))
    for batch in (3, 1, 4, 2):
        pixels = random_pixels(batch, batch).to("cuda")
        inputs: tuple[Any, ...] = (pixels,) if task == "caption" else (pixels, QUESTIONS[:batch])
        assert run(model, *inputs, search, captured) == run(model, *inputs, search, eager)
