"""What nobody asks for: VMs that another agent has left here, that are dead, or that wait for word whose they are."""

import threading
import traceback
from collections.abc import Callable
from typing import Any

from hosts.adoption import adopt, settle
from hosts.guest import GuestEnded
from hosts.inventory import Inventory
from hosts.machine import Machine
from hosts.vmx import SUFFIX
from topologies.errors import TestbedError
from topologies.events import say

_LOOK_EVERY_S = 0.5


class Caretaker:
    """Adopts at the agent's start, then looks after the VMs until `close`."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory, self._guests = inventory, inventory.site.guests
        self._said: dict[str, str] = {}  # VM -> why nothing could be done about it
        self._closed = threading.Event()

    def close(self) -> None:
        self._closed.set()

    def adopt_all(self) -> None:
        """Every guest that is on this host, each as the datastore tells; `look_after` tries again what fails."""
        for home in sorted(home for home in self._guests.iterdir() if home.suffix != SUFFIX):
            self._try(home.name, self.adopt, home.name)

    def adopt(self, vm: str) -> None:
        """If its guest is on this host and not in the inventory."""
        home, machines = self._guests / vm, self._inventory.machines
        if vm in machines or not home.exists():
            return
        try:
            machine = adopt(self._inventory.site, home)
        except GuestEnded as error:
            say(str(error))
            return
        if machine is not None:
            machines[vm] = machine

    def look_after(self) -> None:
        """For ever: a VM whose guest has ended and that is another's is taken away; one that waits for word gets it.

        A guest that could not be adopted when this agent started is adopted.
        """
        while not self._closed.wait(_LOOK_EVERY_S):
            for vm, machine in list(self._inventory.machines.items()):
                self._try(vm, self._look_at, vm, machine)
            for vm in self._left():
                self._try(vm, self._adopt_late, vm)

    def _try(self, vm: str, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except TestbedError as error:  # busy, or no word yet
            self._say_once(vm, str(error))
        except Exception:  # a bug of ours with one VM must not be the end of it for all
            say(traceback.format_exc())

    def _left(self) -> list[str]:
        """VMs with a guest on this host that nobody has to do with."""
        inventory, names = self._inventory, [home.name for home in self._guests.iterdir() if not home.suffix]
        return [vm for vm in names if vm not in inventory.machines and not inventory.is_busy(vm)]

    def _adopt_late(self, vm: str) -> None:
        with self._inventory.reserved(vm):
            self.adopt(vm)

    def _look_at(self, vm: str, machine: Machine) -> None:
        inventory = self._inventory
        if machine.unsettled and machine.is_alive:
            with inventory.reserved(vm):
                self._settle(vm, machine)
        elif not machine.is_alive:
            machine.guest.kill()  # without its vmx it is none
            if not inventory.is_ours(vm):
                with inventory.reserved(vm):
                    self._take_away(vm, machine)

    def _settle(self, vm: str, machine: Machine) -> None:
        if self._inventory.machines.get(vm) is machine:
            if not settle(machine, machine.guest.state):
                del self._inventory.machines[vm]
            machine.unsettled = 0

    def _take_away(self, vm: str, machine: Machine) -> None:
        if self._inventory.machines.get(vm) is machine:
            del self._inventory.machines[vm]
            machine.dismantle()
            machine.emit("vm.discarded", state="dead")

    def _say_once(self, vm: str, why: str) -> None:
        if self._said.get(vm) != why:
            self._said[vm] = why
            say(f"VM {vm} waits: {why}")
