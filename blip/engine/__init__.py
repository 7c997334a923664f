"""BLIP's three tasks on LAVIS's models, fast and exact. Imports torch and nothing else of this project."""

from blip.engine.beam import NonFiniteLogitsError, Search
from blip.engine.generate import Match, answer, caption, match, stream_answer, stream_caption, tokenize

__all__ = [
    "Match",
    "NonFiniteLogitsError",
    "Search",
    "answer",
    "caption",
    "match",
    "stream_answer",
    "stream_caption",
    "tokenize",
]
