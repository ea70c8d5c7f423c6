"""The vMotion stream on real sockets: what both sides say to each other, and what a broken or hostile peer can do."""

import socket
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pairs import (
    HELLO,
    LIMITS,
    MIB,
    SILENCE_S,
    connection,
    memory,
    migration,
    receive_round,
    scribble,
    session_in,
    streams,
    table,
)

from hosts.packing import packer
from hosts.protocol import (
    CHUNK_PAGES,
    FINAL,
    HEADER,
    MAJOR,
    MINOR,
    PLAIN,
    TABLE,
    AllSent,
    Complete,
    Flag,
    Header,
    InvalidTransition,
    Join,
    Kind,
    ProtocolError,
    RemoteProtocolError,
    Resumed,
    Session,
    State,
    Welcome,
    encode_bitmap,
    encode_body,
    encode_hashes,
    parse_bitmap,
    parse_page,
)
from hosts.ram import PAGE, PageHashes, Ram, runs_of
from hosts.stream import PEER_TIMEOUT_S, PeerAborted, Stream, StreamLost


def runs(*pages: int) -> np.ndarray:
    return runs_of(np.array(pages, np.int64))


# ---------------------------------------------------------------- the two sides of a migration


def test_a_migration_speaks_from_its_greeting_to_its_end() -> None:
    with memory(8) as ram, memory(8) as copy, migration() as (source, destination):
        scribble(ram, {1, 5})
        source.send_pages(runs(1, 5), ram.views(runs(1, 5)), 1)
        source.send_runs(Kind.ZERO, runs(2, 3), 1)
        source.mark(Kind.ROUND_END, 1)
        assert len(receive_round(destination, copy, PageHashes(copy))) == 2
        source.expect(Kind.ROUND_ACK)
        source.mark(Kind.SUSPENDING, 2)
        assert destination.receive()[0].kind is Kind.SUSPENDING
        source.send(State(b"device", "digest"))
        assert destination.expect(Kind.STATE) == State(b"device", "digest")
        destination.session.step("claim")
        destination.session.step("resume")
        destination.send(Resumed(2, "digest"))
        assert source.expect(Kind.RESUMED) == Resumed(2, "digest")
        assert source.session.state == destination.session.state == "done"
        assert np.array_equal(ram.bytes, copy.bytes)


def test_a_migration_by_post_copy_speaks_from_its_greeting_to_its_end() -> None:
    missing = np.array([True, False, True, False])
    with memory(4) as ram, memory(4) as copy, migration() as (source, destination):
        scribble(ram, {0, 2})
        source.mark(Kind.SUSPENDING, 1)
        assert destination.receive()[0].kind is Kind.SUSPENDING
        source.send_bitmap(encode_bitmap(missing), 1)
        header, _ = destination.receive()
        assert (header.kind, header.round) == (Kind.BITMAP, 1)
        assert parse_bitmap(bytes(destination.exactly(header.length)), 4).tolist() == missing.tolist()
        source.send(State(b"device", ""))
        assert destination.expect(Kind.STATE) == State(b"device", "")
        destination.session.step("claim")
        destination.session.step("resume")
        destination.send(Resumed(2, ""))
        assert source.expect(Kind.RESUMED) == Resumed(2, "")
        source.send_pages(runs(0, 2), ram.views(runs(0, 2)))
        destination.receive_pages(destination.receive()[0], copy, PageHashes(copy))
        source.send(AllSent("digest"))
        assert destination.expect(Kind.ALL_SENT) == AllSent("digest")
        destination.send(Complete("digest", 1, [120.0]))
        assert source.expect(Kind.COMPLETE) == Complete("digest", 1, [120.0])
        assert source.session.state == destination.session.state == "done"


