"""Silences, blackouts and baselines: tables by hand, then any arrivals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.gaps import SETTLING_NS, Silence, Window, baseline, blackout, silences
from topologies.errors import TestbedError

S = 1_000_000_000
WINDOW = Window(10 * S, 11 * S)  # with its settling time, until 12 s


@pytest.mark.parametrize(
    ("arrived_s", "stopped_s", "expected_s"),
    [
        ((9, 10.2, 10.9, 20), 20, (10.9, 20)),  # ends after the window, and counts in its whole length
        ((1, 10.5, 11, 20), 20, (1, 10.5)),  # begins before it
        ((1, 10, 11, 12, 20), 20, (10, 11)),  # 1 to 10 and 12 to 20 only touch it
        ((9.5, 10.5, 11.5, 12.5, 20), 20, (9.5, 10.5)),  # the earliest of equals
        ((5, 10.1, 10.2, 11.9, 13.9), 13.9, (5, 10.1)),
        ((9, 10.5), 30, (10.5, 30)),  # no answer ever again: dark until the observation's end
        ((9,), 11, (9, 11)),
        ((9, 10.4, 11.5), 11.2, (9, 10.4)),  # a straggler after the end
        ((9, 9.5, 10, 10, 13), 13, (10, 13)),
    ],
)
def test_the_blackout_is_the_longest_silence_that_overlaps_the_window(
    arrived_s: tuple[float, ...], stopped_s: float, expected_s: tuple[float, float]
) -> None:
    arrived_ns = [int(t * S) for t in arrived_s]
    silence = blackout(arrived_ns, int(stopped_s * S), WINDOW)
    assert silence == Silence(*(int(t * S) for t in expected_s))
    assert silence.length_ms == pytest.approx((expected_s[1] - expected_s[0]) * 1000)


@pytest.mark.parametrize(
    ("arrived_s", "stopped_s", "expected_s"),
    [
        ((1, 3, 9, 10.5, 20, 21), 22, 6),  # 9 to 10.5 and 10.5 to 20 are the migration's
        ((1, 3, 10, 10.5, 12, 20), 20, 8),  # 3 to 10 and 12 to 20 only touch it
        ((9, 13), 13, 0),
        ((9, 13), 16, 3),  # the end of the observation ends a silence
        ((), 16, 0),
    ],
)
def test_the_baseline_is_the_longest_silence_without_a_migration(
    arrived_s: tuple[float, ...], stopped_s: float, expected_s: float
) -> None:
    assert baseline([int(t * S) for t in arrived_s], int(stopped_s * S), [WINDOW]).length_ns == expected_s * S


def test_the_baseline_leaves_out_every_migration_of_a_run() -> None:
    arrived_ns = [t * S for t in (1, 2, 9, 11, 12, 30, 33, 34)]
    back = Window(31 * S, 32 * S)
    assert baseline(arrived_ns, 34 * S, [WINDOW]).length_ns == 18 * S
    assert baseline(arrived_ns, 34 * S, [WINDOW, back]).length_ns == 18 * S
    assert baseline(arrived_ns, 34 * S, [WINDOW, back, Window(20 * S, 21 * S)]).length_ns == 7 * S
    assert baseline(arrived_ns, 34 * S, []).length_ns == 18 * S


@pytest.mark.parametrize(
    ("arrived_s", "stopped_s"),
    [((), 20), ((10.1, 12), 12), ((9, 10), 10.9), ((1, 2), 3)],
    ids=["no answer at all", "began too late", "stopped too early", "stopped before"],
)
def test_a_probe_that_did_not_watch_the_switchover_cannot_tell(arrived_s: tuple[float, ...], stopped_s: float) -> None:
    with pytest.raises(TestbedError, match="not the whole switchover"):
        blackout([int(t * S) for t in arrived_s], int(stopped_s * S), WINDOW)


def test_arrivals_out_of_order_are_refused() -> None:
    with pytest.raises(TestbedError, match="not in order"):
        list(silences([3, 2], 4))


runs = st.lists(st.integers(0, 6 * SETTLING_NS), min_size=1, max_size=30).map(sorted)


@given(runs, st.integers(0, SETTLING_NS), st.data())
def test_blackout_and_baseline_share_the_whole_observation(
    arrived_ns: list[int], tail_ns: int, data: st.DataObject
) -> None:
    stopped_ns = arrived_ns[-1] + tail_ns
    suspending_ns = data.draw(st.integers(arrived_ns[0], stopped_ns))
    window = Window(suspending_ns, data.draw(st.integers(suspending_ns, stopped_ns)))
    dark, noise = blackout(arrived_ns, stopped_ns, window), baseline(arrived_ns, stopped_ns, [window])
    every = list(silences(arrived_ns, stopped_ns))

    assert sum(silence.length_ns for silence in every) == stopped_ns - arrived_ns[0]
    longest_ns = max((silence.length_ns for silence in every), default=0)
    assert max(dark.length_ns, noise.length_ns) == longest_ns
    # no instant of the settling window was silent for longer than the blackout
    for silence in every:
        inside = silence.begin_ns < window.resumed_ns + SETTLING_NS and silence.end_ns > window.suspending_ns
        assert silence.length_ns <= (dark if inside else noise).length_ns
    assert not any(t in range(dark.begin_ns + 1, dark.end_ns) for t in arrived_ns)
