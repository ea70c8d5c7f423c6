"""Random schedules of faults against a VM, its hosts and its storage: never two at once, nothing acknowledged is lost.

Ten of them, a hundred with --long. Each leaves the VM running somewhere, and movable.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from programs import eventually
from testbeds import HOSTS, events, small_testbed

from experiments import injuries
from experiments.clerk import Clerk
from experiments.injuries import Heal, Scene
from experiments.tenures import disk_record, overlap_ms, tenures
from experiments.testbed import Testbed, guest_pids
from experiments.verdict import ledger_checks
from hosts.availability import Availability
from hosts.control import ControlError
from topologies.errors import TestbedError
from topologies.events import read_events

_SETTLED_WITHIN_S = 90.0


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    with small_testbed(tmp_path_factory.mktemp("schedules") / "results") as testbed:
        testbed.vcenter.power_on("vm1")
        yield testbed


# ---------------------------------------------------------------- faults: each returns how it is healed


def kill_agent(scene: Scene, host: str) -> Heal:
    scene.testbed.kill_agent(host)
    return lambda: scene.testbed.restart_agent(host)


def kill_host(scene: Scene, host: str) -> Heal:
    scene.testbed.kill_host(host)
    return lambda: scene.testbed.restart_agent(host)


def kill_vms(scene: Scene, host: str) -> Heal:
    scene.testbed.end_vms(host)
    return lambda: None


def kill_vmx(scene: Scene, host: str) -> Heal:
    scene.testbed.kill_vmx(host, scene.vm)
    return lambda: None


def freeze_nas(scene: Scene, _host: str) -> Heal:
    return injuries.hide_datastore(scene)


def kill_nas(scene: Scene, _host: str) -> Heal:
    assert scene.testbed.nas is not None
    scene.testbed.nas.kill()
    return scene.testbed.nas.start


def cut_cable(scene: Scene, _host: str) -> Heal:
    return injuries.cut(scene, *HOSTS)


def migrate(scene: Scene, _host: str) -> Heal:
    vcenter = scene.testbed.vcenter
    with suppress(TestbedError):  # there is one, or the VM is off
        vcenter.start_migration(scene.vm, vcenter.elsewhere(scene.vm))
    return lambda: None


def wait(_scene: Scene, _host: str) -> Heal:
    time.sleep(1.0)
    return lambda: None


Fault = Callable[[Scene, str], Heal]
# Two that concern the same thing cannot be at once
FAULTS: dict[Fault, str] = {
    kill_agent: "agent",
    kill_host: "agent",
    injuries.freeze_agent: "agent",
    kill_vms: "",
    kill_vmx: "",
    injuries.cut_storage: "storage",
    freeze_nas: "nas",
    kill_nas: "nas",
    cut_cable: "cable",
    migrate: "",
    wait: "",
}
steps = st.tuples(
    st.sampled_from(list(FAULTS)), st.sampled_from(["owner", "other"]), st.sampled_from([0.0, 0.05, 0.3, 1.0, 2.5])
)


@pytest.mark.timeout(3600)
def test_whatever_happens_the_vm_never_runs_twice_and_nothing_acknowledged_is_lost(
    testbed: Testbed, request: pytest.FixtureRequest
) -> None:
    examples = 100 if request.config.getoption("--long") else 10

    @settings(
        max_examples=examples,
        deadline=None,
        phases=[Phase.generate],  # a smaller story would take an hour to find
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(steps, min_size=1, max_size=5))
    def played(schedule: list[tuple[Fault, str, float]]) -> None:
        story = [(fault.__name__, whose, pause) for fault, whose, pause in schedule]
        testbed.run.events.emit("schedule.begin", story=story)
        play(testbed, [(migrate, "owner", 0.3), *schedule])

    played()


def play(testbed: Testbed, schedule: list[tuple[Fault, str, float]]) -> None:
    vcenter = testbed.vcenter
    owner, other = vcenter.places["vm1"], vcenter.elsewhere("vm1")
    scene, before = Scene(testbed, "vm1", owner, other), len(read_events(testbed.run.events_file))
    with Clerk(testbed, "vm1", f"clerk-{time.monotonic_ns()}", patience_s=1.0) as clerk:
        with ExitStack() as heals, Availability(vcenter):
            broken: set[str] = set()
            for fault, whose, pause in schedule:
                host = owner if whose == "owner" else other
                about = f"{FAULTS[fault]} of {host}" if FAULTS[fault] in ("agent", "storage") else FAULTS[fault]
                if about not in broken:
                    heals.callback(fault(scene, host))
                    broken.add(about if FAULTS[fault] else "-")
                time.sleep(pause)
        settle(testbed)
        seen = clerk.audit()
    story = read_events(testbed.run.events_file)[before:]
    assert overlap_ms(tenures(story, "vm1")) == 0
    assert all(ledger_checks(seen).values()), seen.failure
    assert len(guest_pids()) == 1
    record = disk_record(testbed.datastore, "vm1")
    assert record == sorted(record)
    assert vcenter.migrate("vm1", vcenter.elsewhere("vm1")).outcome.digests_equal


def settle(testbed: Testbed) -> None:
    """All is healed: the VM comes to run on one host, with nobody's help if its lease had not been broken yet."""
    vcenter = testbed.vcenter
    task = vcenter.tasks["vm1"]
    assert task.over.wait(_SETTLED_WITHIN_S)

    def runs() -> bool:
        said = vcenter.find("vm1")
        states = [status["vms"].get("vm1", {}).get("state") for status in vcenter.status().values()]
        if any(status["migrations"] for status in vcenter.status().values()):
            return False
        if said == "VM vm1 is off" or states.count("running") + states.count("stalled") == 0:
            try:
                vcenter.power_on("vm1")
            except ControlError:  # its owner may be coming back, or a lease has to be waited for
                return False
        return states.count("running") == 1 and said.endswith(": running")

    eventually(runs, "a VM that runs", _SETTLED_WITHIN_S)


def test_the_schedules_are_what_they_seem(testbed: Testbed) -> None:
    """A fault that does nothing would prove nothing."""
    assert events(testbed, "host.isolated") or events(testbed, "agent.killed") or events(testbed, "host.killed")
    assert os.getpid() == 1
