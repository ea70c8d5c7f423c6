"""A fabric of switches that obey, under any story: every frame comes to its one machine, every flood to all, once."""

from collections import Counter

import pytest
from fakes import FakeSwitch, ethernet
from hypothesis import given, settings
from hypothesis import strategies as st

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
        changed = self.network.connect(one, other) if is_up else self.network.disconnect(one)
        if changed:
            for steps in self.forwarding.reroute():
                for step in steps:  # in any order: nothing may loop in between, and nothing that was reached be lost
                    self.obey([step])
                    self.observe()

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
                    if begin != there and self.was_whole:
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
        fabric.forwarding.forget_switch(name)
        for port in ports:
            fabric.forwarding.add_port(port)
        assert set(fabric.forwarding.desired(name)) == before


events = st.one_of(
    st.tuples(st.just("move"), st.sampled_from(MACS), st.sampled_from(HOSTS)),
    st.tuples(st.sampled_from(["cut", "mend"]), st.integers(0, 3), st.none()),
    st.tuples(st.just("down"), st.sampled_from(HOSTS), st.none()),
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
            case _:
                fabric.set(cables[what], event == "mend")
        for at in ("esx1", "esx2", "c1"):
            for mac in MACS:
                arrived = fabric.sent(at, mac)
                assert all(count == 1 for count in arrived.values())
                if fabric.is_whole() and mac in truth:
                    assert arrived == ({} if truth[mac] == at else {truth[mac]: 1})
            arrived = fabric.sent(at, BROADCAST)
            assert all(count == 1 for count in arrived.values())
            assert not fabric.is_whole() or len(arrived) == len(fabric.edges) - 1
    for name, switch in fabric.switches.items():
        assert set(switch.entries.values()) == set(fabric.forwarding.desired(name))
