"""Agents and their manager: who may give orders, what strangers reach, and what a migration leaves behind."""

import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from namespaces import inside
from programs import eventually
from testbeds import HOSTS, answers, elsewhere, events, here, slow_cable, small_testbed

from experiments.probes import Probes
from experiments.testbed import Testbed
from experiments.world import PRIVATE
from hosts import control, protocol
from hosts.announce import SCHEDULE_MS
from hosts.control import MANAGER, AgentClient, ControlError, issue_certificates, tls_context
from hosts.policy import Policy
from hosts.precopy import Progress
from hosts.protocol import HEADER, Abort, Header, Hello, Join, Kind, encode_body, parse_body, parse_header
from hosts.vcenter import MigrationFailed, Result
from topologies.errors import UsageError
from topologies.plan import VM

PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """The seed network with a small VM, which is running; each test leaves it running, on either host."""
    with small_testbed(tmp_path_factory.mktemp("control") / "results") as testbed:
        testbed.vcenter.power_on("vm1")
        yield testbed


@pytest.fixture(autouse=True)
def the_vm_runs_on_one_host(testbed: Testbed) -> Iterator[None]:
    yield
    place = testbed.vcenter.places["vm1"]
    assert [host for host, status in testbed.vcenter.status().items() if "vm1" in status["vms"]] == [place]
    assert answers(testbed, "10.0.0.11")


# ---------------------------------------------------------------- helpers


def management(testbed: Testbed, host: str) -> str:
    return testbed.run.plan.host(host).management


def said(testbed: Testbed, host: str) -> str:
    """The agent's log."""
    return "\n".join(testbed.children[f"agent-{host}"].said())


def traces_in_logs(testbed: Testbed) -> int:
    """What no stranger may cause."""
    return sum(said(testbed, host).count("Traceback") for host in HOSTS)


def agent(testbed: Testbed, host: str) -> AgentClient:
    """Another connection of the manager to an agent."""
    return AgentClient(host, management(testbed, host), PRIVATE)


def migrate_while(testbed: Testbed, happens: Callable[[], None]) -> Result:
    """A migration on a slow cable, and something that happens during its first round."""
    begun: list[Future[None]] = []

    def progress(note: Progress) -> None:
        if not begun:
            assert (note.number, note.round) == (1, None)
            begun.append(pool.submit(happens))

    with slow_cable(testbed, "200mbit"), ThreadPoolExecutor(1) as pool:
        try:
            return testbed.vcenter.migrate("vm1", elsewhere(testbed), progress=progress)
        finally:
            for what in begun:
                what.result()


def this_migration(testbed: Testbed) -> str:
    """The id of the latest one."""
    return str(events(testbed, "migration.begin")[-1]["migration"])


# ---------------------------------------------------------------- who may give orders


def connect(testbed: Testbed, context: ssl.SSLContext, host: str = "esx1") -> ssl.SSLSocket:
    ip = management(testbed, host)
    return context.wrap_socket(socket.create_connection((ip, control.PORT), PATIENCE_S), server_hostname=ip)


def without_certificate() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(PRIVATE / "ca.pem")
    return context


def test_a_caller_without_a_certificate_is_refused_in_the_handshake(testbed: Testbed) -> None:
    with connect(testbed, without_certificate()) as sock, pytest.raises(ssl.SSLError, match="certificate required"):
        sock.recv(1)  # in TLS 1.3 the client is done before the server has looked at its certificate


def test_a_certificate_of_another_authority_is_refused_in_the_handshake(testbed: Testbed, tmp_path: Path) -> None:
    issue_certificates(tmp_path, {MANAGER: [testbed.run.plan.manager_ip]})
    context = without_certificate()
    context.load_cert_chain(tmp_path / f"{MANAGER}.pem")
    with connect(testbed, context) as sock, pytest.raises(ssl.SSLError, match="unknown ca"):
        sock.recv(1)


