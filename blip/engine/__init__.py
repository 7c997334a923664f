"""BLIP's three tasks on LAVIS's models, fast and exact. Imports torch and nothing else of this project."""

from blip.engine.beam import NonFiniteLogitsError, Search
from blip.engine.generate import Match, answer, caption, match, stream_answer, stream_caption, tokenize
from blip.engine.text import Tokens, text_of

__all__ = [
    "Match",
    "NonFiniteLogitsError",
    "Search",
    "Tokens",
    "answer",
    "caption",
    "match",
    "stream_answer",
    "stream_caption",
    "text_of",
    "tokenize",
]
