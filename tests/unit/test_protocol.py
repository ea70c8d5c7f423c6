"""The vMotion protocol: headers, tables of runs, bodies and versions; then the state table, one side and both."""

import socket
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from hosts.protocol import (
    CHUNK_PAGES,
    FINAL,
    HEADER,
    MAJOR,
    MINOR,
    TABLE,
    Abort,
    Header,
    Hello,
    InvalidTransition,
    Kind,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    Resumed,
    Session,
    State,
    Welcome,
    encode_body,
    encode_runs,
    negotiate,
    parse_body,
    parse_header,
    parse_runs,
)
from hosts.ram import PAGE, HashBitmap, PageHashes, Ram, pages_of, runs_of
from hosts.stream import PeerAborted, Stream, StreamLost

MIB = 2**20
# kind -> the most that its body may hold, in bytes
LIMITS = {
    Kind.HELLO: 4096,
    Kind.WELCOME: 4096,
    Kind.PAGES: CHUNK_PAGES * (PAGE + 8),
    Kind.ZERO: CHUNK_PAGES * 8,
    Kind.ROUND_END: 0,
    Kind.ROUND_ACK: 0,
    Kind.STATE: 128 * MIB,
    Kind.RESUMED: 4096,
    Kind.ABORT: 4096,
    Kind.SUSPENDING: 0,
}
BODIES: list[msgspec.Struct] = [
    Hello(MAJOR, MINOR, "vm1-0badcafe", "0123456789abcdef" * 2, 512 * MIB),
    Welcome(1, 0),
    State(b"\x00\xff" * 100, "d41d8cd98f00b204e9800998ecf8427e"),
    Resumed(7, "d41d8cd98f00b204e9800998ecf8427e"),
    Abort("the disk is full"),
]


