"""Pre-copy: rounds from the dirty bitmap, until the policy says how to end them.

A round is a sweep over RAM, in stretches; each is taken from the bitmap just before it is sent, so that what the
guest has written until then crosses once and not twice. Between two chunks a round can be broken off, slowed by a
throttle of the guest, or cancelled.
"""

import threading
import time
from collections.abc import Callable

import msgspec
import numpy as np

from hosts.feed import Feed
from hosts.machine import Machine
from hosts.pace import Pace
from hosts.policy import (
    Action,
    Decision,
    Period,
    Policy,
    Round,
    after_round,
    before_rounds,
    next_throttle,
    within_round,
)
from hosts.protocol import CHUNK_PAGES
from hosts.ram import NO_RUNS, PAGE, chunks, count, mask_of, runs_from, runs_of
from topologies.errors import TestbedError

# How long the guest is watched before the policy is asked again within a round (QEMU's periods are about 1 s)
_PERIOD_S = 0.5
# Stretches with less to send would cost more than they save.
_STRETCH_BYTES, _MAX_STRETCHES = 4 << 20, 64


class Progress(msgspec.Struct, frozen=True):
    """Where a migration is: `done_pages` of `pages` of round `number` are sent; at its end its figures."""

    phase: str  # "round", "switchover", "post-copy"
    number: int = 0
    pages: int = 0
    done_pages: int = 0
    bytes_sent: int = 0
    round: Round | None = None
    predicted_downtime_ms: float | None = None
    decision: str = ""
    throttle: float = 0.0


class Cancelled(TestbedError):
    """Somebody has changed his mind."""

    def __init__(self) -> None:
        super().__init__("cancelled")


