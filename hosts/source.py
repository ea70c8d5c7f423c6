"""An outgoing migration, phase by phase. Paused on success, resumed on failure.

greet         HELLO, WELCOME
precopy       rounds from the dirty bitmap until the policy says so
suspend       SUSPENDING; gate shut, guest stopped
residual      the pages written since the last round
hand_over     device state, TCP connections, digest of RAM
conclude      RESUMED: the VM is gone from here; silence: the datastore decides
"""

import time
from collections.abc import Callable

import msgspec
import numpy as np

from hosts.datastore import DatastoreError
from hosts.machine import Machine
from hosts.policy import Action, Decision, Policy, Round, decide
from hosts.protocol import MAJOR, MINOR, Hello, Kind, Resumed, State, negotiate
from hosts.ram import PAGE, PageHashes, count
from hosts.stream import Stream, StreamLost
from hosts.urgency import hurried
from topologies.errors import TestbedError

_TELL_EVERY_S = 0.1
# A source that cannot tell who owns the VM asks the datastore this often, and for so long.
_ASK_EVERY_S, _ASK_FOR_S = 0.5, 60.0


class MigrationFailed(TestbedError):
    """The migration ended; the message says why and where the VM is."""


class Progress(msgspec.Struct, frozen=True):
    """A round under way: `done_pages` of `pages` are sent; at its end its figures and what the policy made of them."""

    number: int
    pages: int
    done_pages: int
    round: Round | None = None
    predicted_downtime_ms: float | None = None
    decision: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """A completed migration as the source saw it. `residual_pages` were sent during the downtime."""

    rounds: list[Round]
    residual_pages: int
    bytes_on_wire: int
    predicted_downtime_ms: float
    source_digest: str
    destination_digest: str
    generation: int