def test_the_manager_refuses_an_agent_of_another_authority(testbed: Testbed, tmp_path: Path) -> None:
    issue_certificates(tmp_path, {MANAGER: [testbed.run.plan.manager_ip]})
    with pytest.raises(ControlError, match=r"esx1: its agent .* cannot be reached: .*certificate verify failed"):
        AgentClient("esx1", management(testbed, "esx1"), tmp_path)


def test_tls_below_1_3_is_refused(testbed: Testbed) -> None:
    context = tls_context(PRIVATE, MANAGER, server=False)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="protocol version"):
        connect(testbed, context)


def test_the_certificate_of_another_agent_gives_no_orders(testbed: Testbed) -> None:
    with connect(testbed, tls_context(PRIVATE, "esx2", server=False)) as sock, suppress(ConnectionError):
        sock.sendall(msgspec.json.encode(control.PowerOff("vm1")) + b"\n")
        assert sock.recv(1) == b""
    eventually(lambda: "'esx2' may not give orders" in said(testbed, "esx1"), "word of it in the log")


def test_a_caller_that_speaks_no_tls_or_says_nothing_keeps_nobody_waiting(testbed: Testbed) -> None:
    address = management(testbed, "esx1"), control.PORT
    with socket.create_connection(address, PATIENCE_S) as http, socket.create_connection(address, PATIENCE_S) as silent:
        http.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with suppress(ConnectionError):
            while http.recv(100):
                pass
        with closing(agent(testbed, "esx1")) as client:
            assert client.call(control.Status())["host"] == "esx1"
        assert silent.recv(1) == b""  # the agent loses its patience


def test_a_manager_that_asks_and_never_listens_is_given_up(testbed: Testbed) -> None:
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plain.settimeout(PATIENCE_S)
    ip = management(testbed, "esx1")
    plain.connect((ip, control.PORT))
    context = tls_context(PRIVATE, MANAGER, server=False)
    with context.wrap_socket(plain, server_hostname=ip) as deaf:
        deaf.settimeout(1)
        with suppress(TimeoutError):
            deaf.sendall(b'{"type": "Status"}\n' * 100_000)
        eventually(lambda: "timed out" in said(testbed, "esx1"), "end of the agent's patience", 40)


@pytest.fixture
def line(testbed: Testbed) -> Iterator[Callable[[bytes], dict[str, str]]]:
    """Says a line to the agent of esx1, and returns its answer."""
    with connect(testbed, tls_context(PRIVATE, MANAGER, server=False)) as sock, sock.makefile("rb") as lines:

        def say(content: bytes) -> dict[str, str]:
            sock.sendall(content + b"\n")
            answer: dict[str, str] = msgspec.json.decode(lines.readline())
            return answer

        yield say


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"hello",
        b"{}",
        b"[1, 2]",
        b'{"type": "Shutdown"}',
        b'{"type": "PowerOff"}',
        b'{"type": "PowerOff", "vm": 7}',
        b'{"type": "Status"',
        b'{"type": "Reply", "content": 1}',
        b"\xff\xfe\x00",
        b'{"type": "PowerOff", "vm": "\xff"}',
        b'{"type": "Status", "more": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    ],
    ids=lambda garbage: garbage[:30].decode(errors="replace"),
)
def test_garbage_is_refused_and_the_connection_goes_on(line: Callable[[bytes], dict[str, str]], garbage: bytes) -> None:
    answer = line(garbage)
    assert answer["type"] == "Refusal"
    assert "internal error" not in answer["reason"]
    assert line(b'{"type": "Status"}')["type"] == "Reply"


def test_an_oversized_line_is_refused_and_no_part_of_it_is_taken_for_an_order(testbed: Testbed) -> None:
    order = msgspec.json.encode(control.Cancel("smuggled"))
    answers: list[bytes] = []
    context = tls_context(PRIVATE, MANAGER, server=False)
    with suppress(ConnectionError, ssl.SSLError), connect(testbed, context) as sock:  # the agent may hang up on him
        sock.sendall(b" " * (1 << 20) + order + b'\n{"type": "Status"}\n')
        with sock.makefile("rb") as lines:
            while (line := lines.readline()) and b"Reply" not in line:
                answers.append(line)
    assert all(answer.startswith(b'{"type":"Refusal"') and b"smuggled" not in answer for answer in answers)
    with closing(agent(testbed, "esx1")) as client:
        assert client.call(control.Status())["host"] == "esx1"


