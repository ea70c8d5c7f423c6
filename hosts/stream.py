"""The vMotion stream on a socket: frames by the protocol, pages straight out of and into guest RAM."""

import contextlib
import os
import select
import socket
import ssl
import struct
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from hosts.packing import unpack
from hosts.protocol import (
    HEADER,
    PACKED,
    PLAIN,
    Abort,
    Flag,
    Header,
    Kind,
    RemoteProtocolError,
    Session,
    encode_body,
    encode_page,
    encode_runs,
    parse_body,
    parse_header,
    parse_runs,
)
from hosts.ram import PAGE, PageHashes, Ram, count
from topologies.errors import TestbedError

# A peer that is silent for so long is taken for gone: a cut cable tells nothing.
PEER_TIMEOUT_S = 5.0
_NO_LIMIT = 2**64 - 1
_SO_MAX_PACING_RATE = 47  # asm-generic/socket.h; bytes/s, kept by TCP itself
_EXPEDITED = 46 << 2  # DSCP EF (RFC 3246)
# Messages whose body is read by whoever knows what to do with it
_RAW = (Kind.PAGES, Kind.ZERO, Kind.FETCH, Kind.BITMAP)


class StreamLost(TestbedError):
    """The connection broke or fell silent."""


class PeerAborted(TestbedError):
    """The other host gave up, and said why."""


