"""The three tasks for programs, in their own process: `from blip import Blip`."""

import asyncio
import contextlib
import os
import sys
import threading
from concurrent.futures import CancelledError
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from blip.config import Settings
from blip.engine import Match
from blip.service import Request, start

CLOSED = "This Blip is closed; make a new one."


class Blip:
    """The models of a bundle, loaded, and tried out once.

    Methods may be called from several threads: what waits meanwhile runs as one batch, and each result is the one that
    it would be alone. Use it with `with`, or call `close`.

    Args:
        weights: "demo" (in a clone), "pretrained" (fetched at the first use), or a bundle's directory.
        device: "cuda", "cpu", or "auto": CUDA where it works.
        dtype: "float32", "float16", "bfloat16" or "int8"; None for float16 on CUDA and float32 on a CPU.
        max_batch: how many requests of a task may run together.

    The other settings, such as BLIP_CACHE, come from the environment.

    Raises:
        UserError: an argument or the bundle cannot be used; the message is one sentence.
    """

    def __init__(
        self, weights: str = "pretrained", *, device: str = "auto", dtype: str | None = None, max_batch: int = 16
    ) -> None:
        chosen = {
            **os.environ,
            "BLIP_WEIGHTS": str(weights),
            "BLIP_DEVICE": device,
            "BLIP_DTYPE": dtype or "",
            "BLIP_MAX_BATCH": str(max_batch),
        }
        with contextlib.redirect_stdout(sys.stderr):  # what the server would log
            self._service = start(Settings.from_environment(chosen))
        self._is_closed = False
        self._changing = threading.Lock()  # what is asked is in the loop before it ends, or is refused
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="blip", daemon=True)
        self._thread.start()

    def caption(self, image: str | PathLike[str]) -> str:
        """A sentence about an image file.

        Raises:
            UserError: the image cannot be used; so for the other methods.
        """
        return str(self._run(image, "image_captioning"))

    def answer(self, image: str | PathLike[str], question: str) -> str:
        """The answer to a question about an image file."""
        return str(self._run(image, "visual_question_answering", question=question))

    def match(self, image: str | PathLike[str], text: str) -> Match:
        """How well a text goes with an image file: `probability`, 0 to 1, and `similarity`, -1 to 1."""
        found: Match = self._run(image, "image_text_matching", caption=text)
        return found

    def close(self) -> None:
        """End what was started; what still waits for a result gets a `RuntimeError`."""
        with self._changing:
            if self._is_closed:
                return
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._service.close()

    def __enter__(self) -> "Blip":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, image: str | PathLike[str], task: str, **texts: str) -> Any:
        request = Request(Path(image), task, **texts)
        with self._changing:
            if self._is_closed:
                raise RuntimeError(CLOSED)
            finding = asyncio.run_coroutine_threadsafe(self._service.find(request), self._loop)
        try:
            found = finding.result().value
        except CancelledError as error:
            raise RuntimeError(CLOSED) from error
        return self._service.tasks[task].value(found)


async def _cancel_all() -> None:
    """Cancel all that runs in this loop, and wait until it has ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
