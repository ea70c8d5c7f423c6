"""The agent of a host: one process in the host's namespace that owns the host's VMs.

    python -m hosts.agent --plan PLAN --host esx1 --certificates DIR --datastore WHERE --guests DIR
                          --events FILE --logs DIR

WHERE is a store (hosts/store.py).

It serves the control API (hosts/control.py) on the management segment and the vMotion stream
(hosts/protocol.py) on its vMotion VMkernel port. SIGTERM shuts the host down: its VMs end with it. If it ends in
any other way its VMs stay, and the next agent adopts them (hosts/adoption.py).
"""

import argparse
import gc
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from hosts import control, protocol
from hosts.adoption import adopt, settle
from hosts.breakpoints import Breakpoints
from hosts.datastore import Datastore, DatastoreError, OwnerUnknown
from hosts.destination import IncomingMigration
from hosts.guest import GuestEnded
from hosts.machine import Machine, Site
from hosts.protocol import Hello, Join
from hosts.source import Outcome, OutgoingMigration
from hosts.store import open_store
from hosts.stream import PEER_TIMEOUT_S, Stream, StreamLost
from hosts.vm_log import VmLog
from hosts.vmotion_port import VmotionPort
from hosts.vmx import SUFFIX
from topologies.errors import TestbedError
from topologies.events import EventLog
from topologies.plan import VM, Plan, check_vm, read_plan

# A silent source is noticed after PEER_TIMEOUT_S, and taking a VM apart takes a fraction of a second.
_DISCARDED_WITHIN_S = 2 * PEER_TIMEOUT_S
# A source is told to come as soon as its destination is prepared; so many of its time-outs later it never will
_TIMEOUTS_UNTIL_GIVEN_UP = 10

# A round makes objects by the thousand and no cycles: the collector need not look so often (the default is 700, 10,
# 10). Netlink's messages are cycles, some hundred objects in each migration.
_COLLECT = (10_000, 10, 10)
_LOOK_AFTER_S = 0.5


class AgentError(TestbedError):
    """A request that this host cannot carry out as things are."""


