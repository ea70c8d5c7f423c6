"""High availability against scripted agents: who is asked to restart a VM, and what holds up nobody."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import eventually

import hosts.availability
from hosts import control
from hosts.availability import Availability
from hosts.control import AgentGone, ControlError
from hosts.vcenter import VCenter
from topologies.events import EventLog, find, read_events
from topologies.leaf_spine import leaf_spine


class Agents(VCenter):
    """Of three hosts; esx1, where vm1 and vm2 are, is dead. `refused`: who would not restart a VM."""

    def __init__(self, tmp_path: Path) -> None:
        self.events_file = tmp_path / "events"
        super().__init__(leaf_spine(3), tmp_path, EventLog(self.events_file, "vcenter"))
        for vm in ("vm1", "vm2"):
            self.inventory[vm], self.homes[vm], self.places[vm] = self.plan.vms[0], "esx1", "esx1"
        self.refused: set[str] = set()
        self.asked: list[tuple[str, str]] = []

    def client(self, host: str, answer_within_s: float = 0) -> Any:
        if host == "esx1":
            raise AgentGone("esx1 is dead")
        return self

    def call(self, request: control.Request) -> None:
        pass

    def _call(self, host: str, request: control.Request, notice: Callable[[Any], None] = lambda content: None) -> Any:
        if isinstance(request, control.Restart):
            self.asked.append((request.vm, host))
            if host in self.refused:
                raise ControlError(f"{host} has no room")
            return {"generation": 2}
        if isinstance(request, control.Owner):
            return {"host": "esx1", "running": True}
        if host == "esx1":
            raise AgentGone("esx1 is dead")
        return {"vms": {}, "migrations": {}}

    def happened(self, kind: str, **fields: object) -> bool:
        return bool(find(read_events(self.events_file), kind, **fields))


@pytest.fixture
def agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agents]:
    monkeypatch.setattr(hosts.availability, "ASK_EVERY_S", 0.01)
    monkeypatch.setattr(hosts.availability, "SUSPECT_AFTER_S", 0.1)
    agents = Agents(tmp_path)
    yield agents
    agents.close()


def test_the_vms_of_a_host_that_does_not_answer_are_started_again_on_another(agents: Agents) -> None:
    with Availability(agents):
        eventually(lambda: set(agents.places.values()) == {"esx2"}, "restarts")
    assert agents.happened("ha.suspected", host="esx1")
    assert agents.happened("ha.restarted", vm="vm1", host="esx2", instead_of="esx1")


def test_a_vm_that_was_unregistered_meanwhile_is_told_of_and_holds_up_no_other(
    agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    del agents.inventory["vm1"]
    ended: list[object] = []
    monkeypatch.setattr(threading, "excepthook", ended.append)
    with Availability(agents):
        eventually(lambda: agents.happened("ha.refused", vm="vm1"), "word of it")
        eventually(lambda: agents.places.get("vm2") == "esx2", "restart of the other")
    assert not ended


def test_a_host_that_refuses_a_vm_is_followed_by_the_next(agents: Agents) -> None:
    agents.refused = {"esx2"}
    with Availability(agents):
        eventually(lambda: set(agents.places.values()) == {"esx3"}, "restarts")
    assert [host for vm, host in agents.asked if vm == "vm1"] == ["esx2", "esx3"]


def test_a_vm_that_every_host_refuses_is_tried_again_on_each(agents: Agents) -> None:
    agents.refused = {"esx2", "esx3"}
    with Availability(agents):
        eventually(lambda: len(agents.asked) >= 8, "refusals")
        agents.refused = set()
        eventually(lambda: "esx1" not in agents.places.values(), "restarts")
    assert [host for vm, host in agents.asked if vm == "vm1"][:4] == ["esx2", "esx3"] * 2


def test_a_host_that_says_nothing_when_it_is_asked_about_a_vm_holds_up_no_further_try(agents: Agents) -> None:
    silent, agents.refused = threading.Event(), {"esx2"}
    agents.find = lambda vm: str(silent.wait(60))  # type: ignore[method-assign]
    with Availability(agents):
        eventually(lambda: set(agents.places.values()) == {"esx3"}, "restarts", 10)
    silent.set()
