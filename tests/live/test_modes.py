"""Every way to move a VM, as its user sees it: modes, what is done with a guest that does not converge, transports."""

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from namespaces import inside
from programs import command_line, eventually
from testbeds import HOSTS, answers, elsewhere, events, here, slow_cable, small_testbed

from experiments.capture import WHOLE_FRAMES, Capture, CaptureNode
from experiments.probes import Probes, Results
from experiments.testbed import Testbed
from experiments.world import PRIVATE
from hosts import control, ledger, protocol
from hosts.announce import SCHEDULE_MS
from hosts.control import MANAGER, AgentClient, issue_certificates
from hosts.policy import MODES, Policy
from hosts.precopy import Progress
from hosts.protocol import Hello, Join, Session
from hosts.ram import PAGE
from hosts.source import Outcome
from hosts.stream import PeerAborted, StreamLost
from hosts.tasks import Task
from hosts.transport import Transport
from hosts.vcenter import MigrationFailed, Result
from hosts.vmotion_port import VmotionPort
from topologies.plan import VM

IP, IP6 = "10.0.0.11", "fd00::11"
MIB = 2**20
PATIENCE_S = 20.0
ESTABLISHED = "01"  # in /proc/net/tcp
_NUMBERS = count(1)  # of customers


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """A small VM, which is running; each test leaves it running, on either host, and alone."""
    with small_testbed(tmp_path_factory.mktemp("modes") / "results") as testbed:
        testbed.vcenter.power_on("vm1")
        yield testbed


@pytest.fixture(autouse=True)
def the_vm_runs_on_the_one_host_where_the_manager_has_it(testbed: Testbed) -> Iterator[None]:
    yield
    said = testbed.vcenter.status()
    running = [(vm, host) for host in HOSTS for vm, status in said[host]["vms"].items() if status["state"] == "running"]
    assert running == [("vm1", here(testbed))]
    assert answers(testbed, IP)


# ---------------------------------------------------------------- helpers


@contextmanager
def another_vm(testbed: Testbed, **settings: Any) -> Iterator[str]:
    """The name of a VM that runs for the length of the block: small and still unless `settings` say otherwise."""
    vm = VM("vm2", "esx1", "10.0.0.12/24", "00:50:56:00:00:02", ram=32 * MIB, working_set=MIB, dirty_rate=0)
    plan = testbed.vcenter.plan
    testbed.vcenter.plan = replace(plan, vms=(*plan.vms, replace(vm, **settings)))
    try:
        testbed.vcenter.power_on(vm.name)
        try:
            yield vm.name
        finally:
            testbed.vcenter.power_off(vm.name)
            testbed.vcenter.delete(vm.name)
    finally:
        testbed.vcenter.plan = plan


@contextmanager
def restless_vm(testbed: Testbed) -> Iterator[str]:
    """A VM that writes all over its RAM, two to three times as fast as the cable carries."""
    with another_vm(testbed, working_set=32 * MIB, dirty_rate=40_000_000) as vm, slow_cable(testbed, "150mbit"):
        yield vm


def move(testbed: Testbed, vm: str = "vm1", policy: Policy | None = None, by: Transport | None = None) -> Outcome:
    """To the other host, with equal digests."""
    to = elsewhere(testbed, vm)
    outcome = testbed.vcenter.migrate(vm, to, policy, transport=by).outcome
    assert outcome.digests_equal
    assert here(testbed, vm) == to
    return outcome


def start(testbed: Testbed, vm: str = "vm1", policy: Policy | None = None, by: Transport | None = None) -> Task[Result]:
    return testbed.vcenter.start_migration(vm, elsewhere(testbed, vm), policy, transport=by)


def status(testbed: Testbed, vm: str = "vm1") -> dict[str, Any]:
    """What its host's agent says of a VM."""
    said: dict[str, Any] = testbed.vcenter.status()[here(testbed, vm)]["vms"][vm]
    return said


def speed(testbed: Testbed, vm: str) -> float:
    """Pages that its workload writes in a second."""
    began, before = time.monotonic(), status(testbed, vm)["work"]
    time.sleep(0.5)
    return float(status(testbed, vm)["work"] - before) / (time.monotonic() - began)


