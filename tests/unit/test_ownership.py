"""Who may run a VM: the steps of a claim, leases, and an owner and a breaker whose clocks differ."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hosts.ownership import LEASE_S, PULSE_EVERY_S, RUN_S, Claiming, Lease, Sight, Step, Watch

NOW_S = 1000.0
CLOCKS_DIFFER_BY = 0.1  # what RUN_S allows for
STOP_WITHIN_S = 0.25
moments = st.floats(0, 1e6)


# ---------------------------------------------------------------- claims


def test_a_claim_is_link_fence_check() -> None:
    claiming = Claiming(7, "ours", NOW_S)
    assert claiming.step is Step.LINK
    claiming = claiming.linked("ours")
    assert claiming.step is Step.FENCE
    claiming = claiming.fenced()
    assert claiming.step is Step.CHECK
    claiming = claiming.checked(7)
    assert claiming.step is Step.OWNED
    assert claiming.lease == Lease(7, NOW_S)


@pytest.mark.parametrize("nonce", ["", "theirs", "ours "])
def test_a_generation_with_anothers_nonce_is_lost(nonce: str) -> None:
    assert Claiming(7, "ours", NOW_S).linked(nonce).step is Step.LOST


@given(st.integers(1, 100), st.integers(0, 100))
def test_only_the_newest_is_owned(generation: int, newest: int) -> None:
    claiming = Claiming(generation, "ours", NOW_S).linked("ours").fenced().checked(newest)
    assert (claiming.step is Step.OWNED) == (newest == generation)


@given(moments)
def test_a_lease_counts_from_when_its_link_was_sent_first(sent_s: float) -> None:
    assert Claiming(7, "ours", sent_s).linked("ours").fenced().checked(7).lease.sent_s == sent_s


# ---------------------------------------------------------------- leases


def test_a_lease_lasts_for_its_time_and_no_longer() -> None:
    lease = Lease(7, NOW_S)
    assert lease.until_s == NOW_S + RUN_S
    assert lease.lasts(NOW_S) and lease.lasts(NOW_S + RUN_S)
    assert not lease.lasts(NOW_S + RUN_S + 0.001)


def test_a_pulse_extends_a_lease_from_when_it_was_sent() -> None:
    assert Lease(7, NOW_S).pulsed(NOW_S + 0.5, NOW_S + 1.9) == Lease(7, NOW_S + 0.5)


def test_a_pulse_that_is_acknowledged_too_late_extends_nothing() -> None:
    assert Lease(7, NOW_S).pulsed(NOW_S + 0.5, NOW_S + RUN_S + 0.001) is None


@given(moments, st.floats(0, 10), st.floats(0, 10))
def test_a_lease_that_has_lapsed_never_lasts_again(sent_s: float, after_s: float, takes_s: float) -> None:
    """Rule 4."""
    lease = Lease(7, sent_s)
    extended = lease.pulsed(sent_s + after_s, sent_s + after_s + takes_s)
    assert (extended is None) == (not lease.lasts(sent_s + after_s + takes_s))
    if extended is not None:
        assert extended.until_s >= lease.until_s


@given(moments, moments)
def test_a_generation_of_which_nobody_knows_when_gives_no_time_at_all(now_s: float, sent_s: float) -> None:
    lease = Lease.lapsed(7)
    assert lease.generation == 7
    assert not lease.lasts(now_s)
    assert lease.pulsed(min(sent_s, now_s), now_s) is None


def test_an_owner_may_miss_a_few_pulses_and_stops_in_time() -> None:
    assert RUN_S >= 3 * PULSE_EVERY_S
    slowest, fastest = RUN_S / (1 - CLOCKS_DIFFER_BY / 2), LEASE_S / (1 + CLOCKS_DIFFER_BY / 2)
    assert slowest + STOP_WITHIN_S <= fastest


# ---------------------------------------------------------------- watching


def test_a_pulse_that_moves_or_a_newer_generation_is_life() -> None:
    watch = Watch(7, 40, NOW_S)
    for generation, pulse in ((7, 41), (7, 39), (8, 40), (8, 0)):
        for asked_s in (NOW_S + 0.1, NOW_S + LEASE_S, NOW_S + 100):
            assert watch.saw(generation, pulse, asked_s) is Sight.ALIVE


def test_a_pulse_that_stands_still_says_nothing_until_a_lease_is_over() -> None:
    watch = Watch(7, 40, NOW_S)
    assert watch.saw(7, 40, NOW_S + 0.1) is Sight.UNSURE
    assert watch.saw(7, 40, NOW_S + LEASE_S - 0.001) is Sight.UNSURE
    assert watch.saw(7, 40, NOW_S + LEASE_S) is Sight.DEAD


# ---------------------------------------------------------------- an owner and a breaker


@dataclass(frozen=True)
class Call:
    """In true time; `done_s` is when the server did it, `answered_s` infinite if nobody heard."""

    sent_s: float
    done_s: float
    answered_s: float


NEVER = math.inf
# How long a call is on its way, there or back
latencies = st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.5])


@st.composite
def pulses(draw: st.DrawFn) -> list[Call]:
    """One after the other; one without an answer is done at once, late, or never, and the next is sent all the same.

    An owner may be kept from running for some seconds.
    """
    calls, now_s = [], 0.0
    for _ in range(draw(st.integers(0, 8))):
        sent_s = now_s + draw(st.sampled_from([PULSE_EVERY_S, PULSE_EVERY_S, 3.5]))
        done_s = sent_s + draw(latencies)
        if draw(st.booleans()):
            calls.append(Call(sent_s, done_s, done_s + draw(latencies)))
            now_s = calls[-1].answered_s
        else:
            calls.append(Call(sent_s, done_s + draw(st.sampled_from([0.0, 5.0, NEVER])), NEVER))
            now_s = sent_s + 1
    return calls


@st.composite
def looks(draw: st.DrawFn) -> list[Call]:
    """From some moment on, for longer than a lease."""
    calls, now_s = [], draw(st.sampled_from([0.0, 0.49, 0.51, 1.0, 3.0, 5.0]))
    slow = draw(st.sets(st.integers(0, 20), max_size=3))
    for number in range(25):
        done_s = now_s + (draw(latencies) if number in slow else 0.0)
        calls.append(Call(now_s, done_s, done_s + (draw(latencies) if number in slow else 0.0)))
        now_s = calls[-1].answered_s + 0.2
    return calls


def number_at(pulses: list[Call], when_s: float) -> int:
    """What stands in the lock file: the pulse that was written last."""
    written = [(call.done_s, number) for number, call in enumerate(pulses, 1) if call.done_s <= when_s]
    return max(written, default=(0.0, 0))[1]


def runs_until_s(pulses: list[Call], rate: float, now_s: float) -> float:
    """In true time: how long an owner with such a clock, which has claimed at 0, runs by what it has heard till now."""
    lease: Lease | None = Lease(7, 0.0)
    for call in pulses:
        if lease is not None and call.answered_s <= now_s:
            extended = lease.pulsed(call.sent_s * rate, call.answered_s * rate)
            if extended is None:
                break  # it stands still, and claims the next generation
            lease = extended
    assert lease is not None
    return lease.until_s / rate


def breaks_at_s(pulses: list[Call], looks: list[Call], rate: float) -> float | None:
    """In true time: when the breaker's last look was sent, if that showed it a dead owner."""
    first = looks[0]
    watch = Watch(7, number_at(pulses, first.done_s), first.answered_s * rate)
    for look in looks[1:]:
        match watch.saw(7, number_at(pulses, look.done_s), look.sent_s * rate):
            case Sight.ALIVE:
                return None
            case Sight.DEAD:
                return look.sent_s
    return None


