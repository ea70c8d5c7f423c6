"""Decisions -> flow-mods, judged by where a switch that obeys them sends frames."""

import pytest
from fakes import FakeSwitch, Forwarded, arp, ethernet, rarp
from hypothesis import given
from hypothesis import strategies as st

from controller.locations import Decision, Forgotten, Learned, Locations, Moved, classify
from controller.openflow import flow_mods, pipeline

S1 = "0000000000000001"
VM, CLIENT = "00:50:56:00:00:01", "00:50:56:00:00:64"
ESX1, ESX2, C1 = 1, 2, 3
OLD, NEW = ESX1, ESX2
TO_VM = ethernet(CLIENT, VM)
LEARNED = Learned(VM, S1, OLD, "frame", 0)
MOVED = Moved(VM, S1, OLD, NEW, "rarp", 1)


@pytest.fixture
def switch() -> FakeSwitch:
    fresh = FakeSwitch(frozenset({ESX1, ESX2, C1}))
    fresh.apply(pipeline())
    return fresh


def obey(switch: FakeSwitch, *decisions: Decision) -> None:
    for decision in decisions:
        switch.apply(flow_mods(decision))


def went(*ports: int, reported: bool) -> Forwarded:
    return Forwarded(frozenset(ports), reported)


def test_a_switch_without_the_pipeline_drops_everything() -> None:
    assert FakeSwitch(frozenset({ESX1, ESX2})).forward(ESX1, TO_VM) == went(reported=False)


def test_an_unknown_source_is_reported_and_its_frame_flooded(switch: FakeSwitch) -> None:
    assert switch.forward(C1, TO_VM) == went(ESX1, ESX2, reported=True)


def test_a_known_source_is_no_news_and_a_known_destination_gets_its_frames_alone(switch: FakeSwitch) -> None:
    obey(switch, LEARNED, Learned(CLIENT, S1, C1, "frame", 0))
    assert switch.forward(C1, TO_VM) == went(OLD, reported=False)
    assert switch.forward(OLD, ethernet(VM, CLIENT)) == went(C1, reported=False)


def test_a_frame_is_never_sent_back_where_it_came_from(switch: FakeSwitch) -> None:
    obey(switch, LEARNED)
    assert switch.forward(OLD, TO_VM).ports == set()


def test_an_rarp_is_reported_whatever_is_known_and_goes_on_to_everybody(switch: FakeSwitch) -> None:
    obey(switch, LEARNED)
    assert switch.forward(OLD, rarp(VM)) == went(NEW, C1, reported=True)
    assert switch.forward(NEW, rarp(VM)) == went(OLD, C1, reported=True)


def test_a_gratuitous_arp_at_a_new_port_is_reported(switch: FakeSwitch) -> None:
    obey(switch, LEARNED)
    assert switch.forward(NEW, arp(VM, b"\x0a\0\0\x0b", b"\x0a\0\0\x0b")).to_controller


def test_after_a_move_frames_go_to_the_new_port_and_none_to_the_old(switch: FakeSwitch) -> None:
    obey(switch, LEARNED, MOVED)
    assert switch.forward(C1, TO_VM).ports == {NEW}


def test_after_a_move_the_new_place_is_no_news_and_the_old_one_is(switch: FakeSwitch) -> None:
    obey(switch, LEARNED, MOVED)
    assert not switch.forward(NEW, ethernet(VM, CLIENT)).to_controller
    assert switch.forward(OLD, ethernet(VM, CLIENT)).to_controller


def test_at_no_moment_of_a_move_is_a_frame_flooded_or_lost(switch: FakeSwitch) -> None:
    obey(switch, LEARNED)
    reached = [switch.forward(C1, TO_VM).ports]
    for change in flow_mods(MOVED):
        switch.apply([change])
        reached.append(switch.forward(C1, TO_VM).ports)
    assert reached == [{OLD}, {NEW}, {NEW}, {NEW}]


def test_a_forgotten_mac_leaves_no_trace(switch: FakeSwitch) -> None:
    empty = {number: dict(table) for number, table in switch.tables.items()}
    obey(switch, LEARNED, MOVED, Forgotten(VM, S1, NEW))
    assert switch.tables == empty


def test_the_pipeline_clears_what_a_switch_held_before(switch: FakeSwitch) -> None:
    fresh = {number: dict(table) for number, table in switch.tables.items()}
    obey(switch, LEARNED)
    switch.apply(pipeline())
    assert switch.tables == fresh


MACS = [f"00:50:56:00:00:0{n}" for n in range(3)]
steps = st.tuples(
    st.sampled_from(MACS), st.sampled_from([ESX1, ESX2, C1]), st.sampled_from(["frame", "rarp", "port down"])
)


@given(st.lists(steps, max_size=30))
def test_the_switch_always_sends_to_where_a_mac_was_last_seen(story: list[tuple[str, int, str]]) -> None:
    """The loop of the controller, closed without a network: it sees only what the switch shows it."""
    switch, locations = FakeSwitch(frozenset({ESX1, ESX2, C1})), Locations()
    switch.apply(pipeline())
    truth: dict[str, int] = {}
    for now, (mac, port, step) in enumerate(story):
        decisions: list[Decision] = []
        if step == "port down":
            decisions = locations.forget_port(S1, port)
            truth = {known: where for known, where in truth.items() if where != port}
        else:
            frame = rarp(mac) if step == "rarp" else ethernet(mac)
            if switch.forward(port, frame).to_controller:
                source = classify(frame)
                assert source is not None
                decisions = locations.place(S1, source.mac, port, source.kind, now)
            truth[mac] = port
        obey(switch, *decisions)
        for known in MACS:
            for in_port in switch.port_numbers:
                elsewhere = frozenset({truth[known]} if known in truth else switch.port_numbers) - {in_port}
                assert switch.forward(in_port, ethernet("00:50:56:00:00:99", known)).ports == elsewhere