def memories(vm: str) -> list[Path]:
    """The RAM of every guest process of a VM, as a file that this process has; a VM on its way has two."""
    guests = [
        process
        for process in Path("/proc").iterdir()
        if process.name.isdigit() and {"hosts.light_guest", vm} <= set(command_line(int(process.name)).split())
    ]
    return [next(file for file in (guest / "fd").iterdir() if f"memfd:{vm}" in os.readlink(file)) for guest in guests]


def memory(vm: str) -> Path:
    (file,) = memories(vm)
    return file


def existing_bytes(vm: str) -> int:
    """What of its RAM takes memory."""
    return memory(vm).stat().st_blocks * 512


def latest(testbed: Testbed, kind: str) -> list[dict[str, Any]]:
    """The events of a kind of the migration that was begun last."""
    return events(testbed, kind, migration=events(testbed, "migration.begin")[-1]["migration"])


def moments(testbed: Testbed, *kinds: str) -> list[int]:
    """When each of these happened in the latest migration, where each happens once."""
    times = []
    for kind in kinds:
        (event,) = latest(testbed, kind)
        times.append(event["t"])
    return times


class Customer:
    """A client that makes one transfer after the other on one connection."""

    def __init__(self, testbed: Testbed, ip: str) -> None:
        with inside(testbed.net["c1"].pid):
            self.socket = socket.create_connection((ip, ledger.PORT), PATIENCE_S)
        self._number, self._done = next(_NUMBERS), 0

    def transfer(self) -> bool:
        """Whether it was answered as it should."""
        self._done += 1
        self.socket.sendall(ledger.REQUEST.pack(ledger.TRANSFER, self._number, self._done, 1, 2, 3))
        answer = self.socket.recv(ledger.REPLY.size, socket.MSG_WAITALL)
        kind, sequence, _ = ledger.REPLY.unpack(answer)
        return bool((kind, sequence) == (ledger.DONE, self._done))

    def __enter__(self) -> "Customer":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("mode", MODES)
def test_a_vm_moves_there_and_back_and_its_client_loses_nothing(testbed: Testbed, tmp_path: Path, mode: Any) -> None:
    with Probes(testbed.popen("c1"), IP, tmp_path, seed=MODES.index(mode)) as probes:
        for _ in range(2):
            outcome = move(testbed, policy=Policy(mode=mode))
            assert bool(outcome.rounds) == (mode in ("precopy", "hybrid"))
            assert bool(outcome.postcopy) == (mode == "postcopy")
        nothing_is_lost(probes.stop())


def nothing_is_lost(seen: Results) -> None:
    transactions = seen.transactions
    assert (transactions.failure, seen.bulk.failure) == ("", "")
    assert (transactions.connection_survived, seen.bulk.connection_survived) == (True, True)
    assert 0 < transactions.audited == transactions.acked == transactions.sent
    assert (transactions.lost, transactions.duplicated, transactions.total_conserved) == (0, 0, True)
    assert seen.udp.arrived_ns and seen.ping.arrived_ns


WAYS = {
    "one connection": Transport(),
    "four connections": Transport(streams=4),
    "encrypted": Transport(encrypt=True),
    "packed by zstd": Transport(compress="zstd"),
    "packed by lz4": Transport(compress="lz4"),
    "four encrypted connections, packed": Transport(encrypt=True, compress="zstd", streams=4),
}


@pytest.mark.parametrize("mode", ["precopy", "postcopy", "stop-and-copy"])
def test_the_ram_that_arrives_is_the_ram_that_left_however_it_crosses(testbed: Testbed, mode: Any) -> None:
    """Byte by byte, past all hashes of the hosts: a VM that does nothing changes nothing."""
    with another_vm(testbed, fill=0.6, compressible=0.5) as vm:
        before = memory(vm).read_bytes()
        for way in WAYS if mode == "precopy" else ("one connection", "four encrypted connections, packed"):
            move(testbed, vm, Policy(mode=mode), WAYS[way])
            assert memory(vm).read_bytes() == before, way