# ---------------------------------------------------------------- headers


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Any header that a well-behaved peer may send."""
    kind = draw(st.sampled_from(Kind))
    pages, length = 0, draw(st.integers(0, LIMITS[kind]))
    if kind is Kind.PAGES:
        pages = draw(st.integers(1, CHUNK_PAGES))
        length = pages * PAGE + 8 * draw(st.integers(1, pages))
    elif kind is Kind.ZERO:
        pages = draw(st.integers(0, 2**32 - 1))
        length = 8 * draw(st.integers(1, CHUNK_PAGES))
    return Header(kind, draw(st.integers(0, 2**16 - 1)), pages, draw(st.integers(0, 2**64 - 1)), length)


def test_a_header_is_laid_out_as_documented() -> None:
    header = Header(Kind.PAGES, round=2, pages=3, sequence=4, length=3 * PAGE + 16)
    assert header.pack().hex(" ", 4) == "564d4f54 03000002 00000003 00000000 00000004 00003010"
    assert HEADER.size == 24
    assert header.table_bytes == 16


@given(headers())
def test_a_header_comes_back_as_it_was_packed(header: Header) -> None:
    assert parse_header(header.pack()) == header


@st.composite
def altered_headers(draw: st.DrawFn) -> bytes:
    """A header with one to three of its bits turned round."""
    data = bytearray(draw(headers()).pack())
    for bit in draw(st.sets(st.integers(0, 8 * len(data) - 1), min_size=1, max_size=3)):
        data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


@given(altered_headers() | st.binary(min_size=20, max_size=20).map(lambda rest: b"VMOT" + rest))
@example(bytes(24))
@example(b"\xff" * 24)
def test_any_24_bytes_are_a_header_within_its_limits_or_the_peers_fault(data: bytes) -> None:
    try:
        header = parse_header(data)
    except RemoteProtocolError:
        return
    assert header.pack() == data
    assert 0 <= header.length <= LIMITS[header.kind]
    if header.kind is Kind.PAGES:
        assert 1 <= header.pages <= CHUNK_PAGES
        assert 8 <= header.table_bytes <= 8 * header.pages
        assert header.table_bytes % 8 == 0
    elif header.kind is Kind.ZERO:
        assert header.table_bytes == header.length > 0
        assert header.length % 8 == 0
    else:
        assert header.pages == 0


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ((b"GET ", 1, 0, 0, 0, 1, 20), "does not speak the vMotion protocol: frame starts with b'GET '"),
        ((b"VMOT", 0, 0, 0, 0, 1, 0), "unknown message kind 0"),
        ((b"VMOT", 99, 0, 0, 0, 1, 0), "unknown message kind 99"),
        ((b"VMOT", Kind.HELLO, 0x80, 0, 0, 1, 20), "HELLO with unknown flags 0x80"),
        ((b"VMOT", Kind.HELLO, 0, 0, 0, 1, 4097), "HELLO of 4097 bytes; at most 4096"),
        ((b"VMOT", Kind.STATE, 0, 0, 0, 1, 2**32 - 1), "STATE of 4294967295 bytes"),
        ((b"VMOT", Kind.ROUND_END, 0, 1, 0, 1, 1), "ROUND_END of 1 bytes"),
        ((b"VMOT", Kind.ROUND_ACK, 0, 1, 5, 1, 0), "ROUND_ACK with 5 pages"),
        ((b"VMOT", Kind.STATE, 0, 0, 1, 1, 20), "STATE with 1 pages"),
        ((b"VMOT", Kind.PAGES, 0, 1, 0, 1, 8), "PAGES with 0 pages; 1 to 256"),
        ((b"VMOT", Kind.PAGES, 0, 1, 257, 1, 256 * (PAGE + 8)), "PAGES with 257 pages"),
        ((b"VMOT", Kind.PAGES, 0, 1, 2, 1, 2 * PAGE), "cannot hold 2 pages and their table"),  # no table
        ((b"VMOT", Kind.PAGES, 0, 1, 2, 1, PAGE), "cannot hold 2 pages"),
        ((b"VMOT", Kind.PAGES, 0, 1, 2, 1, 2 * PAGE + 24), "cannot hold 2 pages"),  # a run for no page
        ((b"VMOT", Kind.PAGES, 0, 1, 2, 1, 2 * PAGE + 12), "cannot hold 2 pages"),  # half a run
        ((b"VMOT", Kind.ZERO, 0, 1, 1, 1, 0), "ZERO with a table of 0 bytes"),
        ((b"VMOT", Kind.ZERO, 0, 1, 1, 1, 12), "ZERO with a table of 12 bytes"),
    ],
)
def test_a_header_that_cannot_be_is_refused_by_its_reason(fields: tuple, why: str) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        parse_header(HEADER.pack(*fields))
    assert why in str(refusal.value)


# ---------------------------------------------------------------- tables of runs

RAM_PAGES = 1000
page_sets = st.sets(st.integers(0, RAM_PAGES - 1)) | st.builds(
    lambda first, length: set(range(first, min(first + length, RAM_PAGES))),
    st.integers(0, RAM_PAGES - 1),
    st.integers(1, RAM_PAGES),
)


def table(*runs: tuple[int, int]) -> bytes:
    return np.array(runs, ">u4").tobytes()


@given(page_sets)
def test_a_table_of_runs_comes_back_as_it_was_encoded(pages: set[int]) -> None:
    runs = runs_of(np.array(sorted(pages), np.int64))
    parsed = parse_runs(encode_runs(runs), len(pages), RAM_PAGES)
    assert parsed.dtype == np.uint32
    assert parsed.tolist() == runs.tolist()


words = st.integers(0, RAM_PAGES + 2) | st.integers(0, 2**32 - 1)
tables = st.lists(st.tuples(words, words), max_size=8) | st.lists(words, max_size=8, unique=True).map(
    lambda edges: list(zip(*[iter(sorted(edges))] * 2, strict=False))
)


@given(tables, st.integers(-1, 1), st.integers(0, 2**32 - 1) | st.none())
@example([(0, 4), (4, 6)], 0, None)
@example([(0, 4), (3, 6)], 0, None)
def test_any_table_is_ascending_disjoint_runs_within_ram_or_the_peers_fault(
    runs: list[tuple[int, int]], error: int, pages: int | None
) -> None:
    claimed = max(0, sum(end - first for first, end in runs) + error) if pages is None else pages
    is_right = (
        all(first < end <= RAM_PAGES for first, end in runs)
        and all(before[1] <= after[0] for before, after in pairwise(runs))
        and claimed == sum(end - first for first, end in runs)
    )
    if is_right:
        assert parse_runs(table(*runs), claimed, RAM_PAGES).tolist() == [list(run) for run in runs]
    else:
        with pytest.raises(RemoteProtocolError):
            parse_runs(table(*runs), claimed, RAM_PAGES)


@pytest.mark.parametrize(
    ("data", "pages", "why"),
    [
        (table((5, 3)), 2, "out of order"),
        (table((3, 3)), 0, "out of order"),
        (table((4, 6), (0, 2)), 4, "out of order"),
        (table((0, 4), (3, 6)), 7, "out of order"),
        (table((0, 2**32 - 1)), 2**32 - 1, "ends at page 4294967295, RAM has 1000"),
        (table((999, 1001)), 2, "ends at page 1001, RAM has 1000"),
        (table((0, 4)), 5, "holds 4 pages, its header says 5"),
        (b"", 1, "holds 0 pages, its header says 1"),
    ],
)
def test_a_table_that_cannot_be_is_refused_by_its_reason(data: bytes, pages: int, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        parse_runs(data, pages, RAM_PAGES)


@pytest.mark.parametrize("length", [1, 4, 12])
def test_a_table_that_ends_within_a_run_is_the_peers_fault(length: int) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_runs(bytes(length), 0, RAM_PAGES)


# ---------------------------------------------------------------- bodies and versions


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_a_body_comes_back_as_it_was_encoded(body: msgspec.Struct) -> None:
    kind, data = encode_body(body)
    assert kind.name == type(body).__name__.upper()
    assert len(data) <= LIMITS[kind]
    assert parse_body(kind, data) == body


def test_every_kind_of_message_is_either_a_body_or_none() -> None:
    with_body = {encode_body(body)[0] for body in BODIES}
    assert set(Kind) - with_body == {Kind.PAGES, Kind.ZERO, Kind.ROUND_END, Kind.ROUND_ACK, Kind.SUSPENDING}
    assert all(parse_body(kind, b"") is None for kind in set(Kind) - with_body)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (Kind.HELLO, b""),
        (Kind.HELLO, b"\x80"),
        (Kind.WELCOME, msgspec.msgpack.encode({"major": "1", "minor": 0})),
        (Kind.WELCOME, msgspec.msgpack.encode({"major": 1})),
        (Kind.STATE, msgspec.msgpack.encode({"device": "text", "ram_digest": ""})),
        (Kind.STATE, b"\x82\xa6device\xc6\xff\xff\xff\xff"),  # a promise of 4 GiB
        (Kind.RESUMED, msgspec.msgpack.encode([1, ""])),
        (Kind.RESUMED, msgspec.msgpack.encode({"generation": 1.5, "ram_digest": ""})),
        (Kind.ABORT, msgspec.msgpack.encode({"reason": None})),
        (Kind.ABORT, msgspec.msgpack.encode(Abort("")) + b"\x00"),
        (Kind.ABORT, b"\xc1"),
    ],
)
def test_a_body_that_is_not_of_its_kind_is_refused_by_its_kind(kind: Kind, data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=f"^{kind.name}: "):
        parse_body(kind, data)


@st.composite
def altered_bodies(draw: st.DrawFn) -> tuple[Kind, bytes]:
    kind, encoded = encode_body(draw(st.sampled_from(BODIES)))
    data = bytearray(encoded)
    for bit in draw(st.sets(st.integers(0, 8 * len(data) - 1), max_size=3)):
        data[bit // 8] ^= 1 << bit % 8
    return kind, bytes(data[: draw(st.none() | st.integers(0, len(data)))])


@given(altered_bodies() | st.tuples(st.sampled_from(Kind), st.binary(max_size=64)))
def test_any_bytes_are_a_body_of_their_kind_or_the_peers_fault(body: tuple[Kind, bytes]) -> None:
    kind, data = body
    try:
        parsed = parse_body(kind, data)
    except RemoteProtocolError:
        return
    assert (parsed is None) or encode_body(parsed)[0] is kind


def test_a_body_nested_too_deeply_is_the_peers_fault() -> None:
    with pytest.raises(RemoteProtocolError):
        parse_body(Kind.HELLO, b"\x81\xa1x" + b"\x91" * 4000 + b"\xc0")


def test_a_newer_minor_version_is_accepted_and_ours_is_spoken() -> None:
    assert negotiate(MAJOR, MINOR) == (MAJOR, MINOR)
    assert negotiate(MAJOR, MINOR + 5) == (MAJOR, MINOR)


@pytest.mark.parametrize("major", [MAJOR - 1, MAJOR + 1, 2**40])
def test_another_major_version_is_refused_and_both_are_named(major: int) -> None:
    with pytest.raises(RemoteProtocolError, match=rf"version {major}\.7, this host {MAJOR}\.{MINOR}"):
        negotiate(major, 7)


# ---------------------------------------------------------------- the state table

MESSAGES = {f"{direction} {kind.name}" for direction in ("send", "receive") for kind in Kind}
OWN_ACTS = {"resume", "claim", "claim lost", "lost"}
EVENTS = sorted(MESSAGES | OWN_ACTS)
roles = st.sampled_from(sorted(TABLE))


def reachable(role: str, state: str) -> set[str]:
    """The states that some events lead to from here, this one included."""
    seen, todo = {state}, [state]
    while todo:
        for following in TABLE[role].get(todo.pop(), {}).values():
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return seen


def session_in(role: str, state: str) -> Session:
    session = Session(role)
    session.state = state
    return session


@pytest.mark.parametrize("role", TABLE)
def test_the_table_has_no_event_or_state_that_nobody_knows(role: str) -> None:
    for state, events in TABLE[role].items():
        assert state not in FINAL, "nothing follows a final state"
        assert events
        assert events.keys() <= set(EVENTS)
        assert set(events.values()) <= TABLE[role].keys() | FINAL


@pytest.mark.parametrize("role", TABLE)
def test_every_state_can_be_reached_and_has_a_way_to_an_end(role: str) -> None:
    assert reachable(role, "new") == TABLE[role].keys() | FINAL
    for state in TABLE[role]:
        assert reachable(role, state) & FINAL


@pytest.mark.parametrize("role", TABLE)
def test_a_broken_connection_has_a_defined_end_wherever_the_peer_is_needed(role: str) -> None:
    for state, events in TABLE[role].items():
        if any(event in MESSAGES for event in events):
            assert "lost" in events, state


def test_from_the_point_of_no_return_no_event_leads_to_aborted() -> None:
    assert TABLE["destination"]["restoring"]["claim"] == "claimed"
    assert reachable("destination", "claimed") == {"claimed", "running", "done"}


def test_a_source_that_has_handed_over_is_never_aborted_by_silence() -> None:
    assert TABLE["source"]["handed_over"]["lost"] == "uncertain"
    assert TABLE["source"]["uncertain"] == {"claim": "aborted", "claim lost": "done"}
    assert "send ABORT" not in TABLE["source"]["handed_over"]


@pytest.mark.parametrize("role", TABLE)
@pytest.mark.parametrize("state", FINAL)
@pytest.mark.parametrize("event", EVENTS)
def test_nothing_happens_in_a_final_state(role: str, state: str, event: str) -> None:
    session = session_in(role, state)
    assert not session.may(event)
    with pytest.raises((InvalidTransition, RemoteProtocolError)):
        session.step(event)
    assert session.state == state


@given(roles, st.lists(st.sampled_from(EVENTS), max_size=60))
def test_any_sequence_of_events_leaves_a_state_of_the_table_or_is_refused(role: str, events: list[str]) -> None:
    session = Session(role)
    for event in events:
        before, allowed = session.state, session.may(event)
        if allowed:
            session.step(event)
            assert session.state == TABLE[role][before][event]
        else:
            # who is to blame: the peer for what was received, this side for the rest
            blamed = RemoteProtocolError if event.startswith("receive ") else InvalidTransition
            with pytest.raises(blamed, match=f"^{role} in state {before}: {event} is not allowed; before it: "):
                session.step(event)
            assert session.state == before
    assert session.state in TABLE[role].keys() | FINAL


@given(roles, st.data())
def test_a_walk_along_the_table_never_leaves_aborted_after_a_claim(role: str, data: st.DataObject) -> None:
    session = Session(role)
    walked: list[str] = []
    while session.state not in FINAL:
        assume(len(walked) < 200)
        walked.append(data.draw(st.sampled_from(sorted(TABLE[role][session.state]))))
        session.step(walked[-1])
    if role == "destination":
        assert (session.state == "done") == ("claim" in walked) == ("resume" in walked)


def test_an_invalid_transition_tells_the_story_so_far() -> None:
    session = Session("source")
    session.sending(Kind.HELLO)
    session.received(Header(Kind.WELCOME, 0, 0, 1, 0))
    for _ in range(500):
        session.sending(Kind.PAGES)
    with pytest.raises(InvalidTransition) as refusal:
        session.sending(Kind.STATE)
    assert str(refusal.value) == (
        "source in state precopy: send STATE is not allowed; before it: send HELLO -> receive WELCOME -> send PAGES"
    )
    assert isinstance(refusal.value, LocalProtocolError)
    with pytest.raises(InvalidTransition, match="destination in state new: claim is not allowed; before it: nothing"):
        Session("destination").step("claim")


def test_a_long_story_is_told_from_its_latest_events() -> None:
    session = session_in("source", "precopy")
    for number in range(1, 40):
        session.sending(Kind.PAGES)
        session.sending(Kind.ROUND_END)
        session.received(Header(Kind.ROUND_ACK, number, 0, number, 0))
    with pytest.raises(InvalidTransition) as refusal:
        session.step("claim")
    told = str(refusal.value).partition("before it: ")[2].split(" -> ")
    assert told == ["send PAGES", "send ROUND_END", "receive ROUND_ACK"] * 4


# ---------------------------------------------------------------- sequence numbers


def test_frames_are_numbered_from_1_in_each_direction() -> None:
    session = Session("source")
    assert session.sending(Kind.HELLO) == 1
    session.received(Header(Kind.WELCOME, 0, 0, 1, 0))
    assert [session.sending(Kind.PAGES), session.sending(Kind.ZERO), session.sending(Kind.ROUND_END)] == [2, 3, 4]
    session.received(Header(Kind.ROUND_ACK, 1, 0, 2, 0))


@given(st.integers(0, 5), st.integers(0, 2**64 - 1))
def test_a_frame_out_of_order_is_refused(before: int, sequence: int) -> None:
    assume(sequence != before + 1)
    session = session_in("destination", "receiving")
    for number in range(before):
        session.received(Header(Kind.PAGES, 1, 1, number + 1, PAGE + 8))
    with pytest.raises(RemoteProtocolError, match=f"PAGES is frame {sequence}, due was {before + 1}"):
        session.received(Header(Kind.PAGES, 1, 1, sequence, PAGE + 8))
    assert session.state == "receiving"


# ---------------------------------------------------------------- both sides together


class World(NamedTuple):
    """A source, a destination, what is under way between them, and who has claimed the next generation."""

    source: str
    destination: str
    to_destination: tuple[str, ...] = ()
    to_source: tuple[str, ...] = ()
    owner: str = ""


UNDER_WAY = 2  # messages: TCP keeps their order, so longer queues show nothing new


def successors(world: World) -> Iterator[tuple[str, World]]:
    """Everything that may happen next: either side acts, receives, or loses the connection."""
    for role, own, inbox, outbox in (
        ("source", world.source, "to_source", "to_destination"),
        ("destination", world.destination, "to_destination", "to_source"),
    ):
        waiting, sent = getattr(world, inbox), getattr(world, outbox)
        for event, following in TABLE[role].get(own, {}).items():
            verb, _, message = event.partition(" ")
            changes: dict = {role: following}
            if verb == "send":
                if len(sent) == UNDER_WAY:
                    continue
                changes[outbox] = (*sent, message)
            elif verb == "receive":
                if waiting[:1] != (message,):
                    continue
                changes[inbox] = waiting[1:]
            elif verb == "claim":
                if (event == "claim") == bool(world.owner):
                    continue  # exactly one claim of a generation succeeds
                changes["owner"] = world.owner or role
            yield f"{role}: {event}", world._replace(**changes)


def explore() -> dict[World, dict[str, World]]:
    """Every world that can come about, and what may happen in it."""
    worlds: dict[World, dict[str, World]] = {}
    todo = deque([World("new", "new")])
    while todo:
        world = todo.popleft()
        if world not in worlds:
            worlds[world] = dict(successors(world))
            todo.extend(worlds[world].values())
    return worlds


WORLDS = explore()


def test_the_vm_never_runs_at_both_ends_and_is_never_lost() -> None:
    ends = set()
    for world in WORLDS:
        at_source, at_destination = world.source == "aborted", world.destination in ("running", "done")
        assert not (at_source and at_destination), world
        if {world.source, world.destination} <= FINAL:
            assert at_source or at_destination, world
            ends.add((world.source, world.destination))
    assert ends == {("done", "done"), ("aborted", "aborted")}


def test_a_side_that_waits_for_the_other_never_gets_a_message_that_it_must_refuse() -> None:
    waits = {
        role: {state for state, events in table.items() if any(is_answer(event) for event in events)}
        for role, table in TABLE.items()
    }
    assert waits == {
        "source": {"greeting", "round_ended", "handed_over"},
        "destination": {"new", "receiving", "switching"},
    }
    for world, following in WORLDS.items():
        if world.source in waits["source"] and world.to_source:
            assert f"source: receive {world.to_source[0]}" in following, world
        if world.destination in waits["destination"] and world.to_destination:
            assert f"destination: receive {world.to_destination[0]}" in following, world


def is_answer(event: str) -> bool:
    return event.startswith("receive ") and event != "receive ABORT"


def test_without_a_fault_every_migration_can_be_completed() -> None:
    faults = ("lost", "ABORT")
    seen, todo = set(), [World("new", "new")]
    while todo:
        world = todo.pop()
        if world not in seen:
            seen.add(world)
            steps = {event: after for event, after in WORLDS[world].items() if not event.endswith(faults)}
            assert steps or (world.source, world.destination) == ("done", "done"), world
            todo += steps.values()
    assert any((world.source, world.destination) == ("done", "done") for world in seen)


def test_whatever_has_happened_both_sides_can_come_to_an_end() -> None:
    ended = {world for world in WORLDS if {world.source, world.destination} <= FINAL}
    before: dict[World, list[World]] = {}
    for world, following in WORLDS.items():
        for after in following.values():
            before.setdefault(after, []).append(world)
    todo = list(ended)
    while todo:
        for world in before.get(todo.pop(), []):
            if world not in ended:
                ended.add(world)
                todo.append(world)
    assert ended == WORLDS.keys()


# ---------------------------------------------------------------- streams, over real sockets

SILENCE_S = 0.1  # instead of the real time-out, where a test waits for it
HELLO = Hello(MAJOR, MINOR, "vm1-0badcafe", "token", 0)


@contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        caller = socket.create_connection(listener.getsockname())
        called, _ = listener.accept()
    with caller, called:
        yield caller, called


@contextmanager
def migration() -> Iterator[tuple[Stream, Stream]]:
    """A source and a destination that have greeted each other."""
    with (
        connection() as (caller, called),
        Stream(caller, Session("source")) as source,
        Stream(called, Session("destination")) as destination,
    ):
        source.send(HELLO)
        assert destination.expect(Kind.HELLO) == HELLO
        destination.send(Welcome(MAJOR, MINOR))
        source.expect(Kind.WELCOME)
        yield source, destination


@contextmanager
def memory(pages: int) -> Iterator[Ram]:
    ram = Ram.create("test", pages * PAGE)
    try:
        yield ram
    finally:
        ram.close()


def scribble(ram: Ram, pages: set[int]) -> None:
    """Something of its own in each page, not always in its first word."""
    for page in pages:
        ram.words[page, page % 512] = page + 1


def receive_round(stream: Stream, ram: Ram, hashes: PageHashes) -> list[Header]:
    """Frames of pages up to the end of the round, which is acknowledged."""
    headers = []
    while (header := stream.receive()[0]).kind is not Kind.ROUND_END:
        headers.append(header)
        stream.receive_pages(header, ram, hashes)
    stream.mark(Kind.ROUND_ACK, header.round)
    return headers


class Transfer(NamedTuple):
    sent: int
    zero: int
    frames: list[Header]


def transfer(source: Stream, destination: Stream, ram: Ram, copy: Ram, runs: np.ndarray) -> Transfer:
    """One round: these pages of `ram` into `copy`; the digests of what was noted at both ends are compared."""
    here, there = PageHashes(ram), PageHashes(copy)
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receive_round, destination, copy, there)
        sent, zero = source.send_runs(ram, runs, 1, here)
        source.mark(Kind.ROUND_END, 1)
        source.expect(Kind.ROUND_ACK)
        frames = receiving.result()
    assert here.digest() == there.digest()
    return Transfer(sent, zero, frames)


SMALL_RAM = 700  # pages: two chunks and a part
some_pages = st.sets(st.integers(0, SMALL_RAM - 1), max_size=40) | st.builds(
    lambda first, length, step: set(range(first, min(first + length, SMALL_RAM), step)),
    st.integers(0, SMALL_RAM - 1),
    st.integers(1, SMALL_RAM),
    st.integers(1, 3),
)


@settings(max_examples=50)
@given(some_pages, some_pages, some_pages)
@example(set(range(SMALL_RAM)), set(range(SMALL_RAM)), set())  # one run of several chunks
@example(set(range(0, SMALL_RAM, 2)), set(range(SMALL_RAM)), set())  # more runs than a chunk has pages
@example(set(), set(range(SMALL_RAM)), set(range(SMALL_RAM)))  # nothing but zero
def test_pages_arrive_byte_for_byte_and_no_others_change(written: set[int], chosen: set[int], old: set[int]) -> None:
    runs = runs_of(np.array(sorted(chosen), np.int64))
    with memory(SMALL_RAM) as ram, memory(SMALL_RAM) as copy, migration() as (source, destination):
        scribble(ram, written)
        copy.words[sorted(old), 7] = 0xDEAD
        expected = copy.bytes.copy()
        for page in chosen:
            expected[page * PAGE : (page + 1) * PAGE] = ram.bytes[page * PAGE : (page + 1) * PAGE]

        sent, zero, frames = transfer(source, destination, ram, copy, runs)

        assert np.array_equal(copy.bytes, expected)
        assert (sent, zero) == (len(chosen & written), len(chosen - written))
        assert sum(frame.pages for frame in frames if frame.kind is Kind.PAGES) == sent
        assert sum(frame.pages for frame in frames if frame.kind is Kind.ZERO) == zero
        assert all(frame.pages <= CHUNK_PAGES and frame.round == 1 for frame in frames)
        greeting = HEADER.size + len(encode_body(HELLO)[1])
        marked = HEADER.size
        assert source.bytes_sent == greeting + sum(HEADER.size + frame.length for frame in frames) + marked


def test_pages_arrive_through_the_narrowest_of_sockets() -> None:
    with memory(SMALL_RAM) as ram, memory(SMALL_RAM) as copy, migration() as (source, destination):
        source._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's minimum, 4.5 KiB
        scribble(ram, set(range(0, SMALL_RAM, 2)))
        assert transfer(source, destination, ram, copy, ram.populated()).sent == SMALL_RAM // 2
        assert np.array_equal(copy.bytes, ram.bytes)


@pytest.mark.parametrize("copies", [False, True])
def test_both_ends_agree_on_ram_after_rounds_in_which_pages_become_zero_and_others_are_written(copies: bool) -> None:
    with memory(SMALL_RAM) as ram, memory(SMALL_RAM) as copy, migration() as (source, destination):
        here, there = PageHashes(ram), PageHashes(copy)
        with ThreadPoolExecutor(1) as pool:
            for number in (1, 2, 3):
                ram.words[number * 100 : number * 100 + 300, number] = number
                ram.words[(number - 1) * 100 : number * 100] = 0
                receiving = pool.submit(receive_round, destination, copy, there)
                source.send_runs(ram, ram.populated(), number, here, copies=copies)
                source.mark(Kind.ROUND_END, number)
                source.expect(Kind.ROUND_ACK)
                receiving.result()
                assert np.array_equal(copy.bytes, ram.bytes)
                assert here.digest() == there.digest()
                real = PageHashes(ram)
                real.note(ram.populated(), ram.views(ram.populated()))
                assert here.digest() == real.digest()


class HashesWithAGuest(PageHashes):
    """The guest writes just before or just after its pages are hashed."""

    def __init__(self, ram: Ram, before: Callable[[], None], after: Callable[[], None]) -> None:
        super().__init__(ram)
        self._before, self._after = before, after

    def note(self, runs: np.ndarray, contents: list[memoryview]) -> None:
        self._before()
        super().note(runs, contents)
        self._after()


@pytest.mark.parametrize("moment", ["before they are copied", "before they are hashed", "before they are sent"])
@pytest.mark.parametrize("and_back", [True, False])
def test_pages_that_are_written_while_they_are_compared_and_sent_arrive_as_they_are_in_the_end(
    moment: str, and_back: bool
) -> None:
    with memory(8) as ram, memory(8) as copy, migration() as (source, destination):
        ram.words[:, 0] = 1

        def guest(at: str) -> Callable[..., None]:
            def write(*_: object) -> None:
                if at == moment:
                    ram.words[:, 1] ^= 1

            return write

        here = HashesWithAGuest(ram, guest("before they are hashed"), guest("before they are sent"))
        there, bitmap = PageHashes(copy), HashBitmap(ram)
        bitmap.begin(here)
        with ThreadPoolExecutor(1) as pool:
            receiving = pool.submit(receive_round, destination, copy, there)
            first = bitmap.take()
            source.send_runs(ram, first, 1, here, guest("before they are copied"), copies=bitmap.needs_copies)
            source.mark(Kind.ROUND_END, 1)
            source.expect(Kind.ROUND_ACK)
            receiving.result()
        if and_back:
            ram.words[:, 1] ^= 1
        for page in pages_of(bitmap.take()):
            copy.words[page] = ram.words[page]
        assert np.array_equal(copy.bytes, ram.bytes)


def test_a_migration_speaks_from_its_greeting_to_its_end() -> None:
    with memory(8) as ram, memory(8) as copy, migration() as (source, destination):
        scribble(ram, {1, 5})
        transfer(source, destination, ram, copy, ram.populated())
        source.mark(Kind.SUSPENDING, 2)
        assert destination.receive()[0].kind is Kind.SUSPENDING
        source.send(State(b"device", "digest"))
        assert destination.expect(Kind.STATE) == State(b"device", "digest")
        destination.session.step("claim")
        destination.session.step("resume")
        destination.send(Resumed(2, "digest"))
        assert source.expect(Kind.RESUMED) == Resumed(2, "digest")
        assert source.session.state == destination.session.state == "done"


def test_a_caller_that_stops_between_chunks_leaves_a_stream_that_can_be_aborted() -> None:
    heard = []

    def cancel(done: int) -> None:
        heard.append(done)
        if done:
            raise KeyboardInterrupt

    with memory(SMALL_RAM) as ram, memory(SMALL_RAM) as copy, migration() as (source, destination):
        scribble(ram, set(range(CHUNK_PAGES)))
        with ThreadPoolExecutor(1) as pool:
            receiving = pool.submit(receive_round, destination, copy, PageHashes(copy))
            with pytest.raises(KeyboardInterrupt):
                source.send_runs(ram, np.array([[0, SMALL_RAM]], np.uint32), 1, PageHashes(ram), cancel)
            source.abort("cancelled by a person")
            with pytest.raises(PeerAborted, match="cancelled by a person"):
                receiving.result()
        assert heard == [0, CHUNK_PAGES]
        assert source.session.state == destination.session.state == "aborted"
        assert np.array_equal(copy.bytes, ram.bytes), "the chunk before it arrived whole"


def test_an_abort_is_cut_to_what_its_frame_may_hold() -> None:
    with migration() as (source, destination):
        source.abort("é€😀" * 1000)
        with pytest.raises(PeerAborted) as heard:
            destination.receive()
        assert str(heard.value) == ("é€😀" * 1000)[:1000]


def test_an_abort_that_the_protocol_does_not_allow_is_not_sent() -> None:
    with migration() as (source, destination):
        destination.session.state = "claimed"  # beyond the point of no return
        destination.abort("too late")
        destination._socket.close()
        source.session.state = "handed_over"
        with pytest.raises(StreamLost, match="closed by the peer"):
            source.receive()
        assert destination.session.state == "claimed"


def test_an_abort_to_a_peer_that_is_gone_is_no_error() -> None:
    with migration() as (source, destination):
        destination._socket.close()
        source.session.state = "round_ended"
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
    with migration() as (source, destination):
        destination._socket.settimeout(SILENCE_S)
        with pytest.raises(StreamLost, match="the peer was silent"):
            destination.receive()
        source._socket.sendall(Header(Kind.ROUND_END, 1, 0, 2, 0).pack()[:10])
        with pytest.raises(StreamLost, match="the peer was silent"):
            destination.receive()


def test_a_peer_that_does_not_read_is_given_up() -> None:
    with memory(4096) as ram, migration() as (source, _):
        ram.words[:, 0] = 1
        source._socket.settimeout(SILENCE_S)
        source._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        with pytest.raises(StreamLost, match="while sending PAGES: the peer was silent"):
            source.send_runs(ram, ram.populated(), 1, PageHashes(ram))


# ---------------------------------------------------------------- streams from a broken or hostile peer

TINY_RAM = 32  # pages


def _frame(kind: Kind, sequence: int, body: bytes = b"", pages: int = 0) -> bytes:
    return Header(kind, 1, pages, sequence, len(body)).pack() + body


def _content(page: int) -> bytes:
    return bytes([page + 1]) * PAGE


STATE = State(b"device", "digest")
FRAMES = [
    _frame(Kind.HELLO, 1, encode_body(HELLO)[1]),
    _frame(Kind.ZERO, 2, table((3, 5)), pages=2),
    _frame(Kind.PAGES, 3, table((0, 2), (7, 8)) + _content(0) + _content(1) + _content(7), pages=3),
    _frame(Kind.ROUND_END, 4),
    _frame(Kind.SUSPENDING, 5),
    _frame(Kind.PAGES, 6, table((31, 32)) + _content(31), pages=1),
    _frame(Kind.STATE, 7, encode_body(STATE)[1]),
]
HONEST = b"".join(FRAMES)
STARTS = [sum(len(frame) for frame in FRAMES[:number]) for number in range(len(FRAMES))]


class Received(NamedTuple):
    error: type[BaseException]
    message: str
    state: str
    ram: bytes
    elapsed_s: float
    peak_bytes: int  # of Python's and numpy's memory


def deliver(data: bytes, then_silent: bool = False) -> Received:
    """What a destination makes of these bytes from its peer, which then closes or falls silent."""

    def write(sock: socket.socket) -> None:
        with suppress(OSError):  # the destination may have had enough
            sock.sendall(data)
            if not then_silent:
                sock.shutdown(socket.SHUT_WR)

    with memory(TINY_RAM) as ram, connection() as (caller, called), ThreadPoolExecutor(1) as pool:
        ram.bytes[:] = 0xEE
        stream = Stream(called, Session("destination"))
        called.settimeout(SILENCE_S)
        pool.submit(write, caller)
        tracemalloc.start()
        began = time.monotonic()
        try:
            with stream:
                _serve(stream, ram, PageHashes(ram))
        except (ProtocolError, StreamLost, PeerAborted) as error:
            peak_bytes, elapsed_s = tracemalloc.get_traced_memory()[1], time.monotonic() - began
            content = ram.bytes.tobytes()
            return Received(type(error), str(error), stream.session.state, content, elapsed_s, peak_bytes)
        finally:
            tracemalloc.stop()
    raise AssertionError("a stream has no end without an error")


def _serve(stream: Stream, ram: Ram, hashes: PageHashes) -> None:
    """A destination's part, for ever."""
    stream.expect(Kind.HELLO)
    stream.send(Welcome(MAJOR, MINOR))
    while True:
        header, _ = stream.receive()
        if header.kind in (Kind.PAGES, Kind.ZERO):
            stream.receive_pages(header, ram, hashes)
        elif header.kind is Kind.ROUND_END:
            stream.mark(Kind.ROUND_ACK, header.round)


