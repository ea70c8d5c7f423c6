"""faults: at every state of a migration something breaks, and every time the end is the one that was promised.

        esx1 ======X====== esx2        agents, guests, the cable, the datastore, the stream, the announcement:
       [vm1]  --->  ?                  killed, cut, frozen, hidden, changed, lost - at the worst moment
         ?    <---  ?

For each case (experiments/fault_cases.py) a client uses the VM all the time. Afterwards these are checked:

    end            it is one of those that the table has for the case
    one_vm         exactly one process runs the VM, on one host (none after a cold end)
    ledger         every acknowledged transaction is there exactly once; over one connection unless the end is cold
    noticed        the hosts say what went wrong, where that is not plain from the end
    nothing_stray  no other guest process, no other port of the VM, no migration left at an agent
    full_speed     the VM's workload writes as fast as it should
    retry          after that the VM moves to the other host, and its RAM has equal digests

    sudo ./vmotion run faults                           84 cases, about six minutes
    sudo ./vmotion run faults --long                    all 196
    sudo ./vmotion run faults --list
    sudo ./vmotion run faults --only cut@source:suspended --only '*@destination:claimed'
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from experiments import injuries, report
from experiments.clerk import Clerk
from experiments.cli import script
from experiments.fault_cases import WAYS, Case, End, all_cases, short_cases
from experiments.injuries import Heal, Scene
from experiments.run import Options, Run
from experiments.testbed import Testbed, guest_pids
from experiments.verdict import Findings, ledger_checks
from experiments.waiting import until
from hosts.ram import PAGE
from hosts.tasks import Task
from topologies.errors import TestbedError, UsageError
from topologies.events import find, read_events

# A peer that is silent for so long is gone: short, for each frozen one costs us this time
PEER_TIMEOUT_S = 1.5
_REACHED_WITHIN_S = 20.0
_OVER_WITHIN_S = 60.0
_SPEED_FOR_S = 0.3
_AT_LEAST_SPEED = 0.5  # of the dirty rate; the machine is busy with more than this VM


@dataclass(frozen=True)
class Verdict:
    """How a case ended. `checks` as in the module's docstring."""

    name: str
    expected: str
    end: str
    checks: dict[str, bool]
    said: str
    seconds: float

    @property
    def passed(self) -> bool:
        return all(self.checks.values())


def run(run: Run) -> Findings:
    """Every case on one testbed, one after the other: each has to leave it as it was."""
    cases = chosen(run.options.only, run.options.long)
    run.options = replace(run.options, peer_timeout_s=PEER_TIMEOUT_S)
    verdicts = []
    with Testbed(run) as testbed:
        vm = run.plan.vms[0].name
        testbed.vcenter.power_on(vm)
        for number, case in enumerate(cases, 1):
            verdict = play(testbed, vm, case)
            verdicts.append(verdict)
            mark = "ok  " if verdict.passed else "FAIL"
            report.say(f"{number:3}/{len(cases)}  {mark}  {verdict.seconds:5.1f} s  {verdict.end:11}  {verdict.name}")
            if not verdict.passed:
                report.say(
                    f"         not: {[name for name, held in verdict.checks.items() if not held]}; {verdict.said}"
                )
    return findings(verdicts)


def check(options: Options) -> None:
    """UsageError if there is no such case."""
    chosen(options.only, options.long)


def chosen(only: tuple[str, ...], long: bool) -> list[Case]:
    """The cases by their names, which may have * and ? for anything (fnmatch); UsageError if there is none."""
    if not only:
        return all_cases() if long else short_cases()
    found = []
    for name in only:
        like = [case for case in all_cases() if fnmatchcase(case.name, name)]
        if not like:
            raise UsageError(f"there is no case {name!r}; --list names them")
        found += [case for case in like if case not in found]
    return found


def names() -> list[str]:
    return [case.name for case in all_cases()]


def findings(verdicts: list[Verdict]) -> Findings:
    checks: dict[str, bool] = {}
    for verdict in verdicts:
        for name, held in verdict.checks.items():
            checks[name] = checks.get(name, True) and held
    counts = {"cases": len(verdicts), "passed": sum(verdict.passed for verdict in verdicts)}
    ends = dict(Counter(verdict.end for verdict in verdicts))
    return Findings(
        checks | {"all_cases_passed": counts["passed"] == counts["cases"] > 0},
        {"faults": counts | {"ends": ends, "table": [asdict(verdict) for verdict in verdicts]}},
    )


# ---------------------------------------------------------------- one case


