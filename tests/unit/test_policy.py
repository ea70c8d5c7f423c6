"""When to switch over: tables of rounds by hand, then any rounds."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hosts.policy import FIXED_MS, Action, Policy, Round, bandwidth, decide

MIB = 2**20
# 1 MiB takes 10 ms: within 50 ms, 8 of them fixed, 4 MiB may be left
RATE = 100 * MIB
POLICY = Policy(downtime_ms=50, timeout_s=120)


def rounds_that_left(*left_mib: float, sent_mib: float = 100) -> list[Round]:
    """Rounds at RATE that each left so much."""
    size = round(sent_mib * MIB)
    return [Round(size // 4096, 0, size, size / RATE * 1000, round(left * MIB)) for left in left_mib]


@pytest.mark.parametrize(
    ("left_mib", "elapsed_s", "action"),
    [
        # it falls, so that another round is worth it, though what is left would do
        ((4,), 1, Action.CONTINUE),
        ((400,), 1, Action.CONTINUE),
        ((400, 100, 4), 1, Action.CONTINUE),
        ((400, 4, 2.9), 1, Action.CONTINUE),
        # almost nothing is left
        ((0,), 1, Action.SWITCH),
        ((0.25,), 1, Action.SWITCH),
        ((0.26,), 1, Action.CONTINUE),
        ((400, 100, 0.2), 1, Action.SWITCH),
        # it has stopped falling: once may be chance, twice is the guest's own rate
        ((3, 3), 1, Action.CONTINUE),
        ((400, 3, 3), 1, Action.CONTINUE),
        ((3, 3, 3), 1, Action.SWITCH),
        ((3, 2.5, 2), 1, Action.CONTINUE),
        ((3, 2.5, 2.3), 1, Action.SWITCH),
        ((2, 3, 4), 1, Action.SWITCH),
        ((400, 3, 4, 2.9), 1, Action.SWITCH),
        ((2, 4, 3, 2.9), 1, Action.SWITCH),
        ((400, 3, 3, 2, 1.6), 1, Action.CONTINUE),
        ((400, 3, 3, 2, 1.6, 1.3), 1, Action.CONTINUE),
        ((400, 3, 3, 2, 1.6, 1.6), 1, Action.SWITCH),
        # it has stopped falling above the target
        ((50, 50, 50), 1, Action.CONTINUE),
        ((4.3, 4.3, 4.3), 1, Action.CONTINUE),
        ((50, 50, 50, 50), 119.9, Action.CONTINUE),
        # out of time: what is good enough is taken
        ((50, 50, 50), 120, Action.GIVE_UP),
        ((400, 100, 50), 500, Action.GIVE_UP),
        ((4.3,), 120, Action.GIVE_UP),
        ((400, 100, 4), 120, Action.SWITCH),
        ((4,), 120, Action.SWITCH),
        ((0,), 120, Action.SWITCH),
    ],
)
def test_the_next_step_follows_from_what_the_rounds_left(
    left_mib: tuple[float, ...], elapsed_s: float, action: Action
) -> None:
    assert decide(POLICY, rounds_that_left(*left_mib), elapsed_s).action is action


@pytest.mark.parametrize(
    ("left_mib", "predicted_ms"), [(0, FIXED_MS), (1, FIXED_MS + 10), (4, FIXED_MS + 40), (100, FIXED_MS + 1000)]
)
def test_the_downtime_is_predicted_from_the_rest_and_the_rate(left_mib: float, predicted_ms: float) -> None:
    decision = decide(POLICY, rounds_that_left(500, left_mib), 1)
    assert decision.predicted_downtime_ms == pytest.approx(predicted_ms, rel=1e-6)


def test_a_larger_target_switches_where_a_smaller_one_goes_on() -> None:
    rounds = rounds_that_left(20, 20, 20)
    assert decide(Policy(downtime_ms=200), rounds, 1).action is Action.CONTINUE
    assert decide(Policy(downtime_ms=210), rounds, 1).action is Action.SWITCH


def test_without_a_rate_nothing_but_an_empty_rest_is_within_reach() -> None:
    nothing_sent = Round(0, 100, 0, 0.0, 8192)
    assert decide(POLICY, [nothing_sent], 1).predicted_downtime_ms == math.inf
    assert decide(POLICY, [nothing_sent], 120).action is Action.GIVE_UP
    assert decide(POLICY, [Round(0, 0, 0, 0.0, 0)], 1).action is Action.SWITCH


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


sizes = st.integers(0, 64 * MIB) | st.integers(0, 2**40)
any_rounds = st.lists(
    st.builds(Round, st.integers(0, 2**20), st.integers(0, 2**20), sizes, st.floats(0, 1e6), sizes),
    min_size=1,
    max_size=6,
)
policies = st.builds(Policy, st.floats(0.1, 1e5), st.floats(0.1, 1e4))


@given(policies, any_rounds, st.floats(0, 2e4))
@example(POLICY, rounds_that_left(4.2, 4.2, 4.2), 1.0)
@example(POLICY, rounds_that_left(4.21, 4.21, 4.21), 1.0)
def test_no_switchover_is_ever_expected_to_exceed_the_target(
    policy: Policy, rounds: list[Round], elapsed_s: float
) -> None:
    decision = decide(policy, rounds, elapsed_s)
    assert decision.predicted_downtime_ms >= FIXED_MS
    if decision.action is Action.SWITCH:
        assert decision.predicted_downtime_ms <= policy.downtime_ms
    else:
        assert decision.predicted_downtime_ms > policy.downtime_ms or elapsed_s < policy.timeout_s


@given(policies, any_rounds, st.floats(0, 2e4))
@example(POLICY, rounds_that_left(50, 50, 50), 120.0)
def test_a_migration_is_given_up_after_its_time_out_and_not_before(
    policy: Policy, rounds: list[Round], elapsed_s: float
) -> None:
    action = decide(policy, rounds, elapsed_s).action
    assert (action is Action.GIVE_UP) <= (elapsed_s >= policy.timeout_s)
    assert (action is Action.CONTINUE) <= (elapsed_s < policy.timeout_s), "it ends"


@given(policies, any_rounds, sizes, sizes)
def test_the_more_is_left_the_longer_the_downtime_that_is_predicted(
    policy: Policy, rounds: list[Round], one: int, other: int
) -> None:
    def predicted_ms(left: int) -> float:
        last = rounds[-1]
        same = Round(last.pages, last.zero_pages, last.bytes, last.ms, left)
        return decide(policy, [*rounds[:-1], same], 1).predicted_downtime_ms

    less, more = sorted((one, other))
    assert predicted_ms(less) <= predicted_ms(more)


def test_a_rest_that_goes_up_and_down_within_the_target_is_switched_before_the_time_out() -> None:
    left_mib = (400, 3, *(2, 3) * 20)
    actions = {decide(POLICY, rounds_that_left(*left_mib[:n]), n).action for n in range(1, len(left_mib) + 1)}
    assert Action.SWITCH in actions


@given(st.lists(st.floats(0, 4), min_size=30, max_size=30))
def test_a_rest_that_stays_within_the_target_is_switched_after_some_rounds_whatever_it_does(
    left_mib: list[float],
) -> None:
    assert any(decide(POLICY, rounds_that_left(*left_mib[:n]), n).action is Action.SWITCH for n in range(1, 31))
