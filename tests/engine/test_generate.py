import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.random_blip import (
    FULL,
    FULL_VOCABULARY,
    SMALL,
    SPECIAL,
    WORDS,
    fail_on_black,
    normalised,
    random_blip,
    random_pixels,
    tokenizer,
)
from benchmarks.scenes import run, texts_of
from blip import engine
from blip.engine import NonFiniteLogitsError, Search, text
from blip.engine.generate import ANSWER, CAPTION, _answer_search
from blip.engine.kernels import PrecisionError
from blip.engine.model import Model
from blip.engine.precision import check, prepare

CPU = torch.device("cpu")
QUESTIONS = [
    "what is this",
    "is there a red circle and a blue square left of the dog?",
    "how many",
    "what colour is the surfboard, and how many dogs run on it, and what is below and above of that?",
    "",
    "what is the dog on",
    "what?",
    "is there a dog",
]
TEXTS = ["a dog", "a red circle above a blue square and one dog on a surfboard, two dogs below", "the red dog runs"]
PREPARED = [False, True]
SEEDS = range(5)
Build = Callable[..., Any]


@pytest.fixture(scope="module")
def build(words: Any) -> Build:
    """`build(task, seed, prepared)`: a small model, as LAVIS has it or prepared for the CPU in float32."""

    def build(task: str, seed: int, prepared: bool = False) -> Any:
        config = {**SMALL, "gain": 1.5} if task == "match" else SMALL  # numbers are compared: no chaos
        net = random_blip(task, seed, words, config, end=(0.0, 2.0, 4.0, 6.0, 7.0)[seed % 5])
        return prepare(net, CPU, "float32") if prepared else net

    return build


def skip_unless_supported(dtype: str) -> None:
    try:
        check(CPU, dtype)
    except PrecisionError as reason:
        pytest.skip(str(reason))


def lavis_captions(model: Any, pixels: Tensor) -> list[str]:
    with torch.no_grad():
        return list(model.generate({"image": normalised(pixels)}))


def lavis_answers(model: Any, pixels: Tensor, questions: list[str]) -> list[str]:
    """One question at a time: in a batch LAVIS lets the decoder see the padding."""
    with torch.no_grad():
        pairs = zip(normalised(pixels).split(1), questions, strict=True)
        samples = [{"image": image, "text_input": [question]} for image, question in pairs]
        return [model.predict_answers(sample, inference_method="generate")[0] for sample in samples]


def lavis_matches(model: Any, pixels: Tensor, texts: list[str]) -> list[tuple[float, float]]:
    with torch.no_grad():
        samples = {"image": normalised(pixels), "text_input": texts}
        probabilities = model(samples, match_head="itm").softmax(-1)[:, 1]
        similarities = model(samples, match_head="itc").diagonal()
    return list(zip(probabilities.tolist(), similarities.tolist(), strict=True))


def captions(model: Any, pixels: Tensor, search: Search = CAPTION) -> list[Any]:
    return texts_of(model, engine.caption(model, pixels, search))


def answers(model: Any, pixels: Tensor, questions: list[str]) -> list[Any]:
    return texts_of(model, engine.answer(model, pixels, questions))


def streams(model: Any, steps: Iterable[list[Any]]) -> list[list[Any]]:
    """The certain texts of each sample, as they grow."""
    return [texts_of(model, list(stream)) for stream in zip(*steps, strict=True)]


@pytest.mark.parametrize("prepared", PREPARED)
@pytest.mark.parametrize("seed", SEEDS)
def test_captions_of_every_batch_size_are_those_of_lavis(build: Build, seed: int, prepared: bool) -> None:
    pixels = random_pixels(8, seed)
    expected = lavis_captions(build("caption", seed), pixels)
    model = build("caption", seed, prepared)
    assert len(set(expected)) > 1
    for size in range(1, 9):
        assert captions(model, pixels[:size]) == expected[:size]


@pytest.mark.parametrize("prepared", PREPARED)
@pytest.mark.parametrize("seed", SEEDS)
def test_answers_to_mixed_questions_are_those_lavis_gives_one_by_one(build: Build, seed: int, prepared: bool) -> None:
    pixels = random_pixels(8, seed)
    expected = lavis_answers(build("answer", seed), pixels, QUESTIONS)
    model = build("answer", seed, prepared)
    for size in range(1, 9):
        assert answers(model, pixels[-size:], QUESTIONS[-size:]) == expected[-size:]


