"""vmware.log: lines in order, six older logs, and a datastore that fails loses nothing but lines."""

import errno
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from fakes import UnsureStore
from programs import eventually

import hosts.vm_log
from hosts.store import Store
from hosts.vm_log import VmLog

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\| esx1\| (.*)")


@pytest.fixture
def complaints() -> list[str]:
    return []


@pytest.fixture
def log(tmp_path: Path, complaints: list[str]) -> Iterator[VmLog]:
    (tmp_path / "vm1").mkdir()
    log = VmLog(str(tmp_path), "esx1", complaints.append)
    yield log
    log.close()


def said(tmp_path: Path, name: str = "vmware.log", vm: str = "vm1") -> list[str]:
    """What its lines say behind time and host."""
    lines = (tmp_path / vm / name).read_text().splitlines()
    matches = [LINE.fullmatch(line) for line in lines]
    assert all(matches), lines
    return [match[1] for match in matches if match]


def logs(tmp_path: Path) -> set[str]:
    return {file.name for file in (tmp_path / "vm1").iterdir()}


def test_what_happens_is_written_in_its_order(log: VmLog, tmp_path: Path, complaints: list[str]) -> None:
    log.begin("vm1")
    for number in range(100):
        log.add("vm1", "something", {"number": number, "why": "so"})
    log.close()
    assert said(tmp_path) == [f"something number={number} why=so" for number in range(100)]
    assert complaints == []


def test_each_vm_has_its_own(log: VmLog, tmp_path: Path) -> None:
    (tmp_path / "vm2").mkdir()
    for vm in ("vm1", "vm2", "vm1"):
        log.add(vm, "of", {"vm": vm})
    log.close()
    assert said(tmp_path) == ["of vm=vm1", "of vm=vm1"]
    assert said(tmp_path, vm="vm2") == ["of vm=vm2"]


def test_another_agent_goes_on_where_the_last_one_stopped(log: VmLog, tmp_path: Path, complaints: list[str]) -> None:
    log.add("vm1", "first", {})
    log.close()
    with closing(VmLog(str(tmp_path), "esx1", complaints.append)) as successor:
        successor.add("vm1", "second", {})
    assert said(tmp_path) == ["first", "second"]


@pytest.mark.parametrize("hand_overs", range(1, 12))
def test_each_hand_over_begins_a_new_log_and_six_older_ones_are_kept(
    log: VmLog, tmp_path: Path, hand_overs: int
) -> None:
    for number in range(1, hand_overs + 1):
        log.begin("vm1")
        log.add("vm1", "hand-over", {"number": number})
    log.close()
    assert said(tmp_path) == [f"hand-over number={hand_overs}"]
    old = range(max(1, hand_overs - 6), hand_overs)
    assert logs(tmp_path) == {"vmware.log", *(f"vmware-{number}.log" for number in old)}
    for number in old:
        assert said(tmp_path, f"vmware-{number}.log") == [f"hand-over number={number}"]


def test_a_vm_that_was_handed_over_and_said_nothing_has_no_empty_log(log: VmLog, tmp_path: Path) -> None:
    log.begin("vm1")
    log.begin("vm1")
    log.close()
    assert logs(tmp_path) == set()


def test_files_with_other_names_are_none_of_its_logs(log: VmLog, tmp_path: Path) -> None:
    others = {"vmware-x.log", "vmware-1.log.gz", "xvmware-1.log", "vmware.log.1", "vmware-.log"}
    for name in others:
        (tmp_path / "vm1" / name).touch()
    for _ in range(10):
        log.begin("vm1")
        log.add("vm1", "line", {})
    log.close()
    assert others < logs(tmp_path)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UnsureStore:
    (tmp_path / "vm1").mkdir()
    store = UnsureStore(tmp_path)

    def open_store(where: str) -> Store:
        return store

    monkeypatch.setattr(hosts.vm_log, "open_store", open_store)
    return store


def test_a_store_that_fails_costs_the_lines_of_that_time_and_is_complained_of(
    store: UnsureStore, tmp_path: Path, complaints: list[str]
) -> None:
    store.mishaps["write"] = [lambda: None, OSError(errno.ENOSPC, "full"), "lost"]
    with closing(VmLog("nfs://nowhere", "esx1", complaints.append)) as log:
        for number in range(5):
            log.add("vm1", "line", {"number": number})
    assert said(tmp_path) == ["line number=0", "line number=3", "line number=4"]
    assert len(complaints) == 2
    for number, complaint in enumerate(complaints, 1):
        assert re.match(rf"VM vm1: vmware.log lacks '.*\| esx1\| line number={number}': ", complaint)


def test_a_log_that_somebody_has_deleted_is_followed_by_a_new_one(
    store: UnsureStore, tmp_path: Path, complaints: list[str]
) -> None:
    def deleted() -> None:
        (tmp_path / "vm1/vmware.log").unlink()
        raise OSError(errno.ESTALE, "stale file handle")

    store.mishaps["write"] = [lambda: None, deleted]
    with closing(VmLog("nfs://nowhere", "esx1", complaints.append)) as log:
        for number in range(4):
            log.add("vm1", "line", {"number": number})
    assert said(tmp_path) == ["line number=2", "line number=3"]
    assert len(complaints) == 1


def test_a_line_that_was_written_without_an_answer_stays(
    store: UnsureStore, tmp_path: Path, complaints: list[str]
) -> None:
    store.mishaps["write"] = ["unheard"]
    with closing(VmLog("nfs://nowhere", "esx1", complaints.append)) as log:
        log.add("vm1", "line", {"number": 0})
        log.add("vm1", "line", {"number": 1})
    assert said(tmp_path) == ["line number=0", "line number=1"]


def test_a_log_that_cannot_be_closed_is_an_old_one_all_the_same(
    store: UnsureStore, tmp_path: Path, complaints: list[str]
) -> None:
    store.mishaps["close"] = [lambda: None, "unheard"]
    with closing(VmLog("nfs://nowhere", "esx1", complaints.append)) as log:
        for number in range(3):
            log.begin("vm1")
            log.add("vm1", "line", {"number": number})
    assert [said(tmp_path, name) for name in ("vmware-1.log", "vmware-2.log", "vmware.log")] == [
        ["line number=0"],
        ["line number=1"],
        ["line number=2"],
    ]


def test_a_vm_whose_folder_is_gone_is_complained_of(log: VmLog, complaints: list[str]) -> None:
    log.add("vm7", "line", {})
    log.add("vm1", "line", {})
    log.close()
    assert len(complaints) == 1 and complaints[0].startswith("VM vm7: vmware.log lacks")


def test_whoever_tells_waits_for_no_store(log: VmLog, tmp_path: Path) -> None:
    log.add("vm1", "line", {})
    eventually(lambda: (tmp_path / "vm1/vmware.log").exists(), "line")
