"""The documents of this repository, and what stands in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import ROOT

DOCUMENTS = sorted([ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "deploy" / "README.md", *ROOT.glob("docs/*.md")])


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        place: the document and the line.
        language: of the code.
        code: what stands in it.
        shown: the block that follows at once, if it shows what this one prints; else empty.
    """

    place: str
    language: str
    code: str
    shown: str


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a document."""
    text = path.read_text()
    found = list(re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    for block, following in zip(found, [*found, None][1:], strict=True):
        is_shown = following and following[1] in ("json", "text") and not text[block.end() : following.start()].strip()
        place = f"{path.relative_to(ROOT)}:{text[: block.start()].count(chr(10)) + 1}"
        yield Block(place, block[1], block[2], following[2] if following and is_shown else "")
