"""The light guest: a process in the VM's own network namespace, in the place of a virtual machine.

    python -m hosts.light_guest LISTENER_FD DISK_FD PAGE_FD NAME RAM_BYTES

It serves its agent on a Unix socket (hosts/channel.py), one agent after another: a VM that runs or is
suspended stays as it is while no agent is there.

Real are its memory (RAM that is migrated page by page), its network stack, its sockets and its disk, which it
reaches by its vmx (hosts/vmx_process.py); there is no CPU to emulate. All its program state is in RAM or in its
DeviceState, so that the process on the other host, which is another one, continues where this one stopped. It runs
as long as its lease page allows (hosts/lease_page.py). Its workloads:

    transaction server   TCP 7100   hosts/ledger.py, accounts and ledger in RAM; what is acknowledged is in the
                                    journal on the disk (hosts/journal.py)
    bulk stream          TCP 7200   hosts/bulk.py, paced
    UDP echo             UDP 7      RFC 862
                                    each on the VM's IPv4 address, and on its IPv6 address if it has one
    memory dirtier       writes pages of a working set at a rate
    ping                 answered by the namespace's kernel

What lies where in RAM: hosts/guest_memory.py.
"""

import array
import contextlib
import gc
import os
import select
import selectors
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np

from hosts import bulk, channel, ledger, neighbours, sockets
from hosts.disk_channel import Disk, VmxGone
from hosts.guest_memory import ECHOED_WORD, Memory
from hosts.journal import Journal, Recovered, Write, format_disk, recover
from hosts.lease_page import LeasePage
from hosts.ram import Ram, arm
from hosts.urgency import relax
from topologies.errors import TestbedError
from topologies.plan import VM

ECHO_PORT = 7
_TICK_S = 0.002  # the dirtier and the bulk stream work in steps: short against every downtime we aim at
_DEVICE = "eth0"
_BACKLOG = 1024  # connections that wait to be accepted: all that clients may open at once
_PIECE = 1 << 16  # bytes that are read, or answered, at a time
_STALLED_S = 0.005  # how often a guest that stands still looks for its lease
# Until the switch has relearned, acknowledgements go to the old host. A restored connection has no idea of its
# round-trip time and would wait three seconds for them: it asks, after these times, as long as one is due.
_PROBE_AFTER_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)


class Connection(msgspec.Struct):
    """An open TCP connection: its kernel state when frozen, and what the program knows about it."""

    service: str  # "transactions" or "bulk"
    received: bytes = b""  # the beginning of a request; or requests that have to wait
    waiting: list[tuple[int, bytes]] = []  # replies, each until that entry is on the disk
    owed: int = 0  # bytes of them
    unsent: bytes = b""  # replies that did not fit into the socket
    ended: bool = False  # the client has said good-bye: it gets its answers, then it is closed
    offset: int = 0  # bulk: bytes of the stream handed to the kernel
    settled: sockets.Settled | None = None  # not while `tcp` has it
    tcp: sockets.TcpState | None = None

    @property
    def deaf(self) -> bool:
        """Nothing is read while requests or answers wait: what a client does not take must not pile up here."""
        return self.ended or bool(self.unsent) or self._is_behind

    @property
    def is_done(self) -> bool:
        """The client has said good-bye, and has all its answers."""
        return self.ended and not self.has_to_wait

    @property
    def has_to_wait(self) -> bool:
        return bool(self.unsent or self.waiting or self._is_behind)

    @property
    def _is_behind(self) -> bool:
        """There are requests that were not even begun."""
        return self.service == "transactions" and len(self.received) >= ledger.REQUEST.size


class DeviceState(msgspec.Struct, frozen=True):
    """What is not in RAM: the CPU and device registers of this machine."""

    connections: list[Connection]
    datagrams: list[tuple[bytes, tuple[str, int]]]  # received by the kernel, not yet by the program
    neighbours: list[tuple[str, str]]  # IP, MAC
    dropped_connections: int  # not carried (hosts/sockets.py): closed meanwhile, or in TIME_WAIT


