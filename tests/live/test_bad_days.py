"""What goes wrong in the middle of a run: one line, the right exit status, the VM on one host, nothing left."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from programs import SMALL, Program, nothing_is_left

from experiments.capture import frames
from hosts.protocol import PORT

# A cable on which the first round takes seconds: time to break something in it
SLOW = (*SMALL, "--link", "200Mbit")


def one_line(err: str, *words: str) -> None:
    *where, line = err.strip().splitlines()  # a run that is broken off tells where its results are
    assert all(text.startswith("results  ") for text in where), err
    assert line.startswith("vmotion: ") and all(word in line for word in words), err


def vm_goes_on_at_source(program: Program) -> None:
    """The destination never claimed the VM; the source ran it to the end."""
    kinds = [event["kind"] for event in program.events()]
    assert "generation.claimed" not in kinds and "vm.resumed" not in kinds
    assert program.summary()["verdict"] == "fail"


def test_a_killed_destination_agent_leaves_the_vm_at_the_source(tmp_path: Path) -> None:
    program = Program(tmp_path / "out", "demo", *SLOW)
    program.wait_for("round.begin")
    everyone = program.descendants()
    os.kill(program.find("hosts.agent", "esx2"), signal.SIGKILL)
    status, _, err = program.end()
    assert status == 1
    one_line(err, "vm1", "stays on esx1")
    vm_goes_on_at_source(program)
    nothing_is_left(everyone)


def test_a_killed_source_agent_leaves_the_vm_to_the_testbed_which_ends_it(tmp_path: Path) -> None:
    program = Program(tmp_path / "out", "demo", *SLOW)
    program.wait_for("round.begin")
    everyone = program.descendants()
    os.kill(program.find("hosts.agent", "esx1"), signal.SIGKILL)
    status, _, err = program.end()
    assert status == 1
    one_line(err, "vm1", "is on esx1, whose agent does not answer")
    vm_goes_on_at_source(program)
    ended = [(event["host"], event["vm"]) for event in program.events() if event["kind"] == "guest.ended"]
    assert ended == [("esx1", "vm1")]
    nothing_is_left(everyone)


def test_a_cut_cable_leaves_the_vm_at_the_source(tmp_path: Path) -> None:
    program = Program(tmp_path / "out", "demo", *SLOW)
    program.wait_for("round.begin")
    agent, everyone = program.find("hosts.agent", "esx1"), program.descendants()
    cut = ["nsenter", f"--net=/proc/{agent}/ns/net", "ip", "link", "set", "esx1-vmnic1", "down"]
    subprocess.run(cut, check=True)
    status, _, err = program.end()
    assert status == 1
    one_line(err, "vm1", "stays on esx1", "silent")
    vm_goes_on_at_source(program)
    nothing_is_left(everyone)


@pytest.mark.parametrize(
    "moment", ["run.begin", "controller.listening", "testbed.up", "vm.powered_on", "round.begin", "vm.resumed"]
)
def test_ctrl_c_takes_everything_down(tmp_path: Path, moment: str) -> None:
    program = Program(tmp_path / "out", "demo", *SMALL)
    program.wait_for(moment)
    everyone = program.descendants()
    os.killpg(program.process.pid, signal.SIGINT)
    status, _, err = program.end()
    assert status == 130
    one_line(err, "interrupted")
    assert program.summary()["error"].startswith("interrupted")
    nothing_is_left(everyone)


def test_sigterm_to_the_outer_process_alone_takes_everything_down(tmp_path: Path) -> None:
    program = Program(tmp_path / "out", "demo", *SMALL)
    program.wait_for("round.begin")
    everyone = program.descendants()
    program.process.terminate()
    assert program.end()[0] == 143
    nothing_is_left(everyone)


@pytest.mark.parametrize("moment", ["testbed.up", "round.begin", "vm.resumed"])
def test_kill_9_of_the_outer_process_leaves_nothing(tmp_path: Path, moment: str) -> None:
    program = Program(tmp_path / "out", "demo", *SMALL)
    program.wait_for(moment)
    everyone = program.descendants()
    assert any("hosts.agent" in command for command in everyone.values())
    program.process.kill()
    program.process.wait()
    nothing_is_left(everyone)


def test_a_guest_that_writes_faster_than_the_cable_stays_and_the_message_says_why(tmp_path: Path) -> None:
    program = Program(
        tmp_path / "out", "demo", *SLOW, "--dirty-rate", "60MB/s", "--working-set", "32MiB", "--timeout-s", "6"
    )
    status, _, err = program.end()
    assert status == 1
    one_line(err, "does not converge within 6 s", "runs again on esx1" if "runs again" in err else "stays on esx1")
    vm_goes_on_at_source(program)
    failed = program.summary()["failed_migration"]
    assert "does not converge" in failed["reason"] and len(failed["rounds"]) > 1
    assert program.summary()["checks"]["no_transaction_lost"]
    assert frames(program.out / "capture.pcapng", f"tcp.port == {PORT}"), "the rounds that were in vain"
