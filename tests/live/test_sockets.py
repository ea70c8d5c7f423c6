"""TCP connections out of one kernel into another and back: a client, and two hosts between which a VM moves.

client --- bridge --- esx1, esx2      the VM's address and MAC behind two ports, of which at most one is open
"""

import array
import ctypes
import errno
import fcntl
import os
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from select import select

import msgspec
import pytest
from namespaces import Node, inside
from programs import eventually

from experiments.world import run
from hosts.bulk import pattern
from hosts.sockets import TcpState, checkpoint, release, restore
from topologies.errors import TestbedError

VM_MAC, CLIENT_MAC = "00:50:56:00:00:01", "00:50:56:00:01:64"
VM_IPS = {socket.AF_INET: "10.9.1.11", socket.AF_INET6: "fd00:9::11"}
CLIENT_IPS = {socket.AF_INET: "10.9.1.100", socket.AF_INET6: "fd00:9::100"}
PREFIXES = {socket.AF_INET: 24, socket.AF_INET6: 64}
PORT = 7200
MOVES = 20
ENOUGH = 1 << 20  # bytes that have to arrive between two moves, each way
PATIENCE_S = 20.0
LISTENING, FORWARDING = "1", "3"  # linux/if_bridge.h, BR_STATE_*
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27  # asm-generic/socket.h
SO_BUF_LOCK, SIOCOUTQNSD, TCP_USER_TIMEOUT = 72, 0x894B, 18  # asm-generic/socket.h, linux/sockios.h, linux/tcp.h
ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE, CLOSE_WAIT, LAST_ACK, CLOSING = 1, 4, 5, 7, 8, 9, 11  # net/tcp_states.h
WE_SAID_GOOD_BYE = (FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING)
PEER_SAID_GOOD_BYE = (CLOSE_WAIT, LAST_ACK, CLOSING)
LISTEN, TIME_WAIT, CLOSED = "0A", "06", "07"  # the same in /proc/net/tcp
CHUNK = 1 << 16
SOL, TCP = socket.SOL_SOCKET, socket.IPPROTO_TCP


# ---------------------------------------------------------------- the network


