"""Post-copy in one process, with the kernel's own faults: each page comes right and once, or nobody sees it."""

import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pairs import SILENCE_S, memory, page_set, scribble, streams

from hosts import pace, postcopy
from hosts.packing import packer
from hosts.postcopy import Filler, Server
from hosts.protocol import HASH_OF, AllSent, Kind, ProtocolError, RemoteProtocolError, encode_hashes
from hosts.ram import PAGE, PageHashes, Ram, mask_of, runs_of
from hosts.stream import PEER_TIMEOUT_S, Stream, StreamLost
from hosts.userfaults import UserFaults
from topologies.errors import TestbedError

PAGES = 200  # more than the source pushes at once
AT = PAGE - 8  # of a page, the byte that a guest writes

_libc = ctypes.CDLL(None)  # unlike a look by Python, a call into it lets other threads run meanwhile
_libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def _why_not() -> str:
    with memory(1) as ram:
        try:
            UserFaults.open(ram.address, ram.size).close()
        except TestbedError as error:
            return f"post-copy needs root or vm.unprivileged_userfaultfd=1: {error}"
    return ""


WHY_NOT = _why_not()
needs_userfaultfd = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


class Vcpus:
    """A guest's own mapping of RAM, and threads that run into what is missing in it."""

    def __init__(self, ram: Ram) -> None:
        self._own = Ram(os.dup(ram.fd))
        self.userfaults = UserFaults.open(self._own.address, self._own.size)
        self.userfaults.watch_missing()
        self._threads = ThreadPoolExecutor(16)

    def read(self, page: int) -> "Future[bytes]":
        return self._threads.submit(self._read, page)

    def write(self, page: int) -> "Future[None]":
        """The byte 0x77."""
        return self._threads.submit(self._write, page)

    def _read(self, page: int) -> bytes:
        content = ctypes.create_string_buffer(PAGE)
        _libc.memcpy(content, self._own.address + page * PAGE, PAGE)
        return content.raw

    def _write(self, page: int) -> None:
        _libc.memset(self._own.address + page * PAGE + AT, 0x77, 1)

    def end(self) -> None:
        self.userfaults.close()  # which lets go whoever waits still
        self._threads.shutdown()
        self._own.close()


class Pair(NamedTuple):
    """RAM at both ends, and the two connections of a post-copy: here the source's ends, there the destination's."""

    ram: Ram
    copy: Ram
    push: tuple[Stream, Stream]
    faults: tuple[Stream, Stream]
    doomed: Event


@contextmanager
def pair(timeout_s: float = PEER_TIMEOUT_S) -> Iterator[Pair]:
    with (
        memory(PAGES) as ram,
        memory(PAGES) as copy,
        streams(("source", "serving"), ("destination", "filling"), timeout_s) as push,
        streams(("sender", "streaming"), ("receiver", "streaming"), timeout_s) as faults,
    ):
        yield Pair(ram, copy, push, faults, Event())


@contextmanager
def filling(ends: Pair, missing: set[int], hashes: PageHashes | None = None) -> Iterator[tuple[Filler, Vcpus]]:
    """The destination's side; a page that goes beyond the end of the test waits no longer."""
    with ExitStack() as stack:
        vcpus = Vcpus(ends.copy)
        stack.callback(vcpus.end)
        filler = _filler(ends, missing, vcpus.userfaults, hashes or PageHashes(ends.copy))
        stack.callback(filler.close)
        yield filler, vcpus


def _filler(ends: Pair, missing: set[int], userfaults: UserFaults, hashes: PageHashes) -> Filler:
    return Filler(ends.copy, mask(missing), userfaults, hashes, ends.push[1], ends.faults[1], ends.doomed.set)


@contextmanager
def serving(ends: Pair, missing: set[int], hashes: PageHashes | None = None) -> Iterator[Server]:
    server = Server(ends.ram, mask(missing), hashes or PageHashes(ends.ram), ends.push[0], ends.faults[0])
    try:
        yield server
    finally:
        server.close()


