"""The image of a request: decoded from a data address or fetched from the web, within limits."""

import base64
import binascii
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import requests

from blip.config import Limits
from blip.errors import FetchError
from blip.server.egress import Deadline, Egress, EgressError
from blip.server.files import Files, Writer
from blip.server.long_text import LongText
from blip.server.uploads import Upload, Uploaded

SECONDS = 30.0  # for a whole download
TIMEOUT = (5, 10)  # seconds to connect, seconds without a byte
BLOCK = 1 << 16
MAX_ADDRESS = 4096  # characters; parsing an address can take time that grows with the square of them
URL_SAFE = bytes.maketrans(b"-_", b"+/")  # RFC 4648's other alphabet for base64
FIXES = {
    401: "it wants a login, so send the file itself",
    403: "it refuses this server, so send the file itself",
    404: "check that the file is there",
    410: "the file is gone, so send another address",
    429: "it has had too many requests, so try again later",
}
CRUMBS = 10_000  # pieces below 64 bytes that a download may have; each takes time from all requests


class Fetcher:
    """Finds the images that requests name, within limits."""

    def __init__(self, egress: Egress, files: Files, limits: Limits) -> None:
        self.egress = egress
        self.files = files
        self.max_bytes = limits.max_image_bytes
        self.user_agent = limits.user_agent
        #: One at a time decodes base64: it takes the interpreter from the event loop, and the more threads the longer.
        self.decoding = threading.Lock()

    def source(self, value: object) -> "Source | Uploaded":
        """Where an image is.

        Raises:
            FetchError: `value` is not the address of an image.
        """
        return Uploaded(value) if isinstance(value, Upload) else Source(value, self)


class Source:
    """Where an image is: an http, https or data address that looks right."""

    def __init__(self, value: object, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._cancelled = False
        self._deadline: Deadline | None = None
        if not isinstance(value, str):
            raise FetchError("image must be a string: an http, https or data address.")
        head, size, is_ascii = value[:MAX_ADDRESS], len(value), value.isascii()
        if isinstance(value, LongText):
            head, size, is_ascii = value.head, value.length, value.is_ascii
        if head[:5].lower() == "data:":
            # Base64 has 4 characters for 3 bytes; text may have 3 for one.
            self._data, self._start = value, head.find(",") + 1  # not a copy: it may be large
            header = head[: max(self._start - 1, 0)]
            self._base64 = header.replace(" ", "").lower().endswith(";base64")  # browsers allow spaces before it
            if not self._start or not is_ascii:
                raise FetchError("image is a malformed data address; send data:image/jpeg;base64, and the file.")
            if size - self._start > fetcher.max_bytes * (1.5 if self._base64 else 3):
                raise self._too_large()
            self._url = None
        else:
            if size > MAX_ADDRESS:
                raise FetchError(f"image is an address of more than {MAX_ADDRESS} characters; send the file itself.")
            self._url = value
            self._check_url(value)

    @property
    def is_remote(self) -> bool:
        """Whether it is fetched from elsewhere."""
        return self._url is not None

    def new_path(self) -> Path:
        """Where the image can be saved."""
        return self._fetcher.files.new()

    def save(self, path: Path) -> None:
        """Write the image to a new file at `path`.

        Raises:
            FetchError: it cannot be fetched or stored.
        """
        with Writer(path) as file:
            if self._url is None:
                with self._fetcher.decoding:
                    self._decode(file)
            else:
                self._download(self._url, file)

    def cancel(self) -> None:
        """Have `save` end soon, from another thread."""
        self._cancelled = True
        if self._deadline:
            self._deadline.expire()

    def _check_url(self, url: str) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or not url.isprintable():
            raise FetchError("image is not an http, https or data address; send one of these.")

    def _too_large(self) -> FetchError:
        return FetchError(f"image is larger than {self._fetcher.max_bytes / 1e6:g} MB; send a smaller file.")

    def _decode(self, file: Writer) -> None:
        """Decode in blocks: escaped or folded data takes many times its size, and other requests wait meanwhile."""
        size, rest, padded = 0, b"", False
        try:
            for block in self._unquoted():
                if self._base64:
                    block = rest + block.translate(URL_SAFE, b" \t\r\n\v\f")
                    whole = len(block) // 4 * 4
                    if padded and block:
                        raise binascii.Error("data after the padding")
                    padded = block[:whole].endswith(b"=")
                    rest, block = block[whole:], base64.b64decode(block[:whole], validate=True)
                size += file.write(block)
                if size > self._fetcher.max_bytes:
                    raise self._too_large()
            file.write(base64.b64decode(rest, validate=True))
        except binascii.Error as error:
            raise FetchError("image is a data address with damaged base64; encode the whole file again.") from error

    def _unquoted(self) -> Iterator[bytes]:
        rest = b""
        for block in self._blocks():
            block = rest + block
            cut = block.rfind(b"%", -2)
            rest = block[cut:] if cut >= 0 else b""  # not through an escape
            yield urllib.parse.unquote_to_bytes(block[: len(block) - len(rest)])
        yield urllib.parse.unquote_to_bytes(rest)

    def _blocks(self) -> Iterator[bytes]:
        """The data of the address, a part after the other."""
        start = self._start
        for piece in self._data.pieces() if isinstance(self._data, LongText) else [self._data]:
            for at in range(start, len(piece), BLOCK):
                yield piece[at : at + BLOCK].encode("ascii")
            start = max(start - len(piece), 0)

    def _download(self, url: str, file: Writer) -> None:
        host = urllib.parse.urlsplit(url).hostname
        headers = {
            "Accept-Encoding": "identity",  # no compression: an answer cannot grow while it is read
            "User-Agent": self._fetcher.user_agent,
        }
        with self._fetcher.egress.session(SECONDS) as session:
            self._deadline = session.deadline
            if self._cancelled:
                session.deadline.expire()
            try:
                with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
                    if not response.ok:
                        status = response.status_code
                        fix = FIXES.get(status, "check the address")
                        raise FetchError(f"image could not be downloaded: {host} answered {status}; {fix}.")
                    size, length = 0, response.headers.get("Content-Length", "")
                    if length.isdecimal() and int(length) > self._fetcher.max_bytes:
                        raise self._too_large()
                    for number, block in enumerate(response.raw.stream(BLOCK, decode_content=False)):
                        size += file.write(block)
                        if size > self._fetcher.max_bytes:
                            raise self._too_large()
                        if number > CRUMBS + size // 64:
                            raise FetchError(f"image could not be downloaded: {host} sends it byte by byte.")
            except EgressError as error:
                raise FetchError(f"image may not be downloaded: {error}; send the file itself.") from error
            except requests.TooManyRedirects as error:
                raise FetchError(f"image could not be downloaded: {host} redirects without end.") from error
            except FetchError:
                raise
            # A hostile server can make urllib3 and http.client raise errors that requests does not wrap.
            except Exception as error:
                if session.deadline.expired or isinstance(error, requests.Timeout):
                    raise _too_slow(host) from error
                raise FetchError(
                    f"image could not be downloaded: the connection to {host} failed; check the address."
                ) from error
            if session.deadline.expired:  # the end of a connection can look like the end of a file
                raise _too_slow(host)


def _too_slow(host: str | None) -> FetchError:
    return FetchError(f"image could not be downloaded from {host} within {SECONDS:g} s; send the file itself.")
