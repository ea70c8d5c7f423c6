"""The transactions and bulk probes: one TCP connection each, opened once and never again.

When a connection breaks, that is a finding and not an error: the result says so, and the probe stays until
SIGTERM, so that the silence after it has its true length. "Survived" means that one and the same connection
served the right answers, or the right bytes, to the end.

The steadfast client is for a VM that may be started again meanwhile: it connects as often as it takes, and repeats
the transfer that was not acknowledged.
"""

import random
import socket
import struct
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from experiments.children import Stop, prompt, say_ready
from hosts import bulk as content
from topologies.errors import TestbedError

INTERVAL_MS = 1.0  # at most a transaction per ms: the resolution of a stall
CONNECT_TIMEOUT_S = 10
ANSWER_TIMEOUT_S = 60.0  # longer than any switchover: a stalled connection is slow, not dead
SILENCE_POLL_S = 0.1  # how late a silent connection notices SIGTERM, or that its patience is over
# How long a steadfast client that is to stop still waits for an answer on the connection that it has: TCP's next try
# comes as long after a silence as that has lasted, or twice that
AT_THE_END_S = 15.0
_RECONNECT_EVERY_S = 0.2
BULK_READ_BYTES = 65536
BULK_GRAIN_NS = 1_000_000  # at most two arrival times are kept per ms: 1 MB a minute

_TOTAL_RETRANSMITS = struct.Struct("@100xI")  # tcpi_total_retrans of struct tcp_info, linux/tcp.h


class BrokenConnectionError(TestbedError):
    """The end of a probe's only connection; the text goes into the result."""


class TransactionsResult(msgspec.Struct, frozen=True):
    """What the transaction client saw, times in monotonic ns.

    `lost` and `duplicated` count among the `audited` acknowledged transfers. Without a connection there is no
    audit: then `audited` is 0 and `total_conserved` null.
    """

    connection_survived: bool
    failure: str
    stopped_ns: int
    client: int
    local_port: int
    retransmits: int  # of the client's own segments
    sent: int
    acked: int
    audited: int
    lost: int
    duplicated: int
    total_conserved: bool | None
    arrived_ns: list[int]  # of each answer
    connections: int = 1


class BulkResult(msgspec.Struct, frozen=True):
    """What the bulk reader saw, times in monotonic ns; silences of at least BULK_GRAIN_NS are exact."""

    connection_survived: bool
    failure: str
    stopped_ns: int
    local_port: int
    verified_bytes: int
    arrived_ns: list[int]


# ---------------------------------------------------------------- the judgement (pure)


class Entry(NamedTuple):
    """A record of the ledger, its fields in the order of hosts.ledger.RECORD."""

    entry: int
    sequence: int
    client: int
    source: int
    target: int
    amount: int


class Audit(NamedTuple):
    audited: int
    lost: int
    duplicated: int


def transfers(client: int, accounts: int) -> Iterator[tuple[int, int, int, int]]:
    """A client's transfers for ever, the same each time: sequence number from 1 on, source, target, amount."""
    chance = random.Random(client)
    sequence = 0
    while True:
        sequence += 1
        yield sequence, chance.randrange(accounts), chance.randrange(accounts), chance.randrange(1, 101)


def audit(acked: Sequence[Entry], ledger: Sequence[Entry]) -> Audit:
    """Compare what the server has acknowledged to one client with the ledger's records, oldest first.

    Lost is an acknowledged transfer that its entry does not hold exactly. Entries older than the oldest record
    were overwritten in the ring and cannot be audited.
    """
    oldest = ledger[0].entry if ledger else 1
    auditable = [entry for entry in acked if entry.entry >= oldest]
    held = set(ledger)
    copies = Counter((record.client, record.sequence) for record in ledger)
    return Audit(
        audited=len(auditable),
        lost=sum(entry not in held for entry in auditable),
        duplicated=sum(copies[entry.client, entry.sequence] > 1 for entry in auditable),
    )


def verify(data: bytes, offset: int) -> None:
    """BrokenConnectionError at the first byte that the bulk stream does not have at this offset."""
    expected = content.pattern(offset, len(data))
    if data != expected:
        at = next(i for i, (got, wanted) in enumerate(zip(data, expected, strict=True)) if got != wanted)
        raise BrokenConnectionError(f"byte {offset + at} of the stream is {data[at]:#04x}, not {expected[at]:#04x}")


