"""controller_failure: the SDN controller dies, or a switch loses it, while VMs move; the network goes on and is healed.

              c1  a numbered datagram a millisecond, all the time
              |
         s1 (OVS) --x-- controller          kill -9, and another one later; or s1 asks in vain for a while
        /        \\
     esx1 ======= esx2
     [vm1] <---->

    nothing moves           the controller dies: no frame is lost, for a switch forwards by its own entries
    killed in the rounds    the VM moves, and nobody hears its RARP: it is found as soon as a controller is back
    switch loses it         the same, with the controller alive and the switch cut off from it
    two quick moves         there and back again at once

After each of them, once the controller is back, the entries of the switch are dumped and have to say what the
controller knows, no more and no less, and the VM is where the switch sends its frames.

What to look for in capture.pcapng: openflow_v4.type == 19, the dump by which a new controller learns what the switch
knows; arp.src.proto_ipv4 == 0.0.0.0, its question to the VMs where they are; then the flow-mods of the move.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from experiments import report
from experiments.cli import script
from experiments.echo import EchoResult
from experiments.gaps import silences
from experiments.one_probe import OneProbe
from experiments.outages import Outage
from experiments.run import Run
from experiments.sdn_view import ask
from experiments.testbed import Testbed
from experiments.verdict import Findings
from experiments.waiting import until
from experiments.world import run as in_the_world
from topologies.events import find, read_events
from topologies.plan import VM

_QUIET_S, _AWAY_S = 0.5, 1.5
_WITHIN_S = 15.0


@dataclass(frozen=True)
class Act:
    """`healed_ms`: from the moment when there is a controller again to an answer of the VM; 0 if it was never gone.

    In it is how long the switch takes to ask again: it tries once a second.
    """

    name: str
    longest_silence_ms: float
    lost: int
    healed_ms: float
    entries_as_they_have_to_be: bool


def run(run: Run) -> Findings:
    """One act after the other."""
    vm = run.plan.vms[0]
    acts: list[Act] = []
    with Testbed(run) as testbed, testbed.capture() as capture:
        testbed.vcenter.power_on(vm.name)
        for name, play in _ACTS.items():
            acts.append(_act(testbed, vm, name, play))
            report.say(_line(acts[-1]))
        report.say(
            "A VM that moves while nobody hears it is away until then; a switch asks for a controller once a second"
        )
    capture.merge(run.folder / "capture.pcapng")
    moves, orders = (find(read_events(run.events_file), kind) for kind in ("mac.moved", "migration.end"))
    checks = {act.name.replace(" ", "_") + "_entries": act.entries_as_they_have_to_be for act in acts}
    checks |= {
        "forwarding_goes_on": acts[0].lost == 0,
        "found_again_after_each": all(act.healed_ms < _WITHIN_S * 1000 for act in acts),
        "each_move_is_followed": len([m for m in moves if m["mac"] == vm.mac]) == len(orders),
    }
    return Findings(checks, {"controller_failure": [asdict(act) for act in acts]})


def _act(testbed: Testbed, vm: VM, name: str, play: Callable[[Testbed, VM], int]) -> Act:
    with OneProbe(testbed, vm.name, "udp", name.replace(" ", "-"), EchoResult) as probe:
        time.sleep(_QUIET_S)
        back_ns = play(testbed, vm)
        until(lambda: _is_consistent(testbed), f"{name}: the switch's entries say what the controller knows", _WITHIN_S)
        time.sleep(_QUIET_S)
        seen = probe.stop()
    silence = max(silence.length_ms for silence in silences(seen.arrived_ns, seen.stopped_ns))
    answered_ns = next((at for at in seen.arrived_ns if at >= back_ns), None)
    healed_ms = float("inf") if answered_ns is None else (answered_ns - back_ns) / 1e6 if back_ns else 0.0
    return Act(name, silence, seen.lost, healed_ms, _is_consistent(testbed))


# ---------------------------------------------------------------- the acts: each returns when the controller was back


def _nothing_moves(testbed: Testbed, vm: VM) -> int:
    with Outage(testbed):
        time.sleep(_AWAY_S)
    return 0  # nobody has missed it


def _killed_in_the_rounds(testbed: Testbed, vm: VM) -> int:
    begun = len(find(read_events(testbed.run.events_file), "round.begin"))
    task = testbed.vcenter.start_migration(vm.name, testbed.vcenter.elsewhere(vm.name))
    until(lambda: len(find(read_events(testbed.run.events_file), "round.begin")) > begun, "the rounds begin", _WITHIN_S)
    with Outage(testbed) as outage:
        task.wait()
        time.sleep(_AWAY_S)
    return outage.back_ns


def _switch_loses_it(testbed: Testbed, vm: VM) -> int:
    with Outage(testbed, testbed.run.plan.switch) as outage:
        testbed.vcenter.migrate(vm.name, testbed.vcenter.elsewhere(vm.name))
        time.sleep(_AWAY_S)
    return outage.back_ns


def _two_quick_moves(testbed: Testbed, vm: VM) -> int:
    for _ in range(2):
        testbed.vcenter.migrate(vm.name, testbed.vcenter.elsewhere(vm.name))
    return 0


_ACTS: dict[str, Callable[[Testbed, VM], int]] = {
    "nothing moves": _nothing_moves,
    "killed in the rounds": _killed_in_the_rounds,
    "switch loses it": _switch_loses_it,
    "two quick moves": _two_quick_moves,
}


# ---------------------------------------------------------------- what the switch's entries have to say


def _is_consistent(testbed: Testbed) -> bool:
    """No location without its entries, no entry without its location; every VM at its host's port."""
    vcenter, plan = testbed.vcenter, testbed.run.plan
    known = {place["mac"]: place for place in ask(testbed.run.folder, "locations")}
    at = {plan.vm(vm).mac: host for vm, host in vcenter.places.items()}
    if any(known.get(mac, {"node": ""})["node"] != host for mac, host in at.items()):
        return False
    expected = {f"dl_dst={mac} actions=output:{place['port']}" for mac, place in known.items()}
    expected |= {f"in_port={place['port']},dl_src={mac} actions=goto_table:3" for mac, place in known.items()}
    lines = in_the_world("ovs-ofctl", "-O", "OpenFlow13", "--no-names", "dump-flows", plan.switch).splitlines()
    told = {line.split("priority=100,", 1)[1] for line in lines if "priority=100," in line}
    return {entry for entry in told if "CONTROLLER" not in entry} == expected


def _line(act: Act) -> str:
    healed = f", healed {act.healed_ms:.0f} ms after the controller was back" if act.healed_ms else ""
    return f"{act.name:20}  longest silence {act.longest_silence_ms:7.1f} ms, {act.lost} datagrams lost{healed}"


if __name__ == "__main__":
    script("controller_failure", run, __doc__)
