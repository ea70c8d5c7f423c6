"""Migrations as tasks: several at once in both directions, a queue, cancelling, and what is told meanwhile."""

from collections.abc import Iterator
from contextlib import closing

import pytest
from programs import eventually
from testbeds import HOSTS, answers, elsewhere, events, slow_cable, small_testbed

from experiments.testbed import Testbed
from experiments.world import PRIVATE
from hosts import control
from hosts.control import AgentClient
from hosts.tasks import Cancelled, Queue, Task
from hosts.vcenter import MigrationFailed, Result
from topologies.errors import UsageError
from topologies.plan import VM

MORE = (
    VM("vm2", "esx2", "10.0.0.12/24", "00:50:56:00:00:02"),
    VM("vm3", "esx1", "10.0.0.13/24", "00:50:56:00:00:03"),
)


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """Three small VMs, which are running; each test leaves them running, on either host."""
    with small_testbed(tmp_path_factory.mktemp("tasks") / "results", *MORE) as testbed:
        for vm in testbed.run.plan.vms:
            testbed.vcenter.power_on(vm.name)
        yield testbed


@pytest.fixture(autouse=True)
def every_vm_runs_where_the_manager_has_it(testbed: Testbed) -> Iterator[None]:
    yield
    said = testbed.vcenter.status()
    running = {vm: host for host in HOSTS for vm, status in said[host]["vms"].items() if status["state"] == "running"}
    assert running == testbed.vcenter.places
    assert all(answers(testbed, str(vm.interface.ip)) for vm in testbed.run.plan.vms)


def start(testbed: Testbed, *vms: str) -> list[Task[Result]]:
    return [testbed.vcenter.start_migration(vm, elsewhere(testbed, vm)) for vm in vms]


def states(tasks: list[Task[Result]]) -> list[str]:
    return [task.status().state for task in tasks]


def begun(testbed: Testbed) -> list[str]:
    return [event["vm"] for event in events(testbed, "migration.begin")]


@pytest.fixture
def one_at_a_time(testbed: Testbed) -> Iterator[None]:
    queue, testbed.vcenter.queue = testbed.vcenter.queue, Queue(1)
    yield
    testbed.vcenter.queue = queue


def test_vms_pass_each_other_in_opposite_directions(testbed: Testbed) -> None:
    with slow_cable(testbed, "200mbit"):
        tasks = start(testbed, "vm1", "vm2")
        eventually(lambda: [task.status().phase for task in tasks] == ["round", "round"], "rounds of both at once")
        directions = {(task.hosts) for task in tasks}
        results = [task.wait(60) for task in tasks]
    assert directions == {("esx1", "esx2"), ("esx2", "esx1")}
    assert all(result.outcome.digests_equal for result in results)
    assert [result.destination for result in results] == [testbed.vcenter.places[vm] for vm in ("vm1", "vm2")]


@pytest.mark.usefixtures("one_at_a_time")
def test_migrations_beyond_the_limit_wait_and_begin_in_their_order(testbed: Testbed) -> None:
    before = len(begun(testbed))
    with slow_cable(testbed):
        tasks = start(testbed, "vm3", "vm1", "vm2")
        eventually(lambda: tasks[0].status().phase == "round", "first round")
        assert states(tasks) == ["running", "queued", "queued"]
    assert all(task.wait(60).outcome.digests_equal for task in tasks)
    assert states(tasks) == ["success", "success", "success"]
    assert begun(testbed)[before:] == ["vm3", "vm1", "vm2"]
    begins, ends = (events(testbed, f"migration.{moment}")[-3:] for moment in ("begin", "end"))
    assert all(end["t"] <= begin["t"] for end, begin in zip(ends, begins[1:], strict=False))


@pytest.mark.usefixtures("one_at_a_time")
def test_a_queued_migration_that_is_cancelled_never_begins(testbed: Testbed) -> None:
    before, place = len(begun(testbed)), testbed.vcenter.places["vm1"]
    with slow_cable(testbed):
        first, second = start(testbed, "vm3", "vm1")
        second.cancel()
        with pytest.raises(Cancelled):
            second.wait(10)
    assert first.wait(60).outcome.digests_equal
    assert second.status().state == "cancelled"
    assert (begun(testbed)[before:], testbed.vcenter.places["vm1"]) == (["vm3"], place)


@pytest.mark.parametrize("phase", ["", "round"], ids=["at once", "in the first round"])
def test_a_running_migration_that_is_cancelled_leaves_the_vm_where_it_is(testbed: Testbed, phase: str) -> None:
    place = testbed.vcenter.places["vm1"]
    with slow_cable(testbed):
        (task,) = start(testbed, "vm1")
        eventually(lambda: task.status().state == "running" and task.status().phase == phase, "its moment")
        task.cancel()
        with pytest.raises(MigrationFailed, match=f"VM vm1 stays on {place}: cancelled"):
            task.wait(60)
    assert task.status().state == "cancelled"
    assert testbed.vcenter.places["vm1"] == place
    assert testbed.vcenter.migrate("vm1", elsewhere(testbed, "vm1")).outcome.digests_equal


def test_a_task_tells_its_rounds_bytes_and_prediction_and_so_does_the_agent(testbed: Testbed) -> None:
    source = testbed.vcenter.places["vm1"]
    with slow_cable(testbed):
        (task,) = start(testbed, "vm1")
        eventually(lambda: task.status().bytes_sent > 0, "bytes")
        early = task.status()
        with closing(AgentClient(source, testbed.run.plan.host(source).management, PRIVATE)) as agent:
            (migration,) = agent.call(control.Status())["migrations"].values()
    assert (early.state, early.phase, early.round) == ("running", "round", 1)
    assert (migration["role"], migration["progress"]["phase"]) == ("source", "round")
    assert migration["progress"]["bytes_sent"] >= early.bytes_sent
    outcome = task.wait(60).outcome
    late = task.status()
    assert (late.state, late.round) == ("success", len(outcome.rounds))
    assert early.bytes_sent < late.bytes_sent <= outcome.bytes_on_wire
    assert late.predicted_downtime_ms == outcome.predicted_downtime_ms
    assert testbed.vcenter.status()[source]["migrations"] == {}


def test_a_vm_has_one_migration_at_a_time(testbed: Testbed) -> None:
    with slow_cable(testbed):
        (task,) = start(testbed, "vm1")
        with pytest.raises(UsageError, match="VM vm1 has a migration under way already"):
            testbed.vcenter.migrate("vm1", task.hosts[1])
        task.cancel()
        with pytest.raises(MigrationFailed):
            task.wait(60)
