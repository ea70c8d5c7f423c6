"""When to switch over: a pure function of the rounds so far.

The VM is suspended when what is still dirty would cross within the downtime target *and* another
round would not leave much less: a round costs the guest nothing, the suspend does.
"""

from dataclasses import dataclass
from enum import Enum

import msgspec

# What suspend, device state, claim and resume take beside the residual pages; measured 6-10 ms on two busy CPUs.
FIXED_MS = 8.0
# A round is worth another while it leaves less than this share of the least that any before it left. One that does
# not may be a hiccup of the machine; two in a row are the guest's own rate.
_WORTH_IT, _PATIENCE = 0.75, 2
# Below this, sending the rest costs less than the round trip of one more round.
_FLOOR_BYTES = 256 * 1024
# Rates from shorter rounds say more about the round trip than about the link.
_MEASURABLE_BYTES = 1 << 20


class Policy(msgspec.Struct, frozen=True):
    """`downtime_ms`: the longest downtime aimed at; `timeout_s`: when pre-copy is given up."""

    downtime_ms: float = 50.0
    timeout_s: float = 120.0


class Round(msgspec.Struct, frozen=True):
    """One pre-copy round. `bytes` crossed the link in `ms`; `remaining_bytes` were dirty at its end."""

    pages: int
    zero_pages: int
    bytes: int
    ms: float
    remaining_bytes: int


class Action(Enum):
    CONTINUE = "another round"
    SWITCH = "switch over"
    GIVE_UP = "does not converge"


@dataclass(frozen=True)
class Decision:
    action: Action
    predicted_downtime_ms: float


def bandwidth(rounds: list[Round]) -> float:
    """Bytes per second, from the rounds long enough to tell, or from all if none was; 0 if nothing was sent."""
    long = [r for r in rounds if r.bytes >= _MEASURABLE_BYTES] or rounds
    total_ms = sum(r.ms for r in long)
    return sum(r.bytes for r in long) / total_ms * 1000 if total_ms else 0.0


def _shrinking(rounds: list[Round]) -> bool:
    """Did one of the last rounds leave clearly less than every round before them? Yes as long as there are too few."""
    left = [r.remaining_bytes for r in rounds]
    return len(left) <= _PATIENCE or min(left[-_PATIENCE:]) < min(left[:-_PATIENCE]) * _WORTH_IT


def decide(policy: Policy, rounds: list[Round], elapsed_s: float) -> Decision:
    """What to do after the last of `rounds`, `elapsed_s` after the first began."""
    left = rounds[-1].remaining_bytes
    rate = bandwidth(rounds)
    if left == 0:
        predicted_ms = FIXED_MS
    else:
        predicted_ms = left / rate * 1000 + FIXED_MS if rate else float("inf")
    if predicted_ms <= policy.downtime_ms and (left <= _FLOOR_BYTES or not _shrinking(rounds)):
        return Decision(Action.SWITCH, predicted_ms)
    if elapsed_s >= policy.timeout_s:
        # out of time: good enough is good enough, the rest is given up
        return Decision(Action.SWITCH if predicted_ms <= policy.downtime_ms else Action.GIVE_UP, predicted_ms)
    return Decision(Action.CONTINUE, predicted_ms)
