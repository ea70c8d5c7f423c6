"""An outgoing migration against a scripted destination: what is decided in the last moments before the VM is away."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fakes import ToldBitmap, ToldGuest, ToldMachine
from pairs import connection, memory

from hosts.datastore import LocalDatastore
from hosts.guest import GuestError
from hosts.machine import Machine
from hosts.policy import Policy
from hosts.protocol import MAJOR, MINOR, Kind, Resumed, Session, Welcome
from hosts.ram import PageHashes, Ram
from hosts.source import MigrationFailed, OutgoingMigration
from hosts.stream import Stream, StreamLost
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
        self.guest, self.datastore = Guest(ram), LocalDatastore(folder)
        assert self.datastore.claim("vm1", 1, "esx1")
        gate = SimpleNamespace(shut=lambda: None, open=lambda: None)
        machine: Any = ToldMachine(self.guest)
        machine.vm, machine.generation, machine.owner_unknown = SimpleNamespace(name="vm1"), 1, False
        machine.port, machine.announcer = gate, SimpleNamespace(silence=lambda: None)
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
        except StreamLost:
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


def test_a_vm_whose_destination_says_so_has_left(tmp_path: Path) -> None:
    with scene(tmp_path, say_resumed) as moving:
        assert moving.migration.run("token").destination_digest == "digest"
        assert moving.guest.calls == ["suspend"]


def test_a_cancel_between_the_last_look_and_the_hand_over_is_honoured(tmp_path: Path) -> None:
    with scene(tmp_path, lambda stream: None) as moving:
        cast(Hashes, moving.migration.hashes).meanwhile = moving.migration.cancel
        with pytest.raises(MigrationFailed, match="VM vm1 runs again on esx1: cancelled"):
            moving.migration.run("token")
        assert moving.guest.calls == ["suspend", "run"]
        assert moving.owner == (2, "esx1"), "the destination can never claim it"


def test_a_guest_that_does_not_run_again_is_said_to_be_here(tmp_path: Path) -> None:
    with scene(tmp_path, lambda stream: stream.abort("RAM differs")) as moving:
        moving.guest.broken = True
        why = "VM vm1 stays on esx1: RAM differs; it does not run: its guest process 17 has ended"
        with pytest.raises(MigrationFailed, match=why):
            moving.migration.run("token")