@pytest.mark.parametrize(
    ("opening", "role", "state"),
    [(HELLO, "destination", "greeted"), (Join(MAJOR, MINOR, "vm1-0", "token", "faults"), "receiver", "joined")],
)
def test_the_first_message_tells_what_kind_of_connection_it_is(opening: msgspec.Struct, role: str, state: str) -> None:
    called_as = "source" if role == "destination" else "sender"
    with streams((called_as, "new"), ("destination", "new")) as (caller, called):
        caller.send(opening)
        assert called.receive_opening({Kind.JOIN: Session("receiver")}) == opening
        assert (called.session.role, called.session.state) == (role, state)
        called.send(Welcome(MAJOR, MINOR))
        assert caller.expect(Kind.WELCOME) == Welcome(MAJOR, MINOR)


def test_another_first_message_is_refused() -> None:
    with streams(("source", "precopy"), ("destination", "new")) as (caller, called):
        caller.mark(Kind.ROUND_END, 1)
        with pytest.raises(RemoteProtocolError, match="destination in state new: receive ROUND_END is not allowed"):
            called.receive_opening({Kind.JOIN: Session("receiver")})


def test_a_page_is_asked_for_and_comes_with_its_hash() -> None:
    with memory(8) as ram, streams(("sender", "streaming"), ("receiver", "streaming")) as (sender, receiver):
        scribble(ram, {5})
        receiver.send_fetch(5)
        header, _ = sender.receive()
        assert parse_page(header, sender.exactly(header.length), 8) == 5
        sender.send_page(5, b"12345678", ram.page(5))
        header, _ = receiver.receive()
        body = receiver.exactly(header.length)
        assert (header.kind, header.flags, header.pages, header.runs) == (Kind.PAGES, Flag.HASHED, 1, 1)
        assert body[8:16] == b"12345678"
        assert body[16:] == ram.page(5)


def test_every_byte_that_is_sent_is_counted() -> None:
    with memory(600) as ram, memory(600) as copy, migration() as (source, destination):
        ram.words[:, 0] = 1
        before = source.bytes_sent
        assert before == HEADER.size + len(encode_body(HELLO)[1])
        two = np.array([[0, 100], [200, 300]], np.uint32)
        source.send_pages(two, ram.views(two), 1)
        source.send_runs(Kind.ZERO, runs(5), 1)
        source.mark(Kind.ROUND_END, 1)
        frames = receive_round(destination, copy, PageHashes(copy))
        assert source.bytes_sent - before == 3 * HEADER.size + (200 * PAGE + 16) + 8
        assert sum(frame.length for frame in frames) == (200 * PAGE + 16) + 8


def test_pages_straight_from_memory_arrive_like_all_others() -> None:
    whole = np.array([[0, 40], [50, 256]], np.uint32)
    with memory(256) as ram, memory(256) as copy, migration() as (source, destination):
        scribble(ram, set(range(256)))
        source._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's minimum, 4.5 KiB
        with ThreadPoolExecutor(1) as pool:
            receiving = pool.submit(receive_round, destination, copy, PageHashes(copy))
            before = source.bytes_sent
            source.send_file_pages(whole, ram, 1)
            assert source.bytes_sent - before == HEADER.size + 16 + 246 * PAGE
            source.mark(Kind.ROUND_END, 1)
            assert [(header.kind, header.pages, header.runs) for header in receiving.result()] == [(Kind.PAGES, 246, 2)]
        copy.bytes[40 * PAGE : 50 * PAGE] = ram.bytes[40 * PAGE : 50 * PAGE]
        assert np.array_equal(ram.bytes, copy.bytes)


