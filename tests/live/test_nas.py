"""The NAS and its clients: a real NFS server in its node, libnfs in a host's namespace."""

import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from testbeds import small_testbed

from experiments.nas import Nas
from experiments.testbed import Testbed

ROOT = Path(__file__).parents[2]
Start = Callable[[str, str], "subprocess.Popen[str]"]
MISSING = [program for program in ("ganesha.nfsd", "rpcbind") if shutil.which(program) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no NAS without {' and '.join(MISSING)} (apt-get install)")


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    with small_testbed(tmp_path_factory.mktemp("nas") / "results") as testbed:
        yield testbed


@pytest.fixture
def nas(testbed: Testbed, tmp_path: Path) -> Iterator[Nas]:
    plan = testbed.run.plan.nas
    assert plan is not None
    with Nas(plan, tmp_path / "export", testbed.popen(plan.name), tmp_path) as nas:
        yield nas


@pytest.fixture
def on(testbed: Testbed) -> Iterator[Start]:
    """Starts a Python program in a host's namespace that has a function `mount(uid=0)`; ended with the test."""
    plan: Any = testbed.run.plan.nas
    head = f"""
        import os, sys, time
        from hosts.nfs import Mount, NasSilent
        def mount(uid=0): return Mount("{plan.management}", "{plan.export}", uid, timeout_s=1)
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
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    return said.strip()


def test_what_one_host_writes_the_other_reads(on: Start, nas: Nas) -> None:
    writer = """
        m = mount()
        m.mkdir("/vm1")
        m.write_new("/vm1/vm1.vmx", b"hello")
        with m.open("/vm1/vm1.vmx") as file:
            file.write(5, b" world" * 400_000)
            file.sync()
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
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
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
            mount()
        except OSError as error:
            print(error, time.monotonic() - began < 10)
    """
    said = outcome(on("esx1", program))
    assert "10.0.99.3:/datastore1" in said and said.endswith("True")


def test_a_frozen_server_makes_a_call_fail_and_not_hang(on: Start, nas: Nas) -> None:
    program = """
        m = mount()
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.monotonic()
        try:
            m.names("/")
        except NasSilent:
            print(time.monotonic() - began < 5)
    """
    process = on("esx2", program)
    await_ready(process)
    nas.freeze()
    try:
        assert process.stdin is not None
        process.stdin.write("go\n")
        assert outcome(process) == "True"
    finally:
        nas.thaw()


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
