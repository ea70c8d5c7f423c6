"""Client connections through whole migrations: half closed, over IPv6, hundreds at once."""

import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from namespaces import inside
from programs import eventually
from testbeds import HOSTS, small_testbed

from experiments.testbed import Testbed
from experiments.world import run
from hosts import bulk, ledger
from topologies.plan import read_plan

PATIENCE_S = 20.0
VM = read_plan().vm("vm1")
assert VM.interface6 is not None
ADDRESSES = {"IPv4": str(VM.interface.ip), "IPv6": str(VM.interface6.ip)}
both_families = pytest.mark.parametrize("ip", ADDRESSES.values(), ids=ADDRESSES.keys())
FIN_WAIT2 = 5  # net/tcp_states.h
LISTEN, TIME_WAIT, CLOSE_WAIT, LAST_ACK = "0A", "06", "08", "09"  # the same in /proc/net/tcp


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    with small_testbed(tmp_path_factory.mktemp("connections") / "results") as testbed:
        testbed.vcenter.power_on("vm1")
        yield testbed


@pytest.fixture
def quiet(testbed: Testbed) -> Iterator[Testbed]:
    """The testbed; neither side resets a connection, and what the test closes ends on the VM's side too."""
    before = resets(testbed)
    yield testbed
    eventually(lambda: connections(testbed) <= {LISTEN, TIME_WAIT}, "end of all connections")
    assert resets(testbed) == before


# ---------------------------------------------------------------- helpers


def migrate(testbed: Testbed) -> None:
    (there,) = set(HOSTS) - {testbed.vcenter.places["vm1"]}
    outcome = testbed.vcenter.migrate("vm1", there).outcome
    assert outcome.digests_equal


def guest(testbed: Testbed) -> int:
    """The pid of the VM's process, which is in the VM's network namespace."""
    return int(testbed.vcenter.status()[testbed.vcenter.places["vm1"]]["vms"]["vm1"]["pid"])


def connections(testbed: Testbed) -> set[str]:
    """The states of the VM's TCP sockets."""
    pid, states = guest(testbed), set()
    for file in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{file}") as lines:
            states |= {line.split()[3] for line in list(lines)[1:]}
    return states


def resets(testbed: Testbed) -> tuple[str, str]:
    """Connections that ended by RST, and RST segments sent, as the client counts them."""
    with open(f"/proc/{testbed.net['c1'].pid}/net/snmp") as lines:
        names, values = (line.split()[1:] for line in lines if line.startswith("Tcp:"))
    counters = dict(zip(names, values, strict=True))
    return counters["EstabResets"], counters["OutRsts"]


class Customer:
    """A client of the transaction server that checks every answer, whenever it reads it."""

    def __init__(self, testbed: Testbed, ip: str, number: int, buffer_bytes: int = 0) -> None:
        with inside(testbed.net["c1"].pid):
            self.socket = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
        if buffer_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(PATIENCE_S), 0))
        self.socket.connect((ip, ledger.PORT))
        self.number, self.asked, self.answered, self.entry = number, 0, 0, 0

    def ask(self, count: int) -> None:
        """So many transfers at once."""
        numbers = range(self.asked + 1, self.asked + count + 1)
        requests = (ledger.REQUEST.pack(ledger.TRANSFER, self.number, number, 1, 2, 3) for number in numbers)
        self.socket.sendall(b"".join(requests))
        self.asked += count

    def ask_for_records(self, count: int) -> None:
        """So many times all the records that an answer can hold."""
        request = ledger.REQUEST.pack(ledger.AUDIT, self.number, 1, 0, 0, ledger.MAX_AUDIT_RECORDS)
        self.socket.sendall(request * count)

    def hear(self) -> None:
        """The answer to every transfer."""
        while self.answered < self.asked:
            kind, sequence, entry = ledger.REPLY.unpack(self._exactly(ledger.REPLY.size))
            self.answered += 1
            assert (kind, sequence) == (ledger.DONE, self.answered)
            assert entry > self.entry
            self.entry = entry

    def hear_records(self) -> bytes:
        kind, count, total = ledger.REPLY.unpack(self._exactly(ledger.REPLY.size))
        assert (kind, count) == (ledger.LEDGER, ledger.MAX_AUDIT_RECORDS)
        assert total == ledger.ACCOUNTS * ledger.OPENING_BALANCE
        return self._exactly(count * ledger.RECORD.itemsize)

    def say_good_bye(self) -> None:
        """Nothing more is asked; the VM has heard so."""
        self.socket.shutdown(socket.SHUT_WR)
        eventually(lambda: self._state() == FIN_WAIT2, "acknowledgement of the good-bye")

    def hear_good_bye(self) -> None:
        assert self.socket.recv(1) == b""
        self.socket.close()

    def _state(self) -> int:
        return self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]

    def _exactly(self, length: int) -> bytes:
        data = self.socket.recv(length, socket.MSG_WAITALL)
        assert len(data) == length, f"customer {self.number}: {len(data)} of {length} bytes, then the end"
        return data