@pytest.mark.parametrize("method", ["zstd", "lz4"])
@pytest.mark.parametrize("hashed", [False, True])
def test_packed_pages_arrive_as_they_were(method: str, hashed: bool) -> None:
    flag, pack = packer(method)
    chosen = runs(0, 1, 5, 7)
    with memory(8) as ram, memory(8) as copy, migration() as (source, destination):
        scribble(ram, {0, 1, 5, 7})
        here, there = PageHashes(ram), PageHashes(copy)
        hashes = encode_hashes(here.note(chosen, ram.views(chosen))) if hashed else b""
        packed = memoryview(pack(b"".join(ram.views(chosen))))
        source.send_pages(chosen, [packed], 1, hashes, flag)
        header, _ = destination.receive()
        assert header.flags == flag | (Flag.HASHED if hashed else PLAIN)
        assert header.length < 4 * PAGE
        destination.receive_pages(header, copy, there)
        assert np.array_equal(ram.bytes, copy.bytes)
        assert here.digest() == there.digest() or not hashed


# ---------------------------------------------------------------- aborts and silence


def test_an_abort_is_cut_to_what_its_frame_may_hold() -> None:
    with migration() as (source, destination):
        source.abort("é€😀" * 1000)
        with pytest.raises(PeerAborted) as heard:
            destination.receive()
        assert str(heard.value) == ("é€😀" * 1000)[:1000]
        assert source.session.state == destination.session.state == "aborted"


@pytest.mark.parametrize(("beyond", "waits"), [("claimed", "handed_over"), ("owned", "entrusted")])
def test_beyond_the_point_of_no_return_no_abort_is_sent(beyond: str, waits: str) -> None:
    with streams(("source", waits), ("destination", beyond)) as (source, destination):
        destination.abort("too late")
        destination.close()
        with pytest.raises(StreamLost, match="closed by the peer"):
            source.receive()
        assert destination.session.state == beyond


def test_an_abort_to_a_peer_that_is_gone_is_no_error() -> None:
    with streams(("source", "round_ended"), ("destination", "receiving")) as (source, destination):
        destination.close()
        with pytest.raises(StreamLost):
            source.receive()
        source.abort("nobody hears it")
        assert source.session.state == "aborted"


def test_a_message_out_of_turn_is_not_sent() -> None:
    with migration() as (source, _):
        sent = source.bytes_sent
        with pytest.raises(InvalidTransition, match="send STATE is not allowed"):
            source.send(State(b"", ""))
        assert source.bytes_sent == sent


def test_another_message_than_the_one_due_is_the_peers_fault() -> None:
    with migration() as (source, destination):
        source.mark(Kind.ROUND_END, 1)
        with pytest.raises(RemoteProtocolError, match="ROUND_END where STATE was due"):
            destination.expect(Kind.STATE)


def test_a_silent_peer_is_given_up() -> None:
    with streams(("source", "precopy"), ("destination", "receiving"), SILENCE_S) as (source, destination):
        with pytest.raises(StreamLost, match=r"the peer was silent for 0\.1 s"):
            destination.receive()
        source._socket.sendall(Header(Kind.ROUND_END, 1, 0, 0, 1, 0).pack()[:10])
        with pytest.raises(StreamLost, match="the peer was silent"):
            destination.receive()


@pytest.mark.parametrize("straight", [False, True])
def test_a_peer_that_does_not_read_is_given_up(straight: bool) -> None:
    chunk = np.array([[0, CHUNK_PAGES]], np.uint32)
    with memory(CHUNK_PAGES) as ram, streams(("source", "precopy"), ("destination", "receiving"), SILENCE_S) as pair:
        source, _ = pair
        ram.words[:, 0] = 1
        source._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        send = (
            partial(source.send_file_pages, chunk, ram)
            if straight
            else partial(source.send_pages, chunk, ram.views(chunk))
        )
        with pytest.raises(StreamLost, match=r"while sending PAGES: the peer was silent for 0\.1 s"):
            _for_ever(send)


def _for_ever(act: Callable[[], None]) -> None:
    while True:
        act()


