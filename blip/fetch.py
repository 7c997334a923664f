"""The image that a request names, sent along as a data address or fetched from the web, within limits."""

import base64
import binascii
import os
import urllib.parse
from collections.abc import Iterator
from typing import BinaryIO, ClassVar

import requests

from blip.egress import Deadline, EgressError, drop_redirect_body

SECONDS = 30.0  # for a whole download
TIMEOUT = (5, 10)  # seconds to connect, seconds without a byte
BLOCK = 1 << 16
CRUMBS = 10_000  # pieces of less than 64 bytes that a download may have; each costs everyone time


class FetchError(ValueError):
    """An image that cannot be had; the message is one sentence for the user."""


class Source:
    """Where an image is: an http, https or data address that looks right.

    Raises:
        FetchError: it does not.
    """

    max_bytes: ClassVar[int] = 50_000_000  # of an image; set at start

    def __init__(self, value: object) -> None:
        if not isinstance(value, str):
            raise FetchError("image must be a string: an http, https or data address.")
        scheme = value[:6].partition(":")[0].lower()
        if scheme == "data":
            # Base64 has 4 characters for 3 bytes; text may have 3 for one.
            header, comma, self._data = value.partition(",")
            self._base64 = header.lower().endswith(";base64")
            if not comma or not value.isascii():
                raise FetchError("image is a malformed data address; send data:image/jpeg;base64, and the file.")
            if len(self._data) > self.max_bytes * (1.5 if self._base64 else 3):
                raise self._too_large()
            self._url = None
        else:
            self._url = value
            self._check_url(value)

    def save(self, file: BinaryIO) -> None:
        """Write the image to `file`.

        Raises:
            FetchError: it cannot be had.
        """
        if self._url is None:
            self._decode(file)
        else:
            self._download(self._url, file)
        file.flush()

    def _check_url(self, url: str) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or not url.isprintable():
            raise FetchError("image is not an http, https or data address; send one of these.")

    def _too_large(self) -> FetchError:
        return FetchError(f"image is larger than {self.max_bytes / 1e6:g} MB; send a smaller file.")

    def _decode(self, file: BinaryIO) -> None:
        """In blocks, because what is escaped or folded takes many times its size, and others have to wait."""
        size, rest, padded = 0, b"", False
        try:
            for block in self._unquoted():
                if self._base64:
                    block = rest + block.translate(None, b" \t\r\n\v\f")
                    whole = len(block) // 4 * 4
                    if padded and block:
                        raise binascii.Error("data after the padding")
                    padded = block[:whole].endswith(b"=")
                    rest, block = block[whole:], base64.b64decode(block[:whole], validate=True)
                size += file.write(block)
                if size > self.max_bytes:
                    raise self._too_large()
            file.write(base64.b64decode(rest, validate=True))
        except binascii.Error as error:
            raise FetchError("image is a data address with damaged base64; encode the whole file again.") from error

    def _unquoted(self) -> Iterator[bytes]:
        start = 0
        while start < len(self._data):
            end = start + BLOCK
            cut = self._data.rfind("%", end - 2, end)
            if cut > start:  # not through an escape
                end = cut
            yield urllib.parse.unquote_to_bytes(self._data[start:end])
            start = end

    def _download(self, url: str, file: BinaryIO) -> None:
        host = urllib.parse.urlsplit(url).hostname
        headers = {"Accept-Encoding": "identity"}  # an answer cannot grow while it is read
        if agent := os.environ.get("COG_USER_AGENT"):
            headers["User-Agent"] = agent
        too_slow = FetchError(f"image could not be downloaded from {host} within {SECONDS:g} s; send the file itself.")
        with Deadline(SECONDS) as deadline:
            try:
                hooks = {"response": drop_redirect_body}
                with requests.get(url, headers=headers, hooks=hooks, stream=True, timeout=TIMEOUT) as response:
                    if not response.ok:
                        raise FetchError(
                            f"image could not be downloaded: {host} answered {response.status_code}; check the address."
                        )
                    size, length = 0, response.headers.get("Content-Length", "")
                    if length.isdecimal() and int(length) > self.max_bytes:
                        raise self._too_large()
                    for number, block in enumerate(response.raw.stream(BLOCK, decode_content=False)):
                        size += file.write(block)
                        if size > self.max_bytes:
                            raise self._too_large()
                        if number > CRUMBS + size // 64:
                            raise FetchError(f"image could not be downloaded: {host} sends it byte by byte.")
            except EgressError as error:
                raise FetchError(f"image may not be downloaded: {error}; send the file itself.") from error
            except requests.TooManyRedirects as error:
                raise FetchError(f"image could not be downloaded: {host} redirects without end.") from error
            except FetchError:
                raise
            # Not only requests' own: what a hostile server sends can make urllib3 and http.client fail in their ways.
            except Exception as error:
                if deadline.expired or isinstance(error, requests.Timeout):
                    raise too_slow from error
                raise FetchError(
                    f"image could not be downloaded: the connection to {host} failed; check the address."
                ) from error
            if deadline.expired:  # the end of a connection can look like the end of a file
                raise too_slow
