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
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from hosts import control, protocol
from hosts.announce import FrameBuilder
from hosts.breakpoints import Breakpoints
from hosts.caretaker import Caretaker
from hosts.datastore import Datastore
from hosts.destination import IncomingMigration
from hosts.inventory import HostError, Inventory
from hosts.machine import Machine, Site
from hosts.power import Power
from hosts.protocol import Hello, Join
from hosts.source import Outcome, OutgoingMigration
from hosts.store import open_store
from hosts.stream import PEER_TIMEOUT_S, Stream, StreamLost
from hosts.vm_log import VmLog
from hosts.vmotion_port import VmotionPort
from topologies.errors import TestbedError
from topologies.events import EventLog, say
from topologies.plan import Plan, read_plan

# A silent source is noticed after PEER_TIMEOUT_S, and taking a VM apart takes a fraction of a second.
_DISCARDED_WITHIN_S = 2 * PEER_TIMEOUT_S
# A source is told to come as soon as its destination is prepared; so many of its time-outs later it never will
_TIMEOUTS_UNTIL_GIVEN_UP = 10

# A round makes objects by the thousand and no cycles: the collector need not look so often (the default is 700, 10,
# 10). Netlink's messages are cycles, some hundred objects in each migration.
_COLLECT = (10_000, 10, 10)


