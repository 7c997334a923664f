"""The three BLIP tasks on LAVIS's models, fast: a batch in, a result or an error for every sample out.

The tokens are those that `BlipCaption.generate` and `BlipVQA.predict_answers(inference_method="generate")` choose for
each sample on its own, the numbers those of `BlipITM.forward` with both of its heads. The models are given: neither
LAVIS nor the server is imported.
Shapes: B samples, S pixels, L text tokens, P prompt tokens, N image states, C channels.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blip.engine import forward, kernels
from blip.engine.beam import NonFiniteLogitsError, Sample, Search, beam_search
from blip.engine.decoder import CachedDecoder, DecoderShape
from blip.engine.encoders import Module, padded_length
from blip.engine.graphs import MatchGraphs, TextGraphs
from blip.engine.text import Tokens

#: The defaults of LAVIS's `generate` and `predict_answers`.
CAPTION = Search(num_beams=3, min_length=10, max_length=30)
ANSWER = Search(num_beams=3, min_length=1, max_length=10)
#: A question or a text, or its ids from `tokenize`.
Text = str | list[int]


class Match(NamedTuple):
    """How an image and a text go together."""

    probability: float  # of a match, by the matching head, 0 to 1
    similarity: float  # cosine of the two features, -1 to 1


def caption(
    model: Module, pixels: Tensor, search: Search = CAPTION, graphs: TextGraphs | None = None
) -> list[Tokens | Exception]:
    """Caption images with a BlipCaption.

    Args:
        model: LAVIS's BlipCaption, or one that `precision.prepare` converted.
        pixels: (B, S, S, 3) uint8, as a picture is decoded.
        search: beams and lengths.
        graphs: made for this model and search; used for batches that they have a bucket for.

    Returns:
        The tokens of B captions, a NonFiniteLogitsError in the place of one that failed.
    """
    return _last(_caption_search(model, pixels, search, graphs, follow=False))


def stream_caption(
    model: Module, pixels: Tensor, search: Search = CAPTION, graphs: TextGraphs | None = None
) -> Iterator[list[Tokens | Exception]]:
    """Stream `caption`: after every token, yield for each sample what is certain of its tokens; at last, its result.

    A beginning never shrinks. A sample that fails gives its error from then on.
    """
    return _beginnings(_caption_search(model, pixels, search, graphs, follow=True))


def answer(
    model: Module,
    pixels: Tensor,
    questions: Sequence[Text],
    search: Search = ANSWER,
    graphs: TextGraphs | None = None,
) -> list[Tokens | Exception]:
    """Answer B questions about B images with a BlipVQA; arguments and results as for `caption`.

    Questions beyond the model's max_txt_len are cut off, as LAVIS does.
    """
    return _last(_answer_search(model, pixels, questions, search, graphs, follow=False))


def stream_answer(
    model: Module,
    pixels: Tensor,
    questions: Sequence[Text],
    search: Search = ANSWER,
    graphs: TextGraphs | None = None,
) -> Iterator[list[Tokens | Exception]]:
    """Stream `answer`, as `stream_caption` does."""
    return _beginnings(_answer_search(model, pixels, questions, search, graphs, follow=True))


@torch.inference_mode()
def match(
    model: Module, pixels: Tensor, texts: Sequence[Text], graphs: MatchGraphs | None = None
) -> list[Match | Exception]:
    """Compare B images with B texts, pair by pair, with a BlipITM; each image is encoded once for both heads.

    Args:
        model: LAVIS's BlipITM, or one that `precision.prepare` converted.
        pixels: (B, S, S, 3) uint8, as a picture is decoded.
        texts: B texts, cut off beyond the model's max_txt_len as LAVIS does.
        graphs: made for this model; used for batches that they have a bucket for.

    Returns:
        B matches, a NonFiniteLogitsError in the place of one that failed.
    """
    ids, mask = _batch(model, texts, pixels)
    if graphs and graphs.has_room(*ids.shape):
        scores = graphs.run(pixels, ids, mask)
    else:
        scores = forward.match_scores(model, pixels, ids, mask)
    matches = [Match(*pair) for pair in scores.tolist()]
    return [found if all(map(math.isfinite, found)) else NonFiniteLogitsError() for found in matches]


def tokenize(model: Module, text: str) -> list[int]:
    """The ids of a question or a text, cut off at the model's max_txt_len; needs no device."""
    ids: list[int] = model.tokenizer(text, truncation=True, max_length=model.max_txt_len).input_ids
    return ids