class Host(Node):
    """Where the VM can be: its address and its listener are there all the time, its port is dark at first."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "link", "set", "eth0", "address", VM_MAC, "up")
        # as in a VM's namespace (hosts/vswitch.py): what is in the send queue is copied during the downtime
        self.run("sysctl", "-qw", "net.ipv4.tcp_wmem=4096 16384 1048576")
        run("ip", "link", "set", name, "master", "vSwitch", "up")
        eventually(lambda: "state forwarding" in run("bridge", "link", "show", "dev", name), "carrier")
        self.gate(LISTENING)
        own_addresses(self, VM_IPS)
        for ip in CLIENT_IPS.values():
            self.run("ip", "neigh", "replace", ip, "lladdr", CLIENT_MAC, "dev", "eth0", "nud", "stale")
        with inside(self.pid):
            self.listeners = {
                family: socket.create_server((ip, PORT), family=family, backlog=1024) for family, ip in VM_IPS.items()
            }
        for listener in self.listeners.values():
            listener.settimeout(PATIENCE_S)

    def gate(self, state: str) -> None:
        run("bridge", "link", "set", "dev", self.name, "learning", "off", "state", state)

    def end(self) -> None:
        for listener in self.listeners.values():
            listener.close()
        if f"{self.name}@" in run("ip", "-br", "link"):
            run("ip", "link", "del", self.name)
        super().end()


def own_addresses(node: Node, ips: dict[socket.AddressFamily, str]) -> None:
    for family, ip in ips.items():
        nodad = ["nodad"] if family == socket.AF_INET6 else []
        node.run("ip", "addr", "add", f"{ip}/{PREFIXES[family]}", "dev", "eth0", *nodad)


class Network:
    """The VM is at `here`; `move` takes it `there`. Sockets live until the end, so that none says good-bye before."""

    def __init__(self, family: socket.AddressFamily = socket.AF_INET) -> None:
        self.family, self.vm_ip, self.client_ip = family, VM_IPS[family], CLIENT_IPS[family]
        run("ip", "link", "add", "vSwitch", "type", "bridge", "stp_state", "0", "mcast_snooping", "0")
        run("ip", "link", "set", "vSwitch", "up")
        self.client = Node()
        run("ip", "link", "add", "uplink", "type", "veth", "peer", "name", "eth0", "netns", str(self.client.pid))
        run("ip", "link", "set", "uplink", "master", "vSwitch", "up")
        self.client.run("ip", "link", "set", "eth0", "address", CLIENT_MAC, "up")
        own_addresses(self.client, CLIENT_IPS)
        self.here, self.there = Host("esx1"), Host("esx2")
        self._sockets: list[socket.socket] = []
        self.let_in()

    def let_in(self) -> None:
        """Open the port of the host where the VM is, and send its frames there."""
        run("bridge", "fdb", "replace", VM_MAC, "dev", self.here.name, "master", "static")
        self.here.gate(FORWARDING)

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """A connection to the VM's listener: the client's end and the VM's."""
        with inside(self.client.pid):
            client = socket.create_connection((self.vm_ip, PORT), PATIENCE_S)
        vm, _ = self.here.listeners[self.family].accept()
        client.setblocking(False)
        vm.setblocking(False)
        self._sockets += [client, vm]
        return client, vm

    def move(self, *connections: socket.socket) -> tuple[list[socket.socket], list[TcpState]]:
        """Take the VM with its connections to the other host, in the order of a switchover."""
        self.here.gate(LISTENING)
        states = [frozen(sock) for sock in connections]
        for sock in connections:
            sock.close()
        self.here, self.there = self.there, self.here
        return self.arrive(states), states

    def arrive(self, states: list[TcpState]) -> list[socket.socket]:
        """The second half of `move`."""
        sent = msgspec.msgpack.encode(states)
        with inside(self.here.pid):
            arrived = [restore(state) for state in msgspec.msgpack.decode(sent, type=list[TcpState])]
        self._sockets += arrived
        self.let_in()
        for sock, state in zip(arrived, states, strict=True):
            release(sock, state)
            sock.setblocking(False)
        return arrived

    def resets(self) -> int:
        """RST segments that the three kernels have sent."""
        return sum(int(tcp_counters(node)["OutRsts"]) for node in (self.client, self.here, self.there))

    def end(self) -> None:
        for sock in self._sockets:
            sock.close()
        for host in (self.here, self.there):
            host.end()
        run("ip", "link", "del", "uplink")
        self.client.end()
        run("ip", "link", "del", "vSwitch")


def tcp_counters(node: Node) -> dict[str, str]:
    with open(f"/proc/{node.pid}/net/snmp") as lines:
        names, values = (line.split()[1:] for line in lines if line.startswith("Tcp:"))
    return dict(zip(names, values, strict=True))


def frozen(sock: socket.socket) -> TcpState:
    state = checkpoint(sock)
    assert state is not None
    return state


@pytest.fixture(params=list(VM_IPS), ids=lambda family: str(family.name))
def unchecked(request: pytest.FixtureRequest) -> Iterator[Network]:
    network = Network(request.param)
    yield network
    network.end()


@pytest.fixture
def network(unchecked: Network) -> Iterator[Network]:
    """A network in which no kernel ever answers with a reset."""
    yield unchecked
    assert unchecked.resets() == 0


# ---------------------------------------------------------------- the two ends of a connection