def play(testbed: Testbed, vm: str, case: Case) -> Verdict:
    """A migration, an injury, its healing; then the checks. The VM runs on one of the hosts again afterwards."""
    began = time.monotonic()
    vcenter = testbed.vcenter
    scene = Scene(testbed, vm, vcenter.places[vm], vcenter.elsewhere(vm))
    with Clerk(testbed, vm, case.name) as clerk:
        task = _migrate_with(scene, case)
        until(lambda: not _migrations(testbed), "no agent is at a migration", _OVER_WITHIN_S)
        end = _end(scene)
        checks = {"end": end in case.ends, "one_vm": _one_vm(scene, end), "nothing_stray": _nothing_stray(scene, end)}
        checks["noticed"] = case.says in _reasons(scene, task)
        if end is End.COLD:
            vcenter.power_on(vm)
        seen = clerk.audit()
        checks["ledger"] = all(ledger_checks(seen).values()) and (seen.connection_survived or end is End.COLD)
    checks["full_speed"] = _full_speed(scene)
    retry = vcenter.migrate(vm, vcenter.elsewhere(vm)).outcome
    checks["retry"] = retry.digests_equal and retry.stale_pages == 0
    expected = "".join(sorted(one.value for one in case.ends))
    return Verdict(case.name, expected, end.name.lower(), checks, _said(task), time.monotonic() - began)


def _migrate_with(scene: Scene, case: Case) -> Task[Any]:
    """The migration, broken and healed; returns when it has ended, however that was."""
    vcenter, at = scene.testbed.vcenter, case.at
    heals: list[Heal] = []
    try:
        if case.after:
            before = len(_events(scene, case.after))
            _start(scene, case)
            _await_event(scene, case.after, before, f"{case.name}: {case.after}")
            heals.append(_injure(scene, case))
        elif not at:
            heals.append(_injure(scene, case))
            _start(scene, case)
        else:
            host = scene.source if case.at_source else scene.target
            heals += _stop_at(scene, case, host)
            heals.insert(0 if case.injury == "datastore-away-for-a-while" else len(heals), _injure(scene, case))
            if case.injury != f"kill-{'source' if host == scene.source else 'target'}-agent":
                vcenter.go_on(host)
        task = vcenter.tasks[scene.vm]
        _let_it_work(task, case)
    finally:
        for heal in heals:
            heal()
    if not task.over.wait(_OVER_WITHIN_S):
        raise TestbedError(f"{case.name}: the migration has not come to an end")
    return task


def _stop_at(scene: Scene, case: Case, host: str) -> list[Heal]:
    """A migration that has stopped at the case's state."""
    vcenter, reached = scene.testbed.vcenter, len(_events(scene, "breakpoint.reached"))
    vcenter.breakpoint(host, case.at)
    if not case.unsure:
        _start(scene, case)
        _await_event(scene, "breakpoint.reached", reached, f"{case.name} has come to {case.at}")
        return []
    # a source becomes unsure if its destination, about to claim, says nothing
    vcenter.breakpoint(scene.target, "destination:rebuilding" if case.way == "postcopy" else "destination:restoring")
    _start(scene, case)
    _await_event(scene, "breakpoint.reached", reached, f"{case.name}: the destination is restoring")
    thaw = injuries.freeze_agent(scene, scene.target)
    _await_event(scene, "breakpoint.reached", reached + 1, f"{case.name} has come to {case.at}")

    def go_on() -> None:
        thaw()
        vcenter.go_on(scene.target)
        until(lambda: not _migrations(scene.testbed, scene.target), "the destination has ended", _REACHED_WITHIN_S)

    return [go_on]


def _start(scene: Scene, case: Case) -> None:
    policy, transport = WAYS[case.way]
    scene.testbed.vcenter.start_migration(scene.vm, scene.target, policy, transport=transport)


def _let_it_work(task: Task[Any], case: Case) -> None:
    """Until what was injured can be healed: most migrations end by themselves."""
    if case.injury == "freeze-peer":
        time.sleep(3 * PEER_TIMEOUT_S)  # a send that was taken in part is given its time once more
    elif case.injury in ("datastore-unreachable", "datastore-away-for-a-while"):
        time.sleep(2 * PEER_TIMEOUT_S)  # each has lost the other by then
    elif not case.unsure:
        task.over.wait(_OVER_WITHIN_S)


