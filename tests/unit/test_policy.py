"""When to switch over, and how: tables of rounds and periods by hand, then any of them."""

import math
from typing import get_args, get_type_hints

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hosts.policy import (
    FIXED_MS,
    MODES,
    STRATEGIES,
    THROTTLE_MOST,
    Action,
    Period,
    Policy,
    Round,
    after_round,
    bandwidth,
    before_rounds,
    next_throttle,
    within_round,
)

MIB = 2**20
# 1 MiB takes 10 ms: within 50 ms, 8 of them fixed, 4 MiB may be left
RATE = 100 * MIB
CONTINUE, SWITCH, POSTCOPY = Action.CONTINUE, Action.SWITCH, Action.POSTCOPY
THROTTLE, GIVE_UP = Action.THROTTLE, Action.GIVE_UP
PLAIN = Policy(downtime_ms=50, timeout_s=120)
HYBRID = Policy(50, 120, "hybrid")


def by(strategy: str) -> Policy:
    return Policy(50, 120, "precopy", strategy)  # type: ignore[arg-type]


def rounds_that_left(*left_mib: float, sent_mib: float = 100) -> list[Round]:
    """Rounds at RATE that each left so much."""
    size = round(sent_mib * MIB)
    return [Round(size // 4096, 0, size, size / RATE * 1000, round(left * MIB)) for left in left_mib]


def test_the_words_of_the_command_line_are_those_of_a_policy() -> None:
    hints = get_type_hints(Policy)
    assert (get_args(hints["mode"]), get_args(hints["timeout_strategy"])) == (MODES, STRATEGIES)


@pytest.mark.parametrize(
    ("mode", "action", "predicted_ms"),
    [
        ("precopy", CONTINUE, None),
        ("hybrid", CONTINUE, None),
        ("stop-and-copy", SWITCH, None),  # nothing is known of the link yet
        ("postcopy", POSTCOPY, FIXED_MS),
    ],
)
def test_the_mode_decides_whether_there_are_rounds(mode: str, action: Action, predicted_ms: float | None) -> None:
    decision = before_rounds(Policy(mode=mode))  # type: ignore[arg-type]
    assert (decision.action, decision.predicted_downtime_ms) == (action, predicted_ms)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_downtime_is_aimed_at_unless_the_vm_is_suspended_however_long_the_rest_takes(
    mode: str, strategy: str
) -> None:
    policy = Policy(mode=mode, timeout_strategy=strategy)  # type: ignore[arg-type]
    assert policy.aims_at_downtime == (mode != "stop-and-copy" and strategy != "switch")
    assert policy.may_postcopy == (mode in ("postcopy", "hybrid") or strategy == "postcopy")


# ---------------------------------------------------------------- after a round


@pytest.mark.parametrize(
    ("left_mib", "elapsed_s", "action"),
    [
        # it falls, so that another round is worth it, though what is left would do
        ((4,), 1, CONTINUE),
        ((400,), 1, CONTINUE),
        ((400, 100, 4), 1, CONTINUE),
        ((400, 4, 2.9), 1, CONTINUE),
        # almost nothing is left
        ((0,), 1, SWITCH),
        ((0.25,), 1, SWITCH),
        ((0.26,), 1, CONTINUE),
        ((400, 100, 0.2), 1, SWITCH),
        # it has stopped falling: once may be chance, twice is the guest's own rate
        ((3, 3), 1, CONTINUE),
        ((400, 3, 3), 1, CONTINUE),
        ((3, 3, 3), 1, SWITCH),
        ((3, 2.5, 2), 1, CONTINUE),
        ((3, 2.5, 2.3), 1, SWITCH),
        ((2, 3, 4), 1, SWITCH),
        ((400, 3, 4, 2.9), 1, SWITCH),
        ((2, 4, 3, 2.9), 1, SWITCH),
        ((400, 3, 3, 2, 1.6), 1, CONTINUE),
        ((400, 3, 3, 2, 1.6, 1.3), 1, CONTINUE),
        ((400, 3, 3, 2, 1.6, 1.6), 1, SWITCH),
        # it has stopped falling above the target
        ((50, 50, 50), 1, CONTINUE),
        ((4.3, 4.3, 4.3), 1, CONTINUE),
        ((50, 50, 50, 50), 119.9, CONTINUE),
        # out of time: what is good enough is taken
        ((50, 50, 50), 120, GIVE_UP),
        ((400, 100, 50), 500, GIVE_UP),
        ((4.3,), 120, GIVE_UP),
        ((400, 100, 4), 120, SWITCH),
        ((4,), 120, SWITCH),
        ((0,), 120, SWITCH),
    ],
)
def test_the_next_step_follows_from_what_the_rounds_left(
    left_mib: tuple[float, ...], elapsed_s: float, action: Action
) -> None:
    assert after_round(PLAIN, rounds_that_left(*left_mib), elapsed_s, 0).action is action


@pytest.mark.parametrize(
    ("strategy", "left_mib", "throttle", "action"),
    [
        ("cancel", (50,), 0, GIVE_UP),
        ("switch", (50,), 0, SWITCH),
        ("switch", (4000,), 0, SWITCH),
        ("postcopy", (50,), 0, POSTCOPY),
        # of 100 MiB sent, up to 50 written again: rounds get somewhere; more: the guest is slowed
        ("throttle", (50,), 0, CONTINUE),
        ("throttle", (50.1,), 0, THROTTLE),
        ("throttle", (50, 50, 50), 0, THROTTLE),  # and so if they leave the same again and again
        # a guest that is slowed already is slowed further above a quarter
        ("throttle", (25,), 0.2, CONTINUE),
        ("throttle", (25.1,), 0.2, THROTTLE),
        ("throttle", (25.1,), 0.9, THROTTLE),
        ("throttle", (25,), 0.99, CONTINUE),
        ("throttle", (25.1,), 0.99, GIVE_UP),
        ("throttle", (25, 25, 25), 0.99, GIVE_UP),
        # what is good enough is taken by each of them
        ("cancel", (4,), 0, SWITCH),
        ("postcopy", (4,), 0, SWITCH),
        ("throttle", (4,), 0.5, SWITCH),
    ],
)
def test_out_of_time_the_strategy_says_what_follows_a_round(
    strategy: str, left_mib: tuple[float, ...], throttle: float, action: Action
) -> None:
    rounds = rounds_that_left(*left_mib)
    assert after_round(by(strategy), rounds, 120, throttle).action is action
    before = after_round(by(strategy), rounds, 119.9, throttle).action
    assert before is (SWITCH if left_mib == (0,) else CONTINUE), "in time, all of them are plain pre-copy"


@pytest.mark.parametrize(
    ("left_mib", "action"),
    [
        ((50,), CONTINUE),
        ((50.1,), POSTCOPY),
        ((50, 50), CONTINUE),
        ((50, 50, 50), POSTCOPY),  # they leave the same again and again
        ((50, 40, 30), CONTINUE),
        ((3, 3, 3), SWITCH),  # that too, but it fits
        ((0.2,), SWITCH),
    ],
)
@pytest.mark.parametrize("elapsed_s", [0.1, 119.9])
def test_a_hybrid_takes_to_post_copy_as_soon_as_rounds_get_nowhere(
    left_mib: tuple[float, ...], action: Action, elapsed_s: float
) -> None:
    decision = after_round(HYBRID, rounds_that_left(*left_mib), elapsed_s, 0)
    assert decision.action is action
    if action is POSTCOPY:
        assert decision.predicted_downtime_ms == FIXED_MS, "the pages cross after the resume"


def test_a_hybrid_switches_where_more_is_left_than_was_sent_but_fits() -> None:
    assert after_round(HYBRID, rounds_that_left(0.4, sent_mib=0.3), 1, 0).action is SWITCH


@pytest.mark.parametrize(
    ("left_mib", "predicted_ms"), [(0, FIXED_MS), (1, FIXED_MS + 10), (4, FIXED_MS + 40), (100, FIXED_MS + 1000)]
)
def test_the_downtime_is_predicted_from_the_rest_and_the_rate(left_mib: float, predicted_ms: float) -> None:
    decision = after_round(PLAIN, rounds_that_left(500, left_mib), 1, 0)
    assert decision.predicted_downtime_ms == pytest.approx(predicted_ms, rel=1e-6)


def test_a_larger_target_switches_where_a_smaller_one_goes_on() -> None:
    rounds = rounds_that_left(20, 20, 20)
    assert after_round(Policy(downtime_ms=200), rounds, 1, 0).action is CONTINUE
    assert after_round(Policy(downtime_ms=210), rounds, 1, 0).action is SWITCH


def test_without_a_rate_nothing_but_an_empty_rest_is_within_reach() -> None:
    nothing_sent = Round(0, 100, 0, 0.0, 8192)
    assert after_round(PLAIN, [nothing_sent], 1, 0).predicted_downtime_ms == math.inf
    assert after_round(PLAIN, [nothing_sent], 120, 0).action is GIVE_UP
    assert after_round(PLAIN, [Round(0, 0, 0, 0.0, 0)], 1, 0).action is SWITCH


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ([], 0),
        ([Round(0, 0, 0, 0.0, 0)], 0),
        ([Round(0, 0, 2 * MIB, 20.0, 0)], RATE),
        ([Round(0, 0, 2 * MIB, 20.0, 0), Round(0, 0, 4 * MIB, 100.0, 0)], 50 * MIB),  # by time, not by round
        ([Round(0, 0, 2 * MIB, 20.0, 0), Round(0, 0, 1000, 500.0, 0)], RATE),  # a round trip is no rate
        ([Round(0, 0, MIB // 2, 10.0, 0)], 50 * MIB),  # better than nothing
    ],
)
def test_the_bandwidth_is_that_of_the_rounds_long_enough_to_tell(rounds: list[Round], expected: float) -> None:
    assert bandwidth(rounds) == pytest.approx(expected)


# ---------------------------------------------------------------- within a round


def periods_that_dirtied(*percent: float) -> list[Period]:
    """Of 10 MiB sent in each."""
    return [Period(10 * MIB, round(share * MIB / 10)) for share in percent]


@pytest.mark.parametrize(
    ("policy", "dirtied", "elapsed_s", "throttle", "action"),
    [
        # in time
        (PLAIN, (500, 500, 500), 119.9, 0, CONTINUE),
        (by("throttle"), (500, 500, 500), 119.9, 0, CONTINUE),
        (by("postcopy"), (500, 500, 500), 119.9, 0, CONTINUE),
        (HYBRID, (51,), 1, 0, CONTINUE),  # once may be chance
        (HYBRID, (51, 51), 1, 0, POSTCOPY),
        (HYBRID, (51, 50), 1, 0, CONTINUE),
        (HYBRID, (10, 51, 51), 1, 0, POSTCOPY),
        (HYBRID, (51, 51, 10), 1, 0, CONTINUE),
        # out of time
        (PLAIN, (0,), 120, 0, GIVE_UP),
        (by("switch"), (0,), 120, 0, SWITCH),
        (by("postcopy"), (0,), 120, 0, POSTCOPY),
        (by("throttle"), (), 120, 0, CONTINUE),
        (by("throttle"), (25,), 120, 0, CONTINUE),
        (by("throttle"), (26,), 120, 0, THROTTLE),
        (by("throttle"), (500, 25), 120, 0.2, CONTINUE),  # each step has one period to show
        (by("throttle"), (0, 26), 120, 0.9, THROTTLE),
        (by("throttle"), (500, 500), 120, 0.99, CONTINUE),  # the end of the round tells whether that was enough
        (HYBRID, (0,), 120, 0, GIVE_UP),
    ],
)
def test_a_round_is_broken_off_or_slowed_by_what_its_periods_show(
    policy: Policy, dirtied: tuple[float, ...], elapsed_s: float, throttle: float, action: Action
) -> None:
    assert within_round(policy, periods_that_dirtied(*dirtied), elapsed_s, throttle).action is action


# ---------------------------------------------------------------- any rounds

sizes = st.integers(0, 64 * MIB) | st.integers(0, 2**40)
any_rounds = st.lists(
    st.builds(Round, st.integers(0, 2**20), st.integers(0, 2**20), sizes, st.floats(0, 1e6), sizes),
    min_size=1,
    max_size=6,
)
any_periods = st.lists(st.builds(Period, sizes, sizes), max_size=5)
throttles = st.sampled_from([0, *(round(step / 10, 1) for step in range(2, 10)), THROTTLE_MOST])
moments = st.floats(0, 2e4)
downtimes, timeouts = st.floats(0.1, 1e5), st.floats(0.1, 1e4)
with_rounds = st.sampled_from(["precopy", "hybrid"])
policies = st.builds(Policy, downtimes, timeouts, with_rounds, st.sampled_from(STRATEGIES))
plain_policies = st.builds(Policy, downtimes, timeouts)


@given(policies, any_rounds, moments, throttles)
@example(PLAIN, rounds_that_left(4.2, 4.2, 4.2), 1.0, 0)
@example(PLAIN, rounds_that_left(4.21, 4.21, 4.21), 1.0, 0)
def test_no_switchover_is_ever_expected_to_exceed_the_target_unless_the_strategy_says_so(
    policy: Policy, rounds: list[Round], elapsed_s: float, throttle: float
) -> None:
    decision = after_round(policy, rounds, elapsed_s, throttle)
    assert decision.predicted_downtime_ms is not None
    assert decision.predicted_downtime_ms >= FIXED_MS
    if decision.action is SWITCH and decision.predicted_downtime_ms > policy.downtime_ms:
        assert policy.timeout_strategy == "switch" and elapsed_s >= policy.timeout_s
    if policy.aims_at_downtime:
        assert decision.action is not SWITCH or decision.predicted_downtime_ms <= policy.downtime_ms


@given(policies, any_rounds, any_periods, moments, throttles)
@example(PLAIN, rounds_that_left(50, 50, 50), [], 120.0, 0)
def test_before_the_time_out_no_strategy_takes_over(
    policy: Policy, rounds: list[Round], periods: list[Period], elapsed_s: float, throttle: float
) -> None:
    after = after_round(policy, rounds, elapsed_s, throttle).action
    within = within_round(policy, periods, elapsed_s, throttle).action
    if elapsed_s < policy.timeout_s:
        assert after in (CONTINUE, SWITCH) or (policy.mode == "hybrid" and after is POSTCOPY)
        assert within is CONTINUE or (policy.mode == "hybrid" and within is POSTCOPY)
    else:
        assert (after is THROTTLE) <= (policy.timeout_strategy == "throttle" and throttle < THROTTLE_MOST)
        assert (after is CONTINUE) <= (policy.timeout_strategy == "throttle"), "it ends"
        assert (within in (CONTINUE, THROTTLE)) <= (policy.timeout_strategy == "throttle")
    assert (POSTCOPY in (after, within)) <= policy.may_postcopy


@given(plain_policies, any_rounds, moments)
def test_plain_pre_copy_is_given_up_after_its_time_out_and_not_before(
    policy: Policy, rounds: list[Round], elapsed_s: float
) -> None:
    action = after_round(policy, rounds, elapsed_s, 0).action
    assert action in (CONTINUE, SWITCH, GIVE_UP)
    assert (action is GIVE_UP) <= (elapsed_s >= policy.timeout_s)
    assert (action is CONTINUE) <= (elapsed_s < policy.timeout_s), "it ends"
    assert (within_round(policy, [], elapsed_s, 0).action is GIVE_UP) == (elapsed_s >= policy.timeout_s)


@given(policies, any_rounds, sizes, sizes)
def test_the_more_is_left_the_longer_the_downtime_that_is_predicted(
    policy: Policy, rounds: list[Round], one: int, other: int
) -> None:
    def predicted_ms(left: int) -> float:
        last = rounds[-1]
        same = Round(last.pages, last.zero_pages, last.bytes, last.ms, left)
        plain = Policy(policy.downtime_ms, policy.timeout_s)
        predicted = after_round(plain, [*rounds[:-1], same], 1, 0).predicted_downtime_ms
        assert predicted is not None
        return predicted

    less, more = sorted((one, other))
    assert predicted_ms(less) <= predicted_ms(more)


def test_a_rest_that_goes_up_and_down_within_the_target_is_switched_before_the_time_out() -> None:
    left_mib = (400, 3, *(2, 3) * 20)
    actions = {after_round(PLAIN, rounds_that_left(*left_mib[:n]), n, 0).action for n in range(1, len(left_mib) + 1)}
    assert SWITCH in actions


@given(st.lists(st.floats(0, 4), min_size=30, max_size=30))
def test_a_rest_that_stays_within_the_target_is_switched_after_some_rounds_whatever_it_does(
    left_mib: list[float],
) -> None:
    assert any(after_round(PLAIN, rounds_that_left(*left_mib[:n]), n, 0).action is SWITCH for n in range(1, 31))


# ---------------------------------------------------------------- the throttle


def test_the_throttle_begins_at_a_fifth_and_tightens_by_a_tenth_up_to_99_percent() -> None:
    steps = [0.0]
    while steps[-1] < THROTTLE_MOST:
        steps.append(next_throttle(steps[-1]))
    assert steps == [0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99]
    assert next_throttle(THROTTLE_MOST) == THROTTLE_MOST


@given(st.floats(0, 0.99))
def test_a_throttle_never_loosens_and_comes_to_its_end(throttle: float) -> None:
    for _ in range(10):
        following = next_throttle(throttle)
        assert following > throttle or throttle == THROTTLE_MOST
        throttle = following
    assert throttle == THROTTLE_MOST


@given(st.floats(0.1, 1e5), st.lists(sizes, max_size=40))
def test_a_throttled_migration_ends_whatever_the_guest_does(downtime_ms: float, left: list[int]) -> None:
    """Out of time: it converges or is given up after a bounded number of rounds, tightened nine times at most."""
    policy = Policy(downtime_ms, 120, "precopy", "throttle")
    rounds: list[Round] = []
    throttle, tightened = 0.0, 0
    while True:
        remaining = left[len(rounds)] if len(rounds) < len(left) else 64 * MIB
        rounds.append(Round(0, 0, 100 * MIB, 1000.0, remaining))
        action = after_round(policy, rounds, 120, throttle).action
        if action is THROTTLE:
            throttle, tightened = next_throttle(throttle), tightened + 1
        if action not in (CONTINUE, THROTTLE):
            break
        assert len(rounds) < len(left) + 20
    assert action in (SWITCH, GIVE_UP)
    assert tightened <= 9
    assert (action is GIVE_UP) <= (throttle == THROTTLE_MOST), "not before everything was tried"
