"""The vMotion stream: messages, framing, versions, limits and the state table. Pure: no socket, clock or thread.

    source                                          destination
    new          -- HELLO version, token ------->   new
    greeting                                        greeted
    precopy      <------ WELCOME version --------   receiving
    precopy      -- PAGES, ZERO ----------------->  receiving          round 1..n
    round_ended  -- ROUND_END ------------------->  round_ended
    precopy      <------ ROUND_ACK --------------   receiving
    suspended    -- SUSPENDING ------------------>  switching          gate shut, guest stopped
    suspended    -- PAGES, ZERO ----------------->  switching          the residual
    handed_over  -- STATE devices, TCP, digest -->  restoring          RAM checked, sockets restored
                                                    claimed            (claim)  <== POINT OF NO RETURN
                                                    running            (resume: gate open, guest runs)
    done         <------ RESUMED ----------------   done

ABORT goes either way up to `handed_over` and `restoring`. A source that has handed over and hears no
more is `uncertain`: the datastore tells (it claims the next generation itself; if that succeeds, the
destination never can). Restoring comes before the claim because nothing of it shows outside while
the port is dark: whatever fails there still ends with the source resumed.

A frame is a 24-byte header (big endian) and a body:

    magic "VMOT" | kind u8 | flags u8 | round u16 | pages u32 | sequence u64 | length u32

`sequence` counts the frames of a direction. PAGES: the body is a table of runs (u32 first, u32 end,
in pages) and then the pages themselves; ZERO: the table alone; the others: msgpack.
"""

import enum
import struct
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from hosts.ram import NO_RUNS, PAGE, count
from topologies.errors import TestbedError

PORT = 8000  # VMware's vMotion port
MAJOR, MINOR = 1, 0
MAGIC = b"VMOT"
HEADER = struct.Struct("!4sBBHIQI")
# 1 MiB: long against the cost of a frame, short against every time-out; its runs fit into one sendmsg(2)
CHUNK_PAGES = 256
RUN_BYTES = 8
_RUN = np.dtype(">u4")


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


class Hello(msgspec.Struct, frozen=True):
    major: int
    minor: int
    migration: str
    token: str  # given out by the destination when it prepared; binds this stream to that migration
    ram_bytes: int


class Welcome(msgspec.Struct, frozen=True):
    major: int
    minor: int


class State(msgspec.Struct, frozen=True):
    """Everything but RAM, and the digest that RAM must have (hosts/ram.py, PageHashes)."""

    device: bytes
    ram_digest: str


class Resumed(msgspec.Struct, frozen=True):
    generation: int
    ram_digest: str


class Abort(msgspec.Struct, frozen=True):
    reason: str


# The most that a body may hold. STATE carries the TCP queues of every connection of the guest.
_MAX_BODY = {
    Kind.HELLO: 4096,
    Kind.WELCOME: 4096,
    Kind.PAGES: CHUNK_PAGES * (PAGE + RUN_BYTES),
    Kind.ZERO: CHUNK_PAGES * RUN_BYTES,
    Kind.ROUND_END: 0,
    Kind.ROUND_ACK: 0,
    Kind.STATE: 128 << 20,
    Kind.RESUMED: 4096,
    Kind.ABORT: 4096,
    Kind.SUSPENDING: 0,
}
_BODIES: dict[Kind, type[msgspec.Struct]] = {
    Kind.HELLO: Hello,
    Kind.WELCOME: Welcome,
    Kind.STATE: State,
    Kind.RESUMED: Resumed,
    Kind.ABORT: Abort,
}
_KIND_OF = {body: kind for kind, body in _BODIES.items()}


@dataclass(frozen=True)
class Header:
    """A frame's header; `table_bytes` of the body are a table of runs."""

    kind: Kind
    round: int
    pages: int
    sequence: int
    length: int

    def pack(self) -> bytes:
        return HEADER.pack(MAGIC, self.kind, 0, self.round, self.pages, self.sequence, self.length)

    @property
    def table_bytes(self) -> int:
        return self.length - self.pages * PAGE if self.kind is Kind.PAGES else self.length


