"""host_failure: a host dies, or loses sight of its storage; its VM runs on the other one, and never on both.

              c1  transactions; each that was acknowledged has to be there in the end
               |
       esx1   s1   esx2         1. the power of the VM's host fails: its lease runs out, the other restarts the VM
      [vm1]       ->[vm1]       2. its host is cut off from storage and management, not from its clients: it stops the
         X                         VM before the lease is over, the other restarts it; healed, it finds itself fenced
          \\ nas /

Restarting is cold: RAM is lost, the disk is not. The journal on it is replayed (hosts/journal.py).

What to look for in pcap/nas.pcapng:

    nfs.procedure_v3 == 7 and ip.src == 10.0.99.11      esx1's writes and pulses, until it dies
    nfs.procedure_v3 == 15                              LINK: esx2 takes the next generation, a lease later
    nfs.status == 13                                    after healing: late writes of the old owner, refused (ACCES)
"""

import time
from dataclasses import dataclass
from typing import Any

from experiments import report
from experiments.clerk import Clerk
from experiments.cli import script
from experiments.injuries import Scene, isolate
from experiments.run import Run
from experiments.tenures import disk_record, overlap_ms, show, tenures
from experiments.testbed import Testbed
from experiments.verdict import Findings, ledger_checks
from experiments.waiting import until
from hosts.availability import Availability
from hosts.ownership import LEASE_S
from topologies.events import Event, find, read_events

WITHIN_S = LEASE_S + 5.0
_QUIET_S = 2.0  # before each act, so that there is something to lose
_PATIENCE_S = 1.0


@dataclass(frozen=True)
class Act:
    """A failure: how long until the VM ran again elsewhere, and until its client had an answer."""

    restarted_ms: float
    answered_ms: float
    replayed: int
    entries: int


def run(run: Run) -> Findings:
    """A crash, then an isolation."""
    vm = run.plan.vms[0].name
    with Testbed(run) as testbed, testbed.capture() as capture:
        vcenter = testbed.vcenter
        vcenter.power_on(vm)
        with Availability(vcenter), Clerk(testbed, vm, "clerk", _PATIENCE_S) as clerk:
            time.sleep(_QUIET_S)
            first = vcenter.places[vm]
            report.say(f"{vm} runs on {first}, whose power fails")
            crashed_ns = time.monotonic_ns()
            testbed.kill_host(first)
            _await_restart(testbed, vm, crashed_ns)
            testbed.restart_agent(first)

            time.sleep(_QUIET_S)
            second = vcenter.places[vm]
            report.say(f"{vm} runs on {second}, which loses storage and management, and keeps its clients")
            isolated_ns = time.monotonic_ns()
            heal = isolate(Scene(testbed, vm, second, first), second)
            _await_restart(testbed, vm, isolated_ns)
            time.sleep(_QUIET_S)
            heal()
            _await(testbed, "vm.fenced", isolated_ns, host=second)
            _await(testbed, "vm.discarded", isolated_ns, host=second)
            report.say(f"healed: {second} finds its VM fenced")
            seen = clerk.audit()
            status = vcenter.status()
        vcenter.power_off(vm)
        record = disk_record(testbed.datastore, vm)
    capture.merge(run.folder / "capture.pcapng")
    events = read_events(run.events_file)
    found = tenures(events, vm)
    for line in show(found):
        report.say(line)
    acts = {
        "crash": _act(events, seen.arrived_ns, vm, crashed_ns),
        "isolation": _act(events, seen.arrived_ns, vm, isolated_ns),
    }
    for name, act in acts.items():
        times = f"restarted after {act.restarted_ms / 1000:.1f} s, first answer after {act.answered_ms / 1000:.1f} s"
        report.say(f"{name}: {times}, {act.replayed} of {act.entries} transactions replayed from the disk")
    refused = find(events, "disk.refused", vm=vm)
    checks = ledger_checks(seen) | {
        "restarted_in_time": all(act.restarted_ms <= WITHIN_S * 1000 for act in acts.values()),
        "never_on_two_hosts": overlap_ms(found) == 0,
        "stopped_before_the_lease_was_broken": _stopped_first(events, vm, isolated_ns),
        "late_writes_refused": run.options.datastore != "nfs" or len(refused) > 0,
        "the_disk_was_written_by_one_owner_after_the_other": record == sorted(record) and len(record) > 1,
        "old_owner_has_nothing_left": vm not in status[second]["vms"],
    }
    return Findings(
        checks,
        {
            "host_failure": {name: vars(act) for name, act in acts.items()}
            | {
                "lease_s": LEASE_S,
                "transactions": seen.acked,
                "connections": seen.connections,
                "late_writes_refused": len(refused),
                "overlap_ms": overlap_ms(found),
                "tenures": [vars(tenure) for tenure in found],
                "generations_on_the_disk": record,
            }
        },
    )


def _await_restart(testbed: Testbed, vm: str, since_ns: int) -> None:
    _await(testbed, "ha.restarted", since_ns)
    report.say(f"{vm} runs on {testbed.vcenter.places[vm]}")


def _await(testbed: Testbed, kind: str, since_ns: int, host: str = "") -> None:
    def has_come() -> bool:
        events = find(read_events(testbed.run.events_file), kind)
        return any(event["t"] > since_ns and host in ("", event["source"]) for event in events)

    until(has_come, f"an event {kind} of {host or 'anybody'}", 4 * WITHIN_S)


def _act(events: list[Event], arrived_ns: list[int], vm: str, began_ns: int) -> Act:
    restarted = next(e for e in find(events, "vm.powered_on", vm=vm) if e["t"] > began_ns)
    answered_ns: Any = next((at for at in arrived_ns if at > restarted["t"]), float("inf"))
    return Act(
        restarted_ms=(restarted["t"] - began_ns) / 1e6,
        answered_ms=(answered_ns - began_ns) / 1e6,
        replayed=restarted["replayed"],
        entries=restarted["entries"],
    )


def _stopped_first(events: list[Event], vm: str, isolated_ns: int) -> bool:
    stalled = next(e["t"] for e in find(events, "vm.stalled", vm=vm) if e["t"] > isolated_ns)
    broken = next(e["t"] for e in find(events, "lease.broken", vm=vm) if e["t"] > isolated_ns)
    return bool(stalled < broken)


if __name__ == "__main__":
    script("host_failure", run, __doc__)
