"""One log: every line that this process, or one that it starts, prints is a JSON object, as Cog's own lines are.

What is printed goes through a pipe to a thread, which passes JSON on and makes a JSON object of every other line. The
server's own log does not take that way. With Cog's LOG_FORMAT=development nothing is changed.
"""

import atexit
import json
import logging
import os
import select
import sys
import threading
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import structlog

LINE = 65_536  # bytes after which a line without an end is passed on in parts
SHOWN = 100  # characters of an id that a client chose
RUNNER = "cog.server.runner"
STREAMS = {1: ("stdout", "INFO"), 2: ("stderr", "WARNING")}


def shown(name: str | None) -> str | None:
    """An id as the log has it, cut to a length."""
    return name if name is None or len(name) <= SHOWN else f"{name[: SHOWN - 3]}..."


def entry(logger: str, severity: str, message: str, **more: Any) -> bytes:
    """A line of the log, in the form of Cog's."""
    when = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    return json.dumps({"logger": logger, "message": message, **more, "severity": severity, "timestamp": when}).encode()


def as_entry(line: bytes, logger: str, severity: str) -> bytes:
    """The line itself if it is a JSON object, else an entry with it."""
    if line.startswith(b"{") and line.endswith(b"}"):
        try:
            json.loads(line)
            return line
        except ValueError:
            pass
    return entry(logger, severity, line.decode(errors="replace"))


def tell(error: BaseException, logger: str, severity: str) -> None:
    """Print an error in one line, its traceback within."""
    line = entry(logger, severity, str(error), exception="".join(traceback.format_exception(error))).decode()
    # The line and its end at once: what another thread prints meanwhile must not come between. Not to `sys.stderr`:
    # in the worker that asks which prediction prints.
    print(f"{line}\n", end="", file=sys.__stderr__, flush=True)


def tell_of_thread(what: threading.ExceptHookArgs) -> None:
    """Print an error that ended a thread, as `threading.excepthook`."""
    if what.exc_value:
        tell(what.exc_value, "blip", "CRITICAL")


def _tell_last(_: type[BaseException], error: BaseException, __: TracebackType | None) -> None:
    """Print an error that ends the process, as `sys.excepthook`."""
    tell(error, "blip", "CRITICAL")


class Log:
    """The standard output and error of this process and of those it starts, a JSON object a line."""

    def __init__(self) -> None:
        self._real = {number: os.dup(number) for number in STREAMS}
        self._rest = dict.fromkeys(STREAMS, b"")
        self._pipes: dict[int, int] = {}  # from the end that is read to the stream
        for number in STREAMS:
            reading, writing = os.pipe()
            os.set_blocking(reading, False)
            os.dup2(writing, number)
            os.close(writing)
            self._pipes[reading] = number
        self._wake, self._woken = os.pipe()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()
        sys.excepthook = _tell_last
        threading.excepthook = tell_of_thread
        atexit.register(self.close)

    def take_over(self, handlers: list[logging.Handler]) -> None:
        """Have handlers that print to the standard error write past the pipe."""
        real = open(self._real[2], "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        for handler in handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(real)

    def close(self) -> None:
        """Pass on what has been printed, and let later lines go their own way."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.write(self._woken, b".")
        self._thread.join()
        for number, real in self._real.items():
            os.dup2(real, number)
        for pipe in self._pipes:
            self._read(pipe)
        for number in STREAMS:
            self._write(number, self._rest[number])

    def _run(self) -> None:
        watched = [self._wake, *self._pipes]
        while True:
            ready, _, _ = select.select(watched, [], [])
            for pipe in ready:
                if pipe != self._wake:
                    self._read(pipe)
            if self._wake in ready:
                return

    def _read(self, pipe: int) -> None:
        """Pass on the whole lines that have been printed."""
        number = self._pipes[pipe]
        try:
            while data := os.read(pipe, LINE):
                *lines, self._rest[number] = (self._rest[number] + data).split(b"\n")
                for line in lines:
                    self._write(number, line)
                if len(self._rest[number]) > LINE:
                    self._write(number, self._rest[number])
                    self._rest[number] = b""
        except BlockingIOError:  # that was all
            pass

    def _write(self, number: int, line: bytes) -> None:
        if not line.strip():
            return
        rest = as_entry(line, *STREAMS[number]) + b"\n"
        try:
            while rest:
                rest = rest[os.write(self._real[number], rest) :]
        except OSError:  # nobody reads it; those who print must not wait
            pass


class RunnerLog:
    """Cog's log of its runner without what it says of each prediction below a warning: its request's line says it all.

    Args:
        log: Cog's.
        with_info: whether to leave nothing out.
    """

    def __init__(self, log: Any, *, with_info: bool) -> None:
        self._log = self._of_predictions = log
        if not with_info:  # decided before a line is made, which takes longer than all else that is logged
            only_warnings = structlog.make_filtering_bound_logger(logging.WARNING)
            self._of_predictions = structlog.wrap_logger(logging.getLogger(RUNNER), wrapper_class=only_warnings)

    def bind(self, *, prediction_id: str | None) -> Any:
        """The log of one prediction, its id cut to a length."""
        return self._of_predictions.bind(prediction_id=shown(prediction_id))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)