class Talker:
    """One end: sends the known stream and checks the other end's."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.sent = self.received = 0
        self.ends = False  # whether the other end may say good-bye

    def say(self, most: int = CHUNK) -> bool:
        """False if the kernel takes nothing now."""
        try:
            self.sent += self.socket.send(pattern(self.sent, most))
        except BlockingIOError:
            return False
        return True

    def hear(self) -> bool:
        """False if there is nothing to hear now."""
        try:
            data = self.socket.recv(CHUNK)
        except BlockingIOError:
            return False
        if not data and self.ends:
            return False
        assert data, f"the other end closed after {self.received} bytes"
        assert data == pattern(self.received, len(data)), f"wrong bytes within {len(data)} from {self.received} on"
        self.received += len(data)
        return True

    def talk(self, until: Callable[[], bool]) -> None:
        """Say and hear as much as goes, until a condition holds; AssertionError if nothing goes any more."""
        deadline = time.monotonic() + PATIENCE_S
        while not until():
            said, heard = self.say(), self.hear()
            if said or heard:
                deadline = time.monotonic() + PATIENCE_S
            else:
                select([self.socket], [self.socket], [], 0.05)
            assert time.monotonic() < deadline, f"stuck after {self.sent} bytes sent and {self.received} received"

    def exchange(self, count: int = ENOUGH) -> None:
        """Until so many more bytes have gone each way; the other end has to be busy."""
        sent, received = self.sent + count, self.received + count
        self.talk(lambda: self.sent >= sent and self.received >= received)


def queued(sock: socket.socket) -> tuple[int, int, int]:
    """Bytes in the receive queue, in the send queue, and of these those that never left."""
    values = []
    for request in (termios.FIONREAD, termios.TIOCOUTQ, SIOCOUTQNSD):
        value = array.array("i", [0])
        fcntl.ioctl(sock, request, value)
        values.append(value[0])
    return values[0], values[1], values[2]


def fill(talker: Talker) -> None:
    """Say so much that the other end's window closes."""

    def full() -> bool:
        if talker.say():
            return False
        _, unacknowledged, never_left = queued(talker.socket)
        return unacknowledged == never_left > 0

    eventually(full, "closed window")


def hear_everything(*ends: Talker) -> None:
    """Nothing more is said; every byte arrives."""

    def all_heard() -> bool:
        for end in ends:
            while end.hear():
                pass
        return sum(end.received for end in ends) == sum(end.sent for end in ends)

    eventually(all_heard, "all the bytes that were sent")


def greet(near: Talker, far: Talker) -> None:
    """A few bytes each way."""
    assert near.say(100)
    assert far.say(100)
    hear_everything(near, far)


