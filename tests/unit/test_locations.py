"""The table of MACs: frames in, decisions compared."""

import re

import pytest
from fakes import arp, ethernet, rarp
from hypothesis import given
from hypothesis import strategies as st

from controller.locations import Forgotten, Learned, Locations, Moved, classify

MAC = "00:50:56:00:00:01"
IP, OTHER_IP, NO_IP = bytes((10, 0, 0, 11)), bytes((10, 0, 0, 100)), bytes(4)
S1 = "0000000000000001"


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
    assert classify(frame) == (MAC, kind)


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


def test_a_life_of_a_mac() -> None:
    locations = Locations()
    assert locations.place(S1, MAC, 1, "frame", 10) == [Learned(MAC, S1, 1, "frame", 10)]
    assert locations.place(S1, MAC, 1, "frame", 11) == []
    assert locations.place(S1, MAC, 2, "rarp", 12) == [Moved(MAC, S1, 1, 2, "rarp", 12)]
    assert locations.place(S1, MAC, 2, "rarp", 13) == []  # announced five times, moved once
    assert locations.place(S1, MAC, 1, "manager", 14) == [Moved(MAC, S1, 2, 1, "manager", 14)]
    assert locations.forget_port(S1, 2) == []
    assert locations.forget_port(S1, 1) == [Forgotten(MAC, S1, 1)]
    assert locations.port_of(S1, MAC) is None
    assert locations.place(S1, MAC, 2, "garp", 15) == [Learned(MAC, S1, 2, "garp", 15)]


def test_each_switch_has_its_own_view() -> None:
    locations = Locations()
    locations.place("a", MAC, 1, "frame", 0)
    assert locations.place("b", MAC, 9, "frame", 1) == [Learned(MAC, "b", 9, "frame", 1)]
    locations.forget_switch("a")
    assert locations.port_of("a", MAC) is None
    assert locations.port_of("b", MAC) == 9


def test_a_lost_port_takes_its_macs_and_no_others() -> None:
    locations = Locations()
    for number, port in enumerate((1, 2, 1, 3)):
        locations.place(S1, f"00:50:56:00:00:0{number}", port, "frame", number)
    assert {decision.mac for decision in locations.forget_port(S1, 1)} == {"00:50:56:00:00:00", "00:50:56:00:00:02"}
    assert locations.port_of(S1, "00:50:56:00:00:01") == 2
    assert locations.port_of(S1, "00:50:56:00:00:03") == 3


def test_forgetting_what_was_never_known_is_no_error() -> None:
    locations = Locations()
    assert locations.forget_port(S1, 1) == []
    locations.forget_switch(S1)


switches = st.sampled_from(["a", "b"])
ports = st.integers(1, 3)
macs = st.sampled_from([f"00:50:56:00:00:0{n}" for n in range(3)])
kinds = st.sampled_from(["rarp", "garp", "frame"])


@given(st.lists(st.tuples(switches, macs, ports, kinds)))
def test_the_table_says_the_last_port_and_every_change_is_said_once(sightings: list[tuple]) -> None:
    locations = Locations()
    last: dict[tuple[str, str], int] = {}
    for now, (switch, mac, port, kind) in enumerate(sightings):
        before = last.get((switch, mac))
        if before is None:
            expected: list = [Learned(mac, switch, port, kind, now)]
        elif before != port:
            expected = [Moved(mac, switch, before, port, kind, now)]
        else:
            expected = []
        assert locations.place(switch, mac, port, kind, now) == expected
        last[switch, mac] = port
    assert {key: locations.port_of(*key) for key in last} == last


@given(st.lists(st.tuples(macs, ports)), ports)
def test_after_a_port_is_lost_no_mac_is_there(sightings: list[tuple[str, int]], lost: int) -> None:
    locations = Locations()
    for mac, port in sightings:
        locations.place(S1, mac, port, "frame", 0)
    last = dict(sightings)
    assert {d.mac for d in locations.forget_port(S1, lost)} == {mac for mac, port in last.items() if port == lost}
    for mac, port in last.items():
        assert locations.port_of(S1, mac) == (None if port == lost else port)
