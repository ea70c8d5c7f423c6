"""A program that runs beside an experiment: started, awaited until it says that it is up, stopped, never left behind.

The parent's side is `Child`. The child's side, for programs of ours, is `say_ready` and `Stop`: it writes the line
`ready`, works until SIGTERM, then finishes and exits 0; or it says in one line on stderr why not, and exits 1.
Output goes to a log file, whose last line is what an error message quotes.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from topologies.errors import TestbedError

# popen(list of words, **keywords of subprocess.Popen) starts a program somewhere: `subprocess.Popen` here,
# Mininet's `node.popen` in the node's namespace. The process it returns must be the program itself: with
# `mnexec -d` that holds as long as the caller asks for no new session or process group.
Popen = Callable[..., "subprocess.Popen[Any]"]

READY = "ready"
_LOOK_EVERY_S = 0.005


class Child:
    """One program that we started and therefore own."""

    def __init__(self, name: str, popen: Popen, words: list[str], log: Path, cwd: Path) -> None:
        self.name = name
        self._log = log
        with open(log, "wb") as output:
            self.process = popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=cwd)

    def said(self) -> list[str]:
        """The lines it has written so far."""
        return self._log.read_text(errors="replace").splitlines()

    def finish(self, number: signal.Signals) -> None:
        """Ask it to end; `wait` says whether it did."""
        self.process.send_signal(number)

    def wait(self, deadline: float) -> None:
        """Return when it has ended well; TestbedError if it failed or the deadline (monotonic, s) passes."""
        try:
            status = self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TestbedError(f"{self.name} did not end in time: {self.last_words()}") from None
        if status:
            raise TestbedError(f"{self.name} ended with status {status}: {self.last_words()}")

    def kill(self) -> None:
        """End it whatever state it is in, and reap it."""
        self.process.kill()
        self.process.wait()

    def last_words(self) -> str:
        """For an error message."""
        lines = [line for line in self.said() if line.strip()]
        if len(lines) > 1 and lines[-1].startswith("("):  # dumpcap's second line gives the reason for the first
            return f"{lines[-2]} {lines[-1]}"
        return lines[-1] if lines else "it said nothing"


def wait_until_up(children: Sequence[Child], prefix: str, deadline: float) -> None:
    """Return when each child has written a line with this prefix.

    TestbedError as soon as one has ended instead, or when the deadline (monotonic, s) passes.
    """
    waiting = list(children)
    while True:
        waiting = [child for child in waiting if not any(line.startswith(prefix) for line in child.said())]
        if not waiting:
            return
        for child in waiting:
            status = child.process.poll()
            if status is not None:
                raise TestbedError(f"{child.name} ended with status {status} before it was up: {child.last_words()}")
        if time.monotonic() > deadline:
            raise TestbedError(f"{waiting[0].name} did not come up in time: {waiting[0].last_words()}")
        time.sleep(_LOOK_EVERY_S)


def wait_until(child: Child, is_up: Callable[[], bool], deadline: float) -> None:
    """The same of one child whose being up shows otherwise than by a line."""
    while not is_up():
        status = child.process.poll()
        if status is not None:
            raise TestbedError(f"{child.name} ended with status {status} before it was up: {child.last_words()}")
        if time.monotonic() > deadline:
            raise TestbedError(f"{child.name} did not come up in time: {child.last_words()}")
        time.sleep(_LOOK_EVERY_S)


@contextmanager
def prompt() -> Iterator[None]:
    """The block's wake-ups are prompt: it runs at the lowest real-time priority.

    An emulated client shares its CPUs with the hypervisors, a real one does not. Under load this keeps 99 % of
    wake-ups within 0.1 ms, instead of 9 ms. For small work only: equal priorities do not preempt each other.
    """
    with suppress(PermissionError):  # some containers forbid it; the measurements are then as noisy as the machine
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def say_ready() -> None:
    print(READY, flush=True)


class Stop:
    """SIGTERM, noted: `at_ns` (monotonic) is 0 until it has come."""

    def __init__(self) -> None:
        self.at_ns = 0
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the experiment's, which then ends us

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.at_ns = self.at_ns or time.monotonic_ns()

    def wait(self) -> None:
        while not self.at_ns:
            time.sleep(_LOOK_EVERY_S)
