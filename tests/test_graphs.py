"""The GPU's decoder: its buckets and buffers run eagerly on the CPU here, its graphs where there is a GPU."""

from typing import Any

import pytest
import torch

from benchmarks.random_blip import random_blip, random_pixels, tokenizer
from blip import engine
from blip.graphs import GraphedDecoder, bucket_sizes

QUESTIONS = ["what is red ?", "is the big dog on the left of a small red cat ?", "how many ?", "who is it ?"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tokenizer(tmp_path_factory.mktemp("vocabulary"))


def decoder(model: Any, *, masked: bool, max_batch: int = 4, capture: bool = False) -> GraphedDecoder:
    return GraphedDecoder(
        model.text_decoder,
        max_batch=max_batch,
        states_length=model.max_txt_len if masked else model.visual_encoder.pos_embed.shape[1],
        masked=masked,
        num_beams=3,
        prompt_length=1 if masked else model.prompt_length,
        max_length=10 if masked else 30,
        capture=capture,
    )


@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (2, [1, 2]), (12, [1, 2, 4, 8, 12]), (16, [1, 2, 4, 8, 16])])
def test_buckets_are_the_powers_of_two_up_to_the_largest_batch(largest: int, sizes: list[int]) -> None:
    assert bucket_sizes(largest) == sizes


def test_captions_of_any_batch_size_come_out_of_one_decoder_as_out_of_fresh_ones(words: Any) -> None:
    model = random_blip("caption", 3, words, end=4.0)
    shared = decoder(model, masked=False)
    for batch in (3, 1, 4, 2, 3):
        pixels = random_pixels(batch, 10 + batch)
        assert engine.caption(model, pixels, decoder=shared) == engine.caption(model, pixels)


def test_answers_to_questions_of_any_length_come_out_of_one_decoder_as_out_of_fresh_ones(words: Any) -> None:
    model = random_blip("answer", 4, words, end=4.0)
    shared = decoder(model, masked=True)
    for batch in (4, 1, 3, 2):
        pixels, questions = random_pixels(batch, 20 + batch), QUESTIONS[:batch]
        assert engine.answer(model, pixels, questions, decoder=shared) == engine.answer(model, pixels, questions)


def test_a_sample_that_was_not_finite_leaves_nothing_behind_in_the_buffers(words: Any) -> None:
    model = random_blip("caption", 3, words, end=4.0)
    shared = decoder(model, masked=False)
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
    captured, eager = (decoder(model, masked=task == "answer", capture=capture) for capture in (True, False))
    for batch in (3, 1, 4, 2):
        inputs: tuple[Any, ...] = (
            random_pixels(batch, batch).to("cuda"),
            *([QUESTIONS[:batch]] if task == "answer" else []),
        )
        run = engine.caption if task == "caption" else engine.answer
        assert run(model, *inputs, decoder=captured) == run(model, *inputs, decoder=eager)
