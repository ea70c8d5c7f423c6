"""The vMotion stream: messages, framing, versions, limits and the state table. Pure: no socket, clock or thread.

    source                                          destination
    new          -- HELLO version, token ------->   new
    greeting                                        greeted
    precopy      <------ WELCOME version --------   receiving
    precopy      -- BITMAP round 0 -------------->  receiving          pages that exist: memory for them
    precopy      -- PAGES, ZERO ----------------->  receiving          round 1..n, none for stop-and-copy
    round_ended  -- ROUND_END ------------------->  round_ended
    precopy      <------ ROUND_ACK --------------   receiving
    suspended    -- SUSPENDING ------------------>  switching          gate shut, guest stopped

    pre-copy's ending: the rest of RAM first
    suspended    -- PAGES, ZERO ----------------->  switching          the residual
    handed_over  -- STATE devices, TCP, digest -->  restoring          RAM checked, sockets restored
                                                    claimed            (claim)  <== POINT OF NO RETURN
                                                    running            (resume: gate open, guest runs)
    done         <------ RESUMED ----------------   done

    post-copy's ending: the bitmap first
    listed       -- BITMAP ---------------------->  listed             of the pages that are still to come
    entrusted    -- STATE devices, TCP, digest -->  rebuilding         what has come checked, sockets restored
                                                    owned              (claim)  <== POINT OF NO RETURN
                                                    resumed            (resume)
    serving      <------ RESUMED ----------------   filling
    serving      -- PAGES, ZERO ----------------->  filling            pushed in the background
    served       -- ALL_SENT digest ------------->  filled
    done         <------ COMPLETE digest --------   done               RAM whole and equal

ABORT goes either way up to `handed_over` / `entrusted` and `restoring` / `rebuilding`. A source that has
handed over and hears no more is `uncertain` (`doubtful`): the datastore tells (it claims the next
generation itself; if that succeeds, the destination never can). Restoring comes before the claim because
nothing of it shows outside while the port is dark: whatever fails there still ends with the source resumed.
While pages are still to come after the point of no return, the VM needs both hosts: if they lose each
other then, it is `lost` and has to be started again (cold), as with every post-copy.

Further connections of a migration carry pages (--streams) or the pages that the resumed guest waits for:

    sender (source)                                 receiver (destination)
    new          -- JOIN token, purpose --------->  new
    joining                                         joined
    streaming    <------ WELCOME ----------------   streaming
    streaming    -- PAGES, ZERO ----------------->  streaming
    round_ended  -- ROUND_END ------------------->  round_ended
    streaming    <------ ROUND_ACK --------------   streaming
    streaming    <------ FETCH ------------------   streaming          this page next: a fault waits
    streaming    -- PAGES, ZERO ----------------->  streaming

A frame is a 28-byte header (big endian) and a body:

    magic "VMOT" | kind u8 | flags u8 | round u16 | pages u32 | runs u32 | sequence u64 | length u32

`sequence` counts the frames of a direction. PAGES: the body is a table of runs (u32 first, u32 end, in
pages), with the flag HASHED an xxh3 (u64) of each page, then the pages themselves, packed if the flags
say so. ZERO, FETCH: the table alone. BITMAP: one bit for each page of RAM. SUSPENDING: nothing; with the
flag SHORT little is left to do, and the receiver may hurry. The others: msgpack.
"""

import enum
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from hosts.ram import NO_RUNS, PAGE, count
from topologies.errors import TestbedError

PORT = 8000  # VMware's vMotion port
MAJOR, MINOR = 4, 0
MAGIC = b"VMOT"
HEADER = struct.Struct("!4sBBHIIQI")
# 3 MiB: long against the cost of a frame (256 pages reach 0.72 of iperf3 unshaped, these 0.78 to 0.83), short against
# every time-out; scattered pages are as many buffers, and sendmsg(2) takes 1024
CHUNK_PAGES = 768
RUN_BYTES, HASH_BYTES = 8, 8
_RUN, _HASH = np.dtype(">u4"), np.dtype(">u8")
_RUN_OF, HASH_OF = struct.Struct("!II"), struct.Struct("!Q")
MAX_RAM_PAGES = 1 << 27  # 512 GiB; its bitmap has 16 MiB


