"""The ping and udp probes: numbered packets on an absolute schedule, and what came back of them.

Ping is ours, on a raw socket, rather than the system's `ping`: its replies carry the kernel's receive time
in ns, no second process prints microseconds for us to parse, and each lost one is known by its number.
"""

import os
import socket
import struct
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec

from experiments.children import Stop, prompt, say_ready
from topologies.errors import TestbedError
from topologies.events import clock_pair

PING_INTERVAL_NS = 10_000_000  # the field's usual fast ping
UDP_INTERVAL_NS = 1_000_000  # the resolution of the blackout
ECHO_PORT = 7  # RFC 862
STRAGGLERS_S = 0.5  # after the last packet: more than two minimum RTOs, should frames still be held somewhere
# A switchover that holds frames releases a whole blackout's at once, and while they are held they stay charged
# to the sending socket. The default buffers take some 280 small datagrams; these take 20 s of them.
BUFFER_BYTES = 16 * 2**20

_ICMP = struct.Struct("!BBHHH")  # type, code, checksum, identifier, sequence number (RFC 792)
_ICMP_ECHO_REPLY, _ICMP_ECHO = 0, 8
_PAYLOAD = struct.Struct("!QQ")  # number from 0 on, monotonic ns of sending
_TIMESPEC = struct.Struct("@ll")
# asm-generic/socket.h, linux/socket.h, linux/icmp.h: what the socket module lacks
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _SO_TIMESTAMPNS, _SOL_RAW, _ICMP_FILTER = 32, 33, 35, 255, 1


class EchoResult(msgspec.Struct, frozen=True):
    """What ping or udp saw, in monotonic ns: `sent_ns` by number; `numbers` and `arrived_ns` in order of arrival."""

    interval_ns: int
    stopped_ns: int
    sent: int
    received: int
    lost: int
    duplicated: int
    reordered: int
    skipped: int  # slots of the schedule that the probe slept through: its own noise, not the network's
    errors: dict[str, int]  # of the socket; a packet that could not be sent counts as lost
    sent_ns: list[int]
    numbers: list[int]
    arrived_ns: list[int]


class Tally(NamedTuple):
    received: int
    lost: int
    duplicated: int
    reordered: int


def tally(sent: int, numbers: Iterable[int]) -> Tally:
    """Count the arrivals of numbers 0..sent-1, in order: each is received once, the rest are duplicates.

    Reordered is RFC 4737's: a first arrival with a number lower than one that came before it.
    """
    seen: set[int] = set()
    highest, duplicated, reordered = -1, 0, 0
    for number in numbers:
        if number in seen:
            duplicated += 1
            continue
        seen.add(number)
        reordered += number < highest
        highest = max(highest, number)
    return Tally(len(seen), sent - len(seen), duplicated, reordered)


def icmp_request(identifier: int, number: int, payload: bytes) -> bytes:
    """An echo request (RFC 792) with its checksum (RFC 1071); the payload's length must be even."""
    blank = _ICMP.pack(_ICMP_ECHO, 0, 0, identifier, number & 0xFFFF)
    total = sum(word for (word,) in struct.iter_unpack("!H", blank + payload))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    return _ICMP.pack(_ICMP_ECHO, 0, checksum, identifier, number & 0xFFFF) + payload


def icmp_reply(identifier: int, packet: bytes) -> bytes:
    """The payload of an echo reply to us in an IPv4 packet; empty for anything else."""
    start = (packet[0] & 0x0F) * 4
    if len(packet) < start + _ICMP.size:
        return b""
    kind, _, _, to, _ = _ICMP.unpack_from(packet, start)
    return packet[start + _ICMP.size :] if (kind, to) == (_ICMP_ECHO_REPLY, identifier) else b""