def test_before_a_working_vm_runs_elsewhere_every_byte_of_its_ram_is_there(testbed: Testbed) -> None:
    destination = elsewhere(testbed)
    with stopped_at(testbed, destination, "destination:claimed") as task:
        here_and_there = [file.read_bytes() for file in memories("vm1")]
        testbed.vcenter.go_on(destination)
        task.wait(PATIENCE_S)
    assert len(here_and_there) == 2
    assert here_and_there[0] == here_and_there[1]


@contextmanager
def stopped_at(testbed: Testbed, host: str, state: str, policy: Policy | None = None) -> Iterator[Task[Result]]:
    """A migration of vm1 that has stopped at a breakpoint."""
    before = len(events(testbed, "breakpoint.reached"))
    testbed.vcenter.breakpoint(host, state)
    task = start(testbed, policy=policy)
    eventually(lambda: len(events(testbed, "breakpoint.reached")) > before, f"migration at {state}")
    try:
        yield task
    finally:
        testbed.vcenter.go_on(host)


# ---------------------------------------------------------------- post-copy


def test_in_post_copy_the_vm_serves_at_its_new_place_while_its_ram_is_still_at_the_old(testbed: Testbed) -> None:
    source = here(testbed)
    with slow_cable(testbed, "200mbit"), ExitStack() as stack:
        customers = [stack.enter_context(Customer(testbed, ip)) for ip in (IP, IP6)]
        task = start(testbed, policy=Policy(mode="postcopy"))
        eventually(lambda: task.status().phase == "post-copy", "post-copy")
        assert all(customer.transfer() for customer in customers)
        assert task.status().state == "running"
        assert (latest(testbed, "vm.resumed")[0]["source"], latest(testbed, "postcopy.end")) == (task.hosts[1], [])
        (migration,) = testbed.vcenter.status()[source]["migrations"].values()
        assert migration["progress"]["phase"] == "post-copy"
        outcome = task.wait(60).outcome
        assert all(customer.transfer() for customer in customers)
    assert outcome.digests_equal
    order = moments(
        testbed, "bitmap.sent", "generation.claimed", "vm.resumed", "postcopy.begin", "ram.whole", "postcopy.end"
    )
    assert order == sorted(order)


def test_in_post_copy_every_page_crosses_once_and_every_wait_of_the_guest_is_counted(testbed: Testbed) -> None:
    with another_vm(testbed, working_set=24 * MIB, dirty_rate=40_000_000) as vm, slow_cable(testbed, "400mbit"):
        existing = existing_bytes(vm)
        outcome = move(testbed, vm, Policy(mode="postcopy"))
        (listed,) = latest(testbed, "bitmap.sent")
    assert outcome.postcopy is not None
    assert (outcome.rounds, outcome.residual_pages) == ([], 0)
    assert outcome.postcopy.pages == listed["pages"] == existing // PAGE
    assert 0.9 * existing <= outcome.bytes_on_wire <= 1.02 * existing
    faults, waits_us = outcome.postcopy.faults, outcome.postcopy.fault_us
    assert 10 < faults < outcome.postcopy.pages
    assert len(waits_us) > 10
    assert all(0 < wait_us < outcome.postcopy.ms * 1000 for wait_us in waits_us)


def test_after_post_copy_the_vms_writes_are_tracked_again_and_it_moves_on_by_pre_copy(
    testbed: Testbed, tmp_path: Path
) -> None:
    with Probes(testbed.popen("c1"), IP, tmp_path, seed=len(MODES)) as probes:
        assert move(testbed, policy=Policy(mode="postcopy")).postcopy is not None
        first, *later = move(testbed).rounds
        nothing_is_lost(probes.stop())
    filled = 0.75 * 64 * MIB / PAGE
    assert filled <= first.pages <= 1.1 * filled
    assert 0 < first.remaining_bytes < 8 * MIB  # what was written meanwhile, and not all that came by post-copy
    assert later[0].pages > 0


# ---------------------------------------------------------------- a guest that does not converge