class Agent:
    """The host's VMs and what is happening to them. Requests come in threads; `lock` guards the tables."""

    def __init__(self, site: Site, plan: Plan, certificates: Path, peer_timeout_s: float = PEER_TIMEOUT_S) -> None:
        self.site, self.name = site, site.host.name
        self.lock = threading.Lock()
        self._patience_s = _TIMEOUTS_UNTIL_GIVEN_UP * peer_timeout_s
        self.machines: dict[str, Machine] = {}
        self.arriving: dict[str, IncomingMigration] = {}  # by migration
        self.receiving: dict[str, IncomingMigration] = {}  # by migration: its stream has begun
        self.leaving: dict[str, OutgoingMigration] = {}  # by migration
        self.progress: dict[str, Any] = {}  # by migration that leaves: what its source said last
        self.breakpoints = Breakpoints(lambda state: site.events.emit("breakpoint.reached", state=state))
        self.port = VmotionPort(site.host, plan, certificates, peer_timeout_s, self.breakpoints.entered)
        self.busy: set[str] = set()  # names of VMs that are arriving, leaving, starting or stopping
        self._unsettled: dict[str, str] = {}  # VM -> why nothing could be done about it
        self._closed = threading.Event()

    # ------------------------------------------------------------ the control API

    def handle(self, request: control.Request, notify: control.Notify) -> Any:
        """Carry out a request; the handler of the control server."""
        match request:
            case control.Create():
                return self._create(request)
            case control.Delete():
                return self._delete(request)
            case control.Register():
                return self._described(request.vm)
            case control.PowerOn():
                return self._power_on(request)
            case control.Restart():
                return self._restart(request)
            case control.PowerOff():
                return self._power_off(request)
            case control.Prepare():
                return self._prepare(request)
            case control.Migrate():
                return self._noting_progress(request, notify)
            case control.Cancel():
                return self._cancel(request)
            case control.Abandon():
                return self._abandon(request)
            case control.Status():
                return self._status()
            case control.Owner():
                return self.site.datastore.newest(request.vm)
            case control.Break():
                self.breakpoints.set(request.state, request.seconds)
                return {}
            case control.Continue():
                self.breakpoints.clear()
                return {}
        raise AgentError(f"{type(request).__name__} is not for an agent")

    def _create(self, request: control.Create) -> dict[str, Any]:
        vm = request.vm
        check_vm(vm, self.site.host)
        with self._reserved(vm.name), self._storage(vm.name):
            self.site.folder_of(vm.name).create(vm)
        return {}

    def _delete(self, request: control.Delete) -> dict[str, Any]:
        with self._reserved(request.vm), self._storage(request.vm):
            newest = self.site.datastore.newest(request.vm)
            if request.vm in self.machines or (newest is not None and newest.running):
                raise AgentError(f"VM {request.vm} is not off; power it off first")
            self.site.folder_of(request.vm).delete()
        return {}

    def _described(self, vm: str) -> VM:
        """What a VM's files say it is, and that it can run here."""
        with self._storage(vm):
            described = self.site.folder_of(vm).read(self.name)
        check_vm(described, self.site.host)
        return described

    def _power_on(self, request: control.PowerOn) -> dict[str, Any]:
        with self._reserved(request.vm):
            self._adopt(self.site.guests / request.vm)  # if that was not possible before
            newest = self.site.datastore.newest(request.vm)
            here = self.machines.get(request.vm)
            # what is ours and not here, or dead, has ended without being able to say so
            if newest is not None and newest.running and (newest.host != self.name or (here and here.is_alive)):
                raise AgentError(f"VM {request.vm} is running on {newest.host} (generation {newest.generation})")
            return self._start(request, newest.generation + 1 if newest else 1)

    def _restart(self, request: control.Restart) -> dict[str, Any]:
        with self._reserved(request.vm):
            if request.vm in self.machines and self.machines[request.vm].is_alive:
                raise AgentError(f"VM {request.vm} is running on {self.name}: there is nothing to restart")
            owner = self.site.datastore.await_silence(request.vm)
            if owner is None:
                raise AgentError(f"VM {request.vm} is alive: its owner's pulse goes on")
            if not owner.running:
                raise AgentError(f"VM {request.vm} is off: nobody has it who could have died")
            self.site.events.emit("lease.broken", vm=request.vm, generation=owner.generation, owner=owner.host)
            return self._start(request, owner.generation + 1)

    def _start(self, request: control.PowerOn | control.Restart, generation: int) -> dict[str, Any]:
        """With the VM reserved: from its files, under a generation that is still to be claimed."""
        vm, site = self._described(request.vm), self.site
        if vm.name in self.machines:
            self.machines.pop(vm.name).dismantle()
        with ExitStack() as undo:
            machine = Machine.build(site, vm, request.announce, request.schedule_ms)
            undo.callback(machine.dismantle)
            lease = site.datastore.claim(vm.name, generation, self.name)
            if lease is None:
                raise AgentError(f"VM {vm.name} was just powered on by another host")
            undo.pop_all()
            undo.callback(self._bury, machine, "it could not be powered on")
            machine.own(lease)
            with self._storage(vm.name):
                nvram = site.folder_of(vm.name).nvram()
            now_ns = time.monotonic_ns()
            machine.emit("vm.powering_on", t=now_ns, generation=generation, stalled=not machine.vmx.page.lasts)
            booted = machine.guest.power_on(nvram)
            machine.open_gate()
            machine.prepare()
            undo.pop_all()
        self.machines[vm.name] = machine
        disk = {"entries": booted.entries, "replayed": booted.replayed}
        machine.emit("vm.powered_on", generation=generation, tracking=machine.guest.tracking, **disk)
        machine.announcer.start(lambda number, mode, frames: None)
        return {"generation": generation, "tracking": machine.guest.tracking, **disk}

    def _power_off(self, request: control.PowerOff) -> dict[str, Any]:
        with self._reserved(request.vm):
            nvram = b""
            if request.vm in self.machines or not self._is_ours(request.vm):  # else a power-off has failed halfway
                machine = self._machine(request.vm)
                nvram = self._shut_down(machine)
                del self.machines[request.vm]
                machine.dismantle()
            generation = self._release(request.vm)
            if nvram:
                with self._storage(request.vm):
                    self.site.folder_of(request.vm).save_nvram(nvram)
            self.site.events.emit("vm.powered_off", vm=request.vm, generation=generation, orderly=bool(nvram))
        return {"generation": generation, "orderly": bool(nvram)}

    def _shut_down(self, machine: Machine) -> bytes:
        """Its nvram; empty if it could not be asked. What it has acknowledged is on its disk in any case."""
        try:
            machine.emit("vm.shutting_down", generation=machine.generation)
            machine.hold()
            return machine.guest.shut_down()
        except TestbedError as error:
            self.log(f"VM {machine.vm.name} is powered off without having been shut down: {error}")
            return b""

    def _prepare(self, request: control.Prepare) -> dict[str, Any]:
        vm = self._described(request.vm)
        newest = self.site.datastore.newest(vm.name)
        if newest is None or not newest.running:
            raise AgentError(f"VM {vm.name} is not running anywhere")
        with ExitStack() as undo:
            self._reserve(vm.name)
            undo.callback(self.busy.discard, vm.name)
            if vm.name in self.machines:
                raise AgentError(f"VM {vm.name} is here already")
            draft = self.site.datastore.draft(vm.name, newest.generation + 1, self.name)
            if draft is None:
                raise AgentError(f"VM {vm.name} has just changed its owner")
            undo.callback(draft.discard)
            machine = Machine.build(self.site, vm, request.announce, request.schedule_ms)
            undo.callback(machine.dismantle)
            machine.prepare()
            incoming = IncomingMigration(machine, request.migration, draft, request.encrypt)
            incoming.expire_after(self._patience_s, self._expire)
            with self.lock:
                self.arriving[request.migration] = incoming
            undo.pop_all()  # reserved until it has arrived or is discarded
        machine.emit("migration.prepared", migration=request.migration)
        return {"token": incoming.token, "ip": self.site.host.vmotion_port.ip, "port": protocol.PORT}

    def _migrate(self, request: control.Migrate, notify: control.Notify) -> Outcome:
        with self._reserved(request.vm):
            machine = self._machine(request.vm)

            def connect(role: str) -> Stream:
                return self.port.connect(request.ip, request.port, role, encrypt=request.transport.encrypt)

            outgoing = OutgoingMigration(machine, request.migration, connect, request.policy, request.transport, notify)
            self.leaving[request.migration] = outgoing
            try:
                return outgoing.run(request.token)
            finally:
                del self.leaving[request.migration]
                if outgoing.left:
                    self._discard_left(machine, request.migration)

    def _discard_left(self, machine: Machine, migration: str) -> None:
        """The VM is another host's now."""
        del self.machines[machine.vm.name]
        machine.dismantle()
        machine.emit("vm.discarded", migration=migration)

    def _noting_progress(self, request: control.Migrate, notify: control.Notify) -> Outcome:
        def note(progress: Any) -> None:
            self.progress[request.migration] = progress
            notify(progress)

        try:
            return self._migrate(request, note)
        finally:
            self.progress.pop(request.migration, None)

    def _cancel(self, request: control.Cancel) -> dict[str, Any]:
        outgoing = self.leaving.get(request.migration)
        if outgoing is None:
            raise AgentError(f"no migration {request.migration!r} leaves from here")
        outgoing.cancel()
        return {}

    def _abandon(self, request: control.Abandon) -> dict[str, Any]:
        with self.lock:
            incoming = self.arriving.pop(request.migration, None)
            receiving = self.receiving.get(request.migration)
        if incoming is not None:
            self._discard(incoming, "abandoned")
        # so that a retry finds nothing in its way
        elif receiving is not None and not receiving.ended.wait(_DISCARDED_WITHIN_S):
            raise AgentError(f"migration {request.migration!r} has not ended on {self.name} yet")
        return {"abandoned": incoming is not None}

    def _expire(self, migration: str) -> None:
        """Whoever ordered the migration is gone."""
        with self.lock:
            incoming = self.arriving.pop(migration, None)
        if incoming is not None:
            why = f"no source has come within {self._patience_s:g} s"
            self.log(f"migration {migration}: {why}")
            self._discard(incoming, why)

    def _status(self) -> dict[str, Any]:
        with self.lock:  # migrations first: what has just come to its end shows among the VMs
            coming = {name: {"role": "destination", "progress": None} for name in (*self.arriving, *self.receiving)}
            leaving = {name: {"role": "source", "progress": self.progress.get(name)} for name in list(self.leaving)}
            running = [incoming.machine for incoming in self.receiving.values() if incoming.resumed]
        vms = {machine.vm.name: _said_of(machine) for machine in [*self.machines.values(), *running]}
        return {"host": self.name, "vms": vms, "migrations": coming | leaving, "memory_bytes": memory_bytes()}

    # ------------------------------------------------------------ what another agent has left

    def adopt_all(self) -> None:
        """At the start: every guest that is on this host, each as the datastore tells."""
        for home in sorted(home for home in self.site.guests.iterdir() if home.suffix != SUFFIX):
            try:
                self._adopt(home)
            except TestbedError as error:  # it stays as it is; a PowerOn tries again
                self.log(f"VM {home.name} cannot be adopted: {error}")

    def _adopt(self, home: Path) -> None:
        if home.name in self.machines or not home.exists():
            return
        try:
            machine = adopt(self.site, home)
        except GuestEnded as error:
            self.log(str(error))
            return
        if machine is not None:
            self.machines[home.name] = machine

    def look_after(self) -> None:
        """For ever: a VM whose guest has ended and that is another's is taken away; one that waits for word gets it."""
        while not self._closed.wait(_LOOK_AFTER_S):
            for vm, machine in list(self.machines.items()):
                try:
                    if machine.unsettled and machine.is_alive:
                        with self._reserved(vm):
                            self._settle(vm, machine)
                    elif not machine.is_alive:
                        machine.guest.kill()  # without its vmx it is none
                        if not self._is_ours(vm):
                            with self._reserved(vm):
                                self._take_away(vm, machine)
                except TestbedError as error:  # busy, or no word yet
                    self._note_unsettled(vm, str(error))
                except Exception:  # a bug of ours with one VM must not be the end of it for all
                    self.log(traceback.format_exc())

    def _settle(self, vm: str, machine: Machine) -> None:
        if self.machines.get(vm) is machine:
            if not settle(machine, machine.guest.state):
                del self.machines[vm]
            machine.unsettled = 0

    def _is_ours(self, vm: str) -> bool:
        """Its guest may be dead, but it is for us to power it on again."""
        newest = self.site.datastore.newest(vm)
        return newest is not None and newest.running and newest.host == self.name

    def _take_away(self, vm: str, machine: Machine) -> None:
        if self.machines.get(vm) is machine:
            del self.machines[vm]
            machine.dismantle()
            machine.emit("vm.discarded", state="dead")

    def _note_unsettled(self, vm: str, why: str) -> None:
        """Once for each reason."""
        if self._unsettled.get(vm) != why:
            self._unsettled[vm] = why
            self.log(f"VM {vm} waits: {why}")

    # ------------------------------------------------------------ the vMotion port

    def accept_migrations(self, listener: socket.socket) -> None:
        """Every caller gets a thread; only one that shows the token of a preparation gets further."""
        for sock, ip in self.port.callers(listener, self.log):
            threading.Thread(target=self._incoming, args=(sock, ip), name="vmotion", daemon=True).start()

    def _incoming(self, sock: socket.socket, ip: str) -> None:
        try:
            stream, opening = self.port.open(sock)
        except TestbedError as error:
            self.log(f"vMotion caller {ip} refused: {error}")
            return
        with stream:
            try:
                incoming = self._admit(stream, opening)
            except TestbedError as error:
                self.log(f"vMotion caller {ip} refused: {error}")
                stream.abort("refused")
                return
            if isinstance(opening, Hello):
                self._take_in(incoming, stream, opening)
            else:
                self._take_more_in(incoming, stream, opening)

    def _admit(self, stream: Stream, opening: Hello | Join) -> IncomingMigration:
        table = self.arriving if isinstance(opening, Hello) else self.receiving
        with self.lock:
            incoming = table.get(opening.migration)
            if incoming is None or not incoming.admits(opening.token, stream.encrypted):
                raise AgentError(f"no migration {opening.migration!r} is prepared for this caller")
            if isinstance(opening, Hello):
                self.receiving[opening.migration] = self.arriving.pop(opening.migration)
                incoming.expiry.cancel()
        return incoming

    def _take_more_in(self, incoming: IncomingMigration, stream: Stream, join: Join) -> None:
        try:
            incoming.join(stream, join)
        except StreamLost:  # its ordinary end; if it is not, the source notices on this or on the main connection
            return
        except TestbedError as error:
            self.log(f"a connection of migration {join.migration}: {error}")

    def _take_in(self, incoming: IncomingMigration, stream: Stream, hello: Hello) -> None:
        machine, why = incoming.machine, ""
        try:
            incoming.run(stream, hello)
        except TestbedError as error:
            why = str(error)
            self.log(why)
        except Exception as error:  # a bug of ours must not leave half a VM here
            why = repr(error)
            self.log(traceback.format_exc())
        try:
            if incoming.arrived or machine.unsettled:
                with self.lock:
                    self.machines[machine.vm.name] = machine
            elif machine.generation == 0:  # it never came to the point of no return
                self._discard(incoming, why)
            else:
                self._bury(machine, why, migration=incoming.migration)
        finally:
            with self.lock:
                self.busy.discard(machine.vm.name)
                del self.receiving[hello.migration]
                incoming.ended.set()

    def _release(self, vm: str) -> int:
        """Say on the datastore that a VM of ours is off, so that it can be powered on anywhere; by which generation."""
        while True:
            newest = self.site.datastore.newest(vm)
            if newest is None or not newest.running or newest.host != self.name:
                raise AgentError(f"VM {vm} was off, but it is not {self.name}'s any more")
            if self.site.datastore.claim(vm, newest.generation + 1, self.name, running=False):
                return newest.generation + 1

    def _bury(self, machine: Machine, why: str, **fields: Any) -> None:
        """It was ours and cannot go on: it is off."""
        machine.dismantle()
        try:
            fields["generation"] = self._release(machine.vm.name)
        except (AgentError, DatastoreError, OwnerUnknown) as error:  # then its lease has to be broken, elsewhere
            why += f"; and the datastore could not be told: {error}"
        machine.emit("vm.lost", reason=why, **fields)

    def _discard(self, incoming: IncomingMigration, why: str) -> None:
        incoming.expiry.cancel()
        incoming.draft.discard()
        try:
            incoming.machine.dismantle()
            incoming.machine.emit("migration.discarded", migration=incoming.migration, reason=why)
        finally:
            self.busy.discard(incoming.machine.vm.name)

    # ------------------------------------------------------------ tables

    @contextmanager
    def _storage(self, vm: str) -> Iterator[None]:
        """Trouble with a VM's files is told with its name."""
        try:
            yield
        except OSError as error:
            raise AgentError(f"VM {vm}: its files on {self.site.where}: {error}") from error

    @contextmanager
    def _reserved(self, vm: str) -> Iterator[None]:
        """One thing at a time happens to a VM."""
        self._reserve(vm)
        try:
            yield
        finally:
            self.busy.discard(vm)

    def _reserve(self, vm: str) -> None:
        with self.lock:
            if vm in self.busy:
                raise AgentError(f"VM {vm} is busy on {self.name}: starting, stopping or migrating")
            self.busy.add(vm)

    def _machine(self, vm: str) -> Machine:
        if vm not in self.machines:
            raise AgentError(f"VM {vm} is not on {self.name}")
        if self.machines[vm].unsettled:
            raise AgentError(f"VM {vm} is suspended on {self.name}: it could not be learned yet who owns it")
        return self.machines[vm]

    def log(self, line: str) -> None:
        log(line)

    def close(self) -> None:
        """End every VM that is here; one that is coming is refused, if it has not come yet."""
        self._closed.set()
        with self.lock:
            receiving = list(self.receiving.values())
        for incoming in receiving:
            incoming.refuse()
        deadline = time.monotonic() + _DISCARDED_WITHIN_S
        late = [incoming for incoming in receiving if not incoming.ended.wait(max(0.0, deadline - time.monotonic()))]
        coming = [incoming.machine for incoming in (*self.arriving.values(), *late)]
        with ExitStack() as steps:  # each, whatever becomes of the others
            steps.callback(self.site.vm_log.close)
            for machine in coming:
                steps.callback(machine.dismantle)
            for machine in self.machines.values():
                steps.callback(self._bury, machine, f"{self.name} was shut down")


