"""The image that a request names, sent along as a data address or fetched from the web, within limits."""

import base64
import binascii
import os
import urllib.parse
from typing import BinaryIO, ClassVar

import requests

from blip.egress import Deadline, EgressError

SECONDS = 30.0  # for a whole download
TIMEOUT = (5, 10)  # seconds to connect, seconds without a byte
BLOCK = 1 << 16


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
            file.write(self._decode())
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

    def _decode(self) -> bytes:
        data = urllib.parse.unquote_to_bytes(self._data) if "%" in self._data else self._data.encode("ascii")
        if self._base64:
            try:
                data = base64.b64decode(b"".join(data.split()), validate=True)
            except binascii.Error as error:
                raise FetchError("image is a data address with damaged base64; encode the whole file again.") from error
        if len(data) > self.max_bytes:
            raise self._too_large()
        return data

    def _download(self, url: str, file: BinaryIO) -> None:
        host = urllib.parse.urlsplit(url).hostname
        headers = {"Accept-Encoding": "identity"}  # an answer cannot grow while it is read
        if agent := os.environ.get("COG_USER_AGENT"):
            headers["User-Agent"] = agent
        too_slow = FetchError(f"image could not be downloaded from {host} within {SECONDS:g} s; send the file itself.")
        with Deadline(SECONDS) as deadline:
            try:
                with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
                    if not response.ok:
                        raise FetchError(
                            f"image could not be downloaded: {host} answered {response.status_code}; check the address."
                        )
                    size, length = 0, response.headers.get("Content-Length", "")
                    if length.isdecimal() and int(length) > self.max_bytes:
                        raise self._too_large()
                    for block in response.raw.stream(BLOCK, decode_content=False):
                        size += file.write(block)
                        if size > self.max_bytes:
                            raise self._too_large()
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