class ProtocolError(TestbedError):
    """The stream is broken; the migration ends, the VM stays where it may run."""


class LocalProtocolError(ProtocolError):
    """We were about to do something that the state table does not allow: a bug on this side."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something that it may not."""


class Kind(enum.IntEnum):
    HELLO = 1
    WELCOME = 2
    PAGES = 3
    ZERO = 4
    ROUND_END = 5
    ROUND_ACK = 6
    STATE = 7
    RESUMED = 8
    ABORT = 9
    SUSPENDING = 10
    JOIN = 11
    BITMAP = 12
    FETCH = 13
    ALL_SENT = 14
    COMPLETE = 15


class Flag(enum.IntFlag):
    """Of PAGES: how the pages are packed, and whether their hashes are there (only a guest that is stopped has any).

    Of SUSPENDING: little is left to do, so that everything else may stand still for it.
    """

    ZSTD = 1
    LZ4 = 2
    HASHED = 4
    SHORT = 8


PLAIN, PACKED = Flag(0), Flag.ZSTD | Flag.LZ4
_FLAGS = {Kind.PAGES: PACKED | Flag.HASHED, Kind.SUSPENDING: Flag.SHORT}


class Hello(msgspec.Struct, frozen=True):
    major: int
    minor: int
    migration: str
    token: str  # given out by the destination when it prepared; binds this stream to that migration
    ram_bytes: int
    mode: str = "precopy"


class Join(msgspec.Struct, frozen=True):
    """A further connection of a migration; `purpose` is "pages" or "faults"."""

    major: int
    minor: int
    migration: str
    token: str
    purpose: Literal["pages", "faults"]


class Welcome(msgspec.Struct, frozen=True):
    major: int
    minor: int


class State(msgspec.Struct, frozen=True):
    """Everything but RAM, and the digest that RAM must have, missing pages as zero (hosts/ram.py, PageHashes)."""

    device: bytes
    ram_digest: str


class Resumed(msgspec.Struct, frozen=True):
    generation: int
    ram_digest: str


class AllSent(msgspec.Struct, frozen=True):
    """Every page of the bitmap has left, on this or on the other connection; RAM must have this digest then."""

    ram_digest: str


class Complete(msgspec.Struct, frozen=True):
    """RAM is whole at the destination; `fault_us` is what the guest's accesses to missing pages took, if it knows."""

    ram_digest: str
    faults: int
    fault_us: list[float]


class Abort(msgspec.Struct, frozen=True):
    reason: str


# The most that a body may hold. STATE carries the TCP queues of every connection of the guest.
_MAX_BODY = {
    Kind.HELLO: 4096,
    Kind.WELCOME: 4096,
    Kind.PAGES: CHUNK_PAGES * (PAGE + RUN_BYTES + HASH_BYTES),
    Kind.ZERO: CHUNK_PAGES * RUN_BYTES,
    Kind.ROUND_END: 0,
    Kind.ROUND_ACK: 0,
    Kind.STATE: 128 << 20,
    Kind.RESUMED: 4096,
    Kind.ABORT: 4096,
    Kind.SUSPENDING: 0,
    Kind.JOIN: 4096,
    Kind.BITMAP: MAX_RAM_PAGES // 8,
    Kind.FETCH: RUN_BYTES,
    Kind.ALL_SENT: 4096,
    Kind.COMPLETE: 1 << 20,
}
_BODIES: dict[Kind, type[msgspec.Struct]] = {
    Kind.HELLO: Hello,
    Kind.WELCOME: Welcome,
    Kind.STATE: State,
    Kind.RESUMED: Resumed,
    Kind.ABORT: Abort,
    Kind.JOIN: Join,
    Kind.ALL_SENT: AllSent,
    Kind.COMPLETE: Complete,
}
_KIND_OF = {body: kind for kind, body in _BODIES.items()}
_TABLES = (Kind.ZERO, Kind.FETCH)  # their body is a table of runs


