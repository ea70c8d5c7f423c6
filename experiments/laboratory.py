"""What the bench measures with: migrations back and forth on a testbed of their own, iperf3 beside them.

    with laboratory(folder, link="10Gbit", ram="1GiB") as lab:
        mbps = lab.iperf3()                       TCP payload rate of the vMotion cable, now
        move = lab.move(Policy(mode="postcopy"))  one migration to the other host: its outcome and its timeline

Nothing else runs on the testbed: no client, no capture. One world holds one laboratory after the other.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.run import Options, Run
from experiments.testbed import Testbed
from experiments.timeline import Timeline, timeline
from experiments.world import run as run_program
from hosts.announce import SCHEDULE_MS
from hosts.availability import Availability
from hosts.policy import Policy
from hosts.source import Outcome
from hosts.transport import Transport
from topologies.errors import TestbedError
from topologies.events import read_events
from topologies.plan import DEFAULT_PLAN, VM, Plan, read_plan, validate
from topologies.units import format_bitrate, format_size, parse_bitrate, parse_percent, parse_rate, parse_size

_IPERF_S = 2
_ROOT = Path(__file__).parent.parent
_TIMING = (sys.executable, "-m", "experiments.storage_timing")
_RESTARTED_WITHIN_S = 30.0


class StorageTimes(NamedTuple):
    """Of a 4 KiB write: over NFS, where the NAS has its files, and the way there and back."""

    nfs: float
    local: float
    round_trip: float


@dataclass(frozen=True)
class Move:
    """One migration. Rates in Mbit/s."""

    outcome: Outcome
    timeline: Timeline

    def round_mbps(self, number: int) -> float:
        figures = self.outcome.rounds[number - 1]
        return figures.bytes * 8 / figures.ms / 1000

    def bound_ms(self, mbps: float) -> float:
        """How long at least the bytes that crossed take at this rate."""
        return self.outcome.bytes_on_wire * 8 / mbps / 1000


class Laboratory:
    """A running testbed with its VMs powered on."""

    def __init__(self, testbed: Testbed) -> None:
        self.testbed, self.plan = testbed, testbed.run.plan
        self.vm = self.plan.vms[0]

    @property
    def conditions(self) -> str:
        vm = self.vm
        size, writes = format_size(vm.ram), f"{vm.dirty_rate / 1e6:g} MB/s over {format_size(vm.working_set)}"
        return f"{size}, {vm.fill:.0%} filled, {writes}, {format_bitrate(self.plan.link)}"

    def move(self, policy: Policy | None = None, transport: Transport | None = None) -> Move:
        vcenter = self.testbed.vcenter
        result = vcenter.migrate(self.vm.name, vcenter.elsewhere(self.vm.name), policy, transport=transport)
        return Move(result.outcome, self.timeline(result.migration, self.vm))

    def timeline(self, migration: str, vm: VM) -> Timeline:
        return timeline(read_events(self.testbed.run.events_file), migration, vm.mac)

    def work(self) -> int:
        """Pages that the VM's workload has written."""
        status = self.testbed.vcenter.status()[self.testbed.vcenter.places[self.vm.name]]
        return int(status["vms"][self.vm.name]["work"])

    def storage_us(self) -> "StorageTimes":
        """Medians of a 4 KiB write, in microseconds (experiments/storage_timing.py), now."""
        first, nas = self.plan.hosts[0], self.testbed.nas
        if nas is None:
            raise TestbedError("there is no NAS on this testbed")
        ip = nas.plan.management
        server = self.testbed.popen(nas.plan.name)([*_TIMING, "serve", ip], cwd=_ROOT, stdout=subprocess.PIPE)
        try:
            server.stdout.readline()
            round_trips = self._timed(first.name, "ask", ip)
        finally:
            server.kill()
            server.communicate()
        local = json.loads(run_program(*_TIMING, "local", str(nas.folder)))
        over_nfs = self._timed(first.name, "nfs", self.testbed.where)
        return StorageTimes(*(statistics.median(times) for times in (over_nfs, local, round_trips)))

    def _timed(self, node: str, *words: str) -> list[float]:
        times: list[float] = json.loads(run_program("mnexec", "-a", str(self.testbed.net[node].pid), *_TIMING, *words))
        return times

    def power_cycle_s(self) -> float:
        """How long a power-on takes, from the order to a VM that runs."""
        vcenter = self.testbed.vcenter
        vcenter.power_off(self.vm.name)
        began = time.monotonic()
        vcenter.power_on(self.vm.name)
        return time.monotonic() - began

    def restart_after_death_s(self) -> float:
        """A host's power fails: how long until its VM runs on the other one."""
        testbed, vcenter, vm = self.testbed, self.testbed.vcenter, self.vm.name
        host = vcenter.places[vm]
        with Availability(vcenter):
            began = time.monotonic()
            testbed.kill_host(host)
            while vcenter.places[vm] == host:
                if time.monotonic() - began > _RESTARTED_WITHIN_S:
                    raise TestbedError(f"VM {vm} was not restarted within {_RESTARTED_WITHIN_S:g} s")
                time.sleep(0.01)
            took = time.monotonic() - began
        testbed.restart_agent(host)
        return took

    def iperf3(self) -> float:
        """TCP payload rate from the first host to the second over the vMotion cable, Mbit/s."""
        first, second = self.plan.hosts[:2]
        server = self.testbed.popen(second.name)(
            ["iperf3", "--server", "--one-off", "--bind", second.vmotion_port.ip, "--forceflush"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        try:
            while "listening" not in server.stdout.readline().decode():
                if server.poll() is not None:
                    raise TestbedError(f"iperf3 server ended with status {server.returncode}")
            client = ["iperf3", "--client", second.vmotion_port.ip, "--bind", first.vmotion_port.ip]
            pid = str(self.testbed.net[first.name].pid)
            report = json.loads(run_program("mnexec", "-a", pid, *client, "--time", str(_IPERF_S), "--json"))
        finally:
            server.kill()
            server.communicate()
        return float(report["end"]["sum_received"]["bits_per_second"]) / 1e6


@contextmanager
def laboratory(folder: Path, vms: int = 1, **settings: str) -> Iterator[Laboratory]:
    """`settings`: link, ram, fill, dirty_rate, working_set, each with its unit; the plan's where none is given."""
    plan = _plan(vms, settings)
    run = Run("bench", Options(plan, DEFAULT_PLAN, "rarp", SCHEDULE_MS, Policy(), 1, _new(folder)))
    with Testbed(run) as testbed:
        for vm in plan.vms:
            testbed.vcenter.power_on(vm.name)
        yield Laboratory(testbed)


_PARSERS: dict[str, Any] = {
    "ram": parse_size,
    "fill": parse_percent,
    "dirty_rate": parse_rate,
    "working_set": parse_size,
}


def _plan(vms: int, settings: dict[str, str]) -> Plan:
    plan = read_plan()
    changes = {name: parse(settings[name]) for name, parse in _PARSERS.items() if name in settings}
    first = dataclasses.replace(plan.vms[0], **changes)
    link = parse_bitrate(settings["link"]) if "link" in settings else plan.link
    return validate(dataclasses.replace(plan, link=link, vms=(first, *(_another(first, n) for n in range(2, vms + 1)))))


def _another(vm: VM, number: int) -> VM:
    address, prefix = vm.interface.ip + number - 1, vm.interface.network.prefixlen
    return dataclasses.replace(
        vm, name=f"vm{number}", ip=f"{address}/{prefix}", mac=f"{vm.mac[:-2]}{number:02x}", ip6=""
    )


def _new(folder: Path) -> Path:
    return folder / f"run{sum(1 for _ in folder.glob('run*')) + 1}"
