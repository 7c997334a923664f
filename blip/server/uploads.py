"""Pictures that are uploaded in a form, as curl -F and browsers do (RFC 7578): in a file from their first byte on."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from blip.errors import FetchError
from blip.server.files import Files, Writer
from blip.server.long_text import TEXT_BYTES, TOO_MUCH, StandIn, Texts
from blip.server.refusals import refusal

TYPE = b"multipart/form-data"
PICTURE = "image"  # the input that may be a file
#: Fields of a request beside its inputs; what else a form has is an input.
FIELDS = ("id", "webhook", "webhook_events_filter")
PARTS = 50  # of a form
BLOCK = 1 << 18  # bytes that are written at a time
NAME = 200  # characters of a file's name
NOT_A_FORM = refusal("body", "the body is not the form that its Content-Type says; send it as curl -F does.")


class Upload(StandIn):
    """An uploaded picture, as its name, which is all that others are shown of it.

    Attributes:
        path: the file that it is in.
    """

    __slots__ = ("path",)

    path: Path


class Uploaded:
    """Where an uploaded image is, as fetch.Source tells where others are."""

    is_remote = False

    def __init__(self, upload: Upload) -> None:
        self._path = upload.path

    def new_path(self) -> Path:
        """Where the image is saved already."""
        return self._path

    def save(self, path: Path) -> None:
        """Do nothing more."""

    def cancel(self) -> None:
        """Do nothing: `save` ends at once."""


def is_form(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a body is a form, by its Content-Type."""
    return headers.get(b"content-type", b"").partition(b";")[0].strip().lower() == TYPE


class Form:
    """A form that is being read: its texts in memory, its picture of up to `max_image` bytes in a new file of `files`.

    Raises:
        HTTPException: 422; the Content-Type has no boundary.
    """

    def __init__(self, headers: Mapping[bytes, bytes], files: Files, max_image: int) -> None:
        _, options = parse_options_header(headers[b"content-type"])
        self._files, self._max_image = files, max_image
        self._texts: dict[str, list[str]] = {}
        self._upload: Upload | None = None
        self._file: Writer | None = None
        self._unwritten = bytearray()  # of the file
        self._headers: dict[bytes, bytes] = {}
        self._field, self._value = b"", b""  # of the header that is being read
        self._name, self._content = "", bytearray()
        self._is_picture = self._is_whole = False
        self._parts = self._size = self._image_size = 0
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._add_to_field,
                    "on_header_value": self._add_to_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._add,
                    "on_part_end": self._end,
                    "on_end": self._end_form,
                },
            )
        except (KeyError, FormParserError) as error:
            raise NOT_A_FORM from error

    async def add(self, part: bytes) -> None:
        """Read the next part of the body.

        Raises:
            HTTPException: 422.
        """
        try:
            self._parser.write(part)
        except FormParserError as error:
            raise NOT_A_FORM from error
        if len(self._unwritten) >= BLOCK:
            await self._write()

    async def end(self) -> tuple[bytes, Texts]:
        """The request as JSON, and its picture by the string that it has there.

        Raises:
            HTTPException: 422.
        """
        if not self._is_whole:
            raise NOT_A_FORM
        await self._write()
        inputs: dict[str, Any] = {name: values[0] for name, values in self._texts.items() if name not in FIELDS}
        request: dict[str, Any] = {name: self._texts[name][0] for name in FIELDS if name in self._texts}
        if "webhook_events_filter" in request:
            request["webhook_events_filter"] = self._texts["webhook_events_filter"]
        texts = Texts()
        if self._upload is not None:
            inputs[PICTURE] = self._upload.path.name  # nobody else knows it
            texts[inputs[PICTURE]] = self._upload
        return json.dumps({**request, "input": inputs}).encode(), texts

    def drop(self) -> None:
        """Remove the file, if it is still there."""
        if self._file:
            self._file.close()
        if self._upload is not None:  # it may have no name
            self._upload.path.unlink(missing_ok=True)

    async def _write(self) -> None:
        """Write what has come of the file, in a thread; if this is cancelled, wait for that all the same."""
        block, self._unwritten = self._unwritten, bytearray()
        if self._file and block:
            writing = asyncio.ensure_future(asyncio.to_thread(self._file.write, memoryview(block)))
            try:
                await asyncio.shield(writing)
            except FetchError as error:
                raise refusal(PICTURE, str(error)) from error
            finally:
                await asyncio.wait({writing})

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > PARTS:
            raise refusal("body", f"the form has more than {PARTS} parts; send one image and its texts.")
        self._headers, self._content, self._is_picture = {}, bytearray(), False

    def _add_to_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]
        self._count(end - start)

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._count(end - start)

    def _end_header(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        if b"name" not in options:
            raise NOT_A_FORM
        self._name = options[b"name"].decode(errors="replace")
        if b"filename" not in options:
            return
        if self._name != PICTURE:
            raise refusal(self._name, f"{self._shown} is a file; send the picture as image, and all else as text.")
        if self._upload is not None or PICTURE in self._texts:
            raise self._twice()
        name = options[b"filename"].decode(errors="replace").replace("\\", "/").rpartition("/")[2]
        self._upload, self._is_picture = Upload(name[:NAME]), True
        self._upload.path, self._upload.is_used = self._files.new(), False
        try:
            self._file = Writer(self._upload.path)
        except FetchError as error:
            raise refusal(PICTURE, str(error)) from error

    def _add(self, data: bytes, start: int, end: int) -> None:
        if self._is_picture:
            self._unwritten += data[start:end]
            self._image_size += end - start
            if self._image_size > self._max_image:
                raise refusal(PICTURE, f"image is larger than {self._max_image / 1e6:g} MB; send a smaller file.")
        else:
            self._count(end - start)
            self._content += data[start:end]

    def _end(self) -> None:
        if self._is_picture:
            if not self._image_size and not self._upload:  # a browser's form in which no file was chosen
                self.drop()
                self._upload = self._file = None
            return
        known = self._texts.setdefault(self._name, [])
        if (known and self._name != "webhook_events_filter") or (self._name == PICTURE and self._upload is not None):
            raise self._twice()
        try:
            known.append(self._content.decode())
        except UnicodeDecodeError as error:
            raise refusal(self._name, f"{self._shown} is not UTF-8; send Unicode text.") from error

    def _end_form(self) -> None:
        self._is_whole = True

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > TEXT_BYTES:
            raise TOO_MUCH

    def _twice(self) -> Exception:
        return refusal(self._name, f"{self._shown} is there twice; send it once.")

    @property
    def _shown(self) -> str:
        """The name of the part in one line."""
        name = self._name[:100]
        return name if name.isprintable() else ascii(name)
