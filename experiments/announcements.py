"""announcements: what an announcement is worth, to switches that learn in different ways.

              c1  a numbered datagram a millisecond, all the time; the VM answers
              |
         s1 (OVS) ------ mobility | learning-switch | standalone | faucet
        /        \\
     esx1 ======= esx2
     [vm1] <---->                   there and back again, announced by rarp, garp, both, none

For each of them, three figures:

    relearn     from the VM's resume to the first datagram that reaches its new host's uplink
    blackout    the client's longest silence around the migration
    lost        datagrams that were never answered

What to look for in <controller>/pcap/esx2.pcapng: eth.type == 0x8035, and who gets udp.dstport == 7 before and after.

What was learned, on this project's machines:

- A switch relearns from the source address of any frame; the announcement is only the first one, of a VM that may have
  nothing to say. Without one this VM was found by what its kernel says by chance, a multicast report up to a second
  after its address has come up, or an ARP request of its own.
- The textbook's learning switch does relearn, and it does not help: its peers' frames follow their own entries, which
  nothing takes away, to the old port. It breaks at the first move already. An entry to a MAC has to be replaced when
  the MAC moves; entries for pairs of MACs have to be found first.
- OVS by itself (NORMAL) is as fast as a controller when the MAC is new at a port, and slow on the way back, if that
  comes soon: the announcement is like the one before it, meets an entry in the datapath's cache, and its source address
  is not looked at before the cache is revalidated.
- What a gratuitous ARP says more than a RARP, the IP address, no switch here asks for.
"""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments import faucet, report
from experiments.capture import epoch_ns, fields
from experiments.cli import script
from experiments.echo import ECHO_PORT, EchoResult
from experiments.gaps import Window, blackout
from experiments.injuries import Scene, send_rarp
from experiments.one_probe import OneProbe
from experiments.plots import grouped_bars
from experiments.run import CONTROLLERS, Options, Run
from experiments.testbed import Testbed
from experiments.timeline import Clock, Timeline, timeline
from experiments.verdict import Findings
from experiments.world import run as ovs
from hosts.announce import MODES
from topologies.errors import UsageError
from topologies.events import clock_pair, find, read_events
from topologies.plan import VM

_WATCHED_S = 2.0  # after the resume; who has not been found by then is called lost
_BEFORE_S = 0.3
DIRECTIONS = ("first move", "back again")


@dataclass(frozen=True)
class Outcome:
    """One migration. In ms; `relearn_ms` is None if no datagram reached the new host while it was watched."""

    controller: str
    announce: str
    direction: str
    downtime_ms: float
    relearn_ms: float | None
    blackout_ms: float
    lost: int

    @property
    def is_found(self) -> bool:
        return self.relearn_ms is not None


@dataclass(frozen=True)
class _Leg:
    """What is known of a migration before the captures are read."""

    announce: str
    direction: str
    destination: str
    line: Timeline
    seen: EchoResult


def run(run: Run) -> Findings:
    """Every controller, announcement and direction."""
    outcomes: list[Outcome] = []
    for controller in run.options.only or CONTROLLERS:
        if controller == "faucet" and not faucet.is_installed():
            continue
        report.say(f"{controller}: the VM goes there and back again, announced by {', '.join(MODES)}")
        outcomes += _with_controller(run, controller)
    _show(outcomes)
    grouped_bars(
        run.folder / "announcements.png",
        "How long a client of a VM that moves gets no answer",
        "blackout, ms (the downtime is a part of it)",
        {c: [_bar(outcomes, c, a, d) for d in DIRECTIONS for a in MODES] for c in _in_order(outcomes)},
        [f"{announce}\n{direction}" for direction in DIRECTIONS for announce in MODES],
    )
    report.say(f"plot     {run.folder / 'announcements.png'}")
    checks = {
        "who_is_announced_is_found_by_all_but_the_textbook": all(
            o.is_found for o in outcomes if o.controller != "learning-switch" and o.announce != "none"
        ),
        "the_textbook_loses_it": not any(o.is_found for o in outcomes if o.controller == "learning-switch"),
    }
    return Findings(checks, {"announcements": [dataclasses.asdict(outcome) for outcome in outcomes]})


