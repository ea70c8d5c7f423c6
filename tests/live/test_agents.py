"""An agent is killed at every kind of moment: its VMs go on, and the next agent does what the datastore says."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from programs import command_line, eventually
from testbeds import HOSTS, answers, elsewhere, events, here, slow_cable, small_testbed

from experiments.probes import Probes
from experiments.testbed import Testbed, guest_pids
from hosts.control import ControlError
from hosts.datastore import lock_path
from hosts.policy import Policy
from hosts.store import open_store
from hosts.tasks import Task
from hosts.vcenter import MigrationFailed, Result

IP = "10.0.0.11"


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """A small VM, which is running; each test leaves it running, on either host, and both agents alive."""
    with small_testbed(tmp_path_factory.mktemp("agents") / "results") as testbed:
        testbed.vcenter.power_on("vm1")
        yield testbed


@pytest.fixture(autouse=True)
def the_vm_runs_on_one_host_and_can_move(testbed: Testbed) -> Iterator[None]:
    yield
    assert found(testbed) == {here(testbed): "running"}
    assert answers(testbed, IP)
    result = testbed.vcenter.migrate("vm1", elsewhere(testbed))
    assert result.outcome.digests_equal
    assert found(testbed) == {here(testbed): "running"}
    assert answers(testbed, IP)


# ---------------------------------------------------------------- helpers


def found(testbed: Testbed) -> dict[str, str]:
    """Host -> state of the VM there, as the agents say."""
    said = testbed.vcenter.status()
    return {host: status["vms"]["vm1"]["state"] for host, status in said.items() if "vm1" in status["vms"]}


def vm(testbed: Testbed) -> dict[str, int]:
    """What its host's agent says of it."""
    said: dict[str, int] = testbed.vcenter.status()[here(testbed)]["vms"]["vm1"]
    return {name: said[name] for name in ("generation", "state", "pid")}


def restart(testbed: Testbed, host: str) -> None:
    testbed.kill_agent(host)
    testbed.restart_agent(host)


@contextmanager
def stopped_at(testbed: Testbed, host: str, state: str, policy: Policy | None = None) -> Iterator[Task[Result]]:
    """A migration to the other host that has stopped at a breakpoint."""
    before = len(events(testbed, "breakpoint.reached"))
    testbed.vcenter.breakpoint(host, state)
    task = testbed.vcenter.start_migration("vm1", elsewhere(testbed), policy)
    eventually(lambda: len(events(testbed, "breakpoint.reached")) > before, f"migration at {state}")
    yield task


def fails_saying(task: Task[Result], *words: str) -> None:
    with pytest.raises(MigrationFailed) as failure:
        task.wait(90)
    assert all(word in str(failure.value) for word in words), failure.value
    assert task.status().state == "error"


# ---------------------------------------------------------------- without a migration


def test_a_vm_goes_on_without_its_agent_and_its_client_loses_nothing(testbed: Testbed, tmp_path: Path) -> None:
    host, before = here(testbed), vm(testbed)
    with Probes(testbed.popen("c1"), IP, tmp_path, seed=1) as probes:
        testbed.kill_agent(host)
        assert answers(testbed, IP)
        testbed.restart_agent(host)
        assert vm(testbed) == before
        result = testbed.vcenter.migrate("vm1", elsewhere(testbed))
        assert result.outcome.digests_equal
        seen = probes.stop()
    transactions = seen.transactions
    assert (transactions.failure, seen.bulk.failure) == ("", "")
    assert (transactions.connection_survived, seen.bulk.connection_survived) == (True, True)
    assert 0 < transactions.audited == transactions.acked == transactions.sent
    assert (transactions.lost, transactions.duplicated, transactions.total_conserved) == (0, 0, True)


def test_both_agents_may_die_again_and_again(testbed: Testbed) -> None:
    before = vm(testbed)
    for _ in range(2):
        for host in HOSTS:
            testbed.kill_agent(host)
        for host in HOSTS:
            testbed.restart_agent(host)
    assert vm(testbed) == before


def test_a_vm_whose_guest_has_died_is_dead_and_can_be_powered_on_again(testbed: Testbed) -> None:
    before = vm(testbed)
    kill(before["pid"])
    eventually(lambda: found(testbed) == {here(testbed): "dead"}, "word of its death")
    testbed.vcenter.power_on("vm1")
    assert vm(testbed)["generation"] == before["generation"] + 1


