"""Questions and captions, cut before any work that grows faster than their length."""

import unicodedata

#: LAVIS takes 50 words and the tokenizer knows none of more than 100 characters; as much again may lie between them.
MAX_CHARACTERS = 10_000
#: Combining characters in a row, as in the Stream-Safe Text Format of Unicode (UAX #15). Sorting them is quadratic.
MAX_MARKS = 30


def cut(text: str) -> str:
    """The part of `text` that a model can use; a text that fits stays as it is."""
    text = text[:MAX_CHARACTERS]
    if text.isascii():
        return text
    kept, marks = [], 0
    for character in text:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks <= MAX_MARKS:
            kept.append(character)
    return "".join(kept)
