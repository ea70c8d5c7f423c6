"""Breakpoints: off unless asked for, once each, and never for ever."""

import threading

import pytest

from hosts.breakpoints import Breakpoints
from hosts.protocol import TABLE
from topologies.errors import UsageError


def test_nothing_stops_unless_asked_for() -> None:
    reached: list[str] = []
    breakpoints = Breakpoints(reached.append)
    breakpoints.set("source:suspended", 60)
    breakpoints.entered("destination", "switching")
    breakpoints.entered("source", "precopy")
    assert reached == []


def test_a_breakpoint_stops_once_until_it_is_let_go() -> None:
    reached: list[str] = []
    breakpoints = Breakpoints(reached.append)
    breakpoints.set("source:suspended", 60)
    session = threading.Thread(target=breakpoints.entered, args=("source", "suspended"), daemon=True)
    session.start()
    session.join(0.2)
    assert session.is_alive() and reached == ["source:suspended"]
    breakpoints.entered("source", "suspended")  # another migration passes
    breakpoints.clear()
    session.join(10)
    assert not session.is_alive() and reached == ["source:suspended"]


def test_a_breakpoint_lets_go_by_itself() -> None:
    breakpoints = Breakpoints(lambda state: None)
    breakpoints.set("destination:claimed", 0.01)
    breakpoints.entered("destination", "claimed")


def test_a_breakpoint_that_was_taken_away_stops_nothing() -> None:
    reached: list[str] = []
    breakpoints = Breakpoints(reached.append)
    breakpoints.set("destination:claimed", 60)
    breakpoints.clear()
    breakpoints.entered("destination", "claimed")
    assert reached == []


def test_every_state_that_a_migration_can_enter_can_be_asked_for_and_no_other() -> None:
    breakpoints = Breakpoints(lambda state: None)
    for role, table in TABLE.items():
        for state in {end for row in table.values() for end in row.values()}:
            breakpoints.set(f"{role}:{state}", 1)
    for unknown in ("", "source", "source:asleep", "suspended", "vcenter:done", "source:new"):
        with pytest.raises(UsageError, match="no migration enters"):
            breakpoints.set(unknown, 1)
