"""A VM's disk as its guest sees it: requests to the vmx on a socket, and answers in the order of the requests.

    read     waits for the content                                  (a guest that boots)
    write    does not wait; what is on stable storage is told later (a guest that runs)

A write that cannot be done yet (a datastore that is silent, a disk that is full) is answered when it has been done.
"""

import socket
import struct
from typing import NamedTuple

_REQUEST = struct.Struct("!BQI")  # kind, offset, length
_LENGTH = struct.Struct("!I")  # of an answer
_READ, _WRITE = 0, 1
MAX_BYTES = 2**20  # of one request


class VmxGone(Exception):
    """A machine without its vmx is none: for its guest there is nothing left to do."""


class Request(NamedTuple):
    """`content` of a write, else None."""

    offset: int
    length: int
    content: bytes | None


class Disk:
    """The guest's end."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.setblocking(True)

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self, offset: int, length: int) -> bytes:
        """At most `length` bytes, fewer at the disk's end; no write may be under way."""
        content = b""
        while len(content) < length:
            piece = min(length - len(content), MAX_BYTES)
            self._send(_REQUEST.pack(_READ, offset + len(content), piece))
            got = self._answer()
            content += got
            if len(got) < piece:
                break
        return content

    def write(self, offset: int, content: bytes) -> None:
        """Ask for a write; one that is followed by others must not be larger than MAX_BYTES."""
        self._send(_REQUEST.pack(_WRITE, offset, len(content)) + content)

    def await_written(self) -> None:
        """Until the oldest write under way is on stable storage."""
        self._answer()

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise VmxGone from error

    def _answer(self) -> bytes:
        try:
            return _receive(self._socket, _LENGTH.unpack(_receive(self._socket, _LENGTH.size))[0])
        except EOFError as error:
            raise VmxGone from error


class DiskServer:
    """The vmx's end."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.setblocking(True)

    def next(self) -> Request:
        """EOFError when the guest is gone."""
        kind, offset, length = _REQUEST.unpack(_receive(self._socket, _REQUEST.size))
        if length > MAX_BYTES:
            raise EOFError(f"a request for {length} bytes is none of ours")
        return Request(offset, length, _receive(self._socket, length) if kind == _WRITE else None)

    def answer(self, content: bytes = b"") -> None:
        """What was read; nothing for a write, which has been done."""
        self._socket.sendall(_LENGTH.pack(len(content)) + content)


def _receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        try:
            more = sock.recv(length - len(data))
        except OSError as error:
            raise EOFError(f"the other side is gone: {error}") from error
        if not more:
            raise EOFError("the other side is gone")
        data += more
    return data


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """The guest's end and the vmx's."""
    guest, vmx = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (guest, vmx):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_BYTES)
    return guest, vmx
