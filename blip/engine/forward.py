"""One pass of each task from pixels and token ids to scores, in fixed shapes: what a CUDA graph captures.

Nothing here reads a value back from the device. Pixels are (B, S, S, 3) uint8, as a picture is decoded.
Shapes: B samples, S pixels, N image states, L text tokens, P prompt tokens, V words, C channels.
"""

import torch.nn.functional as F
from torch import Tensor, cat, stack

from blip.engine.decoder import CachedDecoder
from blip.engine.encoders import Module, encode_image, encode_text, normalise


def begin_caption(net: Module, decoder: CachedDecoder, pixels: Tensor, prompt: Tensor) -> Tensor:
    """The logits (B, V) of a caption's first new token: pixels and prompt (B, P) of a BlipCaption."""
    decoder.load(_image(net, pixels), None)
    return decoder.prefill(prompt)


def begin_answer(
    net: Module, decoder: CachedDecoder, pixels: Tensor, ids: Tensor, mask: Tensor, prompt: Tensor
) -> Tensor:
    """The logits (B, V) of an answer's first token: ids and mask (B, L) of the question, of a BlipVQA."""
    image = _image(net, pixels)
    question = encode_text(net.text_encoder, _marked(net, ids), mask, image)  # (B, L, C)
    # LAVIS lets the decoder see a batch's padding. Mask it, to give the answer that a question gets alone.
    decoder.load(question, mask)
    return decoder.prefill(prompt)


def match_scores(net: Module, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, 2) in float32: the probability of a match and the cosine of the features, of a BlipITM."""
    image = _image(net, pixels)
    # Both heads' texts at the same time: the weights are read once.
    states = encode_text(net.text_encoder, cat([_marked(net, ids), ids]), mask.repeat(2, 1), image)
    pair, text = states[:, 0].chunk(2)  # (B, C)
    probabilities = _linear(net.itm_head, pair).softmax(-1)[:, 1]  # (B,)
    similarities = F.cosine_similarity(_linear(net.vision_proj, image[:, 0]), _linear(net.text_proj, text))  # (B,)
    return stack((probabilities, similarities), dim=1)


def _image(net: Module, pixels: Tensor) -> Tensor:
    """The states (B, N, C) of the pictures."""
    return encode_image(net.visual_encoder, normalise(net.pixel_values, pixels))


def _marked(net: Module, ids: Tensor) -> Tensor:
    """The ids with the token first that tells the text encoder to look at the image."""
    ids = ids.clone()
    ids[:, 0] = net.tokenizer.enc_token_id
    return ids


def _linear(linear: Module, x: Tensor) -> Tensor:
    """`linear` in its own precision, its result in float32."""
    out: Tensor = linear(x.to(linear.weight.dtype)).float()
    return out