@contextmanager
def busy(far: Talker) -> Iterator[None]:
    """The other end talks all the time."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        talk = pool.submit(far.talk, stop.is_set)
        try:
            yield
        finally:
            stop.set()
            talk.result()


def talkers(network: Network) -> tuple[Talker, Talker]:
    """The VM's end and the client's."""
    client, vm = network.connect()
    return Talker(vm), Talker(client)


def sizes(sock: socket.socket) -> list[int]:
    """What a move has to leave as it is: buffers, their lock, MSS, negotiated options, window scales."""
    names = ((SOL, socket.SO_SNDBUF), (SOL, socket.SO_RCVBUF), (SOL, SO_BUF_LOCK), (TCP, socket.TCP_MAXSEG))
    info = sock.getsockopt(TCP, socket.TCP_INFO, 8)  # struct tcp_info, linux/tcp.h
    return [*(sock.getsockopt(*name) for name in names), *info[5:7]]


# ---------------------------------------------------------------- moves


@pytest.mark.parametrize("without", ["nothing", "timestamps", "sack", "window_scaling"])
def test_a_connection_in_full_use_moves_back_and_forth_and_every_byte_arrives(network: Network, without: str) -> None:
    if without != "nothing":
        network.client.run("sysctl", "-qw", f"net.ipv4.tcp_{without}=0")
    near, far = talkers(network)
    with busy(far):
        for _ in range(MOVES):
            near.exchange()
            (near.socket,), _ = network.move(near.socket)
        near.exchange()
    hear_everything(near, far)
    assert far.received > MOVES * ENOUGH
    assert near.socket.getpeername() == far.socket.getsockname()


def test_an_idle_connection_moves_with_empty_queues_and_its_buffers_do_not_grow(network: Network) -> None:
    near, far = talkers(network)
    before = sizes(near.socket)
    for _ in range(MOVES):
        eventually(lambda: queued(near.socket) == queued(far.socket) == (0, 0, 0), "acknowledgements")
        (near.socket,), (state,) = network.move(near.socket)
        assert (state.recv_queue, state.send_queue, state.unsent) == (b"", b"", 0)
        assert sizes(near.socket) == before
        greet(near, far)


def test_full_queues_of_ends_that_do_not_read_move_and_every_byte_arrives(network: Network) -> None:
    near, far = talkers(network)
    fill(near)
    fill(far)
    before, waiting = sizes(near.socket), queued(near.socket)
    assert min(waiting) > CHUNK
    for _ in range(5):
        (near.socket,), (state,) = network.move(near.socket)
        assert (len(state.recv_queue), len(state.send_queue), state.unsent) == waiting
        assert sizes(near.socket) == before
    hear_everything(near, far)
    greet(near, far)


def test_what_either_end_says_in_the_dark_arrives_after_the_move(network: Network) -> None:
    near, far = talkers(network)
    greet(near, far)
    network.here.gate(LISTENING)
    assert near.say(5_000)
    assert far.say(5_000)
    (near.socket,), (state,) = network.move(near.socket)
    assert len(state.send_queue) == 5_000 > state.unsent  # some of it had left, for nowhere
    hear_everything(near, far)


@pytest.mark.parametrize("nodelay", [False, True])
@pytest.mark.parametrize("length", [1, 5_000, 14_480, 14_550, 60_000])  # around an initial window of 10 segments
def test_what_the_client_has_received_without_the_vm_hearing_of_it_is_settled_after_the_move(
    network: Network, length: int, nodelay: bool
) -> None:
    near, far = talkers(network)
    near.socket.setsockopt(TCP, socket.TCP_NODELAY, nodelay)
    assert near.say(length)
    hear_everything(near, far)
    eventually(lambda: queued(near.socket) == (0, 0, 0), "acknowledgement")
    network.here.gate(LISTENING)
    state = msgspec.structs.replace(frozen(near.socket), send_queue=pattern(0, length), unsent=0)  # it was not heard
    near.socket.close()
    network.here, network.there = network.there, network.here
    (near.socket,) = network.arrive([state])
    eventually(lambda: queued(near.socket) == (0, 0, 0), "acknowledgement")
    greet(near, far)


def test_a_client_that_says_good_bye_during_the_move_is_heard_afterwards(network: Network) -> None:
    near, far = talkers(network)
    network.here.gate(LISTENING)
    state = frozen(near.socket)
    near.socket.close()
    far.say(100)
    far.socket.shutdown(socket.SHUT_WR)
    network.here, network.there = network.there, network.here
    (near.socket,) = network.arrive([state])
    near.socket.settimeout(PATIENCE_S)
    assert near.socket.recv(1000) == pattern(0, 100)
    assert near.socket.recv(1000) == b""


def test_many_connections_move_at_once_beside_the_listener_and_new_ones_are_accepted(network: Network) -> None:
    pairs = [talkers(network) for _ in range(8)]
    for _ in range(4):
        arrived, _ = network.move(*(near.socket for near, _ in pairs))
        for (near, far), sock in zip(pairs, arrived, strict=True):
            near.socket = sock
            greet(near, far)
        pairs.append(talkers(network))
        greet(*pairs[-1])


def test_a_connection_that_the_vm_itself_has_opened_moves(network: Network) -> None:
    with inside(network.client.pid):
        listener = socket.create_server((network.client_ip, PORT), family=network.family)
    with listener:
        with inside(network.here.pid):
            vm = socket.create_connection((network.client_ip, PORT), PATIENCE_S)
        vm.setblocking(False)
        near, far = Talker(vm), Talker(listener.accept()[0])
        far.socket.setblocking(False)
    for _ in range(4):
        (near.socket,), _ = network.move(near.socket)
        greet(near, far)


def test_sequence_numbers_may_wrap_around_in_the_middle_of_a_queue(network: Network) -> None:
    near, far = talkers(network)
    network.here.gate(LISTENING)
    vm, client = frozen(near.socket), frozen(far.socket)
    near.socket.close()
    far.socket.close()
    vm, client = numbered(vm, client, 2**32 - 3_000)
    client, vm = numbered(client, vm, 2**32 - 70_000)
    with inside(network.client.pid):
        far.socket = restore(client)
    far.socket.setblocking(False)
    (near.socket,) = network.arrive([vm])
    release(far.socket, client)
    network.here.gate(LISTENING)
    assert near.say(5_000)
    (near.socket,), (state,) = network.move(near.socket)
    assert state.send_seq < len(state.send_queue) == 5_000
    with busy(far):
        for _ in range(4):
            near.exchange()
            (near.socket,), _ = network.move(near.socket)
    hear_everything(near, far)


def numbered(sender: TcpState, receiver: TcpState, number: int) -> tuple[TcpState, TcpState]:
    """Both ends as if the sender's next byte had this sequence number."""
    shift = number - sender.send_seq
    wl1, wnd, max_window, rcv_wnd, rcv_wup = struct.unpack("5I", receiver.window)
    window = struct.pack("5I", (wl1 + shift) % 2**32, wnd, max_window, rcv_wnd, (rcv_wup + shift) % 2**32)
    return (
        msgspec.structs.replace(sender, send_seq=number),
        msgspec.structs.replace(receiver, recv_seq=(receiver.recv_seq + shift) % 2**32, window=window),
    )


