"""A bounded amount of something that clients can make the server hold, shared so that none takes it all."""

import functools
import ipaddress
import time
from collections import Counter
from collections.abc import Callable

#: Who holds something, from wide to narrow: a network or a domain, then an address or a host.
Who = tuple[str, str]


@functools.lru_cache(4096)  # each request asks
def who_is(address: str | None) -> Who:
    """The client or receiver at an IP address: its network (/24, /48) and its address, of IPv6 the first 64 bits.

    A home or a rented machine has all addresses of an IPv6 network of 64 bits.
    """
    try:
        ip = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return "unknown", "unknown address"
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    wide, narrow = (24, 32) if ip.version == 4 else (48, 64)
    networks = (ipaddress.ip_network((ip, bits), strict=False) for bits in (wide, narrow))
    return str(next(networks)), str(next(networks))


def never() -> bool:
    """What is in use does not give way."""
    return False


class Holding:
    """What one holder has of a `Room`, until all who keep it have let it go.

    Attributes:
        size: how much it is.
        give_way: asked to let it go at once for another; tells whether it did.
        at_end: called when nobody keeps it any more.
    """

    def __init__(self, room: "Room", who: Who, give_way: Callable[[], bool]) -> None:
        self._room = room
        self._keepers = 1
        self.who = who
        self.size = 0
        self.since = time.monotonic()
        self.give_way = give_way
        self.at_end: Callable[[], None] = lambda: None

    @property
    def is_alone(self) -> bool:
        """Whether one alone keeps it, who can give way with it."""
        return self._keepers == 1

    def keep(self) -> None:
        """Be one more who must let it go."""
        self._keepers += 1

    def let_go(self) -> None:
        """Give it back, once, when it is the last who keeps it."""
        self._keepers -= 1
        if self._keepers == 0:
            self._room._remove(self)
            self.at_end()


class Room:
    """`most` of something, in whatever unit; used on the event loop's thread only.

    When it is full, a newcomer gets what another gives way with: the oldest holding of whoever holds the most, if
    that is more than the newcomer would hold, or if it is older than `patience` seconds.
    """

    def __init__(self, most: int, patience: float) -> None:
        self.most = most
        self.total = 0
        self._patience = patience
        self._held: Counter[str] = Counter()  # by network or domain, and by address or host
        self._holdings: dict[Who, dict[Holding, None]] = {}  # oldest first

    def held_by(self, narrow: str) -> int:
        """How much an address or a host holds."""
        return self._held[narrow]

    def hold(self, who: Who, size: int, give_way: Callable[[], bool] = never, *, force: bool = False) -> Holding | None:
        """Take `size`; None where there is no room, unless `force` says that it is there already."""
        holding = Holding(self, who, give_way)
        self._holdings.setdefault(who, {})[holding] = None
        if force:
            self._change(holding, size)
        elif not self.resize(holding, size):
            holding.let_go()
            return None
        return holding

    def resize(self, holding: Holding, size: int, spare: int = 0) -> bool:
        """Make a holding larger or smaller; tell whether there is room and `spare` stays free."""
        more = size - holding.size
        if more > 0 and not self.make_way(holding.who, more, spare, holding):
            return False
        self._change(holding, size)
        return True

    def renew(self, holding: Holding) -> None:
        """Make a holding the youngest of its holder."""
        mine = self._holdings.get(holding.who, {})
        if holding in mine:
            holding.since = time.monotonic()
            del mine[holding]
            mine[holding] = None

    def make_way(self, who: Who, size: int, spare: int = 0, holding: Holding | None = None) -> bool:
        """Have others give way until `who` can take `size`; tell whether there is room."""
        while self.total + size > self.most - spare:
            if not self._one_gives_way(who, size, holding):
                return False
        return True

    def _one_gives_way(self, who: Who, size: int, newcomer: Holding | None) -> bool:
        wide, narrow = who
        own = self._held[wide] + size, self._held[narrow] + size
        old = time.monotonic() - self._patience
        for other in sorted(self._holdings, key=lambda one: (self._held[one[0]], self._held[one[1]]), reverse=True):
            if other[0] != wide:
                has_more = self._held[other[0]] > own[0]
            else:
                has_more = other[1] != narrow and self._held[other[1]] > own[1]
            for holding in self._holdings[other]:
                if holding.since > old and not has_more:
                    break  # so are those after it
                if holding is not newcomer and holding.size and holding.is_alone and holding.give_way():
                    self._remove(holding)
                    return True
        return False

    def _change(self, holding: Holding, size: int) -> None:
        more = size - holding.size
        holding.size = size
        self.total += more
        for one in holding.who:
            self._held[one] += more
            if not self._held[one]:
                del self._held[one]

    def _remove(self, holding: Holding) -> None:
        self._change(holding, 0)
        holding.give_way = never  # it may know who keeps the holding, which would then stay as garbage
        mine = self._holdings.get(holding.who, {})
        mine.pop(holding, None)
        if not mine:
            self._holdings.pop(holding.who, None)
