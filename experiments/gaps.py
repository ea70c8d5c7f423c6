"""Silences in what a probe received: the blackout of a migration, and the noise to compare it with (pure).

A probe's arrivals, with the end of its observation as a last point, cut the time that it watched into
silences: the intervals between neighbours. (An answer that never came is a silence up to the end of the
observation, not nothing.) A window is the migration's suspend and resume, which the events tell.

    blackout    the longest silence that overlaps [suspending, resumed + SETTLING], in its whole length:
                it may begin before the suspend (frames lost ahead of it) and end after the resume (RARP,
                relearning, a TCP retransmission time-out)
    baseline    the longest silence that overlaps no migration's window: the testbed's own noise

A silence (a, b) overlaps [s, e] if and only if a < e and s < b. All times are monotonic ns.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from topologies.errors import TestbedError

# What a migration does to a client after the resume: relearning takes milliseconds, a TCP retransmission
# 200 ms, the last RARP of QEMU's five leaves at 800 ms.
SETTLING_NS = 1_000_000_000


class Window(NamedTuple):
    """A migration's switchover."""

    suspending_ns: int
    resumed_ns: int


class Silence(NamedTuple):
    """From one arrival to the next."""

    begin_ns: int
    end_ns: int

    @property
    def length_ns(self) -> int:
        return self.end_ns - self.begin_ns

    @property
    def length_ms(self) -> float:
        return self.length_ns / 1e6

    def overlaps(self, window: Window) -> bool:
        return self.begin_ns < window.resumed_ns + SETTLING_NS and window.suspending_ns < self.end_ns


def silences(arrived_ns: Sequence[int], stopped_ns: int) -> Iterator[Silence]:
    """The silences of an observation: `arrived_ns` ascending, `stopped_ns` its end.

    Stragglers that arrive after `stopped_ns` count like other arrivals.
    """
    for begin, end in pairwise(arrived_ns):
        if begin > end:
            raise TestbedError(f"arrivals are not in order: {begin} ns before {end} ns")
        yield Silence(begin, end)
    if arrived_ns and arrived_ns[-1] < stopped_ns:
        yield Silence(arrived_ns[-1], stopped_ns)


def blackout(arrived_ns: Sequence[int], stopped_ns: int, window: Window) -> Silence:
    """The longest silence around one migration, the earliest of equals.

    TestbedError if the probe did not watch from the suspend to the resume: then it cannot tell.
    """
    if not arrived_ns or arrived_ns[0] > window.suspending_ns or max(arrived_ns[-1], stopped_ns) < window.resumed_ns:
        watched = f"{arrived_ns[0]} to {max(arrived_ns[-1], stopped_ns)} ns" if arrived_ns else "nothing"
        raise TestbedError(
            f"the probe watched {watched}, not the whole switchover {window.suspending_ns} to {window.resumed_ns} ns;"
            " start it earlier or stop it later"
        )
    return _longest(
        [silence for silence in silences(arrived_ns, stopped_ns) if silence.overlaps(window)], window.suspending_ns
    )


def baseline(arrived_ns: Sequence[int], stopped_ns: int, windows: Sequence[Window]) -> Silence:
    """The longest silence that no migration had a part in; of length 0 if there is none."""
    quiet = [s for s in silences(arrived_ns, stopped_ns) if not any(s.overlaps(window) for window in windows)]
    return _longest(quiet, stopped_ns)


def _longest(candidates: Sequence[Silence], instant_ns: int) -> Silence:
    return max(candidates, key=lambda silence: silence.length_ns, default=Silence(instant_ns, instant_ns))