def caption_prompt(model: Module) -> Tensor:
    """The ids (P,) that every caption of a BlipCaption begins with, as `BlipCaption.generate` makes them."""
    prompt: Tensor = model.tokenizer(model.prompt, return_tensors="pt").input_ids[0, :-1]  # without the end token
    prompt[0] = model.tokenizer.bos_token_id
    return prompt


def answer_prompt(model: Module) -> Tensor:
    """The id (1,) that every answer of a BlipVQA begins with."""
    return torch.tensor([model.tokenizer.bos_token_id])


@torch.inference_mode()
def _caption_search(
    model: Module, pixels: Tensor, search: Search, graphs: TextGraphs | None, *, follow: bool
) -> Iterator[list[Sample]]:
    if graphs and graphs.has_room(len(pixels)):
        yield from graphs.run(follow, pixels)
        return
    prompt = caption_prompt(model).to(pixels.device).expand(len(pixels), -1)
    states = model.visual_encoder.pos_embed.shape[1]
    decoder = CachedDecoder(model.text_decoder, DecoderShape(len(pixels), states, False, prompt.shape[1], search))
    yield from _search(model, prompt, forward.begin_caption(model, decoder, pixels, prompt), decoder)


@torch.inference_mode()
def _answer_search(
    model: Module,
    pixels: Tensor,
    questions: Sequence[Text],
    search: Search,
    graphs: TextGraphs | None,
    *,
    follow: bool,
) -> Iterator[list[Sample]]:
    ids, mask = _batch(model, questions, pixels)
    if graphs and graphs.has_room(*ids.shape):
        yield from graphs.run(follow, pixels, ids, mask)
        return
    prompt = answer_prompt(model).to(pixels.device).expand(len(pixels), -1)
    decoder = CachedDecoder(model.text_decoder, DecoderShape(len(ids), ids.shape[1], True, 1, search))
    yield from _search(model, prompt, forward.begin_answer(model, decoder, pixels, ids, mask, prompt), decoder)


def _search(model: Module, prompt: Tensor, logits: Tensor, decoder: CachedDecoder) -> Iterator[list[Sample]]:
    return beam_search(
        prompt,
        logits,
        decoder.step,
        decoder.shape.search,
        eos_token_id=model.tokenizer.sep_token_id,
        pad_token_id=model.tokenizer.pad_token_id,
    )


def _last(search: Iterator[list[Sample]]) -> list[Tokens | Exception]:
    for samples in search:
        last = samples
    return [sample.error or Tokens(sample.tokens, whole=True) for sample in last]


def _beginnings(search: Iterator[list[Sample]]) -> Iterator[list[Tokens | Exception]]:
    for samples in search:
        yield [sample.error or Tokens(sample.settled(), sample.done) for sample in samples]


def _is_small(model: Module) -> bool:
    """Whether torch multiplies a short text's attention in other ways than a long one's, on a CPU."""
    berts = [model.text_encoder, model.text_decoder.bert] if hasattr(model, "text_decoder") else [model.text_encoder]
    attentions = [bert.encoder.layer[0].attention.self for bert in berts]
    return any(
        kernels.has_few_products(attention.num_attention_heads, attention.attention_head_size)
        for attention in attentions
    )


def _batch(model: Module, texts: Sequence[Text], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask, both (B, L), beside the pixels.

    L is a multiple of how many numbers a processor adds at a time, so a longer neighbour only adds zeros. In a small
    model on a CPU it is the same for all texts. A text's result is then the same, bit for bit, alone and in a batch.
    """
    assert len(texts) == len(pixels), (len(texts), pixels.shape)
    rows = [tokenize(model, text) if isinstance(text, str) else text for text in texts]
    longest = model.max_txt_len if pixels.is_cpu and _is_small(model) else max(map(len, rows))
    length = padded_length(model.text_encoder, longest)
    pad = model.tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
    return ids.to(pixels.device), mask.to(pixels.device)
