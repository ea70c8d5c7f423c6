"""The manager: knows where every VM is and tells the agents what to do. It never touches a VM's state itself.

    vcenter = VCenter(plan, certificates, events)
    vcenter.power_on("vm1")
    result = vcenter.migrate("vm1", to="esx2")

A migration: `prepare` at the destination, then `migrate` at the source; if the source says that the VM
stays, the destination is told to forget it.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hosts import control
from hosts.announce import SCHEDULE_MS
from hosts.control import AgentClient, ControlError
from hosts.policy import Policy
from hosts.precopy import Progress
from hosts.source import Outcome
from hosts.transport import Transport
from topologies.errors import TestbedError, UsageError
from topologies.events import EventLog
from topologies.plan import Plan


class MigrationFailed(TestbedError):
    """The VM did not move; the message says why and where it is."""


@dataclass(frozen=True)
class Result:
    """A completed migration: its id (for the events), its ends, and what the source saw of it."""

    migration: str
    vm: str
    source: str
    destination: str
    outcome: Outcome


class VCenter:
    """Inventory and orders. `announce` and `schedule_ms`: how a VM's new place is told (hosts/announce.py)."""

    def __init__(
        self,
        plan: Plan,
        certificates: Path,
        events: EventLog,
        announce: str = "rarp",
        schedule_ms: tuple[int, ...] = SCHEDULE_MS,
    ) -> None:
        self.plan, self.events, self.announce, self.schedule_ms = plan, events, announce, schedule_ms
        self.places: dict[str, str] = {}  # VM -> host
        self._certificates = certificates
        self._agents: dict[str, AgentClient] = {}

    def agent(self, host: str) -> AgentClient:
        """The connection to a host's agent, made at first use, and again after it broke."""
        if host in self._agents and self._agents[host].broken:
            self._agents.pop(host).close()
        if host not in self._agents:
            self._agents[host] = AgentClient(host, self.plan.host(host).management, self._certificates)
        return self._agents[host]

    def power_on(self, vm: str) -> None:
        spec = self.plan.vm(vm)
        self.agent(spec.host).call(control.PowerOn(spec, self.announce, self.schedule_ms))
        self.places[vm] = spec.host

    def power_off(self, vm: str) -> None:
        self.agent(self._place(vm)).call(control.PowerOff(vm))
        del self.places[vm]

    def migrate(
        self,
        vm: str,
        to: str,
        policy: Policy | None = None,
        progress: Callable[[Progress], None] = lambda round_: None,
        transport: Transport | None = None,
    ) -> Result:
        """Move a running VM; MigrationFailed if it stays where it is."""
        source = self._place(vm)
        self.plan.host(to)
        if to == source:
            raise UsageError(f"VM {vm} is on {to} already; name another host")
        spec, migration = self.plan.vm(vm), f"{vm}-{secrets.token_hex(4)}"
        self.events.emit("migration.begin", vm=vm, migration=migration, source_host=source, destination_host=to)
        try:
            policy, transport = policy or Policy(), transport or Transport()
            order = control.Prepare(spec, migration, self.announce, self.schedule_ms, transport.encrypt)
            ready = self.agent(to).call(order)
            try:
                where = (ready["ip"], ready["port"], ready["token"])
                move = control.Migrate(vm, migration, *where, policy, transport)
                reply = self.agent(source).call(move, lambda note: progress(msgspec.convert(note, Progress)))
            except BaseException:
                self._abandon(to, migration)
                raise
        except ControlError as error:
            self.events.emit("migration.failed", vm=vm, migration=migration, reason=str(error))
            raise MigrationFailed(f"migration of VM {vm} from {source} to {to} failed: {error}") from error
        self.places[vm] = to
        self.events.emit("migration.end", vm=vm, migration=migration)
        return Result(migration, vm, source, to, msgspec.convert(reply, Outcome))

    def status(self) -> dict[str, dict[str, Any]]:
        """What every agent says of itself: its VMs and its memory."""
        return {host.name: self._status(host.name) for host in self.plan.hosts}

    def _status(self, host: str) -> dict[str, Any]:
        client = self.agent(host)
        try:
            status: dict[str, Any] = client.call(control.Status())
        except ControlError:
            if not client.broken:
                raise
            status = self.agent(host).call(control.Status())  # an idle connection may have ended; asking twice is safe
        return status

    def close(self) -> None:
        for agent in self._agents.values():
            agent.close()

    def _abandon(self, host: str, migration: str) -> None:
        try:
            self.agent(host).call(control.Abandon(migration))
        except ControlError as error:  # a dead host has nothing left to forget
            self.events.emit("migration.abandon_failed", migration=migration, reason=str(error))

    def _place(self, vm: str) -> str:
        self.plan.vm(vm)
        if vm not in self.places:
            raise UsageError(f"VM {vm} is not powered on")
        return self.places[vm]
