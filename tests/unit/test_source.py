"""An outgoing migration against a scripted destination: what is decided in the last moments before the VM is away."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
from fakes import ToldBitmap, ToldGuest, ToldMachine
from pairs import connection, memory
from stores import datastore_of

import hosts.source
from hosts.datastore import OwnerUnknown
from hosts.gate import VSwitchError
from hosts.guest import GuestError
from hosts.machine import Machine
from hosts.ownership import Lease
from hosts.policy import Policy
from hosts.precopy import Cancelled
from hosts.protocol import MAJOR, MINOR, Kind, Resumed, Session, Welcome
from hosts.ram import PageHashes, Ram
from hosts.source import MigrationFailed, OutgoingMigration
from hosts.stream import PeerAborted, Stream, StreamLost
from hosts.transport import Transport


class Guest(ToldGuest):
    """It can be suspended, and run again unless it is broken."""

    def __init__(self, ram: Ram) -> None:
        super().__init__(ram, ToldBitmap(ram))
        self.calls: list[str] = []
        self.broken = False

    def suspend(self) -> bytes:
        self.calls.append("suspend")
        return b"devices"

    def run(self) -> None:
        self.calls.append("run")
        if self.broken:
            raise GuestError("its guest process 17 has ended")

    def check(self) -> None:
        pass


class Scene:
    """A migration of vm1 from esx1, generation 1, to a destination that claims nothing and says what it is told to."""

    def __init__(self, ram: Ram, folder: Path, caller: Stream) -> None:
        self.guest, self.datastore = Guest(ram), datastore_of(folder, "vm1")
        assert self.datastore.claim("vm1", 1, "esx1")
        machine: Any = ToldMachine(self.guest)
        machine.vm, machine.generation, machine.unsettled = SimpleNamespace(name="vm1"), 1, 0
        machine.port, machine.announcer = SimpleNamespace(shut=lambda: None), SimpleNamespace(silence=lambda: None)
        machine.hold, machine.open_gate = lambda: self.told("hold"), lambda: self.told("open gate")
        machine.go_on = self.go_on
        machine.own = lambda lease: self.told(f"own {lease.generation}")
        machine.site = SimpleNamespace(host=SimpleNamespace(name="esx1"), datastore=self.datastore)
        self.migration = OutgoingMigration(
            cast(Machine, machine),
            "vm1-0badcafe",
            lambda role: caller,
            Policy(mode="stop-and-copy"),
            Transport(),
            lambda progress: None,
        )
        self.migration.hashes = Hashes(ram)

    def go_on(self) -> None:
        self.told("go on")
        self.guest.run()

    def told(self, word: str) -> None:
        self.guest.calls.append(word)

    @property
    def owner(self) -> tuple[int, str]:
        claim = self.datastore.newest("vm1")
        assert claim is not None
        return claim.generation, claim.host


class Hashes(PageHashes):
    """Something may happen when the digest for the hand-over is made."""

    def digest(self, *_: Any) -> str:
        self.meanwhile()
        return super().digest()

    meanwhile: Callable[[], None] = staticmethod(lambda: None)


@contextmanager
def scene(tmp_path: Path, answer: Callable[[Stream], None]) -> Iterator[Scene]:
    """`answer` is what the destination does when it has been handed the VM."""

    def destination(stream: Stream, ram: Ram) -> None:
        try:
            stream.expect(Kind.HELLO)
            stream.send(Welcome(MAJOR, MINOR))
            while True:
                header, _ = stream.receive()
                match header.kind:
                    case Kind.ROUND_END:
                        stream.mark(Kind.ROUND_ACK, header.round)
                    case Kind.BITMAP:
                        stream.exactly(header.length)
                    case Kind.PAGES | Kind.ZERO:
                        stream.receive_pages(header, ram, PageHashes(ram))
                    case Kind.STATE:
                        answer(stream)
        except (StreamLost, PeerAborted):
            return

    with memory(8) as ram, memory(8) as copy, connection() as (here, there):
        ram.words[:, 0] = 1
        called = Stream(there, Session("destination"), 5.0)
        thread = Thread(target=destination, args=(called, copy))
        thread.start()
        try:
            yield Scene(ram, tmp_path, Stream(here, Session("source"), 5.0))
        finally:
            called.interrupt()
            thread.join()


def say_resumed(stream: Stream) -> None:
    stream.session.step("claim")
    stream.session.step("resume")
    stream.send(Resumed(2, "digest"))


def go_away(stream: Stream) -> None:
    """Without a word."""
    stream.close()
    raise StreamLost("gone")


def test_a_vm_whose_destination_says_so_has_left(tmp_path: Path) -> None:
    with scene(tmp_path, say_resumed) as moving:
        assert moving.migration.run("token").destination_digest == "digest"
        assert moving.guest.calls == ["hold", "suspend"]


def test_a_cancel_between_the_last_look_and_the_hand_over_is_honoured(tmp_path: Path) -> None:
    with scene(tmp_path, lambda stream: None) as moving:
        cast(Hashes, moving.migration.hashes).meanwhile = moving.migration.cancel
        with pytest.raises(MigrationFailed, match="VM vm1 runs again on esx1: cancelled") as failed:
            moving.migration.run("token")
        assert isinstance(failed.value.__cause__, Cancelled), "and not for want of an answer"
        assert moving.guest.calls == ["hold", "suspend", "own 2", "open gate", "run"]
        assert moving.owner == (2, "esx1"), "the destination can never claim it"


def test_a_vm_whose_destination_gives_up_goes_on_under_the_generation_that_it_had(tmp_path: Path) -> None:
    with scene(tmp_path, lambda stream: stream.abort("RAM differs")) as moving:
        with pytest.raises(MigrationFailed, match="VM vm1 runs again on esx1: RAM differs"):
            moving.migration.run("token")
        assert moving.guest.calls == ["hold", "suspend", "go on", "run"]
        assert moving.owner == (1, "esx1")


def test_a_vm_whose_vmx_had_to_claim_a_generation_meanwhile_is_not_handed_over(tmp_path: Path) -> None:
    with scene(tmp_path, say_resumed) as moving:
        moving.migration.machine.generation = 2  # type: ignore[misc]
        with pytest.raises(
            MigrationFailed, match="VM vm1 runs again on esx1: its lease had lapsed meanwhile; try again"
        ):
            moving.migration.run("token")
        assert moving.guest.calls == ["hold", "go on", "run"]
        assert not moving.migration.left


def test_a_source_that_cannot_learn_who_owns_the_vm_leaves_it_suspended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*_: Any, **__: Any) -> None:
        raise OwnerUnknown("no answer")

    monkeypatch.setattr(hosts.source, "_ASK_FOR_S", 0.7)
    with scene(tmp_path, go_away) as moving:
        monkeypatch.setattr(moving.datastore, "claim", silent)
        why = "VM vm1 stays suspended on esx1 until it is known who owns it: no answer"
        with pytest.raises(MigrationFailed, match=why):
            moving.migration.run("token")
        assert moving.guest.calls == ["hold", "suspend"]
        assert (moving.migration.machine.unsettled, moving.migration.left) == (2, False)


def test_a_claim_that_was_ours_without_an_answer_brings_the_vm_back_without_a_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scene(tmp_path, go_away) as moving:
        claim, leases = moving.datastore.claim, []

        def unheard(*order: Any, **patience: Any) -> Lease | None:
            leases.append(claim(*order, **patience))
            if len(leases) == 1:
                raise OwnerUnknown("no answer")
            return leases[-1]

        monkeypatch.setattr(moving.datastore, "claim", unheard)
        monkeypatch.setattr(moving.migration.machine, "own", owned := Mock())
        with pytest.raises(MigrationFailed, match="VM vm1 runs again on esx1"):
            moving.migration.run("token")
        assert leases[1] is None, "a generation has one winner"
        owned.assert_called_once_with(Lease.lapsed(2))
        assert moving.guest.calls == ["hold", "suspend", "open gate", "run"]


@pytest.mark.parametrize("heard", [True, False])
def test_a_cancel_whose_claim_was_not_answered_is_settled_before_the_vm_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: bool
) -> None:
    """Whatever the destination says: to the vmx that claim is another's, and if it showed later the guest would end."""

    def cancel_and_abort(stream: Stream) -> None:
        time.sleep(0.2)  # the source waits for a word by then
        with pytest.raises(OwnerUnknown):
            moving.migration.cancel()
        stream.abort("RAM differs")

    with scene(tmp_path, cancel_and_abort) as moving:
        claim, asked = moving.datastore.claim, []

        def unheard(*order: Any, **patience: Any) -> Lease | None:
            asked.append(order)
            lease = claim(*order, **patience) if heard or len(asked) > 1 else None
            if len(asked) == 1:
                raise OwnerUnknown("no answer")
            return lease

        monkeypatch.setattr(moving.datastore, "claim", unheard)
        with pytest.raises(MigrationFailed, match="VM vm1 runs again on esx1: cancelled"):
            moving.migration.run("token")
        assert moving.guest.calls == ["hold", "suspend", "own 2", "open gate", "run"]
        assert moving.owner == (2, "esx1")


