"""Kernels chosen by trying them: what may be chosen is right in every batch, and what is wrong is not chosen."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.random_blip import FULL, SMALL, random_blip, random_pixels
from blip import engine
from blip.engine import kernels, trial
from blip.engine.beam import Search
from blip.engine.encoders import additive, attend, attend_image, attend_image_by_heads
from blip.engine.generate import _caption_search
from blip.engine.kernels import PrecisionError
from blip.engine.linears import LINEARS
from blip.engine.model import Model
from blip.engine.precision import check, chosen, prepare
from blip.engine.trial import Choice
from blip.tasks import Captioning
from tests.engine.test_generate import (
    QUESTIONS,
    answers,
    captions,
    lavis_answers,
    lavis_captions,
    lavis_matches,
    skip_unless_supported,
)

CPU = torch.device("cpu")


def choices(dtype: str) -> list[Choice]:
    """Each kernel of a precision that this processor has, beside the first of the others."""
    try:
        check(CPU, dtype)
    except PrecisionError:
        return []
    first, works = trial.default(dtype), trial.possible(dtype)
    others = [replace(first, **{work: name}) for work, names in works.items() for name in names[1:]]
    return [first, *others]


EVERY = [(dtype, choice) for dtype in trial.KERNELS for choice in choices(dtype)]
NAMES = [f"{dtype},{choice}" for dtype, choice in EVERY]


def build(words: Any, task: str, dtype: str, choice: Choice) -> Any:
    config = {**SMALL, "gain": 1.5} if task == "match" else SMALL
    wide = {**config, "text": {**config["text"], "num_attention_heads": 2}}  # wide enough to absorb projections
    return prepare(random_blip(task, 1, words, wide, end=2.0), CPU, dtype, choice)


@pytest.mark.parametrize(("dtype", "choice"), EVERY, ids=NAMES)
def test_no_kernel_makes_a_result_depend_on_its_batch(words: Any, dtype: str, choice: Choice) -> None:
    pixels = random_pixels(5, 1)
    captioner, answerer, matcher = (build(words, task, dtype, choice) for task in ("caption", "answer", "match"))
    together = zip(
        engine.caption(captioner, pixels),
        engine.answer(answerer, pixels, QUESTIONS[:5]),
        engine.match(matcher, pixels, QUESTIONS[:5]),
        strict=True,
    )
    for i, found in enumerate(together):
        one, text = pixels[i : i + 1], QUESTIONS[i : i + 1]
        alone = engine.caption(captioner, one) + engine.answer(answerer, one, text) + engine.match(matcher, one, text)
        assert tuple(alone) == found


@pytest.mark.parametrize("choice", choices("float32"), ids=str)
def test_float32_gives_what_lavis_gives_with_every_kernel(words: Any, choice: Choice) -> None:
    pixels = random_pixels(4, 1)
    exact = {task: random_blip(task, 1, words, SMALL, end=2.0) for task in ("caption", "answer")}
    expected = lavis_captions(exact["caption"], pixels), lavis_answers(exact["answer"], pixels, QUESTIONS[:4])
    captioner, answerer = (prepare(net, CPU, "float32", choice) for net in exact.values())
    assert (captions(captioner, pixels), answers(answerer, pixels, QUESTIONS[:4])) == expected
    net = random_blip("match", 1, words, {**SMALL, "gain": 1.5})
    scores = lavis_matches(net, pixels, QUESTIONS[:4])
    found = engine.match(prepare(net, CPU, "float32", choice), pixels, QUESTIONS[:4])
    for one, reference in zip(found, scores, strict=True):
        assert one == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize("name", LINEARS)
def test_rows_of_the_full_width_are_the_same_in_every_batch(name: str) -> None:
    if name not in {one for names in trial.possible("int8").values() for one in names} | {"packed", "sample"}:
        pytest.skip(f"this processor has no {name}")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    layer = LINEARS[name](nn.Linear(768, 768, dtype=dtype).requires_grad_(False))
    for rows in (3, 577):
        x = torch.randn(16, rows, 768, dtype=dtype)
        alone = layer(x[4:5])
        for batch in (5, 8, 16):
            assert layer(x[:batch])[4:5].equal(alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "states"), [(3, 577), (3, 80), (5, 901), (14, 901), (14, 14), (4, 4)])
def test_few_queries_attend_the_same_in_every_batch(dtype: torch.dtype, queries: int, states: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(16, queries, 12, 64, dtype=dtype).transpose(1, 2)
    kv = torch.randn(16, states, 2, 12, 64, dtype=dtype).permute(2, 0, 3, 1, 4)  # as a layer's rows are split
    mask = additive(torch.rand(16, 1, queries, states) < 0.7, dtype)
    alone = attend(q[4:5], kv[:, 4:5], mask[4:5])
    for batch in (5, 8, 16):
        assert attend(q[:batch], kv[:, :batch], mask[:batch])[4:5].equal(alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(12, 64), (4, 12), (2, 24)])
@pytest.mark.parametrize(("queries", "states"), [(1, 1), (1, 3), (1, 5), (2, 2), (3, 2), (1, 26), (3, 12), (3, 26)])
def test_attention_of_very_few_numbers_is_the_same_in_every_batch(
    dtype: torch.dtype, heads: int, width: int, queries: int, states: int
) -> None:
    torch.manual_seed(0)
    q = torch.randn(1024, queries, heads, width, dtype=dtype).transpose(1, 2)
    kv = torch.randn(1024, states, 2, heads, width, dtype=dtype).permute(2, 0, 3, 1, 4)
    together = attend(q, kv)
    for i in range(1024):
        assert attend(q[i : i + 1], kv[:, i : i + 1])[0].equal(together[i])


@pytest.mark.parametrize(("width", "heads"), [(33, 3), (42, 6), (90, 5), (48, 4)])
@pytest.mark.parametrize("beams", [1, 3, 5])
def test_numbers_do_not_depend_on_the_place_in_a_batch(words: Any, width: int, heads: int, beams: int) -> None:
    vision = {"patch_size": 6, "embed_dim": width, "depth": 2, "num_heads": heads}
    text = {**SMALL["text"], "hidden_size": width, "encoder_width": width, "num_attention_heads": heads}
    config = {**SMALL, "vision": vision, "text": text}
    search, pixels = Search(beams, 5, 12), random_pixels(6, 1)
    for choice in choices("float32"):
        net = prepare(random_blip("caption", 1, words, config), CPU, "float32", choice)
        *_, together = _caption_search(net, pixels, search, None, follow=False)
        for i, found in enumerate(together):
            *_, (alone,) = _caption_search(net, pixels[i : i + 1], search, None, follow=False)
            assert (found.scores, found.finished) == (alone.scores, alone.finished)


@pytest.mark.parametrize("queries", [3, 4, 5, 8, 10, 16])
def test_a_prompt_attends_to_itself_the_same_in_every_batch(queries: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(16, queries, 3, 12, 64).permute(2, 0, 3, 1, 4)
    alone = attend(q[1:2], (k[1:2], v[1:2]), is_causal=True)
    for batch in (2, 3, 8, 16):
        assert attend(q[:batch], (k[:batch], v[:batch]), is_causal=True)[1:2].equal(alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attend_states", [attend_image, attend_image_by_heads])
def test_the_states_of_an_image_attend_the_same_in_every_batch(attend_states: Any, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16:
        skip_unless_supported("bfloat16")
    torch.manual_seed(0)
    patches, token = torch.randn(3, 577, 3, 12, 64, dtype=dtype).split([576, 1], dim=1)
    together = attend_states([patches, token])
    alone = attend_states([patches[1:2], token[1:2]])
    assert [part[1:2].equal(one) for part, one in zip(together, alone, strict=True)] == [True, True]


def test_a_short_try_ends_a_search_early_and_needs_all_that_a_long_one_does(words: Any) -> None:
    net = random_blip("caption", 1, words, SMALL)
    task = Captioning(Model(net, CPU, SMALL["image_size"], engine.Search(num_beams=3, min_length=10, max_length=30)))
    (tried,) = task.run([task.example()])
    whole, again = task.run([replace(task.example(), tokens=None), task.example()])
    assert isinstance(tried, engine.Tokens)
    assert isinstance(whole, engine.Tokens)
    assert whole == again
    assert whole.whole
    assert not tried.whole
    assert task.say(whole).startswith(task.say(tried))


def double(x: Tensor) -> Tensor:
    return 2 * x


def mean_of_batch(x: Tensor) -> Tensor:
    return 2 * x + 1e-7 * len(x)


def failing(x: Tensor) -> Tensor:
    raise RuntimeError(f"could not create a primitive\nfor {x.shape}")


def slow(x: Tensor, seconds: float = 0.05) -> Tensor:
    """Keeps a core busy so long."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return 2 * x