def mask(pages: set[int]) -> np.ndarray:
    return mask_of(runs_of(np.array(sorted(pages), np.int64)), PAGES)


def one(page: int) -> np.ndarray:
    return np.array([[page, page + 1]], np.uint32)


def push_all(server: Server, stream: Stream, hashes: PageHashes) -> None:
    """What a source does after the resume."""
    server.push(lambda left: None)
    stream.send(AllSent(hashes.digest()))


# ---------------------------------------------------------------- both sides

some_pages = st.sets(st.integers(0, PAGES - 1), max_size=30)


@needs_userfaultfd
@settings(max_examples=40)
@given(some_pages, some_pages | st.just(set(range(PAGES))), some_pages, some_pages, st.sampled_from(["first", "later"]))
@example(set(range(PAGES)), set(range(PAGES)), set(range(0, PAGES, 3)), set(range(1, PAGES, 3)), "first")
@example(set(range(PAGES)), set(range(PAGES)), set(), set(), "first")  # nobody misses anything
@example(set(), set(range(0, PAGES, 2)), set(range(20)), {1, 4}, "later")  # nothing but zero
def test_whatever_the_guest_touches_meanwhile_it_finds_what_the_source_had_and_each_page_crosses_once(
    content: set[int], missing: set[int], read: set[int], written: set[int], push: str
) -> None:
    with pair() as ends:
        here, there = PageHashes(ends.ram), PageHashes(ends.copy)
        scribble(ends.ram, content)
        came = runs_of(np.array(sorted(content - missing), np.int64))  # in a round before
        scribble(ends.copy, content - missing)
        here.note(came, ends.ram.views(came))
        there.note(came, ends.ram.views(came))
        expected = ends.ram.words.copy()
        with filling(ends, missing, there) as (filler, vcpus), serving(ends, missing, here) as server:
            with ThreadPoolExecutor(1) as pool:
                pushed = [pool.submit(push_all, server, ends.push[0], here)] if push == "first" else []
                reads = {page: vcpus.read(page) for page in read}
                touches: list[Future[Any]] = [*reads.values(), *(vcpus.write(page) for page in written)]
                if push == "later":
                    wait(touches)
                    pushed = [pool.submit(push_all, server, ends.push[0], here)]
                assert filler.receive() == here.digest()
                pushed[0].result()
            wait(touches)
            assert there.digest() == here.digest()
            assert filler.asked >= server.asked
            assert not ends.doomed.is_set()
        for page, done in reads.items():
            assert done.result()[:AT] == expected[page].tobytes()[:AT]
        expected.view(np.uint8)[np.array(sorted(written), np.int64), AT] = 0x77
        assert np.array_equal(ends.copy.words, expected)


@needs_userfaultfd
def test_a_page_that_a_thread_waits_for_comes_before_anything_is_pushed() -> None:
    with pair() as ends, filling(ends, {5, 6, 7}) as (_, vcpus), serving(ends, {5, 6, 7}) as server:
        scribble(ends.ram, {5})
        assert vcpus.read(5).result() == ends.ram.page(5)
        assert vcpus.read(6).result() == bytes(PAGE)
        assert server.asked == 2
        assert page_set(ends.copy.populated()) == {5, 6}


@needs_userfaultfd
def test_many_threads_may_wait_for_one_page() -> None:
    with pair() as ends, filling(ends, {9}) as (filler, vcpus):
        scribble(ends.ram, {9})
        waiting = [vcpus.read(9) for _ in range(8)]
        with serving(ends, {9}) as server:
            assert {done.result() for done in waiting} == {bytes(ends.ram.page(9))}
            assert server.asked == 1
        filler.check()


