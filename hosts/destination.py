"""An incoming migration, phase by phase. Until the claim any failure ends with nothing left of the VM here.

prepare       RAM, guest process, namespace, dark port, announcement frames       (before the source starts)
greet         HELLO, WELCOME; further connections join
reserve       memory for the pages that the source has
receive       pages into RAM, an acknowledgement for every round; in a hurry from a SUSPENDING with SHORT on
restore       RAM checked against the source's digest, sockets restored
claim         the next generation on the datastore            <== POINT OF NO RETURN
resume        gate open, guest told to run, first announcement, RESUMED
fill          post-copy only: the pages named in the bitmap, those first that the guest waits for; COMPLETE
"""

import hmac
import secrets
import threading
import time
from collections.abc import Callable

import numpy as np

from hosts.datastore import Draft, OwnerUnknown
from hosts.machine import Machine
from hosts.ownership import Lease
from hosts.postcopy import Filler
from hosts.protocol import (
    MAJOR,
    MINOR,
    Complete,
    Flag,
    Header,
    Hello,
    Join,
    Kind,
    RemoteProtocolError,
    Resumed,
    State,
    Welcome,
    negotiate,
    parse_bitmap,
)
from hosts.ram import PageHashes, mask_of, pages_of, runs_of
from hosts.stream import PeerAborted, Stream, StreamLost
from hosts.transport import MAX_STREAMS
from hosts.urgency import hurry, relax
from topologies.errors import TestbedError

# A further connection whose round has ended is between two messages: it hears at once
_SEALED_WITHIN_S = 5.0
_MAX_WAITS_TOLD = 10_000
# Whether a claim that the datastore has not answered has succeeded; then the agent goes on asking
_ASK_FOR_S = 30.0


class IncomingFailed(TestbedError):
    """The VM did not come here; the message says why."""


class IncomingUnknown(TestbedError):
    """The VM is here, suspended, and the datastore does not say whose it is."""


class IncomingLost(TestbedError):
    """The VM had come, and cannot go on: it has to be started again."""