def held_up(x: Tensor) -> Tensor:
    """Does little and waits long, as if another process had its core."""
    time.sleep(0.005)
    return 2 * x


X = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x: 2.001 * x, "its result is off by 5.0e-04"),
        (lambda x: x * float("nan"), "its result is off by nan"),
        (mean_of_batch, "its result depends on the batch"),
        (failing, "could not create a primitive"),
    ],
)
def test_a_kernel_that_is_wrong_here_is_not_chosen(wrong: Any, reason: str, capsys: Any) -> None:
    assert trial.fastest("attention", {"new": wrong, "old": slow}, X, 2 * X, 1e-5) == "old"
    assert capsys.readouterr().out == f"attention=new is not used on this processor: {reason}.\n"
    with pytest.raises(PrecisionError, match="attention=new does not compute right on this processor; leave"):
        trial.fastest("attention", {"new": wrong}, X, 2 * X, 1e-5)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_kernels_are_timed_with_one_thread_and_other_threads_keep_theirs() -> None:
    own, others = set[int](), set[int]()

    def kernel(x: Tensor) -> Tensor:
        own.add(torch.get_num_threads())
        with ThreadPoolExecutor(1) as other:
            others.add(other.submit(torch.get_num_threads).result())
        return 2 * x

    trial.fastest("attention", {"old": kernel, "new": kernel}, X, 2 * X, 1e-5)
    assert (own, others, torch.get_num_threads()) == ({3, 1}, {3}, 3)  # more prove that one is right


