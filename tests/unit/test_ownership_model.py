"""Every order in which things can happen to a VM's ownership: two hosts, one storage, and what goes wrong in between.

A rule less, and there is a story with a bad end. `--long`: finer clocks, more generations, three hosts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from ownership_model import (
    Invariant,
    Model,
    Rules,
    Survivor,
    Violation,
    World,
    disk_open,
    explore,
    nobody_left,
    two_run,
    two_winners,
)

from hosts import ownership
from hosts.ownership import Claiming, Lease, Step

NONE: frozenset[str] = frozenset()
# What an owner's clock may lose in a lease, and its stop takes, is a tick; so these are the coarsest clocks for which
# the rules are right, and the long form's are of half seconds. (All ticks are whole: an end "not after" is inclusive.)
COARSE, FINE = (3, 1), (6, 4)
TWO = World(generations=2)
PUNCTUAL = replace(TWO, late=NONE)
RESTARTS_ALONE = replace(PUNCTUAL, hand_over=False, crashes=False)
THREE_TURNS = replace(RESTARTS_ALONE, generations=3)
DISK = replace(THREE_TURNS, disk=True)
ORDERED_ALONE = World(generations=2, late=frozenset({"LINK"}), crashes=False, restarts=False)
TWICE = replace(PUNCTUAL, repeated=frozenset({"PULSE"}), hand_over=False)


@pytest.fixture(autouse=True)
def clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clocks(monkeypatch, COARSE)


def set_clocks(monkeypatch: pytest.MonkeyPatch, ticks: tuple[int, int]) -> None:
    monkeypatch.setattr(ownership, "LEASE_S", ticks[0])
    monkeypatch.setattr(ownership, "RUN_S", ticks[1])


def broken(world: World, *invariants: Invariant, rules: Rules | None = None) -> Violation:
    violation = explore(Model(world, rules), *invariants).violation
    assert violation is not None, "there is no story that ends badly"
    print(violation)
    return violation


def holds(world: World, *invariants: Invariant) -> set[str]:
    found = explore(Model(world), *invariants)
    assert found.violation is None, str(found.violation)
    print(found.states, "states")
    return found.actions


# ------------------------------------------------------------ what holds


def test_a_lease_leaves_room_for_clocks_that_differ_and_for_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert ownership.RUN_S * 1.1 + 0.25 < ownership.LEASE_S


def test_two_hosts_never_run_the_vm_and_whoever_is_left_does() -> None:
    """Late LINKs and PULSEs, crashes, hand-overs, restarts, and owners that come back."""
    actions = holds(TWO, two_run, two_winners, Survivor(TWO))
    assert {"LINK  arrives late", "PULSE  arrives late", "SETTLE: claims", "LOOK answered: DEAD"} <= actions


def test_a_vm_that_is_handed_over_is_not_given_up_by_both() -> None:
    actions = holds(ORDERED_ALONE, two_run, nobody_left)
    assert {"HEAR RESUMED", "ABORT", "LINK  arrives late", "SETTLE: discarded"} <= actions


def test_the_disk_takes_no_write_of_an_older_owner_when_nothing_is_late() -> None:
    """However slow a claimant is: it is told by CHECK before it has written anything."""
    holds(DISK, two_run, disk_open)


def test_a_fence_that_arrives_late_opens_the_disk_to_an_older_owner_until_the_next_pulse() -> None:
    late = replace(DISK, late=frozenset({"FENCE"}), crashes=True)
    assert "takes writes of 2" in broken(late, disk_open).what


def test_a_pulse_must_not_be_sent_twice_as_its_copy_would_hide_a_later_one() -> None:
    """hosts/nfs.py sends no call twice. A look that saw when the file was written would not need that."""
    violation = broken(TWICE, two_run)
    assert any("PULSE 1 arrives late" in line for line in violation.story)
    assert explore(Model(TWICE, Rules(stamped=True)), two_run).violation is None


# ------------------------------------------------------------ what every rule is for


@dataclass(frozen=True)
class Mutation:
    """A rule that is missing: one of Rules, or something of hosts/ownership.py."""

    world: World
    ends: str = "run the VM"
    rules: Rules | None = None
    replaces: tuple[Any, str, Any] | None = None


def _extended(lease: Lease, sent_s: float, answered_s: float) -> Lease:
    return replace(lease, sent_s=sent_s)


def _extended_from_its_answer(lease: Lease, sent_s: float, answered_s: float) -> Lease | None:
    return replace(lease, sent_s=answered_s) if lease.lasts(answered_s) else None


def _won(claiming: Claiming, nonce: str) -> Claiming:
    return replace(claiming, step=Step.FENCE)


def _owned(claiming: Claiming) -> Claiming:
    return replace(claiming, step=Step.OWNED)


MUTATIONS = {
    "a late pulse extends a lease that has lapsed": Mutation(
        replace(RESTARTS_ALONE, late=frozenset({"PULSE"})), replaces=(Lease, "pulsed", _extended)
    ),
    "a pulse counts from its answer": Mutation(RESTARTS_ALONE, replaces=(Lease, "pulsed", _extended_from_its_answer)),
    "an owner runs for as long as a breaker waits": Mutation(RESTARTS_ALONE, replaces=(ownership, "RUN_S", 3)),
    "there is no room for clocks that differ": Mutation(RESTARTS_ALONE, replaces=(ownership, "RUN_S", 2)),
    "whoever finds the name taken has lost, though it was he": Mutation(
        World(late=NONE), rules=Rules(unlinked_is_lost=True)
    ),
    "whoever finds the name taken has won": Mutation(PUNCTUAL, replaces=(Claiming, "linked", _won)),
    "a claimant does not check": Mutation(DISK, "takes writes of 2", replaces=(Claiming, "fenced", _owned)),
    "a lease counts from the end of the claim": Mutation(
        replace(THREE_TURNS, crashes=True), rules=Rules(lease_from_end_of_claim=True)
    ),
    "a watch begins when it is asked for": Mutation(RESTARTS_ALONE, rules=Rules(watch_from_asking=True)),
    "a watch ends when it is answered": Mutation(RESTARTS_ALONE, rules=Rules(watch_until_answer=True)),
    "a source that hears nothing runs on": Mutation(PUNCTUAL, rules=Rules(resume_on_silence=True)),
    "a destination without an answer to its LINK says ABORT": Mutation(
        World(late=NONE), rules=Rules(abort_unanswered=True)
    ),
    "a suspended guest that is found runs again": Mutation(PUNCTUAL, rules=Rules(resume_what_is_found=True)),
    "a destination without an answer to its LINK goes by the generation before": Mutation(
        ORDERED_ALONE, "nobody has the VM", Rules(discard_undecided=True)
    ),
    "a source that has asked for the generation goes by an ABORT all the same": Mutation(
        ORDERED_ALONE, "nobody has the VM", Rules(hear_after_claim=True)
    ),
    "an owner that is overtaken in a switchover forgets that it was one": Mutation(
        PUNCTUAL, "does not run again", Rules(forget_when_overtaken=True)
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_each_rule_is_needed(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutation.replaces is not None:
        monkeypatch.setattr(*mutation.replaces)
    looks: dict[str, Callable[[], list[Invariant]]] = {
        "run the VM": lambda: [two_run],
        "takes writes of 2": lambda: [disk_open],
        "nobody has the VM": lambda: [nobody_left],
        "does not run again": lambda: [Survivor(mutation.world, mutation.rules)],
    }
    violation = broken(mutation.world, *looks[mutation.ends](), rules=mutation.rules)
    assert mutation.ends in violation.what


# ------------------------------------------------------------ the long form


LONG = {
    "clocks of half seconds": (FINE, TWO),
    "three generations": (COARSE, World()),
    "two late messages": (COARSE, replace(TWO, room=2)),
    "three hosts": (COARSE, replace(PUNCTUAL, hosts=3, crashes=False)),
    "late fences": (COARSE, replace(DISK, late=frozenset({"FENCE"}), crashes=True)),
    "hand-overs and nothing else": (FINE, replace(ORDERED_ALONE, generations=3)),
    "hand-overs and the disk": (COARSE, World(late=NONE, disk=True)),
}


@pytest.mark.parametrize(("ticks", "world"), LONG.values(), ids=LONG.keys())
def test_the_long_form(
    ticks: tuple[int, int], world: World, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    if not pytestconfig.getoption("--long"):
        pytest.skip("the long form only")
    set_clocks(monkeypatch, ticks)
    open_disk = [disk_open] if world.disk and "FENCE" not in world.late else []
    nobody = [] if world.restarts else [nobody_left]
    holds(world, two_run, two_winners, *open_disk, *nobody, *([Survivor(world)] if world.restarts else []))
