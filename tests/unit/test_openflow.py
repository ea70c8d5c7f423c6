"""The tables judged by where a switch that obeys them sends frames; and the words for the wire by Ryu's own reader."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FakeSwitch, Forwarded, arp, ethernet, rarp
from hypothesis import given
from hypothesis import strategies as st

from controller import openflow
from controller.forwarding import Forwarding, Step
from controller.guard import Guard, Place, Policy
from controller.locations import Decision, Locations, classify
from controller.network import Network, Port
from controller.openflow import CLEAR, Flow, FlowMod, FlowStats, Match, difference, encode

S1 = "0000000000000001"
VM, CLIENT, STRANGER = "00:50:56:00:00:01", "00:50:56:00:00:64", "02:00:00:00:00:01"
ESX1, ESX2, C1 = 1, 2, 3
OLD, NEW = ESX1, ESX2
TO_VM = ethernet(CLIENT, VM)
NAMES = {ESX1: "s1-esx1", ESX2: "s1-esx2", C1: "s1-c1"}
PLACES = {"s1-esx1": Place("uplink", "esx1"), "s1-esx2": Place("uplink", "esx2"), "s1-c1": Place("client", "c1")}


class Scene:
    """A switch and what decides about it, without a network between them; `guarded` by a plan or not."""

    def __init__(self, guarded: bool = False) -> None:
        self.guard = Guard(Policy(PLACES, {}, {VM: ""}) if guarded else None)
        self.locations, network = Locations(self.guard), Network()
        self.forwarding, self.switch = Forwarding(network, self.locations), FakeSwitch()
        network.add_switch(S1)
        for number, name in NAMES.items():
            self.guard.name_port(Port(S1, number), name)
            self.forwarding.add_port(Port(S1, number))
        self.switch.apply(FlowMod("add", flow) for flow in self.forwarding.desired(S1))
        self.now_ns = 0

    def sees(self, mac: str, port: int) -> list[Step]:
        self.now_ns += 10**9
        decision = self.locations.place(mac, Port(S1, port), "frame", self.now_ns)
        return self.obey(decision) if decision is not None else []

    def obey(self, decision: Decision) -> list[Step]:
        steps = self.forwarding.steps(decision)
        for step in steps:
            self.switch.apply(step.changes)
        return steps

    def forward(self, port: int, frame: bytes) -> Forwarded:
        return self.switch.forward(port, frame)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def went(*ports: int, reported: bool) -> Forwarded:
    return Forwarded(frozenset(ports), reported)


def test_a_switch_without_entries_drops_everything() -> None:
    assert FakeSwitch().forward(ESX1, TO_VM) == went(reported=False)


def test_an_unknown_source_is_reported_and_its_frame_flooded(scene: Scene) -> None:
    assert scene.forward(C1, TO_VM) == went(ESX1, ESX2, reported=True)


def test_a_known_source_is_no_news_and_a_known_destination_gets_its_frames_alone(scene: Scene) -> None:
    scene.sees(VM, OLD)
    scene.sees(CLIENT, C1)
    assert scene.forward(C1, TO_VM) == went(OLD, reported=False)
    assert scene.forward(OLD, ethernet(VM, CLIENT)) == went(C1, reported=False)


def test_a_frame_is_never_sent_back_where_it_came_from(scene: Scene) -> None:
    scene.sees(VM, OLD)
    assert scene.forward(OLD, TO_VM).ports == set()


def test_an_rarp_is_reported_whatever_is_known_and_goes_on_to_everybody(scene: Scene) -> None:
    scene.sees(VM, OLD)
    assert scene.forward(OLD, rarp(VM)) == went(NEW, C1, reported=True)
    assert scene.forward(NEW, rarp(VM)) == went(OLD, C1, reported=True)


def test_a_gratuitous_arp_at_a_new_port_is_reported(scene: Scene) -> None:
    scene.sees(VM, OLD)
    assert scene.forward(NEW, arp(VM, b"\x0a\0\0\x0b", b"\x0a\0\0\x0b")).to_controller


def test_after_a_move_the_new_place_is_no_news_and_the_old_one_is(scene: Scene) -> None:
    scene.sees(VM, OLD)
    scene.sees(VM, NEW)
    assert scene.forward(C1, TO_VM).ports == {NEW}
    assert not scene.forward(NEW, ethernet(VM, CLIENT)).to_controller
    assert scene.forward(OLD, ethernet(VM, CLIENT)).to_controller


def test_at_no_moment_of_a_move_is_a_frame_flooded_or_lost(scene: Scene) -> None:
    scene.sees(VM, OLD)
    decision = scene.locations.place(VM, Port(S1, NEW), "rarp", 10**9)
    assert decision is not None
    reached = []
    for step in scene.forwarding.steps(decision):
        for change in step.changes:
            scene.switch.apply([change])
            reached.append(scene.forward(C1, TO_VM).ports)
    assert reached == [{NEW}, {NEW}, {NEW}]


def test_a_forgotten_mac_leaves_no_trace(scene: Scene) -> None:
    empty = dict(scene.switch.entries)
    scene.sees(VM, OLD)
    scene.sees(VM, NEW)
    for decision in scene.locations.forget_port(Port(S1, NEW)):
        scene.obey(decision)
    assert scene.switch.entries == empty


def test_lldp_goes_to_the_controller_alone(scene: Scene) -> None:
    lldp = ethernet(VM, "01:80:c2:00:00:0e", 0x88CC)
    assert scene.forward(C1, lldp) == went(reported=True)
    assert Scene(guarded=True).forward(C1, lldp) == went(reported=False), "a client is no switch"


def test_an_answer_to_the_prober_goes_to_the_controller_alone(scene: Scene) -> None:
    scene.sees(VM, OLD)
    assert scene.forward(OLD, ethernet(VM, openflow.PROBER)) == went(reported=True)


# ---------------------------------------------------------------- guarded


def test_while_a_move_is_in_doubt_the_old_place_is_listened_to_and_forwarding_goes_on() -> None:
    scene = Scene(guarded=True)
    scene.sees(CLIENT, C1)
    scene.sees(VM, OLD)
    before = dict(scene.switch.entries)
    scene.sees(VM, NEW)
    assert set(scene.switch.entries.values()) == set(scene.forwarding.desired(S1)), "also for a switch that is new"
    assert scene.forward(OLD, ethernet(VM, CLIENT)) == went(C1, reported=True)
    assert scene.forward(C1, TO_VM) == went(OLD, reported=False)
    scene.sees(VM, OLD)
    assert scene.switch.entries == before
    scene.sees(VM, NEW)
    for decision in scene.locations.forget_port(Port(S1, NEW)):
        scene.obey(decision)
    assert scene.switch.entries == before


def test_a_client_that_says_it_is_a_vm_is_told_and_goes_nowhere() -> None:
    scene = Scene(guarded=True)
    assert scene.forward(C1, rarp(VM)) == scene.forward(C1, ethernet(VM, CLIENT)) == went(reported=True)
    assert scene.forward(ESX1, rarp(VM)) == went(ESX2, C1, reported=True)
    assert scene.forward(C1, rarp(STRANGER)) == went(ESX1, ESX2, reported=True)


def test_a_lie_that_was_told_is_dropped_without_a_word() -> None:
    scene = Scene(guarded=True)
    scene.switch.apply([FlowMod("add", openflow.silence(VM, C1))])
    assert scene.forward(C1, rarp(VM)) == went(reported=False)
    assert scene.forward(C1, rarp(STRANGER)).to_controller


def test_from_a_quarantined_port_only_known_machines_are_heard() -> None:
    scene = Scene(guarded=True)
    scene.sees(CLIENT, C1)
    scene.sees(VM, OLD)
    scene.switch.apply(FlowMod("add", flow) for flow in openflow.quarantine(C1))
    assert scene.forward(C1, TO_VM) == went(OLD, reported=False)
    assert scene.forward(C1, ethernet(STRANGER, VM)) == scene.forward(C1, rarp(STRANGER)) == went(reported=False)
    assert scene.forward(ESX2, rarp(STRANGER)).to_controller


def test_a_quarantined_place_is_listened_to_while_one_of_its_macs_is_in_doubt() -> None:
    scene = Scene(guarded=True)
    scene.sees(CLIENT, C1)
    scene.switch.apply(FlowMod("add", flow) for flow in openflow.quarantine(C1))
    scene.sees(CLIENT, ESX2)
    assert scene.forward(C1, ethernet(CLIENT, openflow.PROBER)).to_controller


MACS = [f"00:50:56:00:00:0{n}" for n in range(3)]
steps = st.tuples(
    st.sampled_from(MACS), st.sampled_from([ESX1, ESX2, C1]), st.sampled_from(["frame", "rarp", "port down"])
)


@given(st.lists(steps, max_size=30))
def test_the_switch_always_sends_to_where_a_mac_was_last_seen(story: list[tuple[str, int, str]]) -> None:
    """The loop of the controller, closed without a network: it sees only what the switch shows it."""
    scene, truth = Scene(), dict[str, int]()
    for mac, port, step in story:
        if step == "port down":
            for decision in scene.locations.forget_port(Port(S1, port)):
                scene.obey(decision)
            truth = {known: where for known, where in truth.items() if where != port}
        else:
            frame = rarp(mac) if step == "rarp" else ethernet(mac)
            if scene.forward(port, frame).to_controller:
                source = classify(frame)
                assert source is not None
                scene.sees(source.mac, port)
            truth[mac] = port
        for known in MACS:
            for in_port in NAMES:
                elsewhere = frozenset({truth[known]} if known in truth else NAMES) - {in_port}
                assert scene.forward(in_port, ethernet("00:50:56:00:00:99", known)).ports == elsewhere


# ---------------------------------------------------------------- differences

macs = st.sampled_from(MACS)
numbers = st.integers(1, 4)
flows = st.one_of(
    st.sampled_from(openflow.always(trunks_are_known=False)),
    st.lists(numbers, max_size=4, unique=True).map(openflow.flood),
    numbers.map(openflow.from_trunk).flatmap(st.sampled_from),
    numbers.map(openflow.from_client),
    macs.map(openflow.guarded),
    st.builds(openflow.known_source, macs, numbers),
    st.builds(openflow.listened_to, macs, numbers),
    st.builds(openflow.destination, macs, numbers),
)


@given(st.lists(flows), st.lists(flows))
def test_the_difference_makes_any_entries_the_desired_ones(actual: list[Flow], desired: list[Flow]) -> None:
    switch, target = FakeSwitch(), FakeSwitch()
    switch.apply(FlowMod("add", flow) for flow in actual)
    target.apply(FlowMod("add", flow) for flow in desired)
    switch.apply(difference(switch.entries.values(), desired))
    assert switch.entries == target.entries
    assert difference(switch.entries.values(), desired) == []


def test_a_quarantine_ends_by_itself_and_is_left_alone_until_then() -> None:
    entries = [openflow.silence(VM, C1), *openflow.quarantine(C1)]
    assert {entry.hard_timeout_s for entry in entries} == {openflow.QUARANTINE_S}
    assert difference(entries, []) == []


# ---------------------------------------------------------------- on the wire

# reads messages as Ryu does; a process of its own, because eventlet's patches are for good
READER = """
import json, sys
from controller import sdn_backend
from ryu.ofproto import ofproto_parser, ofproto_v1_3, ofproto_v1_3_parser

