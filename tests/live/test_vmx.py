"""The vmx of a VM on a store of its own, with its agent, its guest and another host in the test.

vmx --- a folder for a datastore; a port on vSwitch0 for a gate; a process that sleeps for a guest
"""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from namespaces import Node
from programs import eventually
from stores import datastore_of

from experiments.world import run
from hosts.datastore import Claim
from hosts.disk_channel import MAX_BYTES, Disk, VmxGone, socket_pair
from hosts.ownership import LEASE_S, PULSE_EVERY_S, RUN_S, Lease
from hosts.vmx import Vmx, VmxError, Where
from hosts.vmx import VmxGone as VmxHasEnded
from hosts.vswitch import VmPort
from topologies.events import Event, find, read_events
from topologies.plan import VM

VM1 = VM("vm1", "esx1", "10.0.0.11/24", "00:50:56:00:00:01")
LISTENING, FORWARDING = "1\n", "3\n"  # linux/if_bridge.h


@pytest.fixture(scope="module")
def port() -> Iterator[VmPort]:
    run("ip", "link", "add", "vSwitch0", "type", "bridge", "stp_state", "0")
    run("ip", "link", "set", "vSwitch0", "up")
    node = Node()
    port = VmPort("vSwitch0", VM1, node.pid)
    yield port
    port.remove()
    node.end()
    run("ip", "link", "del", "vSwitch0")


class Scene:
    """The vmx of vm1 on esx1, which nobody has claimed yet."""

    def __init__(self, folder: Path, port: VmPort) -> None:
        self.root, self.port = folder / "datastore", port
        self._away, self.events_file = folder / "away", folder / "events.jsonl"
        self.root.mkdir(exist_ok=True)
        self.datastore = datastore_of(self.root, "vm1")
        self.where = Where(str(self.root), self.events_file, folder / "vmx.log")
        self.home = folder / "vm1.vmx"
        self.guest = subprocess.Popen(["sleep", "infinity"])
        guests_end, vmx_end = socket_pair()
        with vmx_end:
            self.vmx = Vmx.start("vm1", "esx1", self.where, self.home, vmx_end)
        self.disk, self._guests_end = Disk(guests_end), guests_end
        self.vmx.greet()
        self.pid = self._pid()

    def _pid(self) -> int:
        assert self.vmx._process is not None
        return self.vmx._process.pid

    def own(self, generation: int = 1) -> None:
        """As an agent that powers on, or has taken a VM in."""
        lease = self.datastore.claim("vm1", generation, "esx1")
        assert lease is not None
        self.vmx.page.grant(lease)
        self.vmx.own(lease, self.guest.pid, self.port.gate)
        self.port.open()

    @contextmanager
    def datastore_away(self) -> Iterator[None]:
        os.rename(self.root, self._away)
        try:
            yield
        finally:
            os.rename(self._away, self.root)

    def events(self, kind: str, **fields: object) -> list[Event]:
        return find(read_events(self.events_file), kind, **fields)

    def await_event(self, kind: str, **fields: object) -> Event:
        eventually(lambda: bool(self.events(kind, **fields)), f"{kind} {fields}", 10)
        return self.events(kind, **fields)[-1]

    @property
    def claim(self) -> Claim:
        claim = self.datastore.newest("vm1")
        assert claim is not None
        return claim

    @property
    def is_open(self) -> bool:
        state = Path(f"/sys/class/net/{self.port.name}/brport/state").read_text()
        assert state in (LISTENING, FORWARDING)
        return state == FORWARDING

    def hang_up(self) -> None:
        """As a guest that ends."""
        self._guests_end.close()

    def vmx_ends(self) -> int:
        assert self.vmx._process is not None
        return self.vmx._process.wait(10)

    def end(self) -> None:
        self.vmx.end()
        self.hang_up()
        self.guest.kill()
        self.guest.wait()
        self.port.shut()


@pytest.fixture
def scene(tmp_path: Path, port: VmPort) -> Iterator[Scene]:
    scene = Scene(tmp_path, port)
    yield scene
    scene.end()


