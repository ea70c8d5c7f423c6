"""Messages between an agent and its guest process: length-prefixed msgpack over a Unix socket.

The guest listens and outlives its agent; whoever connects next, an agent's successor, is greeted with all
that it has to know. A guest serves one agent at a time.
"""

import os
import socket
import struct
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from topologies.plan import VM

_LENGTH = struct.Struct("!I")
_MAX_DESCRIPTORS = 8
MAX_MESSAGE_BYTES = 256 * 2**20  # the TCP queues of a busy guest travel in one message


class Message(msgspec.Struct, tag=True, frozen=True):
    """Base of all of them: tagged with its class name."""


# new -> running <-> suspended; new -> awaiting -> restored -> running. The new and the awaiting need their agent.
GuestState = Literal["new", "awaiting", "restored", "running", "suspended"]


class Hello(Message, frozen=True):
    """Guest: the first word on a connection; with it come its RAM, its pidfd and its userfaultfd, if it has one.

    It has mapped RAM at `address` of its own memory, written pages are found by `tracking`; `memo` as in Boot.
    """

    pid: int
    state: GuestState
    address: int
    tracking: str
    vm: VM | None = None  # from "running" or "awaiting" on
    memo: bytes = b""


class Boot(Message, frozen=True):
    """Agent: power on with fresh RAM, and keep `memo` for its successor. Answered by Done, and the guest runs."""

    vm: VM
    memo: bytes


class Await(Message, frozen=True):
    """Agent: be the target of a migration. Answered by Done; then Restore, then Run."""

    vm: VM
    memo: bytes


class Suspend(Message, frozen=True):
    """Agent: stop at a safe point and freeze every connection. Answered by State."""


class State(Message, frozen=True):
    """Guest: everything that is not in RAM (a DeviceState, encoded)."""

    device: bytes


class Restore(Message, frozen=True):
    """Agent: take over a device state; frames cannot reach the guest yet. Answered by Done."""

    device: bytes


class Run(Message, frozen=True):
    """Agent: run, after a Restore or after a Suspend that was in vain. Answered by Done."""


class Throttle(Message, frozen=True):
    """Agent: run only 1 - `share` of the time. Answered by Done."""

    share: float


class Missing(Message, frozen=True):
    """Agent: pages of RAM are (not) missing from here on. Answered by Waits."""

    on: bool


class Waits(Message, frozen=True):
    """Guest: how long its own accesses to missing pages have taken, since that was last asked, in microseconds."""

    us: list[float]


class Done(Message, frozen=True):
    """Guest: done."""


class Failed(Message, frozen=True):
    """Guest: not done; `reason` is one line. The guest is as it was before."""

    reason: str


_Any = Hello | Boot | Await | Suspend | State | Restore | Run | Throttle | Missing | Waits | Done | Failed
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_Any)


def send(sock: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Send a message, and copies of open descriptors with it."""
    body = msgspec.msgpack.encode(message)
    if descriptors:
        socket.send_fds(sock, [_LENGTH.pack(len(body))], list(descriptors))
        sock.sendall(body)
    else:
        sock.sendall(_LENGTH.pack(len(body)) + body)


def receive(sock: socket.socket) -> Any:
    """The next message; EOFError if the other side is gone."""
    return _decode(sock, bytes(_exactly(sock, _LENGTH.size)))


def receive_with_descriptors(sock: socket.socket) -> tuple[Any, list[int]]:
    """The next message and the descriptors that came with it, which are the caller's to close."""
    head, descriptors, _, _ = socket.recv_fds(sock, _LENGTH.size, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
    try:
        return _decode(sock, head + _exactly(sock, _LENGTH.size - len(head))), descriptors
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def _decode(sock: socket.socket, head: bytes) -> Any:
    (length,) = _LENGTH.unpack(head)
    if length > MAX_MESSAGE_BYTES:
        raise EOFError(f"a message of {length} bytes is none of ours")
    return _decoder.decode(_exactly(sock, length))


def _exactly(sock: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if got == 0:
            raise EOFError("the other side closed the channel")
        view = view[got:]
    return data
