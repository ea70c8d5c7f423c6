"""The channel between an agent and its guest: hosts/channel.py, and how hosts/guest.py uses it."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosts import channel
from hosts.guest import GuestError, LightGuest
from hosts.ram import PAGE, Ram
from topologies.plan import read_plan


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_a_message_arrives_with_its_number(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = map(channel.Line, ends)
    one.send(channel.Throttle(0.5), 7)
    one.send(channel.Run(), 8)
    assert other.receive() == (7, channel.Throttle(0.5))
    assert other.receive() == (8, channel.Run())


def test_what_a_time_out_has_interrupted_is_received_by_the_next_call(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    recorder, record = socket.socketpair()
    with recorder, record:
        channel.Line(recorder).send(channel.State(bytes(1000)), 3)
        data = record.recv(4096)
    line = channel.Line(ends[1])
    line.settimeout(0.01)
    for cut in (5, 500, len(data)):
        ends[0].sendall(data[:cut])
        data = data[cut:]
        if data:
            with pytest.raises(TimeoutError):
                line.receive()
    assert line.receive() == (3, channel.State(bytes(1000)))


def test_descriptors_come_with_a_message(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = map(channel.Line, ends)
    with open(os.devnull, "rb") as file:
        one.send(channel.Done(), descriptors=[file.fileno()])
        message, (descriptor,) = other.receive_with_descriptors()
        assert message == channel.Done()
        assert os.path.sameopenfile(file.fileno(), descriptor)
        os.close(descriptor)


def test_a_length_beyond_the_limit_is_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].sendall((1).to_bytes(4, "big") + (channel.MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(EOFError, match="none of ours"):
        channel.Line(ends[1]).receive()


def test_the_answer_to_an_earlier_request_is_not_taken_for_this_ones(
    ends: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    def slow_guest() -> None:
        """Answers a request that its agent has given up before the one that is due."""
        line, ram, pidfd = channel.Line(ends[0]), Ram.create("test", 4 * PAGE), os.pidfd_open(os.getpid())
        hello = channel.Hello(os.getpid(), "running", ram.address, "hash", read_plan().vms[0])
        line.send(hello, descriptors=[ram.fd, pidfd])
        os.close(pidfd)
        for answer in (channel.Done(), channel.Failed("no")):
            number, _ = line.receive()
            line.send(channel.Failed("this was about another request"), number - 1)
            line.send(answer, number)

    thread = threading.Thread(target=slow_guest)
    thread.start()
    guest = LightGuest(tmp_path / "home", tmp_path / "log", ends[1], None)
    guest.throttle(0.2)
    with pytest.raises(GuestError, match=r"\bno$"):
        guest.throttle(0.4)
    thread.join()
    guest.let_go()
