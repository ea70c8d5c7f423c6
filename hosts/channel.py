"""Messages between an agent and its guest process: length-prefixed msgpack over a Unix socket pair."""

import socket
import struct
from typing import Any

import msgspec

from topologies.plan import VM

_LENGTH = struct.Struct("!I")
MAX_MESSAGE_BYTES = 256 * 2**20  # the TCP queues of a busy guest travel in one message


class Message(msgspec.Struct, tag=True, frozen=True):
    """Base of all of them: tagged with its class name."""


class Boot(Message, frozen=True):
    """Agent: power on with fresh RAM. Answered by Ready, and the guest runs."""

    vm: VM


class Await(Message, frozen=True):
    """Agent: be the target of a migration. Answered by Ready; then Restore, then Run."""

    vm: VM


class Ready(Message, frozen=True):
    """Guest: RAM is mapped at `address` of its own memory, written pages are found by `tracking`."""

    address: int
    tracking: str


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


class Done(Message, frozen=True):
    """Guest: done."""


class Failed(Message, frozen=True):
    """Guest: not done; `reason` is one line. The guest is as it was before."""

    reason: str


_Any = Boot | Await | Ready | Suspend | State | Restore | Run | Done | Failed
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_Any)


def send(sock: socket.socket, message: Message) -> None:
    body = msgspec.msgpack.encode(message)
    sock.sendall(_LENGTH.pack(len(body)) + body)


def receive(sock: socket.socket) -> Any:
    """The next message; EOFError if the other side is gone."""
    (length,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
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
