"""The inputs of a request: its image as a path, and the checks that need the whole request."""

import asyncio
import pathlib
import uuid
from contextvars import ContextVar
from typing import Any

from cog import Path, schema
from cog.types import URLPath
from fastapi import HTTPException
from pydantic import field_validator
from typing_extensions import override

from blip.server.egress import Egress, EgressError
from blip.server.extending import overrides
from blip.server.fetch import MAX_ADDRESS, Fetcher, Source
from blip.server.long_text import TEXT_BYTES, TOO_MUCH, Texts
from blip.server.records import Current
from blip.server.refusals import refusal
from blip.server.uploads import Uploaded
from blip.server.webhooks import Outbox

ID_LENGTH = 1_000  # characters; every line in the log about a prediction has its id
TEXT_LENGTH = 100_000  # characters of a question, a caption or a context
RESOLVE_SECONDS = 2.0


@overrides
class ImageAddress(URLPath):
    """An image that is fetched when its prediction starts. Stock reads data addresses on the event loop, twice."""

    fileobj: Source | Uploaded  # type: ignore[assignment] # a file that is not open yet

    @override
    def convert(self) -> Path:
        """The image in a temporary file.

        Raises:
            FetchError: it cannot be fetched or stored.
        """
        if self._path is None:
            self._path = Path(self.fileobj.new_path())  # before anything is in it: what fails halfway is removed too
            self.fileobj.save(self._path)
        return self._path

    @property
    def is_remote(self) -> bool:
        """Whether it is fetched from elsewhere."""
        return self.fileobj.is_remote

    def cancel(self) -> None:
        """Have `convert` end soon, from another thread."""
        self.fileobj.cancel()


def image_path(fetcher: Fetcher, texts: "ContextVar[Texts]", value: Any) -> pathlib.Path:
    """Make an input's path, in place of `cog.Path.validate`; `texts` has what strings of the request stand for.

    Raises:
        FetchError: it is not the address of an image.
    """
    if isinstance(value, pathlib.Path):
        return value
    if isinstance(value, str) and (text := texts.get({}).get(value)):
        text.is_used = True
        value = text
    return ImageAddress(source=value, filename="", fileobj=fetcher.source(value))  # type: ignore[arg-type]


class PredictionRequest(schema.PredictionRequest):
    """Cog's request, whose webhook is read only where it is short enough to be read in no time."""

    @field_validator("webhook", mode="before")
    @classmethod
    def _webhook_is_short(cls, value: Any) -> Any:
        if isinstance(value, str) and len(value) > MAX_ADDRESS:
            raise ValueError(f"webhook is an address of more than {MAX_ADDRESS} characters; set a shorter one.")
        return value


class Checks:
    """Checks of a whole request before it takes a slot."""

    def __init__(self, egress: Egress, outbox: Outbox, texts: "ContextVar[Texts]", current: Current) -> None:
        self._egress = egress
        self._outbox = outbox
        self._texts = texts
        self._current = current

    async def check(self, request: Any, prediction_id: str | None = None) -> None:
        """Refuse a prediction that has no input, whose texts are too long, or whose webhook cannot be served.

        One that is not refused has an id.

        Raises:
            HTTPException: 422 or 409.
        """
        if request is None or request.input is None:
            raise refusal("input", "input is missing; send a JSON object with an input object that has an image.")
        for name in (request.id, prediction_id):
            if name is not None and len(name) > ID_LENGTH:
                raise refusal("id", f"id has more than {ID_LENGTH} characters; send fewer.")
        long = self._texts.get({})
        if not all(text.is_used for text in long.values()):
            raise TOO_MUCH
        long.clear()  # the image has its own; what runs for the prediction later would hold it too
        texts = {"id": request.id, "output_file_prefix": request.output_file_prefix, **dict(request.input)}
        size = 0
        for name, text in [
            *texts.items(),
            *(("context", text) for item in (request.context or {}).items() for text in item),
        ]:
            size += len(text) if isinstance(text, str) else 0
            if isinstance(text, str) and len(text) > TEXT_LENGTH:
                raise refusal(name, f"{name} has more than {TEXT_LENGTH} characters; send fewer.")
            if isinstance(text, str) and not _is_unicode(text):
                raise refusal(name, f"{name} has half of a surrogate pair, which is no character; send Unicode text.")
        if size > TEXT_BYTES:  # it would be held for as long as a download of the image takes
            raise TOO_MUCH
        if request.webhook is not None:
            await self._check_webhook(request.webhook)
        request.id = request.id or prediction_id or uuid.uuid4().hex

    async def _check_webhook(self, webhook: Any) -> None:
        if not self._outbox.has_room(str(webhook)):
            self._current.get().reason = "webhooks wait"
            raise HTTPException(409, "Too many webhooks wait for their receivers")
        looking_up = asyncio.wrap_future(self._egress.look_up(webhook.host, webhook.port))
        try:
            self._egress.check(webhook.host, await asyncio.wait_for(looking_up, RESOLVE_SECONDS))
        except EgressError as error:
            raise refusal("webhook", f"webhook may not be called: {error}; set a public one.") from error
        except OSError:  # also a timeout; the delivery resolves and checks the name again
            pass


def _is_unicode(text: str) -> bool:
    """Whether `text` can be sent back: JSON can hold a single surrogate, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
