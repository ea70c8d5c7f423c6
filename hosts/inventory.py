"""The VMs of a host: which are here, which are busy, and whose a VM is by the datastore's word."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hosts.datastore import DatastoreError, OwnerUnknown
from hosts.machine import Machine, Site
from topologies.errors import TestbedError
from topologies.plan import VM, check_vm


class HostError(TestbedError):
    """A request that this host cannot carry out as things are."""


class Inventory:
    """Requests come in threads; `lock` guards the tables, and one thing at a time happens to a VM that is reserved."""

    def __init__(self, site: Site) -> None:
        self.site, self.host = site, site.host.name
        self.lock = threading.Lock()
        self.machines: dict[str, Machine] = {}
        self._busy: set[str] = set()  # names of VMs that are arriving, leaving, starting or stopping

    # ------------------------------------------------------------ one thing at a time

    @contextmanager
    def reserved(self, vm: str) -> Iterator[None]:
        self.reserve(vm)
        try:
            yield
        finally:
            self.free(vm)

    def reserve(self, vm: str) -> None:
        with self.lock:
            if vm in self._busy:
                raise HostError(f"VM {vm} is busy on {self.host}: starting, stopping or migrating")
            self._busy.add(vm)

    def free(self, vm: str) -> None:
        """With or without the lock."""
        self._busy.discard(vm)

    def is_busy(self, vm: str) -> bool:
        return vm in self._busy

    def machine(self, vm: str) -> Machine:
        """The VM that is here; HostError if it is not, or waits for word whose it is."""
        if vm not in self.machines:
            raise HostError(f"VM {vm} is not on {self.host}")
        if self.machines[vm].unsettled:
            raise HostError(f"VM {vm} is suspended on {self.host}: it could not be learned yet who owns it")
        return self.machines[vm]

    # ------------------------------------------------------------ its files

    @contextmanager
    def files(self, vm: str) -> Iterator[None]:
        """Trouble with a VM's files is told with its name."""
        try:
            yield
        except FileNotFoundError as error:
            raise HostError(f"VM {vm}: no such VM on {self.site.where}: a file of it is not there ({error})") from error
        except OSError as error:
            raise HostError(f"VM {vm}: its files on {self.site.where}: {error}") from error

    def described(self, vm: str) -> VM:
        """What a VM's files say it is, and that it can run here."""
        with self.files(vm):
            described = self.site.folder_of(vm).read(self.host)
        check_vm(described, self.site.host)
        return described

    # ------------------------------------------------------------ its owner

    def is_ours(self, vm: str) -> bool:
        """Its guest may be dead, but it is for us to power it on again."""
        newest = self.site.datastore.newest(vm)
        return newest is not None and newest.running and newest.host == self.host

    def was_ours(self, vm: str) -> bool:
        """It is ours, or it is off and we were the last to have it."""
        newest = self.site.datastore.newest(vm)
        return newest is not None and newest.host == self.host

    def release(self, vm: str) -> int:
        """Say on the datastore that a VM of ours is off, so that it can be powered on anywhere; by which generation."""
        while True:
            newest = self.site.datastore.newest(vm)
            if newest is None or newest.host != self.host:
                raise HostError(f"VM {vm} was off, but it is not {self.host}'s any more")
            if not newest.running:  # said before, by a claim without an answer
                return newest.generation
            if self.site.datastore.claim(vm, newest.generation + 1, self.host, running=False):
                return newest.generation + 1

    def bury(self, machine: Machine, why: str, **fields: Any) -> None:
        """It was ours and cannot go on: it is off."""
        machine.dismantle()
        try:
            fields["generation"] = self.release(machine.vm.name)
        except (HostError, DatastoreError, OwnerUnknown) as error:  # then its lease has to be broken, elsewhere
            why += f"; and the datastore could not be told: {error}"
        machine.emit("vm.lost", reason=why, **fields)