def test_an_honest_stream_is_received_to_its_end() -> None:
    received = deliver(HONEST)
    assert received.error is StreamLost, "then the peer closed"
    assert received.state == "restoring"
    pages = {0: _content(0), 1: _content(1), 3: bytes(PAGE), 4: bytes(PAGE), 7: _content(7), 31: _content(31)}
    assert received.ram == b"".join(pages.get(page, b"\xee" * PAGE) for page in range(TINY_RAM))


@settings(max_examples=30)
@given(st.integers(0, len(HONEST) - 1) | st.sampled_from(STARTS), st.booleans())
def test_a_stream_that_ends_early_is_lost_and_nothing_waits_for_it(length: int, then_silent: bool) -> None:
    received = deliver(HONEST[:length], then_silent)
    assert received.error is StreamLost
    assert ("silent" if then_silent else "closed by the peer") in received.message
    assert received.elapsed_s < 20 * SILENCE_S


class Damage(NamedTuple):
    """At this place so many bytes are gone, and these are there instead."""

    at: int
    gone: int
    instead: bytes

    def to(self, data: bytes) -> bytes:
        return data[: self.at] + self.instead + data[self.at + self.gone :]


anywhere = st.integers(0, len(HONEST) - 1)
in_a_header_or_table = st.builds(int.__add__, st.sampled_from(STARTS), st.integers(0, HEADER.size + 15))
damages = (
    st.builds(Damage, anywhere | in_a_header_or_table, st.just(1), st.binary(min_size=1, max_size=1))
    | st.builds(Damage, in_a_header_or_table, st.just(4), st.integers(0, 2**32 - 1).map(lambda n: n.to_bytes(4, "big")))
    | st.builds(Damage, anywhere, st.integers(0, 2 * PAGE), st.binary(max_size=32))
    | st.builds(Damage, st.sampled_from(STARTS), st.just(0), st.sampled_from(FRAMES))
)


