"""A fabric of switches that obey, under any story: every frame comes to its one machine, every flood to all, once."""

from collections import Counter

import pytest
from fakes import FakeSwitch, ethernet
from hypothesis import given, settings
from hypothesis import strategies as st

from controller import openflow
from controller.forwarding import Forwarding, Step
from controller.guard import Guard
from controller.locations import Locations
from controller.network import Network, Port
from controller.openflow import FlowMod
from controller.policy import policy_of
from topologies.leaf_spine import leaf_spine
from topologies.plan import port_name

BROADCAST = "ff:ff:ff:ff:ff:ff"
HOSTS = [f"esx{number}" for number in range(1, 5)]
MACS = [f"02:00:00:00:00:0{number}" for number in range(4)]
OUTSIDER = "02:00:00:00:00:99"


class Fabric:
    """Four hosts and a client on two leaves with two spines; the controller's pure parts, and switches that obey."""

    def __init__(self) -> None:
        self.plan = plan = leaf_spine()
        self.guard = Guard(policy_of(plan))
        self.network, self.locations = Network(), Locations(self.guard)
        self.forwarding = Forwarding(self.network, self.locations)
        self.switches = {name: FakeSwitch() for name in plan.switches}
        self.ports: dict[str, Port] = {}  # by name
        self.cables = {(port_name(a, b), port_name(b, a)) for a, b in plan.trunks}
        ends = [(a, b) for trunk in plan.trunks for a, b in (trunk, trunk[::-1])]
        ends += [(host.switch, host.name) for host in plan.hosts]
        ends += [(client.switch, client.name) for client in plan.clients]
        for number, (switch, node) in enumerate(ends, start=1):
            port = self.ports[port_name(switch, node)] = Port(switch, number)
            self.network.add_switch(switch)
            self.guard.name_port(port, port_name(switch, node))
            self.forwarding.add_port(port)
        for name, obedient in self.switches.items():
            obedient.apply(FlowMod("add", flow) for flow in self.forwarding.desired(name))
        self.edges = {host.name: self.ports[port_name(host.switch, host.name)] for host in plan.hosts}
        self.edges["c1"] = self.ports["leaf2-c1"]
        for cable in sorted(self.cables):
            self.set(cable, True)
        self.now_ns = 0

    def obey(self, steps: list[Step]) -> None:
        for switch, changes in steps:
            self.switches[switch].apply(changes)

    def set(self, cable: tuple[str, str], is_up: bool) -> None:
        self.was_whole = is_up and self.is_whole()
        one, other = (self.ports[name] for name in cable)
        if is_up and self.network.away & {one.switch, other.switch}:
            return  # such a switch cannot tell
        changed = self.network.connect(one, other) if is_up else self.network.disconnect(one)
        if changed:
            self.reroute()

    def reroute(self) -> None:
        for steps in self.forwarding.reroute():
            for step in steps:  # in any order: nothing may loop in between, and nothing that was reached be lost
                self.obey([step])
                self.observe()

    def lose(self, switch: str) -> None:
        """Its controller, that is."""
        if switch not in self.network.away:
            self.was_whole = self.is_whole()
            self.forwarding.lose_switch(switch)
            self.reroute()

    def find(self, switch: str) -> None:
        if switch in self.network.away:
            self.was_whole = False
            self.network.add_switch(switch)
            entries = self.switches[switch].entries.values()
            self.obey([Step(switch, openflow.difference(list(entries), self.forwarding.desired(switch)))])
            self.reroute()

    def moves(self, mac: str, to: str) -> list[Step]:
        self.now_ns += 1
        decision = self.locations.place(mac, self.edges[to], "manager", self.now_ns)
        steps = self.forwarding.steps(decision) if decision is not None else []
        self.obey(steps)
        return steps

    def sent(self, at: str, mac: str, source: str = OUTSIDER) -> Counter[str]:
        """To which machines a frame comes that is sent at a machine's port, and how often."""
        frame, arrived = ethernet(source, mac), Counter[str]()
        names = {port: name for name, port in self.edges.items()}
        queue = [self.edges[at]]
        for _ in range(100):
            if not queue:
                return arrived
            here = queue.pop()
            for number in self.switches[here.switch].forward(here.number, frame).ports:
                port = Port(here.switch, number)
                if port in names:
                    arrived[names[port]] += 1
                elif (peer := self.network.peer(port)) is not None:
                    queue.append(peer)
        raise AssertionError("it goes in circles")

    def observe(self) -> None:
        if self.is_whole():
            for mac, at in self.locations.all().items():
                there = next(name for name, port in self.edges.items() if port == at)
                for begin in ("esx1", "esx2"):
                    if begin != there and self.was_whole and not self.network.away:
                        assert self.sent(begin, mac)[there] == 1
        for begin in ("esx1", "esx2"):
            assert all(count == 1 for count in self.sent(begin, BROADCAST).values())

    def is_whole(self) -> bool:
        return len(self.network.distances("leaf1")) == len(self.switches)


