"""The manager against scripted agents: a cancel that comes early, and where a VM is said to be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hosts import control
from hosts.control import AgentGone, ControlError
from hosts.vcenter import MigrationFailed, VCenter
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
