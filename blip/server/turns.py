"""Which of the events that wait is sent next, so that slow receivers, however many, delay nobody else's for long."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

HURRY_SECONDS = 2.0  # for an attempt while others wait
AGAIN_SECONDS = 5.0  # that an attempt after a failed one lets others go first
NOTICE_SECONDS = 0.05
CUTS = 4  # at a time: a hundred senders that end at once, and as many that begin, hold up everyone


class Turn:
    """One attempt to send; `cut` ends it early, once."""

    def __init__(self, group: str, *, again: bool) -> None:
        self.group = group
        self.since = time.monotonic()
        self.rank = self.since + AGAIN_SECONDS * again  # lower goes first
        self.cut: Callable[[], None] = lambda: None
        self.is_cut = False
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Turns:
    """`most` attempts at a time, half of them to one group of receivers: a domain or a network.

    Among the first of each group it is the turn of the one that has waited longest, where each attempt that its group
    has running counts as a second. Used on the event loop's thread only.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._running: dict[Turn, None] = {}  # oldest first
        self._of_group: Counter[str] = Counter()
        self._waiting: dict[tuple[str, bool], deque[Turn]] = {}
        self._hurrying: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def turn(self, group: str, *, again: bool) -> AsyncIterator[Turn]:
        """Wait for a turn; have it in the `with` block."""
        turn = Turn(group, again=again)
        line = self._waiting.setdefault((group, again), deque())
        line.append(turn)
        self._begin()
        if not turn.begun.done() and not self._hurrying:
            self._hurrying = asyncio.create_task(self._hurry())
        try:
            await turn.begun
            yield turn
        finally:
            if turn in self._running:
                del self._running[turn]
                self._of_group[group] -= 1
                if not self._of_group[group]:
                    del self._of_group[group]
            else:  # cancelled while it waited
                line.remove(turn)
            self._begin()

    def _begin(self) -> None:
        """Begin as many as may."""
        while len(self._running) < self._most:
            lines = [key for key, line in self._waiting.items() if line and self._of_group[key[0]] < self._most // 2]
            if not lines:
                break
            first = min(lines, key=lambda key: self._waiting[key][0].rank + self._of_group[key[0]])
            turn = self._waiting[first].popleft()
            turn.since = time.monotonic()
            self._running[turn] = None
            self._of_group[turn.group] += 1
            turn.begun.set_result(None)
        for key in [key for key, line in self._waiting.items() if not line]:
            del self._waiting[key]

    async def _hurry(self) -> None:
        """Cut attempts that have had their time, as long as others wait for a turn."""
        while self._waiting:
            await asyncio.sleep(NOTICE_SECONDS)
            late = time.monotonic() - HURRY_SECONDS
            overdue = [turn for turn in self._running if turn.since < late and not turn.is_cut]
            for turn in overdue[:CUTS] if self._waiting else []:
                turn.is_cut = True
                turn.cut()
        self._hurrying = None