def test_cancel_leaves_a_guest_that_does_not_converge_where_it_is_at_full_speed(testbed: Testbed) -> None:
    with restless_vm(testbed) as vm:
        place, before = here(testbed, vm), speed(testbed, vm)
        with pytest.raises(MigrationFailed, match=r"does not converge within 0\.6 s: .*timeout-strategy"):
            testbed.vcenter.migrate(vm, elsewhere(testbed, vm), Policy(timeout_s=0.6))
        assert (here(testbed, vm), status(testbed, vm)["state"]) == (place, "running")
        assert speed(testbed, vm) > 0.6 * before


def test_switch_suspends_a_guest_that_does_not_converge_and_sends_the_rest(testbed: Testbed) -> None:
    with restless_vm(testbed) as vm:
        outcome = move(testbed, vm, Policy(timeout_s=0.6, timeout_strategy="switch"))
        suspended, resumed = moments(testbed, "vm.suspended", "vm.resumed")
    (broken_off,) = outcome.rounds
    assert outcome.residual_pages > broken_off.pages / 2
    assert (resumed - suspended) / 1e9 > 0.5


def test_throttle_slows_a_guest_step_by_step_until_it_converges_and_the_new_place_is_fast(testbed: Testbed) -> None:
    with restless_vm(testbed) as vm:
        before = speed(testbed, vm)
        outcome = move(testbed, vm, Policy(timeout_s=0.1, timeout_strategy="throttle"))
        steps = [event["share"] for event in latest(testbed, "guest.throttled")]
        assert outcome.throttles == steps
        assert 3 <= len(steps) <= 9
        assert steps == [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99][: len(steps)]
        (suspended, resumed) = moments(testbed, "vm.suspended", "vm.resumed")
        assert (resumed - suspended) / 1e6 < 500  # that is what the guest was slowed for
        assert speed(testbed, vm) > 0.6 * before


def test_a_throttled_guest_whose_migration_is_cancelled_has_its_full_speed_again(testbed: Testbed) -> None:
    with restless_vm(testbed) as vm:
        place, before = here(testbed, vm), speed(testbed, vm)
        task = start(testbed, vm, Policy(timeout_s=0.1, timeout_strategy="throttle"))
        eventually(lambda: task.status().throttle >= 0.5, "throttle of a half")
        assert speed(testbed, vm) < 0.8 * before
        task.cancel()
        with pytest.raises(MigrationFailed, match=f"VM {vm} stays on {place}: cancelled"):
            task.wait(PATIENCE_S)
        assert latest(testbed, "guest.throttled")[-1]["share"] == 0
        assert speed(testbed, vm) > 0.6 * before


@pytest.mark.parametrize(
    "policy",
    [Policy(mode="hybrid"), Policy(timeout_s=1, timeout_strategy="postcopy")],
    ids=["hybrid", "timeout strategy"],
)
def test_post_copy_takes_over_from_a_round_in_which_the_guest_is_too_fast(testbed: Testbed, policy: Policy) -> None:
    with restless_vm(testbed) as vm:
        existing = existing_bytes(vm)
        outcome = move(testbed, vm, policy)
        suspended, resumed = moments(testbed, "vm.suspended", "vm.resumed")
    (broken_off,) = outcome.rounds
    assert (broken_off.pages + broken_off.zero_pages) * PAGE < existing
    assert outcome.postcopy is not None
    assert existing / 2 < outcome.postcopy.pages * PAGE <= existing
    assert outcome.postcopy.faults > 0
    assert (resumed - suspended) / 1e6 < 500
    assert outcome.residual_pages == 0


# ---------------------------------------------------------------- prediction


def test_the_downtime_is_predicted_before_every_round_but_the_first(testbed: Testbed) -> None:
    notes: list[Progress] = []
    with slow_cable(testbed, "400mbit"):
        result = testbed.vcenter.migrate("vm1", elsewhere(testbed), progress=notes.append)
    ends = [note for note in notes if note.round]
    assert [note.round for note in ends] == result.outcome.rounds
    assert [note.decision for note in ends] == ["another round"] * (len(ends) - 1) + ["switch over"]
    assert len(ends) > 1
    for note in notes:
        known = note.number > 1 or note.round is not None
        assert (note.predicted_downtime_ms is not None) == known, note
    assert ends[0].predicted_downtime_ms > ends[-1].predicted_downtime_ms == result.outcome.predicted_downtime_ms  # type: ignore[operator]