def test_the_programs_settings_move_with_its_connection(network: Network) -> None:
    near, far = talkers(network)
    chosen = {
        (TCP, socket.TCP_NODELAY): 1,
        (SOL, socket.SO_KEEPALIVE): 1,
        (TCP, socket.TCP_KEEPIDLE): 33,
        (TCP, socket.TCP_KEEPINTVL): 7,
        (TCP, socket.TCP_KEEPCNT): 4,
        (TCP, TCP_USER_TIMEOUT): 12_345,
    }
    plain = {name: near.socket.getsockopt(*name) for name in chosen}
    assert not plain.items() & chosen.items()
    (near.socket,), _ = network.move(near.socket)
    assert {name: near.socket.getsockopt(*name) for name in chosen} == plain

    for name, value in chosen.items():
        near.socket.setsockopt(*name, value)
    near.socket.setsockopt(TCP, socket.TCP_CONGESTION, b"reno")
    near.socket.setsockopt(SOL, socket.SO_SNDBUF, 50_000)
    near.socket.setsockopt(SOL, socket.SO_RCVBUF, 60_000)
    before = sizes(near.socket)
    for _ in range(2):
        (near.socket,), _ = network.move(near.socket)
        assert {name: near.socket.getsockopt(*name) for name in chosen} == chosen
        assert near.socket.getsockopt(TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
        assert sizes(near.socket) == before
    greet(near, far)


# ---------------------------------------------------------------- half-closed connections


def state_of(sock: socket.socket) -> int:
    return sock.getsockopt(TCP, socket.TCP_INFO, 1)[0]


@contextmanager
def deaf(sock: socket.socket) -> Iterator[None]:
    """A connection that gets no segment: what the other end sends it, its good-bye too, is lost meanwhile."""
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # BPF: return 0 (linux/filter.h)
    program = struct.pack("HxxxxxxP", 1, ctypes.addressof(drop_all))
    sock.setsockopt(SOL, SO_ATTACH_FILTER, program)
    yield
    sock.setsockopt(SOL, SO_DETACH_FILTER, 0)


@contextmanager
def half_closed(network: Network, state: int, full: bool) -> Iterator[tuple[Talker, Talker]]:
    """A connection whose VM's end is in a state; its queues are empty, or as full as the state allows.

    Who is to hear nothing of it, hears nothing until the end of the block.
    """
    near, far = talkers(network)
    near.ends, far.ends = state in PEER_SAID_GOOD_BYE, state in WE_SAID_GOOD_BYE
    if full:
        assert far.socket.send(pattern(0, 40_000)) == 40_000
        far.sent = 40_000
        if state != FIN_WAIT2:  # in which the peer has acknowledged everything
            fill(near)
    if state in (CLOSE_WAIT, LAST_ACK):
        far.socket.shutdown(socket.SHUT_WR)
        eventually(lambda: state_of(near.socket) == CLOSE_WAIT, "good-bye of the client")
    with deaf(far.socket) if state in (FIN_WAIT1, LAST_ACK, CLOSING) and not full else nullcontext():
        if state in WE_SAID_GOOD_BYE:
            near.socket.shutdown(socket.SHUT_WR)
        if state == CLOSING:
            far.socket.shutdown(socket.SHUT_WR)
        eventually(lambda: state_of(near.socket) == state, f"state {state}")
        yield near, far


@pytest.mark.parametrize("full", [False, True], ids=["empty", "full"])
@pytest.mark.parametrize("name", ["FIN_WAIT1", "FIN_WAIT2", "CLOSE_WAIT", "LAST_ACK", "CLOSING"])
def test_a_half_closed_connection_moves_and_either_direction_ends_in_its_place(
    network: Network, name: str, full: bool
) -> None:
    state = globals()[name]
    with half_closed(network, state, full) as (near, far):
        (near.socket,), (frozen_state,) = network.move(near.socket)
        assert frozen_state.state == state
        assert len(frozen_state.recv_queue) == (40_000 if full else 0)
        assert bool(frozen_state.send_queue) == (full and state != FIN_WAIT2)
        if state in (FIN_WAIT2, CLOSE_WAIT):  # in which nothing is on its way that would change it
            assert state_of(near.socket) == state
    hear_everything(near, far)
    for talker, silent in ((near, WE_SAID_GOOD_BYE), (far, PEER_SAID_GOOD_BYE)):
        if state not in silent:  # its direction is open
            assert talker.say(30_000)
            talker.socket.shutdown(socket.SHUT_WR)
    near.ends = far.ends = True
    hear_everything(near, far)
    for talker in (near, far):
        talker.socket.settimeout(PATIENCE_S)
        assert talker.socket.recv(1) == b""
    eventually(lambda: tcp_states(network) <= {LISTEN, TIME_WAIT, CLOSED}, "end of the connection on both sides")


@pytest.mark.parametrize("name", ["FIN_WAIT2", "CLOSE_WAIT"])
def test_a_half_closed_connection_may_stay_so_for_many_moves(network: Network, name: str) -> None:
    state = globals()[name]
    with half_closed(network, state, full=False) as (near, far):
        talker = far if state == FIN_WAIT2 else near
        for _ in range(MOVES):
            assert talker.say(20_000)
            (near.socket,), (frozen_state,) = network.move(near.socket)
            assert frozen_state.state == state
            hear_everything(near, far)
        assert state_of(near.socket) == state


@pytest.mark.parametrize("name", ["FIN_WAIT1", "FIN_WAIT2", "CLOSE_WAIT", "LAST_ACK", "CLOSING"])
def test_a_checkpoint_in_vain_of_a_half_closed_connection_is_undone_in_place(network: Network, name: str) -> None:
    state = globals()[name]
    with half_closed(network, state, full=False) as (near, far):
        assert frozen(near.socket).state == state
        release(near.socket)
        assert state_of(near.socket) == state
    for talker in (near, far):
        with suppress(OSError):
            talker.socket.shutdown(socket.SHUT_WR)
    eventually(lambda: tcp_states(network) <= {LISTEN, TIME_WAIT, CLOSED}, "end of the connection on both sides")


def test_what_the_program_has_heard_as_the_end_is_the_end_after_the_move_too(network: Network) -> None:
    near, far = talkers(network)
    near.ends = True
    far.socket.shutdown(socket.SHUT_WR)
    eventually(lambda: select([near.socket], [], [], 0)[0] != [], "good-bye")
    for _ in range(2):
        assert near.socket.recv(1) == b""
        (near.socket,), _ = network.move(near.socket)
    assert near.say(1_000)
    hear_everything(near, far)


def test_a_host_can_be_rid_of_its_device_while_a_half_closed_connection_is_open(network: Network) -> None:
    """The kernel waits for ever for a device that a connection's route still refers to (seen with IPv6)."""
    with half_closed(network, CLOSE_WAIT, full=False) as (near, _):
        (near.socket,), _ = network.move(near.socket)
    removal = subprocess.Popen(["ip", "link", "del", network.here.name])
    try:
        removal.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        near.socket.setsockopt(SOL, socket.SO_LINGER, struct.pack("ii", 1, 0))  # or not even the test could end
        near.socket.close()
        raise


def tcp_states(network: Network) -> set[str]:
    """The states of all TCP sockets of both hosts and the client."""
    states = set()
    for node in (network.client, network.here, network.there):
        for file in ("tcp", "tcp6"):
            with open(f"/proc/{node.pid}/net/{file}") as lines:
                states |= {line.split()[3] for line in list(lines)[1:]}
    return states


# ---------------------------------------------------------------- timers


def test_what_was_lost_in_the_dark_leaves_again_after_an_ordinary_time_out(network: Network) -> None:
    """Of more than an initial window nothing leaves by itself; without a round-trip time TCP waits for 3 s."""
    near, far = talkers(network)
    assert near.say(60_000)
    hear_everything(near, far)
    network.here.gate(LISTENING)
    assert near.say(60_000)
    (near.socket,), (state,) = network.move(near.socket)
    assert state.outstanding == 60_000
    (timeout_us,) = struct.unpack_from("8xI", near.socket.getsockopt(TCP, socket.TCP_INFO, 12))  # tcpi_rto
    assert timeout_us < 500_000
    hear_everything(near, far)


def test_a_silent_client_is_still_asked_whether_it_is_alive_after_the_move(network: Network) -> None:
    near, far = talkers(network)
    keep_alive(near.socket)
    (near.socket,), _ = network.move(near.socket)
    eventually(lambda: keepalives(network.here) >= 2, "two keepalive probes")
    greet(near, far)


@pytest.mark.parametrize("name", ["ESTABLISHED", "CLOSE_WAIT"])
def test_a_client_that_is_gone_is_noticed_after_the_move(unchecked: Network, name: str) -> None:
    with half_closed(unchecked, globals()[name], full=False) as (near, _):
        keep_alive(near.socket)
        (near.socket,), _ = unchecked.move(near.socket)
    unchecked.here.gate(LISTENING)
    eventually(lambda: near.socket.getsockopt(SOL, socket.SO_ERROR) == errno.ETIMEDOUT, "time-out")


def keep_alive(sock: socket.socket) -> None:
    """Ask after a second of silence, every second, twice."""
    sock.setsockopt(SOL, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 2)):
        sock.setsockopt(TCP, option, value)


