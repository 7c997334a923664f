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
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

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

        A failure counts against the picture where the server had answered until then, or says that it is its own (500),
        or was asked about nothing else and hung up. So a dead server costs no picture anything, and a picture that ends
        servers does not end them for ever.
        """
        loop, tries = asyncio.get_running_loop(), 0
        while True:
            line = await self._next_line()
            server, pause, is_up = line.server, 0.0, False
            trouble: str | None = None
            try:
                answer = await loop.run_in_executor(self._threads, line.post, picture, question)
                if answer.status_code < 500 or answer.status_code in BUSY:
                    trouble, self._answered = "", time.monotonic()
                    if answer.status_code not in BUSY:
                        return question.row(output_of(answer.status_code, answer.text))
                    pause = pause_of(answer)
                    continue
                trouble = f"the server answered {answer.status_code}: {answer.text[:200]}"
                is_up = answer.status_code == ITS_OWN
                tries += is_up or server.has_answered
            except requests.RequestException as error:
                trouble = f"no server answered ({type(error).__name__})"
                tries += server.has_answered or (server.asks_only(line) and was_reached(error))
            except OSError as error:
                raise UserError(error.strerror or str(error)) from error
            finally:
                server.take_back(line, pause, trouble, is_up=is_up)
            if tries == TRIES:
                raise UserError(f"{trouble}; see that server's log.")
            if time.monotonic() - self._answered > PATIENCE:
                self._over = f"No server has answered for {PATIENCE:g} s; {server.url} last: {trouble}."
                self._free.put_nowait(line)

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
        answers: whether it is asked as often as it can be.
        has_answered: whether it did, after its last failure.
    """

    url: str
    free: "asyncio.Queue[_Line]"
    waiting: "list[_Line]" = field(default_factory=list)
    answers: bool = True
    has_answered: bool = False
    _pause: float = FIRST_PAUSE / 2
    _first: "_Line | None" = None  # the line that asks while the others wait
    _next: asyncio.TimerHandle | None = None

    def may_ask(self, line: "_Line") -> bool:
        return self.answers or line is self._first

    def asks_only(self, line: "_Line") -> bool:
        """Whether the others wait for what this one hears."""
        return not self.answers and line is self._first

    def take_back(self, line: "_Line", pause: float, trouble: str | None, *, is_up: bool) -> None:
        """Have a line back that may ask again after `pause` seconds.

        Args:
            line: the line.
            pause: seconds.
            trouble: how the server failed, "" where it answered, None where it was not asked.
            is_up: whether it failed by an answer of its own; then it is asked again soon.
        """
        if trouble is None:
            self.free.put_nowait(line)
        elif not trouble:
            asyncio.get_running_loop().call_later(pause, self.free.put_nowait, line)
            self._recover()
        else:
            self.waiting.append(line)
            if self.may_ask(line):  # what had been asked before the first failure says nothing new
                self._fail(trouble, is_up=is_up)

    def _fail(self, trouble: str, *, is_up: bool) -> None:
        if self.answers:
            print(f"{self.url} is left alone and tried again later: {trouble}.", file=sys.stderr)
        self.answers, self.has_answered, self._first = False, False, None
        self._pause = FIRST_PAUSE if is_up else min(2 * self._pause, LONGEST_PAUSE)
        self._next = asyncio.get_running_loop().call_later(self._pause, self._try_again)

    def _try_again(self) -> None:
        self._first = self.waiting.pop()
        self.free.put_nowait(self._first)

    def _recover(self) -> None:
        if self._next:
            self._next.cancel()
        self.answers, self.has_answered, self._pause = True, True, FIRST_PAUSE / 2
        for line in self.waiting:
            self.free.put_nowait(line)
        self.waiting.clear()


def was_reached(error: requests.RequestException) -> bool:
    """Whether there was a connection before it failed."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return not isinstance(reason, (NewConnectionError, ConnectTimeoutError))


def pause_of(answer: requests.Response) -> float:
    """The seconds after which a busy server wants to be asked again; it may also give a date."""
    try:
        return max(0.0, float(answer.headers["Retry-After"]))
    except (KeyError, ValueError):
        return FIRST_PAUSE


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