@dataclass(frozen=True)
class Header:
    """A frame's header. Of a PAGES body `table_bytes` are runs, `hash_bytes` hashes, `content_bytes` pages."""

    kind: Kind
    round: int
    pages: int
    runs: int
    sequence: int
    length: int
    flags: Flag = PLAIN

    def pack(self) -> bytes:
        return HEADER.pack(MAGIC, self.kind, self.flags, self.round, self.pages, self.runs, self.sequence, self.length)

    @property
    def table_bytes(self) -> int:
        return self.runs * RUN_BYTES

    @property
    def hash_bytes(self) -> int:
        return self.pages * HASH_BYTES if Flag.HASHED in self.flags else 0

    @property
    def content_bytes(self) -> int:
        return self.length - self.table_bytes - self.hash_bytes


def parse_header(data: bytes) -> Header:
    """A header from exactly HEADER.size bytes, with every length within its limit."""
    magic, number, flags, round_number, pages, runs, sequence, length = HEADER.unpack(data)
    if magic != MAGIC:
        raise RemoteProtocolError(f"the peer does not speak the vMotion protocol: frame starts with {magic!r}")
    try:
        kind = Kind(number)
    except ValueError:
        raise RemoteProtocolError(f"unknown message kind {number}") from None
    allowed = _FLAGS.get(kind, PLAIN)
    if flags | allowed != allowed or flags & PACKED == PACKED:
        raise RemoteProtocolError(f"{kind.name} with unknown flags {flags:#x}")
    if length > _MAX_BODY[kind]:
        raise RemoteProtocolError(f"{kind.name} of {length} bytes; at most {_MAX_BODY[kind]} are allowed")
    header = Header(kind, round_number, pages, runs, sequence, length, Flag(flags))
    if kind is Kind.PAGES:
        if not 1 <= runs <= pages <= CHUNK_PAGES:
            raise RemoteProtocolError(f"PAGES with {pages} pages in {runs} runs; 1 to {CHUNK_PAGES} are allowed")
        content, whole = header.content_bytes, pages * PAGE
        if not (0 < content < whole if flags & PACKED else content == whole):
            raise RemoteProtocolError(f"PAGES of {length} bytes cannot hold {pages} pages and their table")
    elif kind in _TABLES:
        if not runs or length != header.table_bytes or pages < runs:
            raise RemoteProtocolError(f"{kind.name} of {length} bytes with {pages} pages in {runs} runs")
    elif pages or runs:
        raise RemoteProtocolError(f"{kind.name} with {pages} pages in {runs} runs")
    return header


def encode_runs(runs: np.ndarray) -> bytes:
    return runs.astype(_RUN).tobytes()


def parse_runs(table: bytes | bytearray | memoryview, pages: int, ram_pages: int) -> np.ndarray:
    """The runs of a table: ascending, disjoint, within RAM, `pages` in all."""
    if len(table) % RUN_BYTES:
        raise RemoteProtocolError(f"a table of runs has {len(table)} bytes")
    runs = np.frombuffer(table, _RUN).astype(np.uint32).reshape(-1, 2) if table else NO_RUNS
    edges = runs.reshape(-1).astype(np.int64)
    if (runs[:, 0] >= runs[:, 1]).any() or (edges[1:] < edges[:-1]).any():
        raise RemoteProtocolError("a table of runs is out of order")
    if len(edges) and edges[-1] > ram_pages:
        raise RemoteProtocolError(f"a run ends at page {edges[-1]}, RAM has {ram_pages}")
    if count(runs) != pages:
        raise RemoteProtocolError(f"a table of runs holds {count(runs)} pages, its header says {pages}")
    return runs


def encode_page(page: int) -> bytes:
    """The run of one page."""
    return _RUN_OF.pack(page, page + 1)


def parse_page(header: Header, table: bytes | bytearray | memoryview, ram_pages: int) -> int:
    """The only page of a table: what parse_runs does, in the microseconds that a waiting guest has."""
    first, end = _RUN_OF.unpack(table)
    if header.pages != 1 or end != first + 1 or end > ram_pages:
        raise RemoteProtocolError(f"{header.kind.name} of one page has pages {first} to {end}; RAM has {ram_pages}")
    return int(first)


def encode_hashes(hashes: np.ndarray) -> bytes:
    return hashes.astype(_HASH).tobytes()


def parse_hashes(data: bytes | memoryview) -> np.ndarray:
    return np.frombuffer(data, _HASH).astype(np.uint64)


