"""Messages between an agent and the two processes of a VM, guest and vmx: numbered, length-prefixed msgpack.

Both listen on Unix sockets and outlive their agent; whoever connects next, an agent's successor, is greeted with
all that it has to know. They serve one agent at a time.
"""

import os
import socket
import struct
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from hosts.gate import Messages
from topologies.plan import VM

_HEAD = struct.Struct("!II")  # number, length
_PIECE_BYTES = 2**20
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
    """Agent: power on with fresh RAM, and keep `memo` for its successor. Answered by Booted, and the guest runs."""

    vm: VM
    memo: bytes
    nvram: bytes = b""  # of the last Halted


class Booted(Message, frozen=True):
    """Guest: it runs, with what its disk held: entries of its ledger, how many of them were replayed."""

    entries: int
    replayed: int


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


class Shutdown(Message, frozen=True):
    """Agent: stop for good, with everything on the disk. Answered by Halted."""


class Halted(Message, frozen=True):
    """Guest: stopped; `nvram` is what its next Boot is to have, beside the disk."""

    nvram: bytes


class Serving(Message, frozen=True):
    """Vmx: the first word on a connection; its lease page comes with it, and says all the rest."""


class Own(Message, frozen=True):
    """Agent: the VM is this host's, under a lease; from here on it is the vmx that keeps it. Answered by Done.

    The agent opens the gate if the lease lasts, and the vmx does so too if it was held: it may have shut it for the
    lease before. `pid` is the guest's.
    """

    generation: int
    sent_s: float
    pid: int
    gate: Messages


class Hold(Message, frozen=True):
    """Agent: keep the lease, and leave the rest (gate, further claims) to me. Answered by Done."""


class GoOn(Message, frozen=True):
    """Agent: as before the Hold, and open the gate, at once or when there is a lease again. Answered by Done."""


class Done(Message, frozen=True):
    """Done."""


class Failed(Message, frozen=True):
    """Not done; `reason` is one line. The guest is as it was before."""

    reason: str


_ToGuest = Boot | Await | Suspend | Restore | Run | Throttle | Missing | Shutdown
_FromGuest = Hello | Booted | State | Waits | Halted
_Any = _ToGuest | _FromGuest | Serving | Own | Hold | GoOn | Done | Failed
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_Any)


class Line:
    """One end of the channel.

    A request has a number, and its answer the same: one that comes when nobody waits for it any more is not taken
    for the answer to something else. What a time-out has interrupted is received by the next call.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._begun = bytearray()  # of a message that has not come whole

    def fileno(self) -> int:
        return self._socket.fileno()

    def settimeout(self, seconds: float | None) -> None:
        self._socket.settimeout(seconds)

    def send(self, message: Message, number: int = 0, descriptors: Sequence[int] = ()) -> None:
        """Send a message, and copies of open descriptors with it."""
        body = msgspec.msgpack.encode(message)
        head = _HEAD.pack(number, len(body))
        if descriptors:
            socket.send_fds(self._socket, [head], list(descriptors))
            self._socket.sendall(body)
        else:
            self._socket.sendall(head + body)

    def receive(self) -> tuple[int, Any]:
        """The next message and its number; EOFError if the other side is gone."""
        self._fill(_HEAD.size)
        number, length = _HEAD.unpack_from(self._begun)
        if length > MAX_MESSAGE_BYTES:
            raise EOFError(f"a message of {length} bytes is none of ours")
        self._fill(_HEAD.size + length)
        body, self._begun = self._begun[_HEAD.size :], bytearray()
        return number, _decoder.decode(body)

    def receive_with_descriptors(self) -> tuple[Any, list[int]]:
        """The next message and the descriptors that came with it, which are the caller's to close."""
        head, descriptors, _, _ = socket.recv_fds(self._socket, _HEAD.size, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        try:
            self._begun += head
            return self.receive()[1], descriptors
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def close(self) -> None:
        self._socket.close()

    def _fill(self, length: int) -> None:
        """Until so much of the message has come."""
        while (missing := length - len(self._begun)) > 0:
            data = self._socket.recv(min(missing, _PIECE_BYTES))
            if not data:
                raise EOFError("the other side closed the channel")
            self._begun += data
