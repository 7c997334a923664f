"""The long strings of a request, cut out of its JSON as they came.

Parsing a body of 66 MB holds up everyone for 200 ms, and writing it again for 300. Here the event loop sees short
texts in their place, and the long ones in pieces.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator

from blip.server.refusals import refusal

SHORTEST = 1_200_001  # bytes of what is cut out; the longest other text has 100,000 characters, of 12 bytes each
TEXT_BYTES = 1_000_000  # of a request beside its image
VALUES = 20_000  # in a request; refusing a million wrong ones takes many seconds, and everyone waits
REST_BYTES = 12_000_000  # of the JSON without them: a million characters, of as many each
QUOTES = 1_100_000  # in a request: a million in its texts, and those around them
STEPS = 1_000  # quotes that are looked at between two turns of others
PIECE = 1 << 18  # bytes of a long string that are looked at between two turns of others
SEARCH = 1_000  # bytes before the end of a piece, in which there is a place to part it
HEAD = 4096  # characters of a long string that tell what it is
ESCAPE = 6  # bytes of the longest: \u0041
#: What a JSON string has as it is, and a data address too: printable ASCII but for quotes and backslashes.
PLAIN = bytes(set(range(0x20, 0x7F)) - set(b'"\\'))
MANY_VALUES = refusal("json", f"the body has more than {VALUES} values; send an image as base64.")
TOO_MUCH = refusal("body", "the body has more than 1000000 characters beside its image; send fewer.")


class NotPlainError(Exception):
    """A long string has no plain bytes where a piece of it could end."""


class StandIn(str):
    """A short string that stands for an image in a request.

    Attributes:
        is_used: whether it was found where it may be.
    """

    __slots__ = ("is_used",)

    is_used: bool


class LongText(StandIn):
    """A long string as a short one, which stands for it until it is written.

    Attributes:
        content: the bytes of the long string in JSON.
        head: its first characters.
        length: its characters.
        is_ascii: whether all of them are.
    """

    __slots__ = ("content", "head", "is_ascii", "length")

    content: memoryview
    head: str
    length: int
    is_ascii: bool

    def pieces(self) -> Iterator[str]:
        """The long string in parts.

        Raises:
            NotPlainError: no data address has so few plain characters.
            ValueError: it is not a string of JSON.
        """
        at = 0
        while at < len(self.content):
            end = self._place_to_part(at)
            piece = bytes(self.content[at:end])
            yield json.loads(b'"' + piece + b'"') if piece.translate(None, PLAIN) else piece.decode("ascii")
            at = end

    def _place_to_part(self, start: int) -> int:
        """Where the piece from `start` ends, and no escape and no character is parted: after some plain bytes."""
        last = start + PIECE
        if last >= len(self.content):
            return len(self.content)
        for end in range(last, max(last - SEARCH, start + ESCAPE), -1):
            if not bytes(self.content[end - ESCAPE : end]).translate(None, PLAIN):
                return end
        raise NotPlainError


#: By the strings that a request has in their place.
Texts = dict[str, StandIn]


async def cut(body: bytearray) -> tuple[bytes, dict[str, LongText]]:
    """The JSON of a request without its long strings, and those by the short ones that stand for them.

    Raises:
        HTTPException: 422; a string is not one of JSON, or there is too much beside them.
    """
    parts: list[bytes] = []
    texts: dict[str, LongText] = {}
    done = number = 0
    async for start, end in _strings(body):
        number += 1
        if number > 2 * VALUES:  # each has a name at most
            raise MANY_VALUES
        if end - start >= SHORTEST:
            text = LongText(uuid.uuid4().hex)
            text.content, text.is_used = memoryview(body)[start:end], False
            await _check(text)
            texts[text] = text
            parts += [bytes(body[done:start]), text.encode()]
            done = end
    if len(body) - done + sum(map(len, parts)) > REST_BYTES:
        raise TOO_MUCH
    return b"".join([*parts, bytes(body[done:])]), texts


async def _strings(body: bytearray) -> AsyncIterator[tuple[int, int]]:
    """Where each string begins and ends, in JSON; others get their turn meanwhile."""
    start, at = 0, -1  # of the string that has begun, or 0; of the last quote
    for step in range(QUOTES):
        at = body.find(b'"', at + 1)
        if at < 0:
            return
        if not start:
            start = at + 1
        elif not _is_escaped(body, start, at):
            yield start, at
            start = 0
        if step % STEPS == 0:
            await asyncio.sleep(0)
    raise TOO_MUCH


def _is_escaped(body: bytearray, start: int, quote: int) -> bool:
    """Whether a quote belongs to the string from `start`: there is an odd number of backslashes before it."""
    first, size = quote, 1
    while first > start and body[first - 1] == ord("\\"):
        before = bytes(body[max(start, first - size) : first])
        first -= len(before) - len(before.rstrip(b"\\"))
        size = min(2 * size, PIECE)
    return (quote - first) % 2 == 1


async def _check(text: LongText) -> None:
    """See that it is a string of JSON, how long it is, and whether it is ASCII."""
    text.head, text.length, text.is_ascii = "", 0, True
    try:
        for piece in text.pieces():
            text.head = text.head or piece[:HEAD]
            text.length += len(piece)
            text.is_ascii = text.is_ascii and piece.isascii()
            await asyncio.sleep(0)
    except NotPlainError:
        text.is_ascii = False  # so it is refused, wherever it is
    except ValueError as error:
        raise refusal("json", "the body is not valid JSON; send a JSON object.") from error


def splice(written: bytes, text: LongText) -> list[bytes | memoryview]:
    """JSON in parts, with the long string in place of the short one."""
    parts: list[bytes | memoryview] = []
    for part in written.split(text.encode()):
        parts += [text.content, part]
    return parts[1:]
