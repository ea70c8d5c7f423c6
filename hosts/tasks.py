"""Tasks: migrations that were ordered, and the queue in which they wait for their turn.

    queued ---> running ---> success | error | cancelled

A host takes part in a limited number of migrations at a time, coming or leaving. Whoever is beyond that waits, and
nobody who came later takes a place that an earlier one waits for.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

import msgspec

from topologies.errors import TestbedError

# vSphere's limits for each host: 4 on a 1 Gbit/s vMotion network, 8 on a 10 Gbit/s one ("Limits on Simultaneous
# Migrations", vCenter Server and Host Management)
_FEW, _MANY = 4, 8
_FAST_BPS = 1_000_000_000

_Result = TypeVar("_Result")


def migrations_at_once(link: int) -> int:
    """For each host, by the rate of the vMotion link in bit/s; 0 is unshaped."""
    return _FEW if 0 < link <= _FAST_BPS else _MANY


def may_start(waiting: Sequence[Iterable[str]], running: Iterable[Iterable[str]], limit: int) -> list[int]:
    """Which of the waiting, each given by its hosts and in the order in which they came, may start now (indices).

    One that has to wait counts for its hosts as if it ran: so those after it cannot starve it.
    """
    load = Counter(host for hosts in running for host in hosts)
    chosen = []
    for index, hosts in enumerate(waiting):
        if all(load[host] < limit for host in hosts):
            chosen.append(index)
        load.update(hosts)
    return chosen


class Cancelled(TestbedError):
    """The task was cancelled before it began."""


class _Turn(Protocol):
    """What the queue has to know of a task."""

    hosts: tuple[str, ...]


class Queue:
    """Who waits, who runs."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._waiting: list[_Turn] = []
        self._running: list[_Turn] = []

    def join(self, task: _Turn) -> None:
        """At the end of the queue."""
        with self._changed:
            self._waiting.append(task)

    def await_turn(self, task: _Turn) -> None:
        """Until the task may start; Cancelled if it was taken out of the queue instead."""
        with self._changed:
            self._changed.wait_for(lambda: task not in self._waiting or task in self._next())
            if task not in self._waiting:
                raise Cancelled("cancelled while it was queued")
            self._waiting.remove(task)
            self._running.append(task)

    def leave(self, task: _Turn) -> None:
        """It is over, or does not want to wait any longer."""
        with self._changed:
            for those in (self._waiting, self._running):
                if task in those:
                    those.remove(task)
            self._changed.notify_all()

    def withdraw(self, task: _Turn) -> None:
        """Out of the queue, if it is still in there."""
        with self._changed:
            if task in self._waiting:
                self._waiting.remove(task)
                self._changed.notify_all()

    def _next(self) -> list[_Turn]:
        hosts = [task.hosts for task in self._waiting]
        return [self._waiting[index] for index in may_start(hosts, [task.hosts for task in self._running], self._limit)]


State = Literal["queued", "running", "success", "error", "cancelled"]


class TaskStatus(msgspec.Struct, frozen=True):
    """A task at one moment. `phase` to `throttle` as in its latest Progress (hosts/precopy.py); `message`: its end."""

    name: str
    state: State
    phase: str = ""
    round: int = 0
    bytes_sent: int = 0
    predicted_downtime_ms: float | None = None
    throttle: float = 0.0
    message: str = ""


class Task(Generic[_Result]):
    """`work(task)` is called when it is the task's turn; `stop()` makes it end early, if that is still possible."""

    def __init__(
        self,
        name: str,
        hosts: tuple[str, ...],
        queue: Queue,
        work: Callable[["Task[_Result]"], _Result],
        stop: Callable[["Task[_Result]"], None],
    ) -> None:
        self.name, self.hosts = name, hosts
        self.cancelled = False  # somebody wants it to be
        self.over = threading.Event()
        self._queue, self._work, self._stop = queue, work, stop
        self._status = TaskStatus(name, "queued")
        self._result: _Result
        self._error: BaseException | None = None
        queue.join(self)

    def run(self) -> None:
        """Wait for its turn and do the work, in this thread; how it ended is told by `wait` and `status`."""
        try:
            self._queue.await_turn(self)
            self._note(state="running")
            self._result = self._work(self)
            self._note(state="success")
        except BaseException as error:
            self._error = error
            self._note(state="cancelled" if self.cancelled else "error", message=str(error))
            if not isinstance(error, Exception):  # Ctrl-C is for the caller's thread
                raise
        finally:
            self._queue.leave(self)
            self.over.set()

    def status(self) -> TaskStatus:
        return self._status

    def cancel(self) -> None:
        """Let it end without effect, if it has not come to its point of no return."""
        self.cancelled = True
        self._queue.withdraw(self)
        if self._status.state == "running":
            self._stop(self)

    def wait(self, timeout_s: float | None = None) -> _Result:
        """Its result when it is over; raises what made it fail, TimeoutError if it is not over in time."""
        if not self.over.wait(timeout_s):
            raise TimeoutError(f"{self.name} is not over after {timeout_s:g} s")
        if self._error is not None:
            raise self._error
        return self._result

    def note_progress(self, progress: Any) -> None:
        predicted_ms = progress.predicted_downtime_ms
        self._note(
            phase=progress.phase,
            round=progress.number,
            bytes_sent=progress.bytes_sent,
            predicted_downtime_ms=self._status.predicted_downtime_ms if predicted_ms is None else predicted_ms,
            throttle=progress.throttle,
        )

    def _note(self, **fields: Any) -> None:
        self._status = msgspec.structs.replace(self._status, **fields)
