"""The timeline of a migration from its events, and the two clocks of a run."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.timeline import PARTS, Clock, Timeline, timeline
from topologies.errors import TestbedError
from topologies.events import Event

MAC, MIGRATION = "00:50:56:00:00:01", "vm1-0badcafe"
MS = 1_000_000
# when (ms), what: one migration as both agents and the controller record it
STORY: list[tuple[float, str, dict[str, Any]]] = [
    (999.5, "rounds.begin", {"mode": "precopy"}),
    (1000, "round.begin", {"round": 1}),
    (1400, "round.end", {"round": 1}),
    (1401, "round.begin", {"round": 2}),
    (1500, "round.end", {"round": 2}),
    (1501, "vm.suspending", {}),
    (1502, "gate.shut", {}),
    (1503, "vm.suspended", {}),
    (1506, "residual.sent", {}),
    (1508, "state.received", {}),
    (1510, "ram.verified", {}),
    (1512, "sockets.restored", {}),
    (1513.5, "generation.claimed", {}),
    (1514, "vm.resuming", {}),
    (1514.5, "announce.sent", {"round": 0, "mode": "rarp", "frames": 1}),
    (1515, "vm.resumed", {}),
    (1564, "announce.sent", {"round": 1, "mode": "rarp", "frames": 1}),
]
RELEARNED = {"kind": "mac.relearned", "mac": MAC, "cause": "rarp"}


def story(migration: str = MIGRATION, shift_ms: float = 0) -> list[Event]:
    return [
        {"t": round((at + shift_ms) * MS), "kind": kind, "vm": "vm1", "migration": migration, **fields}
        for at, kind, fields in STORY
    ]


def test_every_duration_is_what_its_events_say() -> None:
    events = [*story(), {"t": 1517 * MS, **RELEARNED}]
    assert timeline(events, MIGRATION, MAC) == Timeline(
        vm="vm1",
        migration=MIGRATION,
        begun_ns=round(999.5 * MS),
        suspending_ns=1501 * MS,
        suspended_ns=1503 * MS,
        resuming_ns=1514 * MS,
        resumed_ns=1515 * MS,
        total_ms=515.5,
        downtime_ms=14.0,
        parts_ms={"suspend": 2.0, "residual": 5.0, "state": 4.0, "claim": 1.5, "resume": 1.5},
        announced=2,
        relearn_ms=3.0,
        relearn_cause="rarp",
    )


NEEDED = ("rounds.begin", "vm.suspending", "vm.resuming", *PARTS.values())


def test_without_rounds_the_time_begins_where_the_first_would_have() -> None:
    events = [event for event in story() if event["kind"] not in ("round.begin", "round.end")]
    assert timeline(events, MIGRATION, MAC) == timeline(story(), MIGRATION, MAC)


def test_with_post_copy_the_total_lasts_until_all_pages_have_come_and_the_downtime_does_not() -> None:
    kinds = {"residual.sent": "bitmap.sent", "ram.verified": "ram.whole"}
    events = [event | {"kind": kinds.get(event["kind"], event["kind"])} for event in story()]
    mine = {"vm": "vm1", "migration": MIGRATION}
    events += [{"t": 1516 * MS, "kind": "postcopy.begin", **mine}, {"t": 1999 * MS, "kind": "postcopy.end", **mine}]
    of_another = {"t": 2500 * MS, "kind": "postcopy.end", "vm": "vm1", "migration": "vm1-other"}
    result = timeline([*events, of_another], MIGRATION, MAC)
    plain = timeline(story(), MIGRATION, MAC)
    assert (result.total_ms, result.downtime_ms) == (999.5, 14.0)
    assert result.parts_ms == plain.parts_ms


@pytest.mark.parametrize("kind", NEEDED)
def test_a_missing_event_is_named_with_its_migration(kind: str) -> None:
    with pytest.raises(TestbedError, match=rf"migration {MIGRATION}: no event {kind} was recorded"):
        timeline([event for event in story() if event["kind"] != kind], MIGRATION, MAC)


def test_a_migration_that_nobody_has_seen_has_no_timeline() -> None:
    with pytest.raises(TestbedError, match="migration vm1-other: no event"):
        timeline(story(), "vm1-other", MAC)


def test_the_events_of_other_migrations_change_nothing() -> None:
    alone = timeline(story(), MIGRATION, MAC)
    others = [*story("vm1-before", -600), *story("vm2-meanwhile", 3), *story("vm1-after", 700)]
    both = sorted([*story(), *others, {"t": 0, "kind": "vm.powered_on", "vm": "vm1"}], key=lambda event: event["t"])
    assert timeline(both, MIGRATION, MAC) == alone
    assert timeline(both, "vm1-after", MAC).resumed_ns == alone.resumed_ns + 700 * MS


def test_an_announcement_of_nothing_counts_nothing() -> None:
    silent = [event for event in story() if event["kind"] != "announce.sent"]
    assert timeline(silent, MIGRATION, MAC).announced == 0


@pytest.mark.parametrize(
    ("relearned", "expected"),
    [
        ([], None),
        ([(1513.9, MAC)], None),  # before the resume: a move of an earlier migration, or a leak
        ([(1514, MAC)], 0.0),
        ([(1516, "00:50:56:00:00:02")], None),  # another VM
        ([(1400, MAC), (1516, MAC), (1600, MAC)], 2.0),
    ],
)
def test_the_switch_has_relearned_when_it_confirmed_the_first_move_after_the_resume(
    relearned: list[tuple[float, str]], expected: float | None
) -> None:
    events = story() + [{"t": round(at * MS), **RELEARNED, "mac": mac} for at, mac in relearned]
    result = timeline(sorted(events, key=lambda event: event["t"]), MIGRATION, MAC)
    assert result.relearn_ms == expected
    assert result.relearn_cause == (None if expected is None else "rarp")


@given(st.lists(st.integers(0, 10**12), min_size=len(STORY), max_size=len(STORY)).map(sorted))
def test_the_downtime_is_the_sum_of_its_parts(times: list[int]) -> None:
    events = [{**event, "t": t} for event, t in zip(story(), times, strict=True)]
    result = timeline(iter(events), MIGRATION, MAC)
    assert sum(result.parts_ms.values()) == pytest.approx(result.downtime_ms)
    assert list(result.parts_ms) == ["suspend", "residual", "state", "claim", "resume"]
    assert all(part >= 0 for part in result.parts_ms.values())
    assert result.total_ms >= result.downtime_ms


# ---------------------------------------------------------------- the clocks


def clock(offset_ns: int, drift_ns: int, length_ns: int = 60_000 * MS) -> Clock:
    """A run whose realtime was ahead of monotonic by the offset, and by the drift more at its end."""
    begin = {"monotonic": 5_000 * MS, "realtime": 5_000 * MS + offset_ns}
    end_ns = 5_000 * MS + length_ns
    return Clock(begin, {"monotonic": end_ns, "realtime": end_ns + offset_ns + drift_ns})


OFFSET = 1_700_000_000 * 10**9  # what CLOCK_REALTIME is ahead, about


@pytest.mark.parametrize("drift_ns", [0, 300_000, -300_000])
def test_the_nearer_end_of_the_run_tells_the_time(drift_ns: int) -> None:
    run = clock(OFFSET, drift_ns)
    assert run.to_monotonic(run.begin["realtime"]) == run.begin["monotonic"]
    assert run.to_monotonic(run.end["realtime"]) == run.end["monotonic"]
    near_begin, near_end = 10_000 * MS, 55_000 * MS
    assert run.to_monotonic(near_begin + OFFSET) == near_begin
    assert run.to_monotonic(near_end + OFFSET + drift_ns) == near_end
    assert run.drift_us == abs(drift_ns) / 1000


@given(st.integers(-(10**9), 10**9), st.integers(0, 10**12), st.integers(-(10**6), 10**6))
def test_no_time_is_wrong_by_more_than_the_drift(offset_ns: int, after_ns: int, drift_ns: int) -> None:
    run = clock(offset_ns, drift_ns, length_ns=10**12)
    true_ns = run.begin["monotonic"] + after_ns
    realtime_ns = true_ns + offset_ns + drift_ns * after_ns // 10**12  # it drifts evenly
    assert abs(run.to_monotonic(realtime_ns) - true_ns) <= run.drift_us * 1000 / 2 + 1
