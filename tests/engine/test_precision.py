"""What a model is prepared with; what only a GPU uses is tried on the CPU here."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.random_blip import normalised, random_blip, random_pixels, tokenizer
from blip import engine
from blip.engine.encoders import additive, fold_biases, join_projections, normalise
from blip.engine.kernels import PrecisionError
from blip.engine.precision import check_bfloat16, prepare, set_arithmetic

QUESTIONS = ["what is red ?", "is the big dog on the left of a small red cat ?", "how many ?"]


@pytest.fixture
def flags() -> Iterator[Any]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (
        matmul.allow_tf32,
        cudnn.allow_tf32,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    yield matmul, cudnn
    matmul.allow_tf32, cudnn.allow_tf32 = before[:2]
    matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = before[2:4]
    torch.backends.cuda.enable_cudnn_sdp(before[4])


def test_on_a_gpu_float32_is_float32_and_half_precision_sums_are_not_rounded(flags: Any) -> None:
    matmul, cudnn = flags
    set_arithmetic()
    assert not matmul.allow_tf32
    assert not cudnn.allow_tf32
    assert not matmul.allow_fp16_reduced_precision_reduction
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_bfloat16_is_refused_on_a_gpu_that_has_none() -> None:
    for capability in ((8, 0), (8, 6), (9, 0), (12, 0)):
        check_bfloat16(capability)
    for capability in ((7, 0), (7, 5)):
        with pytest.raises(PrecisionError, match="This GPU has no bfloat16 instructions"):
            check_bfloat16(capability)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_pixels_become_what_lavis_makes_of_them_rounded_once(tmp_path: Any, dtype: str) -> None:
    try:
        net = prepare(random_blip("caption", 3, tokenizer(tmp_path)), torch.device("cpu"), dtype)
    except PrecisionError as reason:
        pytest.skip(str(reason))
    pixels = random_pixels(3, 1)
    found, encoder = normalise(net.pixel_values, pixels), net.visual_encoder.pos_embed
    assert found.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32) == encoder.dtype
    assert found.equal(normalised(pixels).to(encoder.dtype))
    assert found.is_contiguous()


@pytest.mark.parametrize("task", ["caption", "answer", "match"])
def test_joined_projections_and_folded_biases_give_what_lavis_own_layers_give(tmp_path: Any, task: str) -> None:
    net = random_blip(task, 3, tokenizer(tmp_path), end=4.0)
    pixels = random_pixels(3, 1)

    def run() -> Any:
        if task == "caption":
            return engine.caption(net, pixels)
        if task == "answer":
            return engine.answer(net, pixels, QUESTIONS)
        return torch.tensor(engine.match(net, pixels, QUESTIONS))

    separate = run()
    join_projections(net)
    if task == "match":
        torch.testing.assert_close(run(), separate, atol=1e-5, rtol=0)
        return
    assert run() == separate
    fold_biases(net.text_decoder.bert)
    assert run() == separate


def test_masks_are_added_and_their_rows_begin_at_multiples_of_eight() -> None:
    visible = torch.rand(2, 1, 3, 79, generator=torch.Generator().manual_seed(0)) > 0.5
    mask = additive(visible, torch.float16)
    assert mask.shape == visible.shape
    assert mask.stride() == (240, 240, 80, 1)
    assert torch.equal(mask == 0, visible)
    assert torch.equal(mask == -torch.inf, ~visible)