def test_whoever_waits_without_a_limit_can_be_woken_and_sending_still_works() -> None:
    with streams(("sender", "streaming"), ("receiver", "streaming"), SILENCE_S) as (sender, receiver):
        sender.unlimited()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(sender.receive)
            sender.interrupt()
            with pytest.raises(StreamLost, match="closed"):
                waiting.result()
        sender.send_runs(Kind.ZERO, runs(1))
        assert receiver.receive()[0].kind is Kind.ZERO
        sender.close()
        sender.interrupt()  # it has ended already: no error


def test_ram_can_be_given_back_while_the_loss_of_its_stream_is_handled() -> None:
    ram = Ram.create("test", TINY_RAM * PAGE)
    with streams(("source", "precopy"), ("destination", "receiving")) as (source, destination):
        cut = Header(Kind.PAGES, 1, 2, 1, 1, 8 + 2 * PAGE).pack() + table((0, 2)) + bytes(100)
        source._socket.sendall(cut)
        source.close()
        header, _ = destination.receive()
        try:
            destination.receive_pages(header, ram, PageHashes(ram))
        except StreamLost:
            ram.close()  # as the agent does when an incoming migration has failed


# ---------------------------------------------------------------- streams from a broken or hostile peer

TINY_RAM = 32  # pages


class Frame(NamedTuple):
    """A frame but for its sequence number."""

    kind: Kind
    body: bytes = b""
    pages: int = 0
    runs: int = 0
    flags: Flag = PLAIN
    round: int = 1

    def pack(self, sequence: int) -> bytes:
        header = Header(self.kind, self.round, self.pages, self.runs, sequence, len(self.body), self.flags)
        return header.pack() + self.body


def packed(frames: list[Frame]) -> list[bytes]:
    return [frame.pack(number) for number, frame in enumerate(frames, 1)]


def _content(page: int) -> bytes:
    return bytes([page + 1]) * PAGE


_ZSTD, _pack = packer("zstd")
ROUND = [
    Frame(Kind.ZERO, table((3, 5)), 2, 1),
    Frame(Kind.PAGES, table((0, 2), (7, 8)) + _content(0) + _content(1) + _content(7), 3, 2),
    Frame(Kind.PAGES, table((9, 11)) + _pack(_content(9) + _content(10)), 2, 1, _ZSTD),
    Frame(Kind.ROUND_END),
]
HONEST = packed(
    [
        Frame(Kind.HELLO, encode_body(HELLO)[1]),
        *ROUND,
        Frame(Kind.BITMAP, bytes(4)),
        Frame(Kind.SUSPENDING),
        Frame(Kind.PAGES, table((31, 32)) + bytes(8) + _content(31), 1, 1, Flag.HASHED),
        Frame(Kind.STATE, encode_body(State(b"device", "digest"))[1]),
    ]
)
POSTCOPY = packed(
    [
        Frame(Kind.HELLO, encode_body(HELLO)[1]),
        Frame(Kind.SUSPENDING),
        Frame(Kind.BITMAP, b"\xff\xff\xff\xff"),
        Frame(Kind.STATE, encode_body(State(b"device", ""))[1]),
        *ROUND[:2],
        Frame(Kind.ALL_SENT, encode_body(AllSent("digest"))[1]),
    ]
)
JOINING = packed([Frame(Kind.JOIN, encode_body(Join(MAJOR, MINOR, "vm1-0", "token", "pages"))[1]), *ROUND])
STREAMS = {"a migration": HONEST, "post-copy": POSTCOPY, "a further connection": JOINING}


class Received(NamedTuple):
    error: type[BaseException]
    message: str
    state: str
    ram: bytes
    peak_bytes: int  # of Python's and numpy's memory


def hear(
    called: socket.socket,
    session: Session,
    ram: Ram,
    serve: Callable[[Stream, Ram], None],
    timeout_s: float = PEER_TIMEOUT_S,
) -> Received:
    """What this side makes of whatever comes, until it ends by an error; any but these is a bug."""
    ram.bytes[:] = 0xEE
    stream = Stream(called, session, timeout_s)
    tracemalloc.start()
    try:
        with stream:
            serve(stream, ram)
    except (ProtocolError, StreamLost, PeerAborted) as error:
        return Received(
            type(error), str(error), stream.session.state, ram.bytes.tobytes(), tracemalloc.get_traced_memory()[1]
        )
    finally:
        tracemalloc.stop()
    raise AssertionError("a stream has no end without an error")


