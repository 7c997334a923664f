"""A process's children, open files and memory, from /proc; and pinning it to one core.

Processes, threads and descriptors go at any time: what has gone while it is looked for is left out.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path


def descendants(pid: int) -> Iterator[int]:
    """The process and all that it started."""
    yield pid
    for child in _children(pid):
        yield from descendants(child)


def worker_of(server: int) -> int:
    """The process that holds the predictor; the server's other child is Python's resource tracker."""
    # The first: one that has just been forked from it has its command line.
    return next(pid for pid in descendants(server) if b"spawn_main" in _command(pid))


def decoders_of(server: int) -> list[int]:
    """The processes that decode pictures."""
    return _decoders(descendants(server))


def own_decoders() -> list[int]:
    """Those that this process itself started, and no server that it started."""
    return _decoders(_children(os.getpid()))


def opened_by(pid: int) -> dict[str, os.stat_result]:
    """What a process has open, by number."""
    found = {}
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found[entry.name] = entry.stat()
    return found


def memory(pid: int) -> int:
    """Bytes that only this process has and that it wrote (Private_Dirty of smaps_rollup); leaks show here.

    RSS and USS also hold unchanged pages of files, whose number changes with the page cache and with the neighbours.
    """
    return _kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Private_Dirty:") * 1024


def proportional_memory(pid: int) -> int:
    """Bytes that the process has, of pages that others have too its share (Pss)."""
    return _kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss:") * 1024


def peak_memory(pid: int) -> int:
    """The process's largest resident memory so far, in bytes."""
    return _kilobytes(Path(f"/proc/{pid}/status"), "VmHWM:") * 1024


def _decoders(pids: Iterable[int]) -> list[int]:
    return [pid for pid in pids if b"blip.pictures" in _command(pid)]


def _children(pid: int) -> Iterator[int]:
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            yield from map(int, children.read_text().split())


def _command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _kilobytes(path: Path, field: str) -> int:
    return int(path.read_text().partition(field)[2].split()[0])


def pin(pid: int, core: int) -> None:
    """Keep all threads of a process, and those that they start, on one core."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), {core})