class Datapath:
    ofproto, ofproto_parser = ofproto_v1_3, ofproto_v1_3_parser

for line in sys.stdin:
    data = bytes.fromhex(line)
    version, kind, length, xid = ofproto_parser.header(data)
    assert length == len(data)
    if kind == ofproto_v1_3.OFPT_BARRIER_REQUEST:
        print(json.dumps({"barrier": xid}))
        continue
    mod = ofproto_v1_3_parser.OFPFlowMod.parser(Datapath, version, kind, length, xid, data)
    told = {"version": version, "xid": xid, "table": mod.table_id, "command": mod.command, "priority": mod.priority}
    told |= {"hard": mod.hard_timeout, "match": dict(mod.match.items()), "cookie": mod.cookie}
    told["actions"] = [[a.port, a.max_len] for i in mod.instructions if i.type == 4 for a in i.actions]
    told["goto"] = [i.table_id for i in mod.instructions if i.type == 1]
    print(json.dumps(told))
"""

EVERY_KIND = [
    *openflow.always(trunks_are_known=False),
    openflow.flood([3, 1, 2]),
    *openflow.from_trunk(7),
    openflow.from_client(8),
    openflow.guarded(VM),
    openflow.known_source(VM, 5),
    openflow.listened_to(VM, 6),
    openflow.destination(VM, 6),
    *openflow.quarantine(9),
    openflow.silence(VM, 9),
]


def test_ryu_reads_every_message_as_it_is_meant() -> None:
    changes = [FlowMod(command, flow) for flow in EVERY_KIND for command in ("add", "delete")]  # type: ignore[arg-type]
    lines = [encode(change, 7).hex() for change in [*changes, CLEAR]] + [openflow.barrier(9).hex()]
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"SDN_BACKEND": "ryu"},
    )
    *told, clear, barrier = map(json.loads, done.stdout.splitlines())
    for (command, flow), read in zip(changes, told, strict=True):
        assert (read["version"], read["xid"], read["cookie"]) == (4, 7, openflow.COOKIE)
        assert (read["table"], read["priority"], read["hard"]) == (flow.table, flow.priority, flow.hard_timeout_s)
        assert read["match"] == {name: value for name, value in flow.match._asdict().items() if value is not None}
        assert read["command"] == {"add": 0, "delete": 4}[command]
        if command == "add":
            ports = [0xFFFFFFFD if port == "controller" else port for port in flow.output]
            assert read["actions"] == [[port, openflow.PACKET_IN_BYTES] for port in ports]
            assert read["goto"] == ([] if flow.goto is None else [flow.goto])
    assert (clear["table"], clear["command"], clear["match"]) == (0xFF, 3, {})
    assert barrier == {"barrier": 9}


def stats_of(flow: Flow, seconds: int = 3, packets: int = 5, cookie: int = openflow.COOKIE) -> bytes:
    """An entry as a switch tells it: the flow-mod's own match and instructions behind another head."""
    rest = encode(FlowMod("add", flow), 0)[48:]
    head = openflow._STATS.pack(
        openflow._STATS.size + len(rest), flow.table, seconds, 500_000_000, flow.priority, 0, flow.hard_timeout_s, 0,
        cookie, packets, 60,
    )  # fmt: skip
    return head + rest