class Stream:
    """One side of one connection of a migration. Every frame sent or received is a step of its session."""

    def __init__(self, sock: socket.socket, session: Session, timeout_s: float = PEER_TIMEOUT_S) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self.session, self.timeout_s = sock, session, timeout_s
        self.bytes_sent = 0
        self._allow(timeout_s)

    @property
    def encrypted(self) -> bool:
        return isinstance(self._socket, ssl.SSLSocket)

    def limit(self, bits_per_s: float | None) -> None:
        """Send no faster than this from now on; None for no limit."""
        rate = _NO_LIMIT if bits_per_s is None else int(bits_per_s / 8)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, struct.pack("Q", rate))

    def urgent(self) -> None:
        """What is sent here overtakes what waits for the cable, if the cable heeds marks: a virtual CPU waits."""
        self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, _EXPEDITED)

    def keep_queue_short(self, size: int) -> None:
        """Let at most so many bytes wait in this host for the cable: what another connection sends gets its turn."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)

    # ------------------------------------------------------------ messages

    def send(self, body: msgspec.Struct) -> None:
        kind, data = encode_body(body)
        self._send_frame(kind, [memoryview(data)])

    def mark(self, kind: Kind, round_number: int, flags: Flag = PLAIN) -> None:
        """ROUND_END, ROUND_ACK and SUSPENDING: a header is all."""
        self._send_frame(kind, [], round_number, flags=flags)

    def send_bitmap(self, bitmap: bytes, round_number: int = 0) -> None:
        self._send_frame(Kind.BITMAP, [memoryview(bitmap)], round_number)

    def send_fetch(self, page: int) -> None:
        self._send_frame(Kind.FETCH, [memoryview(encode_page(page))], 0, 1, 1)

    def send_page(self, page: int, page_hash: bytes, content: memoryview) -> None:
        """PAGES with one page: what a fault waits for."""
        self._send_frame(Kind.PAGES, [memoryview(encode_page(page) + page_hash), content], 0, 1, 1, Flag.HASHED)

    def send_runs(self, kind: Kind, runs: np.ndarray, round_number: int = 0) -> None:
        """ZERO: the numbers of pages."""
        self._send_frame(kind, [memoryview(encode_runs(runs))], round_number, count(runs), len(runs))

    def send_pages(
        self,
        runs: np.ndarray,
        content: list[memoryview],
        round_number: int = 0,
        hashes: bytes = b"",
        packing: Flag = PLAIN,
    ) -> None:
        """These pages with this content; `hashes` as protocol.encode_hashes makes them, or none."""
        flags = packing | (Flag.HASHED if hashes else PLAIN)
        head = encode_runs(runs) + hashes
        self._send_frame(Kind.PAGES, [memoryview(head), *content], round_number, count(runs), len(runs), flags)

    def send_file_pages(self, runs: np.ndarray, ram: Ram, round_number: int = 0) -> None:
        """PAGES straight from guest RAM, without a copy in between (sendfile(2)).

        What the guest writes to them until they have left leaves with them: its bitmap knows. Not for TLS.
        """
        head, pages = encode_runs(runs), count(runs)
        length = len(head) + pages * PAGE
        header = Header(Kind.PAGES, round_number & 0xFFFF, pages, len(runs), self.session.sending(Kind.PAGES), length)
        self.bytes_sent += HEADER.size + length
        try:
            self._socket.sendall(header.pack() + head, socket.MSG_MORE)
            for first, end in runs.tolist():
                at, stop = first * PAGE, end * PAGE
                while at < stop:
                    at += os.sendfile(self._socket.fileno(), ram.fd, at, stop - at)
        except OSError as error:
            raise StreamLost(f"the vMotion connection broke while sending PAGES: {self._why(error)}") from error

    def receive(self) -> tuple[Header, Any]:
        """The next message and its decoded body; for PAGES, ZERO, FETCH and BITMAP the caller fetches the body."""
        return self._receive_behind(parse_header(self.exactly(HEADER.size)))

    def receive_opening(self, sessions: dict[Kind, Session]) -> Any:
        """The first message, which tells what kind of connection this is: its session is chosen by it."""
        header = parse_header(self.exactly(HEADER.size))
        self.session = sessions.get(header.kind, self.session)
        return self._receive_behind(header)[1]

    def _receive_behind(self, header: Header) -> tuple[Header, Any]:
        if header.kind in _RAW or not self.session.may(f"receive {header.kind.name}"):
            self.session.received(header)  # which refuses what is not allowed, before its body is read
            return header, None
        body = parse_body(header.kind, self.exactly(header.length))
        self.session.received(header)  # half a message is none: RESUMED and STATE decide who runs the VM
        if isinstance(body, Abort):
            raise PeerAborted(body.reason)
        return header, body

    def expect(self, *kinds: Kind) -> Any:
        """The next message's body, which must be of one of these kinds."""
        header, body = self.receive()
        if header.kind not in kinds:
            raise RemoteProtocolError(f"{header.kind.name} where {kinds[0].name} was due")
        return body

    def abort(self, reason: str) -> None:
        """Tell the peer, if there is still someone to tell and the protocol allows it."""
        if self.session.may("send ABORT"):
            try:
                self.send(Abort(reason[:1000]))
            except StreamLost:
                return  # then the peer notices by itself

    def parting_word(self) -> PeerAborted | None:
        """The ABORT that the peer sent before it went, if there is one: found when a send fails."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        try:
            if poll.poll(0) and self.session.may("receive ABORT"):
                self.receive()
        except PeerAborted as word:
            return word
        except TestbedError:  # then it said nothing
            return None
        return None

    def receive_runs(self, header: Header, ram_pages: int) -> np.ndarray:
        """The table of PAGES, ZERO or FETCH."""
        return parse_runs(self.exactly(header.table_bytes), header.pages, ram_pages)

    def receive_pages(self, header: Header, ram: Ram, hashes: PageHashes) -> np.ndarray:
        """The body of PAGES or ZERO, into RAM that nobody uses yet; returns the runs."""
        runs = self.receive_runs(header, ram.pages)
        if header.kind is Kind.ZERO:
            for first, end in runs.tolist():
                ram.bytes[first * PAGE : end * PAGE] = 0
            hashes.note_zero(runs)
            return runs
        self.exactly(header.hash_bytes)
        views = ram.views(runs)
        if header.flags & PACKED:
            content = self.receive_content(header)
            at = 0
            for view in views:
                view[:] = content[at : at + len(view)]
                at += len(view)
        else:
            self.into(views.copy())
        hashes.note(runs, views)
        return runs

    def receive_content(self, header: Header) -> memoryview:
        """The pages of PAGES themselves, behind its table and hashes."""
        data = self.exactly(header.content_bytes)
        if header.flags & PACKED:
            try:
                data = bytearray(unpack(header.flags & PACKED, bytes(data), header.pages * PAGE))
            except TestbedError as error:
                raise RemoteProtocolError(str(error)) from error
        return memoryview(data)

    # ------------------------------------------------------------ bytes

    def _send_frame(
        self,
        kind: Kind,
        body: list[memoryview],
        round_number: int = 0,
        pages: int = 0,
        runs: int = 0,
        flags: Flag = PLAIN,
    ) -> None:
        length = sum(len(part) for part in body)
        header = Header(kind, round_number & 0xFFFF, pages, runs, self.session.sending(kind), length, flags)
        pending = [memoryview(header.pack()), *body]
        self.bytes_sent += HEADER.size + length
        try:
            if self.encrypted:  # TLS takes one buffer
                self._socket.sendall(b"".join(pending))
                return
            sent = self._socket.sendmsg(pending)
            if sent == HEADER.size + length:  # all at once, as nearly always
                return
            while True:
                while pending and sent >= len(pending[0]):
                    sent -= len(pending.pop(0))
                if not pending:
                    return
                pending[0] = pending[0][sent:]
                sent = self._socket.sendmsg(pending)
        except OSError as error:
            raise StreamLost(f"the vMotion connection broke while sending {kind.name}: {self._why(error)}") from error

    def exactly(self, length: int) -> bytearray:
        """The next `length` bytes."""
        data = bytearray(length)
        if length:
            self.into([memoryview(data)])
        return data

    def into(self, buffers: list[memoryview]) -> None:
        """The next bytes, into all of these buffers; takes the list apart."""
        left = sum(map(len, buffers))
        try:
            while left:
                if self.encrypted:
                    got = self._socket.recv_into(buffers[0])
                else:
                    got = self._socket.recvmsg_into(buffers, 0, socket.MSG_WAITALL)[0]
                if got == 0:
                    raise StreamLost("the vMotion connection was closed by the peer")
                left -= got
                if not left:  # all at once, as nearly always
                    return
                while buffers and got >= len(buffers[0]):
                    got -= len(buffers.pop(0))
                if got:
                    buffers[0] = buffers[0][got:]
        except OSError as error:
            raise StreamLost(f"the vMotion connection broke: {self._why(error)}") from error

    def _why(self, error: OSError) -> str:
        if isinstance(error, TimeoutError | BlockingIOError):
            return f"the peer was silent for {self.timeout_s:g} s"
        return error.strerror or str(error)

    @contextlib.contextmanager
    def patient(self, extra_s: float) -> Iterator[None]:
        """Allow the peer so much longer to answer, for work that takes its time."""
        self._allow(self.timeout_s + extra_s)
        try:
            yield
        finally:
            self._allow(self.timeout_s)

    @property
    def pending(self) -> bool:
        """Has something been received that no poll would tell of?"""
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0

    def unlimited(self) -> None:
        """Wait for messages as long as it takes; `interrupt` ends it. Sending stays bounded."""
        self._allow(None)

    def _allow(self, seconds: float | None) -> None:
        """Bound each wait for the peer's words, and for its taking ours.

        By the kernel itself (socket(7)) where it can: one call then waits for all that is due.
        """
        if self.encrypted:
            self._socket.settimeout(seconds)
        else:
            self._socket.settimeout(None)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds or 0))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(seconds or self.timeout_s))

    def fileno(self) -> int:
        return self._socket.fileno()

    def interrupt(self) -> None:
        """Wake whoever waits for a message here: it has StreamLost. Sending still works."""
        try:
            socket.socket.shutdown(self._socket, socket.SHUT_RD)  # (an SSLSocket's own would forget the encryption)
        except OSError:
            return  # it has ended already

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _timeval(seconds: float) -> bytes:
    """struct timeval; 0 is no limit."""
    return struct.pack("ll", *divmod(round(seconds * 1e6), 1_000_000))
