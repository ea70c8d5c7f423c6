"""TCP connections out of one kernel into another and back: a client, and two hosts between which a VM moves.

client --- bridge --- esx1, esx2      the VM's address and MAC behind two ports, of which at most one is open
"""

import array
import fcntl
import os
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from select import select

import msgspec
import pytest
from namespaces import Node, inside
from programs import eventually

from experiments.world import run
from hosts.bulk import pattern
from hosts.sockets import TcpState, checkpoint, release, restore
from topologies.errors import TestbedError

VM_IP, VM_MAC, CLIENT_IP = "10.9.1.11", "00:50:56:00:00:01", "10.9.1.100"
PORT = 7200
MOVES = 20
ENOUGH = 1 << 20  # bytes that have to arrive between two moves, each way
PATIENCE_S = 20.0
LISTENING, FORWARDING = "1", "3"  # linux/if_bridge.h, BR_STATE_*
SO_BUF_LOCK, SIOCOUTQNSD, TCP_USER_TIMEOUT = 72, 0x894B, 18  # asm-generic/socket.h, linux/sockios.h, linux/tcp.h
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
        self.run("ip", "addr", "add", f"{VM_IP}/24", "dev", "eth0")
        with inside(self.pid):
            self.listener = socket.create_server((VM_IP, PORT))
            self.listener.settimeout(PATIENCE_S)

    def gate(self, state: str) -> None:
        run("bridge", "link", "set", "dev", self.name, "learning", "off", "state", state)

    def end(self) -> None:
        self.listener.close()
        run("ip", "link", "del", self.name)
        super().end()


class Network:
    """The VM is at `here`; `move` takes it `there`. Sockets live until the end, so that none says good-bye before."""

    def __init__(self) -> None:
        run("ip", "link", "add", "vSwitch", "type", "bridge", "stp_state", "0", "mcast_snooping", "0")
        run("ip", "link", "set", "vSwitch", "up")
        self.client = Node()
        run("ip", "link", "add", "uplink", "type", "veth", "peer", "name", "eth0", "netns", str(self.client.pid))
        run("ip", "link", "set", "uplink", "master", "vSwitch", "up")
        self.client.run("ip", "addr", "add", f"{CLIENT_IP}/24", "dev", "eth0")
        self.client.run("ip", "link", "set", "eth0", "up")
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
            client = socket.create_connection((VM_IP, PORT), PATIENCE_S)
        vm, _ = self.here.listener.accept()
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


@pytest.fixture
def unchecked() -> Iterator[Network]:
    network = Network()
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
        listener = socket.create_server((CLIENT_IP, PORT))
    with listener:
        with inside(network.here.pid):
            vm = socket.create_connection((CLIENT_IP, PORT), PATIENCE_S)
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


def test_only_an_established_connection_is_frozen(network: Network) -> None:
    assert checkpoint(network.here.listener) is None
    with inside(network.here.pid), socket.socket() as unconnected, socket.socket() as connecting:
        assert checkpoint(unconnected) is None
        connecting.setblocking(False)
        with pytest.raises(BlockingIOError):
            connecting.connect(("10.9.1.99", PORT))  # nobody has this address
        assert checkpoint(connecting) is None

    client, vm = network.connect()
    client.settimeout(PATIENCE_S)
    vm.settimeout(PATIENCE_S)
    client.shutdown(socket.SHUT_WR)
    assert vm.recv(1) == b""
    assert checkpoint(vm) is None  # CLOSE_WAIT
    assert checkpoint(client) is None  # FIN_WAIT2
    vm.sendall(b"still heard")
    assert client.recv(100) == b"still heard"


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
        pytest.raises(TestbedError, match=rf"connection .*{VM_IP}.* could not be restored"),
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
