"""Who ran a VM when: every overlap shows, and what only stood still did not run."""

import pytest

from experiments.tenures import Tenure, overlap_ms, show, tenures
from topologies.events import Event

MS = 1_000_000


def event(ms: int, source: str, kind: str, **fields: object) -> Event:
    return {"t": ms * MS, "source": source, "kind": kind, "vm": "vm1", **fields}


MOVED = [
    event(0, "esx1", "vm.powering_on"),
    event(100, "esx1", "vm.suspended"),
    event(130, "esx2", "vm.resuming", stalled=False),
    event(300, "esx2", "vm.powered_off"),
]


def test_a_move_is_two_tenures_one_after_the_other() -> None:
    assert tenures(MOVED, "vm1") == [Tenure("esx1", 0, 100 * MS), Tenure("esx2", 130 * MS, 300 * MS)]
    assert overlap_ms(tenures(MOVED, "vm1")) == 0
    assert tenures(MOVED, "vm2") == []


@pytest.mark.parametrize(
    ("kind", "overlap"), [("vm.unstalled", 50), ("vm.powering_on", 50), ("vm.resuming", 50), ("vm.adopted", 0)]
)
def test_one_that_runs_again_while_another_does_is_an_overlap(kind: str, overlap: float) -> None:
    again = [event(200, "esx1", kind), event(250, "esx1", "vm.fenced")]
    assert overlap_ms(tenures([*MOVED, *again], "vm1")) == overlap


def test_one_that_never_ends_overlaps_for_as_long_as_the_other_runs() -> None:
    assert overlap_ms(tenures([MOVED[0], *MOVED[2:]], "vm1")) == 170


def test_what_was_resumed_without_a_lease_has_not_run() -> None:
    stalled = [event(200, "esx1", "vm.stalled"), event(201, "esx1", "vm.resuming", stalled=True)]
    assert overlap_ms(tenures([*MOVED, *stalled], "vm1")) == 0


def test_a_guest_that_was_killed_from_outside_ends_the_tenure_of_its_host() -> None:
    killed = [MOVED[0], event(40, "testbed", "guest.ended", host="esx1")]
    assert tenures(killed, "vm1") == [Tenure("esx1", 0, 40 * MS)]


def test_the_picture_has_a_line_for_each_host() -> None:
    first, second, scale = show(tenures(MOVED, "vm1"), width=30)
    assert first.strip() == "esx1 |██████████                    |"
    assert second.strip() == "esx2 |            ██████████████████|"
    assert scale.endswith("0.3")
