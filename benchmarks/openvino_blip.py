"""Hugging Face's BLIP with its parts converted to OpenVINO, as OpenVINO's own notebook for BLIP does it.

The image encoder, the text encoder and the decoder with its past are converted; transformers searches the beams. The
decoder's keys and values of a picture are computed once, which the notebook does anew for every token. It runs in the
environment of requirements-openvino.txt.
"""

from typing import Any

import nncf
import openvino
import torch
from openvino.properties import hint
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithCrossAttentions

#: What the device computes in, and whether weights are 8-bit.
PRECISIONS = {"float32": (openvino.Type.f32, False), "bfloat16": (openvino.Type.bf16, False), "int8": (None, True)}


def convert(model: Any, precision: str, text: Tensor) -> None:
    """Let the parts of a BLIP of transformers' run in OpenVINO, in place.

    Args:
        model: BlipForConditionalGeneration, BlipForQuestionAnswering or BlipForImageTextRetrieval.
        precision: a key of `PRECISIONS`.
        text: (1, L) token ids that stand for a text about an image.
    """
    vision, width = model.config.vision_config, model.config.text_config.hidden_size
    pixels = torch.zeros(1, 3, vision.image_size, vision.image_size)
    states = torch.zeros(1, (vision.image_size // vision.patch_size) ** 2 + 1, vision.hidden_size)
    encode = compiled(_Image(model.vision_model), (pixels,), precision)
    model.vision_model.forward = lambda pixel_values, **_: _states(encode(pixel_values)[0])
    if hasattr(model, "text_encoder"):
        look = compiled(_Text(model.text_encoder), (text, states), precision)
        read = compiled(_Text(model.text_encoder), (text,), precision) if hasattr(model, "itm_head") else None

        def encoded(input_ids: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Any:
            if encoder_hidden_states is None:
                assert read is not None
                return _states(read(input_ids)[0])
            return _states(look(input_ids, encoder_hidden_states)[0])

        model.text_encoder.forward = encoded
    if hasattr(model, "text_decoder"):
        past = states if not hasattr(model, "text_encoder") else torch.zeros(1, text.shape[1], width)
        _convert_decoder(model.text_decoder, past, precision)


def _convert_decoder(decoder: Any, states: Tensor, precision: str) -> None:
    config = decoder.config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    past = torch.zeros(2 * layers, 3, heads, 4, config.hidden_size // heads)
    cross = torch.zeros(2 * layers, 1, heads, states.shape[1], config.hidden_size // heads)
    attend = compiled(_Cross(decoder), (states,), precision)
    step = compiled(_Decoder(decoder), (torch.zeros(3, 1, dtype=torch.long), cross, past), precision)
    seen: dict[str, Any] = {}  # the keys and values of the states that were looked at last

    def forward(
        input_ids: Tensor,
        encoder_hidden_states: Tensor,
        past_key_values: DynamicCache,
        encoder_attention_mask: Tensor | None = None,  # noqa: ARG001 - all ones
        **_: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        if past_key_values.get_seq_length():
            before = torch.stack([part for layer in past_key_values.layers for part in (layer.keys, layer.values)])
        else:
            before = past.new_zeros(2 * layers, len(input_ids), heads, 0, past.shape[-1])
            seen["cross"] = attend(encoder_hidden_states[:1])[0]  # one picture: the same for all beams
        logits, new = step(input_ids, seen["cross"], before)
        for index in range(layers):
            past_key_values.update(new[2 * index], new[2 * index + 1], index)
        return CausalLMOutputWithCrossAttentions(logits=logits, past_key_values=past_key_values)

    decoder.forward = forward


def compiled(module: nn.Module, example: tuple[Tensor, ...], precision: str) -> Any:
    """`module` as a function of tensors, which gives a list of them."""
    kind, is_int8 = PRECISIONS[precision]
    with torch.no_grad():
        converted = openvino.convert_model(module.eval(), example_input=example)
    if is_int8:
        converted = nncf.compress_weights(converted)  # to 8 bits, the default
    settings = {hint.performance_mode: hint.PerformanceMode.LATENCY}
    if kind is not None:
        settings[hint.inference_precision] = kind
    request = openvino.compile_model(converted, "CPU", settings).create_infer_request()

    def run(*inputs: Tensor) -> list[Tensor]:
        found = request.infer([given.numpy() for given in inputs], share_inputs=True, share_outputs=False)
        return [torch.from_numpy(value) for value in found.values()]

    return run


def _states(states: Tensor) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=states[:, 0])


class _Image(nn.Module):
    """Pixels (1, 3, S, S) -> states (1, N, C)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixel_values=pixels).last_hidden_state  # type: ignore[no-any-return]


class _Text(nn.Module):
    """Ids (1, L), and states (1, N, C) to look at or none -> states (1, L, C)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, image: Tensor | None = None) -> Tensor:
        return self.encoder(input_ids=ids, encoder_hidden_states=image).last_hidden_state  # type: ignore[no-any-return]


class _Cross(nn.Module):
    """States (B, N, C) -> the decoder's keys and values of them (2 * layers, B, H, N, d)."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, states: Tensor) -> Tensor:
        parts = []
        for layer in self.decoder.bert.encoder.layer:
            attention = layer.crossattention.self
            for linear in (attention.key, attention.value):
                heads = linear(states).unflatten(-1, (attention.num_attention_heads, -1))
                parts.append(heads.transpose(1, 2))
        return torch.stack(parts)


def _filled(parts: Tensor) -> DynamicCache:
    """A cache of keys and values (2 * layers, B, H, P, d), made without operations."""
    cache = DynamicCache()
    for keys, values in zip(parts[::2], parts[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        cache.layers.append(layer)
    return cache


class _Decoder(nn.Module):
    """Ids (B, T), what `_Cross` gives, the past (2 * layers, B, H, P, d) -> logits (B, T, V), new keys and values."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor, cross: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        bert, length = self.decoder.bert, past.shape[3]
        cache = EncoderDecoderCache(_filled(past), _filled(cross))
        cache.is_updated = dict.fromkeys(range(len(bert.encoder.layer)), True)
        positions = torch.arange(ids.shape[1])[None] + length
        x = bert.embeddings(input_ids=ids, position_ids=positions)
        visible = torch.arange(length + ids.shape[1])[None] <= positions[0, :, None]  # causal
        mask = torch.where(visible, 0.0, -1e4)[None, None]
        for layer in bert.encoder.layer:
            x = layer(x, cross, attention_mask=mask, past_key_values=cache)
        new = [
            part[:, :, length:] for layer in cache.self_attention_cache.layers for part in (layer.keys, layer.values)
        ]
        return self.decoder.cls(x), torch.stack(new)