@needs_userfaultfd
def test_many_threads_may_run_into_one_page_that_never_existed() -> None:
    """The kernel tells of each of them; the page can be made once."""
    with pair() as ends, ExitStack() as stack:
        vcpus = Vcpus(ends.copy)
        stack.callback(vcpus.end)
        waiting = [vcpus.read(9) for _ in range(8)]
        told = _told(vcpus.userfaults, 2)
        filler = _filler(ends, {1}, vcpus.userfaults, PageHashes(ends.copy))
        stack.callback(filler.close)
        for page in told:
            filler._ask(page)
        assert {done.result() for done in waiting} == {bytes(PAGE)}
        filler.check()
        assert not ends.doomed.is_set()


def _told(userfaults: UserFaults, number: int) -> list[int]:
    pages: list[int] = []
    while len(pages) < number:
        pages += userfaults.faults()
    return pages


# ---------------------------------------------------------------- the destination, before a broken or hostile source


def send_wrong_hash(ends: Pair) -> None:
    ends.faults[0].send_page(3, HASH_OF.pack(1), ends.ram.page(3))


def push_wrong_hash(ends: Pair) -> None:
    runs = np.array([[2, 5]], np.uint32)
    hashes = PageHashes(ends.ram).note(runs, ends.ram.views(runs))
    content = bytearray(ends.ram.bytes[2 * PAGE : 5 * PAGE].tobytes())
    content[PAGE + 100] ^= 1  # of page 3
    ends.push[0].send_pages(runs, [memoryview(content)], hashes=encode_hashes(hashes))


@needs_userfaultfd
@pytest.mark.parametrize("source", [send_wrong_hash, push_wrong_hash])
def test_a_byte_that_was_changed_on_its_way_is_noticed_before_the_page_can_be_seen(
    source: Callable[[Pair], None],
) -> None:
    with pair() as ends, filling(ends, {2, 3, 4}) as (filler, vcpus):
        scribble(ends.ram, {2, 3, 4})
        reading = vcpus.read(3)
        assert ends.faults[0].receive()[0].kind is Kind.FETCH
        source(ends)
        with pytest.raises(TestbedError, match="a page was changed on its way"):
            filler.receive()
        assert not reading.done()
        assert 3 not in page_set(ends.copy.populated())


def _send(kind: Kind, *pages: int) -> Callable[[Pair], None]:
    def send(ends: Pair) -> None:
        ends.faults[0].send_runs(kind, runs_of(np.array(pages)))

    return send


def _push_twice(ends: Pair) -> None:
    ends.push[0].send_runs(Kind.ZERO, one(3))
    ends.push[0].send_runs(Kind.ZERO, one(3))


def _both_ways(ends: Pair) -> None:
    ends.push[0].send_runs(Kind.ZERO, one(3))
    while 3 not in page_set(ends.copy.populated()):
        os.sched_yield()
    ends.faults[0].send_runs(Kind.ZERO, one(3))


def _push_packed(ends: Pair) -> None:
    flag, pack = packer("zstd")
    ends.push[0].send_pages(one(3), [memoryview(pack(bytes(ends.ram.page(3))))], packing=flag)


HOSTILE: dict[str, tuple[Callable[[Pair], None], str]] = {
    "an unlisted page": (_send(Kind.ZERO, 9), "sent a page twice, or one that it had not listed"),
    "an unlisted page, pushed": (
        lambda ends: ends.push[0].send_runs(Kind.ZERO, np.array([[4, 6]], np.uint32)),
        "sent a page twice, or one that it had not listed",
    ),
    "a page twice": (_push_twice, "sent a page twice"),
    "a page on both connections": (_both_ways, "sent a page twice"),
    "two pages for a fault": (_send(Kind.ZERO, 3, 4), "ZERO of one page has pages 3 to 5"),
    "a page beyond RAM": (_send(Kind.ZERO, PAGES), f"of one page has pages {PAGES} to {PAGES + 1}"),
    "a run beyond RAM, pushed": (
        lambda ends: ends.push[0].send_runs(Kind.ZERO, one(PAGES)),
        f"a run ends at page {PAGES + 1}",
    ),
    "a page without its hash": (
        lambda ends: ends.push[0].send_pages(one(3), ends.ram.views(one(3))),
        "came packed, or without their hashes",
    ),
    "a page for a fault without its hash": (
        lambda ends: ends.faults[0].send_pages(one(3), ends.ram.views(one(3))),
        "came packed, or without their hashes",
    ),
    "a packed page": (_push_packed, "came packed, or without their hashes"),
    "the end of a round": (lambda ends: ends.faults[0].mark(Kind.ROUND_END, 1), "ROUND_END"),
}


