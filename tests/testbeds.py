"""The seed network with small VMs, for live tests."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from namespaces import inside

from experiments.run import Options, Run
from experiments.testbed import Testbed
from experiments.world import run
from hosts.announce import SCHEDULE_MS
from hosts.policy import Policy
from hosts.store import Store, open_store
from topologies.events import Event, find, read_events
from topologies.plan import DEFAULT_PLAN, VM, read_plan

HOSTS = ("esx1", "esx2")


def small(vm: VM) -> VM:
    return replace(vm, ram=64 * 2**20, working_set=8 * 2**20, dirty_rate=5_000_000)


def small_testbed(out: Path, *more: VM, datastore: str = "nfs") -> Testbed:
    """vm1 of the seed plan, and more VMs, all of them small; nothing is powered on."""
    assert os.getpid() == 1, "only in a private world"
    plan = read_plan()
    plan = replace(plan, vms=tuple(small(vm) for vm in (*plan.vms, *more)))
    options = Options(plan, DEFAULT_PLAN, "rarp", SCHEDULE_MS, Policy(), seed=1, out=out, datastore=datastore)
    return Testbed(Run("test", options))


@contextmanager
def slow_cable(testbed: Testbed, rate: str = "100mbit") -> Iterator[None]:
    """So slow that a migration is still in its first round whatever is done meanwhile."""

    def set_rate(rate: str) -> None:
        for host in HOSTS:
            limits = f"rate {rate} ceil {rate} burst 15k cburst 15k quantum 60000 prio 1"
            words = f"class change dev {host}-vmnic1 parent 5:10 classid 5:1 htb {limits}"
            run("mnexec", "-a", str(testbed.net[host].pid), "tc", *words.split())

    set_rate(rate)
    try:
        yield
    finally:
        set_rate("1gbit")


def events(testbed: Testbed, kind: str, **fields: object) -> list[Event]:
    return find(read_events(testbed.run.events_file), kind, **fields)


@contextmanager
def datastore(testbed: Testbed) -> Iterator[Store]:
    """The datastore as a host sees it: a NAS need not notice at once what is done to its folder behind its back."""
    with inside(testbed.net["esx1"].pid), closing(open_store(testbed.where)) as store:
        yield store


def answers(testbed: Testbed, ip: str, within_s: int = 5) -> bool:
    """Whether c1 has an answer to one of the pings that it sends meanwhile, one a second."""
    words = ["ping", "-c1", "-i0.2", f"-w{within_s}", ip]
    return bool(testbed.popen("c1")(words, stdout=-3).wait(within_s + 10) == 0)


def here(testbed: Testbed, vm: str = "vm1") -> str:
    """The host that a VM is on."""
    return testbed.vcenter.places[vm]


def elsewhere(testbed: Testbed, vm: str = "vm1") -> str:
    """The other one."""
    return testbed.vcenter.elsewhere(vm)