@pytest.mark.parametrize("prepared", PREPARED)
@pytest.mark.parametrize("seed", SEEDS)
def test_both_match_scores_are_those_of_lavis(build: Build, seed: int, prepared: bool) -> None:
    pixels = random_pixels(len(TEXTS), seed)
    expected = lavis_matches(build("match", seed), pixels, TEXTS)
    model = build("match", seed, prepared)
    for size in range(1, len(TEXTS) + 1):
        scores = engine.match(model, pixels[:size], TEXTS[:size])
        for score, reference in zip(scores, expected[:size], strict=True):
            assert score == pytest.approx(reference, abs=1e-5)


def test_lengths_are_counted_as_lavis_counts_them(build: Build) -> None:
    model, pixels = build("caption", 3), random_pixels(4, 0)
    for shortest, longest in ((0, 5), (12, 12), (20, 30)):
        with torch.no_grad():
            expected = model.generate({"image": normalised(pixels)}, min_length=shortest, max_length=longest)
        assert captions(model, pixels, Search(3, shortest, longest)) == expected


def test_questions_and_texts_beyond_the_limit_are_cut_off_as_lavis_does(build: Build) -> None:
    pixels, long = random_pixels(1, 0), "what is the dog on " * 100
    model = build("answer", 0)
    assert answers(model, pixels, [long]) == lavis_answers(model, pixels, [long])
    model = build("match", 0)
    assert engine.match(model, pixels, [long])[0] == pytest.approx(lavis_matches(model, pixels, [long])[0], abs=1e-5)


@pytest.mark.parametrize("task", ["answer", "match"])
def test_texts_are_not_padded_beyond_the_positions_of_the_model(words: Any, task: str) -> None:
    config = {**SMALL, "gain": 1.5, "max_txt_len": 39}
    assert config["text"]["max_position_embeddings"] == 40  # not a multiple of 16
    net, pixels, long = random_blip(task, 0, words, config), random_pixels(1, 0), "what is the dog on " * 100
    model = Model(net, CPU, SMALL["image_size"], ANSWER if task == "answer" else None).with_graphs(1, lambda work: work)
    for graphs in (None, model.graphs):
        (found,) = run(task, model, pixels, [long], graphs)
        if task == "answer":
            assert [found] == lavis_answers(net, pixels, [long])
        else:
            assert found == pytest.approx(lavis_matches(net, pixels, [long])[0], abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_request_gets_the_same_result_alone_and_in_any_batch(build: Build, dtype: str) -> None:
    skip_unless_supported(dtype)
    pixels = random_pixels(8, 1)
    for seed in SEEDS:
        captioner, answerer, matcher = (
            prepare(build(task, seed), CPU, dtype) for task in ("caption", "answer", "match")
        )
        captioned = engine.caption(captioner, pixels)
        answered = engine.answer(answerer, pixels, QUESTIONS)
        matched = engine.match(matcher, pixels, QUESTIONS)
        for i, question in enumerate(QUESTIONS):
            one = pixels[i : i + 1]
            assert engine.caption(captioner, one) == [captioned[i]]
            assert engine.answer(answerer, one, [question]) == [answered[i]]
            assert engine.match(matcher, one, [question]) == [matched[i]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("width", "heads"), [(32, 4), (48, 2), (112, 4), (288, 12), (320, 5)])
def test_a_text_gets_the_same_numbers_beside_longer_ones(words: Any, dtype: str, width: int, heads: int) -> None:
    skip_unless_supported(dtype)
    sizes = {"hidden_size": width, "num_attention_heads": heads, "encoder_width": SMALL["vision"]["embed_dim"]}
    text = {**SMALL["text"], **sizes, "max_position_embeddings": 64}
    config = {**SMALL, "max_txt_len": 60, "text": text}
    question, longer, longest = "what is this", "what is the dog on " * 4, "what is the dog on " * 9
    pixels = random_pixels(3, 1)
    answerer, matcher = (prepare(random_blip(task, 1, words, config), CPU, dtype) for task in ("answer", "match"))
    for search in (Search(1, 1, 5), Search(3, 1, 5), Search(10, 1, 5)):
        first = None
        for texts in ([question], [question, longer], [question, longer, longest]):
            *_, samples = _answer_search(answerer, pixels[: len(texts)], texts, search, None, follow=False)
            first = first or samples[0]
            assert (samples[0].scores, samples[0].finished) == (first.scores, first.finished)
    alone = engine.match(matcher, pixels[:1], [question])
    for texts in ([question, longer], [question, longer, longest]):
        assert engine.match(matcher, pixels[: len(texts)], texts)[:1] == alone


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_streamed_grows_to_the_result_and_is_never_taken_back(build: Build, seed: int) -> None:
    pixels = random_pixels(8, seed)
    captioner, answerer = build("caption", seed), build("answer", seed)
    for model, steps, results in (
        (captioner, engine.stream_caption(captioner, pixels), captions(captioner, pixels)),
        (answerer, engine.stream_answer(answerer, pixels, QUESTIONS), answers(answerer, pixels, QUESTIONS)),
    ):
        found = streams(model, steps)
        assert [stream[-1] for stream in found] == results
        for stream in found:
            assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(stream))