@pytest.fixture
def fabric() -> Fabric:
    return Fabric()


def test_a_frame_for_a_known_mac_comes_to_it_alone_from_everywhere(fabric: Fabric) -> None:
    fabric.moves(MACS[0], "esx2")
    for at in fabric.edges:
        assert fabric.sent(at, MACS[0]) == ({} if at == "esx2" else {"esx2": 1})


def test_a_flood_comes_to_everybody_once(fabric: Fabric) -> None:
    for at in fabric.edges:
        assert fabric.sent(at, BROADCAST) == dict.fromkeys(set(fabric.edges) - {at}, 1)


def test_a_move_tells_the_new_leaf_first(fabric: Fabric) -> None:
    fabric.moves(MACS[0], "esx1")
    steps = fabric.moves(MACS[0], "esx2")
    assert steps[0].switch == "leaf2"
    assert [step.switch for step in steps[1:-1]] == ["spine1", "spine2"] and steps[-1].switch == "leaf1"


def test_what_comes_over_a_trunk_is_no_news(fabric: Fabric) -> None:
    fabric.moves(MACS[0], "esx1")
    trunk = fabric.ports["leaf2-spine1"]
    assert not fabric.switches["leaf2"].forward(trunk.number, ethernet(MACS[0], MACS[1])).to_controller


def test_a_switch_that_is_back_has_the_entries_that_it_would_have_anyway(fabric: Fabric) -> None:
    for number, mac in enumerate(MACS):
        fabric.moves(mac, HOSTS[number])
    for name, switch in fabric.switches.items():
        before = set(switch.entries.values())
        ports = [port for port in fabric.ports.values() if port.switch == name]
        fabric.forwarding.lose_switch(name)
        fabric.network.add_switch(name)
        for port in ports:
            fabric.forwarding.add_port(port)
        assert set(fabric.forwarding.desired(name)) == before


def test_what_lies_behind_a_switch_that_is_away_is_still_reached(fabric: Fabric) -> None:
    fabric.moves(MACS[0], "esx2")
    for away in ("leaf2", "spine1"):
        fabric.forwarding.lose_switch(away)
    for steps in fabric.forwarding.reroute():
        fabric.obey(steps)
    assert fabric.sent("esx1", MACS[0]) == {"esx2": 1}
    for at in fabric.edges:
        assert fabric.sent(at, BROADCAST) == dict.fromkeys(set(fabric.edges) - {at}, 1)


def another_controller(fabric: Fabric) -> Forwarding:
    """It knows the switches that are connected to it, and no trunk."""
    fabric.network, fabric.locations = Network(), Locations(fabric.guard)
    fabric.forwarding = Forwarding(fabric.network, fabric.locations)
    return fabric.forwarding


def takes_on(fabric: Fabric, switch: str) -> set[Port]:
    entries = list(fabric.switches[switch].entries.values())
    needed = fabric.forwarding.inherit(switch, entries)
    fabric.network.add_switch(switch)
    for port in [port for port in fabric.ports.values() if port.switch == switch]:
        fabric.forwarding.add_port(port)
    for flow in (flow for flow in entries if flow.table == openflow.SOURCES and flow.match.eth_src):
        fabric.locations.adopt(flow.match.eth_src or "", Port(switch, flow.match.in_port or 0))
    fabric.switches[switch].apply(openflow.difference(entries, fabric.forwarding.desired(switch)))
    return needed


