"""Power-offs that fail halfway, and guests that could not be adopted: a datastore that does not always answer."""

import errno
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import UnsureStore
from programs import eventually
from stores import make_vm

import hosts.caretaker
from hosts import control
from hosts.agent import Agent
from hosts.caretaker import Caretaker
from hosts.datastore import Datastore, DatastoreSilent, OwnerUnknown
from hosts.inventory import HostError, Inventory
from hosts.power import Power
from hosts.vm_folder import VmFolder
from topologies.errors import TestbedError
from topologies.plan import read_plan


class Host:
    """esx1, which runs vm1 under generation 1; `done` is what becomes of the guest, and what is told."""

    def __init__(self, folder: Path) -> None:
        self.store = UnsureStore(folder)
        make_vm(self.store, "vm1")
        self.datastore = Datastore(self.store)
        assert self.datastore.claim("vm1", 1, "esx1")
        self.done: list[str] = []
        (folder / "guests").mkdir()
        site: Any = SimpleNamespace(
            host=read_plan().host("esx1"),
            where="nfs://nowhere",
            datastore=self.datastore,
            folder_of=lambda vm: VmFolder(self.store, vm),
            guests=folder / "guests",
            events=SimpleNamespace(emit=lambda kind, **fields: self.done.append(kind)),
        )
        self.site = site
        self.inventory = Inventory(site)
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

    def is_impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It asks the datastore no more than once."""
        claim = self.datastore.claim
        monkeypatch.setattr(self.datastore, "claim", partial(claim, patience_s=0))

    def left_behind(self, monkeypatch: pytest.MonkeyPatch, *mishaps: TestbedError) -> None:
        """Its agent is a new one, and finds the guest; what may come of that, before it succeeds."""
        machine, tries = self.inventory.machines.pop("vm1"), list(mishaps)

        def adopt(site: Any, home: Path) -> Any:
            assert home == self.site.guests / "vm1"
            if tries:
                raise tries.pop(0)
            self.done.append("adopted")
            return machine

        monkeypatch.setattr(hosts.caretaker, "adopt", adopt)
        (self.site.guests / "vm1").touch()
        (self.site.guests / "vm1.vmx").touch()

    @contextmanager
    def looked_after(self) -> Iterator[None]:
        looking = threading.Thread(target=self.caretaker.look_after)
        looking.start()
        try:
            yield
        finally:
            self.caretaker.close()
            looking.join()

    def off(self) -> dict[str, Any]:
        return self.power.off(control.PowerOff("vm1"))

    @property
    def newest(self) -> tuple[int, bool]:
        claim = self.datastore.newest("vm1")
        assert claim is not None and claim.host == "esx1"
        return claim.generation, claim.running


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(hosts.caretaker, "_LOOK_EVERY_S", 0.02)
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
    host.is_impatient(monkeypatch)
    host.store.mishaps["chown"] = ["lost"]
    with pytest.raises(OwnerUnknown):
        host.off()
    assert host.newest == (2, False)
    assert host.off() == {"generation": 2, "orderly": False}
    assert host.newest == (2, False)


def test_a_power_off_whose_word_was_lost_can_be_repeated(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.is_impatient(monkeypatch)
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


# ---------------------------------------------------------------- guests that wait for their adoption


def test_a_guest_that_could_not_be_adopted_when_its_agent_started_is_adopted_later(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host.left_behind(monkeypatch, *[DatastoreSilent("no answer")] * 5)
    host.caretaker.adopt_all()
    assert "vm1" not in host.inventory.machines
    with host.looked_after():
        eventually(lambda: "vm1" in host.inventory.machines, "adoption")
    assert host.done == ["adopted"]
    assert capsys.readouterr().err.count("VM vm1 waits: no answer") == 1


def test_a_guest_that_is_just_coming_or_going_is_left_alone(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.left_behind(monkeypatch)
    (host.site.guests / "vm2.incomplete").touch()  # post-copy: its RAM is still coming
    with host.inventory.reserved("vm1"), host.inventory.reserved("vm2"), host.looked_after():
        time.sleep(0.2)
    assert host.done == [] and not host.inventory.machines


def test_a_guest_that_lives_is_shut_down_even_if_nobody_had_adopted_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.left_behind(monkeypatch, DatastoreSilent("no answer"))
    with pytest.raises(DatastoreSilent):
        host.off()
    assert host.newest == (1, True), "it runs"
    assert host.off() == {"generation": 2, "orderly": True}
    assert host.done == ["adopted", "vm.shutting_down", "shut down", "dismantled", "vm.powered_off"]


def test_a_vm_does_not_move_to_where_it_runs_and_waits_for_its_adoption(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Making ready would end its vmx."""
    host.left_behind(monkeypatch)
    control.issue_certificates(tmp_path, {"esx1": ["127.0.0.1"]})
    agent = Agent(host.site, read_plan(), tmp_path)
    with pytest.raises(HostError, match="VM vm1 is here already"):
        agent.handle(control.Prepare("vm1", "vm1-0badcafe", "rarp", ()), lambda content: None)
    assert host.store.names("/vm1").count(".lck-vm1.1") == 1
    assert not [name for name in host.store.names("/vm1") if name.startswith(".draft")]
