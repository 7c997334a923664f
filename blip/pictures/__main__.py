"""A decoding process: reads the paths of image files from its standard input, a socket, and answers with pixels.

Its argument is the file descriptor of a second socket, its lifeline: when the other end of that is gone, the kernel
ends this process, also in the middle of a codec.
"""

import contextlib
import fcntl
import math
import os
import resource
import signal
import socket
import sys
from pathlib import Path

from blip.errors import ImageError
from blip.pictures import wire
from blip.pictures.limits import CPU_SECONDS, LARGE, MEMORY, NICE
from blip.pictures.reading import open_image, to_rgb
from blip.pictures.resize import on_white, resized


def main() -> None:
    """Answer requests until the connection ends."""
    _confine()
    _hold_on_to(int(sys.argv[1]))
    connection = socket.socket(fileno=0)
    with contextlib.suppress(ConnectionError, EOFError):
        _answer(connection, wire.READY)
        while True:
            side, resize, length = wire.REQUEST.unpack(_receive(connection, wire.REQUEST.size))
            path = Path(os.fsdecode(_receive(connection, length)))
            _limit_time()
            try:
                pixels = _pixels(path, side, wire.RESIZES[resize], connection)
            except ImageError as error:
                _answer(connection, wire.REFUSED, str(error).encode())
            except MemoryError:
                sentence = f"image takes more than {MEMORY} MiB of memory to decode; send a smaller one."
                _answer(connection, wire.REFUSED, sentence.encode())
            else:
                _answer(connection, wire.PIXELS, pixels)


def _confine() -> None:
    """Limit what a file can make this process do."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # to the whole group; the worker decides
        signal.signal(name, signal.SIG_IGN)
    os.nice(NICE)
    with contextlib.suppress(OSError):  # where memory runs out, the kernel is to end this process and not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    for what, most in (
        (resource.RLIMIT_DATA, MEMORY << 20),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(what, (most, most))
    os.dup2(1, 2)  # codecs write a line for every bad row of a picture; 1 is /dev/null


def _hold_on_to(lifeline: int) -> None:
    """Have the kernel send SIGIO, which ends a process that does not handle it, when the other end is gone.

    The connection would not do: SIGIO also tells of a request, and may be sent only after the request has been read.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def _limit_time() -> None:
    """Let the kernel end this process when the next picture takes too long."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(used.ru_utime + used.ru_stime) + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


def _pixels(path: Path, side: int, library: str, connection: socket.socket) -> bytes:
    """The picture of a file as (side, side, 3) uint8."""

    def admit(needed: int) -> None:
        if needed > LARGE:
            _answer(connection, wire.LARGE, wire.NUMBER.pack(needed))
            _receive(connection, len(wire.GO))

    return resized(open_image(path, admit, to_rgb if library == "lavis" else on_white), side, library)


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def _answer(connection: socket.socket, kind: int, data: bytes = b"") -> None:
    connection.sendall(wire.ANSWER.pack(kind, len(data)) + data)


if __name__ == "__main__":
    main()