@pytest.mark.usefixtures("three_threads")
def test_a_thread_that_computes_alone_has_no_help_from_others() -> None:
    x = torch.randn(1000, 1000)
    packed = kernels.pack(x)

    def cores() -> dict[str, float]:
        found = dict[str, float]()
        works: dict[str, Callable[[], Tensor]] = {"MKL": lambda: x @ x, "oneDNN": lambda: kernels.linear(x, packed)}
        kernels.compute_alone()
        for name, work in works.items():
            work()
            process, thread = time.process_time(), time.thread_time()
            for _ in range(20):
                work()
            found[name] = (time.process_time() - process) / (time.thread_time() - thread)
        return found

    with ThreadPoolExecutor(1) as ending:
        assert all(number < 1.5 for number in ending.submit(cores).result().values())


@pytest.mark.parametrize(("dtype", "choice"), EVERY, ids=NAMES)
def test_the_kernels_that_compute_are_those_of_the_choice(words: Any, dtype: str, choice: Choice) -> None:
    net = build(words, "answer", dtype, choice)
    assert type(net.visual_encoder.blocks[0].attn.qkv) is LINEARS[choice.image_linear]
    for bert in (net.text_encoder, net.text_decoder.bert):
        assert type(bert.encoder.layer[0].attention.output.dense) is LINEARS[choice.text_linear]
    attend_states = net.visual_encoder.attend
    ways = {attend_image: "fused", attend_image_by_heads: "heads"}
    assert ways[getattr(attend_states, "func", attend_states)] == choice.attention


def test_another_kernel_is_chosen_only_if_it_is_clearly_faster() -> None:
    assert trial.fastest("attention", {"old": slow, "new": double}, X, 2 * X, 1e-5) == "new"
    assert trial.fastest("attention", {"old": double, "new": slow}, X, 2 * X, 1e-5) == "old"
    hardly_faster = partial(slow, seconds=0.049)
    assert trial.fastest("attention", {"old": slow, "new": hardly_faster}, X, 2 * X, 1e-5) == "old"


def test_a_kernel_that_other_work_holds_up_is_not_taken_for_a_slow_one() -> None:
    few_milliseconds = partial(slow, seconds=0.002)
    assert trial.fastest("attention", {"old": held_up, "new": few_milliseconds}, X, 2 * X, 1e-5) == "old"
    assert trial.fastest("attention", {"old": few_milliseconds, "new": held_up}, X, 2 * X, 1e-5) == "new"