def encode_bitmap(mask: np.ndarray) -> bytes:
    """A boolean for each page of RAM as one bit each, the first page in the highest bit."""
    return np.packbits(mask).tobytes()


def parse_bitmap(data: bytes, ram_pages: int) -> np.ndarray:
    """The boolean array again; the bits beyond RAM's end must be 0."""
    if len(data) != -(-ram_pages // 8):
        raise RemoteProtocolError(f"a bitmap of {len(data)} bytes; RAM has {ram_pages} pages")
    bits = np.unpackbits(np.frombuffer(data, np.uint8)).view(bool)
    if bits[ram_pages:].any():
        raise RemoteProtocolError(f"a bitmap with pages beyond RAM's {ram_pages}")
    return bits[:ram_pages]


def encode_body(body: msgspec.Struct) -> tuple[Kind, bytes]:
    return _KIND_OF[type(body)], msgspec.msgpack.encode(body)


def parse_body(kind: Kind, data: bytes) -> Any:
    """The decoded body of a message that has one, None for the others."""
    if kind not in _BODIES:
        return None
    try:
        return msgspec.msgpack.decode(data, type=_BODIES[kind])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # msgspec lets the latter two pass
        raise RemoteProtocolError(f"{kind.name}: {error}") from None


def negotiate(major: int, minor: int) -> tuple[int, int]:
    """The version to speak: ours, or the peer's older minor; another major is refused."""
    if major != MAJOR:
        raise RemoteProtocolError(
            f"the peer speaks version {major}.{minor}, this host {MAJOR}.{MINOR}; update the older"
        )
    if minor < 0:
        raise RemoteProtocolError(f"the peer speaks version {major}.{minor}, which cannot be")
    return MAJOR, min(minor, MINOR)


# ---------------------------------------------------------------- the state table

# What a side may do in a state, and the state that follows: its own messages, the peer's, its own acts.
_ABORTS = {"send ABORT": "aborted", "receive ABORT": "aborted", "lost": "aborted"}
_SOURCE = {
    "new": {"send HELLO": "greeting", "lost": "aborted"},
    "greeting": {"receive WELCOME": "precopy", **_ABORTS},
    "precopy": {
        "send PAGES": "precopy",
        "send ZERO": "precopy",
        "send BITMAP": "precopy",  # round 0: what exists; later: what will be missing, so that it is discarded in time
        "send ROUND_END": "round_ended",
        "send SUSPENDING": "suspended",
        **_ABORTS,
    },
    "round_ended": {"receive ROUND_ACK": "precopy", **_ABORTS},
    "suspended": {
        "send PAGES": "suspended",
        "send ZERO": "suspended",
        "send STATE": "handed_over",
        "send BITMAP": "listed",
        **_ABORTS,
    },
    "handed_over": {"receive RESUMED": "done", "receive ABORT": "aborted", "lost": "uncertain"},
    "uncertain": {"claim": "aborted", "claim lost": "done"},
    "listed": {"send STATE": "entrusted", **_ABORTS},
    "entrusted": {"receive RESUMED": "serving", "receive ABORT": "aborted", "lost": "doubtful"},
    "doubtful": {"claim": "aborted", "claim lost": "lost"},
    # the destination has claimed: from here no event leads to "aborted"
    "serving": {"send PAGES": "serving", "send ZERO": "serving", "send ALL_SENT": "served", "lost": "lost"},
    "served": {"receive COMPLETE": "done", "lost": "lost"},
}
_DESTINATION = {
    "new": {"receive HELLO": "greeted", "lost": "aborted"},
    "greeted": {"send WELCOME": "receiving", "send ABORT": "aborted", "lost": "aborted"},
    "receiving": {
        "receive PAGES": "receiving",
        "receive ZERO": "receiving",
        "receive BITMAP": "receiving",
        "receive ROUND_END": "round_ended",
        "receive SUSPENDING": "switching",
        **_ABORTS,
    },
    "round_ended": {"send ROUND_ACK": "receiving", "send ABORT": "aborted", "lost": "aborted"},
    "switching": {
        "receive PAGES": "switching",
        "receive ZERO": "switching",
        "receive STATE": "restoring",
        "receive BITMAP": "listed",
        **_ABORTS,
    },
    "restoring": {"claim": "claimed", "claim lost": "aborted", "send ABORT": "aborted", "lost": "aborted"},
    # the point of no return: from here no event leads to "aborted"
    "claimed": {"resume": "running", "stop": "lost"},
    "running": {"send RESUMED": "done", "lost": "done"},
    "listed": {"receive STATE": "rebuilding", **_ABORTS},
    "rebuilding": {"claim": "owned", "claim lost": "aborted", "send ABORT": "aborted", "lost": "aborted"},
    # the point of no return: from here no event leads to "aborted"
    "owned": {"resume": "resumed", "stop": "lost"},
    "resumed": {"send RESUMED": "filling", "lost": "lost"},
    "filling": {
        "receive PAGES": "filling",
        "receive ZERO": "filling",
        "receive ALL_SENT": "filled",
        "whole": "filled",  # all has come, but the source is gone before it could say so
        "lost": "lost",
    },
    "filled": {"send COMPLETE": "done", "lost": "done"},
}
_SENDER = {
    "new": {"send JOIN": "joining", "lost": "aborted"},
    "joining": {"receive WELCOME": "streaming", "receive ABORT": "aborted", "lost": "aborted"},
    "streaming": {
        "send PAGES": "streaming",
        "send ZERO": "streaming",
        "send ROUND_END": "round_ended",
        "receive FETCH": "streaming",
        "lost": "done",
    },
    "round_ended": {"receive ROUND_ACK": "streaming", "lost": "done"},
}
_RECEIVER = {
    "new": {"receive JOIN": "joined", "lost": "aborted"},
    "joined": {"send WELCOME": "streaming", "send ABORT": "aborted", "lost": "aborted"},
    "streaming": {
        "receive PAGES": "streaming",
        "receive ZERO": "streaming",
        "receive ROUND_END": "round_ended",
        "send FETCH": "streaming",
        "lost": "done",
    },
    "round_ended": {"send ROUND_ACK": "streaming", "lost": "done"},
}
TABLE = {"source": _SOURCE, "destination": _DESTINATION, "sender": _SENDER, "receiver": _RECEIVER}
# done: nothing is left to do; aborted: the source runs the VM; lost: it has to be started again, cold
FINAL = frozenset({"done", "aborted", "lost"})


class InvalidTransition(LocalProtocolError):
    """An event that the table does not have; the message tells the story so far."""


_STORY = 12  # the last events that an error tells


class Session:
    """Where one side of one connection of a migration stands; `entered` hears of every state that is reached."""

    def __init__(self, role: str, entered: Callable[[str, str], None] = lambda role, state: None) -> None:
        self.role, self.state = role, "new"
        self._entered = entered
        self.story: deque[str] = deque(maxlen=_STORY)
        self._sequence = {"send": 0, "receive": 0}

    def step(self, event: str) -> None:
        """Follow the table: 'send HELLO', 'receive PAGES', 'claim', 'lost', ..."""
        following = TABLE[self.role].get(self.state, {}).get(event)
        if following is None:
            story = " -> ".join(self.story) or "nothing"
            message = f"{self.role} in state {self.state}: {event} is not allowed; before it: {story}"
            if event.startswith("receive "):
                raise RemoteProtocolError(message)
            raise InvalidTransition(message)
        if not self.story or self.story[-1] != event:
            self.story.append(event)
        if following != self.state:
            self.state = following
            self._entered(self.role, following)

    def sending(self, kind: Kind) -> int:
        """We send this now: its sequence number."""
        self.step(f"send {kind.name}")
        self._sequence["send"] += 1
        return self._sequence["send"]

    def received(self, header: Header) -> None:
        """The peer sent this; it must be the next frame and be allowed now."""
        self._sequence["receive"] += 1
        if header.sequence != self._sequence["receive"]:
            raise RemoteProtocolError(
                f"{header.kind.name} is frame {header.sequence}, due was {self._sequence['receive']}"
            )
        self.step(f"receive {header.kind.name}")

    def may(self, event: str) -> bool:
        return event in TABLE[self.role].get(self.state, {})
