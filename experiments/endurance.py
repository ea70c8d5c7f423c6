"""endurance: a VM goes back and forth two hundred times under load, and nothing wears out.

         c1  ping, UDP, transactions, bulk TCP: the same two TCP connections from the first move to the last
          |
        esx1 ======= esx2
       [vm1]  <--->

What would wear out, measured after a few moves and again at the end, each on the host where the VM is then:

    memory, file descriptors and threads of both agents; of the guest's process and of the controller
    guest RAM that the agents have mapped: of a VM that has left nothing may stay
    TCP sockets of the VM, and their send and receive buffers (the buffers that a move puts back must not grow)
    guest processes

    sudo ./vmotion run endurance                        about three minutes
    sudo ./vmotion run endurance --migrations 20
"""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments import report
from experiments.cli import script
from experiments.probes import Probes
from experiments.run import Options, Run
from experiments.testbed import Testbed, guest_pids
from experiments.timeline import timeline
from experiments.verdict import Findings, ledger_checks
from experiments.world import run as run_program
from hosts.agent import memory_bytes
from topologies.errors import UsageError
from topologies.events import read_events
from topologies.units import format_size

_WARM_UP = 6
# The interpreter's own arenas come and go by a few MiB; two hundred times a leak of a page table is more than that
_SLACK_BYTES = 6 * 2**20
_SLACK_DESCRIPTORS = 2  # a connection that is being made or ended
# A transaction every so often: the ledger has room for all of them, so that each can be audited at the end
_INTERVAL_MS = 5.0


@dataclass(frozen=True)
class Holdings:
    """What the testbed holds at a moment.

    Buffers are the largest of the VM's connections. The kernel tunes them up to limits of its own (tcp_wmem, tcp_rmem);
    restoring a connection forces them beyond, so one that was not put back shows as more than the limit.
    """

    memory_bytes: dict[str, int]
    descriptors: dict[str, int]
    threads: dict[str, int]
    processes: int
    mapped_rams: int
    vm_sockets: int
    send_buffer: int
    receive_buffer: int
    send_limit: int
    receive_limit: int


def check(options: Options) -> None:
    """UsageError if nothing would be measured."""
    if options.migrations <= _WARM_UP:
        raise UsageError(
            f"--migrations {options.migrations}: the first {_WARM_UP} warm up; take at least {_WARM_UP + 1}"
        )


def run(run: Run) -> Findings:
    """Warm up, look, migrate, look again."""
    plan, vm = run.plan, run.plan.vms[0]
    downtimes, equal = [], True
    with Testbed(run) as testbed:
        testbed.vcenter.power_on(vm.name)
        probes = Probes(
            testbed.popen(plan.clients[0].name),
            str(vm.interface.ip),
            run.folder / "probes",
            run.options.seed,
            interval_ms=_INTERVAL_MS,
        )
        with probes:
            before = None
            for number in range(1, run.options.migrations + 1):
                there = testbed.vcenter.elsewhere(vm.name)
                result = testbed.vcenter.migrate(vm.name, there, run.options.policy, transport=run.options.transport)
                outcome = result.outcome
                equal = equal and outcome.digests_equal and not outcome.stale_pages
                downtimes.append(timeline(read_events(run.events_file), result.migration, vm.mac).downtime_ms)
                if number == _WARM_UP:
                    before = holdings(testbed, vm.name)
                if number % 10 == 0 or number == run.options.migrations:
                    report.say(f"{number} moves, downtime {statistics.median(downtimes):.1f} ms (median so far)")
            time.sleep(1)
            after = holdings(testbed, vm.name)
            resets = _resets(testbed, plan.clients[0].name)
            seen = probes.stop()
    transactions = seen.transactions
    checks = (
        grown(before or after, after)
        | ledger_checks(transactions)
        | {
            "ram_digests_equal": equal,
            "connections_survived": transactions.connection_survived and seen.bulk.connection_survived,
            "no_reset": resets == 0,
        }
    )
    ordered = sorted(downtimes)
    report.figures("endurance: what the testbed held", _rows(before or after, after))
    return Findings(
        checks,
        {
            "endurance": {
                "migrations": len(downtimes),
                "downtime_ms": {"median": statistics.median(ordered), "worst": ordered[-1]},
                "transactions": transactions.acked,
                "bulk_bytes_verified": seen.bulk.verified_bytes,
                "resets": resets,
                "before": before and asdict(before),
                "after": asdict(after),
            }
        },
    )


