"""The NAS fails, is full, or holds what cannot be: a clear word, nothing lost, and it goes on when that is over."""

import dataclasses
import time
from collections.abc import Iterator

import msgspec
import pytest
from programs import eventually
from testbeds import answers, elsewhere, events, here, slow_cable, small_testbed

from experiments import injuries
from experiments.clerk import Clerk
from experiments.injuries import Scene
from experiments.testbed import Testbed
from experiments.verdict import ledger_checks
from hosts.control import ControlError
from hosts.datastore import Claim, lock_path
from hosts.ownership import RUN_S
from hosts.store import open_store
from hosts.vcenter import MigrationFailed
from topologies.plan import read_plan

IP = "10.0.0.11"


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    with small_testbed(tmp_path_factory.mktemp("storage") / "results") as testbed:
        testbed.vcenter.power_on("vm1")
        yield testbed


@pytest.fixture(autouse=True)
def the_vm_runs_and_can_move(testbed: Testbed) -> Iterator[None]:
    yield
    eventually(lambda: state(testbed) == "running", "the VM runs")
    assert answers(testbed, IP)
    assert testbed.vcenter.migrate("vm1", elsewhere(testbed)).outcome.digests_equal


def state(testbed: Testbed) -> str:
    said: str = testbed.vcenter.status()[here(testbed)]["vms"]["vm1"]["state"]
    return said


# ---------------------------------------------------------------- silence


def test_a_nas_that_is_killed_and_restarted_during_a_migration_holds_up_nobody_for_good(testbed: Testbed) -> None:
    assert testbed.nas is not None
    with Clerk(testbed, "vm1", "restart") as clerk:
        with slow_cable(testbed):
            task = testbed.vcenter.start_migration("vm1", elsewhere(testbed))
            eventually(lambda: task.status().phase == "round", "first round")
            testbed.nas.kill()
            time.sleep(0.5)
            testbed.nas.start()
        assert task.wait(60).outcome.digests_equal
        seen = clerk.audit()
    assert seen.connection_survived
    assert all(ledger_checks(seen).values())


def test_five_seconds_without_its_storage_stop_a_vm_and_cost_nothing_but_time(testbed: Testbed) -> None:
    host, before = here(testbed), testbed.vcenter.status()[here(testbed)]["vms"]["vm1"]
    stalled = len(events(testbed, "vm.stalled"))
    with Clerk(testbed, "vm1", "silence") as clerk:
        heal = injuries.cut_storage(Scene(testbed, "vm1", host, elsewhere(testbed)), host)
        began = time.monotonic()
        eventually(lambda: len(events(testbed, "vm.stalled")) > stalled, "it stands still")
        assert time.monotonic() - began < RUN_S + 1
        assert not answers(testbed, IP, within_s=1)
        time.sleep(max(0.0, 5 - (time.monotonic() - began)))
        heal()
        eventually(lambda: state(testbed) == "running", "it goes on", 10)
        seen = clerk.audit()
    now = testbed.vcenter.status()[host]["vms"]["vm1"]
    assert (now["pid"], now["generation"]) == (before["pid"], before["generation"] + 1)  # the same RAM, a new lease
    assert now["silent_ms"] == 0
    assert seen.connection_survived
    assert all(ledger_checks(seen).values())


def test_while_the_nas_is_silent_every_order_ends_and_says_why(testbed: Testbed) -> None:
    heal = injuries.hide_datastore(Scene(testbed, "vm1", here(testbed), elsewhere(testbed)))
    try:
        began = time.monotonic()
        with pytest.raises(MigrationFailed, match=r"10\.0\.99\.3:/datastore1 does not answer"):
            testbed.vcenter.migrate("vm1", elsewhere(testbed))
        with pytest.raises(ControlError, match=r"10\.0\.99\.3:/datastore1 does not answer"):
            testbed.vcenter.power_on("vm1", elsewhere(testbed))
        assert time.monotonic() - began < 20
        assert state(testbed) == "stalled"
        assert testbed.vcenter.status()[here(testbed)]["vms"]["vm1"]["silent_ms"] > 1000
    finally:
        heal()