def test_a_vm_whose_guest_has_died_without_its_agent_can_be_powered_on_again(testbed: Testbed) -> None:
    host, before = here(testbed), vm(testbed)
    testbed.kill_agent(host)
    kill(before["pid"])
    testbed.restart_agent(host)
    assert found(testbed) == {}
    testbed.vcenter.power_on("vm1")
    assert vm(testbed)["generation"] == before["generation"] + 1


def test_without_its_lock_file_a_vm_is_left_as_it_is_until_there_is_one_again(testbed: Testbed) -> None:
    host, before = here(testbed), vm(testbed)
    lock, store = lock_path("vm1", before["generation"]), open_store(testbed.where)
    testbed.kill_agent(host)
    store.rename(lock, f"{lock}.away")
    testbed.restart_agent(host)
    assert found(testbed) == {}
    assert guest_pids() == {before["pid"]}
    store.rename(f"{lock}.away", lock)
    store.close()
    with pytest.raises(ControlError, match=f"VM vm1 is running on {host}"):
        testbed.vcenter.power_on("vm1")
    eventually(lambda: found(testbed) == {host: "running"}, "a lease again")
    assert vm(testbed)["pid"] == before["pid"]


def kill(pid: int) -> None:
    assert "hosts.light_guest" in command_line(pid)
    os.kill(pid, signal.SIGKILL)


# ---------------------------------------------------------------- in the middle of pre-copy


def in_the_first_round(testbed: Testbed) -> Task[Result]:
    task = testbed.vcenter.start_migration("vm1", elsewhere(testbed))
    eventually(lambda: task.status().phase == "round", "first round")
    return task


def test_a_source_agent_killed_in_pre_copy_leaves_the_vm_running_there(testbed: Testbed) -> None:
    source, before = here(testbed), vm(testbed)
    with slow_cable(testbed):
        task = in_the_first_round(testbed)
        testbed.kill_agent(source)
        fails_saying(task, f"VM vm1 is on {source}, whose agent does not answer")
    assert answers(testbed, IP)
    assert guest_pids() == {before["pid"]}
    testbed.restart_agent(source)
    assert vm(testbed) == before


def test_a_destination_agent_killed_in_pre_copy_leaves_no_guest_behind(testbed: Testbed) -> None:
    source, destination, before = here(testbed), elsewhere(testbed), vm(testbed)
    with slow_cable(testbed):
        task = in_the_first_round(testbed)
        testbed.kill_agent(destination)
        fails_saying(task, f"stays on {source}")
    eventually(lambda: guest_pids() == {before["pid"]}, "end of the guest that awaited its state")
    testbed.restart_agent(destination)
    assert vm(testbed) == before


# ---------------------------------------------------------------- in the switchover


def test_a_source_killed_before_its_hand_over_runs_the_vm_again_after_its_restart(testbed: Testbed) -> None:
    source, before = here(testbed), vm(testbed)
    with stopped_at(testbed, source, "source:handed_over") as task:  # STATE has not been sent yet
        testbed.kill_agent(source)
        fails_saying(task, f"VM vm1 is on {source}, whose agent does not answer")
    assert not answers(testbed, IP, within_s=1)
    testbed.restart_agent(source)
    assert vm(testbed) == {**before, "generation": before["generation"] + 1}
    assert found(testbed) == {source: "running"}


def test_a_source_restarted_while_the_destination_restores_claims_before_it_resumes(testbed: Testbed) -> None:
    source, destination, before = here(testbed), elsewhere(testbed), vm(testbed)
    with stopped_at(testbed, destination, "destination:restoring") as task:
        restart(testbed, source)
        assert vm(testbed) == {**before, "generation": before["generation"] + 1}
        testbed.vcenter.go_on(destination)
        fails_saying(task, f"VM vm1 is on {source}: running")
    assert guest_pids() == {before["pid"]}


