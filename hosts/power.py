"""The power of a host's VMs: made from a description, powered on from their files, restarted, powered off, deleted."""

import time
from contextlib import ExitStack
from typing import Any

from hosts import control
from hosts.caretaker import Caretaker
from hosts.inventory import HostError, Inventory
from hosts.machine import Machine
from topologies.errors import TestbedError
from topologies.events import say
from topologies.plan import check_vm


class Power:
    """One method an order of hosts/control.py; what each replies is said there."""

    def __init__(self, inventory: Inventory, caretaker: Caretaker) -> None:
        self._inventory, self._caretaker, self._site = inventory, caretaker, inventory.site

    def create(self, order: control.Create) -> dict[str, Any]:
        vm = order.vm
        check_vm(vm, self._site.host)
        with self._inventory.reserved(vm.name), self._inventory.files(vm.name):
            self._site.folder_of(vm.name).create(vm)
        return {}

    def delete(self, order: control.Delete) -> dict[str, Any]:
        with self._inventory.reserved(order.vm), self._inventory.files(order.vm):
            newest = self._site.datastore.newest(order.vm)
            if order.vm in self._inventory.machines or (newest is not None and newest.running):
                raise HostError(f"VM {order.vm} is not off; power it off first")
            self._site.folder_of(order.vm).delete()
        return {}

    def on(self, order: control.PowerOn) -> dict[str, Any]:
        vm, host = order.vm, self._inventory.host
        with self._inventory.reserved(vm):
            self._caretaker.adopt(vm)  # if that was not possible before
            newest = self._site.datastore.newest(vm)
            here = self._inventory.machines.get(vm)
            # what is ours and not here, or dead, has ended without being able to say so
            if newest is not None and newest.running and (newest.host != host or (here and here.is_alive)):
                raise HostError(f"VM {vm} is running on {newest.host} (generation {newest.generation})")
            return self._start(order, newest.generation + 1 if newest else 1)

    def restart(self, order: control.Restart) -> dict[str, Any]:
        vm = order.vm
        with self._inventory.reserved(vm):
            if vm in self._inventory.machines and self._inventory.machines[vm].is_alive:
                raise HostError(f"VM {vm} is running on {self._inventory.host}: there is nothing to restart")
            owner = self._site.datastore.await_silence(vm)
            if owner is None:
                raise HostError(f"VM {vm} is alive: its owner's pulse goes on")
            if not owner.running:
                raise HostError(f"VM {vm} is off: nobody has it who could have died")
            self._site.events.emit("lease.broken", vm=vm, generation=owner.generation, owner=owner.host)
            return self._start(order, owner.generation + 1)

    def _start(self, order: control.PowerOn | control.Restart, generation: int) -> dict[str, Any]:
        """With the VM reserved: from its files, under a generation that is still to be claimed."""
        vm, site = self._inventory.described(order.vm), self._site
        if vm.name in self._inventory.machines:
            self._inventory.machines.pop(vm.name).dismantle()
        with ExitStack() as undo:
            machine = Machine.build(site, vm, order.announce, order.schedule_ms)
            undo.callback(machine.dismantle)
            lease = site.datastore.claim(vm.name, generation, site.host.name)
            if lease is None:
                raise HostError(f"VM {vm.name} was just powered on by another host")
            undo.pop_all()
            undo.callback(self._inventory.bury, machine, "it could not be powered on")
            machine.own(lease)
            with self._inventory.files(vm.name):
                nvram = site.folder_of(vm.name).nvram()
            now_ns = time.monotonic_ns()
            machine.emit("vm.powering_on", t=now_ns, generation=generation, stalled=not machine.vmx.page.lasts)
            booted = machine.guest.power_on(nvram)
            machine.open_gate()
            undo.pop_all()
        self._inventory.machines[vm.name] = machine
        disk = {"entries": booted.entries, "replayed": booted.replayed}
        machine.emit("vm.powered_on", generation=generation, tracking=machine.guest.tracking, **disk)
        machine.announcer.start(lambda number, mode, frames: None)
        return {"generation": generation, "tracking": machine.guest.tracking, **disk}

    def off(self, order: control.PowerOff) -> dict[str, Any]:
        vm, inventory = order.vm, self._inventory
        with inventory.reserved(vm):
            orderly = False
            self._caretaker.adopt(vm)  # what lives must not be taken for what has ended
            if vm in inventory.machines or not inventory.was_ours(vm):  # else a power-off has failed halfway
                machine = inventory.machine(vm)
                orderly = self._shut_down(machine)
                del inventory.machines[vm]
                machine.dismantle()
            generation = inventory.release(vm)
            self._site.events.emit("vm.powered_off", vm=vm, generation=generation, orderly=orderly)
        return {"generation": generation, "orderly": orderly}

    def _shut_down(self, machine: Machine) -> bool:
        """Whether it could be, and its nvram be saved. What it has acknowledged is on its disk in any case."""
        vm = machine.vm.name
        try:
            machine.emit("vm.shutting_down", generation=machine.generation)
            machine.hold()
            nvram = machine.guest.shut_down()
            with self._inventory.files(vm):  # while it is ours: later it could replace a newer one
                self._site.folder_of(vm).save_nvram(nvram)
        except TestbedError as error:
            say(f"VM {vm} is powered off without having been shut down in order: {error}")
            return False
        return True