def keepalives(node: Node) -> int:
    """Keepalive probes that a kernel has sent."""
    with open(f"/proc/{node.pid}/net/netstat") as lines:
        names, values = (line.split()[1:] for line in lines if line.startswith("TcpExt:"))
    return int(dict(zip(names, values, strict=True))["TCPKeepAlive"])


# ---------------------------------------------------------------- many


def test_five_hundred_connections_move_in_one_batch(network: Network) -> None:
    pairs = [talkers(network) for _ in range(500)]
    for near, far in pairs[::2]:
        assert near.say(2_000)
        assert far.say(3_000)
    arrived, _ = network.move(*(near.socket for near, _ in pairs))
    for (near, far), sock in zip(pairs, arrived, strict=True):
        near.socket = sock
        hear_everything(near, far)
        greet(near, far)


def test_an_idle_connection_moves_without_a_single_segment(network: Network) -> None:
    near, far = talkers(network)
    greet(near, far)
    eventually(lambda: queued(near.socket) == queued(far.socket) == (0, 0, 0), "acknowledgements")
    sent = [tcp_counters(node)["OutSegs"] for node in (network.client, network.there)]
    (near.socket,), _ = network.move(near.socket)
    assert [tcp_counters(node)["OutSegs"] for node in (network.client, network.here)] == sent
    greet(near, far)