@pytest.mark.parametrize("dtype", trial.KERNELS)
def test_what_is_chosen_is_one_of_the_kernels_and_what_is_fixed_stays(words: Any, dtype: str) -> None:
    possible = choices(dtype)
    if not possible:
        pytest.skip(f"this processor has no {dtype}")
    net = random_blip("answer", 1, words, SMALL)
    known = trial.possible(dtype)
    found = trial.choose(net, dtype, {})
    assert all(getattr(found, work) in names for work, names in known.items())
    for choice in possible:
        assert trial.choose(net, dtype, trial.pinned(str(choice), dtype)) == choice


@pytest.mark.parametrize("text", ["", " ", ",", " , ", "attention=heads, ", " attention = heads ,attention=heads"])
def test_spaces_and_empty_parts_between_kernels_do_not_count(text: str) -> None:
    assert trial.pinned(text, "float32") == ({"attention": "heads"} if "heads" in text else {})


def test_two_kernels_for_one_work_are_refused() -> None:
    with pytest.raises(PrecisionError, match="has attention=heads and attention=fused; leave one out"):
        trial.pinned("attention=heads,attention=fused", "float32")


@pytest.mark.parametrize("text", ["attention=quick", "attention", "image=packed", "text_linear=sample"])
def test_a_kernel_that_does_not_exist_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(PrecisionError) as refusal:
        trial.pinned(text, "float32")
    assert str(refusal.value) == (
        f"BLIP_KERNELS={text} is not possible in float32 here; choose image_linear=packed or image_linear=sample or "
        "text_linear=packed or attention=heads or attention=fused."
    )


def test_sums_of_8_bit_products_do_not_overflow() -> None:
    if not kernels.has_int8():
        pytest.skip("this processor has no int8")
    numbers = torch.full((1, 768), 127, dtype=torch.int8)
    packed, levels = kernels.pack_fbgemm(numbers, torch.ones(1)), kernels.fbgemm_levels()
    assert kernels.fbgemm_linear(torch.ones(1, 768), packed, levels).item() == pytest.approx(768 * 127, rel=1e-6)


@pytest.mark.parametrize("name", ["fbgemm", "onednn"])
def test_rows_of_zeros_and_of_tiny_numbers_are_multiplied_in_8_bits(name: str) -> None:
    if name not in trial.possible("int8")["text_linear"]:
        pytest.skip(f"this processor has no {name}")
    linear = nn.Linear(8, 4).requires_grad_(False)
    layer = LINEARS[name](linear)
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e-42), torch.full((8,), 1e30)])[None]
    assert torch.isfinite(layer(x)).all()
    assert layer(x)[0, 0].equal(linear.bias)


@pytest.mark.parametrize("name", ["fbgemm", "onednn"])
def test_inputs_are_rounded_to_steps_of_their_rows_largest(name: str) -> None:
    if name not in trial.possible("int8")["text_linear"] or kernels.fbgemm_levels() < 127:
        pytest.skip(f"this processor has no {name} of 8 bits")
    linear = nn.Linear(64, 64, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.eye(64))
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    largest = x.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(LINEARS[name](linear)(x), (x / largest * 127).round() / 127 * largest)
    apart = x.mT.contiguous().mT  # of another layout
    assert LINEARS[name](linear)(apart).equal(LINEARS[name](linear)(x))


def test_a_trial_leaves_no_threads_behind(words: Any) -> None:
    """OpenMP lets all of its threads sleep after each operation where it has more of them than there are cores."""
    config = {**FULL, "text": {**FULL["text"], "num_hidden_layers": 1}, "vision": {**FULL["vision"], "depth": 1}}
    net = random_blip("caption", 1, words, config)
    left: list[int] = []

    def load() -> None:
        before = set(os.listdir("/proc/self/task"))
        chosen(net, CPU, "float32")
        ended = time.monotonic() + 10
        while set(os.listdir("/proc/self/task")) - before and time.monotonic() < ended:
            time.sleep(0.01)
        left.append(len(set(os.listdir("/proc/self/task")) - before))

    loading = threading.Thread(target=load)
    loading.start()
    loading.join()
    assert left == [0]