def _said_of(machine: Machine) -> dict[str, Any]:
    guest, page = machine.guest, machine.vmx.page
    state = "stalled" if machine.is_stalled else guest.state
    silent_ns = time.monotonic_ns() - page.silent_since_ns if page.silent_since_ns else 0
    storage = {"silent_ms": silent_ns / 1e6, "disk_full": page.full}
    return {"generation": machine.generation, "state": state, "pid": guest.pid, "work": guest.work} | storage


def log(line: str) -> None:
    with suppress(OSError):  # on a full disk the work goes on
        print(line, file=sys.stderr, flush=True)


def memory_bytes(pid: int | str = "self") -> int:
    """A process's memory without shared memory, which is the guests' RAM (proc_pid_status(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return sum(int(values[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hosts.agent", description="The agent of one host.")
    for option in ("--plan", "--host", "--certificates", "--datastore", "--guests", "--events", "--logs"):
        parser.add_argument(option, required=True)
    parser.add_argument("--peer-timeout-s", type=float, default=PEER_TIMEOUT_S)
    options = parser.parse_args()
    plan = read_plan(options.plan)
    host = plan.host(options.host)
    site = Site(
        host=host,
        where=options.datastore,
        datastore=Datastore(open_store(options.datastore)),
        vm_log=VmLog(options.datastore, host.name, log),
        events=EventLog(options.events, host.name),
        logs=Path(options.logs),
        guests=Path(options.guests),
    )
    agent = Agent(site, plan, Path(options.certificates), options.peer_timeout_s)
    gc.freeze()  # what is imported stays: a full collection of it takes 10 ms, some day in a downtime
    gc.set_threshold(*_COLLECT)

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    context = control.tls_context(Path(options.certificates), host.name, server=True)
    listener = agent.port.listen()
    with control.ControlServer(host.management, context, agent.handle, agent.log) as server:
        agent.adopt_all()  # the ports are taken: there is no other agent of this host
        threading.Thread(target=agent.accept_migrations, args=(listener,), name="vmotion-port", daemon=True).start()
        threading.Thread(target=agent.look_after, name="look-after", daemon=True).start()
        site.events.emit("agent.listening", management=host.management, vmotion=host.vmotion_port.ip)
        try:
            server.serve_forever(poll_interval=60)
        finally:
            agent.close()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TestbedError as error:
        sys.exit(f"{error}")
