"""A VM's disk between guest and vmx: what is asked, what is answered, in which order, and what if one of them goes."""

import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosts.disk_channel import MAX_BYTES, Disk, DiskServer, Request, VmxGone, socket_pair


class Served:
    """A disk in memory, served by a thread; `asked` are the requests as they came."""

    def __init__(self, server: DiskServer, size: int) -> None:
        self.content, self.asked = bytearray(size), list[Request]()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self._server = server

    def serve(self) -> None:
        while True:
            try:
                request = self._server.next()
            except EOFError:
                return
            self.asked.append(request)
            self.may_go_on.wait(10)
            if request.content is None:
                self._server.answer(bytes(self.content[request.offset : request.offset + request.length]))
            else:
                self.content[request.offset : request.offset + request.length] = request.content
                self._server.answer()


@contextmanager
def disk_of(size: int) -> Iterator[tuple[Disk, Served]]:
    guest, vmx = socket_pair()
    served = Served(DiskServer(vmx), size)
    thread = threading.Thread(target=served.serve)
    thread.start()
    try:
        yield Disk(guest), served
    finally:
        guest.close()
        thread.join(10)
        vmx.close()
    assert not thread.is_alive()


def test_what_is_written_is_read() -> None:
    with disk_of(10_000) as (disk, _):
        disk.write(4096, b"journal")
        disk.await_written()
        assert disk.read(4090, 20) == bytes(6) + b"journal" + bytes(7)


@given(st.lists(st.tuples(st.integers(0, 900), st.binary(max_size=100)), max_size=20))
def test_writes_are_done_in_the_order_in_which_they_were_asked_for(writes: list[tuple[int, bytes]]) -> None:
    expected = bytearray(1000)
    with disk_of(1000) as (disk, served):
        for offset, content in writes:
            disk.write(offset, content)
            expected[offset : offset + len(content)] = content
        for _ in writes:
            disk.await_written()
        assert disk.read(0, 1000) == expected
        assert [(request.offset, request.content) for request in served.asked[:-1]] == writes


def test_a_write_does_not_wait_and_its_word_comes_when_it_has_been_done() -> None:
    with disk_of(100) as (disk, served):
        served.may_go_on.clear()
        disk.write(0, b"first")
        disk.write(10, b"second")
        waiting = threading.Thread(target=disk.await_written)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        assert bytes(served.content) == bytes(100)
        served.may_go_on.set()
        waiting.join(10)
        disk.await_written()
        assert bytes(served.content[:16]) == b"first" + bytes(5) + b"second"


@pytest.mark.parametrize("size", [0, 1, MAX_BYTES - 1, MAX_BYTES, MAX_BYTES + 1, 3 * MAX_BYTES + 17])
def test_a_read_of_any_size_comes_in_requests_that_are_not_too_large(size: int) -> None:
    with disk_of(4 * MAX_BYTES) as (disk, served):
        served.content[:] = bytes(range(256)) * (4 * MAX_BYTES // 256)
        assert disk.read(5, size) == served.content[5 : 5 + size]
        assert all(request.length <= MAX_BYTES for request in served.asked)
        assert len(served.asked) == -(-size // MAX_BYTES)


def test_a_read_behind_the_end_is_short() -> None:
    with disk_of(MAX_BYTES + 100) as (disk, served):
        assert len(disk.read(100, 2 * MAX_BYTES)) == MAX_BYTES
        assert disk.read(MAX_BYTES + 90, 50) == bytes(10)
        assert disk.read(2 * MAX_BYTES, 50) == b""
        assert len(served.asked) == 4, "after one that is short nothing is asked for"


def test_the_largest_write_is_one_and_a_larger_request_is_none_of_ours() -> None:
    with disk_of(MAX_BYTES) as (disk, served):
        content = b"\xa5" * MAX_BYTES
        disk.write(0, content)
        disk.await_written()
        assert bytes(served.content) == content
    guest, vmx = socket_pair()
    with guest, vmx:
        guest.sendall(struct.pack("!BQI", 0, 0, MAX_BYTES + 1))
        with pytest.raises(EOFError, match=f"a request for {MAX_BYTES + 1} bytes is none of ours"):
            DiskServer(vmx).next()


@pytest.mark.parametrize(
    "ask",
    [lambda disk: disk.read(0, 10), lambda disk: disk.await_written(), lambda disk: disk.write(0, bytes(MAX_BYTES))],
    ids=["read", "await_written", "write"],
)
def test_a_guest_whose_vmx_has_gone_has_no_machine(ask: Callable[[Disk], object]) -> None:
    guest, vmx = socket_pair()
    with guest:
        vmx.close()
        with pytest.raises(VmxGone):
            ask(Disk(guest))


def test_a_vmx_that_goes_in_the_middle_of_an_answer_is_noticed() -> None:
    guest, vmx = socket_pair()
    with guest:
        vmx.sendall(struct.pack("!I", 10) + b"half")
        vmx.close()
        with pytest.raises(VmxGone):
            Disk(guest).read(0, 10)


@pytest.mark.parametrize("heard", [0, 1, 12, 13, 20])
def test_a_guest_that_goes_in_the_middle_of_a_request_is_noticed(heard: int) -> None:
    guest, vmx = socket_pair()
    with vmx:
        guest.sendall((struct.pack("!BQI", 1, 0, 100) + bytes(100))[:heard])
        guest.close()
        with pytest.raises(EOFError, match="the other side is gone"):
            DiskServer(vmx).next()


def test_an_answer_to_a_guest_that_has_gone_is_an_error_of_its_socket() -> None:
    guest, vmx = socket_pair()
    with vmx:
        guest.close()
        with pytest.raises(OSError, match="Broken pipe"):
            DiskServer(vmx).answer(b"too late")