@contextmanager
def spoken(data: bytes, then_silent: bool) -> Iterator[socket.socket]:
    """A connection whose other end says this, and then closes or falls silent."""

    def write(sock: socket.socket) -> None:
        with suppress(OSError):  # the other side may have had enough
            sock.sendall(data)
            if not then_silent:
                sock.shutdown(socket.SHUT_WR)

    with connection() as (caller, called), ThreadPoolExecutor(1) as pool:
        pool.submit(write, caller)
        yield called


def deliver(data: bytes, then_silent: bool = False) -> Received:
    """What a destination makes of these bytes from its peer."""
    with memory(TINY_RAM) as ram, spoken(data, then_silent) as called:
        return hear(called, Session("destination"), ram, _be_called, SILENCE_S if then_silent else PEER_TIMEOUT_S)


def _be_called(stream: Stream, ram: Ram) -> None:
    stream.receive_opening({Kind.JOIN: Session("receiver")})
    stream.send(Welcome(MAJOR, MINOR))
    _take_part(stream, ram)


def _take_part(stream: Stream, ram: Ram) -> None:
    """Either side's part with whatever comes, for ever."""
    hashes, session = PageHashes(ram), stream.session
    while True:
        for act in ("claim", "resume"):  # what a destination does by itself
            if session.may(act):
                session.step(act)
        if session.may("send RESUMED"):
            stream.send(Resumed(2, ""))
        header, _ = stream.receive()
        if header.kind in (Kind.PAGES, Kind.ZERO):
            stream.receive_pages(header, ram, hashes)
        elif header.kind is Kind.FETCH:
            parse_page(header, stream.exactly(header.length), ram.pages)
        elif header.kind is Kind.BITMAP:
            parse_bitmap(bytes(stream.exactly(header.length)), ram.pages)
        elif header.kind is Kind.ROUND_END:
            stream.mark(Kind.ROUND_ACK, header.round)


def _just_listen(stream: Stream, ram: Ram) -> None:
    stream.receive()


@pytest.mark.parametrize(
    ("frames", "state"), [(HONEST, "done"), (POSTCOPY, "filled"), (JOINING, "streaming")], ids=STREAMS
)
def test_an_honest_stream_is_received_to_its_end(frames: list[bytes], state: str) -> None:
    received = deliver(b"".join(frames))
    assert received.error in (StreamLost, RemoteProtocolError)
    assert "closed by the peer" in received.message
    assert received.state == state
    expected = {0: _content(0), 1: _content(1), 3: bytes(PAGE), 4: bytes(PAGE), 7: _content(7)}
    if frames is not POSTCOPY:
        expected |= {9: _content(9), 10: _content(10)}
    if frames is HONEST:
        expected[31] = _content(31)
    assert received.ram == b"".join(expected.get(page, b"\xee" * PAGE) for page in range(TINY_RAM))


some_stream = st.sampled_from(list(STREAMS.values()))


@settings(max_examples=20)
@given(some_stream, st.data(), st.booleans())
def test_a_stream_that_ends_early_is_lost_and_nothing_waits_for_it(
    frames: list[bytes], data: st.DataObject, then_silent: bool
) -> None:
    whole = b"".join(frames)
    starts = [sum(map(len, frames[:number])) for number in range(len(frames))]
    length = data.draw(st.integers(0, len(whole) - 1) | st.sampled_from(starts))
    received = deliver(whole[:length], then_silent)
    assert received.error is StreamLost
    assert ("silent" if then_silent else "closed by the peer") in received.message