class Arrivals:
    """Arrival times in bounded memory: both ends of every silence of at least the grain are kept."""

    def __init__(self) -> None:
        self._kept = array("q")
        self._latest = 0

    def add(self, now_ns: int) -> None:
        """Note an arrival; times must not decrease."""
        if not self._kept or now_ns - self._kept[-1] >= BULK_GRAIN_NS:
            self._keep_latest()
            self._kept.append(now_ns)
        self._latest = now_ns

    def all(self) -> list[int]:
        """What was kept, the first and the latest arrival included."""
        self._keep_latest()
        return self._kept.tolist()

    def _keep_latest(self) -> None:
        if self._kept and self._latest > self._kept[-1]:
            self._kept.append(self._latest)


# ---------------------------------------------------------------- the connections


def _connect(target: str, port: int, silence_s: float, connect_s: float = CONNECT_TIMEOUT_S) -> socket.socket:
    """A connection whose recv ends with BlockingIOError after a silence, without a poll before each recv."""
    sock = socket.create_connection((target, port), connect_s)
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(silence_s), int(silence_s % 1 * 1e6)))
    return sock


class TransactionClient:
    """A client of the transaction server: transfers in a closed loop, then a look at the whole ledger."""

    def __init__(
        self,
        client: int,
        interval_ms: float = INTERVAL_MS,
        gives_up: Callable[[float], bool] = lambda waited_s: waited_s > ANSWER_TIMEOUT_S,
    ) -> None:
        """`gives_up`: whether an answer that has not come after so many seconds will not come."""
        from hosts import ledger  # numpy: 0.1 s that the other probes need not spend

        self._wire = ledger
        self._socket: socket.socket
        self._gives_up = gives_up
        self.client = client
        self._transfers = transfers(client, ledger.ACCOUNTS)
        self._open: tuple[int, int, int, int] | None = None  # a transfer that is not acknowledged
        self._interval_ns = int(interval_ms * 1e6)
        self.sent = 0
        self.entries = array("Q")  # that the transfers 1, 2, 3, ... have become
        self.arrived_ns = array("q")

    def use(self, sock: socket.socket) -> None:
        self._socket = sock

    def run(self, stop: Stop) -> None:
        """Transfer until SIGTERM; BrokenConnectionError or OSError when the connection does not last."""
        while self._open or not stop.at_ns:
            self._open = self._open or next(self._transfers)
            begin_ns = time.monotonic_ns()
            self._transfer(*self._open)
            self._open = None
            if len(self.entries) == 1:
                say_ready()
            time.sleep(max(0, begin_ns + self._interval_ns - time.monotonic_ns()) / 1e9)

    def audit(self) -> tuple[Audit, bool]:
        """The verdict on every transfer, and whether the total of all accounts is what it was."""
        known = zip(self.entries, transfers(self.client, self._wire.ACCOUNTS), strict=False)
        acked = [Entry(entry, sequence, self.client, *rest) for entry, (sequence, *rest) in known]
        records, total = self._read_ledger()
        return audit(acked, records), total == self._wire.ACCOUNTS * self._wire.OPENING_BALANCE

    def _transfer(self, sequence: int, source: int, target: int, amount: int) -> None:
        wire = self._wire
        self._socket.sendall(wire.REQUEST.pack(wire.TRANSFER, self.client, sequence, source, target, amount))
        self.sent = sequence
        kind, answered, entry = wire.REPLY.unpack(self._receive(wire.REPLY.size))
        now_ns = time.monotonic_ns()
        if (kind, answered) != (wire.DONE, sequence):
            raise BrokenConnectionError(f"transfer {sequence} was answered by {kind!r} {answered}")
        if self.entries and entry <= self.entries[-1]:
            raise BrokenConnectionError(f"transfer {sequence} became entry {entry} after entry {self.entries[-1]}")
        self.entries.append(entry)
        self.arrived_ns.append(now_ns)

    def _read_ledger(self) -> tuple[list[Entry], int]:
        wire = self._wire
        records: list[Entry] = []
        while True:
            first = records[-1].entry + 1 if records else 1
            self._socket.sendall(wire.REQUEST.pack(wire.AUDIT, self.client, first, 0, 0, wire.MAX_AUDIT_RECORDS))
            kind, count, total = wire.REPLY.unpack(self._receive(wire.REPLY.size))
            if kind != wire.LEDGER or count > wire.MAX_AUDIT_RECORDS:
                raise BrokenConnectionError(f"the audit from entry {first} on was answered by {kind!r} {count}")
            part = self._receive(count * wire.RECORD.itemsize)
            records += [Entry(*fields) for fields in struct.iter_unpack("!QQIIII", part)]
            if count < wire.MAX_AUDIT_RECORDS:
                return records, total

    def _receive(self, length: int) -> bytes:
        data, began = b"", time.monotonic()
        while len(data) < length:
            try:
                more = self._socket.recv(length - len(data))
            except BlockingIOError:
                waited_s = time.monotonic() - began
                if self._gives_up(waited_s):
                    raise BrokenConnectionError(f"no answer for {waited_s:.0f} s") from None
                continue
            if not more:
                raise BrokenConnectionError("the VM closed the connection")
            data += more
        return data


