"""An agent that starts adopts the VMs that it finds: guests outlive their agent, as VMs outlive a hypervisor's agent.

Whoever holds a VM's newest generation may run it, so the datastore decides about each of them:

    newest generation     guest runs    suspended, or restored but never run
    this host's           it goes on    claim the next generation; then it runs again
    another's, or off     discarded     discarded

The claim comes first because a source that died after it had handed over has a destination that may be about to
claim: it is too late then, or we are. A guest that still awaited its state has ended together with its agent; one
with pages still to come (post-copy) cannot go on without that agent: it is ended, and the VM is off.
"""

from enum import Enum
from pathlib import Path

from hosts.datastore import Claim, DatastoreError
from hosts.guest import is_whole
from hosts.machine import Machine, Site
from hosts.processes import end_behind


class Fate(Enum):
    GOES_ON = "goes on"
    RUNS_AGAIN = "runs again once the next generation is claimed"
    DISCARDED = "discarded"


def fate(newest: Claim, host: str, state: str) -> Fate:
    """What becomes of a guest found on `host` in a state of hosts/channel.py."""
    if not newest.running or newest.host != host:
        return Fate.DISCARDED
    return Fate.GOES_ON if state == "running" else Fate.RUNS_AGAIN


def adopt(site: Site, home: Path) -> Machine | None:
    """The VM whose guest has the socket `home`, running; None if there is none that could, or may, run here.

    Whatever fails, the guest stays as it is, for another try.
    """
    if not is_whole(home):
        _bury(site, home)
        return None
    machine = Machine.adopt(site, home)
    try:
        return machine if settle(machine, machine.guest.state) else None
    except BaseException:
        machine.let_go()
        raise


def _bury(site: Site, home: Path) -> None:
    vm, host = home.stem, site.host.name
    end_behind(home)  # and its vmx notices
    newest = site.datastore.newest(vm)
    if newest is None or fate(newest, host, "") is Fate.DISCARDED:
        return
    if site.datastore.claim(vm, newest.generation + 1, host, running=False):
        site.events.emit("vm.lost", vm=vm, generation=newest.generation + 1)


def settle(machine: Machine, state: str) -> bool:
    """What the datastore says becomes of a VM in this state; whether it is this host's, and runs."""
    site, vm = machine.site, machine.vm.name
    while True:
        newest = site.datastore.newest(vm)
        if newest is None:  # whoever runs has a claim: this is not the datastore on which it was made
            raise DatastoreError(f"VM {vm} is here, and its datastore has never heard of it; is it mounted?")
        if newest.generation < machine.generation:
            raise DatastoreError(f"VM {vm}: generation {machine.generation} is gone from its datastore")
        # a LINK of ours may still be on its way: only a LINK tells whether the generation is to be had
        undecided = newest.generation < machine.unsettled
        match Fate.RUNS_AGAIN if undecided else fate(newest, site.host.name, state):
            case Fate.DISCARDED:
                machine.dismantle()
                machine.emit("vm.discarded", state=state, owner=newest.host)
                return False
            case Fate.GOES_ON:
                machine.keep()
                machine.emit("vm.adopted", state=state, generation=machine.generation)
                return True
            case Fate.RUNS_AGAIN if lease := site.datastore.claim(vm, newest.generation + 1, site.host.name):
                machine.emit("vm.resuming", generation=lease.generation)
                machine.own(lease)
                machine.open_gate()
                machine.guest.run()
                machine.emit("vm.adopted", state=state, generation=machine.generation)
                machine.announcer.start(lambda number, mode, frames: None)
                return True