def test_a_source_restarted_after_the_claim_does_not_resume_the_vm(testbed: Testbed) -> None:
    source, destination, before = here(testbed), elsewhere(testbed), vm(testbed)
    with stopped_at(testbed, destination, "destination:claimed") as task:
        restart(testbed, source)
        testbed.vcenter.go_on(destination)
        fails_saying(task, f"VM vm1 is on {destination}: running")
    assert here(testbed) == destination
    # the migration's claim, and another of the same host if its lease lapsed meanwhile: a restart may take 2 s
    claims = [e for e in events(testbed, "generation.claimed") if e["generation"] > before["generation"]]
    assert {claim["source"] for claim in claims} == {destination}
    assert [claim["generation"] for claim in claims] == list(
        range(before["generation"] + 1, claims[-1]["generation"] + 1)
    )
    assert vm(testbed)["generation"] == claims[-1]["generation"]
    assert len(claims) == 1 + len([e for e in events(testbed, "vm.stalled") if e["t"] > claims[0]["t"]])
    assert guest_pids() == {vm(testbed)["pid"]}
    assert events(testbed, "vm.discarded", source=source)[-1]["state"] == "suspended"


def test_a_source_that_is_dead_when_the_vm_arrives_finds_it_gone_later(testbed: Testbed) -> None:
    source, destination = here(testbed), elsewhere(testbed)
    with stopped_at(testbed, destination, "destination:claimed") as task:
        testbed.kill_agent(source)
        testbed.vcenter.go_on(destination)
        fails_saying(task, f"VM vm1 is on {destination}: running")
    assert answers(testbed, IP)
    testbed.restart_agent(source)
    assert guest_pids() == {vm(testbed)["pid"]}


def test_a_destination_killed_after_its_claim_resumes_the_vm_after_its_restart(testbed: Testbed) -> None:
    destination, before = elsewhere(testbed), vm(testbed)
    with stopped_at(testbed, destination, "destination:claimed") as task:
        testbed.kill_agent(destination)
        assert task.wait(90).outcome.generation == before["generation"] + 1
    assert here(testbed) == destination
    assert not answers(testbed, IP, within_s=1)
    testbed.restart_agent(destination)
    assert found(testbed) == {destination: "running"}


def test_a_destination_killed_after_its_resume_goes_on_running_the_vm(testbed: Testbed) -> None:
    destination, before = elsewhere(testbed), vm(testbed)
    with stopped_at(testbed, destination, "destination:running") as task:
        testbed.kill_agent(destination)
        assert task.wait(90).outcome.generation == before["generation"] + 1
    assert answers(testbed, IP)
    testbed.restart_agent(destination)
    assert vm(testbed)["generation"] == before["generation"] + 1


def test_both_killed_in_the_switchover_end_with_one_vm_whoever_is_first(testbed: Testbed) -> None:
    for state, first in (("destination:restoring", 0), ("destination:claimed", 1), ("destination:claimed", 0)):
        hosts = (here(testbed), elsewhere(testbed))
        owner = hosts[0] if state == "destination:restoring" else hosts[1]
        with stopped_at(testbed, hosts[1], state) as task:
            for host in hosts:
                testbed.kill_agent(host)
            fails_saying(task, "it is unknown where VM vm1 is")
        for host in (hosts[first], hosts[1 - first]):
            testbed.restart_agent(host)
        assert testbed.vcenter.find("vm1") == f"VM vm1 is on {owner}: running"
        assert found(testbed) == {owner: "running"}
        assert guest_pids() == {vm(testbed)["pid"]}


# ---------------------------------------------------------------- post-copy: the VM needs both


@pytest.mark.parametrize("victim", [0, 1], ids=["source", "destination"])
def test_an_agent_killed_while_pages_are_missing_takes_the_vm_with_it(testbed: Testbed, victim: int) -> None:
    hosts = (here(testbed), elsewhere(testbed))
    with stopped_at(testbed, hosts[1], "destination:filling", Policy(mode="postcopy")) as task:
        testbed.kill_agent(hosts[victim])
        testbed.vcenter.go_on(hosts[1 - victim])
        fails_saying(task, ("VM vm1 is off", f"VM vm1 is on {hosts[1]}, whose agent does not answer")[victim])
    testbed.restart_agent(hosts[victim])
    eventually(lambda: guest_pids() == set(), "end of both halves of the VM")
    assert found(testbed) == {}
    testbed.vcenter.power_on("vm1")


# ---------------------------------------------------------------- breakpoints


def test_a_breakpoint_lets_go_by_itself_and_only_once(testbed: Testbed) -> None:
    reached = len(events(testbed, "breakpoint.reached"))
    testbed.vcenter.breakpoint(here(testbed), "source:precopy", seconds=0.5)
    for _ in range(2):
        testbed.vcenter.migrate("vm1", elsewhere(testbed))
    assert len(events(testbed, "breakpoint.reached")) == reached + 1
