"""Tokens -> text, of a whole caption or answer or of what is certain of it. Needs no device."""

import os
from typing import Any, NamedTuple

from blip.engine.encoders import Module

#: A transformers tokenizer.
Tokenizer = Any
#: What transformers' clean_up_tokenization replaces; in "do n ' t" it replaces two, one after the other.
_CLEANED = (" .", " ?", " !", " ,", " ' z", " n ' t", " n't", " 'm", " 's", " 've", " 're")
#: Endings, one for each way in which later text can change the present text.
_CONTINUATIONS = sorted({"", "z", " z", *(pattern[start:] for pattern in _CLEANED for start in range(len(pattern)))})


class Tokens(NamedTuple):
    """A caption or an answer, or its beginning."""

    ids: list[int]  # the prompt's too
    whole: bool  # False where more may follow


def text_of(model: Module, tokens: Tokens) -> str:
    """The text of a BlipCaption's or BlipVQA's tokens, without the prompt; of a beginning, the certain words of it.

    LAVIS cuts off as many characters as the prompt has, also where a word goes on or a space is closed. Where the
    library is another, `prompt_tokens` are left out before.
    """
    decode, own = _text if tokens.whole else _final_words, getattr(model, "prompt_tokens", None)
    if own is not None:
        return decode(model.tokenizer, tokens.ids[own:]).removeprefix("##")
    return decode(model.tokenizer, tokens.ids)[len(getattr(model, "prompt", "")) :]


def _text(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """`tokenizer.decode(tokens, skip_special_tokens=True)`, which lists all special tokens anew for every token."""
    special = set(tokenizer.all_special_ids)
    words = tokenizer.convert_ids_to_tokens([token for token in tokens if token not in special])
    text: str = tokenizer.clean_up_tokenization(tokenizer.convert_tokens_to_string(words))
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