def _injure(scene: Scene, case: Case) -> Heal:
    source, target = scene.source, scene.target
    peer = target if case.at_source else source
    injure: dict[str, Callable[[], Heal]] = {
        "kill-source-agent": lambda: injuries.kill_agent(scene, source),
        "kill-target-agent": lambda: injuries.kill_agent(scene, target),
        "kill-source-guest": lambda: injuries.kill_guest(injuries.guest_of(scene, source)),
        "kill-target-guest": lambda: injuries.kill_guest(injuries.guest_of(scene, target)),
        "cut": lambda: injuries.cut(scene, source, target),
        "cut-to-destination": lambda: injuries.cut(scene, source),
        "cut-to-source": lambda: injuries.cut(scene, target),
        "freeze-peer": lambda: injuries.freeze_agent(scene, peer),
        "destination-out-of-memory": lambda: injuries.take_memory(scene, target),
        "datastore-unreachable": lambda: injuries.hide_datastore(scene),
        "datastore-away-for-a-while": lambda: _source_ends_first(scene, injuries.hide_datastore(scene)),
        "corrupt-byte": lambda: injuries.corrupt(scene),
        "rarp-lost": lambda: injuries.lose_rarp(scene),
        "rarp-duplicated": lambda: injuries.send_rarp(scene, target),
        "rarp-early": lambda: injuries.send_rarp(scene, target),
    }
    return injure[case.injury]()


def _source_ends_first(scene: Scene, heal: Heal) -> Heal:
    resumed = len(_events(scene, "vm.resumed_at_source"))

    def healed() -> None:
        heal()
        _await_event(scene, "vm.resumed_at_source", resumed, "the source has asked the datastore")

    return healed


# ---------------------------------------------------------------- the checks


def _end(scene: Scene) -> End:
    """Where the VM is by now, as the datastore and the agents say."""
    vcenter = scene.testbed.vcenter
    vcenter.find(scene.vm)
    host = vcenter.places.get(scene.vm)
    status = vcenter.status_of(host) if host else None
    if status is None or status["vms"].get(scene.vm, {}).get("state") != "running":
        return End.COLD
    return End.SOURCE if host == scene.source else End.DESTINATION


def _one_vm(scene: Scene, end: End) -> bool:
    """By the agents' words and by the processes themselves."""
    vms = {host: status["vms"].get(scene.vm) for host, status in scene.testbed.vcenter.status().items()}
    running = [vm["pid"] for vm in vms.values() if vm and vm["state"] == "running"]
    return len(running) == (end is not End.COLD) and guest_pids() == set(running)


def _nothing_stray(scene: Scene, end: End) -> bool:
    place = {End.SOURCE: scene.source, End.DESTINATION: scene.target}.get(end)
    ports = [host for host in (scene.source, scene.target) if injuries.has_port(scene, host)]
    return ports == ([place] if place else []) and not _migrations(scene.testbed)


def _full_speed(scene: Scene) -> bool:
    vcenter, host = scene.testbed.vcenter, scene.testbed.vcenter.places[scene.vm]

    def work() -> tuple[int, float]:
        return vcenter.status()[host]["vms"][scene.vm]["work"], time.monotonic()

    before, began = work()
    time.sleep(_SPEED_FOR_S)
    after, ended = work()
    due = scene.testbed.run.plan.vm(scene.vm).dirty_rate / PAGE * (ended - began)
    return after - before >= due * _AT_LEAST_SPEED


def _migrations(testbed: Testbed, *hosts: str) -> list[str]:
    """Under way at these hosts, or at any, as far as their agents answer."""
    said = [testbed.vcenter.status_of(host) for host in hosts or [host.name for host in testbed.run.plan.hosts]]
    return [migration for status in said if status for migration in status["migrations"]]


def _said(task: Task[Any]) -> str:
    try:
        task.wait()
    except TestbedError as error:
        return str(error)
    return "moved"


def _reasons(scene: Scene, task: Task[Any]) -> str:
    """What the migration and the hosts say."""
    migration = _events(scene, "migration.ordered")[-1]["migration"]
    events = read_events(scene.testbed.run.events_file)
    reasons = [str(e["reason"]) for e in events if e.get("migration") == migration and "reason" in e]
    return "\n".join([_said(task), *reasons])


def _events(scene: Scene, kind: str) -> list[Any]:
    return find(read_events(scene.testbed.run.events_file), kind)


def _await_event(scene: Scene, kind: str, count: int, what: str) -> None:
    """Until there are more of them than `count`."""
    until(lambda: len(_events(scene, kind)) > count, what, _REACHED_WITHIN_S)


if __name__ == "__main__":
    script("faults", run, __doc__)
