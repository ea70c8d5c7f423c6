"""The vmx of a VM: a process beside its guest that has its disk and keeps its lease.

    python -m hosts.vmx_process --vm vm1 --host esx1 --datastore WHERE --listener FD --disk FD --page FD --events FILE

It is in the host's network namespace, as the datastore is reached from there; the guest is not. Like the guest it
outlives the host's agent. Three threads, none of which waits for another's storage:

    main       the agent's orders; when the lease lapses, the gate is shut and the guest stands still
    keeper     pulses, and looks whether the generation is still the newest (hosts/ownership.py)
    disk       the guest's reads and writes, one after the other; a write is repeated until it has been done

What ends the guest ends its vmx, and the other way round: a VM without one of them is none.
"""

import argparse
import errno
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from hosts import channel
from hosts.datastore import Claim, Datastore, DatastoreError, DatastoreSilent, Keeper, OwnerUnknown, user_of
from hosts.disk_channel import DiskServer, Request
from hosts.gate import Gate
from hosts.lease_page import LeasePage
from hosts.ownership import PULSE_EVERY_S, Lease
from hosts.store import Store, StoreFile, StoreSilent, open_store
from hosts.vm_files import disk_path
from topologies.errors import TestbedError
from topologies.events import EventLog

# Of a call to the datastore. A pulse is sent half a second after the last one; if it is not answered, another half is
# left of the lease (RUN_S) for the next, which follows at once.
_CALL_TIMEOUT_S = 1.0
_CLAIM_PATIENCE_S = 5.0  # with a claim that is not answered; then the newest generation is looked at again
_AGAIN_AFTER_S = 0.1  # a write that was refused, or found no room