class Damage(NamedTuple):
    """At this place so many bytes are gone, and these are there instead."""

    at: int
    gone: int
    instead: bytes

    def to(self, data: bytes) -> bytes:
        return data[: self.at] + self.instead + data[self.at + self.gone :]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """An honest stream after one to three accidents."""
    frames = draw(some_stream)
    data = b"".join(frames)
    starts = st.sampled_from([sum(map(len, frames[:number])) for number in range(len(frames))])
    anywhere = st.integers(0, len(data) - 1)
    in_a_header_or_table = st.builds(int.__add__, starts, st.integers(0, HEADER.size + 15))
    field = st.builds(int.__add__, starts, st.sampled_from(range(0, HEADER.size + 16, 4)))
    number = (st.integers(0, 2**32 - 1) | st.integers(0, 300)).map(lambda n: n.to_bytes(4, "big"))
    accidents = (
        st.builds(Damage, anywhere | in_a_header_or_table, st.just(1), st.binary(min_size=1, max_size=1))
        | st.builds(Damage, field, st.just(4), number)
        | st.builds(Damage, anywhere, st.integers(0, 2 * PAGE), st.binary(max_size=32))
        | st.builds(Damage, starts, st.just(0), st.sampled_from(list(chain(*STREAMS.values()))))
    )
    for accident in draw(st.lists(accidents, min_size=1, max_size=3)):
        data = accident.to(data)
    return data


@settings(max_examples=150)
@given(damaged())
def test_a_damaged_stream_ends_by_a_named_error_and_within_bounds_of_memory(data: bytes) -> None:
    received = deliver(data)
    assert received.message
    assert received.peak_bytes < LIMITS[Kind.STATE] + 16 * MIB


@given(st.binary(max_size=100) | st.binary(max_size=60).map(lambda rest: HONEST[0] + b"VMOT" + rest))
def test_noise_ends_a_stream_by_a_named_error(data: bytes) -> None:
    assert deliver(data).error in (RemoteProtocolError, StreamLost)


@st.composite
def bodies(draw: st.DrawFn, kind: Kind) -> Frame:
    """A frame of this kind that its header's checks let pass, mostly, with any body."""
    edges = st.integers(0, TINY_RAM + 1) | st.integers(0, 2**32 - 1)
    count = draw(st.integers(1, 1 if kind is Kind.FETCH else 4))
    runs = sorted(draw(st.lists(edges, min_size=2 * count, max_size=2 * count)))
    pairs = [(runs[2 * n], runs[2 * n + 1]) for n in range(count)]
    pages = min(max(sum(end - first for first, end in pairs), count) + draw(st.integers(0, 1)), 2**32 - 1)
    match kind:
        case Kind.PAGES:
            flags = draw(st.sampled_from([PLAIN, Flag.ZSTD, Flag.LZ4])) | draw(st.sampled_from([PLAIN, Flag.HASHED]))
            pages = min(pages, CHUNK_PAGES)
            content = draw(st.binary(min_size=1, max_size=64)) if flags & ~Flag.HASHED else bytes(pages * PAGE)
            return Frame(kind, table(*pairs) + bytes(8 * pages * (Flag.HASHED in flags)) + content, pages, count, flags)
        case Kind.ZERO | Kind.FETCH:
            return Frame(kind, table(*pairs), pages, count)
        case Kind.BITMAP:
            return Frame(kind, draw(st.binary(min_size=3, max_size=5)))
        case Kind.ROUND_END | Kind.ROUND_ACK | Kind.SUSPENDING:
            return Frame(kind)
    return Frame(kind, draw(st.binary(max_size=40)))


LISTENING = [(role, state) for role, table in TABLE.items() for state in table]


