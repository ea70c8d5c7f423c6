"""What the events of a migration say: every duration has one meaning and is computed here. Pure.

vm.suspending   the clock of the downtime starts, before anything is asked of the guest
  suspend       -> vm.suspended        gate shut, guest stopped, connections frozen
  residual      -> state.received      the last pages and, behind them, the device state cross the link
  state         -> sockets.restored    RAM checked against the source's digest, sockets restored
  claim         -> generation.claimed  the point of no return
  resume        -> vm.resumed          gate open, guest runs
downtime = vm.suspending -> vm.resumed = the sum of the parts

With post-copy, "residual" is the bitmap's way; the pages cross after the resume, until postcopy.end.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from topologies.errors import TestbedError
from topologies.events import Event, find

# part -> the event that ends it, in order; the first begins at vm.suspending
PARTS = {
    "suspend": "vm.suspended",
    "residual": "state.received",
    "state": "sockets.restored",
    "claim": "generation.claimed",
    "resume": "vm.resumed",
}


@dataclass(frozen=True)
class Timeline:
    """One completed migration. Times are ns on the run's monotonic clock, durations ms."""

    vm: str
    migration: str
    begun_ns: int
    suspending_ns: int
    suspended_ns: int
    resuming_ns: int
    resumed_ns: int
    total_ms: float  # rounds.begin -> vm.resumed, or the later postcopy.end
    downtime_ms: float
    parts_ms: dict[str, float]
    announced: int  # frames
    relearn_ms: float | None  # vm.resuming -> the switch's flows confirmed; None if the switch did not relearn
    relearn_cause: str | None


def timeline(events: Iterable[Event], migration: str, mac: str) -> Timeline:
    """The timeline of a completed migration; TestbedError if an event is missing."""
    events = list(events)
    mine = [event for event in events if event.get("migration") == migration]

    def at(kind: str) -> int:
        found = find(mine, kind)
        if not found:
            raise TestbedError(f"migration {migration}: no event {kind} was recorded; the run is incomplete")
        return int(found[0]["t"])

    suspending, resuming, resumed = at("vm.suspending"), at("vm.resuming"), at("vm.resumed")
    edges = [suspending, *(at(kind) for kind in PARTS.values())]
    parts = {part: (end - begin) / 1e6 for part, begin, end in zip(PARTS, edges, edges[1:], strict=False)}
    whole = find(mine, "postcopy.end")
    ended = int(whole[0]["t"]) if whole else resumed
    relearned = next((e for e in find(events, "mac.relearned", mac=mac) if e["t"] >= resuming), None)
    return Timeline(
        vm=str(mine[0]["vm"]),
        migration=migration,
        begun_ns=at("rounds.begin"),
        suspending_ns=suspending,
        suspended_ns=at("vm.suspended"),
        resuming_ns=resuming,
        resumed_ns=resumed,
        total_ms=(ended - at("rounds.begin")) / 1e6,
        downtime_ms=(resumed - suspending) / 1e6,
        parts_ms=parts,
        announced=sum(event["frames"] for event in find(mine, "announce.sent")),
        relearn_ms=(relearned["t"] - resuming) / 1e6 if relearned else None,
        relearn_cause=relearned["cause"] if relearned else None,
    )


@dataclass(frozen=True)
class Clock:
    """Meets the captures' CLOCK_REALTIME with the events' CLOCK_MONOTONIC: the run's two clock pairs."""

    begin: dict[str, int]
    end: dict[str, int]

    def to_monotonic(self, realtime_ns: int) -> int:
        """By the offset at the nearer end of the run; the other end tells how far the clocks drifted apart."""
        middle = (self.begin["realtime"] + self.end["realtime"]) // 2
        pair = self.begin if realtime_ns < middle else self.end
        return realtime_ns - pair["realtime"] + pair["monotonic"]

    @property
    def drift_us(self) -> float:
        """How much realtime gained on monotonic during the run (NTP slews it)."""
        return abs(_offset(self.end) - _offset(self.begin)) / 1000


def _offset(pair: dict[str, int]) -> int:
    return pair["realtime"] - pair["monotonic"]