@given(st.lists(flows, min_size=1))
def test_a_dump_of_entries_is_read_back(told: list[Flow]) -> None:
    data, offset, read = b"".join(map(stats_of, told)), 0, []
    while offset < len(data):
        entry = FlowStats.parser(data, offset)
        offset += entry.length
        read.append(entry.flow)
        assert (entry.age_s, entry.packets) == (3.5, 5)
    assert read == told


def test_an_entry_of_somebody_else_is_none_of_ours() -> None:
    assert FlowStats.parser(stats_of(openflow.guarded(VM), cookie=0), 0).flow is None


@given(st.sampled_from(EVERY_KIND), st.data())
def test_a_damaged_dump_is_read_without_an_error(flow: Flow, data: st.DataObject) -> None:
    damaged = bytearray(stats_of(flow))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(2, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    entry = FlowStats.parser(bytes(damaged), 0)
    assert entry.length > 0


def test_a_bundle_is_opened_filled_and_committed() -> None:
    changes = [FlowMod("add", openflow.guarded(VM)), CLEAR]
    data, parts = openflow.bundle(changes, 3, 7), []
    while data:
        length = int.from_bytes(data[2:4], "big")
        assert (data[0], data[1], data[4:8], data[8:12]) == (4, 4, b"\0\0\0\7", b"ONF\0")
        parts.append((int.from_bytes(data[12:16], "big"), data[16:length]))
        data = data[length:]
    assert [kind for kind, _ in parts] == [2300, 2301, 2301, 2300]
    assert parts[0][1] == bytes.fromhex("00000003 0000 0003") and parts[3][1] == bytes.fromhex("00000003 0004 0003")
    assert [body[8:] for _, body in parts[1:3]] == [encode(change, 7) for change in changes]


def test_a_match_of_nothing_matches_all() -> None:
    assert Match() == (None, None, None, None)