def check(options: Options) -> None:
    """Faucet is fetched, if it can be had."""
    if not options.only or "faucet" in options.only:
        try:
            faucet.install()
        except UsageError as error:
            if options.only:
                raise
            report.say(f"{error}; the others are compared without it")


def _with_controller(run: Run, controller: str) -> Iterator[Outcome]:
    """Its own testbed, in a folder of its own."""
    options = dataclasses.replace(run.options, controller=controller, out=run.folder / controller)
    part = Run("announcements", options)
    vm = part.plan.vms[0]
    legs: list[_Leg] = []
    with Testbed(part) as testbed, testbed.capture():
        testbed.vcenter.power_on(vm.name)
        for announce in MODES:
            testbed.vcenter.announce = announce
            for direction in DIRECTIONS:
                legs.append(_leg(testbed, vm, announce, direction))
                _heal(testbed, vm)
    clock = Clock(find(read_events(part.events_file), "run.begin")[0]["clocks"], clock_pair())
    reached = {host.name: _reached(part.pcap, host.name, vm, clock) for host in part.plan.hosts}
    for leg in legs:
        yield _outcome(controller, leg, reached[leg.destination])


def _leg(testbed: Testbed, vm: VM, announce: str, direction: str) -> _Leg:
    name = f"{announce}-{direction.replace(' ', '-')}"
    with OneProbe(testbed, vm.name, "udp", name, EchoResult) as probe:
        time.sleep(_BEFORE_S)
        moved = testbed.vcenter.migrate(vm.name, testbed.vcenter.elsewhere(vm.name))
        time.sleep(_WATCHED_S)
        seen = probe.stop()
    line = timeline(read_events(testbed.run.events_file), moved.migration, vm.mac)
    return _Leg(announce, direction, moved.destination, line, seen)


def _heal(testbed: Testbed, vm: VM) -> None:
    """For the next one everybody knows where the VM is."""
    here = testbed.vcenter.places[vm.name]
    if testbed.run.options.controller == "learning-switch":
        ovs("ovs-ofctl", "-O", "OpenFlow13", "del-flows", testbed.run.plan.switch, f"dl_dst={vm.mac}")
    send_rarp(Scene(testbed, vm.name, here, testbed.vcenter.elsewhere(vm.name)), here)
    time.sleep(0.5)


def _reached(pcap: Path, host: str, vm: VM, clock: Clock) -> list[int]:
    """When a client's datagram for the VM came through a host's uplink."""
    asked = f'eth.dst == {vm.mac} and udp.dstport == {ECHO_PORT} and frame.interface_name == "{host}-vmnic0"'
    return [clock.to_monotonic(epoch_ns(at)) for (at,) in fields(pcap / f"{host}.pcapng", asked, "frame.time_epoch")]


def _outcome(controller: str, leg: _Leg, reached_ns: list[int]) -> Outcome:
    line, seen = leg.line, leg.seen
    until_ns = line.resumed_ns + int(_WATCHED_S * 1e9)
    first = next((at for at in reached_ns if line.resuming_ns <= at <= until_ns), None)
    relearn_ms = None if first is None else (first - line.resuming_ns) / 1e6
    silence = blackout(seen.arrived_ns, seen.stopped_ns, Window(line.suspending_ns, line.resumed_ns))
    return Outcome(controller, leg.announce, leg.direction, line.downtime_ms, relearn_ms, silence.length_ms, seen.lost)


def _in_order(outcomes: list[Outcome]) -> list[str]:
    return list(dict.fromkeys(outcome.controller for outcome in outcomes))


def _bar(outcomes: list[Outcome], controller: str, announce: str, direction: str) -> float:
    of = (controller, announce, direction)
    return next(o.blackout_ms for o in outcomes if (o.controller, o.announce, o.direction) == of)


def _show(outcomes: list[Outcome]) -> None:
    rows = []
    for o in outcomes:
        relearn = f"{o.relearn_ms:8.1f}" if o.relearn_ms is not None else "   never"
        rows.append(
            (f"{o.controller:15} {o.announce:5} {o.direction:10}", f"{relearn} {o.blackout_ms:9.1f} {o.lost:6}")
        )
    report.figures("controller, announcement, direction: relearn ms, blackout ms, datagrams lost", rows)


if __name__ == "__main__":
    script("announcements", run, __doc__)
