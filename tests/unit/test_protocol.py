"""The vMotion protocol's messages: headers, tables of runs, hashes, bitmaps, bodies and versions."""

import tracemalloc
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pairs import LIMITS, MIB, table

from hosts.protocol import (
    CHUNK_PAGES,
    HEADER,
    MAJOR,
    MAX_RAM_PAGES,
    MINOR,
    PACKED,
    PLAIN,
    Abort,
    AllSent,
    Complete,
    Flag,
    Header,
    Hello,
    Join,
    Kind,
    RemoteProtocolError,
    Resumed,
    State,
    Welcome,
    encode_bitmap,
    encode_body,
    encode_hashes,
    encode_page,
    encode_runs,
    negotiate,
    parse_bitmap,
    parse_body,
    parse_hashes,
    parse_header,
    parse_page,
    parse_runs,
)
from hosts.ram import PAGE, runs_of

DIGEST = "d41d8cd98f00b204e9800998ecf8427e"
BODIES: list[msgspec.Struct] = [
    Hello(MAJOR, MINOR, "vm1-0badcafe", "0123456789abcdef" * 2, 512 * MIB),
    Join(MAJOR, MINOR, "vm1-0badcafe", "0123456789abcdef" * 2, "faults"),
    Welcome(1, 0),
    State(b"\x00\xff" * 100, DIGEST),
    Resumed(7, DIGEST),
    AllSent(DIGEST),
    Complete(DIGEST, 3, [120.5, 80.0, 1e6]),
    Abort("the disk is full"),
]


# ---------------------------------------------------------------- headers

