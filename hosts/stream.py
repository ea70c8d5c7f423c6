"""The vMotion stream on a socket: frames by the protocol, pages straight out of and into guest RAM."""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np

from hosts.protocol import (
    CHUNK_PAGES,
    HEADER,
    Abort,
    Header,
    Kind,
    RemoteProtocolError,
    Session,
    encode_body,
    encode_runs,
    parse_body,
    parse_header,
    parse_runs,
)
from hosts.ram import PAGE, PageHashes, Ram, count, pages_of, runs_of
from topologies.errors import TestbedError

# A peer that is silent for so long is taken for gone: a cut cable tells nothing.
PEER_TIMEOUT_S = 5.0


class StreamLost(TestbedError):
    """The connection broke or fell silent."""


class PeerAborted(TestbedError):
    """The other host gave up, and said why."""


class Stream:
    """One side of a migration's connection. Every frame sent or received is a step of its session."""

    def __init__(self, sock: socket.socket, session: Session) -> None:
        sock.settimeout(PEER_TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self.session = sock, session
        self.bytes_sent = 0

    # ------------------------------------------------------------ messages

    def send(self, body: msgspec.Struct) -> None:
        kind, data = encode_body(body)
        self._send_frame(kind, 0, 0, [memoryview(data)])

    def mark(self, kind: Kind, round_number: int) -> None:
        """ROUND_END, ROUND_ACK and SUSPENDING: a header is all."""
        self._send_frame(kind, round_number, 0, [])

    def receive(self) -> tuple[Header, Any]:
        """The next message and its decoded body; for PAGES and ZERO the caller fetches the body."""
        header = parse_header(self._exactly(HEADER.size))
        if header.kind in (Kind.PAGES, Kind.ZERO) or not self.session.may(f"receive {header.kind.name}"):
            self.session.received(header)  # which refuses what is not allowed, before its body is read
            return header, None
        body = parse_body(header.kind, self._exactly(header.length))
        self.session.received(header)  # half a message is none: RESUMED and STATE decide who runs the VM
        if isinstance(body, Abort):
            raise PeerAborted(body.reason)
        return header, body

    def expect(self, kind: Kind) -> Any:
        """The next message's body, which must be of this kind."""
        header, body = self.receive()
        if header.kind is not kind:
            raise RemoteProtocolError(f"{header.kind.name} where {kind.name} was due")
        return body

    def abort(self, reason: str) -> None:
        """Tell the peer, if there is still someone to tell and the protocol allows it."""
        if self.session.may("send ABORT"):
            try:
                self.send(Abort(reason[:1000]))
            except StreamLost:
                return  # then the peer notices by itself

    # ------------------------------------------------------------ pages

    def send_runs(
        self,
        ram: Ram,
        runs: np.ndarray,
        round_number: int,
        hashes: PageHashes,
        between_chunks: Callable[[int], None] = lambda done: None,
        *,
        copies: bool = False,
    ) -> tuple[int, int]:
        """Send these pages, zero ones by their number only; returns (pages sent, zero pages).

        `between_chunks` hears how many pages are done, and may raise. With `copies`, what is hashed and what
        is sent is one copy; else the guest may write in between, which its bitmap knows.
        """
        sent = zero = 0
        for chunk in _chunks(runs):
            between_chunks(sent + zero)
            pages = pages_of(chunk)
            copy = ram.words[pages] if copies else None  # (indexing by an array copies)
            full = ram.nonzero(pages) if copy is None else copy.any(axis=1)
            if not full.all():
                empty = runs_of(pages[~full])
                zero += count(empty)
                hashes.note_zero(empty)
                self._send_frame(Kind.ZERO, round_number, count(empty), [memoryview(encode_runs(empty))])
                chunk = runs_of(pages[full])
            if len(chunk):
                sent += count(chunk)
                contents = ram.views(chunk) if copy is None else [memoryview(copy[full]).cast("B")]
                hashes.note(chunk, contents)
                self._send_frame(Kind.PAGES, round_number, count(chunk), [memoryview(encode_runs(chunk)), *contents])
        return sent, zero

    def receive_pages(self, header: Header, ram: Ram, hashes: PageHashes) -> None:
        """The body of PAGES or ZERO, into RAM."""
        runs = parse_runs(self._exactly(header.table_bytes), header.pages, ram.pages)
        if header.kind is Kind.ZERO:
            for first, end in runs.tolist():
                ram.bytes[first * PAGE : end * PAGE] = 0
            hashes.note_zero(runs)
            return
        self._into(ram.views(runs))
        hashes.note(runs, ram.views(runs))

    # ------------------------------------------------------------ bytes

    def _send_frame(self, kind: Kind, round_number: int, pages: int, body: list[memoryview]) -> None:
        length = sum(len(part) for part in body)
        header = Header(kind, round_number & 0xFFFF, pages, self.session.sending(kind), length)
        pending = [memoryview(header.pack()), *body]
        self.bytes_sent += HEADER.size + length
        try:
            while pending:
                sent = self._socket.sendmsg(pending)
                while pending and sent >= len(pending[0]):
                    sent -= len(pending.pop(0))
                if sent:
                    pending[0] = pending[0][sent:]
        except OSError as error:
            raise StreamLost(f"the vMotion connection broke while sending {kind.name}: {_why(error)}") from error

    def _exactly(self, length: int) -> bytearray:
        data = bytearray(length)
        if length:
            self._into([memoryview(data)])
        return data

    def _into(self, buffers: list[memoryview]) -> None:
        try:
            while buffers:
                got = self._socket.recvmsg_into(buffers)[0]
                if got == 0:
                    raise StreamLost("the vMotion connection was closed by the peer")
                while buffers and got >= len(buffers[0]):
                    got -= len(buffers.pop(0))
                if got:
                    buffers[0] = buffers[0][got:]
        except OSError as error:
            raise StreamLost(f"the vMotion connection broke: {_why(error)}") from error

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def _why(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"the peer was silent for {PEER_TIMEOUT_S:g} s"
    return error.strerror or str(error)


def _chunks(runs: np.ndarray) -> Iterator[np.ndarray]:
    """The runs again, cut into pieces of at most CHUNK_PAGES pages."""
    chunk: list[tuple[int, int]] = []
    room = CHUNK_PAGES
    for run_first, end in runs.tolist():
        first = run_first
        while first < end:
            step = min(end - first, room)
            chunk.append((first, first + step))
            first, room = first + step, room - step
            if room == 0:
                yield np.array(chunk, np.uint32)
                chunk, room = [], CHUNK_PAGES
    if chunk:
        yield np.array(chunk, np.uint32)
