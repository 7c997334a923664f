"""The three BLIP tasks on LAVIS's models, fast: a batch in, a result or an error for every sample out.

The strings are those that `BlipCaption.generate` and `BlipVQA.predict_answers(inference_method="generate")` give for
each sample on its own, the numbers those of `BlipITM.forward` with both of its heads. The models are given: neither
LAVIS nor the server is imported.
Shapes: B samples, S pixels, L text tokens, P prompt tokens, N image states, C channels.
"""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blip.engine.beam import NonFiniteLogitsError, Sample, Search, beam_search
from blip.engine.decoder import CachedDecoder, DecoderShape
from blip.engine.encoders import Module, encode_image, encode_text
from blip.engine.graphs import GraphedDecoder

#: The defaults of LAVIS's `generate` and `predict_answers`.
CAPTION = Search(num_beams=3, min_length=10, max_length=30)
ANSWER = Search(num_beams=3, min_length=1, max_length=10)
#: A transformers tokenizer.
Tokenizer = Any
#: What transformers' clean_up_tokenization replaces; in "do n ' t" it replaces two, one after the other.
_CLEANED = (" .", " ?", " !", " ,", " ' z", " n ' t", " n't", " 'm", " 's", " 've", " 're")
#: Endings, one for each way in which later text can change the present text.
_CONTINUATIONS = sorted({"", "z", " z", *(pattern[start:] for pattern in _CLEANED for start in range(len(pattern)))})


class Match(NamedTuple):
    """How an image and a text go together."""

    probability: float  # of a match, by the matching head, 0 to 1
    similarity: float  # cosine of the two features, -1 to 1


def caption(
    model: Module, pixels: Tensor, search: Search = CAPTION, decoder: GraphedDecoder | None = None
) -> list[str | Exception]:
    """Caption images with a BlipCaption.

    Args:
        model: LAVIS's BlipCaption, or one that `precision.prepare` converted.
        pixels: (B, 3, S, S), normalised as LAVIS's image processor does.
        search: beams and lengths.
        decoder: made for this model and search; by default one is made for the batch.

    Returns:
        B captions, a NonFiniteLogitsError in the place of one that failed.
    """
    return _results(model, _caption_search(model, pixels, search, decoder), len(model.prompt))


def stream_caption(
    model: Module, pixels: Tensor, search: Search = CAPTION, decoder: GraphedDecoder | None = None
) -> Iterator[list[str | Exception]]:
    """Stream `caption`: after every token, yield for each sample the text that is newly certain (often "").

    The pieces of a sample, joined, are its caption. A sample that fails gives its error once, then "".
    """
    return _pieces(model, _caption_search(model, pixels, search, decoder), len(model.prompt))


def answer(
    model: Module,
    pixels: Tensor,
    questions: list[str],
    search: Search = ANSWER,
    decoder: GraphedDecoder | None = None,
) -> list[str | Exception]:
    """Answer B questions about B images with a BlipVQA; arguments and results as for `caption`.

    Questions beyond the model's max_txt_len are cut off, as LAVIS does.
    """
    return _results(model, _answer_search(model, pixels, questions, search, decoder))


def stream_answer(
    model: Module,
    pixels: Tensor,
    questions: list[str],
    search: Search = ANSWER,
    decoder: GraphedDecoder | None = None,
) -> Iterator[list[str | Exception]]:
    """Stream `answer`; pieces as for `stream_caption`."""
    return _pieces(model, _answer_search(model, pixels, questions, search, decoder))


@torch.inference_mode()
def match(model: Module, pixels: Tensor, texts: list[str]) -> list[Match | Exception]:
    """Compare B images with B texts, pair by pair, with a BlipITM; each image is encoded once for both heads.

    Args:
        model: LAVIS's BlipITM, or one that `precision.prepare` converted.
        pixels: (B, 3, S, S), normalised as LAVIS's image processor does.
        texts: B texts, cut off beyond the model's max_txt_len as LAVIS does.

    Returns:
        B matches, a NonFiniteLogitsError in the place of one that failed.
    """
    image, ids, mask = _encode_image(model, pixels), *_tokenize(model, texts)
    assert len(ids) == len(image), (ids.shape, image.shape)
    text = encode_text(model.text_encoder, ids, mask, None)[:, 0]  # (B, C)
    ids[:, 0] = model.tokenizer.enc_token_id
    pair = encode_text(model.text_encoder, ids, mask, image)[:, 0]  # (B, C)
    probabilities = _linear(model.itm_head, pair).softmax(-1)[:, 1]  # (B,)
    similarities = F.cosine_similarity(_linear(model.vision_proj, image[:, 0]), _linear(model.text_proj, text))  # (B,)
    finite = (probabilities.isfinite() & similarities.isfinite()).tolist()
    scores = map(Match, probabilities.tolist(), similarities.tolist())
    return [score if good else NonFiniteLogitsError() for score, good in zip(scores, finite, strict=True)]