def parse_header(data: bytes) -> Header:
    """A header from exactly HEADER.size bytes, with every length within its limit."""
    magic, number, flags, round_number, pages, sequence, length = HEADER.unpack(data)
    if magic != MAGIC:
        raise RemoteProtocolError(f"the peer does not speak the vMotion protocol: frame starts with {magic!r}")
    try:
        kind = Kind(number)
    except ValueError:
        raise RemoteProtocolError(f"unknown message kind {number}") from None
    if flags:
        raise RemoteProtocolError(f"{kind.name} with unknown flags {flags:#x}")
    if length > _MAX_BODY[kind]:
        raise RemoteProtocolError(f"{kind.name} of {length} bytes; at most {_MAX_BODY[kind]} are allowed")
    header = Header(kind, round_number, pages, sequence, length)
    if kind is Kind.PAGES:
        if not 1 <= pages <= CHUNK_PAGES:
            raise RemoteProtocolError(f"PAGES with {pages} pages; 1 to {CHUNK_PAGES} are allowed")
        if not RUN_BYTES <= header.table_bytes <= pages * RUN_BYTES or header.table_bytes % RUN_BYTES:
            raise RemoteProtocolError(f"PAGES of {length} bytes cannot hold {pages} pages and their table")
    elif kind is Kind.ZERO:
        if length == 0 or length % RUN_BYTES:
            raise RemoteProtocolError(f"ZERO with a table of {length} bytes")
    elif pages:
        raise RemoteProtocolError(f"{kind.name} with {pages} pages")
    return header


def encode_runs(runs: np.ndarray) -> bytes:
    return runs.astype(_RUN).tobytes()


def parse_runs(table: bytes, pages: int, ram_pages: int) -> np.ndarray:
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
_SOURCE = {
    "new": {"send HELLO": "greeting", "lost": "aborted"},
    "greeting": {"receive WELCOME": "precopy", "receive ABORT": "aborted", "send ABORT": "aborted", "lost": "aborted"},
    "precopy": {
        "send PAGES": "precopy",
        "send ZERO": "precopy",
        "send ROUND_END": "round_ended",
        "send SUSPENDING": "suspended",
        "send ABORT": "aborted",
        "receive ABORT": "aborted",
        "lost": "aborted",
    },
    "round_ended": {
        "receive ROUND_ACK": "precopy",
        "receive ABORT": "aborted",
        "send ABORT": "aborted",
        "lost": "aborted",
    },
    "suspended": {
        "send PAGES": "suspended",
        "send ZERO": "suspended",
        "send STATE": "handed_over",
        "send ABORT": "aborted",
        "receive ABORT": "aborted",
        "lost": "aborted",
    },
    "handed_over": {"receive RESUMED": "done", "receive ABORT": "aborted", "lost": "uncertain"},
    "uncertain": {"claim": "aborted", "claim lost": "done"},
}
_DESTINATION = {
    "new": {"receive HELLO": "greeted", "lost": "aborted"},
    "greeted": {"send WELCOME": "receiving", "send ABORT": "aborted", "lost": "aborted"},
    "receiving": {
        "receive PAGES": "receiving",
        "receive ZERO": "receiving",
        "receive ROUND_END": "round_ended",
        "receive SUSPENDING": "switching",
        "receive ABORT": "aborted",
        "send ABORT": "aborted",
        "lost": "aborted",
    },
    "switching": {
        "receive PAGES": "switching",
        "receive ZERO": "switching",
        "receive STATE": "restoring",
        "receive ABORT": "aborted",
        "send ABORT": "aborted",
        "lost": "aborted",
    },
    "round_ended": {"send ROUND_ACK": "receiving", "send ABORT": "aborted", "lost": "aborted"},
    "restoring": {"claim": "claimed", "claim lost": "aborted", "send ABORT": "aborted", "lost": "aborted"},
    # the point of no return: from here no event leads to "aborted"
    "claimed": {"resume": "running"},
    "running": {"send RESUMED": "done", "lost": "done"},
}
TABLE = {"source": _SOURCE, "destination": _DESTINATION}
FINAL = frozenset({"done", "aborted"})


class InvalidTransition(LocalProtocolError):
    """An event that the table does not have; the message tells the story so far."""


class Session:
    """Where one side of one migration stands."""

    def __init__(self, role: str) -> None:
        self.role, self.state = role, "new"
        self.story: list[str] = []
        self._sequence = {"send": 0, "receive": 0}

    def step(self, event: str) -> None:
        """Follow the table: 'send HELLO', 'receive PAGES', 'claim', 'lost', ..."""
        following = TABLE[self.role].get(self.state, {}).get(event)
        if following is None:
            story = " -> ".join(self.story[-12:]) or "nothing"
            message = f"{self.role} in state {self.state}: {event} is not allowed; before it: {story}"
            if event.startswith("receive "):
                raise RemoteProtocolError(message)
            raise InvalidTransition(message)
        if not self.story or self.story[-1] != event:
            self.story.append(event)
        self.state = following

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
