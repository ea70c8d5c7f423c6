"""mac_spoof: a malicious client says that a VM is where it is itself. Who believes it?

              c1, c2  clients of the VM; c2 begins to talk when the attack is over
              |
         s1 (OVS) ------ mobility | learning-switch | standalone
        /   |    \\
     esx1   |    esx2
     [vm1]  mallory           claims, replays, floods (experiments/attacker.py)

The same attacks against each of three controllers:

    claim     RARP and gratuitous ARP with the VM's MAC, two hundred a second
    pose      the same with c1's MAC: then the VM's answers are to be had
    replay    the VM's own announcement, as the switch has flooded it to everybody when the VM moved
    flood     RARP for random MACs, as fast as it can; meanwhile the VM moves, and has to be followed

What to look for in <controller>/pcap/mallory.pcapng: udp.dstport == 7, the clients' datagrams for the VM. They are
mallory's to see only if its lie was believed. In <controller>/events.jsonl: mac.refused, port.quarantined.

What was learned: a switch that learns from source addresses believes whoever spoke last. OVS by itself (NORMAL) sends
the VM's traffic to mallory until the VM speaks again. The textbook's learning switch does not touch the entries that it
has, which is what breaks it when a VM really moves; but who begins to talk after the lie talks to mallory, for ever.
To tell a move from a lie takes knowledge that is in no frame: which ports lead to hosts, what the manager has ordered,
and whether the old place still answers.
"""

import dataclasses
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from experiments import report
from experiments.capture import epoch_ns, fields
from experiments.children import READY, wait_until_up
from experiments.cli import script
from experiments.echo import ECHO_PORT, EchoResult
from experiments.injuries import Scene, send_rarp
from experiments.one_probe import OneProbe
from experiments.run import Options, Run
from experiments.testbed import Testbed
from experiments.verdict import Findings
from experiments.world import run as in_the_world
from topologies.errors import TestbedError, UsageError
from topologies.events import Event, find, read_events
from topologies.plan import VM, Client, Plan, validate

COMPARED = ("mobility", "learning-switch", "standalone")
MALLORY, SECOND = "mallory", "c2"
ATTACKS = {"claim": 200, "replay": 200, "pose": 200, "flood": 50_000}  # frames a second
KINDS = {"pose": "claim"}  # where the attacker's word (experiments/attacker.py) is another
ALARMS = {  # the guard's (controller/guard.py)
    "a VM's MAC is only behind a host's uplink",
    "its old place answers",
    "more than 8 MACs behind a client's port",
}
_ATTACK_S = 2.0
_PINGS = 20
_SETTLED_S = 0.5
_WITHIN_S = 30.0


@dataclass(frozen=True)
class Outcome:
    """One attack of so many frames.

    `stolen`: frames of the clients for the VM that came to mallory; `lost` of c1's datagrams while it lasted,
    `unanswered` of c2's pings after it.
    """

    controller: str
    attack: str
    frames: int
    stolen: int
    lost: int
    sent: int
    unanswered: int


def run(run: Run) -> Findings:
    """Each attack on each controller; what ours says of them."""
    outcomes: list[Outcome] = []
    told: dict[str, list[Event]] = {}
    compared = run.options.only or COMPARED
    for controller in compared:
        report.say(f"{controller}: {MALLORY} {', '.join(ATTACKS)}")
        found, told[controller] = _with_controller(run, controller)
        outcomes += found
    _show(outcomes)
    checks: dict[str, bool] = {}
    if "mobility" in compared:
        checks |= _of_mobility([o for o in outcomes if o.controller == "mobility"], told["mobility"], run.plan.vms[0])
    claimed = {o.controller: o.stolen for o in outcomes if o.attack == "claim"}
    checks |= {f"{name}_is_fooled": stolen > 0 for name, stolen in claimed.items() if name != "mobility"}
    alarms = find(told.get("mobility", []), "mac.refused")
    sections = {"mac_spoof": [dataclasses.asdict(outcome) for outcome in outcomes], "alarms": alarms}
    return Findings(checks, sections)


def _of_mobility(outcomes: list[Outcome], events: list[Event], vm: VM) -> dict[str, bool]:
    moves, alarms = find(events, "mac.moved", mac=vm.mac), find(events, "mac.refused")
    for alarm in alarms:
        times = "once" if alarm["times"] == 1 else f"{alarm['times']} times"
        report.say(f"alarm: {alarm['mac']} at {alarm['node']}, {times}: {alarm['reason']}")
    return {
        "nothing_goes_to_mallory": not any(o.stolen for o in outcomes),
        "who_begins_later_is_answered": not any(o.unanswered > _PINGS / 2 for o in outcomes),
        "every_move_is_followed_and_no_lie": len(moves) == len(find(events, "migration.end")),
        "each_lie_raises_an_alarm": {alarm["reason"] for alarm in alarms} >= ALARMS,
        "the_flood_is_stopped_in_the_switch": bool(find(events, "port.quarantined")),
    }


def check(options: Options) -> None:
    if "faucet" in options.only:
        raise UsageError(f"mac_spoof compares {', '.join(COMPARED)}; choose one of them with --only")


