"""Who gives way when there is no room."""

from blip.server.names import host_is
from blip.server.room import Holding, Room, who_is

ONE, OTHER = who_is("192.0.2.1"), who_is("198.51.100.1")


class Client:
    """Takes from a room, and notes what it had to give back."""

    def __init__(self, room: Room, address: str) -> None:
        self.room, self.who, self.gave = room, who_is(address), 0

    def take(self, size: int) -> Holding | None:
        return self.room.hold(self.who, size, self.give_way)

    def give_way(self) -> bool:
        self.gave += 1
        return True


def test_a_client_who_holds_the_most_gives_way_to_another_and_not_to_itself() -> None:
    room = Room(10, patience=1000)
    greedy, modest = Client(room, "192.0.2.1"), Client(room, "198.51.100.1")
    assert all(greedy.take(1) for _ in range(10))
    assert greedy.take(1) is None
    assert all(modest.take(1) for _ in range(5))
    assert (greedy.gave, room.total) == (5, 10)
    assert modest.take(1) is None, "now both hold the same"


def test_many_addresses_of_one_network_are_one_holder() -> None:
    room = Room(10, patience=1000)
    many = [Client(room, f"192.0.2.{number}") for number in range(10)]
    assert all(client.take(1) for client in many)
    assert Client(room, "198.51.100.1").take(1)
    assert who_is("2001:db8:1::1")[0] == who_is("2001:db8:1:ffff::1")[0]
    assert who_is("2001:db8::1") == who_is("2001:db8::ffff:1")
    assert who_is("::ffff:192.0.2.1") == ONE != OTHER


def test_what_is_old_gives_way_to_whomever_and_what_is_in_use_never() -> None:
    room = Room(2, patience=0)
    used = room.hold(ONE, 1)
    old = Client(room, "192.0.2.1")
    assert used and old.take(1) and old.take(1)
    assert old.gave == 1
    assert used.size == 1


def test_what_several_keep_counts_until_the_last_lets_go() -> None:
    room = Room(10, patience=0)
    holding = room.hold(ONE, 4)
    assert holding
    holding.keep()
    holding.let_go()
    assert room.total == 4
    holding.let_go()
    assert room.total == 0


def test_hosts_of_a_domain_are_one_group_and_ports_are_receivers_of_their_own() -> None:
    assert host_is("a.example.com", 443)[0] == host_is("b.c.EXAMPLE.com.", 80)[0] == "example.com"
    assert host_is("192.0.2.1", 80) == ("192.0.2.0/24", "192.0.2.1:80")
    assert host_is("[2001:db8::1]", 80)[0] == "2001:db8::/48"
