"""When to switch over, and how: pure functions of what has happened so far.

The VM is suspended when what is still dirty would cross within the downtime target *and* another
round would not leave much less: a round costs the guest nothing, the suspend does.

A guest that writes faster than the link carries never gets there. Then, by mode and strategy:

    --mode hybrid                     post-copy takes over as soon as that shows, within a round too
    --timeout-strategy, after --timeout-s:
        cancel                        the VM stays where it is
        switch                        suspend now, however long the rest takes
        throttle                      the guest is slowed, 20 %, then 10 % more at a time, up to 99 %, until it
                                      converges (QEMU's auto-converge; vSphere's stun during page send)
        postcopy                      post-copy takes over
"""

from dataclasses import dataclass
from enum import Enum
from typing import Literal

import msgspec

MODES = ("precopy", "postcopy", "stop-and-copy", "hybrid")
STRATEGIES = ("cancel", "switch", "throttle", "postcopy")

# What suspend, device state, claim and resume take beside the residual pages; measured 6-10 ms on two busy CPUs.
FIXED_MS = 8.0
# A round is worth another while it leaves less than this share of the least that any before it left. One that does
# not may be a hiccup of the machine; two in a row are the guest's own rate.
_WORTH_IT, _PATIENCE = 0.75, 2
# Below this, sending the rest costs less than the round trip of one more round.
_FLOOR_BYTES = 256 * 1024
# Rates from shorter rounds say more about the round trip than about the link.
_MEASURABLE_BYTES = 1 << 20
# Of what is sent, the share that is written again meanwhile above which rounds get nowhere (QEMU's, for throttling);
# and above which a guest that is being throttled is slowed further, so that all rounds together take a third more at
# most than the first one.
_HOPELESS, _SLOW = 0.5, 0.25
THROTTLE_FIRST, THROTTLE_STEP, THROTTLE_MOST = 0.20, 0.10, 0.99  # QEMU's defaults


class Policy(msgspec.Struct, frozen=True):
    """`downtime_ms`: the longest downtime aimed at; `timeout_s`: when the strategy takes over from plain pre-copy."""

    downtime_ms: float = 50.0
    timeout_s: float = 120.0
    mode: Literal["precopy", "postcopy", "stop-and-copy", "hybrid"] = "precopy"
    timeout_strategy: Literal["cancel", "switch", "throttle", "postcopy"] = "cancel"

    @property
    def aims_at_downtime(self) -> bool:
        """Or is the VM suspended however long the rest takes?"""
        return self.mode != "stop-and-copy" and self.timeout_strategy != "switch"

    @property
    def may_postcopy(self) -> bool:
        return self.mode in ("postcopy", "hybrid") or self.timeout_strategy == "postcopy"


class Round(msgspec.Struct, frozen=True):
    """One pre-copy round. `bytes` crossed the link in `ms`; `remaining_bytes` were dirty at its end."""

    pages: int
    zero_pages: int
    bytes: int
    ms: float
    remaining_bytes: int


class Period(msgspec.Struct, frozen=True):
    """A stretch of a round: what was sent, and how much more was dirty at its end than at its beginning."""

    sent_bytes: int
    dirtied_bytes: int

    def exceeds(self, share: float) -> bool:
        return self.dirtied_bytes > self.sent_bytes * share


class Action(Enum):
    CONTINUE = "another round"
    SWITCH = "switch over"
    POSTCOPY = "post-copy"
    THROTTLE = "throttle"
    GIVE_UP = "does not converge"


@dataclass(frozen=True)
class Decision:
    """`predicted_downtime_ms` if the VM were suspended now; None as long as nothing is known of the link."""

    action: Action
    predicted_downtime_ms: float | None = None


def bandwidth(rounds: list[Round]) -> float:
    """Bytes per second, from the rounds long enough to tell, or from all if none was; 0 if nothing was sent."""
    long = [r for r in rounds if r.bytes >= _MEASURABLE_BYTES] or rounds
    total_ms = sum(r.ms for r in long)
    return sum(r.bytes for r in long) / total_ms * 1000 if total_ms else 0.0


def predict_ms(remaining_bytes: int, rate: float) -> float:
    """The downtime with so much to send at `rate` bytes per second."""
    if remaining_bytes == 0:
        return FIXED_MS
    return remaining_bytes / rate * 1000 + FIXED_MS if rate else float("inf")


def before_rounds(policy: Policy) -> Decision:
    """Are there any?"""
    if policy.mode == "stop-and-copy":
        return Decision(Action.SWITCH)
    if policy.mode == "postcopy":
        return Decision(Action.POSTCOPY, FIXED_MS)
    return Decision(Action.CONTINUE)


def after_round(policy: Policy, rounds: list[Round], elapsed_s: float, throttle: float) -> Decision:
    """What to do after the last of `rounds`, `elapsed_s` after the first began, the guest slowed by `throttle`."""
    last = rounds[-1]
    predicted_ms = predict_ms(last.remaining_bytes, bandwidth(rounds))
    fits = predicted_ms <= policy.downtime_ms
    small = last.remaining_bytes <= _FLOOR_BYTES
    share = _SLOW if throttle else _HOPELESS
    hopeless = last.remaining_bytes > last.bytes * share or not _shrinking(rounds)
    if fits and (small or not _shrinking(rounds)):
        action = Action.SWITCH
    elif policy.mode == "hybrid" and hopeless:
        action = Action.SWITCH if fits else Action.POSTCOPY
    elif elapsed_s < policy.timeout_s:
        action = Action.CONTINUE
    elif fits:
        action = Action.SWITCH  # out of time: good enough is good enough
    else:
        action = _at_timeout(policy, hopeless, throttle)
    return Decision(action, FIXED_MS if action is Action.POSTCOPY else predicted_ms)


def within_round(policy: Policy, periods: list[Period], elapsed_s: float, throttle: float) -> Decision:
    """What to do in the middle of a round, after the last of its `periods`."""
    hopeless = len(periods) >= _PATIENCE and all(period.exceeds(_HOPELESS) for period in periods[-_PATIENCE:])
    if policy.mode == "hybrid" and hopeless:
        return Decision(Action.POSTCOPY, FIXED_MS)
    if elapsed_s < policy.timeout_s:
        return Decision(Action.CONTINUE)
    if policy.timeout_strategy == "throttle" and throttle >= THROTTLE_MOST:
        return Decision(Action.CONTINUE)  # the end of the round tells whether that was enough
    # each step of a throttle is given one period to show
    return Decision(_at_timeout(policy, bool(periods) and periods[-1].exceeds(_SLOW), throttle))


def next_throttle(throttle: float) -> float:
    """The step that follows."""
    if not throttle:
        return THROTTLE_FIRST
    return min(round(throttle + THROTTLE_STEP, 2), THROTTLE_MOST)


def _at_timeout(policy: Policy, hopeless: bool, throttle: float) -> Action:
    match policy.timeout_strategy:
        case "switch":
            return Action.SWITCH
        case "postcopy":
            return Action.POSTCOPY
        case "throttle" if throttle < THROTTLE_MOST:
            return Action.THROTTLE if hopeless else Action.CONTINUE
        case "throttle" if not hopeless:
            return Action.CONTINUE
        case _:
            return Action.GIVE_UP


def _shrinking(rounds: list[Round]) -> bool:
    """Did one of the last rounds leave clearly less than every round before them? Yes as long as there are too few."""
    left = [r.remaining_bytes for r in rounds]
    return len(left) <= _PATIENCE or min(left[-_PATIENCE:]) < min(left[:-_PATIENCE]) * _WORTH_IT
