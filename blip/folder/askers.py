"""Who is asked about a picture: the predictor in this process, or servers."""

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import requests

from blip.config import Settings
from blip.errors import UserError
from blip.folder.outputs import Row
from blip.folder.questions import BUSY, Question, output_of

if TYPE_CHECKING:
    from blip.service import Service

AT_A_TIME = 30  # pictures that one server is asked about: a batch of 16 runs while 14 wait, and others find slots
TIMEOUT = (5, 300)  # seconds to connect, and without a byte; a slow server takes long for so many
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds that a server that does not answer is left alone, doubled each time
TRIES = 10  # for a picture that servers do not answer, or only with an error of theirs
PATIENCE = 120.0  # seconds without an answer of any server after which the run ends


class Asker(ABC):
    """Asks about pictures, several at a time.

    Attributes:
        at_a_time: how many.
    """

    at_a_time: int

    @abstractmethod
    async def ask(self, picture: Path, question: Question) -> Row:
        """What is found.

        Raises:
            UserError: the picture cannot be used; the message is one sentence.
            NoServerError: no server answers.
        """

    @abstractmethod
    def close(self) -> None:
        """End what was started."""


class NoServerError(RuntimeError):
    """No server answers any more; the message is one sentence."""


class Local(Asker):
    """The predictor in this process, with batches as large as it makes them."""

    def __init__(self, settings: Settings) -> None:
        from blip.service import start

        self._service: Service = start(settings)
        self.at_a_time = 2 * settings.max_batch  # one batch is decoded while another runs

    async def ask(self, picture: Path, question: Question) -> Row:
        """Run a prediction."""
        from blip.service import Request

        return question.row((await self._service.run(Request(image=picture, **question.inputs))).value)

    def close(self) -> None:
        """End its threads and processes."""
        self._service.close()


class Remote(Asker):
    """Servers, each asked about a few pictures at a time. One that dies is left alone for a while."""

    def __init__(self, urls: Sequence[str], headers: dict[str, str]) -> None:
        self.at_a_time = AT_A_TIME * len(urls)
        self._threads = ThreadPoolExecutor(self.at_a_time, "asking")
        self._free: asyncio.Queue[_Line] = asyncio.Queue()
        servers = [_Server(url.rstrip("/")) for url in urls]
        for _ in range(AT_A_TIME):
            for server in servers:
                self._free.put_nowait(_Line(server, headers))
        self._answered = time.monotonic()

    async def ask(self, picture: Path, question: Question) -> Row:
        """Ask whichever server is free, and another where it does not answer."""
        loop, tries = asyncio.get_running_loop(), 0
        while True:
            line = await self._free.get()
            pause = 0.0
            try:
                answer = await loop.run_in_executor(self._threads, line.post, picture, question)
                self._answered = time.monotonic()
                if answer.status_code in BUSY:
                    pause = float(answer.headers.get("Retry-After", FIRST_PAUSE))
                    continue
                if answer.status_code < 500:
                    line.server.pauses = 0
                    return question.row(output_of(answer.status_code, answer.text))
                trouble, pause = f"the server answered {answer.status_code}: {answer.text[:200]}", line.server.pause()
            except requests.RequestException as error:
                if time.monotonic() - self._answered > PATIENCE:
                    raise NoServerError(
                        f"No server has answered for {PATIENCE:g} s, {line.server.url} last."
                    ) from error
                trouble, pause = f"no server answered ({type(error).__name__})", line.server.pause()
            except OSError as error:
                raise UserError(error.strerror or str(error)) from error
            finally:
                loop.call_later(pause, self._free.put_nowait, line)
            tries += 1
            if tries == TRIES:
                raise UserError(f"{trouble}; see that server's log.")

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


@dataclass(eq=False)
class _Server:
    url: str
    pauses: int = 0  # one after the other

    def pause(self) -> float:
        self.pauses += 1
        return min(FIRST_PAUSE * 2.0 ** min(self.pauses // AT_A_TIME, 10), LONGEST_PAUSE)


class _Line:
    """One connection to a server."""

    def __init__(self, server: _Server, headers: dict[str, str]) -> None:
        self.server = server
        self._session = requests.Session()
        self._session.headers.update(headers)

    def post(self, picture: Path, question: Question) -> requests.Response:
        with picture.open("rb") as file:
            files = {"image": (os.fsencode(picture.name).decode(errors="replace"), file)}
            return self._session.post(
                f"{self.server.url}/predictions", data=question.inputs, files=files, timeout=TIMEOUT
            )
