"""shared_storage: a VM is a folder of files on a NAS; any host can run it from them, and only one at a time.

                 c1  transactions, over as many connections as it takes
                  |
       esx1      s1      esx2
      [vm1] -----------> [vm1]          power on, migrate, power off; unregister, register elsewhere, power on again
         \\              /
          nas  /datastore1/vm1/         vm1.vmx  vm1.vmdk  vm1-flat.vmdk  vm1.nvram  .lck-vm1.<generation>  vmware.log

What to look for in pcap/nas.pcapng:

    nfs.procedure_v3 == 15     LINK: a host takes a generation
    nfs.procedure_v3 == 2      SETATTR: the fence, the disk is given to the generation's user; or a new file's size
    nfs.procedure_v3 == 7      WRITE: the journal's group commits, and the owner's pulse
    nfs.status != 0            what the server has refused
"""

from collections import Counter
from pathlib import Path

from experiments import report
from experiments.capture import fields
from experiments.clerk import Clerk
from experiments.cli import script
from experiments.run import Run
from experiments.tenures import overlap_ms, tenures
from experiments.testbed import Testbed
from experiments.verdict import Findings, ledger_checks
from hosts.control import ControlError
from topologies.events import read_events

_PATIENCE_S = 1.0
_PROCEDURES = {"7": "WRITE", "15": "LINK", "2": "SETATTR", "6": "READ"}  # RFC 1813, 3.3


def run(run: Run) -> Findings:
    """The life of a VM on two hosts."""
    vm = run.plan.vms[0].name
    first, second = (host.name for host in run.plan.hosts[:2])
    with Testbed(run) as testbed, testbed.capture() as capture:
        vcenter = testbed.vcenter
        report.say(f"{vm} is created on {testbed.where} and powered on, on {first}")
        vcenter.power_on(vm, first)
        with Clerk(testbed, vm, "clerk", _PATIENCE_S) as clerk:
            report.say(f"a second power-on, on {second}, is refused:")
            refusal = _refusal(testbed, vm, second)
            report.say(f"  {refusal}")
            vcenter.migrate(vm, second)
            report.say(f"{vm} has moved to {second}: nothing was replayed from its disk")
            files_running = listing(testbed.datastore / vm)
            vcenter.power_off(vm)
            files_off = listing(testbed.datastore / vm)
            report.say(f"powered off on {second}, unregistered; its files:")
            for line in files_off:
                report.say(f"  {line}")
            vcenter.unregister(vm)
            vcenter.register(vm, first)
            booted = vcenter.power_on(vm)
            report.say(f"registered and powered on, on {first}: {booted['entries']} transactions are on its disk")
            seen = clerk.audit()
    capture.merge(run.folder / "capture.pcapng")
    events = read_events(run.events_file)
    overlap = overlap_ms(tenures(events, vm))
    calls = _calls(run.pcap / f"{testbed.nas.plan.name}.pcapng") if testbed.nas else {}
    report.say("NFS calls: " + ", ".join(f"{count} {name}" for name, count in calls.items()))
    checks = ledger_checks(seen) | {
        "second_power_on_refused": "is running on" in refusal and first in refusal,
        "swap_file_while_it_runs": any(".vswp" in line for line in files_running),
        "no_swap_file_when_off": not any(".vswp" in line for line in files_off),
        "nothing_replayed_after_an_orderly_end": booted["replayed"] == 0 and booted["entries"] > 0,
        "never_on_two_hosts": overlap == 0,
        "nfs_in_the_captures": not testbed.nas or (calls["LINK"] > 0 and calls["WRITE"] > 0),
    }
    return Findings(
        checks,
        {
            "shared_storage": {
                "datastore": testbed.where,
                "files": files_off,
                "transactions": seen.acked,
                "connections": seen.connections,
                "entries_at_power_on": booted["entries"],
                "overlap_ms": overlap,
                "nfs_calls": calls,
            }
        },
    )


def _refusal(testbed: Testbed, vm: str, host: str) -> str:
    try:
        testbed.vcenter.power_on(vm, host)
    except ControlError as error:
        return str(error)
    return ""


def listing(folder: Path) -> list[str]:
    """As `ls -l` of a VM's folder shows it: size, what of it is on the disk, owner, name."""
    lines = []
    for path in sorted(folder.iterdir()):
        found = path.stat()
        lines.append(f"{found.st_size:>10} ({found.st_blocks * 512:>9} on disk)  {found.st_uid:>6}  {path.name}")
    return lines


def _calls(pcap: Path) -> dict[str, int]:
    """The NFS calls in the capture of the NAS, by procedure."""
    seen = Counter(procedure for (procedure,) in fields(pcap, "nfs and rpc.msgtyp == 0", "nfs.procedure_v3"))
    return {name: seen[number] for number, name in _PROCEDURES.items()}


if __name__ == "__main__":
    script("shared_storage", run, __doc__)
