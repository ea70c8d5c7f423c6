"""Breakpoints for fault experiments: a migration stops where it is told to, so that something can be done to it there.

    agent, at the manager's order       breakpoints.set("destination:restoring", 30)
    each session, at every step         breakpoints.entered("destination", "restoring")      stops

A breakpoint is a role and a state of the protocol's table (hosts/protocol.py). Like a debugger's it is off
unless asked for, and it works once. It holds only one side: the other one loses its patience after a while.
"""

import threading
from collections.abc import Callable

from hosts.protocol import TABLE
from topologies.errors import UsageError


class Breakpoints:
    """One host's; `reached` hears of a breakpoint (role:state) when something has stopped at it."""

    def __init__(self, reached: Callable[[str], object]) -> None:
        self._reached = reached
        self._at, self._seconds = "", 0.0
        self._go_on = threading.Event()

    def set(self, state: str, seconds: float) -> None:
        """Stop the next migration that enters `state`, for `seconds` at most."""
        known = {f"{role}:{end}" for role, table in TABLE.items() for row in table.values() for end in row.values()}
        if state not in known:
            raise UsageError(f"no migration enters {state!r}; the states are {', '.join(sorted(known))}")
        self._go_on.clear()
        self._at, self._seconds = state, seconds

    def clear(self) -> None:
        """Let go on what has stopped, and stop nothing more."""
        self._at = ""
        self._go_on.set()

    def entered(self, role: str, state: str) -> None:
        """A session is in this state now; returns when it may go on."""
        if self._at == f"{role}:{state}":
            at, self._at = self._at, ""
            self._reached(at)
            self._go_on.wait(self._seconds)
