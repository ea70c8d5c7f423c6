"""LLDP frames, byte for byte and against any bytes; trunks that come and go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.discovery import LOST_AFTER_S, Change, Discovery, frame, sender
from controller.network import Port

A1, A2, B1, B2 = (
    Port("000000000000000a", 1),
    Port("000000000000000a", 2),
    Port("000000000000000b", 1),
    Port("b" * 16, 2),
)


def up(one: Port, other: Port) -> Change:
    return Change(min(one, other), max(one, other), is_up=True)


def down(one: Port, other: Port) -> Change:
    return Change(min(one, other), max(one, other), is_up=False)


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**32 - 1))
def test_a_frame_says_who_sent_it(datapath: int, number: int) -> None:
    port = Port(f"{datapath:016x}", number)
    assert sender(frame(port)) == port


def test_a_frame_is_lldp_as_others_read_it() -> None:
    from scapy.contrib.lldp import LLDPDU, LLDPDUChassisID, LLDPDUPortID, LLDPDUTimeToLive
    from scapy.layers.l2 import Ether

    read = Ether(frame(A1))
    assert (read.dst, read.type, len(bytes(read))) == ("01:80:c2:00:00:0e", 0x88CC, 60)
    assert LLDPDU in read
    assert bytes(read[LLDPDUChassisID].id) == A1.switch.encode() and bytes(read[LLDPDUPortID].id) == b"1"
    assert read[LLDPDUTimeToLive].ttl == 2


@given(st.binary(max_size=90) | st.binary(max_size=60).map(lambda rest: frame(A1)[:14] + rest))
def test_any_bytes_are_read_without_an_error(data: bytes) -> None:
    port = sender(data)
    assert port is None or (len(port.switch) == 16 and port.number >= 0)


@given(st.integers(14, 59), st.integers(0, 255))
def test_a_damaged_frame_is_read_without_an_error(at: int, value: int) -> None:
    data = bytearray(frame(A1))
    data[at] = value
    sender(bytes(data))
    sender(bytes(data[:at]))


@pytest.mark.parametrize("data", [b"", frame(A1)[:12], frame(A1)[:30], b"\0" * 60])
def test_what_is_none_of_ours_has_no_sender(data: bytes) -> None:
    assert sender(data) is None


# ---------------------------------------------------------------- trunks


def test_a_trunk_is_up_once_each_end_has_heard_the_other() -> None:
    found = Discovery()
    assert found.hear(A1, B1, 0.0) == []
    assert found.hear(B1, A1, 0.1) == [up(A1, B1)]
    assert found.hear(A1, B1, 0.5) == found.hear(B1, A1, 0.6) == []


def test_a_trunk_is_down_when_one_end_has_been_silent_too_long() -> None:
    found = Discovery()
    found.hear(A1, B1, 0.0)
    found.hear(B1, A1, 0.0)
    found.hear(A1, B1, LOST_AFTER_S)
    assert found.expire(LOST_AFTER_S) == []
    assert found.expire(LOST_AFTER_S + 0.1) == [down(A1, B1)]
    assert found.expire(99.0) == []
    assert found.hear(B1, A1, 100.0) == [], "the other one has not been heard since"


def test_a_switch_that_is_away_is_not_taken_for_silent() -> None:
    found = Discovery()
    found.hear(A1, B1, 0.0)
    found.hear(B1, A1, 0.0)
    assert found.expire(50.0, {B1.switch}) == []
    assert found.expire(50.0 + LOST_AFTER_S) == [], "it has as long again once it is back"
    assert found.expire(50.1 + LOST_AFTER_S) == [down(A1, B1)]


def test_a_port_that_goes_down_takes_its_trunk_and_no_other() -> None:
    found = Discovery()
    for one, other in ((A1, B1), (A2, B2)):
        found.hear(one, other, 0.0)
        found.hear(other, one, 0.0)
    assert found.lose(B1) == [down(A1, B1)]
    assert found.lose(B1) == []
    assert found.hear(A2, B2, 0.1) == []


def test_a_cable_that_is_moved_is_another_trunk() -> None:
    found = Discovery()
    found.hear(A1, B1, 0.0)
    found.hear(B1, A1, 0.0)
    found.hear(A1, B2, 0.5)
    assert found.hear(B2, A1, 0.5) == [down(A1, B1), up(A1, B2)]


def test_a_cable_from_a_switch_to_itself_is_no_trunk() -> None:
    found = Discovery()
    assert found.hear(A1, A2, 0.0) == found.hear(A2, A1, 0.0) == []