@settings(max_examples=250)
@given(st.sampled_from(LISTENING), st.data())
def test_in_any_state_any_frames_end_by_a_named_error_and_within_bounds_of_memory(
    place: tuple[str, str], data: st.DataObject
) -> None:
    """The peer numbers its frames rightly and keeps to the limits: what it says may still be anything."""
    role, state = place
    due = [event.removeprefix("receive ") for event in TABLE[role][state] if event.startswith("receive ")]
    kinds = st.sampled_from(Kind) | st.sampled_from([Kind[name] for name in due] or list(Kind))
    frames = data.draw(st.lists(kinds.flatmap(bodies), min_size=1, max_size=4))
    with memory(TINY_RAM) as ram, spoken(b"".join(packed(frames)), False) as called:
        received = hear(called, session_in(role, state), ram, _take_part)
    assert received.message
    assert received.state in TABLE[role].keys() | FINAL
    assert received.peak_bytes < 4 * MIB


@pytest.mark.parametrize("place", LISTENING, ids="-".join)
def test_a_frame_that_is_not_due_is_refused_before_any_memory_is_set_aside(place: tuple[str, str]) -> None:
    """In no state but those that wait for it does a peer get 128 MiB by naming a number."""
    role, state = place
    for kind in (Kind.STATE, Kind.BITMAP, Kind.COMPLETE):
        if f"receive {kind.name}" in TABLE[role][state]:
            continue
        data = HEADER.pack(b"VMOT", kind, 0, 0, 0, 0, 1, LIMITS[kind])
        with memory(TINY_RAM) as ram, spoken(data, True) as called:
            received = hear(called, session_in(role, state), ram, _just_listen)
        assert f"{role} in state {state}: receive {kind.name} is not allowed" in received.message
        assert received.peak_bytes < MIB // 2


@pytest.mark.parametrize("kind", Kind)
def test_a_frame_beyond_its_limit_is_refused_before_any_memory_is_set_aside(kind: Kind) -> None:
    pages, number_of_runs = (CHUNK_PAGES, 1) if kind is Kind.PAGES else (0, 0)
    header = HEADER.pack(b"VMOT", kind, 0, 1, pages, number_of_runs, 2, LIMITS[kind] + 1)
    received = deliver(HONEST[0] + header)
    assert received.error is RemoteProtocolError
    assert f"{kind.name} of {LIMITS[kind] + 1} bytes" in received.message
    assert received.peak_bytes < MIB


@pytest.mark.parametrize("runs", [((31, 33),), ((0, 2), (1, 2)), ((2, 1), (0, 4))])
@pytest.mark.parametrize("kind", [Kind.PAGES, Kind.ZERO])
def test_pages_beyond_ram_or_out_of_order_change_nothing(runs: tuple[tuple[int, int], ...], kind: Kind) -> None:
    pages = sum(end - first for first, end in runs)
    content = pages * _content(0) if kind is Kind.PAGES else b""
    received = deliver(HONEST[0] + Frame(kind, table(*runs) + content, pages, len(runs)).pack(2))
    assert received.error is RemoteProtocolError
    assert received.ram == b"\xee" * (TINY_RAM * PAGE)


@pytest.mark.parametrize("flag", [Flag.ZSTD, Flag.LZ4])
@pytest.mark.parametrize("content", [b"garbage", _pack(_content(0)), _pack(3 * _content(0)), b"\x28\xb5\x2f\xfd"])
def test_packed_pages_that_are_no_two_pages_change_nothing(flag: Flag, content: bytes) -> None:
    received = deliver(HONEST[0] + Frame(Kind.PAGES, table((0, 2)) + content, 2, 1, flag).pack(2))
    assert received.error is RemoteProtocolError
    assert "packed pages" in received.message
    assert received.ram == b"\xee" * (TINY_RAM * PAGE)


@example(0)
@given(st.integers(0, 2**32))
def test_a_round_of_any_number_is_told_in_16_bits(number: int) -> None:
    with streams(("source", "precopy"), ("destination", "receiving")) as (source, destination):
        source.mark(Kind.ROUND_END, number)
        assert destination.receive()[0].round == number % 2**16
