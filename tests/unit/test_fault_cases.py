"""The table of what can go wrong: it has every state, and the tests take enough of it."""

from pathlib import Path

import pytest

from experiments.fault_cases import INJURIES, End, all_cases, short_cases
from experiments.faults import chosen
from hosts.protocol import FINAL, TABLE
from topologies.errors import UsageError

# A source comes to these after it has been hurt, and asks the datastore
_UNSURE = {"source:uncertain", "source:doubtful"}


def states() -> set[str]:
    """Every state in which a migration can be stopped: not before it has begun, and not after it has ended."""
    return {
        f"{role}:{state}"
        for role in TABLE
        for row in TABLE[role].values()
        for state in row.values()
        if state not in FINAL
    }


def test_every_state_of_the_protocol_meets_every_injury() -> None:
    cases = all_cases()
    for state in states() - _UNSURE:
        assert {case.injury for case in cases if case.at == state} >= set(INJURIES), state
    assert {case.at for case in cases} >= _UNSURE


def test_the_short_list_has_every_state_and_every_injury_and_at_least_forty_cases() -> None:
    cases = short_cases()
    assert {case.at for case in cases} >= states()
    assert {case.injury for case in cases} == {case.injury for case in all_cases()}
    assert len(cases) >= 40


def test_the_readme_knows_how_many_there_are() -> None:
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    assert f"names the {len(all_cases())} cases" in readme
    assert f"(without it, {len(short_cases())})" in readme


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)


def test_before_the_point_of_no_return_only_the_death_of_the_vm_itself_is_a_cold_end() -> None:
    claimed = {"claimed", "running", "owned", "resumed", "filling", "filled", "serving", "served"}
    for case in all_cases():
        before = case.at and case.at.partition(":")[2] not in claimed
        if before and End.COLD in case.ends:
            # a claim that the datastore has not answered may be found to have succeeded
            assert case.injury in ("kill-source-guest", "datastore-unreachable"), case.name


def test_behind_it_the_source_never_runs_the_vm() -> None:
    for case in all_cases():
        if case.at.partition(":")[2] in {"claimed", "running", "owned", "resumed", "filling", "filled", "serving"}:
            assert End.SOURCE not in case.ends, case.name


def test_cases_are_chosen_by_a_pattern_too_each_once() -> None:
    cases = chosen(("cut@source:s*", "cut@source:served"), long=False)
    assert [case.name for case in cases] == ["cut@source:suspended", "cut@source:serving", "cut@source:served"]


def test_a_case_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="there is no case 'flood'"):
        chosen(("flood",), long=False)