@pytest.mark.parametrize("order", [["leaf1", "spine2", "leaf2", "spine1"], ["spine1", "leaf2", "leaf1", "spine2"]])
def test_another_controller_changes_no_way_before_it_has_found_the_trunks(fabric: Fabric, order: list[str]) -> None:
    for number, mac in enumerate(MACS):
        fabric.moves(mac, HOSTS[number])
    before = {name: set(switch.entries.values()) for name, switch in fabric.switches.items()}
    old = fabric.network
    forwarding, needed = another_controller(fabric), set[Port]()
    for switch in order:
        needed |= takes_on(fabric, switch)
        assert {name: set(switch.entries.values()) for name, switch in fabric.switches.items()} == before
    assert not forwarding.is_settled
    assert needed <= {port for trunk in old.trunks() for port in trunk}
    for one, other in old.trunks():
        fabric.network.connect(one, other)
    forwarding.settle()
    for steps in forwarding.reroute():
        fabric.obey(steps)
    assert {name: set(switch.entries.values()) for name, switch in fabric.switches.items()} == before


def test_a_trunk_that_went_while_nobody_looked_is_given_up_in_the_end(fabric: Fabric) -> None:
    fabric.moves(MACS[0], "esx1")
    fabric.moves(MACS[1], "esx2")
    old = fabric.network.trunks()
    forwarding = another_controller(fabric)
    for switch in fabric.switches:
        takes_on(fabric, switch)
    for one, other in old:
        if "spine1" not in (one.switch, other.switch):
            fabric.network.connect(one, other)
    fabric.moves(MACS[1], "esx4")  # meanwhile
    for decision in fabric.locations.forget_port(fabric.edges["esx1"]):
        fabric.obey(forwarding.steps(decision))
    forwarding.settle()
    for steps in forwarding.reroute():
        fabric.obey(steps)
    assert fabric.sent("esx1", MACS[1]) == {"esx4": 1}
    assert fabric.sent("esx3", MACS[0]) == {"esx1": 1, "esx2": 1, "esx4": 1, "c1": 1}, "it is unknown: a flood"
    for name, obedient in fabric.switches.items():
        assert set(obedient.entries.values()) == set(forwarding.desired(name))


events = st.one_of(
    st.tuples(st.just("move"), st.sampled_from(MACS), st.sampled_from(HOSTS)),
    st.tuples(st.sampled_from(["cut", "mend"]), st.integers(0, 3), st.none()),
    st.tuples(st.just("down"), st.sampled_from(HOSTS), st.none()),
    st.tuples(st.sampled_from(["lose", "find"]), st.sampled_from(["leaf1", "leaf2", "spine1", "spine2"]), st.none()),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(events, max_size=15))
def test_whatever_happens_each_frame_comes_to_its_machine_and_nothing_comes_twice(story: list[tuple]) -> None:
    fabric, truth = Fabric(), dict[str, str]()
    cables = sorted(fabric.cables)
    for event, what, host in story:
        match event:
            case "move":
                fabric.moves(what, host)
                truth[what] = host
            case "down":
                for decision in fabric.locations.forget_port(fabric.edges[what]):
                    fabric.obey(fabric.forwarding.steps(decision))
                truth = {mac: place for mac, place in truth.items() if place != what}
            case "lose":
                fabric.lose(what)
            case "find":
                fabric.find(what)
            case _:
                fabric.set(cables[what], event == "mend")
        for at in ("esx1", "esx2", "c1"):
            for mac in MACS:
                arrived = fabric.sent(at, mac)
                assert all(count == 1 for count in arrived.values())
                if fabric.is_whole() and not fabric.network.away and mac in truth:
                    assert arrived == ({} if truth[mac] == at else {truth[mac]: 1})
            arrived = fabric.sent(at, BROADCAST)
            assert all(count == 1 for count in arrived.values())
            assert not fabric.is_whole() or fabric.network.away or len(arrived) == len(fabric.edges) - 1
    for name in fabric.switches:
        fabric.find(name)
    for name, switch in fabric.switches.items():
        assert set(switch.entries.values()) == set(fabric.forwarding.desired(name))
