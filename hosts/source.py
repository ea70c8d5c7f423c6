"""An outgoing migration, phase by phase. Paused on success, resumed on failure.

greet            HELLO, WELCOME; further connections
reserve          the destination makes room for the pages that exist
precopy          rounds until the policy says so (hosts/precopy.py); none for stop-and-copy and post-copy
suspend          SUSPENDING; gate shut, guest stopped

pre-copy's ending, stop-and-copy                        post-copy's ending
  residual       the pages written since                  list_missing   the bitmap of those pages
  hand_over      devices, TCP, digest of RAM              entrust        devices, TCP
                                                          serve          after RESUMED: the pages, until COMPLETE

conclude         RESUMED: the VM is gone from here; silence: the datastore decides
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Literal

import msgspec
import numpy as np

from hosts.datastore import DatastoreError, OwnerUnknown
from hosts.feed import Feed, end_round
from hosts.machine import Machine
from hosts.ownership import Lease
from hosts.pace import Pace
from hosts.policy import Action, Policy, Round
from hosts.postcopy import Server
from hosts.precopy import Cancelled, PreCopy, Progress
from hosts.protocol import (
    CHUNK_PAGES,
    MAJOR,
    MINOR,
    PLAIN,
    AllSent,
    Complete,
    Flag,
    Hello,
    Join,
    Kind,
    Resumed,
    State,
    encode_bitmap,
    negotiate,
)
from hosts.ram import PageHashes, chunks, count, mask_of, runs_of
from hosts.stream import Stream, StreamLost
from hosts.transport import Transport
from hosts.urgency import hurried
from topologies.errors import TestbedError

# A switchover that takes longer does not hurry: everything else would stand still
_HURRY_MS = 500.0
# Memory is found and cleared at some GB/s; in a virtual machine that has never used it before, far more slowly
_RESERVED_PER_S = 200e6
# A source that cannot tell who owns the VM asks the datastore this often, and for so long.
_ASK_EVERY_S, _ASK_FOR_S = 0.5, 60.0


class MigrationFailed(TestbedError):
    """The migration ended; the message says why and where the VM is."""


class VmLost(TestbedError):
    """The hosts lost each other while the VM needed both: it has to be started again."""


class PostCopy(msgspec.Struct, frozen=True):
    """Pages that crossed after the resume; `fault_us`: each wait of the guest for one, as the guest saw it."""

    pages: int
    ms: float
    faults: int
    fault_us: list[float]


class Outcome(msgspec.Struct, frozen=True):
    """A completed migration as the source saw it. `residual_pages` were sent during the downtime."""

    rounds: list[Round]
    residual_pages: int
    bytes_on_wire: int
    predicted_downtime_ms: float | None
    source_digest: str
    destination_digest: str
    generation: int
    zero_pages: int = 0
    stale_pages: int = 0  # of RAM as it was at the suspend, those that had another content when they were sent last
    throttles: list[float] = []
    packed: bool = False
    postcopy: PostCopy | None = None

    @property
    def digests_equal(self) -> bool:
        """Both hosts have hashed what has crossed, and to the same end."""
        return self.source_digest == self.destination_digest != ""


class OutgoingMigration:
    """Moves `machine`. `connect(role)` makes a connection to the destination; `report` hears of each step."""

    def __init__(
        self,
        machine: Machine,
        migration: str,
        connect: Callable[[str], Stream],
        policy: Policy,
        transport: Transport,
        report: Callable[[Progress], None],
    ) -> None:
        self.machine, self.migration = machine, migration
        self.policy, self.transport, self.report = policy, transport, report
        self.ram, self.bitmap = machine.guest.ram, machine.guest.bitmap
        self.hashes = PageHashes(self.ram)
        self.residual_pages = 0
        self.digest = ""
        self.postcopy: PostCopy | None = None
        self.left = False  # the VM is not this host's any more, however this migration ends
        self._connect = connect
        self._generation = machine.generation + 1  # the one that decides who runs the VM
        self._cancelled = threading.Event()
        self._claiming = threading.Lock()  # of the three below: a cancel claims in a thread of its own
        self._asked = False  # for that generation, by a cancel
        self._lease: Lease | None = None  # of that generation, if we have claimed it ourselves
        self._settled = False
        self._streams: list[Stream] = []  # the first is the main one
        self._precopy: PreCopy | None = None
        self._server: Server | None = None

    def cancel(self) -> None:
        """Give up, from another thread, at any moment before the point of no return; later nothing happens.

        Once the VM is handed over, who claims the next generation first decides which of the two it is.
        """
        self._cancelled.set()
        for stream in self._streams[:1]:
            state = stream.session.state
            if state in ("greeting", "round_ended") or (state in ("handed_over", "entrusted") and self._claim_first()):
                stream.interrupt()

    def _claim_first(self) -> bool:
        """For a cancel: the next generation is ours, and the destination can never have it. Not once all is settled."""
        with self._claiming:
            if self._lease is None and not self._settled:
                self._asked = True
                self._lease = self._claim()
            return self._lease is not None

    def run(self, token: str) -> Outcome:
        """MigrationFailed if the VM stays here (it runs again by then), VmLost if nobody can go on with it.

        Whatever the error, a bug of ours or a full disk included, the VM must run somewhere in the end.
        """
        with contextlib.ExitStack() as connections:
            try:
                self.greet(token, connections)
                self.reserve()
                self.precopy()
            except Exception as broken:
                error = self._explained(broken)
                self._give_up(error)
                said = self._said(error)
                raise MigrationFailed(f"VM {self.machine.vm.name} stays on {self._here}: {said}") from error
            try:
                with hurried() if self._short else contextlib.nullcontext():
                    self.suspend()
                    if self._by_postcopy:
                        self.list_missing()
                        self.entrust()
                    else:
                        self.residual()
                        self.hand_over()
                    resumed: Resumed = self.stream.expect(Kind.RESUMED)
            except Exception as error:
                self._settle(self._explained(error))
                resumed = Resumed(self._generation, "")
            self.left = True
            if self._server is not None:
                resumed = self.serve(self._server, resumed)
            return self.conclude(resumed)

    # ------------------------------------------------------------ the phases

    def greet(self, token: str, connections: contextlib.ExitStack) -> None:
        def connect(role: str) -> Stream:
            stream = connections.enter_context(self._connect(role))
            self._streams.append(stream)
            return stream

        def join(purpose: Literal["pages", "faults"]) -> Stream:
            stream = connect("sender")
            stream.send(Join(MAJOR, MINOR, self.migration, token, purpose))
            stream.expect(Kind.WELCOME)
            return stream

        self.stream = connect("source")
        self.stream.send(Hello(MAJOR, MINOR, self.migration, token, self.ram.size, self.policy.mode))
        welcome = self.stream.expect(Kind.WELCOME)
        negotiate(welcome.major, welcome.minor)
        lanes = [self.stream, *(join("pages") for _ in range(self.transport.streams - 1))]
        if self.transport.bandwidth_limit:
            for lane in lanes:
                lane.limit(self.transport.bandwidth_limit / len(lanes))
        copies = self.bitmap.needs_copies
        self.feed = Feed(self.ram, self.hashes, lanes, self.transport.compress, copies=copies)
        connections.callback(self.feed.close)
        self._faults = join("faults") if self.policy.may_postcopy else None

    def reserve(self) -> None:
        """Round 0: no page yet, but memory for each, so that none has to be found while the stream runs."""
        if self.policy.mode != "postcopy":  # there, what is not there yet is what has to be asked for
            self.stream.send_bitmap(encode_bitmap(mask_of(self.ram.populated(), self.ram.pages)), 0)
            with self.stream.patient(self.ram.size / _RESERVED_PER_S):
                end_round(self.stream, 0)

    def precopy(self) -> None:
        self._precopy = PreCopy(self.machine, self.migration, self.policy, self.feed, self.report, self._cancelled)
        decision = self._precopy.run()
        if decision.action is Action.GIVE_UP:
            raise MigrationFailed(self._too_slow())
        if self._by_postcopy and self._rounds.rounds:
            # the destination discards what has to come again, while the guest still runs
            self.stream.send_bitmap(encode_bitmap(self._rounds.still_due(self.bitmap.peek())), self._next_round)
            end_round(self.stream, self._next_round)

    def suspend(self) -> None:
        self.machine.hold()
        if self.machine.generation + 1 != self._generation:  # its vmx had to claim one: the destination's is gone
            raise MigrationFailed("its lease had lapsed meanwhile; try again")
        self._emit("vm.suspending")
        self.stream.mark(Kind.SUSPENDING, self._next_round, Flag.SHORT if self._short else PLAIN)
        self.machine.announcer.silence()
        self.machine.port.shut()
        self._emit("gate.shut")
        for stream in self._streams:
            stream.limit(None)  # a limit is for the time while the VM runs here
        self.device = self.machine.guest.suspend()
        self._emit("vm.suspended")

    def residual(self) -> None:
        """All that is left crosses while nothing runs."""
        left = runs_of(np.flatnonzero(self._left_at_suspend()))
        done, pace = 0, Pace()
        for chunk in chunks(left, CHUNK_PAGES):
            self._rounds.check_cancelled()
            self.feed.send(chunk, self._next_round)
            done += count(chunk)
            if pace.due():
                self._rounds.tell("switchover", self._next_round, count(left), done)
        self.feed.drain(self._next_round)
        self.residual_pages = done
        self._emit("residual.sent", pages=done)

    def hand_over(self) -> None:
        self._rounds.check_cancelled()
        self.digest = self.hashes.digest()
        self.stream.send(State(self.device, self.digest))
        self._emit("state.sent", bytes=len(self.device), ram_digest=self.digest)
        self._honour_cancel()

    def list_missing(self) -> None:
        self._missing = self._left_at_suspend()
        self.feed.drain(self._next_round)
        self.stream.send_bitmap(encode_bitmap(self._missing), self._next_round)
        self._emit("bitmap.sent", pages=int(self._missing.sum()))

    def entrust(self) -> None:
        self._rounds.check_cancelled()
        if self._faults is None:
            raise MigrationFailed("post-copy needs a connection for faults")
        # the guest's restoring touches pages already
        self._server = Server(self.ram, self._missing, self.hashes, self.stream, self._faults)
        digest = self.hashes.digest(without=self._missing)
        self.stream.send(State(self.device, digest))
        self._emit("state.sent", bytes=len(self.device), ram_digest=digest)
        self._honour_cancel()

    def serve(self, server: Server, resumed: Resumed) -> Resumed:
        """The VM runs elsewhere, and needs us until its RAM is whole there."""
        pages, began = int(self._missing.sum()), self._emit("postcopy.begin", generation=resumed.generation)
        if self.transport.bandwidth_limit:
            self.stream.limit(self.transport.bandwidth_limit)
        try:
            server.push(lambda left: self._rounds.tell("post-copy", pages=pages, done=pages - left))
            self.digest = self.hashes.digest()
            self.stream.send(AllSent(self.digest))
            complete: Complete = self.stream.expect(Kind.COMPLETE)
        except Exception as error:
            if self.stream.session.may("lost"):
                self.stream.session.step("lost")
            self._emit("vm.lost", reason=str(error))
            raise self._lost(error) from error
        finally:
            server.close()
        ended = self._emit("postcopy.end", pages=pages, faults=complete.faults)
        self.postcopy = PostCopy(pages, (ended - began) / 1e6, complete.faults, complete.fault_us)
        return msgspec.structs.replace(resumed, ram_digest=complete.ram_digest)

    def conclude(self, resumed: Resumed) -> Outcome:
        """The VM has left; its RAM is here as it was then, and tells whether the dirty bitmap missed a write."""
        self._emit("migration.handed_over", generation=resumed.generation)
        stale = count(self.hashes.differing(self.ram))
        return Outcome(
            rounds=self._rounds.rounds,
            residual_pages=self.residual_pages,
            bytes_on_wire=sum(stream.bytes_sent for stream in self._streams),
            predicted_downtime_ms=self._rounds.decision.predicted_downtime_ms,
            source_digest=self.digest,
            destination_digest=resumed.ram_digest,
            generation=resumed.generation,
            zero_pages=self.feed.zero,
            stale_pages=stale,
            throttles=self._rounds.throttles,
            packed=self.feed.packs,
            postcopy=self.postcopy,
        )

    # ------------------------------------------------------------ parts of phases

    def _honour_cancel(self) -> None:
        """One that came after the last look, and before there was a word of the destination's to be woken from."""
        if self._cancelled.is_set() and self._claim_first():
            raise Cancelled

    def _left_at_suspend(self) -> np.ndarray:
        left = self._rounds.still_due(self.bitmap.take())
        self.machine.guest.check()  # the kernel calls the pages of a process that has ended clean
        return left

    @property
    def _rounds(self) -> PreCopy:
        if self._precopy is None:
            raise MigrationFailed("no round has begun")
        return self._precopy

    @property
    def _next_round(self) -> int:
        return len(self._rounds.rounds) + 1

    @property
    def _by_postcopy(self) -> bool:
        return self._rounds.decision.action is Action.POSTCOPY

    @property
    def _short(self) -> bool:
        predicted_ms = self._rounds.decision.predicted_downtime_ms
        return predicted_ms is not None and predicted_ms <= _HURRY_MS

    # ------------------------------------------------------------ failure

    def _said(self, error: Exception) -> str:
        """A cancel may have broken a wait, which then looks like a lost connection."""
        return "cancelled" if self._cancelled.is_set() else str(error)

    def _explained(self, error: Exception) -> Exception:
        """A destination that goes says why; whoever sends hears only that it has gone."""
        if isinstance(error, StreamLost) and not self._cancelled.is_set() and self._streams:
            return self._streams[0].parting_word() or error
        return error

    def _too_slow(self) -> str:
        predicted_ms = self._rounds.decision.predicted_downtime_ms
        why = f"round {len(self._rounds.rounds)} has not ended"
        if predicted_ms is not None:
            why = f"the predicted downtime is {predicted_ms:.0f} ms, the target {self.policy.downtime_ms:g} ms"
        remedy = "allow more time or downtime, take another --timeout-strategy, or let the guest write less"
        return f"does not converge within {self.policy.timeout_s:g} s: {why}; {remedy}"

    def _lost(self, error: Exception) -> VmLost:
        name = self.machine.vm.name
        says = "if its new host does not run it, power it on again"
        return VmLost(f"VM {name} had left {self._here} before all of its RAM had: {error}; {says}")

    def _give_up(self, error: Exception) -> None:
        """Before the hand-over: the destination forgets the VM, which has its full speed again here."""
        for stream in self._streams[:1]:
            if isinstance(error, StreamLost) and not self._cancelled.is_set() and stream.session.may("lost"):
                stream.session.step("lost")
            else:
                stream.abort(self._said(error))
        self._restore_speed()
        self._emit("migration.aborted", reason=self._said(error))

    def _restore_speed(self) -> None:
        """Whatever becomes of it: a guest that has ended has no speed, and how the migration ended is to be told."""
        if self._precopy is not None:
            try:
                self._precopy.restore_speed()
            except TestbedError as error:
                self._emit("guest.not_heard", reason=str(error))

    def _settle(self, error: Exception) -> None:
        """After the suspend. Returns if the destination owns the VM; else resumes it here and raises."""
        session, machine = self.stream.session, self.machine
        with self._claiming:
            self._settled = True  # from here on no cancel claims
        if session.state in ("done", "serving"):  # it said RESUMED, and something of ours went wrong behind it
            return
        if session.state in ("handed_over", "entrusted"):
            session.step("lost")  # whatever happened: only its ABORT says that the destination has not claimed
            if not self._claim_back():
                session.step("claim lost")
                self.left = True
                self._emit("migration.settled", owner="destination", reason=str(error))
                if self._server is None:
                    return
                self._server.close()
                raise self._lost(error) from error
            session.step("claim")
        else:
            self._give_up(error)
            if self._asked:  # a claim without an answer may still show, and to our vmx it is another's
                self._claim_back()
        if self._server is not None:
            self._server.close()
        said, troubles = self._said(error), []
        self._emit("vm.resuming")
        for resume in self._ways_back():  # a VM without a network is better than none
            try:
                resume()
            except TestbedError as trouble:
                troubles.append(str(trouble))
        self._restore_speed()
        name, here = machine.vm.name, self._here
        if troubles:
            self._emit("vm.not_resumed", reason="; ".join(troubles))
            raise MigrationFailed(f"VM {name} stays on {here}: {said}; but {'; '.join(troubles)}") from error
        self._emit("vm.resumed_at_source", generation=machine.generation)
        raise MigrationFailed(f"VM {name} runs again on {here}: {said}") from error

    def _ways_back(self) -> list[Callable[[], object]]:
        """Under the generation that we had, or under the one that we have claimed instead of the destination."""
        machine, lease = self.machine, self._lease
        if lease is None:
            return [machine.go_on]
        return [lambda: machine.own(lease), machine.open_gate, machine.guest.run]

    def _claim_back(self) -> bool:
        """Take the next generation ourselves: if that succeeds the destination never can. Suspended until then."""
        deadline = time.monotonic() + _ASK_FOR_S
        while True:
            try:
                self._lease = self._lease or self._claim()
                return self._lease is not None
            except (DatastoreError, OwnerUnknown) as error:
                if time.monotonic() > deadline:
                    self.machine.unsettled = self._generation
                    stays = f"VM {self.machine.vm.name} stays suspended on {self._here}"
                    raise MigrationFailed(f"{stays} until it is known who owns it: {error}") from error
                time.sleep(_ASK_EVERY_S)

    def _claim(self) -> Lease | None:
        datastore, vm = self.machine.site.datastore, self.machine.vm.name
        lease = datastore.claim(vm, self._generation, self._here, patience_s=_ASK_EVERY_S)
        if lease is None:
            newest = datastore.newest(vm)
            if newest is not None and (newest.generation, newest.host) == (self._generation, self._here):
                return Lease.lapsed(self._generation)  # an earlier try of ours, which was not answered
        return lease

    @property
    def _here(self) -> str:
        return self.machine.site.host.name

    def _emit(self, kind: str, **fields: object) -> int:
        return self.machine.emit(kind, migration=self.migration, **fields)