# ---------------------------------------------------------------- zero pages


@pytest.mark.parametrize("mode", ["precopy", "postcopy", "stop-and-copy"])
def test_only_the_filled_part_of_ram_crosses_and_the_rest_comes_into_being_nowhere(testbed: Testbed, mode: Any) -> None:
    for fill in (0.0, 0.25):
        with another_vm(testbed, fill=fill) as vm:
            filled, before = fill * 32 * MIB, existing_bytes(vm)
            assert filled <= before < filled + MIB
            outcome = move(testbed, vm, Policy(mode=mode))
            assert filled <= outcome.bytes_on_wire < 1.01 * filled + MIB
            assert existing_bytes(vm) <= before + MIB / 4
            if mode != "postcopy":
                assert outcome.zero_pages > 0  # parts of the ledger exist and are empty


# ---------------------------------------------------------------- transports


@pytest.mark.parametrize("method", ["zstd", "lz4"])
def test_ram_that_packs_well_crosses_a_slow_cable_packed(testbed: Testbed, method: Any) -> None:
    with another_vm(testbed, ram=64 * MIB, compressible=0.9) as vm, slow_cable(testbed, "200mbit"):
        outcome = move(testbed, vm, by=Transport(compress=method))
    assert outcome.packed
    assert outcome.bytes_on_wire < 0.5 * 48 * MIB


@pytest.mark.parametrize("method", ["zstd", "lz4"])
def test_packing_random_ram_is_found_not_to_pay(testbed: Testbed, method: Any) -> None:
    with another_vm(testbed, ram=64 * MIB) as vm, slow_cable(testbed, "400mbit"):
        outcome = move(testbed, vm, by=Transport(compress=method))
    assert not outcome.packed
    assert 48 * MIB < outcome.bytes_on_wire < 1.02 * 48 * MIB


def test_a_limited_migration_takes_no_more_of_the_link_than_its_limit(testbed: Testbed) -> None:
    with another_vm(testbed) as vm:
        for streams in (1, 4):
            first, *_ = move(testbed, vm, by=Transport(bandwidth_limit=400_000_000, streams=streams)).rounds
            assert 0.5 * 400 < first.bytes * 8 / first.ms / 1000 < 1.15 * 400


@pytest.mark.parametrize("streams", [1, 4])
def test_so_many_connections_carry_pages_as_were_asked_for(testbed: Testbed, streams: int) -> None:
    with slow_cable(testbed, "200mbit"):
        task = start(testbed, by=Transport(streams=streams, encrypt=streams == 4))
        eventually(lambda: task.status().bytes_sent > 4 * MIB, "pages")
        connections = vmotion_connections(testbed, task.hosts[0])
        task.cancel()
        with pytest.raises(MigrationFailed, match="cancelled"):
            task.wait(PATIENCE_S)
    assert len(connections) == streams
    # what waits in the sockets shows which of them carry pages
    assert sum(waiting > 0 for waiting in connections) >= streams


def test_a_round_on_several_connections_may_take_longer_than_the_hosts_are_patient(testbed: Testbed) -> None:
    with slow_cable(testbed, "50mbit"):  # 48 MB take 8 s, and a silent peer is given up after 5
        result = start(testbed, by=Transport(streams=3)).wait(60)
    assert result.outcome.digests_equal


def vmotion_connections(testbed: Testbed, host: str) -> list[int]:
    """What waits to be sent on each connection that a host has to another's vMotion port."""
    with open(f"/proc/{testbed.net[host].pid}/net/tcp") as lines:
        rows = [line.split() for line in lines][1:]
    return [
        int(row[4].split(":")[0], 16)
        for row in rows
        if row[3] == ESTABLISHED and int(row[2].split(":")[1], 16) == protocol.PORT
    ]


# ---------------------------------------------------------------- encryption