@settings(max_examples=300)
@given(st.lists(damages, min_size=1, max_size=3))
def test_a_damaged_stream_ends_at_once_by_a_named_error_and_within_bounds_of_memory(damage: list[Damage]) -> None:
    data = HONEST
    for one in damage:
        data = one.to(data)
    received = deliver(data)
    assert received.message
    assert received.elapsed_s < 20 * SILENCE_S
    assert received.peak_bytes < LIMITS[Kind.STATE] + 16 * MIB


@given(st.binary(max_size=100) | st.binary(max_size=60).map(lambda rest: FRAMES[0] + b"VMOT" + rest))
def test_noise_ends_a_stream_at_once_by_a_named_error(data: bytes) -> None:
    received = deliver(data)
    assert received.error in (RemoteProtocolError, StreamLost)
    assert received.elapsed_s < 20 * SILENCE_S


@pytest.mark.parametrize("kind", Kind)
def test_a_frame_beyond_its_limit_is_refused_before_any_memory_is_set_aside(kind: Kind) -> None:
    pages = CHUNK_PAGES if kind is Kind.PAGES else 0
    received = deliver(FRAMES[0] + HEADER.pack(b"VMOT", kind, 0, 1, pages, 2, LIMITS[kind] + 1))
    assert received.error is RemoteProtocolError
    assert f"{kind.name} of {LIMITS[kind] + 1} bytes" in received.message
    assert received.peak_bytes < MIB


