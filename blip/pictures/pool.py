"""Pictures are decoded in a few processes that do nothing else, and that can be killed.

The processes are started anew (no fork), talk over a socket pair (no shared memory, no semaphores), and have limits of
memory and time: see `blip.pictures.__main__`.
"""

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from blip.errors import ImageError
from blip.pictures import wire
from blip.pictures.limits import CPU_SECONDS, LARGE_TOTAL, PROCESSES, SECONDS

_ROOT = Path(__file__).resolve().parents[2]  # where `-m` finds this package
_START_SECONDS = 120.0  # on a machine that does much else
_ENDING_SECONDS = 10.0  # for the kernel to tell how a process ended
#: What a decoding process is told of the environment; codecs need no tokens.
_KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "LD_LIBRARY_PATH", "LANG", "LC_ALL")
#: One thread each. glibc gives blocks of this size back at once; by itself it keeps what a large picture needed.
_SET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 23)}

_CRASHED = "image could not be read: decoding it crashed; save it anew or send another one."
_TOO_SLOW = f"image takes more than {CPU_SECONDS} s to decode; send a smaller one or save it anew."


class Pool:
    """Decoding processes, one for each core; the one used last is used first."""

    def __init__(self) -> None:
        size = min(PROCESSES, len(os.sched_getaffinity(0)))
        self._idle = [_Decoder() for _ in range(size)]
        self._ending: list[_Decoder] = []
        self._free = asyncio.Semaphore(size)
        self._room = _Room()

    def wait(self) -> None:
        """Wait until the processes have started; blocks.

        Raises:
            RuntimeError: one does not start.
        """
        for decoder in self._idle:
            decoder.wait()

    def close(self) -> None:
        """End the processes that are not in use."""
        for decoder in [*self._idle, *self._ending]:
            decoder.kill()
            decoder.reap()
        self._idle.clear()

    async def pixels(self, path: Path, side: int, resize: str = "lavis") -> bytearray:
        """The picture of a file as (side, side, 3) uint8, RGB; cancelling this ends its decoding at once.

        Args:
            path: the file.
            side: pixels a side.
            resize: whose, "lavis" or "transformers"; see `blip.pictures.resize`.

        Raises:
            ImageError: the file is not a usable image, or takes too much to decode.
        """
        async with self._free:
            decoder = self._take()
            try:
                kind, data = await self._decode(decoder, path, side, resize)
            except BaseException as error:
                self._replace(decoder)
                if isinstance(error, TimeoutError):
                    raise ImageError(_TOO_SLOW) from None
                if isinstance(error, ConnectionError):
                    status = await asyncio.to_thread(decoder.reap)
                    cause = ConnectionError(f"the process ended with status {status}")
                    raise ImageError(_TOO_SLOW if status == -signal.SIGXCPU else _CRASHED) from cause
                raise
            self._idle.append(decoder)
            if kind == wire.PIXELS:
                return data
            raise ImageError(data.decode())

    async def _decode(self, decoder: "_Decoder", path: Path, side: int, resize: str) -> tuple[int, bytearray]:
        name = os.fsencode(path.absolute())
        request = wire.REQUEST.pack(side, wire.RESIZES.index(resize), len(name))
        await decoder.started()
        async with asyncio.timeout(SECONDS):
            kind, data = await decoder.ask(request + name, 3 * side**2)
        if kind == wire.LARGE:
            async with self._room.of(*wire.NUMBER.unpack(data)), asyncio.timeout(SECONDS):
                return await decoder.ask(wire.GO, 3 * side**2)
        return kind, data

    def _take(self) -> "_Decoder":
        """A process that runs; those that ended while nothing was asked of them are left out."""
        self._ending = [decoder for decoder in self._ending if decoder.is_alive()]
        while self._idle:
            decoder = self._idle.pop()
            if decoder.is_alive():
                return decoder
            decoder.kill()
        return _Decoder()

    def _replace(self, decoder: "_Decoder") -> None:
        """End a process, and start another, so that the next picture need not wait for it."""
        decoder.kill()
        self._ending.append(decoder)
        with contextlib.suppress(OSError):  # it is tried again when one is needed
            self._idle.insert(0, _Decoder())


class _Room:
    """The memory that large pictures share; first come, first served."""

    def __init__(self) -> None:
        self._used = 0  # MiB
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def of(self, needed: int) -> AsyncIterator[None]:
        """Wait until so many MiB are free, and have them in the block."""
        async with self._turn:
            while self._used and self._used + needed > LARGE_TOTAL:
                self._freed.clear()
                await self._freed.wait()
            self._used += needed
        try:
            yield
        finally:
            self._used -= needed
            self._freed.set()


class _Decoder:
    """One decoding process, the connection to it, and the lifeline, on which nothing is ever sent."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name in _KEPT} | _SET
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as on_error:
            self._connection, connection = socket.socketpair()
            self._lifeline, lifeline = socket.socketpair()
            for ours in (self._connection, self._lifeline):
                on_error.enter_context(ours)
            for one in (connection, lifeline):
                theirs.enter_context(one)
            self._connection.setblocking(False)
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-m", "blip.pictures", str(lifeline.fileno())],
                cwd=_ROOT,
                env=environment,
                stdin=connection.fileno(),
                stdout=subprocess.DEVNULL,
                pass_fds=[lifeline.fileno()],
            )
            on_error.pop_all()
        self._has_started = False

    def wait(self) -> None:
        """Wait until the process is ready; blocks.

        Raises:
            RuntimeError: it does not start.
        """
        if not select.select([self._connection], [], [], _START_SECONDS)[0]:
            raise RuntimeError(f"a decoding process did not start within {_START_SECONDS:.0f} s")
        self._note_start(self._connection.recv(wire.ANSWER.size))

    async def started(self) -> None:
        """Wait until the process is ready.

        Raises:
            RuntimeError: it does not start.
        """
        if not self._has_started:
            loop = asyncio.get_running_loop()
            self._note_start(await loop.sock_recv(self._connection, wire.ANSWER.size))

    def _note_start(self, answer: bytes) -> None:
        if answer != wire.ANSWER.pack(wire.READY, 0):
            raise RuntimeError("a decoding process does not start; the log says why")
        self._has_started = True

    async def ask(self, request: bytes, most: int) -> tuple[int, bytearray]:
        """Send a request; the kind of the answer and its data, of `most` bytes at most.

        Raises:
            ConnectionError: the process has ended, or does not keep to the protocol.
        """
        await asyncio.get_running_loop().sock_sendall(self._connection, request)
        kind, size = wire.ANSWER.unpack(await self._receive(wire.ANSWER.size))
        if size > most or (kind == wire.PIXELS and size != most):
            raise ConnectionError
        return kind, await self._receive(size)

    async def _receive(self, size: int) -> bytearray:
        loop, data = asyncio.get_running_loop(), bytearray(size)
        rest = memoryview(data)
        while rest:
            count = await loop.sock_recv_into(self._connection, rest)
            if not count:
                raise ConnectionError
            rest = rest[count:]
        return data

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def hang_up(self) -> None:
        """Close the connection and the lifeline, with which the process ends."""
        self._lifeline.close()
        self._connection.close()

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self.hang_up()

    def reap(self) -> int:
        """Wait until the killed process has ended; its exit status, negative for a signal."""
        return self._process.wait(_ENDING_SECONDS)
