"""The manager: knows where every VM is and tells the agents what to do. It never touches a VM's state itself.

    vcenter = VCenter(plan, certificates, events)
    vcenter.power_on("vm1")
    result = vcenter.migrate("vm1", to="esx2")                      waits
    task = vcenter.start_migration("vm2", to="esx1")                does not: task.status(), .cancel(), .wait()

A migration: `prepare` at the destination, then `migrate` at the source; if the source says that the VM
stays, the destination is told to forget it. If the source's agent does not live to say anything, the
datastore knows: it is asked once no host is at it any more.
"""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hosts import control
from hosts.announce import SCHEDULE_MS
from hosts.control import ANSWER_WITHIN_S, AgentClient, AgentGone, ControlError
from hosts.policy import Policy
from hosts.precopy import Progress
from hosts.sdn import SdnController, SdnError
from hosts.source import Outcome
from hosts.tasks import Queue, Task, migrations_at_once
from hosts.transport import Transport
from topologies.errors import TestbedError, UsageError
from topologies.events import EventLog
from topologies.plan import VM, Plan

_ASK_EVERY_S = 0.1
# Hosts that lose each other come to an end within seconds; a source may ask its datastore for a minute
_END_WITHIN_S = 75.0


class MigrationFailed(TestbedError):
    """There is no result to show; the message says why, and where the VM is."""


@dataclass(frozen=True)
class Result:
    """A completed migration: its id (for the events), its ends, and what the source saw of it."""

    migration: str
    vm: str
    source: str
    destination: str
    outcome: Outcome


@dataclass(frozen=True)
class _Move:
    """What was ordered."""

    vm: str
    migration: str
    source: str
    to: str
    policy: Policy
    transport: Transport