def test_ram_is_to_be_seen_on_the_cable_only_without_encryption(testbed: Testbed, tmp_path: Path) -> None:
    with another_vm(testbed, ram=16 * MIB) as vm, slow_cable(testbed, "400mbit"):
        ram = memory(vm).read_bytes()
        needles = [ram[at : at + 24] for at in range(8 * MIB, 12 * MIB, 64 * 1024)]
        assert all(any(needle) for needle in needles)
        modes: list[tuple[Any, bool]] = [("precopy", False), ("precopy", True), ("postcopy", True)]
        for mode, encrypt in modes:
            folder = tmp_path / f"{mode}-{encrypt}"
            folder.mkdir()
            node = CaptureNode("esx1", testbed.popen("esx1"), (("esx1-vmnic1", WHOLE_FRAMES),))
            with Capture(folder, [node]):
                move(testbed, vm, Policy(mode=mode), Transport(encrypt=encrypt))
            seen = (folder / "esx1.pcapng").read_bytes()
            assert len(seen) > 12 * MIB
            found = sum(needle in seen for needle in needles)
            assert found == 0 if encrypt else found > 0.8 * len(needles), mode  # one may lie across two frames
            assert (b"VMOT" in seen) != encrypt


class Caller:
    """Someone on the vMotion network who calls a host: with a certificate of this folder and name, or plainly."""

    def __init__(self, testbed: Testbed, host: str, certificates: Path | None = None, name: str = "") -> None:
        (other,) = set(HOSTS) - {host}
        plan = testbed.run.plan
        me = replace(plan.host(other), name=name or other)
        with inside(testbed.net[other].pid):
            port = VmotionPort(me, plan, certificates or PRIVATE, PATIENCE_S, lambda role, state: None)
            ip = plan.host(host).vmotion_port.ip
            self._stream = port.connect(ip, protocol.PORT, "source", encrypt=certificates is not None)

    def is_refused(self, opening: Hello | Join) -> bool:
        """By one word at most."""
        if isinstance(opening, Join):
            self._stream.session = Session("sender")
        with self._stream:
            try:
                self._stream.send(opening)
                self._stream.receive()
            except StreamLost:
                return True
            except PeerAborted as error:
                return str(error) == "refused"
        return False


def hello(migration: str, token: str) -> Hello:
    return Hello(protocol.MAJOR, protocol.MINOR, migration, token, 64 * MIB)


def join(migration: str, token: str) -> Join:
    return Join(protocol.MAJOR, protocol.MINOR, migration, token, "pages")


@pytest.fixture
def foreign(testbed: Testbed, tmp_path: Path) -> Path:
    """Certificates with the hosts' names, of another authority; whoever has them trusts the hosts."""
    issue_certificates(tmp_path, {host.name: [host.vmotion_port.ip] for host in testbed.run.plan.hosts})
    shutil.copy(PRIVATE / "ca.pem", tmp_path / "ca.pem")
    return tmp_path


def test_strangers_disturb_no_encrypted_migration(testbed: Testbed, foreign: Path) -> None:
    destination = elsewhere(testbed)
    with slow_cable(testbed, "200mbit"):
        task = start(testbed, by=Transport(encrypt=True))
        eventually(lambda: task.status().bytes_sent > 0, "pages")
        migration = latest(testbed, "migration.begin")[0]["migration"]
        for host in HOSTS:
            for opening in (hello(migration, "0" * 32), join(migration, "0" * 32)):
                for certificates, name in ((None, ""), (foreign, ""), (PRIVATE, MANAGER), (PRIVATE, "")):
                    assert Caller(testbed, host, certificates, name).is_refused(opening)
        result = task.wait(60)
    assert result.outcome.digests_equal
    assert here(testbed) == destination