def transactions(target: str, seed: int, stop: Stop, interval_ms: float = INTERVAL_MS) -> TransactionsResult:
    """Transfers until SIGTERM, then the audit over the same connection.

    The client's id and its transfers follow from the seed: clients of one VM need different seeds.
    """
    from hosts import ledger

    failure, verdict, conserved = "", Audit(0, 0, 0), None
    with _connect(target, ledger.PORT, SILENCE_POLL_S) as sock:
        local_port = sock.getsockname()[1]
        client = TransactionClient(random.Random(seed).getrandbits(32), interval_ms)
        client.use(sock)
        try:
            with prompt():
                client.run(stop)
            verdict, conserved = client.audit()
        except (OSError, BrokenConnectionError) as error:
            if not client.entries:
                raise
            failure = str(error)
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TOTAL_RETRANSMITS.size)
    stop.wait()
    return TransactionsResult(
        connection_survived=not failure,
        failure=failure,
        stopped_ns=stop.at_ns,
        client=client.client,
        local_port=local_port,
        retransmits=_TOTAL_RETRANSMITS.unpack(info)[0],
        sent=client.sent,
        acked=len(client.entries),
        **verdict._asdict(),
        total_conserved=conserved,
        arrived_ns=client.arrived_ns.tolist(),
    )


def steadfast(target: str, seed: int, stop: Stop, interval_ms: float, patience_s: float) -> TransactionsResult:
    """The same over as many connections as it takes; an answer that takes longer than `patience_s` does not come."""
    from hosts import ledger

    def gives_up(waited_s: float) -> bool:
        stopping_s = (time.monotonic_ns() - stop.at_ns) / 1e9 if stop.at_ns else 0.0
        return waited_s > patience_s or stopping_s > AT_THE_END_S

    client = TransactionClient(random.Random(seed).getrandbits(32), interval_ms, gives_up)
    connections, local_port, failure = 0, 0, ""
    verdict, conserved = Audit(0, 0, 0), None
    deadline = None
    while deadline is None or time.monotonic() < deadline:
        try:
            with _connect(target, ledger.PORT, SILENCE_POLL_S, connect_s=1.0) as sock:
                connections, local_port = connections + 1, sock.getsockname()[1]
                client.use(sock)
                with prompt():
                    client.run(stop)
                verdict, conserved = client.audit()
            failure = ""
            break
        except (OSError, BrokenConnectionError) as error:
            failure = str(error)
        if stop.at_ns:
            deadline = deadline or time.monotonic() + AT_THE_END_S + CONNECT_TIMEOUT_S
        time.sleep(_RECONNECT_EVERY_S)
    stop.wait()
    return TransactionsResult(
        connection_survived=not failure and connections == 1,
        failure=failure,
        stopped_ns=stop.at_ns,
        client=client.client,
        local_port=local_port,
        retransmits=0,
        sent=client.sent,
        acked=len(client.entries),
        **verdict._asdict(),
        total_conserved=conserved,
        arrived_ns=client.arrived_ns.tolist(),
        connections=connections,
    )


class BulkReader:
    """A reader of the bulk stream that checks every byte."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.verified_bytes = 0
        self.arrivals = Arrivals()

    def run(self, stop: Stop) -> None:
        """Read until SIGTERM; BrokenConnectionError or OSError when the connection does not last."""
        while not stop.at_ns:
            try:
                data = self._socket.recv(BULK_READ_BYTES)
            except BlockingIOError:  # a silence
                continue
            now_ns = time.monotonic_ns()
            if not data:
                raise BrokenConnectionError("the VM closed the connection")
            verify(data, self.verified_bytes)
            if not self.verified_bytes:
                say_ready()
            self.verified_bytes += len(data)
            self.arrivals.add(now_ns)


def bulk(target: str, stop: Stop) -> BulkResult:
    """Read and verify the bulk stream until SIGTERM."""
    failure = ""
    with _connect(target, content.PORT, SILENCE_POLL_S) as sock:
        local_port = sock.getsockname()[1]
        reader = BulkReader(sock)
        try:
            with prompt():
                reader.run(stop)
        except (OSError, BrokenConnectionError) as error:
            failure = str(error)
    if not reader.verified_bytes:
        raise TestbedError(failure or "the stream brought nothing")
    stop.wait()
    return BulkResult(
        connection_survived=not failure,
        failure=failure,
        stopped_ns=stop.at_ns,
        local_port=local_port,
        verified_bytes=reader.verified_bytes,
        arrived_ns=reader.arrivals.all(),
    )
