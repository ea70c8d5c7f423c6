"""Pre-copy on a small memory: whatever the guest writes and wherever a round is broken off, no page is forgotten."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Event, Thread
from typing import NamedTuple, cast

import numpy as np
import pytest
from fakes import ToldBitmap, ToldGuest, ToldMachine
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pairs import memory, migration, page_set

from hosts import pace, precopy
from hosts.feed import Feed
from hosts.machine import Machine
from hosts.policy import Action, Decision, Policy
from hosts.precopy import Cancelled, PreCopy, Progress
from hosts.protocol import Kind
from hosts.ram import PAGE, DirtyBitmap, HashBitmap, PageHashes, Ram, count
from hosts.stream import Stream, StreamLost

PAGES, CHUNK = 96, 4
pages = st.sets(st.integers(0, PAGES - 1), max_size=12)


def never() -> None:
    """Nobody cancels, nobody writes."""


class WatchedFeed(Feed):
    """Tells before and after each chunk."""

    def __init__(self, ram: Ram, hashes: PageHashes, streams: list[Stream], *, copies: bool) -> None:
        super().__init__(ram, hashes, streams, copies=copies)
        self.moment: Callable[[], None] = never

    def send(self, chunk: np.ndarray, number: int) -> None:
        self.moment()
        super().send(chunk, number)
        self.moment()


class WatchedBitmap(ToldBitmap):
    """Tells before and after each look."""

    def __init__(self, ram: Ram) -> None:
        super().__init__(ram)
        self.moment: Callable[[], None] = never

    def take(self, first: int = 0, end: int | None = None) -> np.ndarray:
        self.moment()
        taken = super().take(first, end)
        self.moment()
        return taken

    def peek(self) -> np.ndarray:
        self.moment()
        return super().peek()


class Run(NamedTuple):
    """A pre-copy and both memories."""

    precopy: PreCopy
    ram: Ram
    copy: Ram
    feed: WatchedFeed
    machine: ToldMachine
    reports: list[Progress]
    cancelled: Event

    @property
    def guest(self) -> ToldGuest:
        return self.machine.guest

    @property
    def bitmap(self) -> WatchedBitmap:
        """The guest's, where it is told what is written."""
        assert isinstance(self.guest.bitmap, WatchedBitmap)
        return self.guest.bitmap

    def differing(self) -> set[int]:
        """The pages that the destination does not have as they are."""
        return set(np.flatnonzero((self.ram.words != self.copy.words).any(axis=1)).tolist())

    def due(self) -> set[int]:
        """What would be sent after the suspend."""
        return set(np.flatnonzero(self.precopy.still_due(self.precopy.bitmap.take())).tolist())


def _receive(stream: Stream, copy: Ram) -> None:
    """A destination's part until its peer is gone."""
    hashes = PageHashes(copy)
    try:
        while True:
            header, _ = stream.receive()
            if header.kind is Kind.ROUND_END:
                stream.mark(Kind.ROUND_ACK, header.round)
            else:
                stream.receive_pages(header, copy, hashes)
    except StreamLost:
        return