# ---------------------------------------------------------------- moves that do not happen


def test_a_checkpoint_in_vain_is_undone_in_place(network: Network) -> None:
    near, far = talkers(network)
    with busy(far):
        for _ in range(5):
            near.exchange()
            network.here.gate(LISTENING)
            frozen(near.socket)
            network.let_in()
            release(near.socket)
        near.exchange()
        (near.socket,), _ = network.move(near.socket)
        near.exchange()
    hear_everything(near, far)


def test_a_checkpoint_in_vain_of_full_queues_is_undone_in_place(network: Network) -> None:
    near, far = talkers(network)
    fill(near)
    fill(far)
    before, waiting = sizes(near.socket), queued(near.socket)
    frozen(near.socket)
    release(near.socket)
    assert (sizes(near.socket), queued(near.socket)) == (before, waiting)
    hear_everything(near, far)
    greet(near, far)


def test_a_listener_and_what_is_not_yet_or_no_longer_a_connection_is_not_frozen(network: Network) -> None:
    assert checkpoint(network.here.listeners[network.family]) is None
    nobody = network.client_ip + "9" if network.family == socket.AF_INET6 else "10.9.1.99"
    with inside(network.here.pid), socket.socket(network.family) as unconnected, socket.socket(network.family) as busy:
        assert checkpoint(unconnected) is None
        busy.setblocking(False)
        with pytest.raises(BlockingIOError):
            busy.connect((nobody, PORT))
        assert checkpoint(busy) is None  # SYN_SENT

    for first, last in ((0, 1), (1, 0)):
        ends = network.connect()
        ends[first].shutdown(socket.SHUT_WR)
        eventually(lambda: state_of(ends[first]) == FIN_WAIT2, "half-closed connection")  # noqa: B023
        ends[last].shutdown(socket.SHUT_WR)
        eventually(lambda: state_of(ends[0]) == state_of(ends[1]) == CLOSE, "end of the connection")  # noqa: B023
        assert checkpoint(ends[1]) is None


