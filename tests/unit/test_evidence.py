"""Who sent a broadcast, from where it was seen first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.evidence import originated

MS = 1_000_000


@pytest.mark.parametrize(
    ("here_ms", "there_ms", "expected_ms"),
    [
        ((), (), ()),
        ((10,), (), (10,)),  # the switch has not brought it there
        ((10,), (10.1,), (10,)),  # ours, and flooded
        ((10.1,), (10,), ()),  # theirs, and flooded
        ((10,), (10,), (10,)),  # at the same instant: not brought by the switch
        ((30,), (10,), ()),  # at the limit of the switch's time
        ((30.1,), (10,), (30.1,)),
        ((10, 60, 210), (10.1, 60.1, 210.1), (10, 60, 210)),  # an announcement in rounds
        ((10.1, 60.1, 210.1), (10, 60, 210), ()),
        ((10.1, 500), (10, 500.1), (500,)),  # it was there, and came here
    ],
)
def test_a_broadcast_left_where_it_was_seen_first(
    here_ms: tuple[float, ...], there_ms: tuple[float, ...], expected_ms: tuple[float, ...]
) -> None:
    def ns(times: tuple[float, ...]) -> list[int]:
        return [round(at * MS) for at in times]

    assert originated(ns(here_ms), ns(there_ms)) == ns(expected_ms)


@given(st.lists(st.tuples(st.booleans(), st.integers(41 * MS, 500 * MS), st.integers(1, 19 * MS), st.booleans())))
def test_of_frames_that_follow_each_other_slowly_each_has_one_origin(
    sent: list[tuple[bool, int, int, bool]],
) -> None:
    """Each leaves here or there, and reaches the other side a little later, if it is not lost on the way."""
    now_ns = 0
    here: list[int] = []
    there: list[int] = []
    from_here: list[int] = []
    from_there: list[int] = []
    for is_ours, pause_ns, flood_ns, is_lost in sent:
        now_ns += pause_ns
        (from_here if is_ours else from_there).append(now_ns)
        (here if is_ours else there).append(now_ns)
        if not is_lost:
            (there if is_ours else here).append(now_ns + flood_ns)
    assert originated(here, there) == from_here
    assert originated(there, here) == from_there


@given(st.lists(st.integers(0, 10**9)), st.lists(st.integers(0, 10**9)))
def test_what_left_here_was_seen_here(here: list[int], there: list[int]) -> None:
    left = originated(here, there)
    assert [at for at in here if at in left] == left
    assert originated(here, []) == here
