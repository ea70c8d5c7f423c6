"""Packing pages for slow links: when it pays, and what a receiver takes for packed pages."""

import struct
import tracemalloc

import lz4.block
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st
from pairs import MIB

from hosts.packing import TRIAL_PAGES, WARM_UP_PAGES, Choice, packer, unpack
from hosts.protocol import CHUNK_PAGES, PLAIN, Flag
from hosts.ram import PAGE
from hosts.transport import COMPRESSIONS
from topologies.errors import TestbedError

METHODS = ["zstd", "lz4"]
CHUNK = CHUNK_PAGES * PAGE


@pytest.mark.parametrize("method", COMPRESSIONS)
def test_every_method_of_the_command_line_has_a_packer(method: str) -> None:
    flag, pack = packer(method)
    assert (flag is PLAIN) == (method == "none")
    assert pack(b"page" * 1024)


@pytest.mark.parametrize("method", METHODS)
@given(st.binary(min_size=1, max_size=200), st.integers(1, 50))
@example(b"\x00", CHUNK)
def test_what_was_packed_comes_back(method: str, content: bytes, times: int) -> None:
    flag, pack = packer(method)
    content *= times
    assert unpack(flag, pack(content), len(content)) == content


@pytest.mark.parametrize("method", METHODS)
@given(st.binary(max_size=100), st.integers(1, CHUNK))
def test_garbage_is_refused(method: str, data: bytes, size: int) -> None:
    try:
        content = unpack(packer(method)[0], data, size)
    except TestbedError as error:
        refused = str(error)
    else:
        assert len(content) == size
        return
    assert refused.startswith("packed pages")


@pytest.mark.parametrize("method", METHODS)
@given(st.data())
def test_a_damaged_packing_is_refused_or_has_the_size_that_is_due(method: str, data: st.DataObject) -> None:
    flag, pack = packer(method)
    packed = bytearray(pack(b"some page" * 1000))
    for at in data.draw(st.sets(st.integers(0, len(packed) - 1), min_size=1, max_size=3)):
        packed[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        content = unpack(flag, bytes(packed[: data.draw(st.none() | st.integers(0, len(packed)))]), 9000)
    except TestbedError:
        return
    assert len(content) == 9000


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [PAGE - 1, PAGE + 1, 2 * PAGE, CHUNK])
def test_pages_of_another_number_than_the_header_says_are_refused(method: str, size: int) -> None:
    flag, pack = packer(method)
    with pytest.raises(TestbedError, match="packed pages"):
        unpack(flag, pack(bytes(PAGE)), size)


def rle_frame(claims: int, blocks: int, window_log: int | None) -> bytes:
    """A zstd frame (RFC 8878) of blocks of 128 KiB of one letter each, 4 bytes long, whatever it claims to hold."""
    frame = struct.pack("<I", 0xFD2FB528)
    if window_log is None:  # a single segment: the window is the content
        frame += b"\xa0" + struct.pack("<I", claims)
    else:
        frame += b"\x80" + bytes([(window_log - 10) << 3]) + struct.pack("<I", claims)
    for number in range(blocks):
        is_last = number == blocks - 1
        frame += struct.pack("<I", is_last | 1 << 1 | (128 << 10) << 3)[:3] + b"A"
    return frame


def test_a_frame_of_repetitions_is_understood() -> None:
    assert unpack(Flag.ZSTD, rle_frame(MIB, 8, None), MIB) == MIB * b"A"


@pytest.mark.parametrize("window_log", [None, 17, 20, 27])
@pytest.mark.parametrize("claims", [MIB, 500 * MIB])
def test_a_bomb_does_not_go_off(window_log: int | None, claims: int) -> None:
    """16 KB that hold 500 MiB, whether they say so or not."""
    bomb = rle_frame(claims, 4000, window_log)
    assert len(bomb) < 17_000
    _refused_within(2 * MIB, Flag.ZSTD, bomb, MIB)


def test_a_bomb_of_lz4_does_not_go_off() -> None:
    _refused_within(2 * MIB, Flag.LZ4, lz4.block.compress(bytes(100 * MIB), store_size=False), MIB)


def test_a_packing_that_asks_for_a_large_window_is_refused() -> None:
    """The window is set aside before the content comes: 128 MiB for a frame of some bytes that never ends."""
    with pytest.raises(TestbedError, match="too much memory"):
        unpack(Flag.ZSTD, rle_frame(MIB, 8, 27)[:-4], MIB)


def test_nothing_may_follow_a_packing() -> None:
    packed = zstandard.ZstdCompressor().compress(bytes(PAGE))
    for more in (b"x", packed):
        with pytest.raises(TestbedError, match="packed pages"):
            unpack(Flag.ZSTD, packed + more, PAGE)