# ---------------------------------------------------------------- orders that cannot be carried out


def test_a_second_power_on_is_refused_on_either_host_and_says_who_has_the_vm(testbed: Testbed) -> None:
    generation = testbed.vcenter.status()[here(testbed)]["vms"]["vm1"]["generation"]
    for host in HOSTS:
        with closing(agent(testbed, host)) as client:
            message = rf"host {host}: VM vm1 is running on {here(testbed)} \(generation {generation}\)"
            with pytest.raises(ControlError, match=message):
                client.call(control.PowerOn("vm1", "rarp", SCHEDULE_MS))


@pytest.mark.parametrize("name", ["../vm1", "vm1/..", "", ".", "vm1\n", "Vm1", "vm1" * 9])
def test_a_name_that_is_none_is_refused_before_it_becomes_a_path(testbed: Testbed, name: str) -> None:
    files = sorted(testbed.datastore.parent.rglob("*"))
    with closing(agent(testbed, "esx1")) as client:
        for order in (control.PowerOn(name, "rarp", SCHEDULE_MS), control.Register(name), control.Delete(name)):
            with pytest.raises(ControlError, match=r"Expected `str` matching regex .* at `\$.vm`"):
                client.call(order)
        with pytest.raises(ControlError, match="a name is a lower-case letter"):
            client.call(control.Create(replace(testbed.run.plan.vm("vm1"), name=name)))
    assert sorted(testbed.datastore.parent.rglob("*")) == files


def test_a_migration_to_where_the_vm_is_is_refused(testbed: Testbed) -> None:
    with pytest.raises(UsageError, match=f"VM vm1 is on {here(testbed)} already; name another host"):
        testbed.vcenter.migrate("vm1", here(testbed))
    with closing(agent(testbed, here(testbed))) as client, pytest.raises(ControlError, match="VM vm1 is here already"):
        client.call(control.Prepare("vm1", "m", "rarp", SCHEDULE_MS))


def test_a_migration_of_or_to_an_unknown_one_is_refused_and_never_begins(testbed: Testbed) -> None:
    begun = len(events(testbed, "migration.begin"))
    with pytest.raises(UsageError, match="VM vm7 is not powered on"):
        testbed.vcenter.migrate("vm7", "esx2")
    with pytest.raises(UsageError, match="the plan has no host 'esx9'; it has esx1, esx2"):
        testbed.vcenter.migrate("vm1", "esx9")
    assert len(events(testbed, "migration.begin")) == begun


def test_an_agent_refuses_what_is_not_there(testbed: Testbed) -> None:
    orders = {
        "VM vm7 is not on esx1": (
            control.PowerOff("vm7"),
            control.Migrate("vm7", "m", "50.50.50.2", protocol.PORT, "token", Policy()),
        ),
        "VM vm7: no such VM on nfs://10.0.99.3/datastore1": (
            control.Prepare("vm7", "m", "rarp", SCHEDULE_MS),
            control.PowerOn("vm7", "rarp", SCHEDULE_MS),
            control.Register("vm7"),
        ),
        "no migration 'm' leaves from here": (control.Cancel("m"),),
    }
    with closing(agent(testbed, "esx1")) as client:
        for reason, refused in orders.items():
            for order in refused:
                with pytest.raises(ControlError, match=f"host esx1: {reason}"):
                    client.call(order)
        assert client.call(control.Abandon("m")) == {"abandoned": False}


def test_a_power_on_that_fails_can_be_tried_again(testbed: Testbed) -> None:
    vm = VM("vm8", "esx1", "10.0.0.18/24", "00:50:56:00:00:08", ram=2**24, working_set=2**20, dirty_rate=0)
    with closing(agent(testbed, "esx1")) as client:
        client.call(control.Create(vm))
        nvram = testbed.datastore / "vm8/vm8.nvram"
        nvram.write_text("{")
        with pytest.raises(ControlError, match="VM vm8: Boot: the nvram is not one of this machine's"):
            client.call(control.PowerOn("vm8", "none", SCHEDULE_MS))
        nvram.unlink()
        client.call(control.PowerOn("vm8", "none", SCHEDULE_MS))
        client.call(control.PowerOff("vm8"))