@needs_userfaultfd
@pytest.mark.parametrize(("source", "why"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_source_that_breaks_the_rules_is_named_and_nothing_hangs(source: Callable[[Pair], None], why: str) -> None:
    with pair() as ends, filling(ends, {2, 3, 4}) as (filler, _), ThreadPoolExecutor(1) as pool:
        scribble(ends.ram, {2, 3, 4})
        sending = pool.submit(source, ends)
        with pytest.raises(ProtocolError, match=why):
            filler.receive()
        sending.result()


@needs_userfaultfd
def test_an_end_before_all_pages_have_come_is_no_end() -> None:
    with pair(SILENCE_S) as ends, filling(ends, {2, 3, 4}) as (filler, _):
        ends.push[0].send(AllSent("digest"))
        with pytest.raises(RemoteProtocolError, match="all pages have left, and 3 pages have not come"):
            filler.receive()


@needs_userfaultfd
@pytest.mark.parametrize("lost", ["both connections", "the one for faults", "the one that is pushed on"])
def test_the_loss_of_a_connection_is_reported_and_all_is_closed(lost: str) -> None:
    with pair() as ends, filling(ends, {2, 3}) as (filler, vcpus):
        ends.push[0].send_runs(Kind.ZERO, one(2))
        reading = vcpus.read(3)
        assert ends.faults[0].receive()[0].kind is Kind.FETCH
        if lost != "the one that is pushed on":
            ends.faults[0].close()
        if lost != "the one for faults":
            ends.push[0].close()
        with pytest.raises(StreamLost, match="the vMotion connection"):
            filler.receive()
        assert not reading.done()
        if lost != "the one that is pushed on":
            assert ends.doomed.wait(PEER_TIMEOUT_S), "whoever waits for the guest is told"


@needs_userfaultfd
def test_a_source_that_is_lost_when_nothing_is_missing_any_more_is_not_missed() -> None:
    with pair() as ends, filling(ends, {2}) as (filler, _):
        ends.push[0].send_runs(Kind.ZERO, one(2))
        ends.push[0].close()
        assert filler.receive() is None


@needs_userfaultfd
def test_a_source_that_leaves_a_fault_without_an_answer_is_given_up() -> None:
    with pair(SILENCE_S) as ends, filling(ends, {2, 3}) as (filler, vcpus):
        reading = vcpus.read(3)
        with pytest.raises(StreamLost, match=r"has not come within 0\.1 s|silent for 0\.1 s"):
            filler.receive()
        assert ends.doomed.wait(PEER_TIMEOUT_S)
        assert not reading.done()


# ---------------------------------------------------------------- the source


def receive_pages(stream: Stream, copy: Ram, number: int) -> set[int]:
    """The pages of so many frames."""
    hashes = PageHashes(copy)
    frames = [stream.receive_pages(stream.receive()[0], copy, hashes) for _ in range(number)]
    return {page for runs in frames for page in page_set(runs)}


def test_what_was_asked_for_is_not_pushed_again() -> None:
    with pair() as ends, serving(ends, {1, 2, 3}) as server:
        scribble(ends.ram, {1, 2, 3})
        ends.faults[1].send_fetch(2)
        assert receive_pages(ends.faults[1], ends.copy, 1) == {2}
        server.push(lambda left: None)
        assert receive_pages(ends.push[1], ends.copy, 1) == {1, 3}
        assert np.array_equal(ends.ram.bytes, ends.copy.bytes)


def test_what_was_pushed_is_not_sent_again_when_it_is_asked_for() -> None:
    with pair() as ends, serving(ends, {1, 2}) as server:
        scribble(ends.ram, {1, 2})
        server.push(lambda left: None)
        for page in (1, 2, 9):  # and what was never missing is not sent at all
            ends.faults[1].send_fetch(page)
        ends.faults[1].close()
        server._thread.join()
        assert server.asked == 3
        assert ends.faults[0].bytes_sent == 0


def test_each_page_goes_with_its_hash_and_zero_pages_by_their_number() -> None:
    with pair() as ends, serving(ends, {1, 2}) as server:
        scribble(ends.ram, {1})
        for page, kind in ((1, Kind.PAGES), (2, Kind.ZERO)):
            ends.faults[1].send_fetch(page)
            header, _ = ends.faults[1].receive()
            body = ends.faults[1].exactly(header.length)
            assert header.kind is kind
            if kind is Kind.PAGES:
                assert HASH_OF.unpack_from(body, 8)[0] == PageHashes(ends.ram).note_page(1, ends.ram.page(1))
        server.push(lambda left: None)
        assert ends.push[0].bytes_sent == 0, "nothing is left"


def test_the_digest_after_a_push_knows_the_pages_that_faults_have_claimed() -> None:
    """A page may be taken by a fault in the very moment in which the push ends."""

    class Slow(PageHashes):
        def note_page(self, page: int, content: memoryview) -> int:
            claimed.set()
            pushed.wait(SILENCE_S)
            return super().note_page(page, content)

    claimed, pushed = Event(), Event()
    with pair() as ends:
        scribble(ends.ram, {2})
        hashes, right = Slow(ends.ram), PageHashes(ends.ram)
        right.note_page(2, ends.ram.page(2))
        with serving(ends, {2}, hashes) as server:
            ends.faults[1].send_fetch(2)
            assert claimed.wait(PEER_TIMEOUT_S)
            server.push(lambda left: None)
            digest = hashes.digest()
            pushed.set()
        assert digest == right.digest()


@pytest.mark.parametrize("gone", ["before", "meanwhile"])
def test_a_destination_that_is_lost_ends_the_push(gone: str) -> None:
    with pair(SILENCE_S) as ends, serving(ends, set(range(PAGES))) as server:
        ends.ram.words[:, 0] = 1
        if gone == "before":
            ends.faults[1].close()
            server._thread.join()
        else:
            ends.push[1].close()
        with pytest.raises(StreamLost):
            _push_for_ever(server)


def _push_for_ever(server: Server) -> None:
    while True:
        server._due[:] = True
        server.push(lambda left: None)


def test_a_destination_that_asks_for_what_cannot_be_is_named() -> None:
    with pair() as ends, serving(ends, set(range(PAGES))) as server:
        ends.faults[1].send_fetch(PAGES)
        server._thread.join()
        with pytest.raises(RemoteProtocolError, match=f"FETCH of one page has pages {PAGES} to {PAGES + 1}"):
            server.push(lambda left: None)


def test_a_destination_that_asks_and_does_not_listen_does_not_hold_up_the_end() -> None:
    size = 20_000
    with memory(size) as ram, pair(SILENCE_S) as ends, ThreadPoolExecutor(1) as pool:
        ram.words[:, 0] = 1
        server = Server(ram, np.ones(size, bool), PageHashes(ram), ends.push[0], ends.faults[0])
        asking = pool.submit(_ask_for_all, ends.faults[1], size)
        asking.result()
        server.close()


def _ask_for_all(stream: Stream, pages: int) -> None:
    try:
        for page in range(pages):
            stream.send_fetch(page)
    except StreamLost:
        return  # the source does not listen any more


def test_a_push_tells_again_and_again_how_much_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "EVERY_S", 0.0)
    told: list[int] = []
    pages = 4 * postcopy._PUSH_PAGES
    with memory(pages) as ram, pair() as ends:
        server = Server(ram, np.ones(pages, bool), PageHashes(ram), ends.push[0], ends.faults[0])
        server.push(told.append)
        server.close()
    assert told == [pages, pages * 3 // 4, pages // 2, pages // 4, 0]
