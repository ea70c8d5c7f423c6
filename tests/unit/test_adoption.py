"""What an agent makes of the guests that it finds: the newest generation decides."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from hosts.adoption import Fate, adopt, fate
from hosts.channel import GuestState
from hosts.datastore import Claim, DatastoreError, LocalDatastore
from hosts.machine import Machine


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


def test_a_guest_that_the_datastore_has_never_heard_of_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unmounted datastore is an empty folder."""
    done: list[str] = []
    site: Any = SimpleNamespace(datastore=LocalDatastore(tmp_path), host=SimpleNamespace(name="esx1"))

    def found(*_: Any) -> Any:
        machine = SimpleNamespace(site=site, vm=SimpleNamespace(name="vm1"), guest=SimpleNamespace(state="running"))
        machine.let_go, machine.dismantle = lambda: done.append("let go"), lambda: done.append("dismantled")
        return machine

    monkeypatch.setattr(Machine, "adopt", found)
    with pytest.raises(DatastoreError, match="VM vm1 is here, and its datastore has never heard of it"):
        adopt(site, tmp_path / "vm1")
    assert done == ["let go"]