# ---------------------------------------------------------------- strangers at the vMotion port


class Stranger:
    """Someone on the vMotion network who talks to a host's vMotion port."""

    def __init__(self, testbed: Testbed, host: str) -> None:
        (other,) = set(HOSTS) - {host}
        address = testbed.run.plan.host(host).vmotion_port.ip, protocol.PORT
        with inside(testbed.net[other].pid):
            self._socket = socket.create_connection(address, PATIENCE_S)

    def says(self, data: bytes) -> "Stranger":
        self._socket.sendall(data)
        return self

    def hears(self) -> bytes:
        """Everything until the connection ends."""
        heard = b""
        with suppress(ConnectionError), self._socket:
            while data := self._socket.recv(1000):
                heard += data
        return heard


def hello(migration: str, token: str) -> bytes:
    return frame(Hello(protocol.MAJOR, protocol.MINOR, migration, token, 64 * 2**20))


def join(migration: str, token: str, purpose: Literal["pages", "faults"]) -> bytes:
    return frame(Join(protocol.MAJOR, protocol.MINOR, migration, token, purpose))


def frame(opening: Hello | Join) -> bytes:
    kind, body = encode_body(opening)
    return Header(kind, 0, 0, 0, 1, len(body)).pack() + body


def refused(heard: bytes) -> bool:
    """Nothing at all, or one word."""
    if not heard:
        return True
    header = parse_header(heard[: HEADER.size])
    return header.kind is Kind.ABORT and parse_body(header.kind, heard[HEADER.size :]) == Abort("refused")


def test_strangers_at_the_vmotion_port_are_refused_and_disturb_no_migration(testbed: Testbed) -> None:
    silent: list[Stranger] = []
    traces = traces_in_logs(testbed)

    def intrude() -> None:
        migration = this_migration(testbed)
        for host in HOSTS:
            silent.append(Stranger(testbed, host))
            silent.append(Stranger(testbed, host).says(hello(migration, "x")[:30]))
            for data in (os.urandom(10_000), b"GET / HTTP/1.0\r\n\r\n" + bytes(100), hello("m", "0" * 32)):
                assert refused(Stranger(testbed, host).says(data).hears())
            for token in ("0" * 32, "", "\N{SNOWMAN}" * 32):
                assert refused(Stranger(testbed, host).says(hello(migration, token)).hears())
                assert refused(Stranger(testbed, host).says(join(migration, token, "pages")).hears())
                assert refused(Stranger(testbed, host).says(join(migration, token, "faults")).hears())

    assert migrate_while(testbed, intrude).outcome.digests_equal
    for stranger in silent:
        assert refused(stranger.hears())  # the agent loses its patience
    assert traces_in_logs(testbed) == traces


def test_a_stranger_without_the_token_does_not_get_in_before_the_source(testbed: Testbed) -> None:
    source, destination = here(testbed), elsewhere(testbed)
    with closing(agent(testbed, destination)) as at_destination, closing(agent(testbed, source)) as at_source:
        order = control.Prepare("vm1", "m", "rarp", SCHEDULE_MS)
        ready = at_destination.call(order)
        for token in ("0" * 32, "", ready["token"][:-1], "\N{SNOWMAN}" * 32):
            assert refused(Stranger(testbed, destination).says(hello("m", token)).hears())
        # a further connection of a migration that has not begun
        assert refused(Stranger(testbed, destination).says(join("m", ready["token"], "pages")).hears())
        at_source.call(control.Migrate("vm1", "m", ready["ip"], ready["port"], ready["token"], Policy()))
    testbed.vcenter.places["vm1"] = destination


# ---------------------------------------------------------------- migrations


