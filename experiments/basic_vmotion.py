"""basic_vmotion: a VM moves from one host to the other, and its client notices nothing.

              c1  ping, UDP, transactions, bulk TCP - all the time
              |
         s1 (OVS) ------ controller
        /        \\
     esx1 ======= esx2          ==== the vMotion cable, 50.50.50.0/30
     [vm1]  --->

What to look for in capture.pcapng:

    eth.type == 0x8035                          RARP: the destination announces the VM's MAC: five frames
    tcp.port == 8000                            the vMotion stream on the cable; its last frames are the switchover
    tcp.port == 7100                            the transactions: one connection, one SYN, no RST
    openflow_v4                                 packet-in, flow-mods and barrier of the relearning
    frame.interface_name matches "vmnic0" and eth.src == 00:50:56:00:00:01     on which host the VM speaks
"""

import time
from dataclasses import replace

from experiments import report
from experiments.cli import script
from experiments.evidence import examine
from experiments.probes import Probes
from experiments.run import Options, Run
from experiments.testbed import Testbed
from experiments.timeline import Clock, timeline
from experiments.verdict import Findings, judge, judge_failed
from hosts.vcenter import MigrationFailed, Result
from topologies.events import clock_pair, find, read_events

BEFORE_S = 1.0  # of quiet observation: what the probes see without a migration
AFTER_S = 1.5  # the last RARP leaves 0.8 s after the resume


def run(run: Run) -> Findings:
    """Power on, observe, migrate, observe, judge."""
    plan, options = run.plan, run.options
    vm, client = plan.vms[0], plan.clients[0]
    report.say(f"{vm.name} on {vm.host}: starting the testbed")
    with Testbed(run) as testbed:
        with testbed.capture() as capture:
            testbed.vcenter.power_on(vm.name)
            with Probes(
                testbed.popen(client.name), str(vm.interface.ip), run.folder / "probes", options.seed
            ) as probes:
                time.sleep(BEFORE_S)
                destination = testbed.vcenter.elsewhere(vm.name)
                report.say(f"{vm.name} migrates from {vm.host} to {destination} while {client.name} uses it")
                moved = _migrate(testbed, options, destination)
                time.sleep(AFTER_S)
                seen = probes.stop()
        memory = testbed.agent_memory_bytes()
        capture.merge(run.folder / "capture.pcapng")
    report.say("everything is taken down; reading the captures")
    events = read_events(run.events_file)
    if isinstance(moved, MigrationFailed):
        findings = judge_failed(str(moved), seen, find(events, "round.end"))
    else:
        line = timeline(events, moved.migration, vm.mac)
        clock = Clock(find(events, "run.begin")[0]["clocks"], clock_pair())
        evidence = examine(run.pcap, vm, moved, client.name, seen.transactions.stopped_ns, line, clock)
        policy, announce = options.policy, options.announce
        findings = judge(moved, line, seen, evidence, ram_bytes=vm.ram, policy=policy, announce=announce)
    dropped = {f"{count.node}:{count.interface}": count.dropped for count in capture.counts if count.dropped}
    sections = findings.sections | {"agent_memory_bytes": memory, "capture_dropped": dropped}
    return replace(findings, sections=sections)


def _migrate(testbed: Testbed, options: Options, destination: str) -> Result | MigrationFailed:
    """A migration that fails is shown like any other: what its clients saw, and how far it came."""
    vm = testbed.run.plan.vms[0].name
    with report.rounds() as show:
        try:
            return testbed.vcenter.migrate(vm, destination, options.policy, show, options.transport)
        except MigrationFailed as error:
            return error


if __name__ == "__main__":
    script("basic_vmotion", run, __doc__)
