"""The neighbour table of a namespace, read and written."""

import re
from collections.abc import Iterator

import pytest
from namespaces import Node, inside

from hosts.neighbours import known, learn
from topologies.errors import TestbedError

MAC, OTHER = "02:00:00:00:00:07", "02:00:00:00:00:08"
PAIRS = [("10.9.3.7", MAC), ("fd00:9::7", MAC)]


@pytest.fixture
def node() -> Iterator[Node]:
    """A namespace with two devices on one cable."""
    node = Node()
    node.run("ip", "link", "set", "lo", "up")
    node.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
    for device in ("eth0", "eth1"):
        node.run("ip", "link", "set", device, "up")
    node.run("ip", "addr", "add", "10.9.3.1/24", "dev", "eth0")
    node.run("ip", "addr", "add", "fd00:9::1/64", "dev", "eth0", "nodad")
    yield node
    node.end()


def states(node: Node) -> dict[str, str]:
    """IP -> state, as `ip` shows it."""
    return {line.split()[0]: line.split()[-1] for line in node.run("ip", "neigh", "show", "dev", "eth0").splitlines()}


def test_what_is_learnt_is_known_and_of_use_at_once(node: Node) -> None:
    with inside(node.pid):
        assert known() == []
        learn("eth0", [])
        learn("eth0", PAIRS)
        assert sorted(known()) == PAIRS
    assert states(node) == {ip: "STALE" for ip, _ in PAIRS}


def test_a_neighbour_that_is_known_already_is_corrected(node: Node) -> None:
    node.run("ip", "neigh", "add", "10.9.3.7", "lladdr", OTHER, "dev", "eth0", "nud", "reachable")
    with inside(node.pid):
        assert known() == [("10.9.3.7", OTHER)]
        learn("eth0", PAIRS)
        assert sorted(known()) == PAIRS


def test_who_has_not_answered_is_no_known_neighbour(node: Node) -> None:
    """Asked for and silent, given up, or without an address of its own: carried, it would make the kernel wait."""
    for number, state in ((2, "incomplete"), (3, "failed"), (4, "noarp")):
        for prefix in ("10.9.3.", "fd00:9::"):
            words = ["lladdr", OTHER] if state == "noarp" else []
            node.run("ip", "neigh", "add", f"{prefix}{number}", *words, "dev", "eth0", "nud", state)
    node.run("ip", "neigh", "add", "10.9.3.5", "lladdr", OTHER, "dev", "eth0", "nud", "permanent")
    with inside(node.pid):
        assert known() == [("10.9.3.5", OTHER)]


def test_hundreds_of_neighbours_are_more_than_one_message_holds(node: Node) -> None:
    many = [(f"{prefix}{n}", f"02:00:00:00:01:{n:02x}") for prefix in ("10.9.3.", "fd00:9::") for n in range(10, 250)]
    with inside(node.pid):
        learn("eth0", many)
        assert sorted(known()) == sorted(many)


def test_a_neighbour_that_the_kernel_refuses_is_an_error(node: Node) -> None:
    with inside(node.pid), pytest.raises(TestbedError, match=re.escape("could not be entered: Invalid argument")):
        learn("eth0", [*PAIRS, ("10.9.3.8", "02:00")])