def test_a_cancelled_migration_leaves_the_vm_where_it_is_and_a_retry_succeeds_at_once(testbed: Testbed) -> None:
    source, destination = here(testbed), elsewhere(testbed)

    def cancel() -> None:
        with closing(agent(testbed, source)) as client:
            client.call(control.Cancel(this_migration(testbed)))

    for _ in range(3):
        with pytest.raises(MigrationFailed, match=f"VM vm1 stays on {source}: cancelled"):
            migrate_while(testbed, cancel)
        assert here(testbed) == source
    assert testbed.vcenter.migrate("vm1", destination).outcome.digests_equal
    assert here(testbed) == destination


def test_during_a_migration_no_other_order_touches_the_vm(testbed: Testbed) -> None:
    source, destination = here(testbed), elsewhere(testbed)

    def interfere() -> None:
        with closing(agent(testbed, source)) as at_source, closing(agent(testbed, destination)) as at_destination:
            with pytest.raises(ControlError, match=f"VM vm1 is busy on {source}"):
                at_source.call(control.PowerOff("vm1"))
            with pytest.raises(ControlError, match=f"VM vm1 is busy on {destination}"):
                at_destination.call(control.Prepare("vm1", "another", "rarp", SCHEDULE_MS))
            with pytest.raises(ControlError, match=f"VM vm1 is busy on {destination}"):
                at_destination.call(control.PowerOn("vm1", "rarp", SCHEDULE_MS))

    assert migrate_while(testbed, interfere).outcome.digests_equal


def test_a_client_loses_nothing_in_three_migrations_back_and_forth(testbed: Testbed, tmp_path: Path) -> None:
    with Probes(testbed.popen("c1"), "10.0.0.11", tmp_path, seed=1) as probes:
        for _ in range(3):
            assert testbed.vcenter.migrate("vm1", elsewhere(testbed)).outcome.digests_equal
        seen = probes.stop()
    transactions = seen.transactions
    assert (transactions.failure, seen.bulk.failure) == ("", "")
    assert (transactions.connection_survived, seen.bulk.connection_survived) == (True, True)
    assert 0 < transactions.audited == transactions.acked == transactions.sent
    assert (transactions.lost, transactions.duplicated, transactions.total_conserved) == (0, 0, True)
    assert seen.bulk.verified_bytes > 100_000


def test_ten_migrations_leave_the_agents_as_they_were(testbed: Testbed) -> None:
    def held() -> dict[str, dict[str, int]]:
        return {host: holdings(testbed.children[f"agent-{host}"].process.pid) for host in HOSTS}

    start = here(testbed)
    for _ in range(2):  # the first visit to a host may leave what every later one uses
        testbed.vcenter.migrate("vm1", elsewhere(testbed))
    before = settled(held)
    generation = testbed.vcenter.status()[start]["vms"]["vm1"]["generation"]
    for _ in range(10):
        assert testbed.vcenter.migrate("vm1", elsewhere(testbed)).outcome.digests_equal
    assert testbed.vcenter.status()[start]["vms"]["vm1"]["generation"] == generation + 10
    eventually(lambda: held() == before, f"return to {before} from {held()}")


def holdings(pid: int) -> dict[str, int]:
    """What a process has: open files, threads, mappings of guest RAM, processes below it, devices in its namespace."""
    proc = Path(f"/proc/{pid}")
    children: list[str] = []
    for task in (proc / "task").iterdir():
        with suppress(FileNotFoundError):  # a thread may end while we look
            children += (task / "children").read_text().split()
    return {
        "files": len(os.listdir(proc / "fd")),
        "threads": len(os.listdir(proc / "task")),
        "guest memory": len(re.findall(r"memfd:vm", (proc / "maps").read_text())),
        "processes": len(children),
        "devices": len((proc / "net/dev").read_text().splitlines()),
    }


def settled(value: Callable[[], dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """The value once announcements and the end of the last guest are over: it stays the same for a second."""
    history = [value()]

    def is_stable() -> bool:
        history.append(value())
        return len(history) > 50 and all(past == history[-1] for past in history[-50:])  # looked at every 20 ms

    eventually(is_stable, "rest")
    return history[-1]
