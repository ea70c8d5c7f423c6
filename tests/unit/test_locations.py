"""The table of MACs: frames in, decisions compared."""

import re

import pytest
from fakes import arp, ethernet, rarp
from hypothesis import given
from hypothesis import strategies as st

from controller.guard import Guard
from controller.locations import Decision, Forgotten, Learned, Locations, Moved, Source, classify
from controller.network import Port
from controller.openflow import PROBER

MAC = "00:50:56:00:00:01"
IP, OTHER_IP, NO_IP = bytes((10, 0, 0, 11)), bytes((10, 0, 0, 100)), bytes(4)
OTHER = "00:50:56:00:00:02"
S1 = "0000000000000001"
P1, P2, P3 = (Port(S1, number) for number in (1, 2, 3))


def tagged(frame: bytes) -> bytes:
    """The same frame on VLAN 7."""
    return frame[:12] + b"\x81\x00\x00\x07" + frame[12:]


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        (rarp(MAC), "rarp"),
        (rarp(MAC)[:14], "rarp"),
        (tagged(rarp(MAC)), "rarp"),
        (arp(MAC, IP, IP), "garp"),
        (arp(MAC, IP, IP, operation=2), "garp"),
        (tagged(arp(MAC, IP, IP))[:46], "garp"),
        (arp(MAC, IP, OTHER_IP), "frame"),
        (arp(MAC, NO_IP, IP), "frame"),  # an RFC 5227 probe: the address is not in use yet
        (arp(MAC, NO_IP, NO_IP), "frame"),
        (arp(MAC, IP, IP)[:41], "frame"),  # cut within its target address
        (arp(MAC, IP, IP)[:20], "frame"),  # cut before its addresses
        (ethernet(MAC, ethertype=0x0806, payload=b"\x00\x06" + bytes(30)), "frame"),  # ARP, but not for Ethernet
        (ethernet(MAC), "frame"),
        (ethernet(MAC)[:14], "frame"),
    ],
)
def test_a_frame_is_classified_by_its_source_and_what_it_announces(frame: bytes, kind: str) -> None:
    source = classify(frame)
    assert source is not None
    assert (source.mac, source.kind) == (MAC, kind)


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"", "empty"),
        (rarp(MAC)[:13], "truncated within the ethertype"),
        (tagged(rarp(MAC))[:17], "truncated within the tag"),
        (ethernet("01:00:5e:00:00:01"), "a group source"),
        (ethernet("ff:ff:ff:ff:ff:ff"), "a broadcast source"),
        (ethernet("00:00:00:00:00:00"), "no source"),
        (ethernet(MAC, "01:80:c2:00:00:0e", 0x88CC), "LLDP"),
        (ethernet(PROBER), "whoever says that it is the controller's prober"),
    ],
)
def test_a_frame_that_names_no_machine_has_no_source(frame: bytes, why: str) -> None:
    assert classify(frame) is None, why


any_frame = st.binary(max_size=80) | st.builds(
    lambda head, ethertype, body: head + ethertype + body,
    st.binary(min_size=12, max_size=12),
    st.sampled_from([b"\x08\x06", b"\x80\x35", b"\x81\x00", b"\x88\xcc"]),
    st.binary(max_size=40),
)


@given(any_frame)
def test_any_bytes_are_classified_without_an_error(frame: bytes) -> None:
    source = classify(frame)
    if source is not None:
        assert source.kind in ("rarp", "garp", "frame")
        assert re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", source.mac)
        assert bytes.fromhex(source.mac.replace(":", "")) == frame[6:12]


def test_an_arp_packet_says_which_address_its_sender_has() -> None:
    assert classify(arp(MAC, IP, OTHER_IP)) == Source(MAC, "frame", "10.0.0.11")
    assert classify(arp(MAC, NO_IP, IP)) == Source(MAC, "frame", "")


# ---------------------------------------------------------------- without a guard


def test_a_life_of_a_mac() -> None:
    locations = Locations()
    assert locations.place(MAC, P1, "frame", 10) == Learned(MAC, P1, "frame", 10)
    assert locations.place(MAC, P1, "frame", 11) is None
    assert locations.place(MAC, P2, "rarp", 12) == Moved(MAC, P1, P2, "rarp", 12)
    assert locations.place(MAC, P2, "rarp", 13) is None  # announced five times, moved once
    assert locations.place(MAC, P1, "manager", 14) == Moved(MAC, P2, P1, "manager", 14)
    assert locations.forget_port(P2) == []
    assert locations.forget_port(P1) == [Forgotten(MAC, P1)]
    assert locations.at(MAC) is None
    assert locations.place(MAC, P2, "garp", 15) == Learned(MAC, P2, "garp", 15)


def test_a_move_to_another_switch_is_one_too() -> None:
    locations = Locations()
    locations.place(MAC, P1, "frame", 0)
    assert locations.place(MAC, Port("b", 9), "rarp", 1) == Moved(MAC, P1, Port("b", 9), "rarp", 1)


def test_what_comes_from_a_trunk_says_nothing() -> None:
    guard = Guard()
    guard.become_trunk(P2, True)
    locations = Locations(guard)
    locations.place(MAC, P1, "frame", 0)
    assert locations.place(MAC, P2, "rarp", 1) is None
    assert not locations.adopt(OTHER, P2)


def test_a_lost_port_takes_its_macs_and_no_others() -> None:
    locations = Locations()
    for number, port in enumerate((P1, P2, P1, P3)):
        locations.place(f"00:50:56:00:00:0{number}", port, "frame", number)
    assert {decision.mac for decision in locations.forget_port(P1)} == {"00:50:56:00:00:00", "00:50:56:00:00:02"}
    assert locations.all() == {"00:50:56:00:00:01": P2, "00:50:56:00:00:03": P3}


def test_what_a_switch_knew_is_taken_over_unless_it_is_known_better() -> None:
    locations = Locations()
    assert locations.adopt(MAC, P1)
    assert not locations.adopt(MAC, P2)
    assert locations.place(MAC, P1, "frame", 0) is None
    assert locations.at(MAC) == P1


macs = st.sampled_from([f"00:50:56:00:00:0{n}" for n in range(3)])
ports = st.sampled_from([Port(switch, number) for switch in ("a", "b") for number in (1, 2, 3)])
kinds = st.sampled_from(["rarp", "garp", "frame"])


@given(st.lists(st.tuples(macs, ports, kinds)))
def test_the_table_says_the_last_port_and_every_change_is_said_once(sightings: list[tuple]) -> None:
    locations, last = Locations(), dict[str, Port]()
    for now, (mac, port, kind) in enumerate(sightings):
        before = last.get(mac)
        expected: Decision | None = Learned(mac, port, kind, now)
        if before is not None:
            expected = None if before == port else Moved(mac, before, port, kind, now)
        assert locations.place(mac, port, kind, now) == expected
        last[mac] = port
    assert locations.all() == last


@given(st.lists(st.tuples(macs, ports)), ports)
def test_after_a_port_is_lost_no_mac_is_there(sightings: list[tuple[str, Port]], lost: Port) -> None:
    locations, last = Locations(), dict(sightings)
    for mac, port in sightings:
        locations.place(mac, port, "frame", 0)
    assert {d.mac for d in locations.forget_port(lost)} == {mac for mac, port in last.items() if port == lost}
    assert locations.all() == {mac: port for mac, port in last.items() if port != lost}
