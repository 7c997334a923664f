"""Attention to states without their keys and values, and the image encoder in parts: LAVIS's own numbers."""

from typing import Any

import pytest
import torch

from benchmarks.random_blip import FULL, SMALL, normalised, random_blip, random_pixels
from blip import engine
from blip.engine.absorbed import AbsorbedAttention
from blip.engine.encoders import encode_image
from blip.engine.precision import prepare
from tests.engine.test_generate import QUESTIONS, answers, lavis_answers, lavis_matches, skip_unless_supported

CPU = torch.device("cpu")


def attention(words: Any, config: dict[str, Any]) -> Any:
    """The part of one layer that attends to an image's states, LAVIS's BertSelfAttention."""
    config = {**config, "text": {**config["text"], "num_hidden_layers": 1}}
    config["vision"] = {**config["vision"], "depth": 1}
    net = random_blip("match", 1, words, config).eval().requires_grad_(False)
    return net.text_encoder.encoder.layer[0].crossattention.self


def states_and_hidden(module: Any, batch: int, states: int, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    width = module.query.in_features
    return torch.randn(batch, states, module.key.in_features), torch.randn(batch, queries, width)


def queries_of(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    return module.query(hidden).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("config", "states"), [(SMALL, 26), (FULL, 577), (FULL, 901)], ids=["small", "384", "480"])
@pytest.mark.parametrize("queries", [5, 16, 40])
def test_absorbed_attention_gives_what_lavis_computes(words: Any, config: Any, states: int, queries: int) -> None:
    module = attention(words, config)
    image, hidden = states_and_hidden(module, 2, states, queries)
    with torch.inference_mode():
        expected = module(hidden, encoder_hidden_states=image, encoder_attention_mask=torch.zeros(2, 1, 1, states))[0]
        absorbed = AbsorbedAttention(module, torch.float32)
        found = absorbed(queries_of(module, hidden), absorbed.pack(image))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_absorbed_attention_holds_none_of_the_memory_that_weights_were_loaded_to(words: Any) -> None:
    """That memory is a part of a mapped file, which goes when nothing holds any of it."""
    module = attention(words, SMALL)
    absorbed = AbsorbedAttention(module, torch.float32)
    loaded = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    held = {tensor.untyped_storage().data_ptr() for tensor in (absorbed.key, absorbed.value)}
    assert not held & loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_absorbed_attention_of_a_text_is_the_same_with_longer_neighbours(words: Any, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16:
        skip_unless_supported("bfloat16")
    module = attention(words, FULL)
    image, hidden = states_and_hidden(module, 4, 577, 48)
    with torch.inference_mode():
        absorbed, q = AbsorbedAttention(module, dtype), queries_of(module, hidden)
        together = absorbed(q, absorbed.pack(image))
        for length in (16, 32, 48):
            alone = absorbed(q[1:2, :, :length], absorbed.pack(image[1:2]))
            assert together[1:2, :length].equal(alone)


@pytest.mark.parametrize(("heads", "longest", "is_absorbed"), [(2, 16, True), (2, 17, False), (4, 12, False)])
def test_projections_are_absorbed_where_texts_are_shorter_than_a_head_is_wide(
    words: Any, heads: int, longest: int, is_absorbed: bool
) -> None:
    pixels = random_pixels(3, 1)
    config = {**SMALL, "max_txt_len": longest, "text": {**SMALL["text"], "num_attention_heads": heads}}
    net = random_blip("answer", 1, words, config, end=2.0)
    expected = lavis_answers(net, pixels, QUESTIONS[:3])
    assert answers(prepare(net, CPU, "float32"), pixels, QUESTIONS[:3]) == expected
    assert hasattr(net.text_encoder.encoder.layer[0].crossattention.self, "absorbed") == is_absorbed
    net = random_blip("match", 1, words, {**config, "gain": 1.5})
    scores = lavis_matches(net, pixels, QUESTIONS[:3])
    for one, reference in zip(engine.match(prepare(net, CPU, "float32"), pixels, QUESTIONS[:3]), scores, strict=True):
        assert one == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize("rows", [1, 8, 13, 26, 64])
def test_the_image_encoder_gives_lavis_states_however_its_rows_are_parted(words: Any, rows: int) -> None:
    net, pixels = random_blip("caption", 1, words), normalised(random_pixels(3, 1))
    with torch.inference_mode():
        expected = net.visual_encoder.forward_features(pixels)
        encoder = prepare(net, CPU, "float32").visual_encoder
        encoder.rows = rows
        found = encode_image(encoder, pixels)
        assert found.shape == (3, 26, 40)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert encode_image(encoder, pixels[1:2]).equal(found[1:2])
