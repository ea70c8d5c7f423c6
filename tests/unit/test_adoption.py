"""What an agent makes of the guests that it finds: the newest generation decides."""

from typing import get_args

import pytest

from hosts.adoption import Fate, fate
from hosts.channel import GuestState
from hosts.datastore import Claim


def claim(host: str, running: bool = True) -> Claim:
    return Claim("vm1", 7, host, running, "nonce")


@pytest.mark.parametrize("state", get_args(GuestState))
def test_what_is_not_ours_never_runs_here(state: str) -> None:
    for newest in (claim("esx2"), claim("esx1", running=False), claim("esx2", running=False)):
        assert fate(newest, "esx1", state) is Fate.DISCARDED


def test_a_vm_of_ours_that_runs_goes_on() -> None:
    assert fate(claim("esx1"), "esx1", "running") is Fate.GOES_ON


@pytest.mark.parametrize("state", ["suspended", "restored"])
def test_a_vm_of_ours_that_does_not_run_has_to_be_claimed_first(state: str) -> None:
    assert fate(claim("esx1"), "esx1", state) is Fate.RUNS_AGAIN