def test_a_vm_whose_agent_starts_while_the_nas_is_silent_is_adopted_when_it_answers(testbed: Testbed) -> None:
    host, before = here(testbed), testbed.vcenter.status()[here(testbed)]["vms"]["vm1"]
    heal = injuries.hide_datastore(Scene(testbed, "vm1", host, elsewhere(testbed)))
    try:
        testbed.kill_agent(host)
        testbed.restart_agent(host)
        assert "vm1" not in testbed.vcenter.status()[host]["vms"]
    finally:
        heal()
    eventually(lambda: "vm1" in testbed.vcenter.status()[host]["vms"], "adoption")
    assert testbed.vcenter.status()[host]["vms"]["vm1"]["pid"] == before["pid"]


# ---------------------------------------------------------------- what cannot be


def test_a_corrupted_lock_file_is_named_and_nothing_is_changed_or_lost(testbed: Testbed) -> None:
    off = with_spoilt_lock(testbed, b"\0" * 512)
    assert "lock file /vm1/.lck-vm1." in off and "cannot be read" in off


def test_a_lock_file_of_a_later_version_is_left_alone_and_says_what_to_do(testbed: Testbed) -> None:
    claim = Claim(2, "vm1", 0, "esx1", False, "0123456789abcdef")
    off = with_spoilt_lock(testbed, msgspec.json.encode(claim).ljust(512))
    assert "was written by a later version of vmotion (format 2; this one knows 1); use that version" in off


def with_spoilt_lock(testbed: Testbed, content: bytes) -> str:
    """What a power-on says of it; the VM is powered on again afterwards, with all that it had."""
    host = here(testbed)
    with Clerk(testbed, "vm1", f"spoilt-{time.monotonic_ns()}", patience_s=1.0) as clerk:
        testbed.vcenter.power_off("vm1")
        store = open_store(testbed.where)
        generation = max(int(name.rpartition(".")[2]) for name in store.names("/vm1") if name.startswith(".lck-"))
        path = lock_path("vm1", generation)
        before = store.read(path, 4096)
        lock = store.open(path)
        lock.write(0, content)
        with pytest.raises(ControlError) as refusal:
            testbed.vcenter.power_on("vm1", host)
        assert store.read(path, 4096) == content
        lock.write(0, before)
        lock.close()
        store.close()
        assert testbed.vcenter.power_on("vm1", host)["entries"] > 0
        seen = clerk.audit()
    assert all(ledger_checks(seen).values())
    return str(refusal.value)


def test_a_spoilt_configuration_is_named_and_the_vm_stays_where_it_is(testbed: Testbed) -> None:
    store = open_store(testbed.where)
    vmx = store.open("/vm1/vm1.vmx")
    before = store.read("/vm1/vm1.vmx", 65536)
    vmx.write(0, before.replace(b"ethernet0.address = ", b"ethernet0.addres5 = "))
    with pytest.raises(MigrationFailed, match=r"/vm1/vm1\.vmx has no ethernet0\.address"):
        testbed.vcenter.migrate("vm1", elsewhere(testbed))
    vmx.write(0, before)
    vmx.close()
    store.close()
    assert state(testbed) == "running"


def test_a_vm_is_registered_and_run_on_any_host_from_its_files_alone(testbed: Testbed) -> None:
    vcenter, there = testbed.vcenter, elsewhere(testbed)
    vcenter.power_off("vm1")
    vcenter.unregister("vm1")
    plan, vcenter.plan = vcenter.plan, dataclasses.replace(vcenter.plan, vms=(read_plan().vms[0],))  # another RAM
    try:
        vcenter.register("vm1", there)
        vcenter.power_on("vm1")
    finally:
        vcenter.plan = plan
    assert here(testbed) == there
    assert vcenter.inventory["vm1"].ram == plan.vm("vm1").ram