class IncomingMigration:
    """A VM that is to come: `machine` is built and dark; `token` lets its source in, encrypted or not."""

    def __init__(self, machine: Machine, migration: str, draft: Draft, encrypt: bool = False) -> None:
        """`draft`: of the generation under which it is to run here."""
        machine.guest.await_state()
        self.machine, self.migration, self.draft, self.encrypt = machine, migration, draft, encrypt
        self.token = secrets.token_hex(16)
        self.hashes = PageHashes(machine.guest.ram)
        ram = machine.guest.ram
        self._present = mask_of(ram.populated(), ram.pages)  # pages that exist here; the guest has looked at some
        self.resumed = False  # it runs here
        self.arrived = False  # it does, with all of its RAM
        self.ended = threading.Event()
        self.expiry = threading.Timer(0.0, lambda: None)
        self._refused = False
        self._lease: Lease
        self._main: Stream | None = None
        self._joining = threading.Condition()  # of the four below
        self._faults: Stream | None = None
        self._lanes: list[Stream] = []
        self._writers, self._sealed = 0, False
        self._filler: Filler | None = None
        self._missing: np.ndarray | None = None  # pages that are still to come when the VM is resumed

    def admits(self, token: str, encrypted: bool) -> bool:
        return hmac.compare_digest(self.token.encode(), token.encode()) and encrypted == self.encrypt

    def expire_after(self, seconds: float, expire: Callable[[str], None]) -> None:
        """Call `expire` then with the migration's name, unless `expiry` is cancelled.

        Not with this object: a cycle would keep its hashes until the collector comes by.
        """
        self.expiry = threading.Timer(seconds, expire, [self.migration])
        self.expiry.daemon = True
        self.expiry.start()

    def refuse(self) -> None:
        """From another thread: the VM shall not come, if it has not been claimed yet."""
        self._refused = True
        if self._main is not None and self.machine.generation == 0:
            self._main.interrupt()

    def run(self, stream: Stream, hello: Hello) -> None:
        """Until the VM runs here, with all of its RAM.

        IncomingFailed before the point of no return; nothing of it was seen outside. IncomingLost behind it.
        """
        self._main = stream
        try:
            self._run(stream, hello)
        finally:
            relax()
            for lane in self._lanes:
                lane.interrupt()
            if self._filler is not None:
                self._filler.close()

    def _run(self, stream: Stream, hello: Hello) -> None:
        try:
            self.greet(stream, hello)
            state = self.receive(stream)
            self.seal()
            self.restore(state)
            self.claim(stream)
        except OwnerUnknown as error:  # an ABORT would say that it cannot be ours
            if stream.session.may("lost"):
                stream.session.step("lost")
            if self._filler is None:  # else it cannot go on without the source, which has lost it
                self.machine.unsettled = self.draft.claim.generation
            raise IncomingUnknown(str(error)) from error
        except (TestbedError, OSError) as error:
            if not isinstance(error, StreamLost | PeerAborted):
                stream.abort(str(error))
            if stream.session.may("lost"):
                stream.session.step("lost")
            raise IncomingFailed(f"VM {self.machine.vm.name} did not come: {error}") from error
        try:
            self.resume(stream)
            if self._filler is not None:
                relax()
                self.fill(stream, self._filler)
            self.arrived = True
        except (TestbedError, OSError) as error:
            for event in ("lost", "stop"):
                if stream.session.may(event):
                    stream.session.step(event)
            raise IncomingLost(f"VM {self.machine.vm.name} came and cannot go on: {error}") from error

    # ------------------------------------------------------------ further connections

    def join(self, stream: Stream, join: Join) -> None:
        """One more connection of this migration, in a thread of its own; returns when it has ended."""
        negotiate(join.major, join.minor)
        if join.purpose == "faults":
            self._join_for_faults(stream)
        else:
            self._join_for_pages(stream)

    def _join_for_faults(self, stream: Stream) -> None:
        with self._joining:
            if self._faults is not None:
                raise RemoteProtocolError("a second connection for faults")
            self._faults = stream
        stream.send(Welcome(MAJOR, MINOR))
        self.ended.wait()  # its messages are the filler's

    def _join_for_pages(self, stream: Stream) -> None:
        with self._joining:
            if self._sealed or len(self._lanes) == MAX_STREAMS:
                raise RemoteProtocolError("one connection too many, or too late")
            self._lanes.append(stream)
            self._writers += 1
        try:
            stream.unlimited()  # the main connection tells whether the source is there
            stream.send(Welcome(MAJOR, MINOR))
            self._receive_lane(stream)
        finally:
            with self._joining:
                self._writers -= 1
                self._joining.notify_all()

    def _receive_lane(self, stream: Stream) -> None:
        while True:
            header, _ = stream.receive()
            if header.kind is Kind.ROUND_END:
                stream.mark(Kind.ROUND_ACK, header.round)
            else:
                self._receive_pages(stream, header)

    def seal(self) -> None:
        """Nothing more is written to RAM by further connections: from here on it is the guest's."""
        with self._joining:
            self._sealed = True
            for lane in self._lanes:
                lane.interrupt()
            if not self._joining.wait_for(lambda: not self._writers, _SEALED_WITHIN_S):
                raise RemoteProtocolError("a further connection is in the middle of a page when all should have come")

    # ------------------------------------------------------------ the phases

    def greet(self, stream: Stream, hello: Hello) -> None:
        version = negotiate(hello.major, hello.minor)
        if hello.ram_bytes != self.machine.guest.ram.size:
            raise RemoteProtocolError(
                f"{hello.ram_bytes} bytes of RAM announced, prepared {self.machine.guest.ram.size}"
            )
        stream.send(Welcome(*version))

    def receive(self, stream: Stream) -> State:
        ram = self.machine.guest.ram
        while True:
            header, body = stream.receive()
            match header.kind:
                case Kind.PAGES | Kind.ZERO:
                    self._receive_pages(stream, header)
                case Kind.ROUND_END:
                    stream.mark(Kind.ROUND_ACK, header.round)
                case Kind.BITMAP:
                    pages = parse_bitmap(bytes(stream.exactly(header.length)), ram.pages)
                    if header.round == 0:
                        self.reserve(pages)
                    else:
                        self.discard(pages)
                    if stream.session.state == "listed":
                        self.expect_missing(stream, pages)
                case Kind.SUSPENDING if Flag.SHORT in header.flags:
                    hurry()
                case Kind.STATE:
                    self._emit("state.received", state_bytes=header.length)
                    state: State = body
                    return state

    def _receive_pages(self, stream: Stream, header: Header) -> None:
        runs = stream.receive_pages(header, self.machine.guest.ram, self.hashes)
        self._present[pages_of(runs)] = True

    def reserve(self, coming: np.ndarray) -> None:
        """Memory for all pages that the source has, or an end before the first of them has crossed."""
        self.machine.guest.ram.populate(runs_of(np.flatnonzero(coming)))
        self._present |= coming

    def discard(self, missing: np.ndarray) -> None:
        """What has come in a round and is out of date must not exist, so that the guest waits for it."""
        stale = self._present & missing
        runs = runs_of(np.flatnonzero(stale))
        self.machine.guest.ram.punch(runs)
        self.hashes.note_zero(runs)
        self._present[stale] = False

    def expect_missing(self, stream: Stream, missing: np.ndarray) -> None:
        guest = self.machine.guest
        if self._faults is None:
            raise RemoteProtocolError("post-copy without a connection for faults")
        self._missing, userfaults = missing, guest.expect_missing()
        self._filler = Filler(guest.ram, missing, userfaults, self.hashes, stream, self._faults, guest.kill)
        self._emit("bitmap.received", pages=int(missing.sum()))

    def restore(self, state: State) -> None:
        self.digest = self.hashes.digest(without=self._missing)
        if self.digest != state.ram_digest:
            raise IncomingFailed(f"RAM differs: digest {self.digest} here, {state.ram_digest} at the source")
        self._emit("ram.verified", ram_digest=self.digest)
        self.machine.guest.restore(state.device)
        self._emit("sockets.restored")

    def claim(self, stream: Stream) -> None:
        """The point of no return: from the claim on the VM is ours, and the source will never resume it."""
        machine = self.machine
        if self._filler is not None:
            self._filler.check()
        if self._refused:
            raise IncomingFailed(f"{machine.site.host.name} is shutting down")
        machine.hold()  # is its vmx there? From here on it must be
        lease = self.draft.take(_ASK_FOR_S)
        if lease is None:
            stream.session.step("claim lost")
            raise IncomingFailed(f"generation {self.draft.claim.generation} was claimed by another host first")
        machine.vmx.page.grant(lease)
        stream.session.step("claim")
        self._lease = lease
        self._emit("generation.claimed", generation=lease.generation)

    def resume(self, stream: Stream) -> None:
        machine = self.machine
        machine.own(self._lease)
        now_ns = time.monotonic_ns()  # not later: if its lease ends now, it has been resumed before it stands still
        stalled = not machine.open_gate()
        self._emit("vm.resuming", t=now_ns, stalled=stalled)
        # the guest's thaw and the switch's relearning run side by side
        machine.guest.run(meanwhile=lambda: machine.announcer.start(self._announced))
        self._emit("vm.resumed")
        self.resumed = True
        stream.session.step("resume")
        try:
            stream.send(Resumed(machine.generation, self.digest))
        except StreamLost as error:  # the source asks the datastore then
            if self._filler is not None:
                raise
            self._emit("migration.unheard", reason=str(error))

    def fill(self, stream: Stream, filler: Filler) -> None:
        """RAM becomes whole while the VM runs."""
        expected = filler.receive()
        if expected is None:
            stream.session.step("whole")
        waits_us = self.machine.guest.missing_over()
        digest = self.hashes.digest()
        self._emit("ram.whole", ram_digest=digest, source_digest=expected, faults=filler.asked)
        try:
            stream.send(Complete(digest, filler.asked, waits_us[:_MAX_WAITS_TOLD]))
        except StreamLost as error:
            stream.session.step("lost")
            self._emit("migration.unheard", reason=str(error))

    def _announced(self, number: int, mode: str, frames: int) -> None:
        self._emit("announce.sent", round=number, mode=mode, frames=frames)

    def _emit(self, kind: str, **fields: object) -> int:
        return self.machine.emit(kind, migration=self.migration, **fields)