def echo(testbed: Testbed, ip: str, data: bytes) -> bytes:
    with inside(testbed.net["c1"].pid), socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, 2) as udp:
        udp.settimeout(PATIENCE_S)
        udp.sendto(data, (ip, 7))
        return udp.recv(100)


# ---------------------------------------------------------------- half closed


@both_families
def test_a_client_that_has_said_good_bye_gets_all_its_answers_after_the_move(quiet: Testbed, ip: str) -> None:
    """The VM has answered everything and said good-bye itself, but the client has not taken it yet: LAST_ACK."""
    customer = Customer(quiet, ip, 1 + len(ip), buffer_bytes=4096)
    customer.ask(2_000)
    customer.say_good_bye()
    eventually(lambda: LAST_ACK in connections(quiet), "good-bye of the VM")
    migrate(quiet)
    customer.hear()
    customer.hear_good_bye()


@both_families
def test_answers_that_had_no_room_follow_after_the_move_of_a_half_closed_connection(quiet: Testbed, ip: str) -> None:
    """The VM has more to say than its socket takes: CLOSE_WAIT, with requests that are not even read."""
    customer = Customer(quiet, ip, 101 + len(ip), buffer_bytes=4096)
    customer.ask(ledger.MAX_AUDIT_RECORDS)
    customer.hear()
    customer.ask_for_records(20)
    customer.say_good_bye()
    assert CLOSE_WAIT in connections(quiet)
    migrate(quiet)
    first = customer.hear_records()
    migrate(quiet)
    assert all(customer.hear_records() == first for _ in range(19))
    customer.hear_good_bye()


@both_families
def test_a_bulk_client_that_says_good_bye_hears_the_streams_end_in_its_place(quiet: Testbed, ip: str) -> None:
    with inside(quiet.net["c1"].pid):  # no longer: the manager's own connections are made where the manager is
        sock = socket.create_connection((ip, bulk.PORT), PATIENCE_S)
    with sock:
        received = sock.recv(1_000)
        sock.shutdown(socket.SHUT_WR)
        migrate(quiet)
        while data := sock.recv(1 << 16):
            assert data == bulk.pattern(len(received), len(data))
            received += data


# ---------------------------------------------------------------- IPv6, and many at once


def test_five_hundred_connections_move_at_once_and_none_misses_an_answer(quiet: Testbed) -> None:
    with ExitStack() as stack:
        customers = [Customer(quiet, list(ADDRESSES.values())[number % 2], 1000 + number) for number in range(500)]
        for customer in customers:
            stack.callback(customer.socket.close)
        for _ in range(2):
            for customer in customers:
                customer.ask(1)
                customer.hear()
                customer.ask(customer.number % 4)  # some have answers that they have not read
            migrate(quiet)
            for customer in customers:
                customer.hear()


def test_a_datagram_over_ipv6_comes_back_from_either_host(quiet: Testbed) -> None:
    for data in (b"here", b"there"):
        assert echo(quiet, ADDRESSES["IPv6"], data) == data
        migrate(quiet)


def test_the_vm_knows_its_neighbours_after_the_move(quiet: Testbed) -> None:
    """Both address families; these two exist nowhere, so nobody else could have told it."""
    strangers = {"10.0.0.77": "02:00:00:00:00:77", "fd00::77": "02:00:00:00:00:78"}
    for ip, mac in strangers.items():
        inside_vm(quiet, "ip", "neigh", "replace", ip, "lladdr", mac, "dev", "eth0", "nud", "reachable")
    migrate(quiet)
    table = inside_vm(quiet, "ip", "neigh")
    for ip, mac in strangers.items():
        assert f"{ip} dev eth0 lladdr {mac} STALE" in table


def inside_vm(testbed: Testbed, *words: str) -> str:
    return run("nsenter", f"--net=/proc/{guest(testbed)}/ns/net", *words)


def test_a_client_that_resets_its_connection_costs_only_itself(testbed: Testbed) -> None:
    """Answers wait for it, so that the VM is not even listening when it goes."""
    customer = Customer(testbed, ADDRESSES["IPv4"], 5_000, buffer_bytes=4096)
    customer.ask(5_000)
    customer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    eventually(lambda: bool(customer.socket.recv(1, socket.MSG_PEEK)), "first answer")
    customer.socket.close()
    other = Customer(testbed, ADDRESSES["IPv4"], 5_001)
    migrate(testbed)
    other.ask(1)
    other.hear()
    other.socket.close()


def test_clients_that_reset_while_the_disk_answers_cost_only_themselves(testbed: Testbed) -> None:
    """In one look of the VM's there is word from its disk, and from a client that its answer cannot reach any more."""
    before = guest(testbed)
    for number in range(6_000, 6_100):
        customer = Customer(testbed, ADDRESSES["IPv4"], number)
        customer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        customer.ask(1)
        time.sleep(number % 10 * 0.0003)  # now and then, the VM has asked its disk and not heard of it
        os.kill(before, signal.SIGSTOP)
        time.sleep(0.01)
        customer.socket.close()
        os.kill(before, signal.SIGCONT)
    other = Customer(testbed, ADDRESSES["IPv4"], 6_100)
    other.ask(1)
    other.hear()
    other.socket.close()
    assert guest(testbed) == before
