"""fabric_failover: in a leaf-spine fabric trunks, a spine and the controller fail, a VM moves; its client goes on.

         spine1      spine2          the frames for one MAC take one of the two ways, another MAC's may take the other
          |   \\      /   |
          |     \\  /     |
         leaf1 --/\\-- leaf2
         /   \\        /   \\
      esx1  esx3   esx2  esx4   c1   a numbered datagram a millisecond, all the time

    the trunk in use fails  the controller hears that a port is down, and sends by the other spine
    its spine is gone       all its trunks at once
    all is back             by LLDP; nothing loops meanwhile, and nothing is lost
    another controller      finds switches that have entries, and no trunk yet: it leaves them until it has; no loss
    a leaf loses it         the leaf goes on with its entries, and the others send to it as before; no loss
    a move across leaves    every switch's way to the VM changes; the new leaf is told first

What to look for in capture.pcapng: eth.type == 0x88cc, the switches telling each other who they are; udp.dstport == 7
on leaf1-spine1 and leaf1-spine2, which way the client's datagrams take.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from controller.discovery import LOST_AFTER_S
from experiments import report
from experiments.cli import script
from experiments.echo import EchoResult
from experiments.gaps import silences
from experiments.one_probe import OneProbe
from experiments.outages import Outage
from experiments.run import Options, Run
from experiments.sdn_view import ask
from experiments.testbed import Testbed
from experiments.verdict import Findings
from experiments.waiting import until
from experiments.world import run as in_the_world
from topologies.errors import UsageError
from topologies.events import find, read_events
from topologies.plan import VM, port_name

_QUIET_S = 0.5
_WITHIN_S = 10.0


@dataclass(frozen=True)
class Act:
    """What the client saw of one."""

    name: str
    longest_silence_ms: float
    lost: int
    duplicated: int
    answered_at_the_end: bool


def check(options: Options) -> None:
    plan = options.plan
    if len(plan.trunks) < 4 or plan.clients[0].switch == plan.host(plan.vms[0].host).switch:
        raise UsageError(f"{options.plan_file}: no two ways from the client's leaf to the VM's; omit --plan")


def run(run: Run) -> Findings:
    """One act after the other."""
    vm, acts = run.plan.vms[0], []
    with Testbed(run) as testbed, testbed.capture() as capture:
        testbed.vcenter.power_on(vm.name)
        with_trunks = _trunks(testbed)
        for name, play in _ACTS.items():
            with OneProbe(testbed, vm.name, "udp", name.replace(" ", "-"), EchoResult) as probe:
                time.sleep(_QUIET_S)
                play(testbed, vm)
                time.sleep(_QUIET_S)
                seen = probe.stop()
            acts.append(_act(name, seen))
            report.say(_line(acts[-1]))
        all_back = _trunks(testbed) == with_trunks
    capture.merge(run.folder / "capture.pcapng")
    moves = find(read_events(run.events_file), "mac.moved", mac=vm.mac)
    lost = {act.name: act.lost for act in acts}
    checks = {
        "answered_after_each": all(act.answered_at_the_end for act in acts),
        "nothing_came_twice": not any(act.duplicated for act in acts),
        "nothing_lost_when_trunks_come_back": lost["all is back"] == 0,
        "nothing_lost_without_a_controller": lost["another controller"] == lost["a leaf loses it"] == 0,
        "one_move_was_seen": len(moves) == 1 and moves[0]["switch"] != moves[0]["from_switch"],
        "all_trunks_are_back": all_back,
    }
    return Findings(checks, {"fabric_failover": [asdict(act) for act in acts]})


def _act(name: str, seen: EchoResult) -> Act:
    silence = max(silence.length_ms for silence in silences(seen.arrived_ns, seen.stopped_ns))
    late = any(at > seen.stopped_ns - _QUIET_S * 1e9 / 2 for at in seen.arrived_ns)
    return Act(name, silence, seen.lost, seen.duplicated, late)


# ---------------------------------------------------------------- the acts


def _move_across(testbed: Testbed, vm: VM) -> None:
    """To a host at another leaf."""
    plan, here = testbed.run.plan, testbed.vcenter.places[vm.name]
    there = next(host.name for host in plan.hosts if host.switch != plan.host(here).switch)
    testbed.vcenter.migrate(vm.name, there)


def _cut_the_way(testbed: Testbed, vm: VM) -> None:
    spine = _spine_in_use(testbed, vm)
    _set(testbed, _leaf_of(testbed, vm), spine, "down")


def _stop_the_spine(testbed: Testbed, vm: VM) -> None:
    """The other one is left, so the trunk that has failed has to come back before."""
    _restore(testbed)
    spine = _spine_in_use(testbed, vm)
    for trunk in (trunk for trunk in testbed.run.plan.trunks if spine in trunk):
        leaf = trunk[0] if trunk[1] == spine else trunk[1]
        _set(testbed, leaf, spine, "down")


def _restore(testbed: Testbed, _vm: VM | None = None) -> None:
    plan = testbed.run.plan
    for one, other in plan.trunks:
        _set(testbed, one, other, "up")
    until(lambda: len(_trunks(testbed)) == len(plan.trunks), "all trunks are back", _WITHIN_S)


def _change_controllers(testbed: Testbed, _vm: VM) -> None:
    trunks = len(_trunks(testbed))
    with Outage(testbed):
        time.sleep(_QUIET_S)
    until(lambda: len(_trunks(testbed)) == trunks, "all trunks are found", _WITHIN_S)


def _cut_off_a_leaf(testbed: Testbed, _vm: VM) -> None:
    with Outage(testbed, testbed.run.plan.clients[0].switch):
        time.sleep(2 * LOST_AFTER_S)


_ACTS: dict[str, Callable[[Testbed, VM], None]] = {
    "the trunk in use fails": _cut_the_way,
    "its spine is gone": _stop_the_spine,
    "all is back": _restore,
    "another controller": _change_controllers,
    "a leaf loses it": _cut_off_a_leaf,
    "a move across leaves": _move_across,
}


def _leaf_of(testbed: Testbed, vm: VM) -> str:
    return testbed.run.plan.host(testbed.vcenter.places[vm.name]).switch


def _spine_in_use(testbed: Testbed, vm: VM) -> str:
    """By which spine the client's frames come to the VM: as the entry of the client's leaf says."""
    leaf = testbed.run.plan.clients[0].switch
    ports = {port["port"]: port["node"] for port in ask(testbed.run.folder, "network")["switches"][leaf]}
    flows = ask(testbed.run.folder, "flows")[leaf]
    (number,) = next(flow["output"] for flow in flows if flow["match"].get("eth_dst") == vm.mac)
    spine: str = ports[number]
    return spine


def _set(testbed: Testbed, one: str, other: str, state: str) -> None:
    in_the_world("ip", "link", "set", port_name(one, other), state)


def _trunks(testbed: Testbed) -> list[object]:
    found: list[object] = ask(testbed.run.folder, "network")["trunks"]
    return found


def _line(act: Act) -> str:
    return f"{act.name:23} longest silence {act.longest_silence_ms:6.1f} ms, {act.lost} lost, {act.duplicated} twice"


if __name__ == "__main__":
    script("fabric_failover", run, __doc__)