@pytest.mark.parametrize("encrypt", [True, False], ids=["encrypted", "plain"])
def test_with_the_token_alone_nobody_gets_into_a_migration(testbed: Testbed, foreign: Path, encrypt: bool) -> None:
    """A plain caller of an encrypted migration, an encrypted one of a plain one; other certificates than a host's."""
    source, destination, plan = here(testbed), elsewhere(testbed), testbed.run.plan
    wrong = ((None, ""), (foreign, ""), (PRIVATE, MANAGER)) if encrypt else ((PRIVATE, ""),)

    def agent(host: str) -> AgentClient:
        return AgentClient(host, plan.host(host).management, PRIVATE)

    with closing(agent(destination)) as at_destination, closing(agent(source)) as at_source:
        ready = at_destination.call(control.Prepare("vm1", "m", "rarp", SCHEDULE_MS, encrypt))
        for certificates, name in wrong:
            for opening in (hello("m", ready["token"]), join("m", ready["token"])):
                assert Caller(testbed, destination, certificates, name).is_refused(opening)
        where = ready["ip"], ready["port"], ready["token"]
        at_source.call(control.Migrate("vm1", "m", *where, Policy(), Transport(encrypt=encrypt)))
    testbed.vcenter.places["vm1"] = destination


# ---------------------------------------------------------------- cancel


@pytest.mark.parametrize(
    ("mode", "state"),
    [
        ("precopy", "source:precopy"),
        ("precopy", "source:round_ended"),
        ("precopy", "source:suspended"),
        ("precopy", "source:handed_over"),
        ("precopy", "destination:restoring"),
        ("postcopy", "source:listed"),
        ("postcopy", "source:entrusted"),
        ("postcopy", "destination:rebuilding"),
    ],
)
def test_a_migration_can_be_cancelled_up_to_the_point_of_no_return(testbed: Testbed, mode: Any, state: str) -> None:
    source, destination = here(testbed), elsewhere(testbed)
    where = {"source": source, "destination": destination}[state.partition(":")[0]]
    with Customer(testbed, IP) as customer:
        assert customer.transfer()
        with stopped_at(testbed, where, state, Policy(mode=mode)) as task:
            task.cancel()
            if where == destination:
                eventually(lambda: bool(latest(testbed, "vm.resumed_at_source")), "resume at the source")
            testbed.vcenter.go_on(where)
            with pytest.raises(MigrationFailed, match="cancelled"):
                task.wait(PATIENCE_S)
        assert task.status().state == "cancelled"
        assert (here(testbed), status(testbed)["state"]) == (source, "running")
        assert customer.transfer()
        move(testbed, policy=Policy(mode=mode))
        assert customer.transfer()


@pytest.mark.parametrize(
    ("mode", "state"),
    [
        ("precopy", "destination:claimed"),
        ("postcopy", "destination:owned"),
        ("postcopy", "destination:filling"),
        ("postcopy", "source:serving"),
    ],
)
def test_behind_the_point_of_no_return_cancel_changes_nothing(testbed: Testbed, mode: Any, state: str) -> None:
    source, destination = here(testbed), elsewhere(testbed)
    where = {"source": source, "destination": destination}[state.partition(":")[0]]
    with Customer(testbed, IP) as customer:
        assert customer.transfer()
        with stopped_at(testbed, where, state, Policy(mode=mode)) as task:
            task.cancel()
            time.sleep(0.3)  # it is heard
            testbed.vcenter.go_on(where)
            outcome = task.wait(PATIENCE_S).outcome
        assert customer.transfer()
    assert task.status().state == "success"
    assert outcome.digests_equal
    assert here(testbed) == destination


# ---------------------------------------------------------------- two at once


def test_two_equal_vms_at_once_share_the_cable_evenly(testbed: Testbed) -> None:
    vm1 = testbed.run.plan.vm("vm1")
    if here(testbed) != "esx1":
        move(testbed)
    with another_vm(testbed, ram=vm1.ram, dirty_rate=vm1.dirty_rate, working_set=vm1.working_set) as vm:
        with slow_cable(testbed, "600mbit"):
            tasks = [start(testbed, name) for name in ("vm1", vm)]
            results = [task.wait(60) for task in tasks]
        took = [
            events(testbed, "vm.resumed", migration=result.migration)[0]["t"]
            - events(testbed, "rounds.begin", migration=result.migration)[0]["t"]
            for result in results
        ]
        assert max(took) < 2 * min(took)
        assert all(result.outcome.digests_equal for result in results)
