"""The agent of a host: one process in the host's namespace that owns the host's VMs.

    python -m hosts.agent --plan PLAN --host esx1 --certificates DIR --datastore DIR --events FILE --logs DIR

It serves the control API (hosts/control.py) on the management segment and the vMotion stream
(hosts/protocol.py) on its vMotion VMkernel port. SIGTERM ends it; its VMs end with it.
"""

import argparse
import gc
import hmac
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hosts import control, protocol
from hosts.datastore import LocalDatastore
from hosts.destination import IncomingMigration
from hosts.machine import Machine, Site
from hosts.protocol import Hello, Kind, Session
from hosts.source import Outcome, OutgoingMigration
from hosts.stream import PEER_TIMEOUT_S, Stream
from topologies.errors import TestbedError
from topologies.events import EventLog
from topologies.plan import read_plan

# A silent source is noticed after PEER_TIMEOUT_S, and taking a VM apart takes a fraction of a second.
_DISCARDED_WITHIN_S = 2 * PEER_TIMEOUT_S


class AgentError(TestbedError):
    """A request that this host cannot carry out as things are."""


class Agent:
    """The host's VMs and what is happening to them. Requests come in threads; `lock` guards the tables."""

    def __init__(self, site: Site) -> None:
        self.site, self.name = site, site.host.name
        self.lock = threading.Lock()
        self.machines: dict[str, Machine] = {}
        self.arriving: dict[str, IncomingMigration] = {}  # by migration
        self.receiving: dict[str, threading.Event] = {}  # by migration: set when its stream has ended
        self.leaving: dict[str, threading.Event] = {}  # by migration: set to cancel
        self.busy: set[str] = set()  # names of VMs that are arriving, leaving, starting or stopping

    # ------------------------------------------------------------ the control API

    def handle(self, request: control.Request, notify: control.Notify) -> Any:
        """Carry out a request; the handler of the control server."""
        match request:
            case control.PowerOn():
                return self._power_on(request)
            case control.PowerOff():
                return self._power_off(request)
            case control.Prepare():
                return self._prepare(request)
            case control.Migrate():
                return self._migrate(request, notify)
            case control.Cancel():
                return self._cancel(request)
            case control.Abandon():
                return self._abandon(request)
            case control.Status():
                return self._status()
        raise AgentError(f"{type(request).__name__} is not for an agent")

    def _power_on(self, request: control.PowerOn) -> dict[str, Any]:
        vm = request.vm
        with self._reserved(vm.name):
            newest = self.site.datastore.newest(vm.name)
            # what is ours and not here has ended without being able to say so
            if newest is not None and newest.running and (newest.host != self.name or vm.name in self.machines):
                raise AgentError(f"VM {vm.name} is running on {newest.host} (generation {newest.generation})")
            with ExitStack() as undo:
                machine = Machine.build(self.site, vm, request.announce, request.schedule_ms)
                undo.callback(machine.dismantle)
                machine.generation = newest.generation + 1 if newest else 1
                if not self.site.datastore.claim(vm.name, machine.generation, self.name):
                    raise AgentError(f"VM {vm.name} was just powered on by another host")
                machine.guest.power_on()
                machine.port.open()
                undo.pop_all()
            self.machines[vm.name] = machine
            machine.emit("vm.powered_on", generation=machine.generation, tracking=machine.guest.tracking)
            machine.announcer.start(lambda number, mode, frames: None)
        return {"generation": machine.generation, "tracking": machine.guest.tracking}

    def _power_off(self, request: control.PowerOff) -> dict[str, Any]:
        with self._reserved(request.vm):
            machine = self._machine(request.vm)
            generation = machine.generation + 1
            machine.dismantle()
            del self.machines[request.vm]
            if not self.site.datastore.claim(request.vm, generation, self.name, running=False):
                raise AgentError(f"VM {request.vm} was off, but generation {generation} is not ours")
            machine.emit("vm.powered_off", generation=generation)
        return {}

    def _prepare(self, request: control.Prepare) -> dict[str, Any]:
        vm = request.vm
        newest = self.site.datastore.newest(vm.name)
        if newest is None or not newest.running:
            raise AgentError(f"VM {vm.name} is not running anywhere")
        with ExitStack() as undo:
            self._reserve(vm.name)
            undo.callback(self.busy.discard, vm.name)
            if vm.name in self.machines:
                raise AgentError(f"VM {vm.name} is here already")
            machine = Machine.build(self.site, vm, request.announce, request.schedule_ms)
            undo.callback(machine.dismantle)
            incoming = IncomingMigration(machine, request.migration, newest.generation + 1)
            with self.lock:
                self.arriving[request.migration] = incoming
            undo.pop_all()  # reserved until it has arrived or is discarded
        machine.emit("migration.prepared", migration=request.migration)
        return {"token": incoming.token, "ip": self.site.host.vmotion_port.ip, "port": protocol.PORT}

    def _migrate(self, request: control.Migrate, notify: control.Notify) -> Outcome:
        with self._reserved(request.vm):
            machine = self._machine(request.vm)
            if machine.owner_unknown:
                raise AgentError(f"VM {request.vm} is suspended on {self.name}: it could not be learned who owns it")
            cancel = self.leaving[request.migration] = threading.Event()
            try:
                with self._connect(request.ip, request.port) as stream:
                    outgoing = OutgoingMigration(
                        machine, request.migration, stream, request.policy, notify, cancel.is_set
                    )
                    outcome = outgoing.run(request.token)
            finally:
                del self.leaving[request.migration]
            del self.machines[request.vm]
            machine.dismantle()
            machine.emit("vm.discarded", migration=request.migration)
        return outcome

    def _connect(self, ip: str, port: int) -> Stream:
        """From our own vMotion port, so that the stream takes the vMotion cable."""
        try:
            sock = socket.create_connection((ip, port), PEER_TIMEOUT_S, (self.site.host.vmotion_port.ip, 0))
        except OSError as error:
            raise AgentError(f"no vMotion connection to {ip}: {error.strerror or error}; check the cable") from error
        return Stream(sock, Session("source"))

    def _cancel(self, request: control.Cancel) -> dict[str, Any]:
        cancel = self.leaving.get(request.migration)
        if cancel is None:
            raise AgentError(f"no migration {request.migration!r} leaves from here")
        cancel.set()
        return {}

    def _abandon(self, request: control.Abandon) -> dict[str, Any]:
        with self.lock:
            incoming = self.arriving.pop(request.migration, None)
            ended = self.receiving.get(request.migration)
        if incoming is not None:
            self._discard(incoming)
        elif ended is not None and not ended.wait(_DISCARDED_WITHIN_S):  # so that a retry finds nothing in its way
            raise AgentError(f"migration {request.migration!r} has not ended on {self.name} yet")
        return {"abandoned": incoming is not None}

    def _status(self) -> dict[str, Any]:
        vms = {name: machine.generation for name, machine in dict(self.machines).items()}
        return {"host": self.name, "vms": vms, "memory_bytes": own_memory_bytes()}

    # ------------------------------------------------------------ the vMotion port

    def accept_migrations(self, listener: socket.socket) -> None:
        """Every caller gets a thread; only one that shows the token of a preparation gets further."""
        while True:
            try:
                sock, (ip, _) = listener.accept()
            except OSError as error:  # no descriptor, no memory: this caller is lost, the port is not
                self.log(f"vMotion port: {error}")
                time.sleep(0.1)
                continue
            threading.Thread(target=self._incoming, args=(sock, ip), name="vmotion", daemon=True).start()

    def _incoming(self, sock: socket.socket, ip: str) -> None:
        with Stream(sock, Session("destination")) as stream:
            self._receive(stream, ip)

    def _receive(self, stream: Stream, ip: str) -> None:
        try:
            hello: Hello = stream.expect(Kind.HELLO)
            with self.lock:
                incoming = self.arriving.get(hello.migration)
                if incoming is None or not hmac.compare_digest(incoming.token.encode(), hello.token.encode()):
                    raise AgentError(f"no migration {hello.migration!r} is prepared for this caller")
                del self.arriving[hello.migration]
                ended = self.receiving[hello.migration] = threading.Event()
        except TestbedError as error:
            self.log(f"vMotion caller {ip} refused: {error}")
            stream.abort("refused")
            return
        try:
            self._take_in(incoming, stream, hello)
        finally:
            del self.receiving[hello.migration]
            ended.set()

    def _take_in(self, incoming: IncomingMigration, stream: Stream, hello: Hello) -> None:
        try:
            incoming.run(stream, hello)
        except TestbedError as error:
            self.log(str(error))
        except Exception:  # a bug of ours must not leave half a VM here
            self.log(traceback.format_exc())
        if incoming.machine.generation == 0:  # it never came to the point of no return
            self._discard(incoming)
            return
        with self.lock:  # ours now, whatever happened since the claim
            self.machines[incoming.machine.vm.name] = incoming.machine
            self.busy.discard(incoming.machine.vm.name)

    def _discard(self, incoming: IncomingMigration) -> None:
        try:
            incoming.machine.dismantle()
            incoming.machine.emit("migration.discarded", migration=incoming.migration)
        finally:
            self.busy.discard(incoming.machine.vm.name)

    # ------------------------------------------------------------ tables

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
        return self.machines[vm]

    def log(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End every VM that is here."""
        for incoming in list(self.arriving.values()):
            incoming.machine.dismantle()
        for machine in list(self.machines.values()):
            machine.dismantle()


def own_memory_bytes() -> int:
    """This process's memory without shared memory, which is the guests' RAM (proc_pid_status(5))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return sum(int(values[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hosts.agent", description="The agent of one host.")
    for option in ("--plan", "--host", "--certificates", "--datastore", "--events", "--logs"):
        parser.add_argument(option, required=True)
    options = parser.parse_args()
    host = read_plan(options.plan).host(options.host)
    site = Site(
        host=host,
        datastore=LocalDatastore(Path(options.datastore)),
        events=EventLog(options.events, host.name),
        logs=Path(options.logs),
    )
    agent = Agent(site)
    gc.freeze()  # what is imported stays: a full collection of it takes 10 ms, some day in a downtime

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    context = control.tls_context(Path(options.certificates), host.name, server=True)
    listener = socket.create_server((host.vmotion_port.ip, protocol.PORT))
    threading.Thread(target=agent.accept_migrations, args=(listener,), name="vmotion-port", daemon=True).start()
    with control.ControlServer(host.management, context, agent.handle, agent.log) as server:
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