def test_a_vm_that_another_host_has_claimed_has_left_though_nobody_says_so(tmp_path: Path) -> None:
    with scene(tmp_path, go_away) as moving:
        assert datastore_of(tmp_path).claim("vm1", 2, "esx2")
        moving.migration.run("token")
        assert moving.migration.left
        assert moving.guest.calls == ["hold", "suspend"]


def test_a_guest_that_does_not_run_again_is_said_to_be_here(tmp_path: Path) -> None:
    with scene(tmp_path, lambda stream: stream.abort("RAM differs")) as moving:
        moving.guest.broken = True
        why = "VM vm1 stays on esx1: RAM differs; but its guest process 17 has ended"
        with pytest.raises(MigrationFailed, match=why):
            moving.migration.run("token")
        assert not moving.migration.left


def test_a_vm_whose_port_cannot_be_opened_runs_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise VSwitchError("port vm1.eth0 stays dark")

    with scene(tmp_path, go_away) as moving:
        monkeypatch.setattr(moving.migration.machine, "open_gate", refuse)
        with pytest.raises(MigrationFailed, match=r"VM vm1 stays on esx1: .*; but port vm1\.eth0 stays dark"):
            moving.migration.run("token")
        assert moving.guest.calls == ["hold", "suspend", "own 2", "run"]