def _with_controller(run: Run, controller: str) -> tuple[list[Outcome], list[Event]]:
    """Its own testbed, in a folder of its own."""
    plan = _with_others(run.plan)
    part = Run(
        "mac_spoof", dataclasses.replace(run.options, plan=plan, controller=controller, out=run.folder / controller)
    )
    vm, outcomes = plan.vms[0], []
    with Testbed(part) as testbed, testbed.capture():
        testbed.vcenter.power_on(vm.name)
        _introduce(testbed, vm)
        _heal(testbed, vm)  # what the switch floods before it knows c1 is not stolen
        for attack in ATTACKS:
            began_ns = time.time_ns()
            outcome = _attack(testbed, vm, attack)
            outcomes.append((outcome, began_ns, time.time_ns()))
            _heal(testbed, vm)
    stolen = _stolen_ns(part.pcap, vm)
    counted = [
        dataclasses.replace(outcome, stolen=sum(began <= at <= ended for at in stolen))
        for outcome, began, ended in outcomes
    ]
    return counted, read_events(part.events_file)


def _with_others(plan: Plan) -> Plan:
    """c2 and mallory at the client's switch; the controller's plan knows neither, so they are nobody's uplink."""
    first = plan.clients[0]
    others = [
        Client(name, f"{first.interface.ip + number}/{first.interface.network.prefixlen}", f"{first.mac[:-2]}{mac}")
        for number, (name, mac) in enumerate(((SECOND, "a2"), (MALLORY, "ee")), start=1)
    ]
    return validate(dataclasses.replace(plan, clients=(*plan.clients, *others)))


def _attack(testbed: Testbed, vm: VM, attack: str) -> Outcome:
    with OneProbe(testbed, vm.name, "udp", attack, EchoResult) as probe:
        victim = testbed.run.plan.clients[0] if attack == "pose" else vm
        words = [KINDS.get(attack, attack), f"{MALLORY}-eth0", victim.mac, str(victim.interface.ip)]
        words += ["--seconds", str(_ATTACK_S), "--rate", str(ATTACKS[attack])]
        child = testbed.start_child(f"{attack}er", testbed.popen(MALLORY), "experiments.attacker", *words)
        if attack == "replay":
            _move(testbed, vm)  # so that there is something to be heard
        wait_until_up([child], READY, time.monotonic() + _WITHIN_S)
        if attack == "flood":
            _move(testbed, vm)
        child.wait(time.monotonic() + _WITHIN_S)
        seen = probe.stop()
    frames = int(child.said()[-1])
    answered = _answered(testbed, str(vm.interface.ip))
    return Outcome(testbed.run.options.controller, attack, frames, 0, seen.lost, seen.sent, _PINGS - answered)


def _move(testbed: Testbed, vm: VM) -> None:
    testbed.vcenter.migrate(vm.name, testbed.vcenter.elsewhere(vm.name))


def _introduce(testbed: Testbed, vm: VM) -> None:
    """c2 knows the VM's MAC, so that the VM's ARP reply does not tell the switch the truth in time."""
    at, device = str(vm.interface.ip), f"{SECOND}-eth0"
    words = ["ip", "neigh", "replace", at, "lladdr", vm.mac, "nud", "permanent", "dev", device]
    if testbed.popen(SECOND)(words).wait():
        raise TestbedError(f"{' '.join(words)} failed in {SECOND}")


def _answered(testbed: Testbed, ip: str) -> int:
    """Of the pings of c2, which has not talked to the VM before."""
    words = ["ping", "-c", str(_PINGS), "-i", "0.02", "-W", "1", ip]
    said, _ = testbed.popen(SECOND)(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).communicate()
    counted = re.search(r"(\d+) received", said.decode())
    if counted is None:
        raise TestbedError(f"ping in {SECOND}: {said.decode().strip()}")
    return int(counted[1])


def _heal(testbed: Testbed, vm: VM) -> None:
    """For the next one everybody knows where the VM and c1 are, and c2 has never talked to it."""
    here, plan = testbed.vcenter.places[vm.name], testbed.run.plan
    client = plan.clients[0]
    words = ("experiments.rarp_sender", f"{client.name}-eth0", client.mac, str(client.interface.ip))
    testbed.start_child("c1-speaks", testbed.popen(client.name), *words).wait(time.monotonic() + _WITHIN_S)
    if testbed.run.options.controller == "learning-switch":
        for side in ("dl_dst", "dl_src"):
            in_the_world("ovs-ofctl", "-O", "OpenFlow13", "del-flows", plan.switch, f"{side}={vm.mac}")
    send_rarp(Scene(testbed, vm.name, here, testbed.vcenter.elsewhere(vm.name)), here)
    time.sleep(_SETTLED_S)


def _stolen_ns(pcap: Path, vm: VM) -> list[int]:
    """When frames of clients for the VM, or its answers, came to mallory; in Unix time."""
    asked = f"eth.dst == {vm.mac} and (udp.dstport == {ECHO_PORT} or icmp.type == 8)"
    asked = f"({asked}) or (eth.src == {vm.mac} and udp.srcport == {ECHO_PORT})"
    return [epoch_ns(at) for (at,) in fields(pcap / f"{MALLORY}.pcapng", asked, "frame.time_epoch")]


def _show(outcomes: list[Outcome]) -> None:
    rows = [
        (
            f"{o.controller:15} {o.attack:6}",
            f"{o.frames:5} lies {o.stolen:4} stolen; lost c1 {o.lost:4}/{o.sent} c2 {o.unanswered:2}/{_PINGS}",
        )
        for o in outcomes
    ]
    report.figures("frames that mallory got; what c1 lost of its datagrams, c2 of its first pings", rows)


if __name__ == "__main__":
    script("mac_spoof", run, __doc__)