class Agent:
    """Orders to where they are carried out, and the migrations from and to this host.

    Requests come in threads; the inventory's lock guards the tables.
    """

    def __init__(self, site: Site, plan: Plan, certificates: Path, peer_timeout_s: float = PEER_TIMEOUT_S) -> None:
        self.site, self.name = site, site.host.name
        self._inventory = Inventory(site)
        self.caretaker = Caretaker(self._inventory)
        self._power = Power(self._inventory, self.caretaker)
        self._patience_s = _TIMEOUTS_UNTIL_GIVEN_UP * peer_timeout_s
        self.arriving: dict[str, IncomingMigration] = {}  # by migration
        self.receiving: dict[str, IncomingMigration] = {}  # by migration: its stream has begun
        self.leaving: dict[str, OutgoingMigration] = {}  # by migration
        self.progress: dict[str, Any] = {}  # by migration that leaves: what its source said last
        self.breakpoints = Breakpoints(lambda state: site.events.emit("breakpoint.reached", state=state))
        self.port = VmotionPort(site.host, plan, certificates, peer_timeout_s, self.breakpoints.entered)

    # ------------------------------------------------------------ the control API

    def handle(self, request: control.Request, notify: control.Notify) -> Any:
        """Carry out a request; the handler of the control server."""
        match request:
            case control.Create():
                return self._power.create(request)
            case control.Delete():
                return self._power.delete(request)
            case control.Register():
                return self._inventory.described(request.vm)
            case control.PowerOn():
                return self._power.on(request)
            case control.Restart():
                return self._power.restart(request)
            case control.PowerOff():
                return self._power.off(request)
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
        raise HostError(f"{type(request).__name__} is not for an agent")

    def _prepare(self, request: control.Prepare) -> dict[str, Any]:
        vm = self._inventory.described(request.vm)
        newest = self.site.datastore.newest(vm.name)
        if newest is None or not newest.running:
            raise HostError(f"VM {vm.name} is not running anywhere")
        with ExitStack() as undo:
            self._inventory.reserve(vm.name)
            undo.callback(self._inventory.free, vm.name)
            if vm.name in self._inventory.machines or newest.host == self.name:  # it may wait for its adoption
                raise HostError(f"VM {vm.name} is here already")
            draft = self.site.datastore.draft(vm.name, newest.generation + 1, self.name)
            if draft is None:
                raise HostError(f"VM {vm.name} has just changed its owner")
            undo.callback(draft.discard)
            machine = Machine.build(self.site, vm, request.announce, request.schedule_ms)
            undo.callback(machine.dismantle)
            incoming = IncomingMigration(machine, request.migration, draft, request.encrypt)
            incoming.expire_after(self._patience_s, self._expire)
            with self._inventory.lock:
                self.arriving[request.migration] = incoming
            undo.pop_all()  # reserved until it has arrived or is discarded
        machine.emit("migration.prepared", migration=request.migration)
        return {"token": incoming.token, "ip": self.site.host.vmotion_port.ip, "port": protocol.PORT}

    def _migrate(self, request: control.Migrate, notify: control.Notify) -> Outcome:
        with self._inventory.reserved(request.vm):
            machine = self._inventory.machine(request.vm)

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
        del self._inventory.machines[machine.vm.name]
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
            raise HostError(f"no migration {request.migration!r} leaves from here")
        outgoing.cancel()
        return {}

    def _abandon(self, request: control.Abandon) -> dict[str, Any]:
        with self._inventory.lock:
            incoming = self.arriving.pop(request.migration, None)
            receiving = self.receiving.get(request.migration)
        if incoming is not None:
            self._discard(incoming, "abandoned")
        # so that a retry finds nothing in its way
        elif receiving is not None and not receiving.ended.wait(_DISCARDED_WITHIN_S):
            raise HostError(f"migration {request.migration!r} has not ended on {self.name} yet")
        return {"abandoned": incoming is not None}

    def _expire(self, migration: str) -> None:
        """Whoever ordered the migration is gone."""
        with self._inventory.lock:
            incoming = self.arriving.pop(migration, None)
        if incoming is not None:
            why = f"no source has come within {self._patience_s:g} s"
            say(f"migration {migration}: {why}")
            self._discard(incoming, why)

    def _status(self) -> dict[str, Any]:
        with self._inventory.lock:  # migrations first: what has just come to its end shows among the VMs
            coming = {name: {"role": "destination", "progress": None} for name in (*self.arriving, *self.receiving)}
            leaving = {name: {"role": "source", "progress": self.progress.get(name)} for name in list(self.leaving)}
            running = [incoming.machine for incoming in self.receiving.values() if incoming.resumed]
        vms = {machine.vm.name: _said_of(machine) for machine in [*self._inventory.machines.values(), *running]}
        return {"host": self.name, "vms": vms, "migrations": coming | leaving, "memory_bytes": memory_bytes()}

    # ------------------------------------------------------------ the vMotion port

    def accept_migrations(self, listener: socket.socket) -> None:
        """Every caller gets a thread; only one that shows the token of a preparation gets further."""
        for sock, ip in self.port.callers(listener, say):
            threading.Thread(target=self._incoming, args=(sock, ip), name="vmotion", daemon=True).start()

    def _incoming(self, sock: socket.socket, ip: str) -> None:
        try:
            stream, opening = self.port.open(sock)
        except TestbedError as error:
            say(f"vMotion caller {ip} refused: {error}")
            return
        with stream:
            try:
                incoming = self._admit(stream, opening)
            except TestbedError as error:
                say(f"vMotion caller {ip} refused: {error}")
                stream.abort("refused")
                return
            if isinstance(opening, Hello):
                self._take_in(incoming, stream, opening)
            else:
                self._take_more_in(incoming, stream, opening)

    def _admit(self, stream: Stream, opening: Hello | Join) -> IncomingMigration:
        table = self.arriving if isinstance(opening, Hello) else self.receiving
        with self._inventory.lock:
            incoming = table.get(opening.migration)
            if incoming is None or not incoming.admits(opening.token, stream.encrypted):
                raise HostError(f"no migration {opening.migration!r} is prepared for this caller")
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
            say(f"a connection of migration {join.migration}: {error}")

    def _take_in(self, incoming: IncomingMigration, stream: Stream, hello: Hello) -> None:
        machine, why = incoming.machine, ""
        try:
            incoming.run(stream, hello)
        except TestbedError as error:
            why = str(error)
            say(why)
        except Exception as error:  # a bug of ours must not leave half a VM here
            why = repr(error)
            say(traceback.format_exc())
        try:
            if incoming.arrived or machine.unsettled:
                with self._inventory.lock:
                    self._inventory.machines[machine.vm.name] = machine
            elif machine.generation == 0:  # it never came to the point of no return
                self._discard(incoming, why)
            else:
                self._inventory.bury(machine, why, migration=incoming.migration)
        finally:
            with self._inventory.lock:
                self._inventory.free(machine.vm.name)
                del self.receiving[hello.migration]
                incoming.ended.set()

    def _discard(self, incoming: IncomingMigration, why: str) -> None:
        incoming.expiry.cancel()
        incoming.draft.discard()
        try:
            incoming.machine.dismantle()
            incoming.machine.emit("migration.discarded", migration=incoming.migration, reason=why)
        finally:
            self._inventory.free(incoming.machine.vm.name)

    def close(self) -> None:
        """End every VM that is here; one that is coming is refused, if it has not come yet."""
        self.caretaker.close()
        with self._inventory.lock:
            receiving = list(self.receiving.values())
        for incoming in receiving:
            incoming.refuse()
        deadline = time.monotonic() + _DISCARDED_WITHIN_S
        late = [incoming for incoming in receiving if not incoming.ended.wait(max(0.0, deadline - time.monotonic()))]
        coming = [incoming.machine for incoming in (*self.arriving.values(), *late)]
        with ExitStack() as steps:  # each, whatever becomes of the others
            steps.callback(self.site.vm_log.close)
            steps.callback(self.site.frame_builder.close)
            for machine in coming:
                steps.callback(machine.dismantle)
            for machine in self._inventory.machines.values():
                steps.callback(self._inventory.bury, machine, f"{self.name} was shut down")


def _said_of(machine: Machine) -> dict[str, Any]:
    guest, page = machine.guest, machine.vmx.page
    state = "stalled" if machine.is_stalled else guest.state
    silent_ns = time.monotonic_ns() - page.silent_since_ns if page.silent_since_ns else 0
    storage = {"silent_ms": silent_ns / 1e6, "disk_full": page.full}
    return {"generation": machine.generation, "state": state, "pid": guest.pid, "work": guest.work} | storage


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
        vm_log=VmLog(options.datastore, host.name, say),
        events=EventLog(options.events, host.name),
        logs=Path(options.logs),
        guests=Path(options.guests),
        frame_builder=FrameBuilder(),
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
    with control.ControlServer(host.management, context, agent.handle, say) as server:
        agent.caretaker.adopt_all()  # the ports are taken: there is no other agent of this host
        threading.Thread(target=agent.accept_migrations, args=(listener,), name="vmotion-port", daemon=True).start()
        threading.Thread(target=agent.caretaker.look_after, name="look-after", daemon=True).start()
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