@contextmanager
def prepared(policy: Policy, bitmap_of: Callable[[Ram], DirtyBitmap] = WatchedBitmap) -> Iterator[Run]:
    """Small stretches and chunks, and a look at the guest after each chunk; one connection."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(precopy, "CHUNK_PAGES", CHUNK)
        patch.setattr(precopy, "_STRETCH_BYTES", 3 * CHUNK * PAGE)
        patch.setattr(precopy, "_PERIOD_S", 0.0)
        patch.setattr(pace, "EVERY_S", 0.0)
        ram, copy = stack.enter_context(memory(PAGES)), stack.enter_context(memory(PAGES))
        source, destination = stack.enter_context(migration())
        receiving = Thread(target=_receive, args=(destination, copy))
        receiving.start()
        stack.callback(receiving.join)
        stack.callback(source.close)
        machine = ToldMachine(ToldGuest(ram, bitmap_of(ram)))
        feed = WatchedFeed(ram, PageHashes(ram), [source], copies=machine.guest.bitmap.needs_copies)

        reports: list[Progress] = []
        cancelled = Event()
        made = PreCopy(cast(Machine, machine), "vm1-0badcafe", policy, feed, reports.append, cancelled)
        yield Run(made, ram, copy, feed, machine, reports, cancelled)


class Schedule(NamedTuple):
    """What the guest has at first, what it writes at the nth moment, and the nth look within rounds that breaks off."""

    first: set[int]
    writes: dict[int, set[int]]
    breaks: tuple[int, Action] | None


schedules = st.builds(
    Schedule,
    st.sets(st.integers(0, PAGES - 1)),
    st.dictionaries(st.integers(0, 80), pages, max_size=25),
    st.none()
    | st.tuples(st.integers(0, 30), st.sampled_from([Action.SWITCH, Action.POSTCOPY, Action.GIVE_UP, Action.THROTTLE])),
)
everything = set(range(PAGES))


@settings(max_examples=150)
@given(schedules, st.booleans())
@example(Schedule(everything, {}, None), False)
@example(Schedule(everything, {}, (0, Action.SWITCH)), False)  # before anything was sent
@example(Schedule(everything, {9: {0, 50}}, (5, Action.POSTCOPY)), False)  # written before and behind the break
@example(Schedule(everything, dict.fromkeys(range(60), everything), (25, Action.SWITCH)), False)  # within a later round
@example(Schedule({0}, {60: {95}}, None), True)
def test_whatever_is_written_and_wherever_a_round_ends_every_page_that_differs_is_still_due(
    schedule: Schedule, by_hash: bool
) -> None:
    looks = iter(range(10**6))

    def within_round(*_: object) -> Decision:
        at, action = schedule.breaks or (-1, Action.CONTINUE)
        return Decision(action if next(looks) == at else Action.CONTINUE)

    with prepared(Policy(), HashBitmap if by_hash else WatchedBitmap) as run:
        told = run.guest.bitmap if isinstance(run.guest.bitmap, WatchedBitmap) else ToldBitmap(run.ram)
        moments = iter(range(10**6))

        def moment() -> None:
            now = next(moments)
            told.write(schedule.writes.get(now, ()), now + 2)

        told.write(schedule.first, 1)
        run.feed.moment = moment
        if isinstance(told, WatchedBitmap):
            told.moment = moment
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(precopy, "within_round", within_round)
            decision = run.precopy.run()

        if isinstance(told, WatchedBitmap):
            told.moment = never  # it is suspended
        due = run.due()
        assert run.differing() <= due
        assert decision.action in (Action.SWITCH, Action.POSTCOPY, Action.GIVE_UP)
        if schedule.breaks is None:
            assert decision.action is Action.SWITCH
        if schedule.breaks is None and not schedule.writes:
            assert due == set(), "and nothing else"
        numbers = [fields["round"] for kind, fields in run.machine.events if kind == "round.end"]
        assert numbers == list(range(1, len(run.precopy.rounds) + 1))
        assert sum(r.pages + r.zero_pages for r in run.precopy.rounds) == run.feed.sent + run.feed.zero


def test_what_a_guest_has_written_by_the_time_of_its_stretch_crosses_once() -> None:
    with prepared(Policy()) as run:
        bitmap = run.bitmap
        bitmap.write(range(PAGES), 1)
        run.feed.moment = lambda: bitmap.write([PAGES - 1], 7)
        looks = iter([Decision(Action.CONTINUE)] * (PAGES // CHUNK) + [Decision(Action.SWITCH)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(precopy, "within_round", lambda *_: next(looks))
            run.precopy.run()
        assert run.feed.sent == PAGES, "not once more for what was written before its turn in round 1"
        assert run.due() == {PAGES - 1}


def test_pages_that_do_not_exist_are_not_sent_and_not_made() -> None:
    with prepared(Policy()) as run:
        run.bitmap.write({3, 40}, 1)
        run.precopy.run()
        assert (run.feed.sent, run.feed.zero) == (2, 0)
        assert page_set(run.ram.populated()) == {3, 40}


@pytest.mark.parametrize(
    ("mode", "action"), [("postcopy", Action.POSTCOPY), ("stop-and-copy", Action.SWITCH)], ids=["post", "stop"]
)
def test_without_rounds_everything_that_exists_is_still_due(mode: str, action: Action) -> None:
    with prepared(Policy(mode=mode)) as run:  # type: ignore[arg-type]
        bitmap = run.bitmap
        bitmap.write({1, 2, 90}, 1)
        assert run.precopy.run().action is action
        bitmap.write({5}, 2)
        assert run.due() == {1, 2, 5, 90}
        assert run.precopy.rounds == []
        assert run.feed.bytes_sent == run.feed._streams[0].bytes_sent


# ---------------------------------------------------------------- throttle and cancel


def busy(run: Run, pages_for_a_chunk: int) -> Callable[[], None]:
    """A guest that writes so many pages for each chunk that is sent, less what the throttle takes."""
    written = itertools.count(1)

    def write() -> None:
        share = 1 - run.precopy.throttle
        for number in itertools.islice(written, round(pages_for_a_chunk * share / 2)):
            run.bitmap.write([number * 7 % PAGES], number + 1)

    return write


@pytest.mark.parametrize("within", [False, True])
def test_a_guest_that_writes_too_fast_is_slowed_until_it_converges_and_gets_its_speed_back(within: bool) -> None:
    with prepared(Policy(timeout_s=1e-9, timeout_strategy="throttle", downtime_ms=1e6)) as run:
        run.bitmap.write(range(PAGES), 1)
        run.feed.moment = busy(run, 8)
        with pytest.MonkeyPatch.context() as patch:
            if not within:
                patch.setattr(precopy, "_PERIOD_S", 3600.0)
                patch.setattr(run.precopy, "policy", Policy(timeout_s=1e-9, timeout_strategy="throttle", downtime_ms=9))
            decision = run.precopy.run()
        assert decision.action is Action.SWITCH
        steps = list(run.precopy.throttles)
        assert steps == [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99][: len(steps)], "one step after the other"
        assert steps
        assert run.guest.shares == steps, "each was told to the guest"
        assert [fields["share"] for kind, fields in run.machine.events if kind == "guest.throttled"] == steps
        assert run.reports[-1].throttle == run.precopy.throttle == steps[-1]
        run.precopy.restore_speed()
        assert run.guest.shares == [*steps, 0.0]
        assert run.precopy.throttle == 0.0
        run.precopy.restore_speed()
        assert run.guest.shares == [*steps, 0.0], "once is enough"


def test_a_guest_that_was_never_slowed_is_told_nothing() -> None:
    with prepared(Policy()) as run:
        run.bitmap.write({1}, 1)
        run.precopy.run()
        run.precopy.restore_speed()
        assert run.guest.shares == []


def test_out_of_time_a_round_is_broken_off_and_what_it_leaves_is_counted() -> None:
    with prepared(Policy(timeout_s=1e-9)) as run:
        run.bitmap.write(range(PAGES), 1)
        decision = run.precopy.run()
        assert (decision.action, decision.predicted_downtime_ms) == (Action.GIVE_UP, None)
        assert run.feed.sent == 0
        (figures,) = run.precopy.rounds
        assert figures.remaining_bytes == PAGES * PAGE


@pytest.mark.parametrize("after", [0, 3, 100])
def test_a_cancel_is_heard_between_any_two_chunks_and_after_each_round(after: int) -> None:
    with prepared(Policy(mode="precopy", downtime_ms=0.1)) as run:
        bitmap = run.bitmap

        def moment() -> None:
            bitmap.write([5], 3)
            if run.feed.sent >= after * CHUNK:
                run.cancelled.set()

        bitmap.write(range(PAGES), 1)
        run.feed.moment = moment
        if not after:
            run.cancelled.set()
        with pytest.raises(Cancelled):
            run.precopy.run()
        assert run.feed.sent == after * CHUNK if after < 5 else run.feed.sent > PAGES


def test_progress_tells_where_each_round_is_and_how_it_ended() -> None:
    with prepared(Policy()) as run:
        run.bitmap.write(range(50), 1)
        run.precopy.run()
    *during, ended = run.reports
    assert [report.done_pages for report in during] == list(range(0, 50, CHUNK))
    assert {(report.phase, report.number, report.pages, report.round) for report in during} == {("round", 1, 50, None)}
    assert ended.round == run.precopy.rounds[0]
    assert (ended.done_pages, ended.decision) == (50, "switch over")
    assert ended.predicted_downtime_ms is not None
    assert count(run.precopy.bitmap.peek()) == 0