class Echo:
    """One probe at work. It wakes up once per interval: to send, then to collect what has arrived meanwhile.

    Arrivals carry the kernel's receive time, so the wake-up delays nothing but their collection.
    """

    wrap: Callable[[int, bytes], bytes] = staticmethod(lambda _number, payload: payload)
    unwrap: Callable[[bytes], bytes] = staticmethod(lambda packet: packet)

    def __init__(self, sock: socket.socket, interval_ns: int) -> None:
        self.interval_ns = interval_ns
        self.skipped = 0
        self.errors: Counter[str] = Counter()
        self.sent_ns = array("q")
        self.numbers = array("q")
        self.arrived_ns = array("q")
        self._socket = sock
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER_BYTES)

    def run(self, stop: Stop) -> EchoResult:
        """Send until SIGTERM; TestbedError if nothing was ever answered."""
        with prompt():
            self._follow_schedule(stop)
        end_s = time.monotonic() + STRAGGLERS_S
        while time.monotonic() < end_s:
            time.sleep(self.interval_ns / 1e9)
            self._collect()
        if not self.numbers:
            raise TestbedError(f"none of {len(self.sent_ns)} packets was answered {dict(self.errors) or ''}")
        return EchoResult(
            interval_ns=self.interval_ns,
            stopped_ns=stop.at_ns,
            sent=len(self.sent_ns),
            **tally(len(self.sent_ns), self.numbers)._asdict(),
            skipped=self.skipped,
            errors=dict(self.errors),
            sent_ns=self.sent_ns.tolist(),
            numbers=self.numbers.tolist(),
            arrived_ns=self.arrived_ns.tolist(),
        )

    def _follow_schedule(self, stop: Stop) -> None:
        start_ns, slot = time.monotonic_ns(), 0
        ready = False
        while not stop.at_ns:
            time.sleep(max(0, start_ns + slot * self.interval_ns - time.monotonic_ns()) / 1e9)
            self._send()
            self._collect()
            if self.numbers and not ready:
                ready = True
                say_ready()
            # The schedule is absolute, so it does not drift. Of several slots slept through only the last
            # is made up for: a burst would measure nothing but itself.
            latest = (time.monotonic_ns() - start_ns) // self.interval_ns
            self.skipped += max(0, latest - (slot + 1))
            slot = max(slot + 1, latest)

    def _send(self) -> None:
        number, now_ns = len(self.sent_ns), time.monotonic_ns()
        self.sent_ns.append(now_ns)
        try:
            self._socket.send(self.wrap(number, _PAYLOAD.pack(number, now_ns)))
        except OSError as error:
            self._note(error)

    def _collect(self) -> None:
        while True:
            try:
                packet, extras, _, _ = self._socket.recvmsg(2048, 64)
            except BlockingIOError:
                return
            except OSError as error:  # an ICMP error about an earlier packet; reading it clears it
                self._note(error)
                continue
            payload = self.unwrap(packet)
            if len(payload) != _PAYLOAD.size:
                continue
            number, sent_ns = _PAYLOAD.unpack(payload)
            if number < len(self.sent_ns) and self.sent_ns[number] == sent_ns:
                self.numbers.append(number)
                self.arrived_ns.append(self._monotonic(extras[0][2]))

    def _monotonic(self, stamp: bytes) -> int:
        """The kernel's receive time, which is realtime, on our clock.

        The clocks are compared anew each time: when somebody sets the clock in mid-run, only what arrived
        within this interval is dated wrongly, and still in order and not in the future.
        """
        seconds, ns = _TIMESPEC.unpack(stamp)
        clocks = clock_pair()
        arrived_ns: int = min(seconds * 10**9 + ns - clocks["realtime"], 0) + clocks["monotonic"]
        return max(arrived_ns, self.arrived_ns[-1]) if self.arrived_ns else arrived_ns

    def _note(self, error: OSError) -> None:
        self.errors[error.strerror or str(error)] += 1


def ping(target: str, stop: Stop) -> EchoResult:
    """ICMP echo, answered by the VM's kernel."""
    identifier = os.getpid() & 0xFFFF
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("@I", ~(1 << _ICMP_ECHO_REPLY) & 0xFFFFFFFF))
        sock.connect((target, 0))
        echo = Echo(sock, PING_INTERVAL_NS)
        echo.wrap = lambda number, payload: icmp_request(identifier, number, payload)
        echo.unwrap = lambda packet: icmp_reply(identifier, packet)
        return echo.run(stop)


def udp(target: str, stop: Stop) -> EchoResult:
    """Datagrams to the VM's echo service, a process in the guest."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((target, ECHO_PORT))
        return Echo(sock, UDP_INTERVAL_NS).run(stop)
