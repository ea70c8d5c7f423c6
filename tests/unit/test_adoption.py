"""What an agent makes of the guests that it finds: the newest generation decides."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
from stores import datastore_of

from hosts.adoption import Fate, adopt, fate, settle
from hosts.channel import GuestState
from hosts.datastore import FORMAT, Claim, DatastoreError
from hosts.machine import Machine
from hosts.ownership import Lease


def claim(host: str, running: bool = True) -> Claim:
    return Claim(FORMAT, "vm1", 7, host, running, "nonce")


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
    site: Any = SimpleNamespace(datastore=datastore_of(tmp_path), host=SimpleNamespace(name="esx1"))

    def found(*_: Any) -> Any:
        machine = SimpleNamespace(site=site, vm=SimpleNamespace(name="vm1"), guest=SimpleNamespace(state="running"))
        machine.let_go, machine.dismantle = lambda: done.append("let go"), lambda: done.append("dismantled")
        return machine

    monkeypatch.setattr(Machine, "adopt", found)
    with pytest.raises(DatastoreError, match="VM vm1 is here, and its datastore has never heard of it"):
        adopt(site, tmp_path / "vm1")
    assert done == ["let go"]


class Found:
    """A machine that an agent finds, of a VM with these claims; `done` is what becomes of it."""

    def __init__(self, folder: Path, *hosts: str) -> None:
        self.datastore = datastore_of(folder, "vm1")
        for generation, host in enumerate(hosts, 1):
            assert self.datastore.claim("vm1", generation, host)
        self.site = SimpleNamespace(datastore=self.datastore, host=SimpleNamespace(name="esx1"))
        self.vm, self.generation, self.unsettled = SimpleNamespace(name="vm1"), len(hosts), 0
        self.done: list[str] = []
        self.guest = SimpleNamespace(run=lambda: self.done.append("run"))
        self.announcer = SimpleNamespace(start=lambda announced: self.done.append("announce"))

    def own(self, lease: Lease) -> None:
        self.done.append(f"own {lease.generation}")

    def keep(self) -> None:
        self.done.append("keep")

    def open_gate(self) -> None:
        self.done.append("open gate")

    def dismantle(self) -> None:
        self.done.append("dismantle")

    def emit(self, kind: str, **fields: object) -> None:
        self.done.append(kind)


def settled(found: Found, state: str) -> bool:
    return settle(cast(Machine, found), state)


def test_the_vmx_of_one_that_runs_is_told_to_go_on_and_nothing_is_claimed(tmp_path: Path) -> None:
    found = Found(tmp_path, "esx1")
    assert settled(found, "running")
    assert found.done == ["keep", "vm.adopted"]
    assert found.datastore.newest_generation("vm1") == 1


@pytest.mark.parametrize("state", ["suspended", "restored"])
def test_one_that_was_stopped_runs_under_a_generation_of_its_own(tmp_path: Path, state: str) -> None:
    found = Found(tmp_path, "esx2", "esx1")
    assert settled(found, state)
    assert found.done == ["vm.resuming", "own 3", "open gate", "run", "vm.adopted", "announce"]
    newest = found.datastore.newest("vm1")
    assert newest is not None and (newest.generation, newest.host, newest.running) == (3, "esx1", True)


@pytest.mark.parametrize("state", get_args(GuestState))
def test_anothers_is_taken_apart_and_nothing_is_claimed(tmp_path: Path, state: str) -> None:
    found = Found(tmp_path, "esx1", "esx2")
    assert not settled(found, state)
    assert found.done == ["dismantle", "vm.discarded"]
    assert found.datastore.newest_generation("vm1") == 2


def test_one_whose_claim_was_not_answered_is_given_up_only_if_another_has_that_generation(tmp_path: Path) -> None:
    """Our LINK may still be on its way, and the source gives the VM up when it arrives: so it is sent again."""
    for name in ("free", "taken"):
        (tmp_path / name).mkdir()
    found = Found(tmp_path / "free", "esx2")
    found.generation, found.unsettled = 0, 2
    assert settled(found, "restored")
    assert "own 2" in found.done
    taken = Found(tmp_path / "taken", "esx2", "esx2")
    taken.generation, taken.unsettled = 0, 2
    assert not settled(taken, "restored")
    assert taken.done == ["dismantle", "vm.discarded"]


def test_a_destination_that_claims_while_we_are_about_to_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Found(tmp_path, "esx1")
    claim = found.datastore.claim

    def another_is_faster(*order: Any) -> Any:
        assert datastore_of(tmp_path).claim("vm1", 2, "esx2")
        return claim(*order)

    monkeypatch.setattr(found.datastore, "claim", another_is_faster)
    assert not settled(found, "suspended")
    assert found.done == ["dismantle", "vm.discarded"]