def test_a_frame_that_is_not_due_is_refused_before_any_memory_is_set_aside() -> None:
    received = deliver(HEADER.pack(b"VMOT", Kind.STATE, 0, 0, 0, 1, LIMITS[Kind.STATE]))
    assert "destination in state new: receive STATE is not allowed" in received.message
    assert received.peak_bytes < MIB


@pytest.mark.parametrize("runs", [((31, 33),), ((0, 2), (1, 2)), ((2, 1), (0, 4))])
def test_pages_beyond_ram_or_out_of_order_change_nothing(runs: tuple[tuple[int, int], ...]) -> None:
    received = deliver(FRAMES[0] + _frame(Kind.PAGES, 2, table(*runs) + 3 * _content(0), pages=3))
    assert received.error is RemoteProtocolError
    assert received.ram == b"\xee" * (TINY_RAM * PAGE)


def test_ram_can_be_given_back_while_the_loss_of_its_stream_is_handled() -> None:
    ram = Ram.create("test", TINY_RAM * PAGE)
    with migration() as (source, destination):
        cut = Header(Kind.PAGES, 1, 2, 2, 8 + 2 * PAGE).pack() + table((0, 2)) + bytes(100)
        source._socket.sendall(cut)
        source._socket.close()
        header, _ = destination.receive()
        try:
            destination.receive_pages(header, ram, PageHashes(ram))
        except StreamLost:
            ram.close()  # as the agent does when an incoming migration has failed
