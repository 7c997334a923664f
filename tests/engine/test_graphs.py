"""A GPU's buckets, buffers and search: run eagerly on the CPU here, captured where there is a GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.random_blip import fail_on_black, random_blip, random_pixels, tokenizer
from blip import engine
from blip.engine.beam import Search
from blip.engine.generate import ANSWER, CAPTION
from blip.engine.graphs import CudaRecorder, Recorder, Work, bucket_sizes, for_as_many
from blip.engine.model import Model
from blip.engine.precision import prepare

QUESTIONS = ["what is red ?", "is the big dog on the left of a small red cat ?", "how many ?", "who is it ?"]
SEARCHES = {"caption": CAPTION, "answer": ANSWER, "match": None}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tokenizer(tmp_path_factory.mktemp("vocabulary"))


def eagerly(work: Work) -> Work:
    """A recorder that records nothing, but does the work once, as the real one does."""
    work()
    return work


def model(task: str, seed: int, words: Any, record: Recorder = eagerly, device: torch.device = CPU) -> Model:
    net = random_blip(task, seed, words, end=4.0)
    if device.type == "cuda":
        prepare(net, device, "float32")
    return Model(net, device, image_size=30, search=SEARCHES[task]).with_graphs(4, record)


def spoil_one(which: int, what: int) -> Recorder:
    """A recorder of works of which one gives something else in the place of one of its results."""
    recorded = 0

    def record(work: Work) -> Work:
        nonlocal recorded
        recorded += 1
        if recorded != which:
            return work

        def wrongly() -> tuple[Tensor, ...]:
            results = work()
            wrong = results[what]
            wrong.logical_not_() if wrong.dtype == torch.bool else wrong.add_(1)
            return results

        return wrongly

    return record


def run(model: Model, pixels: Tensor, texts: list[str], graphs: Any) -> Any:
    if model.search is None:
        return engine.match(model.net, pixels, texts, graphs)
    if hasattr(model.net, "text_encoder"):
        return engine.answer(model.net, pixels, texts, model.search, graphs)
    return engine.caption(model.net, pixels, model.search, graphs)


@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (2, [1, 2]), (12, [1, 2, 4, 8, 12]), (16, [1, 2, 4, 8, 16])])
def test_buckets_are_the_powers_of_two_up_to_the_largest_batch(largest: int, sizes: list[int]) -> None:
    assert bucket_sizes(largest) == sizes


@pytest.mark.parametrize("task", ["caption", "answer"])
def test_buckets_give_the_texts_that_are_given_without(words: Any, task: str) -> None:
    made = model(task, 3, words)
    for batch in (3, 1, 4, 2, 3):
        pixels, questions = random_pixels(batch, 10 + batch), QUESTIONS[:batch]
        assert run(made, pixels, questions, made.graphs) == run(made, pixels, questions, None)


def test_buckets_give_the_matches_that_are_given_without(words: Any) -> None:
    made = model("match", 3, words)
    for batch in (3, 1, 4, 2):
        pixels, texts = random_pixels(batch, 10 + batch), QUESTIONS[:batch]
        ours, plain = run(made, pixels, texts, made.graphs), run(made, pixels, texts, None)
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), atol=1e-6, rtol=0)


@pytest.mark.parametrize("task", ["caption", "answer"])
def test_a_bucket_streams_what_is_streamed_without(words: Any, task: str) -> None:
    made = model(task, 5, words)
    pixels = random_pixels(3, 7)
    streams = []
    for graphs in (made.texts, None):
        if task == "caption":
            steps = engine.stream_caption(made.net, pixels, CAPTION, graphs)
        else:
            steps = engine.stream_answer(made.net, pixels, QUESTIONS[:3], ANSWER, graphs)
        streams.append(list(steps))
    assert streams[0] == streams[1]
    assert len(streams[0]) > 2


def test_a_batch_larger_than_all_buckets_runs_without_them(words: Any) -> None:
    made = model("caption", 3, words)
    pixels = random_pixels(6, 1)
    assert run(made, pixels, [], made.graphs) == run(made, pixels, [], None)


def test_a_sample_that_was_not_finite_leaves_nothing_behind_in_the_buffers(words: Any) -> None:
    made = model("caption", 3, words)
    pixels = random_pixels(2, 5)
    spoilt = pixels.clone()
    spoilt[1] = 0
    fail_on_black(made.net, float("nan"))
    wanted = run(made, pixels, [], None)
    good, bad = run(made, spoilt, [], made.graphs)
    assert good == wanted[0]
    assert isinstance(bad, engine.NonFiniteLogitsError)
    assert run(made, pixels, [], made.graphs) == wanted


@pytest.mark.parametrize("task", ["caption", "answer", "match"])
def test_a_recording_that_differs_is_not_used_and_one_line_says_so(
    words: Any, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = model(task, 3, words, spoil_one(2, 0))
    wrong = 2 if task == "match" else 4  # the second bucket's only work, or the first one's second
    assert made.graphs is not None
    assert made.graphs.sizes == [size for size in (1, 2, 4) if size != wrong]
    assert capsys.readouterr().out == f"Batches of {wrong} run without a CUDA graph: its results differ\n"
    pixels, texts = random_pixels(4, 1), QUESTIONS
    assert len(run(made, pixels, texts, made.graphs)) == 4


@pytest.mark.parametrize("work", [1, 2])
@pytest.mark.parametrize("what", range(6), ids=["logits", "words", "parents", "scores", "done", "flag"])
def test_all_that_a_recording_gives_is_compared(words: Any, work: int, what: int) -> None:
    made = model("caption", 3, words, spoil_one(work, what))
    assert made.graphs is not None
    assert made.graphs.sizes == [1, 2]


def test_a_recording_that_is_off_by_little_is_used_though_other_words_may_follow(words: Any) -> None:
    def nearly(work: Work) -> Work:
        def record() -> tuple[Tensor, ...]:
            numbers, *others = work()
            return (numbers * (1 + 1e-6), *others)

        return record

    made = model("answer", 3, words, nearly)
    assert made.graphs is not None
    assert made.graphs.sizes == [1, 2, 4]


def test_where_memory_is_short_smaller_batches_have_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    def make(size: int) -> str:
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore about it.")
        return f"for {size}"

    assert for_as_many(make, 12) == "for 2"
    assert capsys.readouterr().out.splitlines() == [
        f"Batches of {size} run without a CUDA graph: CUDA out of memory." for size in (12, 8, 4)
    ]
    assert for_as_many(lambda _: make(4), 2) is None


@pytest.mark.parametrize("task", ["caption", "answer"])
@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("beams", [1, 3])
def test_searches_for_few_tokens_have_graphs_too(words: Any, task: str, tokens: int, beams: int) -> None:
    made = model(task, 3, words)
    prompt = len(made.net.tokenizer(made.net.prompt).input_ids) - 1 if task == "caption" else 1
    search = Search(beams, 1, prompt + tokens)
    few = replace(made, search=search, texts=None).with_graphs(4, eagerly)
    assert few.graphs is not None
    assert few.graphs.sizes == [1, 2, 4]
    pixels, questions = random_pixels(3, 8), QUESTIONS[:3]
    assert run(few, pixels, questions, few.graphs) == run(few, pixels, questions, None)


def test_where_nothing_can_be_recorded_everything_runs_without(words: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: Work) -> Work:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore about it.")

    made = model("caption", 3, words, fail)
    assert made.graphs is not None
    assert made.graphs.sizes == []
    assert capsys.readouterr().out.splitlines() == [
        f"Batches of {size} run without a CUDA graph: CUDA out of memory." for size in (4, 2, 1)
    ]
    pixels = random_pixels(2, 1)
    assert run(made, pixels, [], made.graphs) == run(made, pixels, [], None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("task", ["caption", "answer", "match"])
def test_captured_works_give_what_is_given_without(words: Any, task: str) -> None:
    made = model(task, 6, words, CudaRecorder(), torch.device("cuda"))
    assert made.graphs is not None
    assert made.graphs.sizes == [1, 2, 4]
    for batch in (3, 1, 4, 2):
        pixels, texts = random_pixels(batch, batch).to("cuda"), QUESTIONS[:batch]
        ours, plain = run(made, pixels, texts, made.graphs), run(made, pixels, texts, None)
        if task == "match":
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), atol=1e-5, rtol=0)
        else:
            assert ours == plain