def _refused_within(limit: int, flag: Flag, data: bytes, size: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TestbedError, match="packed pages"):
            unpack(flag, data, size)
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------- does it pay?


def sent_a_round(choice: Choice, pages: int, packed_per_s: float, plain_per_s: float) -> list[bool]:
    """A round of chunks, and how each went, on a link that takes so many pages a second."""
    choice.begin_round(pages)
    ways = []
    for _ in range(0, pages, CHUNK_PAGES):
        ways.append(choice.packed())
        size = CHUNK // 2 if ways[-1] else CHUNK
        choice.sent(ways[-1], CHUNK_PAGES, size, CHUNK_PAGES / (packed_per_s if ways[-1] else plain_per_s))
    return ways


WARM_UP = WARM_UP_PAGES // CHUNK_PAGES  # chunks that fill the socket buffers
TRIED = WARM_UP + 2 * TRIAL_PAGES // CHUNK_PAGES  # chunks that find out
rates = st.floats(1e3, 1e6)


@given(rates, rates)
@example(10_000, 3_000)  # 100 Mbit/s, packed to a third
@example(50_000, 280_000)  # 10 Gbit/s: the processor is the bottleneck
@example(10_400, 10_000)  # hardly faster: not worth the receiver's work
@example(10_600, 10_000)
def test_a_long_round_tries_both_ways_and_then_takes_the_faster(packed_per_s: float, plain_per_s: float) -> None:
    choice = Choice()
    ways = sent_a_round(choice, 100_000, packed_per_s, plain_per_s)
    assert set(ways[:WARM_UP]) == {False}
    assert ways[WARM_UP:TRIED].count(True) == ways[WARM_UP:TRIED].count(False) == TRIAL_PAGES // CHUNK_PAGES
    if abs(packed_per_s / plain_per_s - 1.05) > 1e-6:
        assert set(ways[TRIED:]) == {packed_per_s > plain_per_s * 1.05}
        assert choice.pays == (packed_per_s > plain_per_s * 1.05)


def test_a_short_round_uses_what_is_known() -> None:
    choice = Choice()
    sent_a_round(choice, 100_000, 30_000, 10_000)
    assert set(sent_a_round(choice, 1000, 30_000, 10_000)) == {True}


def test_a_link_that_has_changed_is_noticed_in_the_next_long_round() -> None:
    choice = Choice()
    assert sent_a_round(choice, 100_000, 30_000, 10_000)[-1] is True
    assert sent_a_round(choice, 100_000, 30_000, 100_000)[-1] is False


def test_before_anything_was_sent_packing_does_not_pay_yet() -> None:
    choice = Choice()
    assert choice.packed() is False
    assert choice.pays is False


@pytest.mark.parametrize("buffer_pages", [0, 300, WARM_UP_PAGES])
@pytest.mark.parametrize(
    ("link", "packer_per_s", "shrinks_to", "pays"),
    [
        (6_000, 200_000, 1.0, False),  # 200 Mbit/s, random RAM
        (3_000, 200_000, 0.1, True),  # 100 Mbit/s
        (30_000, 25_000, 0.1, False),  # 1 Gbit/s and a busy processor
        (30_000, 40_000, 0.1, True),
    ],
)
def test_what_the_socket_buffers_swallow_decides_nothing(
    buffer_pages: int, link: float, packer_per_s: float, shrinks_to: float, pays: bool
) -> None:
    """A send ends when its pages have found room: the first ones do so at once."""
    choice, waiting = Choice(), 0.0
    choice.begin_round(100_000)
    for _ in range(0, 100_000, CHUNK_PAGES):
        packed = choice.packed()
        took_s = CHUNK_PAGES / packer_per_s if packed else 0.0
        waiting = max(0.0, waiting - took_s * link) + CHUNK_PAGES * (shrinks_to if packed else 1)
        wait_s = max(0.0, waiting - buffer_pages) / link
        waiting -= wait_s * link
        choice.sent(packed, CHUNK_PAGES, int(CHUNK * (shrinks_to if packed else 1)), took_s + wait_s)
    assert choice.pays is pays


@pytest.mark.parametrize(("shrinks_to", "pays"), [(1.0, False), (0.97, False), (0.93, True)])
def test_what_packing_cannot_make_smaller_does_not_pay_however_fast_it_seemed(shrinks_to: float, pays: bool) -> None:
    choice = Choice()
    for _ in range(TRIED):
        packed = choice.packed()
        choice.sent(packed, CHUNK_PAGES, int(CHUNK * (shrinks_to if packed else 1)), 1.0 if packed else 1.1)
    assert choice.pays is pays
