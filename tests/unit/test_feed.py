"""The feed of a migration's connections: every page arrives as it is, zero pages by their number, on any lanes."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pairs import SILENCE_S, lanes, memory, migration, receive_round, scribble

from hosts.feed import Feed
from hosts.protocol import CHUNK_PAGES, PACKED, PLAIN, Flag, Header, Kind
from hosts.ram import PAGE, HashBitmap, PageHashes, Ram, chunks, pages_of, runs_of
from hosts.stream import Stream, StreamLost
from hosts.transport import COMPRESSIONS

SMALL_RAM = 700  # pages: two chunks and a part


class Transfer(NamedTuple):
    sent: int
    zero: int
    frames: list[Header]


@contextmanager
def feeding(ram: Ram, streams: list[Stream], compress: str = "none", *, copies: bool = False) -> Iterator[Feed]:
    feed = Feed(ram, PageHashes(ram), streams, compress, copies=copies)
    try:
        yield feed
    finally:
        feed.close()


def run_round(
    feed: Feed, there: list[Stream], copy: Ram, hashes: PageHashes, runs: np.ndarray, number: int
) -> Transfer:
    """One round of these pages into `copy`, on one connection or on several lanes."""
    before, sent, zero = feed.bytes_sent, feed.sent, feed.zero
    with ThreadPoolExecutor(len(there)) as pool:
        receiving = [pool.submit(receive_round, stream, copy, hashes) for stream in there]
        for chunk in chunks(runs, CHUNK_PAGES):
            feed.send(chunk, number)
        feed.flush(number)
        frames = [header for done in receiving for header in done.result()]
    assert feed.bytes_sent - before == sum(28 + header.length for header in frames) + 28 * len(there)
    return Transfer(feed.sent - sent, feed.zero - zero, frames)


some_pages = st.sets(st.integers(0, SMALL_RAM - 1), max_size=40) | st.builds(
    lambda first, length, step: set(range(first, min(first + length, SMALL_RAM), step)),
    st.integers(0, SMALL_RAM - 1),
    st.integers(1, SMALL_RAM),
    st.integers(1, 3),
)
ways = st.sampled_from([(1, "none"), (1, "zstd"), (1, "lz4"), (3, "none"), (3, "zstd")])


@settings(max_examples=60)
@given(some_pages, some_pages, some_pages, ways, st.booleans())
@example(set(range(SMALL_RAM)), set(range(SMALL_RAM)), set(), (1, "none"), False)  # one run of several chunks
@example(set(range(0, SMALL_RAM, 2)), set(range(SMALL_RAM)), set(), (1, "none"), False)  # every other page
@example(set(), set(range(SMALL_RAM)), set(range(SMALL_RAM)), (3, "none"), False)  # nothing but zero
def test_pages_arrive_byte_for_byte_and_no_others_change(
    written: set[int], chosen: set[int], old: set[int], way: tuple[int, str], copies: bool
) -> None:
    number, compress = way
    runs = runs_of(np.array(sorted(chosen), np.int64))
    with memory(SMALL_RAM) as ram, memory(SMALL_RAM) as copy, lanes(number) as (here, there):
        scribble(ram, written)
        copy.words[sorted(old), 7] = 0xDEAD
        expected = copy.bytes.copy()
        for page in chosen:
            expected[page * PAGE : (page + 1) * PAGE] = ram.bytes[page * PAGE : (page + 1) * PAGE]
        hashes = PageHashes(copy)

        with feeding(ram, here, compress, copies=copies) as feed:
            sent, zero, frames = run_round(feed, there, copy, hashes, runs, 1)

            assert feed.hashes.digest() == hashes.digest(), "both ends have noted the same"
        assert np.array_equal(copy.bytes, expected)
        assert (sent, zero) == (len(chosen & written), len(chosen - written))
        assert sum(frame.pages for frame in frames if frame.kind is Kind.PAGES) == sent
        assert sum(frame.pages for frame in frames if frame.kind is Kind.ZERO) == zero
        assert all(frame.pages <= CHUNK_PAGES and frame.round == 1 for frame in frames)
        assert all(bool(frame.flags & PACKED) <= (compress != "none") for frame in frames)


def test_zero_pages_cross_by_their_number_alone() -> None:
    with memory(2048) as ram, memory(2048) as copy, lanes(1) as (here, there), feeding(ram, here) as feed:
        ram.words[7, 511] = 1
        run_round(feed, there, copy, PageHashes(copy), np.array([[0, 2048]], np.uint32), 1)
        assert feed.bytes_sent < PAGE + 600
        assert (feed.sent, feed.zero) == (1, 2047)


def test_pages_arrive_through_the_narrowest_of_sockets() -> None:
    with memory(SMALL_RAM) as ram, memory(SMALL_RAM) as copy, lanes(1) as (here, there), feeding(ram, here) as feed:
        here[0]._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's minimum, 4.5 KiB
        scribble(ram, set(range(0, SMALL_RAM, 2)))
        assert run_round(feed, there, copy, PageHashes(copy), ram.populated(), 1).sent == SMALL_RAM // 2
        assert np.array_equal(copy.bytes, ram.bytes)


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_both_ends_agree_on_ram_after_rounds_in_which_pages_become_zero_and_others_are_written(
    number: int, compress: str
) -> None:
    size = 4096
    with (
        memory(size) as ram,
        memory(size) as copy,
        lanes(number) as (here, there),
        feeding(ram, here, compress) as feed,
    ):
        hashes = PageHashes(copy)
        random = np.random.default_rng(1)
        for round_number in (1, 2, 3):
            ram.words[round_number * 100 : round_number * 1000, :256] = random.integers(0, 2**63, (1, 256), np.uint64)
            ram.words[(round_number - 1) * 100 : round_number * 100] = 0
            run_round(feed, there, copy, hashes, ram.populated(), round_number)
            assert np.array_equal(copy.bytes, ram.bytes)
            assert feed.hashes.digest() == hashes.digest()
        real = PageHashes(ram)
        real.note(ram.populated(), ram.views(ram.populated()))
        assert real.digest() == hashes.digest()


def test_the_lanes_share_the_work_and_each_counts() -> None:
    size, number = 8192, 8
    with memory(size) as ram, memory(size) as copy, lanes(number) as (here, there), feeding(ram, here) as feed:
        ram.words[::2, 0] = 1
        for round_number in range(1, 11):
            run_round(feed, there, copy, PageHashes(copy), np.array([[0, size]], np.uint32), round_number)
            assert (feed.sent, feed.zero) == (round_number * size // 2, round_number * size // 2)
        assert min(stream.bytes_sent for stream in here) > 0.9 * feed.bytes_sent / number


def test_several_lanes_pack_at_the_same_time() -> None:
    size, number = 16384, 4
    with memory(size) as ram, memory(size) as copy, lanes(number) as (here, there):
        pattern = np.frombuffer(Random(1).randbytes(64), np.uint64)
        ram.words[:] = np.tile(pattern, 64)
        ram.words[:, 0] = np.arange(1, size + 1)
        with feeding(ram, here, "zstd") as feed:
            frames = run_round(feed, there, copy, PageHashes(copy), np.array([[0, size]], np.uint32), 1).frames
        assert any(frame.flags & Flag.ZSTD for frame in frames)
        assert np.array_equal(copy.bytes, ram.bytes)


def test_what_packing_cannot_make_smaller_goes_as_it_is() -> None:
    with memory(256) as ram, memory(256) as copy, lanes(1) as (here, there), feeding(ram, here, "lz4") as feed:
        ram.bytes[:] = np.frombuffer(Random(1).randbytes(256 * PAGE), np.uint8)
        frames = run_round(feed, there, copy, PageHashes(copy), np.array([[0, 256]], np.uint32), 1).frames
        assert [frame.flags for frame in frames] == [PLAIN]
        assert np.array_equal(copy.bytes, ram.bytes)


@pytest.mark.parametrize("number", [1, 3])
def test_an_error_in_a_lane_reaches_whoever_feeds(number: int) -> None:
    with memory(SMALL_RAM) as ram, lanes(number, SILENCE_S) as (here, there):  # nobody reads from the other lanes
        ram.words[:, 0] = 1
        with feeding(ram, here) as feed:
            there[-1].close()
            with pytest.raises(StreamLost, match="the vMotion connection broke"):
                _feed_for_ever(feed)
            with pytest.raises(StreamLost):  # and whatever is asked for later fails too
                _feed_for_ever(feed)


def _feed_for_ever(feed: Feed) -> None:
    while True:
        for chunk in chunks(np.array([[0, SMALL_RAM]], np.uint32), CHUNK_PAGES):
            feed.send(chunk, 1)


def test_an_error_in_a_lane_reaches_whoever_waits_for_the_end_of_a_round() -> None:
    with memory(SMALL_RAM) as ram, lanes(3, SILENCE_S) as (here, there), feeding(ram, here) as feed:
        there[1].close()
        with pytest.raises(StreamLost):
            feed.flush(1)


class HashesWithAGuest(PageHashes):
    """The guest writes just before or just after its pages are hashed."""

    def __init__(self, ram: Ram, before: Callable[[], None], after: Callable[[], None]) -> None:
        super().__init__(ram)
        self._before, self._after = before, after

    def note(self, runs: np.ndarray, contents: list[memoryview]) -> np.ndarray:
        self._before()
        noted = super().note(runs, contents)
        self._after()
        return noted


@pytest.mark.parametrize("moment", ["before they are hashed", "before they are sent"])
@pytest.mark.parametrize("and_back", [True, False])
def test_pages_that_are_written_while_they_are_compared_and_sent_arrive_as_they_are_in_the_end(
    moment: str, and_back: bool
) -> None:
    with memory(64) as ram, memory(64) as copy, migration() as (source, destination):
        ram.words[:, 0] = 1

        def guest(at: str) -> Callable[[], None]:
            def write() -> None:
                if at == moment:
                    ram.words[:, 1] ^= 1

            return write

        here = HashesWithAGuest(ram, guest("before they are hashed"), guest("before they are sent"))
        there, bitmap = PageHashes(copy), HashBitmap(ram)
        bitmap.begin(here)
        feed = Feed(ram, here, [source], copies=bitmap.needs_copies)
        run_round(feed, [destination], copy, there, bitmap.take(), 1)
        if and_back:
            ram.words[:, 1] ^= 1
        for page in pages_of(bitmap.take()):
            copy.words[page] = ram.words[page]
        assert np.array_equal(copy.bytes, ram.bytes)
