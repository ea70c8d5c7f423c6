"""The NAS and its clients: a real NFS server in its node, libnfs in a host's namespace."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from testbeds import small_testbed

from experiments.nas import Nas
from experiments.testbed import Testbed
from experiments.world import run
from topologies.errors import TestbedError

ROOT = Path(__file__).parents[2]
Start = Callable[[str, str], "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    with small_testbed(tmp_path_factory.mktemp("nas") / "results", datastore="local") as testbed:
        yield testbed


@pytest.fixture
def nas(testbed: Testbed, tmp_path: Path) -> Iterator[Nas]:
    plan = testbed.run.plan.nas
    assert plan is not None
    with Nas(plan, tmp_path / "export", testbed.popen(plan.name), tmp_path) as nas:
        yield nas


@pytest.fixture
def on(testbed: Testbed) -> Iterator[Start]:
    """Starts a Python program in a host's namespace, with a function `mount`; ended with the test."""
    plan: Any = testbed.run.plan.nas
    head = f"""
        import os, sys, time
        from hosts.nfs import Mount, NasSilent
        def mount(uid=0, timeout_s=1): return Mount("{plan.management}", "{plan.export}", uid, timeout_s)
    """
    with ExitStack() as stack:

        def start(host: str, program: str) -> "subprocess.Popen[str]":
            words = [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(program)]
            pipe = subprocess.PIPE
            process: subprocess.Popen[str] = testbed.popen(host)(words, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield start


def await_ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def outcome(process: "subprocess.Popen[str]") -> str:
    said, complaint = process.communicate(timeout=30)
    assert process.returncode == 0, complaint
    return said.strip()


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


@contextmanager
def cut(testbed: Testbed) -> Iterator[None]:
    """What esx1 and the NAS send to each other vanishes."""
    ends = {"esx1": "esx1-vmnic2", "nas": "nas-eth0"}

    def tc(*words: str) -> None:
        for node, device in ends.items():
            run("mnexec", "-a", str(testbed.net[node].pid), "tc", "qdisc", words[0], "dev", device, "root", *words[1:])

    tc("add", "blackhole")
    try:
        yield
    finally:
        tc("del")


@contextmanager
def frozen(nas: Nas) -> Iterator[None]:
    nas.freeze()
    try:
        yield
    finally:
        nas.thaw()


@contextmanager
def killed(nas: Nas) -> Iterator[None]:
    nas.kill()
    try:
        yield
    finally:
        nas.start()


def test_what_one_host_writes_the_other_reads(on: Start, nas: Nas) -> None:
    writer = """
        m = mount()
        m.mkdir("/vm1")
        m.write_new("/vm1/vm1.vmx", b"hello")
        with m.open("/vm1/vm1.vmx") as file:
            file.write(5, b" world" * 400_000)
            print(file.attributes().size)
    """
    assert outcome(on("esx1", writer)) == str(5 + 6 * 400_000)
    reader = """
        m = mount()
        content = m.read("/vm1/vm1.vmx", 10_000_000)
        print(m.names("/vm1"), len(content), content[:11], content[-6:])
    """
    assert outcome(on("esx2", reader)) == "['vm1.vmx'] 2400005 b'hello world' b' world'"
    assert (nas.folder / "vm1/vm1.vmx").stat().st_size == 2400005


def test_of_many_that_link_the_same_name_one_wins(on: Start, nas: Nas) -> None:
    contender = """
        m = mount()
        m.write_new(f"/draft-{os.getpid()}", b"")
        print("ready", flush=True)
        sys.stdin.readline()
        won = 0
        for number in range(50):
            try:
                m.link(f"/draft-{os.getpid()}", f"/lock-{number}")
                won += 1
            except FileExistsError:
                pass
        print(won)
    """
    contenders = [on(host, contender) for host in ("esx1", "esx2", "esx1", "esx2")]
    for one in contenders:
        await_ready(one)
    for one in contenders:
        go(one)
    assert sum(int(outcome(one)) for one in contenders) == 50


def test_who_does_not_own_a_file_any_more_cannot_write_to_it(on: Start, nas: Nas) -> None:
    program = """
        root, old, new = mount(), mount(200_001), mount(200_002)
        root.write_new("/disk", bytes(8192), 0o644)
        root.chown("/disk", 200_001)
        with old.open("/disk") as first, new.open("/disk", os.O_RDONLY) as second:
            first.write(0, b"mine")
            root.chown("/disk", 200_002)
            second.write(0, b"hers")
            try:
                first.write(0, b"late")
            except PermissionError as error:
                print(error)
        print(root.read("/disk", 4))
    """
    said = outcome(on("esx1", program)).splitlines()
    assert "belongs to user 200002, not to 200001" in said[0]
    assert said[1] == "b'hers'"


def test_a_server_that_is_killed_and_comes_back_has_lost_nothing_that_it_acknowledged(on: Start, nas: Nas) -> None:
    writer = """
        m = mount()
        m.write_new("/disk", bytes(4096))
        silent = 0
        with m.open("/disk", os.O_RDWR | os.O_SYNC) as disk:
            print("ready", flush=True)
            end = time.monotonic() + 6
            number = 0
            while time.monotonic() < end:
                number += 1
                while True:
                    try:
                        disk.write(0, number.to_bytes(8, "big"))
                        break
                    except NasSilent:
                        silent += 1
            print(number, silent, int.from_bytes(disk.read(0, 8), "big"))
    """
    process = on("esx1", writer)
    await_ready(process)
    time.sleep(1)
    nas.kill()
    time.sleep(1.5)
    nas.start()
    written, silent, found = map(int, outcome(process).split())
    assert written == found > 100
    assert silent > 0


def test_a_server_that_is_not_there_is_named_in_time(on: Start) -> None:
    program = """
        began = time.monotonic()
        try:
            mount().names("/")
        except OSError as error:
            print(error, time.monotonic() - began < 10)
    """
    said = outcome(on("esx1", program))
    assert "10.0.99.3:/datastore1" in said and said.endswith("True")


@pytest.mark.parametrize("how", ["cut", "frozen", "killed"])
def test_every_call_ends_in_time_and_is_answered_as_soon_as_the_nas_is_back(
    testbed: Testbed, on: Start, nas: Nas, how: str
) -> None:
    callers = """
        from threading import Thread
        first = mount()
        first.write_new("/disk", bytes(4096))
        calls = {
            "write": lambda m, disk: disk.write(0, bytes(4096)),
            "read": lambda m, disk: disk.read(0, 4096),
            "stat": lambda m, disk: m.attributes("/disk"),
            "names": lambda m, disk: m.names("/"),
            "link": lambda m, disk: m.link("/disk", f"/link-{time.monotonic_ns()}"),
        }
        end = time.monotonic() + 5

        def use(name, timeout_s):
            m = mount(timeout_s=timeout_s)
            disk = m.open("/disk", os.O_RDWR | os.O_SYNC)
            silences = [0.0]
            answered = 0.0
            while time.monotonic() < end:
                began = time.monotonic()
                try:
                    calls[name](m, disk)
                except NasSilent:
                    answered = 0.0
                    silences.append(time.monotonic() - began)
                else:
                    answered = answered or time.monotonic()
                time.sleep(0.02)
            told.append((name, timeout_s, len(silences) - 1, max(silences), answered))

        told = []
        threads = [Thread(target=use, args=(name, timeout_s)) for name in calls for timeout_s in (0.5, 1, 2)]
        for thread in threads:
            thread.start()
        print("ready", flush=True)
        for thread in threads:
            thread.join()
        for line in told:
            print(*line)
    """
    process = on("esx1", callers)
    await_ready(process)
    time.sleep(0.5)
    with {"cut": lambda: cut(testbed), "frozen": lambda: frozen(nas), "killed": lambda: killed(nas)}[how]():
        time.sleep(2.7)
    back_at = time.monotonic()
    lines = outcome(process).splitlines()
    assert len(lines) == 15
    for line in lines:
        _, timeout_s, silences, longest_s, answered_at = line.split()
        assert 1 <= int(silences) <= 2.7 / float(timeout_s) + 2, line
        assert float(longest_s) < float(timeout_s) + 0.3, line
        assert 0 < float(answered_at) < back_at + 1.3, line  # a first packet is sent again after 1 s (RFC 6298, 2.1)


def test_a_write_that_was_given_up_is_not_made_when_the_cable_is_whole_again(
    testbed: Testbed, on: Start, nas: Nas
) -> None:
    program = """
        m = mount()
        m.write_new("/disk", b"first")
        with m.open("/disk", os.O_RDWR | os.O_SYNC) as disk:
            print("ready", flush=True)
            sys.stdin.readline()
            try:
                disk.write(0, b"given")
            except NasSilent:
                print("silent", flush=True)
            sys.stdin.readline()
            time.sleep(2)
            print(disk.read(0, 5))
    """
    process = on("esx1", program)
    await_ready(process)
    with cut(testbed):
        go(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "silent\n"
    go(process)
    assert outcome(process) == "b'first'"


def test_who_was_idle_while_the_server_restarted_does_not_notice(on: Start, nas: Nas) -> None:
    program = """
        m = mount()
        m.write_new("/disk", b"hello")
        disk = m.open("/disk")
        print("ready", flush=True)
        sys.stdin.readline()
        print(disk.read(0, 5))
    """
    process = on("esx1", program)
    await_ready(process)
    with killed(nas):
        pass
    go(process)
    assert outcome(process) == "b'hello'"


def test_a_full_disk_is_called_so_and_takes_the_same_write_when_there_is_room(
    testbed: Testbed, on: Start, tmp_path: Path
) -> None:
    plan: Any = testbed.run.plan.nas
    program = """
        m = mount()
        m.write_new("/filler", bytes(512 * 1024))
        m.write_new("/disk", b"")
        with m.open("/disk", os.O_RDWR | os.O_SYNC) as disk:
            for again in range(2):
                try:
                    disk.write(0, b"x" * 700 * 1024)
                    print("written", disk.attributes().size)
                except OSError as error:
                    print(error)
                    m.unlink("/filler")
    """
    folder = tmp_path / "export"
    with Nas(plan, folder, testbed.popen(plan.name), tmp_path, size_bytes=1024 * 1024):
        assert outcome(on("esx1", program)).splitlines() == [
            "[Errno 28] the disk of 10.0.99.3:/datastore1 is full",
            f"written {700 * 1024}",
        ]
        assert os.listdir(folder) == ["disk"]
    assert (folder / "disk").read_bytes() == b"x" * 700 * 1024
    assert not os.path.ismount(folder)


def test_a_disk_in_memory_outlives_the_server_and_keeps_links_owners_and_holes(
    testbed: Testbed, on: Start, tmp_path: Path
) -> None:
    plan: Any = testbed.run.plan.nas
    program = """
        m = mount()
        m.mkdir("/vm1")
        m.write_new("/vm1/lock", b"mine")
        m.link("/vm1/lock", "/vm1/lock.1")
        m.write_new("/vm1/disk", b"")
        with m.open("/vm1/disk") as disk:
            disk.truncate(1 << 30)
            m.chown("/vm1/disk", 200_001)
            print("ready", flush=True)
            sys.stdin.readline()
            disk.write(1 << 29, b"after")
    """
    folder = tmp_path / "export"
    with Nas(plan, folder, testbed.popen(plan.name), tmp_path, size_bytes=1024 * 1024) as nas:
        process = on("esx1", program)
        await_ready(process)
        with killed(nas):
            pass
        go(process)
        outcome(process)
    disk = (folder / "vm1/disk").stat()
    assert (folder / "vm1/lock").samefile(folder / "vm1/lock.1")
    assert (disk.st_uid, disk.st_size) == (200_001, 1 << 30)
    assert disk.st_blocks * 512 < 1024 * 1024


def test_a_folder_that_cannot_be_exported_is_named(
    testbed: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan: Any = testbed.run.plan.nas
    place = tmp_path / "ramfs"  # it gives no file handles
    place.mkdir()
    run("mount", "-t", "ramfs", "ramfs", str(place))
    monkeypatch.setattr("experiments.nas._EXPORTABLE", ("ramfs",))
    try:
        with (
            pytest.raises(TestbedError, match=f"cannot export .*{place}"),
            Nas(plan, place / "export", testbed.popen(plan.name), tmp_path),
        ):
            pass
    finally:
        run("umount", str(place))


def test_the_nas_leaves_nothing_behind(testbed: Testbed, tmp_path: Path) -> None:
    plan = testbed.run.plan.nas
    assert plan is not None

    def servers() -> list[str]:
        entries = [entry for entry in os.listdir("/proc") if entry.isdigit()]
        commands = [Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")[0].decode() for entry in entries]
        return [command for command in commands if command.endswith(("ganesha.nfsd", "rpcbind"))]

    with Nas(plan, tmp_path / "export", testbed.popen(plan.name), tmp_path):
        assert sorted(servers()) == ["ganesha.nfsd", "rpcbind"]
    assert servers() == []