rates = st.sampled_from([1 - CLOCKS_DIFFER_BY / 2, 1.0, 1 + CLOCKS_DIFFER_BY / 2])


@settings(max_examples=500)
@given(pulses(), looks(), rates, rates)
def test_whoever_is_found_dead_stands_still_already_and_for_good(
    pulses: list[Call], looks: list[Call], owners: float, breakers: float
) -> None:
    """Rules 2, 3 and 4, with clocks that differ and calls that are slow, unheard or done late."""
    broken_s = breaks_at_s(pulses, looks, breakers)
    if broken_s is None:
        return
    for heard_by_s in (broken_s, broken_s + 1, broken_s + 100):
        assert runs_until_s(pulses, owners, heard_by_s) + STOP_WITHIN_S <= broken_s


@given(st.lists(st.floats(0.05, 0.45), min_size=30, max_size=60), st.lists(st.floats(0.01, 0.4), min_size=20), rates)
def test_an_owner_that_pulses_is_never_found_dead(gaps_s: list[float], waits_s: list[float], rate: float) -> None:
    """Its pulses are answered at once, and a breaker looks as often as it likes."""
    sent_s = [sum(gaps_s[:number]) for number in range(1, len(gaps_s) + 1)]
    pulses = [Call(at_s, at_s, at_s) for at_s in sent_s]
    assert all(later - earlier < RUN_S for earlier, later in pairwise(sent_s))
    end_s = sent_s[-1]
    asked_s = [at for number in range(len(waits_s) + 1) if (at := sum(waits_s[:number])) < end_s]
    looks = [Call(at_s, at_s, at_s) for at_s in asked_s]
    assert breaks_at_s(pulses, looks, rate) is None
