"""Power-offs that fail halfway, with a guest that does as it is told and a datastore that does not always answer."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import UnsureStore
from stores import make_vm

from hosts import control
from hosts.caretaker import Caretaker
from hosts.datastore import Datastore, OwnerUnknown
from hosts.inventory import HostError, Inventory
from hosts.power import Power
from hosts.vm_folder import VmFolder


class Host:
    """esx1, which runs vm1 under generation 1; `done` is what becomes of the guest, and what is told."""

    def __init__(self, folder: Path) -> None:
        self.store = UnsureStore(folder)
        make_vm(self.store, "vm1")
        self.datastore = Datastore(self.store)
        assert self.datastore.claim("vm1", 1, "esx1")
        self.done: list[str] = []
        (folder / "guests").mkdir()
        self.site: Any = SimpleNamespace(
            host=SimpleNamespace(name="esx1"),
            where="nfs://nowhere",
            datastore=self.datastore,
            folder_of=lambda vm: VmFolder(self.store, vm),
            guests=folder / "guests",
            events=SimpleNamespace(emit=lambda kind, **fields: self.done.append(kind)),
        )
        self.inventory = Inventory(self.site)
        self.caretaker = Caretaker(self.inventory)
        self.power = Power(self.inventory, self.caretaker)
        self.inventory.machines["vm1"] = self.machine()

    def machine(self) -> Any:
        def shut_down() -> bytes:
            self.done.append("shut down")
            return b"{}"

        return SimpleNamespace(
            vm=SimpleNamespace(name="vm1"),
            generation=1,
            unsettled=0,
            is_alive=True,
            hold=lambda: None,
            guest=SimpleNamespace(shut_down=shut_down),
            dismantle=lambda: self.done.append("dismantled"),
            emit=lambda kind, **fields: self.done.append(kind),
        )

    def off(self) -> dict[str, Any]:
        return self.power.off(control.PowerOff("vm1"))

    @property
    def newest(self) -> tuple[int, bool]:
        claim = self.datastore.newest("vm1")
        assert claim is not None and claim.host == "esx1"
        return claim.generation, claim.running


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_vm_is_shut_down_and_its_nvram_saved_before_another_host_may_have_it(host: Host) -> None:
    order: list[str] = []
    host.store.mishaps["link"] = [lambda: order.extend(host.store.names("/vm1"))]
    assert host.off() == {"generation": 2, "orderly": True}
    assert "vm1.nvram" in order
    assert host.done == ["vm.shutting_down", "shut down", "dismantled", "vm.powered_off"]
    assert host.newest == (2, False)


def test_a_power_off_whose_word_was_heard_and_not_answered_can_be_repeated(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = host.datastore.claim
    monkeypatch.setattr(host.datastore, "claim", lambda *order, **words: claim(*order, **words, patience_s=0))
    host.store.mishaps["chown"] = ["lost"]
    with pytest.raises(OwnerUnknown):
        host.off()
    assert host.newest == (2, False)
    assert host.off() == {"generation": 2, "orderly": False}
    assert host.newest == (2, False)


def test_a_power_off_whose_word_was_lost_can_be_repeated(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = host.datastore.claim
    monkeypatch.setattr(host.datastore, "claim", lambda *order, **words: claim(*order, **words, patience_s=0))
    host.store.mishaps["link"] = ["lost"]
    with pytest.raises(OwnerUnknown):
        host.off()
    assert host.off() == {"generation": 2, "orderly": False}


def test_a_vm_whose_nvram_finds_no_room_is_off_all_the_same(host: Host) -> None:
    host.store.mishaps["rename"] = [OSError(errno.ENOSPC, "full")]
    assert host.off() == {"generation": 2, "orderly": False}
    assert host.newest == (2, False)


def test_a_vm_that_another_host_was_the_last_to_have_is_not_powered_off_here(host: Host) -> None:
    del host.inventory.machines["vm1"]
    for generation, running in ((2, True), (3, False)):
        assert host.datastore.claim("vm1", generation, "esx2", running=running)
        with pytest.raises(HostError, match="VM vm1 is not on esx1"):
            host.off()
