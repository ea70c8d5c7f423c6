"""The manager against scripted agents: a cancel that comes early, and where a VM is said to be."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hosts import control
from hosts.control import AgentGone, ControlError
from hosts.vcenter import MigrationFailed, VCenter
from topologies.errors import UsageError
from topologies.events import EventLog
from topologies.plan import read_plan

Answer = Callable[[str, control.Request], Any]


class Scripted(VCenter):
    """Its agents answer as `answer(host, request)` does."""

    def __init__(self, tmp_path: Path, answer: Answer) -> None:
        super().__init__(read_plan(), tmp_path, EventLog(tmp_path / "events", "test"))
        self.answer = answer
        self.places["vm1"] = "esx1"

    def _call(self, host: str, request: control.Request, notice: Callable[[Any], None] = lambda content: None) -> Any:
        return self.answer(host, request)


def status(vms: dict[str, str]) -> dict[str, Any]:
    return {"vms": {vm: {"state": state} for vm, state in vms.items()}, "migrations": {}}


def test_a_cancel_that_the_source_does_not_know_of_yet_is_said_again(tmp_path: Path) -> None:
    said: list[str] = []

    def answer(host: str, request: control.Request) -> Any:
        match request:
            case control.Prepare():
                return {"ip": "", "port": 0, "token": ""}
            case control.Migrate():
                vcenter.tasks["vm1"].cancel()  # as another thread would, before the source has begun
                raise ControlError("VM vm1 stays on esx1: cancelled")
            case control.Cancel():
                said.append(host)
                if len(said) < 3:
                    raise ControlError("no such migration leaves from here")
                return {}
            case control.Status():
                return status({"vm1": "running"} if host == "esx1" else {})
            case control.Owner():
                return {"host": "esx1", "running": True}
        return {}

    vcenter = Scripted(tmp_path, answer)
    task = vcenter.start_migration("vm1", "esx2")
    with pytest.raises(MigrationFailed, match="cancelled"):
        task.wait(20)
    assert said == ["esx1"] * 3
    assert task.status().state == "cancelled"


@pytest.mark.parametrize(
    ("owner", "reachable", "words", "place"),
    [
        ({"host": "esx2", "running": True}, ("esx1", "esx2"), "VM vm1 is on esx2: running", "esx2"),
        ({"host": "esx1", "running": True}, ("esx1", "esx2"), "VM vm1 is on esx1: dead", "esx1"),
        ({"host": "esx1", "running": True}, ("esx2",), "VM vm1 is on esx1, whose agent does not answer", "esx1"),
        ({"host": "esx1", "running": False}, ("esx2",), "VM vm1 is off", None),
        (None, ("esx1",), "VM vm1 is off", None),
        (None, (), "it is unknown where VM vm1 is: no agent answers", "esx1"),
        ("unreadable", ("esx1",), "it is unknown where VM vm1 is: unreadable", "esx1"),
    ],
)
def test_a_vm_is_said_to_be_where_its_newest_generation_is(
    tmp_path: Path, owner: Any, reachable: tuple[str, ...], words: str, place: str | None
) -> None:
    def answer(host: str, request: control.Request) -> Any:
        if host not in reachable:
            raise AgentGone("gone")
        if isinstance(request, control.Status):
            return status({"vm1": "running"} if host == "esx2" else {})
        if owner == "unreadable":
            raise ControlError("unreadable")
        return owner

    vcenter = Scripted(tmp_path, answer)
    assert vcenter.find("vm1") == words
    assert vcenter.places.get("vm1") == place


def test_a_host_whose_answer_to_a_preparation_is_lost_is_told_to_forget_it(tmp_path: Path) -> None:
    said: list[tuple[str, str]] = []

    def answer(host: str, request: control.Request) -> Any:
        said.append((host, type(request).__name__))
        match request:
            case control.Prepare():
                raise AgentGone("its agent is gone")
            case control.Status():
                return status({"vm1": "running"} if host == "esx1" else {})
            case control.Owner():
                return {"host": "esx1", "running": True}
        return {}

    with pytest.raises(MigrationFailed, match="its agent is gone; VM vm1 is on esx1: running"):
        Scripted(tmp_path, answer).migrate("vm1", "esx2")
    assert said[:2] == [("esx2", "Prepare"), ("esx2", "Abandon")]


# ---------------------------------------------------------------- the inventory


class Agents:
    """They do what they are told; `refused` are kinds of orders that they refuse, and `said` which they heard.

    `lost`: kinds of which the answer is lost. `owner`: where vm1 runs by the datastore's word.
    """

    def __init__(self, tmp_path: Path) -> None:
        self.said: list[tuple[str, str]] = []
        self.refused: set[str] = set()
        self.lost: set[str] = set()
        self.owner = ""
        self.vcenter = Scripted(tmp_path, self.answer)
        del self.vcenter.places["vm1"]

    def answer(self, host: str, request: control.Request) -> Any:
        kind = type(request).__name__
        match request:
            case control.Status():
                return status({"vm1": "running"} if host == self.owner else {})
            case control.Owner():
                return {"host": self.owner, "running": self.owner != ""}
        self.said.append((host, kind))
        if kind in self.refused:
            raise ControlError("no")
        match request:
            case control.PowerOn() | control.Restart():
                self.owner = host
            case control.PowerOff():
                self.owner = ""
        if kind in self.lost:
            raise AgentGone("its agent is gone")
        if isinstance(request, control.Register):
            return msgspec.to_builtins(replace(read_plan().vm("vm1"), name=request.vm, host=host, ram=2**24))
        return {"generation": 1}


@pytest.fixture
def agents(tmp_path: Path) -> Agents:
    return Agents(tmp_path)


def test_a_vm_of_the_plan_gets_its_files_with_its_first_power_on_and_is_what_they_say(agents: Agents) -> None:
    agents.vcenter.power_on("vm1")
    agents.vcenter.power_off("vm1")
    agents.vcenter.power_on("vm1")
    orders = ["Create", "Register", "PowerOn", "PowerOff", "PowerOn"]
    assert agents.said == [("esx1", order) for order in orders]
    assert agents.vcenter.inventory["vm1"].ram == 2**24, "as its files say, and not the plan"


def test_a_vm_starts_where_it_was_last_unless_a_host_is_named(agents: Agents) -> None:
    agents.vcenter.power_on("vm1", "esx2")
    agents.vcenter.power_off("vm1")
    assert (agents.vcenter.homes, agents.vcenter.places) == ({"vm1": "esx2"}, {})
    agents.vcenter.power_on("vm1")
    assert agents.said[-1] == ("esx2", "PowerOn")
    agents.vcenter.power_off("vm1")
    agents.vcenter.power_on("vm1", "esx1")
    assert (agents.vcenter.homes, agents.vcenter.places) == ({"vm1": "esx1"}, {"vm1": "esx1"})


def test_a_power_on_that_is_refused_changes_no_place(agents: Agents) -> None:
    agents.refused = {"PowerOn"}
    with pytest.raises(ControlError):
        agents.vcenter.power_on("vm1", "esx2")
    assert (agents.vcenter.homes, agents.vcenter.places) == ({"vm1": "esx1"}, {})


def test_a_power_off_that_is_refused_leaves_the_vm_in_its_place(agents: Agents) -> None:
    agents.vcenter.power_on("vm1")
    agents.refused = {"PowerOff"}
    with pytest.raises(ControlError):
        agents.vcenter.power_off("vm1")
    assert agents.vcenter.places == {"vm1": "esx1"}


def test_a_vm_whose_power_on_was_not_answered_is_where_it_runs(agents: Agents) -> None:
    agents.lost = {"PowerOn"}
    with pytest.raises(AgentGone):
        agents.vcenter.power_on("vm1", "esx2")
    assert agents.vcenter.places == {"vm1": "esx2"}
    agents.vcenter.power_off("vm1")
    assert agents.said[-1] == ("esx2", "PowerOff")


def test_a_vm_whose_power_off_was_not_answered_is_off(agents: Agents) -> None:
    agents.vcenter.power_on("vm1")
    agents.lost = {"PowerOff"}
    with pytest.raises(AgentGone):
        agents.vcenter.power_off("vm1")
    agents.vcenter.unregister("vm1")
    assert agents.vcenter.places == {}


def test_a_vm_that_no_plan_has_is_registered_from_its_files(agents: Agents) -> None:
    with pytest.raises(UsageError, match="the plan has no VM 'vm7'"):
        agents.vcenter.power_on("vm7")
    agents.vcenter.register("vm7", "esx2")
    agents.vcenter.power_on("vm7")
    assert agents.said == [("esx2", "Register"), ("esx2", "PowerOn")]


def test_a_vm_that_cannot_be_registered_is_not(agents: Agents) -> None:
    agents.refused = {"Register"}
    with pytest.raises(ControlError):
        agents.vcenter.register("vm7", "esx2")
    assert (agents.vcenter.inventory, agents.vcenter.homes) == ({}, {})
    with pytest.raises(UsageError, match="the plan has no host 'esx9'"):
        agents.vcenter.register("vm7", "esx9")


def test_only_a_vm_that_is_off_is_forgotten_or_registered_anew(agents: Agents) -> None:
    with pytest.raises(UsageError, match="VM 'vm1' is not registered; registered are none"):
        agents.vcenter.unregister("vm1")
    agents.vcenter.power_on("vm1")
    with pytest.raises(UsageError, match="VM vm1 is powered on, on esx1; power it off first"):
        agents.vcenter.unregister("vm1")
    with pytest.raises(UsageError, match="VM vm1 is on esx1; power it off first"):
        agents.vcenter.register("vm1", "esx2")
    agents.vcenter.power_off("vm1")
    agents.vcenter.unregister("vm1")
    assert (agents.vcenter.inventory, agents.vcenter.homes) == ({}, {})


def test_a_vm_that_is_restarted_is_where_that_was_done_and_else_where_it_was(agents: Agents) -> None:
    with pytest.raises(UsageError, match="VM 'vm1' is not registered"):
        agents.vcenter.restart("vm1", "esx2")
    agents.vcenter.power_on("vm1")
    agents.refused = {"Restart"}
    with pytest.raises(ControlError):
        agents.vcenter.restart("vm1", "esx2")
    assert agents.vcenter.places == {"vm1": "esx1"}
    agents.refused = set()
    agents.vcenter.restart("vm1", "esx2")
    assert (agents.vcenter.homes, agents.vcenter.places) == ({"vm1": "esx2"}, {"vm1": "esx2"})