@torch.inference_mode()
def _caption_search(
    model: Module, pixels: Tensor, search: Search, decoder: GraphedDecoder | None
) -> Iterator[list[Sample]]:
    image = _encode_image(model, pixels)
    prompt = model.tokenizer(model.prompt, return_tensors="pt").input_ids[:, :-1]  # (1, P): without the end token
    prompt[:, 0] = model.tokenizer.bos_token_id
    prompt = prompt.expand(len(image), -1).to(image.device)
    yield from _search(model, prompt, image, None, search, decoder)


@torch.inference_mode()
def _answer_search(
    model: Module, pixels: Tensor, questions: list[str], search: Search, decoder: GraphedDecoder | None
) -> Iterator[list[Sample]]:
    image, ids, mask = _encode_image(model, pixels), *_tokenize(model, questions)
    assert len(ids) == len(image), (ids.shape, image.shape)
    ids[:, 0] = model.tokenizer.enc_token_id
    states = encode_text(model.text_encoder, ids, mask, image)  # (B, L, C)
    prompt = torch.full((len(ids), 1), model.tokenizer.bos_token_id, device=ids.device)
    # LAVIS lets the decoder see a batch's padding. Mask it, to give the answer that a question gets alone.
    yield from _search(model, prompt, states, mask, search, decoder)


def _search(
    model: Module,
    prompt: Tensor,
    states: Tensor,
    mask: Tensor | None,
    search: Search,
    graphed: GraphedDecoder | None,
) -> Iterator[list[Sample]]:
    batch, length, _ = states.shape
    shape = DecoderShape(batch, length, mask is not None, prompt.shape[1], search)
    decoder = graphed or CachedDecoder(model.text_decoder, shape)
    decoder.load(states, mask)
    return beam_search(
        prompt,
        decoder.prefill(prompt),
        decoder.step,
        search,
        eos_token_id=model.tokenizer.sep_token_id,
        pad_token_id=model.tokenizer.pad_token_id,
    )


def _results(model: Module, search: Iterator[list[Sample]], skip: int = 0) -> list[str | Exception]:
    for samples in search:
        last = samples
    return [sample.error or _text(model.tokenizer, sample.tokens)[skip:] for sample in last]


def _pieces(model: Module, search: Iterator[list[Sample]], skip: int = 0) -> Iterator[list[str | Exception]]:
    sent: list[int] = []  # characters, the prompt's included
    failed: set[int] = set()
    for samples in search:
        sent = sent or [skip] * len(samples)
        pieces: list[str | Exception] = []
        for index, sample in enumerate(samples):
            if sample.error is not None:
                pieces.append("" if index in failed else sample.error)
                failed.add(index)
                continue
            tokens = sample.settled()
            text = (_text if sample.done else _final_words)(model.tokenizer, tokens)
            pieces.append(text[sent[index] :])
            sent[index] = max(sent[index], len(text))
        yield pieces


def _text(tokenizer: Tokenizer, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def _final_words(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The part of the text of `tokens` that no later token can change, in whole words.

    The last word may still grow ("surf" to "surfboard"), and cleaning up may close a space ("do n ' t" to "don't").
    Nothing else can change, so a few continuations are enough to try.
    """
    raw = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    last_word = raw.rpartition(" ")[2]
    whole = tokenizer.clean_up_tokenization(raw)[: -len(last_word)].rstrip() if last_word else ""
    return os.path.commonprefix(  # noqa: RUF071 - of strings, as it happens
        [whole, *(tokenizer.clean_up_tokenization(raw + end) for end in _CONTINUATIONS)]
    )


def _encode_image(model: Module, pixels: Tensor) -> Tensor:
    return encode_image(model.visual_encoder, pixels)


def _tokenize(model: Module, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask, both (B, L) on the model's device.

    L is a multiple of how many numbers a processor adds at a time, so a longer neighbour only adds zeros. A text's
    result is then the same, bit for bit, alone and in a batch.
    """
    tokens = model.tokenizer(
        texts, padding="longest", truncation=True, max_length=model.max_txt_len, return_tensors="pt"
    ).to(model.device)
    more = (0, -tokens.input_ids.shape[1] % 16)
    return F.pad(tokens.input_ids, more), F.pad(tokens.attention_mask.bool(), more)


def _linear(linear: Module, x: Tensor) -> Tensor:
    """`linear` in its own precision, its result in float32."""
    out: Tensor = linear(x.to(linear.weight.dtype)).float()
    return out
