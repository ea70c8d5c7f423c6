"""The vmx's threads, where a test can hold them apart; the process is tested live (tests/live/test_vmx.py)."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fakes import UnsureStore
from programs import eventually
from stores import datastore_of, make_vm

import hosts.vmx_process
from hosts import channel
from hosts.disk_channel import Disk, socket_pair
from hosts.gate import Gate, Messages
from hosts.lease_page import LeasePage
from hosts.ownership import Lease
from hosts.store import StoreSilent
from hosts.vmx_process import Vmx
from topologies.events import EventLog, find, read_events

NO_GATE = Messages(b"", b"", b"", b"")


class Ended(SystemExit):
    """In the place of the process's end."""


def _until_the_end(work: Callable[[], None]) -> threading.Thread:
    def run() -> None:
        with suppress(Ended):
            work()

    return threading.Thread(target=run, daemon=True)


class Scene:
    """The vmx of vm1 on esx1, in this process; its guest is this process, which nobody kills."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.events_file = folder, folder / "events"
        self.store = UnsureStore(folder)
        make_vm(self.store, "vm1")
        self.datastore = datastore_of(folder)
        self.page = LeasePage.create("vm1")
        guests_end, vmx_end = socket_pair()
        self.disk = Disk(guests_end)
        self.vmx = Vmx("vm1", "esx1", "nowhere", vmx_end, self.page, EventLog(self.events_file, "esx1"))
        self._ends = (guests_end, vmx_end)
        self._server = _until_the_end(self.vmx.serve_disk)

    def own(self, generation: int) -> None:
        lease = self.datastore.claim("vm1", generation, "esx1")
        assert lease is not None
        self.give(lease)

    def give(self, lease: Lease) -> None:
        self.page.grant(lease)
        self.vmx._do(channel.Own(lease.generation, lease.sent_s, os.getpid(), NO_GATE))

    def keep(self) -> None:
        _until_the_end(self.vmx.keep).start()

    def serve_disk(self) -> None:
        self._server.start()

    def pulse(self) -> int:
        claim = self.datastore.newest("vm1")
        assert claim is not None
        return claim.pulse

    def happened(self, kind: str, **fields: object) -> bool:
        return bool(find(read_events(self.events_file), kind, **fields))

    def end(self) -> None:
        with self.vmx.lock:
            self.vmx.lease = None  # its keeper waits for ever
        self._ends[0].close()
        if self._server.ident is not None:
            self._server.join(10)
        self._ends[1].close()


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    store = UnsureStore(tmp_path)

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(hosts.vmx_process, "open_store", lambda where, timeout_s: store)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda pidfd, number: None)
    monkeypatch.setattr(Gate, "shut", lambda gate: None)
    scene = Scene(tmp_path)
    scene.store = store
    yield scene
    scene.end()


def test_a_lease_that_is_given_while_the_keeper_notices_that_it_had_none_is_kept(scene: Scene) -> None:
    """The agent's Own comes between the keeper's look at its lease and its going to sleep."""

    class Interrupted(threading.Event):
        def clear(self) -> None:
            if scene.page.generation == 0:
                giving = threading.Thread(target=scene.own, args=(1,))
                giving.start()
                giving.join(0.5)
            super().clear()

    scene.vmx._own = Interrupted()
    scene.vmx._own.set()  # it had one, which another host has taken
    scene.keep()
    eventually(lambda: scene.datastore.newest("vm1") is not None and scene.pulse() >= 2, "pulse", 5)


@pytest.mark.parametrize("error", [errno.ESTALE, errno.ENOENT, errno.EIO])
def test_an_owner_whose_lock_file_is_gone_looks_who_came_after_it(scene: Scene, error: int) -> None:
    scene.own(1)
    scene.keep()
    eventually(lambda: scene.pulse() >= 1, "pulse")
    scene.store.for_good["write"] = OSError(error, os.strerror(error))
    eventually(lambda: scene.happened("datastore.silent"), "word of it")
    assert scene.datastore.claim("vm1", 2, "esx2")
    eventually(lambda: scene.happened("vm.fenced", generation=2, owner="esx2"), "fence", 5)


def test_an_owner_whose_pulses_are_refused_and_that_is_the_newest_stays_it(scene: Scene) -> None:
    scene.own(1)
    scene.store.for_good["write"] = OSError(errno.EIO, "disk trouble")
    scene.keep()
    eventually(lambda: scene.happened("datastore.silent"), "word of it")
    eventually(lambda: scene.store.calls.count("write") > 3, "pulses", 5)
    assert not scene.happened("vm.fenced")
    assert scene.datastore.newest_generation("vm1") == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [(errno.EACCES, "disk.refused"), (errno.ENOSPC, "disk.full"), (errno.EIO, "disk.failed")],
)
def test_a_write_that_is_refused_is_told_once_and_tried_until_it_is_done(scene: Scene, error: int, kind: str) -> None:
    scene.own(1)
    refusal = OSError(error, os.strerror(error))
    scene.store.mishaps["write"] = [refusal, "lost", refusal, "unheard", refusal]
    scene.serve_disk()
    scene.disk.write(512, b"content")
    scene.disk.await_written()
    assert scene.disk.read(512, 7) == b"content"
    assert len(find(read_events(scene.events_file), kind, vm="vm1")) == 1
    assert not scene.page.full


def test_one_pulse_without_an_answer_costs_no_lease(scene: Scene) -> None:
    """It is given up after a second; what is left of the lease is for the next one."""

    def silence() -> None:
        time.sleep(hosts.vmx_process._CALL_TIMEOUT_S)
        raise StoreSilent(errno.ETIMEDOUT, "no answer")

    scene.own(1)
    scene.keep()
    eventually(lambda: scene.pulse() >= 1, "pulse")
    scene.store.mishaps["write"] = [silence]
    eventually(lambda: scene.happened("datastore.answers"), "pulse after it")
    assert scene.page.lasts
    assert scene.datastore.newest_generation("vm1") == 1


def test_a_keeper_that_cannot_take_over_at_once_does_so_later_and_closes_what_it_had_once(scene: Scene) -> None:
    scene.own(1)
    scene.keep()
    eventually(lambda: scene.pulse() >= 1, "pulse")
    scene.store.mishaps["read"] = ["lost"]
    scene.own(2)
    eventually(lambda: scene.pulse() >= 1, "pulse under the next generation", 5)
    assert scene.store.calls.count("close") == 1