words = st.integers(0, 2**32 - 1)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Any header that a well-behaved peer may send."""
    kind = draw(st.sampled_from(Kind))
    flags, pages, runs, length = PLAIN, 0, 0, draw(st.integers(0, LIMITS[kind]))
    if kind is Kind.PAGES:
        flags = draw(st.sampled_from([PLAIN, Flag.ZSTD, Flag.LZ4])) | draw(st.sampled_from([PLAIN, Flag.HASHED]))
        pages = draw(st.integers(1, CHUNK_PAGES))
        runs = draw(st.integers(1, pages))
        content = draw(st.integers(1, pages * PAGE - 1)) if flags & PACKED else pages * PAGE
        length = 8 * runs + (8 * pages if Flag.HASHED in flags else 0) + content
    elif kind is Kind.SUSPENDING:
        flags = draw(st.sampled_from([PLAIN, Flag.SHORT]))
    elif kind in (Kind.ZERO, Kind.FETCH):
        runs = draw(st.integers(1, LIMITS[kind] // 8))
        pages = draw(st.integers(runs, 2**32 - 1))
        length = 8 * runs
    return Header(kind, draw(st.integers(0, 2**16 - 1)), pages, runs, draw(st.integers(0, 2**64 - 1)), length, flags)


def test_a_header_is_laid_out_as_documented() -> None:
    header = Header(Kind.PAGES, round=2, pages=3, runs=2, sequence=4, length=3 * PAGE + 16 + 24, flags=Flag.HASHED)
    assert header.pack().hex(" ", 4) == "564d4f54 03040002 00000003 00000002 00000000 00000004 00003028"
    assert HEADER.size == 28
    assert (header.table_bytes, header.hash_bytes, header.content_bytes) == (16, 24, 3 * PAGE)


@given(headers())
def test_a_header_comes_back_as_it_was_packed(header: Header) -> None:
    assert parse_header(header.pack()) == header


@st.composite
def altered_headers(draw: st.DrawFn) -> bytes:
    """A header with one to three of its bits turned round, or one of its fields at an edge."""
    data = bytearray(draw(headers()).pack())
    for bit in draw(st.sets(st.integers(0, 8 * len(data) - 1), max_size=3)):
        data[bit // 8] ^= 1 << bit % 8
    at = draw(st.none() | st.sampled_from(range(0, HEADER.size, 4)))
    if at is not None:
        data[at : at + 4] = draw(st.sampled_from([0, 1, 256, 257, 2**31, 2**32 - 1])).to_bytes(4, "big")
    return bytes(data)


noise = st.builds(
    lambda kind, rest: b"VMOT" + bytes([kind]) + rest, st.integers(0, 20), st.binary(min_size=23, max_size=23)
)


@given(altered_headers() | noise)
@example(bytes(28))
@example(b"\xff" * 28)
def test_any_28_bytes_are_a_header_within_its_limits_or_the_peers_fault(data: bytes) -> None:
    try:
        header = parse_header(data)
    except RemoteProtocolError:
        return
    assert header.pack() == data
    assert 0 <= header.length <= LIMITS[header.kind]
    assert header.table_bytes + header.hash_bytes + header.content_bytes == header.length
    if header.kind is Kind.PAGES:
        assert 1 <= header.runs <= header.pages <= CHUNK_PAGES
        assert header.flags & PACKED in (PLAIN, Flag.ZSTD, Flag.LZ4)
        assert 0 < header.content_bytes <= header.pages * PAGE
        assert (header.content_bytes == header.pages * PAGE) == (header.flags & PACKED == PLAIN)
        assert header.hash_bytes == (8 * header.pages if Flag.HASHED in header.flags else 0)
    elif header.kind in (Kind.ZERO, Kind.FETCH):
        assert header.table_bytes == header.length > 0
        assert header.pages >= header.runs
    else:
        assert header.pages == header.runs == 0
    if header.flags & Flag.SHORT:
        assert header.kind is Kind.SUSPENDING
    if header.flags & ~Flag.SHORT:
        assert header.kind is Kind.PAGES


HASHED, ZSTD, LZ4 = Flag.HASHED, Flag.ZSTD, Flag.LZ4
WHOLE = 2 * PAGE


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ((b"GET ", 1, 0, 0, 0, 0, 1, 20), "does not speak the vMotion protocol: frame starts with b'GET '"),
        ((b"VMOT", 0, 0, 0, 0, 0, 1, 0), "unknown message kind 0"),
        ((b"VMOT", 16, 0, 0, 0, 0, 1, 0), "unknown message kind 16"),
        ((b"VMOT", Kind.HELLO, 0x80, 0, 0, 0, 1, 20), "HELLO with unknown flags 0x80"),
        ((b"VMOT", Kind.STATE, HASHED, 0, 0, 0, 1, 20), "STATE with unknown flags 0x4"),
        ((b"VMOT", Kind.ZERO, ZSTD, 0, 1, 1, 1, 8), "ZERO with unknown flags 0x1"),
        ((b"VMOT", Kind.PAGES, 8, 0, 2, 1, 1, WHOLE + 8), "PAGES with unknown flags 0x8"),
        ((b"VMOT", Kind.SUSPENDING, HASHED, 0, 0, 0, 1, 0), "SUSPENDING with unknown flags 0x4"),
        ((b"VMOT", Kind.ROUND_END, 8, 0, 0, 0, 1, 0), "ROUND_END with unknown flags 0x8"),
        ((b"VMOT", Kind.PAGES, ZSTD | LZ4, 0, 2, 1, 1, 100), "PAGES with unknown flags 0x3"),
        ((b"VMOT", Kind.HELLO, 0, 0, 0, 0, 1, 4097), "HELLO of 4097 bytes; at most 4096"),
        ((b"VMOT", Kind.STATE, 0, 0, 0, 0, 1, 2**32 - 1), "STATE of 4294967295 bytes"),
        ((b"VMOT", Kind.BITMAP, 0, 0, 0, 0, 1, 16 * MIB + 1), "BITMAP of 16777217 bytes"),
        ((b"VMOT", Kind.ROUND_END, 0, 1, 0, 0, 1, 1), "ROUND_END of 1 bytes"),
        ((b"VMOT", Kind.ROUND_ACK, 0, 1, 5, 0, 1, 0), "ROUND_ACK with 5 pages"),
        ((b"VMOT", Kind.STATE, 0, 0, 1, 0, 1, 20), "STATE with 1 pages"),
        ((b"VMOT", Kind.BITMAP, 0, 0, 0, 3, 1, 20), "BITMAP with 0 pages in 3 runs"),
        ((b"VMOT", Kind.PAGES, 0, 1, 0, 0, 1, 0), f"PAGES with 0 pages in 0 runs; 1 to {CHUNK_PAGES}"),
        ((b"VMOT", Kind.PAGES, 0, 1, CHUNK_PAGES + 1, 1, 1, PAGE), f"PAGES with {CHUNK_PAGES + 1} pages"),
        ((b"VMOT", Kind.PAGES, 0, 1, 2, 0, 1, WHOLE), "PAGES with 2 pages in 0 runs"),
        ((b"VMOT", Kind.PAGES, 0, 1, 2, 3, 1, WHOLE + 24), "PAGES with 2 pages in 3 runs"),  # a run for no page
        ((b"VMOT", Kind.PAGES, 0, 1, 2, 1, 1, PAGE + 8), "cannot hold 2 pages"),
        ((b"VMOT", Kind.PAGES, 0, 1, 2, 1, 1, WHOLE + 12), "cannot hold 2 pages"),
        ((b"VMOT", Kind.PAGES, 0, 1, 2, 1, 1, 4), "cannot hold 2 pages"),  # less than the table alone
        ((b"VMOT", Kind.PAGES, HASHED, 0, 2, 1, 1, WHOLE + 8), "cannot hold 2 pages"),  # no hashes
        ((b"VMOT", Kind.PAGES, ZSTD, 0, 2, 1, 1, WHOLE + 8), "cannot hold 2 pages"),  # packed, and no smaller
        ((b"VMOT", Kind.PAGES, LZ4, 0, 2, 1, 1, 8), "cannot hold 2 pages"),  # packed into nothing
        ((b"VMOT", Kind.ZERO, 0, 1, 1, 0, 1, 0), "ZERO of 0 bytes with 1 pages in 0 runs"),
        ((b"VMOT", Kind.ZERO, 0, 1, 1, 1, 1, 12), "ZERO of 12 bytes"),
        ((b"VMOT", Kind.ZERO, 0, 1, 1, 2, 1, 16), "ZERO of 16 bytes with 1 pages in 2 runs"),
        ((b"VMOT", Kind.FETCH, 0, 1, 2, 2, 1, 16), "FETCH of 16 bytes; at most 8"),
        ((b"VMOT", Kind.FETCH, 0, 1, 0, 1, 1, 8), "FETCH of 8 bytes with 0 pages"),
    ],
)
def test_a_header_that_cannot_be_is_refused_by_its_reason(fields: tuple, why: str) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        parse_header(HEADER.pack(*fields))
    assert why in str(refusal.value)


# ---------------------------------------------------------------- tables of runs, single pages

RAM_PAGES = 1000
page_sets = st.sets(st.integers(0, RAM_PAGES - 1)) | st.builds(
    lambda first, length: set(range(first, min(first + length, RAM_PAGES))),
    st.integers(0, RAM_PAGES - 1),
    st.integers(1, RAM_PAGES),
)


@given(page_sets)
def test_a_table_of_runs_comes_back_as_it_was_encoded(pages: set[int]) -> None:
    runs = runs_of(np.array(sorted(pages), np.int64))
    parsed = parse_runs(memoryview(encode_runs(runs)), len(pages), RAM_PAGES)
    assert parsed.dtype == np.uint32
    assert parsed.tolist() == runs.tolist()


edges = st.integers(0, RAM_PAGES + 2) | words
tables = st.lists(st.tuples(edges, edges), max_size=8) | st.lists(edges, max_size=8, unique=True).map(
    lambda edges: list(zip(*[iter(sorted(edges))] * 2, strict=False))
)


@given(tables, st.integers(-1, 1), words | st.none())
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


@given(st.integers(0, RAM_PAGES - 1))
def test_a_single_page_is_a_table_of_one_run(page: int) -> None:
    header = Header(Kind.FETCH, 0, 1, 1, 1, 8)
    assert parse_runs(encode_page(page), 1, RAM_PAGES).tolist() == [[page, page + 1]]
    assert parse_page(header, memoryview(encode_page(page)), RAM_PAGES) == page


@given(st.tuples(edges, edges) | edges.map(lambda first: (first, first + 1)), st.integers(1, 3) | words)
@example((RAM_PAGES - 1, RAM_PAGES), 1)
@example((RAM_PAGES, RAM_PAGES + 1), 1)
@example((2**32 - 1, 0), 1)
def test_a_single_page_is_within_ram_or_the_peers_fault(run: tuple[int, int], pages: int) -> None:
    first, end = run[0], run[1] % 2**32
    header = Header(Kind.FETCH, 0, pages, 1, 1, 8)
    if pages == 1 and end == first + 1 and end <= RAM_PAGES:
        assert parse_page(header, table((first, end)), RAM_PAGES) == first
    else:
        with pytest.raises(RemoteProtocolError, match=rf"FETCH of one page has pages {first} to {end}; RAM has 1000"):
            parse_page(header, table((first, end)), RAM_PAGES)


# ---------------------------------------------------------------- hashes and bitmaps


@given(st.lists(st.integers(0, 2**64 - 1), max_size=CHUNK_PAGES))
def test_hashes_come_back_as_they_were_encoded_the_high_byte_first(hashes: list[int]) -> None:
    encoded = encode_hashes(np.array(hashes, np.uint64))
    assert encoded == b"".join(value.to_bytes(8, "big") for value in hashes)
    assert parse_hashes(memoryview(encoded)).tolist() == hashes


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_a_bitmap_comes_back_as_it_was_encoded(mask: list[bool]) -> None:
    encoded = encode_bitmap(np.array(mask))
    parsed = parse_bitmap(encoded, len(mask))
    assert parsed.dtype == bool
    assert parsed.tolist() == mask
    assert len(encoded) <= LIMITS[Kind.BITMAP]


def test_a_bitmap_has_the_first_page_in_its_highest_bit() -> None:
    assert encode_bitmap(np.array([True] + 8 * [False] + [True])) == b"\x80\x40"


def test_a_bitmap_of_the_largest_ram_fits_into_its_frame() -> None:
    assert len(encode_bitmap(np.ones(MAX_RAM_PAGES, bool))) == LIMITS[Kind.BITMAP]


@given(st.binary(max_size=8), st.integers(1, 60))
@example(b"\xff", 7)
@example(b"\xff", 8)
@example(b"\xff\x80", 9)
@example(b"\xff\x40", 9)
def test_any_bitmap_names_pages_of_ram_alone_or_is_the_peers_fault(data: bytes, ram_pages: int) -> None:
    bits = "".join(f"{byte:08b}" for byte in data)
    if len(data) == -(-ram_pages // 8) and "1" not in bits[ram_pages:]:
        assert parse_bitmap(data, ram_pages).tolist() == [bit == "1" for bit in bits[:ram_pages]]
    else:
        with pytest.raises(RemoteProtocolError, match=rf"RAM.* has {ram_pages} pages|beyond RAM's {ram_pages}"):
            parse_bitmap(data, ram_pages)


# ---------------------------------------------------------------- bodies and versions


def test_every_kind_of_message_is_either_a_body_or_none() -> None:
    with_body = {encode_body(body)[0] for body in BODIES}
    raw = {Kind.PAGES, Kind.ZERO, Kind.FETCH, Kind.BITMAP}
    assert set(Kind) - with_body == raw | {Kind.ROUND_END, Kind.ROUND_ACK, Kind.SUSPENDING}
    assert all(parse_body(kind, b"") is None for kind in set(Kind) - with_body)
    assert LIMITS.keys() == set(Kind)


numbers = st.integers(-(2**63), 2**64 - 1)
any_bodies: st.SearchStrategy[msgspec.Struct] = st.one_of(
    st.builds(Hello, numbers, numbers, st.text(), st.text(), numbers, st.text()),
    st.builds(Join, numbers, numbers, st.text(), st.text(), st.sampled_from(["pages", "faults"])),
    st.builds(Welcome, numbers, numbers),
    st.builds(State, st.binary(), st.text()),
    st.builds(Resumed, numbers, st.text()),
    st.builds(AllSent, st.text()),
    st.builds(Complete, st.text(), numbers, st.lists(st.floats(allow_nan=False))),
    st.builds(Abort, st.text()),
)


@given(any_bodies)
@example(BODIES[0])
def test_a_body_comes_back_as_it_was_encoded(body: msgspec.Struct) -> None:
    kind, data = encode_body(body)
    assert kind.name.replace("_", "") == type(body).__name__.upper()
    assert parse_body(kind, data) == body


def test_the_waits_of_a_busy_guest_fit_into_their_frame() -> None:
    assert len(encode_body(Complete(DIGEST, 2**40, [1e300] * 10_000))[1]) <= LIMITS[Kind.COMPLETE]


def test_a_greeting_without_a_mode_is_one_of_pre_copy() -> None:
    old = {"major": 2, "minor": 0, "migration": "vm1-0", "token": "t", "ram_bytes": 4096}
    assert parse_body(Kind.HELLO, msgspec.msgpack.encode(old)).mode == "precopy"


def test_a_newer_peer_may_say_more_than_we_know() -> None:
    newer = {"major": 2, "minor": 9, "migration": "vm1-0", "token": "t", "ram_bytes": 4096, "numa": [1, 2]}
    assert parse_body(Kind.HELLO, msgspec.msgpack.encode(newer)) == Hello(2, 9, "vm1-0", "t", 4096)


def packed(fields: Any) -> bytes:
    return msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (Kind.HELLO, b""),
        (Kind.HELLO, b"\x80"),
        (Kind.WELCOME, packed({"major": "1", "minor": 0})),
        (Kind.WELCOME, packed({"major": 1})),
        (Kind.JOIN, packed({"major": 2, "minor": 0, "migration": "m", "token": "t", "purpose": "gossip"})),
        (Kind.STATE, packed({"device": "text", "ram_digest": ""})),
        (Kind.STATE, b"\x82\xa6device\xc6\xff\xff\xff\xff"),  # a promise of 4 GiB
        (Kind.RESUMED, packed([1, ""])),
        (Kind.RESUMED, packed({"generation": 1.5, "ram_digest": ""})),
        (Kind.ALL_SENT, packed({"ram_digest": b"bytes"})),
        (Kind.COMPLETE, packed({"ram_digest": "", "faults": 1, "fault_us": [1.0, "long"]})),
        (Kind.COMPLETE, b"\x83\xaaram_digest\xa0\xa6faults\x01\xa8fault_us\xdd\xff\xff\xff\xff"),  # 4 Gi numbers
        (Kind.ABORT, packed({"reason": None})),
        (Kind.ABORT, packed(Abort("")) + b"\x00"),
        (Kind.ABORT, b"\x81\xa6reason\xa2\xff\xff"),  # no UTF-8
        (Kind.ABORT, b"\xc1"),
    ],
)
def test_a_body_that_is_not_of_its_kind_is_refused_by_its_kind_and_costs_no_memory(kind: Kind, data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match=f"^{kind.name}: "):
            parse_body(kind, data)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


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


@pytest.mark.parametrize("major", [MAJOR - 1, MAJOR + 1, 0, -1, 2**40])
def test_another_major_version_is_refused_and_both_are_named(major: int) -> None:
    with pytest.raises(RemoteProtocolError, match=rf"version {major}\.7, this host {MAJOR}\.{MINOR}; update"):
        negotiate(major, 7)


@given(numbers, numbers)
def test_any_version_ends_in_one_that_both_speak_or_is_refused(major: int, minor: int) -> None:
    if major == MAJOR and minor >= 0:
        assert negotiate(major, minor) == (MAJOR, min(minor, MINOR))
        return
    with pytest.raises(RemoteProtocolError, match=rf"version {major}\.{minor}"):
        negotiate(major, minor)