class Vmx:
    """One VM's. `lock` is of the four below it; a lease of None: it keeps nothing."""

    def __init__(self, vm: str, host: str, where: str, disk: socket.socket, page: LeasePage, events: EventLog) -> None:
        self.vm, self.host, self.page = vm, host, page
        self.lock = threading.Lock()
        self.lease: Lease | None = None
        self.held = False  # a switchover is under way: what becomes of the VM is the agent's to decide
        self.stalled = False  # its lease has lapsed, and it stands still
        self.gate: Gate | None = None
        self.guest = 0  # its pidfd
        self._own = threading.Event()
        self._drafted: set[str] = set()  # nonces of claims of its own
        self._events = events
        self._datastore = Datastore(open_store(where, _CALL_TIMEOUT_S))
        self._store: Store = open_store(where, _CALL_TIMEOUT_S)
        # the user who may write comes with the lease, and it is each write that is judged
        self._file: StoreFile = self._store.open(disk_path(vm), os.O_RDONLY | os.O_SYNC)
        self._user = 0
        self._server = DiskServer(disk)

    def emit(self, kind: str, **fields: Any) -> None:
        self._events.emit(kind, vm=self.vm, **fields)

    # ------------------------------------------------------------ main: the agent's orders, and the lapse

    def serve(self, listener: socket.socket) -> None:
        """For ever: the process ends with the guest."""
        for work in (self.keep, self.serve_disk):
            threading.Thread(target=_or_end, args=(work,), name=work.__name__, daemon=True).start()
        line: channel.Line | None = None
        while True:
            guest = [self.guest] if self.guest else []
            ready, _, _ = select.select([line or listener, *guest], [], [], self._until_lapse_s())
            self.stop_if_lapsed()
            if self.guest in ready:  # the disk's thread may be at a write that does not end
                os._exit(0)
            if not ready:
                continue
            try:
                if line is None:
                    line = channel.Line(listener.accept()[0])
                    line.send(channel.Serving(), descriptors=[self.page.fd])
                else:
                    self._obey(line)
                    self.stop_if_lapsed()
            except (EOFError, OSError, msgspec.MsgspecError):  # this agent is gone, or talks nonsense: the next one
                if line is not None:
                    line.close()
                line = None

    def _obey(self, line: channel.Line) -> None:
        number, request = line.receive()
        reply: channel.Message = channel.Done()
        try:
            self._do(request)
        except TestbedError as error:
            reply = channel.Failed(str(error))
        line.send(reply, number)

    def _do(self, request: channel.Message) -> None:
        with self.lock:
            match request:
                case channel.Own():
                    if self.gate is not None:
                        self.gate.close()
                    if not self.guest:
                        self.guest = os.pidfd_open(request.pid)
                    self.gate = Gate(self.vm, request.gate)
                    self.lease = Lease(request.generation, request.sent_s)
                    if self.held and self.lease.lasts(time.monotonic()):  # we may have shut it for the lease before
                        self.gate.open()
                    self.held = self.stalled = False
                    self._own.set()
                case channel.Hold():
                    self.held = True
                case channel.GoOn():
                    self.held = False
                    self._go_on()
                case _:
                    raise TestbedError(f"a vmx does not understand {type(request).__name__}")

    def _until_lapse_s(self) -> float | None:
        with self.lock:
            if self.lease is None:
                return None
            left_s = self.lease.until_s - time.monotonic()
            return left_s if left_s > 0 else PULSE_EVERY_S

    def stop_if_lapsed(self) -> None:
        with self.lock:
            if self.lease is None or self.gate is None or self.lease.lasts(time.monotonic()):
                return
            self.gate.shut()  # again and again: an agent that has just seen a lease may have opened it
            if not self.held and not self.stalled:
                self.stalled = True
                self.emit("vm.stalled", generation=self.page.generation)

    def _go_on(self) -> None:
        """With the lock: the VM runs, or stands still until there is a lease again."""
        if self.lease is None or self.gate is None:
            return
        if self.lease.lasts(time.monotonic()):
            if self.stalled:
                self.emit("vm.unstalled", generation=self.lease.generation)
            self.stalled = False
            self.page.grant(self.lease)
            self.gate.open()
        elif not self.stalled:
            self.stalled = True
            self.emit("vm.stalled", generation=self.lease.generation)

    # ------------------------------------------------------------ keeper

    def keep(self) -> None:
        keeper: Keeper | None = None
        while True:
            self._own.wait()
            with self.lock:
                lease = self.lease
                if lease is None:
                    self._own.clear()
                    continue
            began_s = time.monotonic()
            try:
                if keeper is None or keeper.claim.generation != lease.generation:
                    if keeper is not None:
                        before, keeper = keeper, None  # once: its descriptor may be another file's then
                        before.close()
                    keeper = Keeper(self._datastore, self.vm, lease.generation, self.host)
                    keeper.collect()
                self._pulse(keeper, lease)
                if keeper.mend_fence():
                    self.emit("fence.mended", generation=lease.generation)
            except (OSError, DatastoreError, OwnerUnknown) as error:
                self._not_answered(lease, error)
            time.sleep(max(0.0, began_s + PULSE_EVERY_S - time.monotonic()))

    def _pulse(self, keeper: Keeper, lease: Lease) -> None:
        sent_s = time.monotonic()
        newest = keeper.pulse()
        self._answered()
        if newest != lease.generation:
            self._overtaken(lease)
            return
        with self.lock:
            if self.lease is not lease:  # another one was given meanwhile
                return
            extended = lease.pulsed(sent_s, time.monotonic())
            if extended is not None:
                self.lease = extended
                if not self.held:
                    self.page.grant(extended)
                return
            held = self.held
        if not held:
            self._claim_next(lease)

    def _claim_next(self, lapsed: Lease) -> None:
        """The way back of an owner whose lease has lapsed, if nobody was faster (rule 4)."""
        draft = self._datastore.draft(self.vm, lapsed.generation + 1, self.host)
        if draft is not None:
            self._drafted.add(draft.claim.nonce)
        next_one = draft.take(_CLAIM_PATIENCE_S) if draft else None
        if next_one is None:
            self._overtaken(lapsed)
            return
        with self.lock:
            if self.lease is not lapsed:  # the agent has given it another one meanwhile
                return
            self.lease = next_one
            self.page.generation = next_one.generation
            self.emit("generation.claimed", generation=next_one.generation)
            if not self.held:
                self._go_on()

    def _overtaken(self, lease: Lease) -> None:
        """There is a newer generation: whose?"""
        newest = self._datastore.newest(self.vm)
        if newest is None or newest.generation <= lease.generation:
            raise DatastoreError(f"VM {self.vm}: a generation newer than {lease.generation} has come and gone")
        with self.lock:
            if self.lease is not lease:
                return
            if self.held:  # the destination of a migration, or an order of our agent's: if it is not, GoOn will show
                self.lease = Lease.lapsed(lease.generation)
            elif newest.nonce in self._drafted:  # our own, whose answer was lost; an agent's is for another guest
                self.lease = Lease.lapsed(newest.generation)
                self.page.generation = newest.generation
            else:
                self._end_fenced(newest)

    def _end_fenced(self, newest: Claim) -> None:
        """With the lock: the VM is another's. Its guest stands still already, unless clocks are mad."""
        self.page.revoke()
        if self.gate is not None:
            self.gate.shut()
        if self.guest:
            signal.pidfd_send_signal(self.guest, signal.SIGKILL)
        self.emit("vm.fenced", generation=newest.generation, owner=newest.host)
        os._exit(0)

    def _answered(self) -> None:
        if self.page.silent_since_ns:
            silent_ms = (time.monotonic_ns() - self.page.silent_since_ns) / 1e6
            self.page.silent_since_ns = 0
            self.emit("datastore.answers", silent_ms=silent_ms)

    def _not_answered(self, lease: Lease, error: Exception) -> None:
        if not self.page.silent_since_ns:
            self.page.silent_since_ns = time.monotonic_ns()
            self.emit("datastore.silent", reason=str(error))
        if not isinstance(error, StoreSilent | DatastoreSilent | OwnerUnknown):
            try:  # our lock file may be gone, long after others came
                if self._datastore.check(self.vm) > lease.generation:
                    self._overtaken(lease)
            except (OSError, DatastoreError):
                return  # it is silent indeed

    # ------------------------------------------------------------ disk

    def serve_disk(self) -> None:
        while True:
            try:
                request = self._server.next()
            except EOFError:  # the guest has ended
                os._exit(0)
            self._server.answer(self._done(request))

    def _done(self, request: Request) -> bytes:
        """Whatever it takes; a guest waits for a disk as long as it has to."""
        told = ""
        while True:
            try:
                if request.content is None:
                    return self._file.read(request.offset, request.length)
                self._be_the_owner()
                self._file.write(request.offset, request.content)
                self.page.full = False
                return b""
            except TimeoutError:  # the keeper tells of it
                continue
            except OSError as error:
                self.page.full = error.errno == errno.ENOSPC
                told = self._tell(told, error)
                time.sleep(_AGAIN_AFTER_S)

    def _tell(self, told: str, error: OSError) -> str:
        """Once for each kind of trouble with one request."""
        if self.held:  # the suspended guest of a VM that has left
            return told
        kind = {errno.EACCES: "disk.refused", errno.ENOSPC: "disk.full"}.get(error.errno or 0, "disk.failed")
        if kind != told:
            self.emit(kind, user=self._user, reason=str(error))
        return kind

    def _be_the_owner(self) -> None:
        user = user_of(self.page.generation)
        if user != self._user:
            self._store.act_as(user)
            self._user = user


def _or_end(work: Callable[[], None]) -> None:
    """A vmx that has lost one of its threads to a bug is no good: the VM ends with it, and says why."""
    try:
        work()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hosts.vmx_process", description="The vmx of one VM.")
    for option in ("--vm", "--host", "--datastore", "--events"):
        parser.add_argument(option, required=True)
    for option in ("--listener", "--disk", "--page"):
        parser.add_argument(option, required=True, type=int)
    options = parser.parse_args()
    listener = socket.socket(fileno=options.listener)
    home = Path(listener.getsockname())
    listener.listen()  # again: it is this process now that the other side sees (SO_PEERCRED, unix(7))
    disk, page = socket.socket(fileno=options.disk), LeasePage(options.page)
    try:
        events = EventLog(options.events, options.host)
        vmx = Vmx(options.vm, options.host, options.datastore, disk, page, events)
    except (OSError, TestbedError) as error:
        print(f"VM {options.vm}: no disk: {error}", file=sys.stderr)
        home.unlink(missing_ok=True)
        return 1
    vmx.serve(listener)
    return 0


if __name__ == "__main__":
    sys.exit(main())