class VCenter:
    """Inventory and orders. `announce` and `schedule_ms`: how a VM's new place is told (hosts/announce.py).

    The SDN controller, if there is one that wants it, hears ahead of every frame where a VM will be.
    """

    def __init__(
        self,
        plan: Plan,
        certificates: Path,
        events: EventLog,
        announce: str = "rarp",
        schedule_ms: tuple[int, ...] = SCHEDULE_MS,
        sdn: SdnController | None = None,
    ) -> None:
        self.plan, self.events, self.announce, self.schedule_ms = plan, events, announce, schedule_ms
        self.inventory: dict[str, VM] = {}  # VMs by name, as their files describe them
        self.homes: dict[str, str] = {}  # VM -> the host where it is registered
        self.places: dict[str, str] = {}  # VM that is powered on -> host
        self.tasks: dict[str, Task[Result]] = {}  # VM -> its latest migration
        self.queue = Queue(migrations_at_once(plan.link))
        self.detour: Callable[[str, int], tuple[str, int]] = lambda ip, port: (ip, port)  # of streams, for experiments
        self._certificates, self._sdn = certificates, sdn
        self._idle: dict[str, list[AgentClient]] = {host.name: [] for host in plan.hosts}
        self._lock = threading.Lock()  # of the tables above
        self._closed = threading.Event()

    def create(self, vm: str, host: str | None = None) -> None:
        """Make the files of a VM of the plan, if it has none yet, and register it on a host, its own in the plan."""
        spec = self.plan.vm(vm)
        self._call(host or spec.host, control.Create(spec))
        self.register(vm, host or spec.host)

    def register(self, vm: str, host: str) -> None:
        """Take a VM into the inventory from its files, to be run on that host; ControlError if it cannot."""
        self.plan.host(host)
        if vm in self.places:
            raise UsageError(f"VM {vm} is on {self.places[vm]}; power it off first")
        self.inventory[vm] = msgspec.convert(self._call(host, control.Register(vm)), VM)
        self.homes[vm] = host

    def unregister(self, vm: str) -> None:
        """Forget a VM that is off; its files stay."""
        if vm in self.places:
            raise UsageError(f"VM {vm} is powered on, on {self.places[vm]}; power it off first")
        self._registered(vm)
        del self.inventory[vm], self.homes[vm]

    def delete(self, vm: str) -> None:
        """Delete a VM that is off from the disk, and from the inventory."""
        self._registered(vm)
        self._call(self.homes[vm], control.Delete(vm))
        self.unregister(vm)

    def power_on(self, vm: str, host: str | None = None) -> dict[str, Any]:
        """Start a VM from its files: on this host, or where it was last, or where it is registered.

        A VM of the plan that has no files yet gets them. Returns the agent's reply (hosts/control.py, PowerOn).
        """
        if vm not in self.inventory:
            self.create(vm)
        where = host or self.places.get(vm) or self.homes[vm]
        self.plan.host(where)
        self._expect(vm, self.places.get(vm, ""), where)
        order = control.PowerOn(vm, self.announce, self.schedule_ms)
        reply: dict[str, Any] = self._power(vm, where, order)
        self.places[vm] = self.homes[vm] = where
        return reply

    def restart(self, vm: str, host: str) -> dict[str, Any]:
        """Start a VM whose host is dead on another one: ControlError if its owner lives, and nothing has happened."""
        self._registered(vm)
        self._expect(vm, self.places.get(vm, ""), host)
        reply: dict[str, Any] = self._call(host, control.Restart(vm, self.announce, self.schedule_ms))
        self.places[vm] = self.homes[vm] = host
        return reply

    def elsewhere(self, vm: str) -> str:
        """A host that a VM is not on."""
        return next(host.name for host in self.plan.hosts if host.name != self._place(vm))

    def power_off(self, vm: str) -> None:
        self.homes[vm] = self._place(vm)
        self._power(vm, self.homes[vm], control.PowerOff(vm))
        del self.places[vm]

    def _power(self, vm: str, host: str, order: control.PowerOn | control.PowerOff) -> Any:
        """An order that fails may have been carried out all the same, or halfway: then the inventory is corrected."""
        try:
            return self._call(host, order)
        except ControlError:
            self.find(vm)
            raise

    # ------------------------------------------------------------ migrations

    def migrate(
        self,
        vm: str,
        to: str,
        policy: Policy | None = None,
        progress: Callable[[Progress], None] = lambda round_: None,
        transport: Transport | None = None,
    ) -> Result:
        """Move a running VM and wait; MigrationFailed if it does not move, Cancelled if it never had its turn."""
        task = self._order(vm, to, policy or Policy(), transport or Transport(), progress)
        task.run()
        return task.wait()

    def start_migration(
        self,
        vm: str,
        to: str,
        policy: Policy | None = None,
        progress: Callable[[Progress], None] = lambda round_: None,
        transport: Transport | None = None,
    ) -> Task[Result]:
        """The same as a task, which has its own thread."""
        task = self._order(vm, to, policy or Policy(), transport or Transport(), progress)
        threading.Thread(target=task.run, name=task.name, daemon=True).start()
        return task

    def _order(
        self, vm: str, to: str, policy: Policy, transport: Transport, progress: Callable[[Progress], None]
    ) -> Task[Result]:
        source = self._place(vm)
        self.plan.host(to)
        if to == source:
            raise UsageError(f"VM {vm} is on {to} already; name another host")
        move = _Move(vm, f"{vm}-{secrets.token_hex(4)}", source, to, policy, transport)

        def work(task: Task[Result]) -> Result:
            def note(content: Any) -> None:
                step = msgspec.convert(content, Progress)
                task.note_progress(step)
                progress(step)

            return self._carry_out(move, task, note)

        def stop(task: Task[Result]) -> None:
            self._stop(move, task)

        with self._lock:
            if vm in self.tasks and not self.tasks[vm].over.is_set():
                raise UsageError(f"VM {vm} has a migration under way already; wait for it, or cancel it")
            task = self.tasks[vm] = Task(f"{vm} to {to}", (source, to), self.queue, work, stop)
        self.events.emit("migration.ordered", vm=vm, migration=move.migration)
        return task

    def _carry_out(self, move: "_Move", task: Task[Result], note: Callable[[Any], None]) -> Result:
        vm, source, to = move.vm, move.source, move.to
        if self.places.get(vm) != source:
            raise MigrationFailed(f"VM {vm} is not on {source} any more, where it was when this migration was ordered")
        self.events.emit("migration.begin", vm=vm, migration=move.migration, source_host=source, destination_host=to)
        try:
            encrypt = move.transport.encrypt
            order = control.Prepare(vm, move.migration, self.announce, self.schedule_ms, encrypt)
            try:
                ready = self._call(to, order)
                if task.cancelled:
                    raise ControlError(f"VM {vm} stays on {source}: cancelled")
                self._expect(vm, source, to)
                where = (*self.detour(ready["ip"], ready["port"]), ready["token"])
                reply = self._call(
                    source, control.Migrate(vm, move.migration, *where, move.policy, move.transport), note
                )
            except BaseException:
                self._abandon(to, move.migration)
                raise
        except ControlError as error:
            self._await_end(move)
            said, found = str(error), self.find(vm)
            if isinstance(error, AgentGone) or self.places.get(vm) != source:  # else a host has said it already
                said += f"; {found}"
            self._expect(vm, to, self.places.get(vm, source))
            self.events.emit("migration.failed", vm=vm, migration=move.migration, reason=said)
            raise MigrationFailed(f"migration of VM {vm} from {source} to {to} failed: {said}") from error
        self.places[vm] = to
        self.events.emit("migration.end", vm=vm, migration=move.migration)
        return Result(move.migration, vm, source, to, msgspec.convert(reply, Outcome))

    def _expect(self, vm: str, origin: str, to: str) -> None:
        """Tell the SDN controller; what it does not hear it finds out by itself, a little later."""
        if self._sdn is None or vm not in self.inventory:
            return
        try:
            self._sdn.expect(self.inventory[vm].mac, origin, to)
        except SdnError as error:
            self.events.emit("intent.failed", vm=vm, to=to, reason=str(error))

    def _stop(self, move: "_Move", task: Task[Result]) -> None:
        """The source knows of the migration a little later than we do, and a little less long."""
        while not task.over.wait(_ASK_EVERY_S):
            try:
                self._call(move.source, control.Cancel(move.migration))
            except AgentGone:  # the migration is coming to its end then
                return
            except ControlError:
                continue
            return

    def find(self, vm: str) -> str:
        """Where a VM is, in words: whom the datastore names, as any agent sees it. Corrects the inventory."""
        said = {host.name: status for host in self.plan.hosts if (status := self.status_of(host.name))}
        if not said:
            return f"it is unknown where VM {vm} is: no agent answers"
        try:
            owner = self._call(next(iter(said)), control.Owner(vm))
        except ControlError as error:
            return f"it is unknown where VM {vm} is: {error}"
        if owner is None or not owner["running"]:
            self.places.pop(vm, None)
            return f"VM {vm} is off"
        host = self.places[vm] = owner["host"]
        if host not in said:
            return f"VM {vm} is on {host}, whose agent does not answer"
        return f"VM {vm} is on {host}: {said[host]['vms'].get(vm, {'state': 'dead'})['state']}"

    def _await_end(self, move: "_Move") -> None:
        """Until no agent that answers is at this migration any more; not for ever."""
        deadline = time.monotonic() + _END_WITHIN_S
        while time.monotonic() < deadline:
            said = (self.status_of(host) for host in (move.source, move.to))
            if not any(status and move.migration in status["migrations"] for status in said):
                return
            if self._closed.wait(_ASK_EVERY_S):
                return

    def _abandon(self, host: str, migration: str) -> None:
        try:
            self._call(host, control.Abandon(migration))
        except ControlError as error:  # a dead host has nothing left to forget
            self.events.emit("migration.abandon_failed", migration=migration, reason=str(error))

    # ------------------------------------------------------------ agents

    def status(self) -> dict[str, dict[str, Any]]:
        """What every agent says of itself: its VMs, migrations and memory (hosts/control.py, Status)."""
        return {host.name: self._call(host.name, control.Status()) for host in self.plan.hosts}

    def breakpoint(self, host: str, state: str, seconds: float = 30.0) -> None:
        """Stop the next migration that enters a state on a host, "source:suspended" say (hosts/breakpoints.py)."""
        self._call(host, control.Break(state, seconds))

    def go_on(self, host: str) -> None:
        """From a host's breakpoint, reached or not."""
        self._call(host, control.Continue())

    def close(self) -> None:
        """Nothing more begins; what is under way is the agents' own."""
        self._closed.set()
        for task in list(self.tasks.values()):
            if task.status().state == "queued":
                task.cancel()
        for clients in self._idle.values():
            while clients:
                clients.pop().close()

    def status_of(self, host: str) -> dict[str, Any] | None:
        """The same of one agent; None if it does not answer, or not to the point: it may do so a moment later."""
        try:
            status: dict[str, Any] = self._call(host, control.Status())
        except ControlError:
            return None
        return status

    def _call(self, host: str, request: control.Request, notice: Callable[[Any], None] = lambda content: None) -> Any:
        """On a connection of its own: an idle one, or a new one. A call may take as long as a migration does."""
        client = self._idle_client(host) or self.client(host)
        try:
            return client.call(request, notice)
        finally:
            if client.broken or self._closed.is_set():
                client.close()
            else:
                self._idle[host].append(client)

    def client(self, host: str, answer_within_s: float = ANSWER_WITHIN_S) -> AgentClient:
        """A new connection to a host's agent, which is the caller's to close."""
        return AgentClient(host, self.plan.host(host).management, self._certificates, answer_within_s)

    def _idle_client(self, host: str) -> AgentClient | None:
        """The agent at its other end may have been restarted meanwhile."""
        while True:
            with self._lock:
                if not self._idle[host]:
                    return None
                client = self._idle[host].pop()
            if client.is_open():
                return client
            client.close()

    def _registered(self, vm: str) -> VM:
        if vm not in self.inventory:
            known = ", ".join(self.inventory) or "none"
            raise UsageError(f"VM {vm!r} is not registered; registered are {known}")
        return self.inventory[vm]

    def _place(self, vm: str) -> str:
        if vm not in self.places:
            raise UsageError(f"VM {vm} is not powered on")
        return self.places[vm]