@pytest.fixture
def owner(scene: Scene) -> Scene:
    """The same, and it runs."""
    scene.own()
    return scene


def pulses_for(scene: Scene, seconds: float) -> int:
    before = scene.claim.pulse
    time.sleep(seconds)
    return scene.claim.pulse - before


# ---------------------------------------------------------------- its disk


def test_the_guest_reads_what_it_wrote_and_it_is_in_the_file(owner: Scene) -> None:
    content = os.urandom(MAX_BYTES // 2)
    owner.disk.write(4096, content)
    owner.disk.await_written()
    assert owner.disk.read(4000, 200) == bytes(96) + content[:104]
    assert owner.disk.read(2**20 - 100, 500) == bytes(100), "and no further than its end"
    assert (owner.root / "vm1/vm1-flat.vmdk").read_bytes()[4096 : 4096 + len(content)] == content


def test_a_disk_can_be_read_before_the_vm_is_this_hosts(scene: Scene) -> None:
    assert scene.disk.read(0, 512) == bytes(512)
    assert scene.vmx.generation == 0
    assert scene.datastore.newest("vm1") is None


def test_a_write_that_finds_no_room_is_done_when_there_is_some(tmp_path: Path, port: VmPort) -> None:
    (tmp_path / "datastore").mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path / "datastore"))
    try:
        scene = Scene(tmp_path, port)
        try:
            scene.own()
            eventually(lambda: scene.claim.pulse > 0, "pulse")
            filler = scene.root / "filler"
            with open(filler, "wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            scene.disk.write(0, b"x" * 50_000)
            scene.await_event("disk.full", vm="vm1")
            assert scene.vmx.page.full
            assert pulses_for(scene, 3 * PULSE_EVERY_S) >= 2, "a full disk is no silent datastore"
            filler.unlink()
            scene.disk.await_written()
            assert not scene.vmx.page.full
            assert scene.disk.read(0, 50_000) == b"x" * 50_000
            assert len(scene.events("disk.full")) == 1
        finally:
            scene.end()
    finally:
        run("umount", str(tmp_path / "datastore"))


def test_without_a_disk_there_is_no_vmx_and_the_agent_hears_why(tmp_path: Path) -> None:
    datastore_of(tmp_path, "vm1")
    (tmp_path / "vm1/vm1-flat.vmdk").unlink()
    where = Where(str(tmp_path), tmp_path / "events", tmp_path / "vmx.log")
    guests_end, vmx_end = socket_pair()
    with guests_end, vmx_end:
        vmx = Vmx.start("vm1", "esx1", where, tmp_path / "vm1.vmx", vmx_end)
        try:
            with pytest.raises(VmxError, match=r"did not come up \(VM vm1: no disk: .*vm1-flat\.vmdk'\); see"):
                vmx.greet()
        finally:
            vmx.end()
    assert not (tmp_path / "vm1.vmx").exists()


def test_a_guest_that_ends_ends_its_vmx(owner: Scene) -> None:
    eventually(lambda: owner.claim.pulse > 0, "pulse")
    owner.hang_up()
    assert owner.vmx_ends() == 0
    assert pulses_for(owner, 3 * PULSE_EVERY_S) == 0
    assert owner.claim.running, "its host's agent says that it is off, or another host breaks the lease"


def test_a_vmx_that_ends_leaves_a_guest_without_a_disk(owner: Scene) -> None:
    owner.vmx.end()
    with pytest.raises(VmxGone):
        owner.disk.read(0, 512)


# ---------------------------------------------------------------- its lease


def test_an_owner_pulses_and_runs_for_longer_than_a_lease(owner: Scene) -> None:
    until_s = time.monotonic() + LEASE_S + 1
    while time.monotonic() < until_s:
        assert owner.vmx.page.lasts
        time.sleep(0.01)
    assert owner.claim.pulse >= (LEASE_S + 1) / PULSE_EVERY_S / 2
    assert (owner.claim.generation, owner.vmx.generation, owner.is_open) == (1, 1, True)
    assert not owner.events("vm.stalled")


def test_what_its_predecessors_left_is_taken_away(owner: Scene) -> None:
    eventually(lambda: not list((owner.root / "vm1").glob(".draft*")), "end of its draft", 5)


def test_a_datastore_that_is_away_for_a_moment_is_not_noticed_by_the_guest(owner: Scene) -> None:
    eventually(lambda: owner.claim.pulse > 0, "pulse")
    with owner.datastore_away():
        owner.await_event("datastore.silent", vm="vm1")
        assert owner.vmx.page.silent_since_ns
        assert owner.vmx.page.lasts and owner.is_open
    answered = owner.await_event("datastore.answers", vm="vm1")
    assert 0 < answered["silent_ms"] < RUN_S * 1000
    assert owner.vmx.page.silent_since_ns == 0
    assert pulses_for(owner, 1.0) > 0
    assert owner.claim.generation == 1
    assert not owner.events("vm.stalled")


def test_without_its_datastore_it_stands_still_in_time_and_comes_back_under_the_next_generation(owner: Scene) -> None:
    eventually(lambda: owner.claim.pulse > 0, "pulse")
    with owner.datastore_away():
        away_ns = time.monotonic_ns()
        stalled = owner.await_event("vm.stalled", vm="vm1", generation=1)
        assert (stalled["t"] - away_ns) / 1e9 < RUN_S + 0.25
        assert not owner.vmx.page.lasts and not owner.is_open
        time.sleep(1)
        assert not owner.vmx.page.lasts and not owner.is_open
        assert owner.vmx.generation == 1, "it is still this host's, for all that is known"
    owner.await_event("generation.claimed", vm="vm1", generation=2)
    owner.await_event("vm.unstalled", vm="vm1", generation=2)
    assert owner.vmx.page.lasts and owner.is_open
    assert (owner.vmx.generation, owner.claim.generation, owner.claim.host) == (2, 2, "esx1")
    assert pulses_for(owner, 3 * PULSE_EVERY_S) >= 2
    assert owner.guest.poll() is None
    assert len(owner.events("vm.stalled")) == len(owner.events("vm.unstalled")) == 1


def test_whom_another_host_has_overtaken_kills_its_guest_and_ends(owner: Scene) -> None:
    eventually(lambda: owner.claim.pulse > 0, "pulse")
    assert owner.datastore.claim("vm1", 2, "esx2")
    assert owner.guest.wait(10) == -9
    assert owner.vmx_ends() == 0
    fenced = owner.await_event("vm.fenced", vm="vm1", generation=2)
    assert fenced["owner"] == "esx2"
    assert not owner.is_open and not owner.vmx.page.lasts


def test_who_comes_back_and_finds_another_owner_is_fenced(owner: Scene) -> None:
    """The breaker's way: nothing of the old guest runs while the datastore is away from it."""
    eventually(lambda: owner.claim.pulse > 0, "pulse")
    with owner.datastore_away():
        owner.await_event("vm.stalled")
        broken = datastore_of(owner._away).await_silence("vm1")
        assert broken is None or broken.generation == 1
        assert datastore_of(owner._away).claim("vm1", 2, "esx2")
        assert owner.guest.poll() is None
    assert owner.guest.wait(10) == -9
    assert owner.vmx_ends() == 0
    assert owner.claim.host == "esx2"
    assert not owner.events("generation.claimed")


def test_a_vm_that_was_switched_off_behind_its_back_is_fenced(owner: Scene) -> None:
    assert owner.datastore.claim("vm1", 2, "esx1", running=False)
    assert owner.guest.wait(10) == -9
    assert owner.vmx_ends() == 0


def test_a_claim_of_this_host_that_is_not_its_own_is_anothers(owner: Scene) -> None:
    """Its agent's for a new guest, say: the disk must not be written under a generation that another vmx keeps."""
    eventually(lambda: owner.claim.pulse > 0, "pulse")
    assert owner.datastore.claim("vm1", 2, "esx1")
    owner.await_event("vm.fenced", generation=2)
    eventually(lambda: owner.guest.poll() is not None, "end of the guest")


def test_a_lease_that_has_lapsed_before_it_is_given_lets_nothing_run_until_the_next_is_claimed(scene: Scene) -> None:
    assert scene.datastore.claim("vm1", 1, "esx1")
    scene.vmx.page.grant(Lease.lapsed(1))
    assert not scene.vmx.page.lasts
    scene.vmx.own(Lease.lapsed(1), scene.guest.pid, scene.port.gate)
    scene.await_event("generation.claimed", generation=2)
    eventually(lambda: scene.vmx.page.lasts and scene.is_open, "lease")


# ---------------------------------------------------------------- held, in a switchover


def test_held_it_keeps_the_lease_and_touches_neither_gate_nor_generation(owner: Scene) -> None:
    eventually(lambda: owner.claim.pulse > 0, "pulse")
    owner.vmx.hold()
    owner.port.shut()
    assert pulses_for(owner, 4 * PULSE_EVERY_S) >= 2
    assert not owner.is_open, "it is the agent's"
    with owner.datastore_away():
        time.sleep(RUN_S + 1)
        assert not owner.vmx.page.lasts
    time.sleep(1.5)
    assert (owner.claim.generation, owner.vmx.generation, owner.is_open) == (1, 1, False)
    assert not owner.events("generation.claimed") and not owner.events("vm.stalled")
    owner.vmx.go_on()
    owner.await_event("generation.claimed", generation=2)
    eventually(lambda: owner.vmx.page.lasts and owner.is_open, "lease")


def test_held_it_leaves_a_vm_alone_that_another_host_has_taken(owner: Scene) -> None:
    owner.vmx.hold()
    assert owner.datastore.claim("vm1", 2, "esx2")
    assert pulses_for(owner, RUN_S + 1) == 0
    assert owner.guest.poll() is None
    assert owner.disk.read(0, 512) == bytes(512)
    assert not owner.events("vm.fenced")


def test_after_a_hold_that_was_in_vain_the_gate_is_open_again(owner: Scene) -> None:
    owner.vmx.hold()
    owner.port.shut()
    owner.vmx.go_on()
    assert owner.is_open and owner.vmx.page.lasts
    assert pulses_for(owner, 4 * PULSE_EVERY_S) >= 2
    assert owner.claim.generation == 1


def test_what_had_gone_to_another_host_and_is_taken_again_is_kept_again(owner: Scene) -> None:
    owner.vmx.hold()
    assert owner.datastore.claim("vm1", 2, "esx2")
    time.sleep(3 * PULSE_EVERY_S)
    owner.own(3)
    assert pulses_for(owner, LEASE_S) >= 3
    assert owner.vmx.page.lasts
    assert (owner.vmx.generation, owner.claim.generation, owner.claim.host) == (3, 3, "esx1")


# ---------------------------------------------------------------- its agent


def test_it_keeps_the_vm_while_no_agent_is_there_and_serves_the_next(owner: Scene) -> None:
    owner.vmx.let_go()
    assert pulses_for(owner, LEASE_S) >= 3
    adopted = Vmx.adopt("vm1", owner.home, owner.where.log)
    try:
        assert (adopted.generation, adopted.page.lasts) == (1, True)
        adopted.hold()
        owner.port.shut()
        adopted.go_on()
        assert owner.is_open
    finally:
        adopted.end()
    assert owner.vmx_ends() == -9


def test_it_stands_still_without_an_agent_too(owner: Scene) -> None:
    eventually(lambda: owner.claim.pulse > 0, "pulse")
    owner.vmx.let_go()
    with owner.datastore_away():
        owner.await_event("vm.stalled")
        assert not owner.is_open
    owner.await_event("vm.unstalled", generation=2)
    adopted = Vmx.adopt("vm1", owner.home, owner.where.log)
    assert adopted.generation == 2
    adopted.end()


def test_a_vmx_that_has_ended_is_told_from_one_that_cannot_be_reached(owner: Scene) -> None:
    owner.vmx.let_go()
    os.kill(owner.pid, 9)
    owner.vmx_ends()
    with pytest.raises(VmxHasEnded, match=r"VM vm1: its vmx at .* has ended"):
        Vmx.adopt("vm1", owner.home, owner.where.log)
    assert not owner.home.exists()
