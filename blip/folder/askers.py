"""Who is asked about a picture: the predictor in this process, or servers."""

import asyncio
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds that a server that fails is left alone, doubled each time
TRIES = 5  # for a picture at which servers fail that answer others
ITS_OWN = 500  # the status of an answer that failed by the server's fault, and by no gateway's
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
    """Servers, each asked about a few pictures at a time; one that fails is left alone for a while."""

    def __init__(self, urls: Sequence[str], headers: dict[str, str]) -> None:
        self.at_a_time = AT_A_TIME * len(urls)
        self._threads = ThreadPoolExecutor(self.at_a_time, "asking")
        self._free: asyncio.Queue[_Line] = asyncio.Queue()
        servers = [_Server(url.rstrip("/"), self._free) for url in urls]
        for _ in range(AT_A_TIME):
            for server in servers:
                self._free.put_nowait(_Line(server, headers))
        self._answered = time.monotonic()
        self._over = ""  # why no server is asked any more

    async def ask(self, picture: Path, question: Question) -> Row:
        """Ask whichever server is free, and another where it fails.

        A failure counts against the picture where the server had answered until then, or says that it is its own (500).
        So a dead server costs no picture anything, and a picture that ends servers does not end them for ever.
        """
        loop, tries = asyncio.get_running_loop(), 0
        while True:
            line = await self._next_line()
            server, pause = line.server, 0.0
            trouble: str | None = None
            try:
                answer = await loop.run_in_executor(self._threads, line.post, picture, question)
                if answer.status_code < 500 or answer.status_code in BUSY:
                    trouble, self._answered = "", time.monotonic()
                    if answer.status_code not in BUSY:
                        return question.row(output_of(answer.status_code, answer.text))
                    pause = float(answer.headers.get("Retry-After", FIRST_PAUSE))
                    continue
                trouble = f"the server answered {answer.status_code}: {answer.text[:200]}"
                tries += answer.status_code == ITS_OWN or server.answers
            except requests.RequestException as error:
                trouble = f"no server answered ({type(error).__name__})"
                tries += server.answers
            except OSError as error:
                raise UserError(error.strerror or str(error)) from error
            finally:
                server.take_back(line, pause, trouble)
            if time.monotonic() - self._answered > PATIENCE:
                self._over = f"No server has answered for {PATIENCE:g} s; {server.url} last: {trouble}."
                self._free.put_nowait(line)
            elif tries == TRIES:
                raise UserError(f"{trouble}; see that server's log.")

    async def _next_line(self) -> "_Line":
        while True:
            line = await self._free.get()
            if self._over:
                self._free.put_nowait(line)  # so that the next that waits hears of it
                raise NoServerError(self._over)
            if line.server.may_ask(line):
                return line
            line.server.waiting.append(line)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


@dataclass(eq=False)
class _Server:
    """One that fails is left alone, longer each time, and is then asked about one picture until it answers.

    Attributes:
        free: the lines of all servers that may ask.
        waiting: its lines, while it fails.
    """

    url: str
    free: "asyncio.Queue[_Line]"
    waiting: "list[_Line]" = field(default_factory=list)
    answers: bool = True
    _pause: float = FIRST_PAUSE
    _first: "_Line | None" = None  # the line that asks while the others wait
    _next: asyncio.TimerHandle | None = None

    def may_ask(self, line: "_Line") -> bool:
        return self.answers or line is self._first

    def take_back(self, line: "_Line", pause: float, trouble: str | None) -> None:
        """Have a line back that may ask again after `pause` seconds.

        Args:
            line: the line.
            pause: seconds.
            trouble: how the server failed, "" where it answered, None where it was not asked.
        """
        if trouble is None:
            self.free.put_nowait(line)
        elif not trouble:
            asyncio.get_running_loop().call_later(pause, self.free.put_nowait, line)
            self._recover()
        else:
            self.waiting.append(line)
            if self.may_ask(line):  # what had been asked before the first failure says nothing new
                self._fail(trouble)

    def _fail(self, trouble: str) -> None:
        if self.answers:
            print(f"{self.url} is left alone and tried again later: {trouble}.", file=sys.stderr)
        self.answers, self._first = False, None
        self._next = asyncio.get_running_loop().call_later(self._pause, self._try_again)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _try_again(self) -> None:
        self._first = self.waiting.pop()
        self.free.put_nowait(self._first)

    def _recover(self) -> None:
        if self._next:
            self._next.cancel()
        self.answers, self._pause = True, FIRST_PAUSE
        for line in self.waiting:
            self.free.put_nowait(line)
        self.waiting.clear()


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
