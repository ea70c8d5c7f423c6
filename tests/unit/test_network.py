"""Ways and trees, on any network of switches."""

from hypothesis import given
from hypothesis import strategies as st

from controller.network import Network, Port

MACS = [f"00:50:56:00:00:{number:02x}" for number in range(64)]


def fabric(leaves: int, spines: int) -> Network:
    """Leaf n has its trunk to spine m at port m, and the other way round."""
    network = Network()
    for leaf in range(1, leaves + 1):
        for spine in range(1, spines + 1):
            network.connect(Port(f"leaf{leaf}", spine), Port(f"spine{spine}", leaf))
    return network


def walk(network: Network, begin: str, at: Port, mac: str) -> list[str]:
    """The switches that a frame comes through, until it leaves the network."""
    switch, passed = begin, [begin]
    while (number := network.way(switch, at, mac)) is not None:
        if (peer := network.peer(Port(switch, number))) is None:
            assert Port(switch, number) == at
            return passed
        switch = peer.switch
        passed.append(switch)
        assert len(passed) < 100, "it goes in circles"
    return []


def test_between_two_leaves_frames_take_one_spine_and_all_spines_are_used() -> None:
    network, at = fabric(3, 4), Port("leaf2", 9)
    spines = set()
    for mac in MACS:
        first, spine, last = walk(network, "leaf1", at, mac)
        assert (first, last) == ("leaf1", "leaf2")
        spines.add(spine)
    assert spines == {"spine1", "spine2", "spine3", "spine4"}


def test_a_mac_keeps_its_way_whichever_switch_was_there_first() -> None:
    one, other = fabric(2, 3), Network()
    for here, there in reversed(fabric(2, 3).trunks()):
        other.connect(there, here)
    at = Port("leaf2", 9)
    assert [one.way("leaf1", at, mac) for mac in MACS] == [other.way("leaf1", at, mac) for mac in MACS]


def test_when_a_trunk_fails_the_others_are_used_and_it_is_used_again_when_it_is_back() -> None:
    network, at = fabric(2, 2), Port("leaf2", 9)
    before = [network.way("leaf1", at, mac) for mac in MACS]
    assert network.disconnect(Port("spine1", 2))
    assert {network.way("leaf1", at, mac) for mac in MACS} == {2}
    assert not network.disconnect(Port("spine1", 2))
    network.connect(Port("leaf2", 1), Port("spine1", 2))
    assert [network.way("leaf1", at, mac) for mac in MACS] == before


def test_where_no_way_leads_there_is_none() -> None:
    network = fabric(1, 1)
    network.add_switch("island")
    assert network.way("island", Port("leaf1", 9), MACS[0]) is None
    assert network.way("nowhere", Port("leaf1", 9), MACS[0]) is None
    network.disconnect(Port("leaf1", 1))
    assert network.trunks() == [] and network.switches == {"leaf1", "spine1", "island"}
    assert network.way("spine1", Port("leaf1", 9), MACS[0]) is None


