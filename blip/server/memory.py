"""Gives memory back to the system that large requests needed for a while.

glibc keeps what was freed between blocks that are still in use: after bodies of 66 MB that came in parts, 300 MB. And
it keeps ever larger blocks, unless it is told a size.
"""

import asyncio
import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

SECONDS = 10.0  # between two looks
SLACK = 10_000_000  # bytes more than at the start, beyond what requests hold
MMAP_THRESHOLD, LARGE = -3, 1 << 20  # mallopt's parameter, and the bytes of blocks that are given back at once
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(pid: int) -> int:
    """Bytes of memory that a process has; 0 for one that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


async def give_back(held: Callable[[], int]) -> None:
    """Give memory back whenever this process has much more than the bytes that are `held`; runs until cancelled."""
    library = ctypes.CDLL(None)
    trim = getattr(library, "malloc_trim", None)  # other C libraries keep less, and have no such function
    if trim:
        library.mallopt(MMAP_THRESHOLD, LARGE)
    start = resident(os.getpid())
    while trim:
        await asyncio.sleep(SECONDS)
        if resident(os.getpid()) > start + held() + SLACK:
            if not held():  # nobody waits
                gc.collect()
            await asyncio.to_thread(trim, 0)  # 40 ms for 300 MB
