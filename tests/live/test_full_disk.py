"""A NAS whose disk is full: a testbed of its own, whose NAS has a disk in memory that can be made smaller."""

from pathlib import Path

from programs import eventually
from testbeds import answers, events, small_testbed

from experiments.clerk import Clerk
from experiments.verdict import ledger_checks
from experiments.world import PRIVATE, run

IP = "10.0.0.11"


def test_on_a_full_disk_a_vm_waits_for_room_and_loses_nothing(tmp_path: Path) -> None:
    run("mount", "-t", "tmpfs", "tmpfs", str(tmp_path))  # so the NAS has a disk in memory, whose size can be changed
    disk = PRIVATE / "nas"
    try:
        with small_testbed(tmp_path / "results") as testbed:
            testbed.vcenter.power_on("vm1")
            with Clerk(testbed, "vm1", "full") as clerk:
                used = int(run("df", "--output=used", "-B4096", str(disk)).split()[-1])
                run("mount", "-o", f"remount,size={(used + 2) * 4096}", str(disk))
                eventually(lambda: bool(events(testbed, "disk.full")), "no room")
                said = testbed.vcenter.status()["esx1"]["vms"]["vm1"]
                assert said["disk_full"] and "is full" in events(testbed, "disk.full")[0]["reason"]
                assert answers(testbed, IP)  # it runs; only what has to be written waits
                run("mount", "-o", "remount,size=512M", str(disk))
                eventually(lambda: not testbed.vcenter.status()["esx1"]["vms"]["vm1"]["disk_full"], "room")
                seen = clerk.audit()
            assert seen.connection_survived
            assert all(ledger_checks(seen).values())
    finally:
        run("umount", "--lazy", str(tmp_path))  # the events of the run are still open