def test_a_cable_that_is_moved_takes_its_old_trunk_with_it() -> None:
    network = fabric(2, 1)
    assert network.connect(Port("leaf1", 1), Port("leaf2", 5))
    assert network.trunks() == [(Port("leaf1", 1), Port("leaf2", 5)), (Port("leaf2", 1), Port("spine1", 2))]
    assert not network.connect(Port("leaf2", 5), Port("leaf1", 1)), "no news"


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Up to six switches and any trunks between them, some of which have failed; some are away."""
    network, used = Network(), dict[str, int]()
    names = [f"s{number}" for number in range(draw(st.integers(1, 6)))]
    for name in names:
        network.add_switch(name)
    for one, other in draw(st.lists(st.tuples(st.sampled_from(names), st.sampled_from(names)), max_size=15)):
        if one != other:
            for name in (one, other):
                used[name] = used.get(name, 0) + 1
            network.connect(Port(one, used[one]), Port(other, used[other]))
    tree = network.tree()
    for name in draw(st.sets(st.sampled_from(names))):
        network.lose_switch(name, {port.number for port in tree if port.switch == name})
    for port, _ in network.trunks():
        if draw(st.booleans()) and draw(st.booleans()):
            network.disconnect(port)
    return network


def reachable(network: Network, begin: str) -> set[str]:
    found, queue = {begin}, [begin]
    while queue:
        here = queue.pop()
        for one, other in network.trunks():
            for near, far in ((one.switch, other.switch), (other.switch, one.switch)):
                if near == here and far not in found:
                    found.add(far)
                    queue.append(far)
    return found


@given(networks())
def test_every_frame_takes_a_way_if_there_is_one_a_shortest_if_nobody_is_away(network: Network) -> None:
    for target in network.switches:
        for begin in network.switches:
            passed = walk(network, begin, Port(target, 99), MACS[0])
            if begin in reachable(network, target):
                if not network.away:
                    assert len(passed) == network.distances(target)[begin] + 1
            else:
                assert passed == []


@given(networks())
def test_a_flood_comes_to_every_switch_once(network: Network) -> None:
    tree = network.tree()
    for begin in network.switches:
        arrived = {begin: 1}
        queue: list[tuple[str, int]] = [(begin, 0)]
        while queue:
            switch, came_from = queue.pop()
            for port in tree:
                if port.switch == switch and port.number != came_from:
                    peer = network.peer(port)
                    assert peer is not None and peer in tree
                    arrived[peer.switch] = arrived.get(peer.switch, 0) + 1
                    assert arrived[peer.switch] == 1, "a loop"
                    queue.append((peer.switch, peer.number))
        assert set(arrived) == reachable(network, begin) or network.away


def test_a_tree_of_a_fabric_leaves_trunks_out() -> None:
    network = fabric(3, 2)
    assert len(network.trunks()) == 6
    assert len(network.tree()) == 2 * 4


def test_a_switch_that_is_away_is_the_end_of_ways_and_a_stage_only_without_another() -> None:
    network = fabric(3, 2)
    before = [walk(network, "leaf2", Port("leaf3", 9), mac) for mac in MACS]
    tree = network.tree()
    for away in ("spine1", "leaf3"):
        network.lose_switch(away, {port.number for port in tree if port.switch == away})
    for mac in MACS:
        assert walk(network, "leaf2", Port("leaf3", 9), mac) == ["leaf2", "spine2", "leaf3"]
    assert network.tree() == tree, "who is away cannot be told of another"
    network.disconnect(Port("leaf2", 2))
    for mac in MACS:
        assert walk(network, "leaf2", Port("leaf3", 9), mac) == ["leaf2", "spine1", "leaf3"], "better than none"
    network.connect(Port("leaf2", 2), Port("spine2", 2))
    for switch in ("spine1", "leaf3"):
        network.add_switch(switch)
    assert [walk(network, "leaf2", Port("leaf3", 9), mac) for mac in MACS] == before


@given(networks(), st.sets(st.sampled_from([f"s{number}" for number in range(6)])))
def test_a_flood_goes_to_switches_where_somebody_is_and_no_further(network: Network, inhabited: set[str]) -> None:
    tree = network.tree(inhabited)
    assert tree <= network.tree()
    ends = [port.switch for port in tree if sum(other.switch == port.switch for other in tree) == 1]
    assert set(ends) <= inhabited
    for begin in inhabited & network.switches:
        found, queue = {begin}, [begin]
        while queue:
            here = queue.pop()
            for port in tree:
                peer = network.peer(port)
                if port.switch == here and peer is not None and peer.switch not in found:
                    found.add(peer.switch)
                    queue.append(peer.switch)
        assert reachable(network, begin) & inhabited <= found or network.away


def test_a_spine_that_the_tree_does_not_need_gets_no_flood() -> None:
    assert {port.switch for port in fabric(2, 2).tree({"leaf1", "leaf2"})} == {"leaf1", "spine1", "leaf2"}