class PreCopy:
    """The rounds of one migration, their pages by `feed`; Cancelled once `cancelled` is set."""

    def __init__(
        self,
        machine: Machine,
        migration: str,
        policy: Policy,
        feed: Feed,
        report: Callable[[Progress], None],
        cancelled: threading.Event,
    ) -> None:
        self.machine, self.migration, self.policy, self.feed = machine, migration, policy, feed
        self.ram, self.bitmap = machine.guest.ram, machine.guest.bitmap
        self.rounds: list[Round] = []
        self.throttles: list[float] = []
        self.decision = Decision(Action.CONTINUE)
        self._report, self._cancelled = report, cancelled
        self._owed = NO_RUNS  # due in a round that was broken off
        self._taken = 0  # pages that were dirty when they were taken from the bitmap

    def run(self) -> Decision:
        """Rounds until the decision is another than CONTINUE."""
        self._began, self._pace = time.monotonic(), Pace()
        self._emit("rounds.begin", mode=self.policy.mode)
        self.bitmap.begin(self.feed.hashes)  # from here on, every write is a page to send again
        # what comes into existence from here on is dirty
        self._existed = mask_of(self.ram.populated(), self.ram.pages)
        self.decision = before_rounds(self.policy)
        if self.decision.action is not Action.CONTINUE:
            self._owed = runs_of(np.flatnonzero(self._existed))
        due = int(self._existed.sum())
        while self.decision.action in (Action.CONTINUE, Action.THROTTLE):
            self._round(due)
            self.check_cancelled()
            due = self.rounds[-1].remaining_bytes // PAGE
        return self.decision

    def still_due(self, dirty: np.ndarray) -> np.ndarray:
        """A boolean for each page: dirty, or owed from a round that was broken off."""
        mask = mask_of(dirty, self.ram.pages)
        return mask | mask_of(self._owed, self.ram.pages) if len(self._owed) else mask

    def restore_speed(self) -> None:
        """The guest stays here: it gets all of its virtual CPU back."""
        if self.throttle:
            self._slow_down(0.0)

    @property
    def throttle(self) -> float:
        """The share of its time that the guest is kept from running."""
        return self.throttles[-1] if self.throttles else 0.0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def tell(self, phase: str, number: int = 0, pages: int = 0, done: int = 0, figures: Round | None = None) -> None:
        predicted_ms, said = self.decision.predicted_downtime_ms, self.decision.action.value if figures else ""
        sent = self.feed.bytes_sent
        self._report(Progress(phase, number, pages, done, sent, figures, predicted_ms, said, self.throttle))

    # ------------------------------------------------------------ a round

    def _round(self, due: int) -> None:
        number, bytes_before = len(self.rounds) + 1, self.feed.bytes_sent
        sent, zero = self.feed.sent, self.feed.zero
        self.feed.begin_round(due)
        began = self._emit("round.begin", round=number)
        broken_off = self._sweep(number, due)
        # also of a round that was broken off: what waits in the host would lengthen the downtime
        self.feed.flush(number)
        ended = time.monotonic_ns()
        remaining = int(self.still_due(self.bitmap.peek()).sum()) * PAGE
        pages, zero_pages = self.feed.sent - sent, self.feed.zero - zero
        figures = Round(pages, zero_pages, self.feed.bytes_sent - bytes_before, (ended - began) / 1e6, remaining)
        self.rounds.append(figures)
        self._emit("round.end", round=number, **msgspec.structs.asdict(figures), t=ended)
        self.decision = broken_off or after_round(self.policy, self.rounds, self.elapsed_s, self.throttle)
        if self.decision.action is Action.THROTTLE:
            self._slow_down(next_throttle(self.throttle))
        self.tell("round", number, due, due, figures)

    def _sweep(self, number: int, due: int) -> Decision | None:
        """Send what is dirty, in round 1 all that exists. A Decision if the round was broken off."""
        stretches = max(1, min(_MAX_STRETCHES, due * PAGE // _STRETCH_BYTES))
        step = -(-self.ram.pages // stretches)
        done, watch = 0, _Watch(self)
        for first in range(0, self.ram.pages, step):
            end = min(first + step, self.ram.pages)
            dirty = self.bitmap.take(first, end)
            self._taken += count(dirty)
            todo = self._all_of(first, end, dirty) if number == 1 else dirty
            for chunk in chunks(todo, CHUNK_PAGES):
                decision = self._between_chunks(watch, number, due, done)
                if decision is not None:
                    self._owe(todo, int(chunk[0, 0]), end, number)
                    return decision
                self.feed.send(chunk, number)
                done += count(chunk)
        return None

    def _all_of(self, first: int, end: int, dirty: np.ndarray) -> np.ndarray:
        """Round 1: the pages of a stretch that existed when it began, and those that came into being since."""
        mask = self._existed[first:end] | mask_of(dirty - np.uint32(first), end - first)
        return runs_of(np.flatnonzero(mask) + first)

    def _owe(self, todo: np.ndarray, first: int, end: int, number: int) -> None:
        """What this round leaves undone; in later rounds what lies behind `end` is still in the bitmap."""
        rest = [runs_from(todo, first)]
        if number == 1 and end < self.ram.pages:
            rest.append(runs_of(np.flatnonzero(self._existed[end:]) + end))
        self._owed = np.concatenate(rest)

    def _between_chunks(self, watch: "_Watch", number: int, due: int, done: int) -> Decision | None:
        self.check_cancelled()
        if self._pace.due():
            self.tell("round", number, due, done)
        if not watch.period_over():
            return None
        decision = within_round(self.policy, watch.periods, self.elapsed_s, self.throttle)
        match decision.action:
            case Action.CONTINUE:
                return None
            case Action.THROTTLE:
                self._slow_down(next_throttle(self.throttle))
                return None
        return decision

    def check_cancelled(self) -> None:
        """Cancelled if somebody wants it; up to the hand-over."""
        if self._cancelled.is_set():
            raise Cancelled

    def total_dirtied_bytes(self) -> int:
        """All that was dirty since the first round began, counted again each time that it was written again."""
        return (self._taken + count(self.bitmap.peek())) * PAGE

    def _slow_down(self, share: float) -> None:
        self.machine.guest.throttle(share)
        self.throttles.append(share)
        self._emit("guest.throttled", share=share)

    def _emit(self, kind: str, **fields: object) -> int:
        return self.machine.emit(kind, migration=self.migration, **fields)


class _Watch:
    """Periods of one round: what was sent and what was dirtied in each."""

    def __init__(self, precopy: PreCopy) -> None:
        self._precopy = precopy
        self.periods: list[Period] = []
        self._began = time.monotonic()
        self._sent, self._dirtied = precopy.feed.bytes_sent, precopy.total_dirtied_bytes()

    def period_over(self) -> bool:
        if time.monotonic() - self._began < _PERIOD_S:
            return False
        sent, dirtied = self._precopy.feed.bytes_sent, self._precopy.total_dirtied_bytes()
        self.periods.append(Period(sent - self._sent, dirtied - self._dirtied))
        self._began, self._sent, self._dirtied = time.monotonic(), sent, dirtied
        return True
