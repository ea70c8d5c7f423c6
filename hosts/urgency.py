"""Real-time priority for the few milliseconds of a switchover.

A hypervisor does not let other work delay the resume of a VM. Here all hosts share the machine's CPUs with
switch, controller, probes and captures, and a thread that wakes up may wait 10 ms and more for its turn.
Where the kernel or a container forbids it (EPERM), the switchover takes its turn like everybody else.
"""

import contextlib
import os
from collections.abc import Iterator

_PRIORITY = 10  # above the probes' 1


def hurry(pid: int = 0) -> None:
    """SCHED_FIFO for a process's main thread, 0 for the calling thread; what they start is not hurried."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(pid, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(_PRIORITY))


def relax(pid: int = 0) -> None:
    """Back to the ordinary scheduler."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(pid, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """The calling thread hurries for the length of the block."""
    hurry()
    try:
        yield
    finally:
        relax()
