"""split_brain: hosts lose each other and the storage in the middle of a migration; the VM never runs on both.

         esx1 ===X=== esx2          for each of the worst moments: the migration is stopped there, one host is cut off
        [vm1]  --->  [vm1]          from storage, management and the other host - not from the VM's clients -, the
            X        /              migration goes on, then the cut is healed
             \\ nas /

Whoever LINKs the next generation has the VM. Who cannot reach the storage cannot know, and does not run it; when it is
healed it finds out. Afterwards:

    who ran when    from the events of the hosts: an overlap of zero
    the disk        each entry of the journal bears the generation under which it was written: they never go back
    the client      every acknowledged transaction is there once
"""

import time
from dataclasses import dataclass

from experiments import injuries, report
from experiments.clerk import Clerk
from experiments.cli import script
from experiments.injuries import Scene
from experiments.run import Run
from experiments.tenures import disk_record, overlap_ms, show, tenures
from experiments.testbed import Testbed
from experiments.verdict import Findings, ledger_checks
from experiments.waiting import until
from hosts.availability import Availability
from hosts.ownership import LEASE_S
from topologies.errors import TestbedError
from topologies.events import find, read_events

_STOPPED_S = 2.0  # at a breakpoint that an isolated host cannot be told to leave
_CUT_S = LEASE_S + 8.0  # long enough for a peer to be given up, for a lease to run out, and for HA to act
_WITHIN_S = 60.0


@dataclass(frozen=True)
class Moment:
    """Where the migration is stopped ("role:state"), and which host is cut off then."""

    name: str
    at: str
    victim: str  # "source" or "destination"


MOMENTS = (
    Moment("source cut off while rounds run", "source:precopy", "source"),
    Moment("source cut off before the claim", "destination:restoring", "source"),
    Moment("source cut off at the claim", "destination:claimed", "source"),
    Moment("source cut off after the claim", "destination:running", "source"),
    Moment("destination cut off before the claim", "destination:restoring", "destination"),
    Moment("destination cut off at the claim", "destination:claimed", "destination"),
)


@dataclass(frozen=True)
class Story:
    """What came of it: the VM's host in the end."""

    moment: str
    source: str
    destination: str
    host: str
    said: str


def run(run: Run) -> Findings:
    """Each moment, one after the other, with a client at work all the time."""
    vm = run.plan.vms[0].name
    stories = []
    with Testbed(run) as testbed:
        testbed.vcenter.power_on(vm)
        with Availability(testbed.vcenter), Clerk(testbed, vm, "clerk", patience_s=1.0, interval_ms=5.0) as clerk:
            for moment in MOMENTS:
                story = play(testbed, vm, moment)
                stories.append(story)
                report.say(f"{story.moment}: from {story.source} to {story.destination}, ends on {story.host}")
            seen = clerk.audit()
        testbed.vcenter.power_off(vm)
        record = disk_record(testbed.datastore, vm)
    events = read_events(run.events_file)
    found = tenures(events, vm)
    for line in show(found):
        report.say(line)
    report.say(f"two hosts at once: {overlap_ms(found):g} ms; {len(find(events, 'disk.refused'))} late writes refused")
    checks = ledger_checks(seen) | {
        "never_on_two_hosts": overlap_ms(found) == 0,
        "the_disk_was_written_by_one_owner_after_the_other": record == sorted(record) and len(record) > 1,
        "every_moment_was_reached": len(stories) == len(MOMENTS),
    }
    return Findings(
        checks,
        {
            "split_brain": {
                "stories": [vars(story) for story in stories],
                "tenures": [vars(tenure) for tenure in found],
                "overlap_ms": overlap_ms(found),
                "late_writes_refused": len(find(events, "disk.refused", vm=vm)),
                "generations_on_the_disk": record,
                "transactions": seen.acked,
                "connections": seen.connections,
            }
        },
    )


def play(testbed: Testbed, vm: str, moment: Moment) -> Story:
    """A migration, a cut, its healing. The VM runs on one of the hosts in the end."""
    vcenter = testbed.vcenter
    source, destination = vcenter.places[vm], vcenter.elsewhere(vm)
    victim = source if moment.victim == "source" else destination
    stopped = source if moment.at.startswith("source") else destination
    reached = len(_reached(testbed))
    vcenter.breakpoint(stopped, moment.at, _STOPPED_S)
    task = vcenter.start_migration(vm, destination)
    until(lambda: len(_reached(testbed)) > reached, f"{moment.name}: the migration comes to {moment.at}", _WITHIN_S)
    heal = injuries.isolate(Scene(testbed, vm, source, destination), victim)
    try:
        time.sleep(_CUT_S)
    finally:
        heal()
    if not task.over.wait(_WITHIN_S):
        raise TestbedError(f"{moment.name}: the migration has not come to an end")
    until(lambda: _settled(testbed, vm), f"{moment.name}: {vm} runs on one host", _WITHIN_S)
    return Story(moment.name, source, destination, vcenter.places[vm], task.status().message or "moved")


def _settled(testbed: Testbed, vm: str) -> bool:
    """One host has it, running, and no other one anything of it."""
    vcenter = testbed.vcenter
    vcenter.find(vm)
    said = {host.name: vcenter.status_of(host.name) for host in testbed.run.plan.hosts}
    if not all(status and not status["migrations"] for status in said.values()):
        return False
    states = {host: status["vms"][vm]["state"] for host, status in said.items() if status and vm in status["vms"]}
    return states == {vcenter.places.get(vm): "running"}


def _reached(testbed: Testbed) -> list[object]:
    return list(find(read_events(testbed.run.events_file), "breakpoint.reached"))


if __name__ == "__main__":
    script("split_brain", run, __doc__)
