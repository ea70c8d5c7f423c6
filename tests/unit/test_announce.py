"""Announcement frames, byte for byte as they go on the wire, and their schedule."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address

import pytest
from fakes import arp, rarp
from hypothesis import given
from hypothesis import strategies as st
from programs import eventually

from hosts.announce import MODES, Announcer, FrameBuilder, frames
from topologies.errors import TestbedError

MAC, IP = "00:50:56:00:00:01", "10.0.0.11"
# destination, source, ethertype | hardware and protocol, their lengths, operation | sender | target
RARP = "ffffffffffff 005056000001 8035 0001 0800 06 04 0003 005056000001 00000000 005056000001 00000000"
GARP = "ffffffffffff 005056000001 0806 0001 0800 06 04 0001 005056000001 0a00000b 000000000000 0a00000b"
PADDING = bytes(60 - 42)


@pytest.mark.parametrize(
    ("mode", "expected"), [("rarp", [RARP]), ("garp", [GARP]), ("both", [RARP, GARP]), ("none", [])]
)
def test_each_mode_has_its_frames(mode: str, expected: list[str]) -> None:
    assert frames(mode, MAC, IP) == [bytes.fromhex(frame) + PADDING for frame in expected]


def test_there_are_no_modes_beside_these() -> None:
    assert MODES == ("rarp", "garp", "both", "none")
    with pytest.raises(KeyError):
        frames("gratuitous", MAC, IP)


@given(st.binary(min_size=6, max_size=6), st.ip_addresses(v=4))
def test_the_frames_of_any_vm_are_what_the_tests_of_the_controller_feed_it(mac: bytes, ip: IPv4Address) -> None:
    address = mac.hex(":")
    built = frames("both", address, str(ip))
    assert built == [rarp(address), arp(address, ip.packed, ip.packed)]
    assert [len(frame) for frame in built] == [60, 60]


@pytest.fixture(scope="module")
def builder() -> Iterator[FrameBuilder]:
    builder = FrameBuilder()
    yield builder
    builder.close()


def test_the_process_with_scapy_builds_the_same_frames_for_one_vm_after_the_other(builder: FrameBuilder) -> None:
    for mode in MODES:
        for mac in (MAC, "00:50:56:00:00:02"):
            assert builder.frames(mode, mac, IP) == frames(mode, mac, IP)


def test_a_process_with_scapy_that_has_died_is_started_again(builder: FrameBuilder) -> None:
    with pytest.raises(TestbedError, match="scapy could not build the announcement: its process ended"):
        builder.frames("gratuitous", MAC, IP)
    assert builder.frames("rarp", MAC, IP) == frames("rarp", MAC, IP)


# ---------------------------------------------------------------- the schedule


@contextmanager
def announcer(schedule_ms: tuple[int, ...]) -> Iterator[Announcer]:
    """One that is ready to announce to this machine's own loopback device."""
    try:
        announcer = Announcer("both", frames("both", MAC, IP), "lo", schedule_ms)
    except PermissionError:
        pytest.skip("a packet socket needs root")
    try:
        yield announcer
    finally:
        announcer.close()


class Heard:
    """What an announcer tells of its rounds, in ms from now."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.rounds: list[tuple[int, str, int]] = []
        self.at_ms: list[float] = []

    def __call__(self, number: int, mode: str, count: int) -> None:
        self.rounds.append((number, mode, count))
        self.at_ms.append((time.monotonic() - self.began) * 1000)


@pytest.mark.parametrize(
    "schedule_ms",
    [
        (0, 50, 120),
        (0,),
        (),
        (100, 150),
    ],
)
def test_each_round_of_frames_leaves_when_it_is_due(schedule_ms: tuple[int, ...]) -> None:
    with announcer(schedule_ms) as ready:
        heard = Heard()
        ready.start(heard)
        eventually(lambda: len(heard.rounds) >= len(schedule_ms), "the last round")
    assert heard.rounds == [(number, "both", 2) for number in range(len(schedule_ms))]
    for at_ms, due_ms in zip(heard.at_ms, schedule_ms, strict=True):
        assert at_ms >= due_ms


def test_nothing_is_announced_once_it_is_silenced() -> None:
    with announcer((0, 60, 120)) as ready:
        heard = Heard()
        ready.start(heard)
        ready.silence()
        time.sleep(0.15)
        ready.start(heard)
    assert len(heard.rounds) == 1