def test_only_a_vm_that_another_host_runs_has_left(tmp_path: Path) -> None:
    def nothing_can_be_written(*_: Any, **__: Any) -> int:
        raise OSError("disk full")

    with scene(tmp_path, lambda stream: stream.abort("no")) as moving:
        moving.migration.machine.emit = nothing_can_be_written  # type: ignore[method-assign]
        with pytest.raises(OSError, match="disk full"):
            moving.migration.run("token")
        assert not moving.migration.left
    (tmp_path / "second").mkdir()
    with scene(tmp_path / "second", say_resumed) as moving:
        moving.migration.run("token")
        assert moving.migration.left


def send_for_ever(stream: Stream) -> None:
    while True:
        stream.send_runs(Kind.ZERO, np.array([[0, 1]], np.uint32))


def test_what_a_destination_says_before_it_goes_is_heard_by_a_source_that_sends(tmp_path: Path) -> None:
    with connection() as (here, there):
        source, destination = Stream(here, Session("source"), 5.0), Stream(there, Session("destination"), 5.0)
        source.session.state, destination.session.state = "precopy", "receiving"
        source.send_runs(Kind.ZERO, np.array([[0, 1]], np.uint32))  # which nobody reads: so the end is a reset
        destination.abort("RAM is too small")
        destination.close()
        with pytest.raises(StreamLost):
            send_for_ever(source)
        assert str(source.parting_word()) == "RAM is too small"
        assert source.parting_word() is None