def test_a_connection_that_was_reset_is_not_frozen(unchecked: Network) -> None:
    client, vm = unchecked.connect()
    vm.settimeout(PATIENCE_S)
    client.setsockopt(SOL, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    with pytest.raises(ConnectionResetError):
        vm.recv(1)
    assert checkpoint(vm) is None


def test_where_the_vm_has_no_address_nothing_is_restored_and_nothing_is_left(network: Network) -> None:
    near, far = talkers(network)
    network.here.gate(LISTENING)
    state = frozen(near.socket)
    near.socket.close()
    open_files = len(os.listdir("/proc/self/fd"))
    with (
        inside(network.client.pid),
        pytest.raises(TestbedError, match=rf"connection .*{network.vm_ip}.* could not be restored"),
    ):
        restore(state)
    assert len(os.listdir("/proc/self/fd")) == open_files
    (near.socket,) = network.arrive([state])
    greet(near, far)


def test_a_frame_that_meets_an_open_gate_during_the_move_ends_the_connection(unchecked: Network) -> None:
    """Why the port has to be dark, and proof that the other tests would see a reset."""
    near, far = talkers(unchecked)
    frozen(near.socket)
    near.socket.close()
    far.say(100)
    eventually(lambda: unchecked.resets() > 0, "reset")
    with pytest.raises(ConnectionResetError):
        far.hear()
