"""The queue of migrations: who may start, in which order; what a task tells of itself."""

import threading
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosts.precopy import Progress
from hosts.tasks import Cancelled, Queue, Task, may_start, migrations_at_once

HOSTS = "abcd"
moves = st.lists(st.tuples(st.sampled_from(HOSTS), st.sampled_from(HOSTS)).filter(lambda hosts: hosts[0] != hosts[1]))
limits = st.integers(1, 4)


def test_a_host_takes_part_in_four_migrations_on_a_gigabit_link_and_in_eight_beyond() -> None:
    assert [migrations_at_once(link) for link in (10**8, 10**9, 10**10, 0)] == [4, 4, 8, 8]


def test_what_shares_no_full_host_starts_and_the_rest_waits() -> None:
    assert may_start([("a", "b"), ("c", "d"), ("b", "a")], [], limit=1) == [0, 1]
    assert may_start([("a", "b"), ("c", "d")], [("b", "c")], limit=1) == []
    assert may_start([("a", "b"), ("b", "a"), ("a", "b")], [], limit=2) == [0, 1]


def test_a_later_one_does_not_take_the_place_that_an_earlier_one_waits_for() -> None:
    assert may_start([("a", "b"), ("b", "c")], [("a", "d")], limit=1) == []


@given(moves, moves, limits)
def test_no_host_is_ever_over_the_limit(
    waiting: list[tuple[str, str]], running: list[tuple[str, str]], limit: int
) -> None:
    admitted: list[tuple[str, str]] = []
    for move in running:  # only what the queue itself would have let in
        if may_start([move], admitted, limit):
            admitted.append(move)
    started = [waiting[index] for index in may_start(waiting, admitted, limit)]
    load = Counter(host for hosts in (*admitted, *started) for host in hosts)
    assert all(count <= limit for count in load.values())


@given(moves, limits, st.randoms())
def test_all_have_their_turn_and_those_of_the_same_hosts_in_their_order(
    waiting: list[tuple[str, str]], limit: int, random: Random
) -> None:
    queue = list(enumerate(waiting))
    running: list[tuple[int, tuple[str, str]]] = []
    order: list[tuple[int, tuple[str, str]]] = []
    while queue or running:
        starting = [queue[index] for index in may_start([hosts for _, hosts in queue], [h for _, h in running], limit)]
        assert starting or running  # somebody can always go on
        queue = [move for move in queue if move not in starting]
        running += starting
        order += starting
        running.remove(random.choice(running))
    for pair in {frozenset(hosts) for hosts in waiting}:
        of_pair = [number for number, hosts in order if frozenset(hosts) == pair]
        assert of_pair == sorted(of_pair)


# ---------------------------------------------------------------- tasks


class Bench:
    """A queue with tasks whose work goes on until it is let go."""

    def __init__(self, limit: int) -> None:
        self.queue, self.go_on, self.stopped = Queue(limit), threading.Event(), threading.Event()
        self.begun: list[str] = []

    def start(self, name: str, error: Exception | None = None) -> Task[str]:
        def work(task: Task[str]) -> str:
            self.begun.append(name)
            assert self.go_on.wait(10)
            if self.stopped.is_set():
                raise RuntimeError("stopped")
            if error is not None:
                raise error
            return f"{name} is done"

        task = Task(name, ("a", "b"), self.queue, work, lambda task: self.stop())
        threading.Thread(target=task.run, daemon=True).start()
        return task

    def stop(self) -> None:
        self.stopped.set()
        self.go_on.set()


def test_tasks_beyond_the_limit_are_queued_and_run_in_their_order() -> None:
    bench = Bench(limit=1)
    tasks = [bench.start(name) for name in ("one", "two", "three")]
    while not bench.begun:
        tasks[1].over.wait(0.01)
    assert [task.status().state for task in tasks] == ["running", "queued", "queued"]
    bench.go_on.set()
    assert [task.wait(10) for task in tasks] == ["one is done", "two is done", "three is done"]
    assert bench.begun == ["one", "two", "three"]
    assert {task.status().state for task in tasks} == {"success"}


def test_a_queued_task_that_is_cancelled_never_begins_and_those_behind_it_do() -> None:
    bench = Bench(limit=1)
    first, second, third = (bench.start(name) for name in ("one", "two", "three"))
    second.cancel()
    with pytest.raises(Cancelled):
        second.wait(10)
    bench.go_on.set()
    assert (first.wait(10), third.wait(10)) == ("one is done", "three is done")
    assert bench.begun == ["one", "three"]
    assert second.status().state == "cancelled"


def test_a_running_task_that_is_cancelled_is_stopped() -> None:
    bench = Bench(limit=1)
    task = bench.start("one")
    while not bench.begun:
        task.over.wait(0.01)
    task.cancel()
    with pytest.raises(RuntimeError, match="stopped"):
        task.wait(10)
    assert task.status().state == "cancelled"


def test_a_task_that_fails_says_why_and_makes_room() -> None:
    bench = Bench(limit=1)
    bench.go_on.set()
    task = bench.start("one", ValueError("no cable"))
    with pytest.raises(ValueError, match="no cable"):
        task.wait(10)
    assert (task.status().state, task.status().message) == ("error", "no cable")
    assert bench.start("two").wait(10) == "two is done"


def test_a_task_tells_the_latest_of_its_progress() -> None:
    task = Bench(limit=1).start("one")
    task.note_progress(Progress("round", 2, 100, 100, 5000, None, 12.5, "another round", 0.2))
    task.note_progress(Progress("round", 3, 100, 50, 6000))
    status = task.status()
    assert (status.phase, status.round, status.bytes_sent) == ("round", 3, 6000)
    assert (status.predicted_downtime_ms, status.throttle) == (12.5, 0.0)


def test_waiting_for_a_task_may_be_bounded() -> None:
    with pytest.raises(TimeoutError):
        Bench(limit=1).start("one").wait(0.01)