def grown(before: Holdings, after: Holdings) -> dict[str, bool]:
    """Named checks: nothing has become more than it was."""
    memory = all(after.memory_bytes[name] <= size + _SLACK_BYTES for name, size in before.memory_bytes.items())
    descriptors = all(after.descriptors[name] <= n + _SLACK_DESCRIPTORS for name, n in before.descriptors.items())
    return {
        "memory_did_not_grow": memory,
        "descriptors_did_not_grow": descriptors,
        "threads_did_not_grow": all(after.threads[name] <= n + 2 for name, n in before.threads.items()),
        "processes_did_not_grow": after.processes <= before.processes,
        "guest_ram_did_not_stay": after.mapped_rams <= before.mapped_rams,
        "sockets_did_not_grow": after.vm_sockets <= before.vm_sockets,
        "buffers_did_not_grow": after.send_buffer <= after.send_limit and after.receive_buffer <= after.receive_limit,
    }


def _rows(before: Holdings, after: Holdings) -> report.Rows:
    """What there was after the first moves, and at the end."""

    def each(name: str, show: Callable[[int], str] = str) -> str:
        was, now = getattr(before, name), getattr(after, name)
        return ", ".join(f"{part} {show(was[part])} -> {show(now[part])}" for part in was)

    def one(name: str) -> str:
        return f"{getattr(before, name)} -> {getattr(after, name)}"

    return [
        ("memory", each("memory_bytes", format_size)),
        ("descriptors", each("descriptors")),
        ("threads", each("threads")),
        ("guest processes", one("processes")),
        ("guest RAM mapped", one("mapped_rams")),
        ("sockets of the VM", one("vm_sockets")),
        ("send buffer", f"{one('send_buffer')} bytes, limit {after.send_limit}"),
        ("receive buffer", f"{one('receive_buffer')} bytes, limit {after.receive_limit}"),
    ]


# ---------------------------------------------------------------- looking


def holdings(testbed: Testbed, vm: str) -> Holdings:
    """At rest: what is being taken apart after a move has to be gone first."""
    time.sleep(1.5)
    host = testbed.vcenter.places[vm]
    guest = int(testbed.vcenter.status()[host]["vms"][vm]["pid"])
    pids = {name: child.process.pid for name, child in testbed.children.items() if child.process.poll() is None}
    pids["guest"] = guest
    inside = ("nsenter", f"--net=/proc/{guest}/ns/net")
    sockets = run_program(*inside, "ss", "-tmnH", "state", "established")
    limits = run_program(*inside, "sysctl", "-n", "net.ipv4.tcp_wmem", "net.ipv4.tcp_rmem").split()
    return Holdings(
        memory_bytes={name: memory_bytes(pid) for name, pid in pids.items()},
        descriptors={name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in pids.items()},
        threads={name: len(list(Path(f"/proc/{pid}/task").iterdir())) for name, pid in pids.items()},
        processes=len(guest_pids()),
        mapped_rams=sum(Path(f"/proc/{pid}/maps").read_text().count("/memfd:") for pid in pids.values()),
        vm_sockets=sockets.count("skmem:"),
        send_buffer=max(map(int, re.findall(r"\btb(\d+)", sockets)), default=0),
        receive_buffer=max(map(int, re.findall(r"\brb(\d+)", sockets)), default=0),
        send_limit=int(limits[2]),
        receive_limit=int(limits[5]),
    )


def _resets(testbed: Testbed, client: str) -> int:
    """Established connections of the client that a RST has ended (Tcp EstabResets, RFC 4022)."""
    text = run_program("mnexec", "-a", str(testbed.net[client].pid), "cat", "/proc/net/snmp")
    names, values = (line.split()[1:] for line in text.splitlines() if line.startswith("Tcp:"))
    tcp: dict[str, Any] = dict(zip(names, values, strict=True))
    return int(tcp["EstabResets"])


if __name__ == "__main__":
    script("endurance", run, __doc__)