class LightGuest:
    """The program: one loop, one thread. `running` is the virtual CPU's state."""

    def __init__(self, listener: socket.socket, disk: Disk, page: LeasePage, ram: Ram) -> None:
        self.ram, self.disk, self.page = ram, disk, page
        self.tracking, self.userfaults = arm(ram)
        self.pidfd = os.pidfd_open(os.getpid())
        self.state: channel.GuestState = "new"  # as an agent's successor is told
        self.running = False
        self.vm: VM
        self.memo = b""
        self.memory: Memory
        self.journal: Journal
        self.writing: Write | None = None  # what the disk has been asked to write
        self.selector = selectors.DefaultSelector()
        self.listener = listener
        self.line: channel.Line | None = None  # to an agent, if there is one
        listener.listen()  # again: it is this process now that the other side sees (SO_PEERCRED, unix(7))
        self.selector.register(listener, selectors.EVENT_READ)
        self.selector.register(disk, selectors.EVENT_READ, self.on_written)
        self.listeners: dict[socket.socket, str] = {}
        self.connections: dict[socket.socket, Connection] = {}
        self.echoes: dict[int, socket.socket] = {}  # by address family
        self.pending: list[tuple[bytes, tuple[str, int]]] = []
        self.frozen: list[tuple[socket.socket, sockets.TcpState | None]] = []
        self._last_tick = 0.0
        self._throttle = 0.0  # the share of its time that the virtual CPU is kept from running
        self._missing, self._waits_us = False, array.array("d")  # post-copy: are pages missing, and waits for them
        self._probes: list[tuple[float, list[socket.socket]]] = []  # who are to be asked, and when

    def serve(self) -> None:
        """Until an agent goes that this guest cannot do without."""
        while True:
            try:
                self._work()
            except EOFError:
                if self.state in ("new", "awaiting"):  # nobody could ever tell it what to be
                    return
                relax()  # a switchover that has lost its agent is in no hurry
                self._throttle = 0.0
                self._listen_to(None)

    def _work(self) -> NoReturn:
        """Until the agent is gone: EOFError."""
        while True:
            if not self.running:
                self._attend()
                continue
            if not self.page.lasts:
                self._stand_still()
                continue
            ready = {key.fileobj: key.data for key, _ in self.selector.select(self._until_tick())}
            if self.control in ready:  # alone: after a suspend no socket may be touched
                self._attend()
                continue
            for fileobj, handle in ready.items():
                handle(fileobj)
            if self._until_tick() == 0:
                self.tick()
                self._stall()

    def _stall(self) -> None:
        """A throttled virtual CPU: nothing runs for its share of the time, but the agent is heard."""
        if self._throttle:
            worked = time.monotonic() - self._last_tick + _TICK_S
            agent = select.poll()
            agent.register(self.control, select.POLLIN)
            agent.poll(worked * self._throttle / (1 - self._throttle) * 1000)
            self._last_tick = time.monotonic()  # what was not run has not happened

    def _stand_still(self) -> None:
        """Without a lease nothing runs, but the agent is heard."""
        agent = select.poll()
        agent.register(self.control, select.POLLIN)
        if agent.poll(_STALLED_S * 1000):
            self._attend()
        self._last_tick = time.monotonic()

    def _until_tick(self) -> float:
        return max(0.0, self._last_tick + _TICK_S - time.monotonic())

    # ------------------------------------------------------------ the agent's requests

    def _attend(self) -> None:
        """The agent's next request, or the next agent; EOFError if it is gone."""
        try:
            if self.line is None:
                self._greet()
            else:
                self._obey(self.line)
        except OSError as error:
            raise EOFError(f"the agent is gone: {error}") from error

    def _greet(self) -> None:
        line = channel.Line(self.listener.accept()[0])
        self._listen_to(line)
        vm = None if self.state == "new" else self.vm
        hello = channel.Hello(os.getpid(), self.state, self.ram.address, self.tracking, vm, self.memo)
        descriptors = [self.ram.fd, self.pidfd]
        line.send(hello, descriptors=descriptors + ([self.userfaults.fd] if self.userfaults else []))

    @property
    def control(self) -> socket.socket | channel.Line:
        """Where the next word comes from."""
        return self.line or self.listener

    def _listen_to(self, line: channel.Line | None) -> None:
        """To an agent, or to whoever comes next."""
        self.selector.unregister(self.control)
        if self.line is not None:
            self.line.close()
        self.line = line
        self.selector.register(self.control, selectors.EVENT_READ)

    def _obey(self, line: channel.Line) -> None:
        number, request = line.receive()
        try:
            reply = self._do(request)
        except (TestbedError, OSError, msgspec.MsgspecError) as error:
            reply = channel.Failed(f"{type(request).__name__}: {error}")
        line.send(reply, number)

    def _do(self, request: channel.Message) -> channel.Message:
        match request:
            case channel.Boot(vm=vm, memo=memo, nvram=nvram):
                self._become(vm, memo)
                self.memory.format(nvram)
                recovered = self._open_disk()
                self._open_services()
                self._run()
                self.state = "running"
                return channel.Booted(recovered.entries, recovered.replayed)
            case channel.Shutdown():
                self.running, self.state = False, "suspended"
                self._flush()
                return channel.Halted(self.memory.nvram())
            case channel.Await(vm=vm, memo=memo):
                self._become(vm, memo)
                self.state = "awaiting"
            case channel.Suspend():
                self.state = "suspended"
                return channel.State(msgspec.msgpack.encode(self._suspend()))
            case channel.Restore(device=device):
                self._restore(msgspec.msgpack.decode(device, type=DeviceState))
                self.state = "restored"
            case channel.Run():
                self._run()
                self.state = "running"
            case channel.Throttle(share=share):
                self._throttle = share
            case channel.Missing(on=on):
                self._missing, waits = on, self._waits_us.tolist()
                self._waits_us = array.array("d")
                return channel.Waits(waits)
            case _:
                raise TestbedError(f"a guest does not understand {type(request).__name__}")
        return channel.Done()

    def _become(self, vm: VM, memo: bytes) -> None:
        self.vm, self.memo, self.memory = vm, memo, Memory(self.ram, vm)

    def _open_disk(self) -> Recovered:
        """A power-on: the ledger is what the disk says."""
        recovered = recover(self.memory.ledger, self.disk.read, self.vm.disk)
        if recovered.fresh:
            for offset, content in format_disk(self.vm.disk):
                self.disk.write(offset, content)
                self.disk.await_written()
        self.journal = Journal(self.memory.ledger, self.vm.disk)
        return recovered

    def _flush(self) -> None:
        """A shut-down: all is on the disk, and the next power-on has nothing to replay."""
        self._commit()
        while self.writing is not None:
            self._note_written()
            self._commit()
        last = self.writing = self.journal.checkpoint(self.page.generation)
        self.disk.write(last.offset, last.data)
        self._note_written()

    def _suspend(self) -> DeviceState:
        """Between two steps of the loop nothing is half done: all state is in RAM and in the sockets."""
        self.running = False
        for listener, service in self.listeners.items():  # established, not yet accepted: they are ours to carry
            while self.accept(listener, service):
                pass
        datagrams = self.pending + [datagram for echo in self.echoes.values() for datagram in _drain(echo)]
        carried, dropped = [], _time_waits()
        for sock, connection in self.connections.items():
            tcp = sockets.checkpoint(sock, connection.settled)
            if tcp is None:
                dropped += 1
                continue
            self.frozen.append((sock, None))
            carried.append(msgspec.structs.replace(connection, settled=None, tcp=tcp))
        self.pending = datagrams  # for the case that the migration is in vain
        return DeviceState(carried, datagrams, neighbours.known(), dropped)

    def _restore(self, state: DeviceState) -> None:
        self.memory.check()
        self.memory = Memory(self.ram, self.vm)  # the ledger's clients are in the RAM that has arrived
        self.journal = Journal(self.memory.ledger, self.vm.disk)  # and how far the disk has got
        neighbours.learn(_DEVICE, state.neighbours)  # first: the kernel would ask in the dark for one that it misses
        self._open_services()
        for connection in state.connections:
            tcp = connection.tcp
            if tcp is None:
                raise TestbedError(f"a {connection.service} connection came without its TCP state")
            sock = sockets.restore(tcp)
            self.frozen.append((sock, tcp))
            connection.settled, connection.tcp = tcp.settled, None
            self._adopt(sock, connection)
        self.pending = state.datagrams

    def _run(self) -> None:
        """The virtual CPU starts, or starts again after a suspend that was in vain."""
        for sock, tcp in self.frozen:
            try:
                sockets.release(sock, tcp)
                sock.setblocking(False)
            except OSError as error:  # its client went meanwhile
                self._lost(sock, error)
        restored = [sock for sock, tcp in self.frozen if tcp]
        self._probes = [(time.monotonic() + after, restored) for after in _PROBE_AFTER_S]
        self.frozen.clear()
        for data, sender in self.pending:
            self._echo(data, sender)
        self.pending = []
        self.running, self._last_tick = True, time.monotonic()

    # ------------------------------------------------------------ services

    def _open_services(self) -> None:
        self._open_services_on(socket.AF_INET, str(self.vm.interface.ip))
        if self.vm.interface6:
            self._open_services_on(socket.AF_INET6, str(self.vm.interface6.ip))

    def _open_services_on(self, family: int, ip: str) -> None:
        echo = self.echoes[family] = socket.socket(family, socket.SOCK_DGRAM)
        echo.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 2**20)
        echo.bind((ip, ECHO_PORT))
        echo.setblocking(False)
        self.selector.register(echo, selectors.EVENT_READ, self.answer_datagrams)
        for port, service in ((ledger.PORT, "transactions"), (bulk.PORT, "bulk")):
            listener = socket.create_server((ip, port), family=family, backlog=_BACKLOG)
            listener.setblocking(False)
            self.listeners[listener] = service
            self.selector.register(listener, selectors.EVENT_READ, partial(self.accept, service=service))

    def accept(self, listener: socket.socket, service: str) -> bool:
        """Take the next connection of a listener, if there is one."""
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:  # no descriptor left
            print(f"{service} connection not accepted: {error}", file=sys.stderr, flush=True)
            return False
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._adopt(sock, Connection(service, settled=sockets.settled(sock)))
        except OSError as error:  # reset while it waited
            print(f"{service} connection lost before it began: {error}", file=sys.stderr, flush=True)
            sock.close()
        return True

    def _adopt(self, sock: socket.socket, connection: Connection) -> None:
        self.connections[sock] = connection
        if not connection.deaf:
            self.selector.register(sock, selectors.EVENT_READ, self.read)

    def _lost(self, sock: socket.socket, error: Exception) -> None:
        """One connection has ended badly: the others, and the VM, go on."""
        print(f"{self.connections[sock].service} connection closed: {error}", file=sys.stderr, flush=True)
        self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        if sock in self.selector.get_map():
            self.selector.unregister(sock)
        del self.connections[sock]
        sock.close()

    def answer_datagrams(self, echo: socket.socket) -> None:
        for data, sender in _drain(echo):
            self._echo(data, sender)

    def _echo(self, data: bytes, sender: tuple[str, int]) -> None:
        self.memory.header[ECHOED_WORD] += np.uint64(1)
        echo = self.echoes[socket.AF_INET6 if ":" in sender[0] else socket.AF_INET]
        with contextlib.suppress(OSError):  # a full queue, a sender that cannot be answered: UDP may lose
            echo.sendto(data, sender)

    def read(self, sock: socket.socket) -> None:
        """Requests on a transaction connection; a bulk client says nothing but good-bye."""
        # the disk's word, in the same look, has ended it (a closed one is no key: ValueError) or made it wait
        if sock.fileno() < 0 or sock not in self.selector.get_map():
            return
        connection = self.connections[sock]
        try:
            data = sock.recv(_PIECE)
            connection.ended = not data
            if connection.service == "transactions":
                connection.received += data
                self._serve(sock, connection)
        except BlockingIOError:
            return
        except (OSError, ledger.LedgerError) as error:
            self._lost(sock, error)
            return
        if connection.deaf:
            self.selector.unregister(sock)

    def _serve(self, sock: socket.socket, connection: Connection) -> None:
        """Do what it has asked for, as far as it takes the answers; each waits until all before it is on the disk."""
        size, at = ledger.REQUEST.size, 0
        while (
            len(connection.received) - at >= size
            and len(connection.unsent) + connection.owed < _PIECE
            and not self.memory.ledger.is_full
        ):
            reply = self._reply(connection.received[at : at + size])
            connection.waiting.append((self.memory.ledger.entries, reply))
            connection.owed += len(reply)
            at += size
        connection.received = connection.received[at:]
        self._commit()
        ready = 0
        while ready < len(connection.waiting) and connection.waiting[ready][0] <= self.journal.durable:
            ready += 1
        replies = b"".join(reply for _, reply in connection.waiting[:ready])
        del connection.waiting[:ready]
        connection.owed -= len(replies)
        if replies or connection.unsent:
            self._send(sock, connection, connection.unsent + replies)

    def _serve_on(self, sock: socket.socket, connection: Connection) -> None:
        """One that had to wait, for its disk or for its client."""
        try:
            self._serve(sock, connection)
        except (OSError, ledger.LedgerError) as error:
            self._lost(sock, error)
            return
        registered = sock in self.selector.get_map()
        if registered and connection.deaf:
            self.selector.unregister(sock)
        elif not registered and not connection.deaf:
            self.selector.register(sock, selectors.EVENT_READ, self.read)

    def _commit(self) -> None:
        """Have what is new written to the disk, one piece after the other: a group commit."""
        if self.writing is None and (write := self.journal.next_write(self.page.generation)) is not None:
            self.disk.write(write.offset, write.data)
            self.writing = write

    def on_written(self, _disk: Disk) -> None:
        self._note_written()
        self._commit()
        for sock, connection in list(self.connections.items()):
            if connection.waiting:
                self._serve_on(sock, connection)

    def _note_written(self) -> None:
        self.disk.await_written()
        if self.writing is not None:
            self.journal.written(self.writing)
            self.writing = None

    def _end(self, sock: socket.socket) -> None:
        """Close a connection on which all is said, once the client has acknowledged it.

        Closed earlier, the rest of it would be the kernel's alone, and a migration could not carry it.
        """
        try:
            sock.shutdown(socket.SHUT_WR)  # again and again: it is refused when there is nothing left to be said
        except OSError:
            self._drop(sock)

    def _reply(self, request: bytes) -> bytes:
        kind, client, sequence, source, target, amount = ledger.REQUEST.unpack(request)
        if kind == ledger.TRANSFER:
            entry = self.memory.ledger.apply(ledger.Transfer(client, sequence, source, target, amount))
            return ledger.REPLY.pack(ledger.DONE, sequence, entry)
        if kind == ledger.AUDIT:
            records = self.memory.ledger.records(sequence, amount)
            return ledger.REPLY.pack(ledger.LEDGER, len(records), self.memory.ledger.total) + records.tobytes()
        raise ledger.LedgerError(f"{kind!r} is no request")

    def _send(self, sock: socket.socket, connection: Connection, data: bytes) -> int:
        """Hand data to the kernel; what does not fit is kept and sent in later ticks."""
        try:
            sent = sock.send(data) if data else 0
        except BlockingIOError:
            sent = 0
        connection.unsent = data[sent:]
        return sent

    # ------------------------------------------------------------ what happens without being asked

    def tick(self) -> None:
        now = time.monotonic()
        # after a pause (a suspend, a busy machine) the work missed is not made up for
        elapsed = min(now - self._last_tick, 5 * _TICK_S)
        self._last_tick = now
        writes = self.memory.due(elapsed)
        if self._missing:
            self._waits_us.extend(self.memory.write_one_by_one(writes))
        else:
            self.memory.write(writes)
        while self._probes and self._probes[0][0] <= now:
            for sock in self._probes.pop(0)[1]:
                if sock in self.connections:
                    sockets.probe(sock)
        for sock, connection in list(self.connections.items()):
            try:
                if connection.is_done:
                    self._end(sock)
                elif connection.service == "bulk":
                    due = max(1, int(self.vm.bulk_rate / 8 * elapsed))
                    connection.offset += self._send(
                        sock, connection, bulk.pattern(connection.offset, min(due, 1 << 17))
                    )
                    connection.unsent = b""  # the pattern is known: what did not fit is made again
                elif connection.has_to_wait:
                    self._serve_on(sock, connection)
            except (OSError, ledger.LedgerError) as error:
                self._lost(sock, error)


def _drain(echo: socket.socket) -> list[tuple[bytes, tuple[str, int]]]:
    datagrams: list[tuple[bytes, tuple[str, int]]] = []
    while True:
        try:
            data, (ip, port, *_) = echo.recvfrom(2048)
        except BlockingIOError:
            return datagrams
        datagrams.append((data, (ip, port)))


def _time_waits() -> int:
    """Connections of this namespace in TIME_WAIT; handshakes under way could only be counted in a millisecond."""
    words = Path("/proc/self/net/sockstat").read_text().split()
    return int(words[words.index("tw") + 1])


def main() -> int:
    listener, disk, page = map(int, sys.argv[1:4])
    ram = Ram.create(sys.argv[4], int(sys.argv[5]))
    gc.freeze()  # what is imported stays: collecting it would stop the virtual CPU for 10 ms
    LightGuest(socket.socket(fileno=listener), Disk(socket.socket(fileno=disk)), LeasePage(page), ram).serve()
    return 0


if __name__ == "__main__":
    os.nice(-5)  # a virtual CPU has a guaranteed share; probes and captures must not starve it
    try:
        sys.exit(main())
    except TestbedError as error:
        sys.exit(f"{error}")
    except VmxGone:
        sys.exit("the vmx is gone")