class OutgoingMigration:
    """Moves `machine` over `stream`. `cancelled()` is asked until the switchover; `report` hears of each."""

    def __init__(
        self,
        machine: Machine,
        migration: str,
        stream: Stream,
        policy: Policy,
        report: Callable[[Progress], None],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.machine, self.migration, self.stream, self.policy = machine, migration, stream, policy
        self.report, self.cancelled = report, cancelled
        self.ram, self.bitmap = machine.guest.ram, machine.guest.bitmap
        self.hashes = PageHashes(self.ram)
        self.rounds: list[Round] = []
        self.decision: Decision
        self.residual_pages = 0
        self.digest = ""

    def run(self, token: str) -> Outcome:
        """MigrationFailed if the VM stays here (it runs again by then).

        Whatever the error, a bug of ours or a full disk included, the VM must run somewhere in the end.
        """
        try:
            self.greet(token)
            self.precopy()
        except Exception as error:
            self._give_up(error)
            raise MigrationFailed(f"VM {self.machine.vm.name} stays on {self._here}: {error}") from error
        try:
            with hurried():
                self.suspend()
                self.residual()
                self.hand_over()
                resumed: Resumed = self.stream.expect(Kind.RESUMED)
        except Exception as error:
            self._settle(error)
            resumed = Resumed(self.machine.generation + 1, "")
        return self.conclude(resumed)

    # ------------------------------------------------------------ the phases

    def greet(self, token: str) -> None:
        self.stream.send(Hello(MAJOR, MINOR, self.migration, token, self.ram.size))
        welcome = self.stream.expect(Kind.WELCOME)
        negotiate(welcome.major, welcome.minor)

    def precopy(self) -> None:
        self.started = time.monotonic()
        self.bitmap.begin(self.hashes)  # from here on, every write is a page to send again
        dirty = self.ram.populated()
        while True:
            self._round(dirty)
            self.decision = decide(self.policy, self.rounds, time.monotonic() - self.started)
            number, predicted_ms = len(self.rounds), self.decision.predicted_downtime_ms
            pages = count(dirty)
            self.report(Progress(number, pages, pages, self.rounds[-1], predicted_ms, self.decision.action.value))
            if self.cancelled():
                raise MigrationFailed("cancelled")
            if self.decision.action is Action.SWITCH:
                return
            if self.decision.action is Action.GIVE_UP:
                predicted = (
                    f"the predicted downtime is {predicted_ms:.0f} ms, the target {self.policy.downtime_ms:g} ms"
                )
                raise MigrationFailed(self._too_slow(predicted))
            dirty = self.bitmap.take()

    def _too_slow(self, why: str) -> str:
        remedy = "allow more time or downtime, or let the guest write less"
        return f"does not converge within {self.policy.timeout_s:g} s: {why}; {remedy}"

    def _round(self, dirty: np.ndarray) -> None:
        number, total, bytes_before = len(self.rounds) + 1, count(dirty), self.stream.bytes_sent
        told = time.monotonic()

        def between_chunks(done: int) -> None:
            nonlocal told
            if self.cancelled():
                raise MigrationFailed("cancelled")
            if time.monotonic() - self.started > self.policy.timeout_s:
                raise MigrationFailed(self._too_slow(f"round {number} has not ended"))
            if time.monotonic() - told >= _TELL_EVERY_S:
                told = time.monotonic()
                self.report(Progress(number, total, done))

        began = self._emit("round.begin", round=number)
        pages, zero = self._send(dirty, number, between_chunks)
        self.stream.mark(Kind.ROUND_END, number)
        self.stream.expect(Kind.ROUND_ACK)
        ended = time.monotonic_ns()
        remaining = count(self.bitmap.peek()) * PAGE
        figures = Round(pages, zero, self.stream.bytes_sent - bytes_before, (ended - began) / 1e6, remaining)
        self.rounds.append(figures)
        self._emit("round.end", round=number, **msgspec.structs.asdict(figures), t=ended)

    def _send(
        self, runs: np.ndarray, number: int, between_chunks: Callable[[int], None] = lambda done: None
    ) -> tuple[int, int]:
        copies = self.bitmap.needs_copies
        return self.stream.send_runs(self.ram, runs, number, self.hashes, between_chunks, copies=copies)

    def suspend(self) -> None:
        self._emit("vm.suspending")
        self.stream.mark(Kind.SUSPENDING, len(self.rounds) + 1)
        self.machine.announcer.silence()
        self.machine.port.shut()
        self._emit("gate.shut")
        self.device = self.machine.guest.suspend()
        self._emit("vm.suspended")

    def residual(self) -> None:
        dirty = self.bitmap.take()
        self.machine.guest.check()  # the kernel calls the pages of a process that has ended clean
        pages, _ = self._send(dirty, len(self.rounds) + 1)
        self.residual_pages = pages
        self._emit("residual.sent", pages=pages)

    def hand_over(self) -> None:
        self.digest = self.hashes.digest()
        self.stream.send(State(self.device, self.digest))
        self._emit("state.sent", bytes=len(self.device), ram_digest=self.digest)

    def conclude(self, resumed: Resumed) -> Outcome:
        self._emit("migration.handed_over", generation=resumed.generation)
        return Outcome(
            rounds=self.rounds,
            residual_pages=self.residual_pages,
            bytes_on_wire=self.stream.bytes_sent,
            predicted_downtime_ms=self.decision.predicted_downtime_ms,
            source_digest=self.digest,
            destination_digest=resumed.ram_digest,
            generation=resumed.generation,
        )

    # ------------------------------------------------------------ failure

    def _give_up(self, error: Exception) -> None:
        if isinstance(error, StreamLost) and self.stream.session.may("lost"):
            self.stream.session.step("lost")
        else:
            self.stream.abort(str(error))
        self._emit("migration.aborted", reason=str(error))

    def _settle(self, error: Exception) -> None:
        """After the suspend. Returns if the destination owns the VM; else resumes it here and raises."""
        session, machine = self.stream.session, self.machine
        if session.state == "suspended":
            self._give_up(error)
        elif session.state == "handed_over":
            session.step("lost")  # whatever happened: only its ABORT says that the destination has not claimed
            if not self._claim_back():
                session.step("claim lost")
                self._emit("migration.settled", owner="destination", reason=str(error))
                return
            session.step("claim")
            machine.generation += 1
        elif session.state == "done":  # it said RESUMED, and something of ours went wrong behind it
            return
        machine.port.open()
        machine.guest.run()
        self._emit("vm.resumed_at_source", generation=machine.generation)
        raise MigrationFailed(f"VM {machine.vm.name} runs again on {self._here}: {error}") from error

    def _claim_back(self) -> bool:
        """Take the next generation ourselves: if that succeeds the destination never can. Suspended until then."""
        datastore, vm, generation = self.machine.site.datastore, self.machine.vm.name, self.machine.generation + 1
        deadline = time.monotonic() + _ASK_FOR_S
        while True:
            try:
                if datastore.claim(vm, generation, self._here):
                    return True
                # an earlier try of ours may have succeeded without an answer
                newest = datastore.newest(vm)
                return newest is not None and (newest.generation, newest.host) == (generation, self._here)
            except DatastoreError as error:
                if time.monotonic() > deadline:
                    self.machine.owner_unknown = True
                    raise MigrationFailed(
                        f"VM {vm} stays suspended on {self._here}, its owner is unknown: {error}"
                    ) from error
                time.sleep(_ASK_EVERY_S)

    @property
    def _here(self) -> str:
        return self.machine.site.host.name

    def _emit(self, kind: str, **fields: object) -> int:
        return self.machine.emit(kind, migration=self.migration, **fields)
