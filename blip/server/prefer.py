"""The Prefer header of a request, as RFC 7240 has it: lists, any case, quoted values, several headers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

#: One preference and its parameters; a comma or a semicolon within quotes ends nothing.
_PREFERENCE = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*")+')
_TOKEN = re.compile(r'\s*([^\s=;"]+)\s*(?:=\s*("(?:[^"\\]|\\.)*"|[^\s;"]*))?')
LENGTH = 1_000  # characters that are read; quotes that do not match take time that grows with the square of them


@dataclass(frozen=True)
class Preference:
    """How a client wants to be answered.

    Attributes:
        respond_async: with the running prediction, at once or after `wait`.
        wait: seconds to wait for the prediction's end before that; None for no limit.
    """

    respond_async: bool = False
    wait: int | None = None

    @classmethod
    def of(cls, headers: Iterable[tuple[bytes, bytes]]) -> "Preference":
        """Read the headers of an ASGI scope; of a preference that is named twice the first counts."""
        value = b",".join(value for name, value in headers if name == b"prefer").decode("latin-1")[:LENGTH]
        named: dict[str, str] = {}
        for item in _PREFERENCE.findall(value):
            if found := _TOKEN.match(item):
                named.setdefault(found[1].lower(), (found[2] or "").strip('"'))
        seconds = named.get("wait", "")
        wait = int(seconds) if seconds.isdecimal() and seconds.isascii() and len(seconds) < 10 else None
        return cls("respond-async" in named, wait)

    def applied(self, *, is_async: bool) -> str:
        """The value of the Preference-Applied header; empty where nothing that is known was preferred.

        `is_async` tells whether the answer came before the end of the prediction.
        """
        wait = [] if self.wait is None else [f"wait={self.wait}"]
        return ", ".join((["respond-async"] if self.respond_async and is_async else []) + wait)