def test_words_are_streamed_before_the_caption_is_complete(build: Build) -> None:
    model = build("caption", 0)
    found = streams(model, engine.stream_caption(model, random_pixels(8, 0)))
    assert max(len({*stream} - {""}) for stream in found) >= 4


@settings(max_examples=400, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, len(SPECIAL) + len(WORDS) + 1), min_size=1, max_size=14))
def test_text_called_final_is_a_prefix_of_every_later_text(words: Any, ids: list[int]) -> None:
    texts = [text._final_words(words, ids[:end]) for end in range(1, len(ids) + 1)] + [text._text(words, ids)]
    for earlier, later in itertools.pairwise(texts):
        assert later.startswith(earlier)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("prepared", PREPARED)
def test_an_image_that_breaks_the_model_fails_alone(build: Build, prepared: bool, value: float) -> None:
    pixels, questions = random_pixels(3, 0), QUESTIONS[:3]
    broken = pixels.clone()
    broken[1, 0, 0] = 0
    captioner, answerer, matcher = (build(task, 0, prepared) for task in ("caption", "answer", "match"))
    for model in (captioner, answerer, matcher):
        fail_on_black(model, value)
    for result, expected in (
        (engine.caption(captioner, broken), engine.caption(captioner, pixels)),
        (engine.answer(answerer, broken, questions), engine.answer(answerer, pixels, questions)),
        (engine.match(matcher, broken, questions), engine.match(matcher, pixels, questions)),
    ):
        assert isinstance(result[1], NonFiniteLogitsError)
        assert [result[0], result[2]] == [expected[0], expected[2]]
    *_, (good, bad, _) = engine.stream_caption(captioner, broken)
    assert good == engine.caption(captioner, pixels)[0]
    assert isinstance(bad, NonFiniteLogitsError)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_reduced_precision_stays_near_the_exact_scores(build: Build, dtype: str) -> None:
    skip_unless_supported(dtype)
    pixels, exact = random_pixels(3, 0), build("match", 0)
    expected = engine.match(exact, pixels, TEXTS)
    for score, reference in zip(engine.match(prepare(exact, CPU, dtype), pixels, TEXTS), expected, strict=True):
        assert score == pytest.approx(reference, abs=0.1)


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cpu", "float16", "float16 is not supported on a CPU; choose bfloat16, int8 or float32."),
        ("cuda", "int8", "int8 is for CPUs; on a GPU choose float16, bfloat16 or float32."),
        ("cpu", "half", "half is not a known precision; choose one of float32, float16, bfloat16, int8."),
    ],
)
def test_a_precision_the_device_does_not_have_is_refused_with_the_reason(device: str, dtype: str, reason: str) -> None:
    with pytest.raises(PrecisionError) as refusal:
        check(torch.device(device), dtype)
    assert str(refusal.value) == reason


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_models_of_full_size_give_what_lavis_gives(tmp_path: Path, seed: int) -> None:
    words = tokenizer(tmp_path, FULL_VOCABULARY)
    questions, texts = QUESTIONS[:2], TEXTS[:2]

    model, pixels = random_blip("caption", seed, words, FULL), random_pixels(2, seed, 384)
    expected: list[Any] = lavis_captions(model, pixels)
    assert captions(prepare(model, CPU, "float32"), pixels) == expected

    larger = {**FULL, "image_size": 480}
    model, pixels = random_blip("answer", seed, words, larger), random_pixels(2, seed, 480)
    expected = lavis_answers(model, pixels, questions)
    assert answers(prepare(model, CPU, "float32"), pixels, questions) == expected

    calm = {**FULL, "gain": 1.0}
    model, pixels = random_blip("match", seed, words, calm), random_pixels(2, seed, 384)
    expected = lavis_matches(model, pixels, texts)
    prepare(model, CPU, "float32")
    matches = engine.match(model, pixels, texts)
    for score, reference in zip(matches, expected, strict=True):
        assert score == pytest.approx(reference, abs=1e-5)
    assert engine.match(model, pixels[1:], texts[1:]) == matches[1:]
