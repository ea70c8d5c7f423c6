"""Ownership on a real folder: one winner for each generation, no gaps, and a lock file that lies is named; and what
becomes of a claim whose calls are not answered.
"""

import errno
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import msgspec
import pytest
from fakes import Clock, Mishap, UnsureStore
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import datastore_of, make_vm

import hosts.datastore
from hosts.datastore import FORMAT, Claim, Datastore, DatastoreError, DatastoreSilent, Keeper, OwnerUnknown, user_of
from hosts.ownership import LEASE_S, RUN_S, Lease
from hosts.store import StoreSilent
from hosts.vm_files import disk_path

ROOT = Path(__file__).parents[2]
VM = "vm1"


def lock(folder: Path, generation: int, vm: str = VM) -> Path:
    return folder / vm / f".lck-{vm}.{generation}"


def newest(folder: Path, vm: str = VM) -> Claim:
    claim = datastore_of(folder).newest(vm)
    assert claim is not None
    return claim


def locks_and_drafts(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder / VM) if name.startswith("."))


# ---------------------------------------------------------------- claims


def test_a_vm_that_was_never_powered_on_has_no_owner(tmp_path: Path) -> None:
    assert datastore_of(tmp_path).newest(VM) is None
    assert datastore_of(tmp_path, VM).newest(VM) is None


def test_a_claim_gives_a_lease_from_when_it_was_asked_for(tmp_path: Path) -> None:
    before = time.monotonic()
    lease = datastore_of(tmp_path, VM).claim(VM, 1, "esx1")
    assert lease is not None
    assert (lease.generation, before <= lease.sent_s <= time.monotonic()) == (1, True)


def test_what_has_no_disk_is_no_vm(tmp_path: Path) -> None:
    with pytest.raises(DatastoreError, match=r"VM vm1: generation 1 cannot be claimed: .*No such file.*flat\.vmdk"):
        datastore_of(tmp_path).claim(VM, 1, "esx1")
    assert os.listdir(tmp_path) == []


def test_a_claim_tells_who_owns_the_vm_and_whether_it_runs(tmp_path: Path) -> None:
    datastore = datastore_of(tmp_path, VM)
    assert datastore.claim(VM, 1, "esx1")
    claim = newest(tmp_path)
    assert (claim.vm, claim.generation, claim.host, claim.running) == (VM, 1, "esx1", True)
    assert datastore.claim(VM, 2, "esx1", running=False)
    again = newest(tmp_path)
    assert (again.generation, again.running) == (2, False)
    assert again.nonce != claim.nonce


def test_claims_survive_the_process_that_made_them(tmp_path: Path) -> None:
    datastore = datastore_of(tmp_path, VM)
    claim = "from hosts.datastore import Datastore; from hosts.store import open_store; "
    claim += f"assert Datastore(open_store({str(tmp_path)!r})).claim('vm1', 1, 'esx1')"
    subprocess.run([sys.executable, "-c", claim], check=True, cwd=ROOT)
    assert newest(tmp_path).host == "esx1"
    assert not datastore.claim(VM, 1, "esx2")
    assert newest(tmp_path).host == "esx1"


def test_no_generation_is_claimed_twice_even_by_its_owner(tmp_path: Path) -> None:
    datastore = datastore_of(tmp_path, VM)
    assert datastore.claim(VM, 1, "esx1")
    before = lock(tmp_path, 1).read_bytes()
    assert not datastore.claim(VM, 1, "esx1")
    assert not datastore.claim(VM, 1, "esx2")
    assert lock(tmp_path, 1).read_bytes() == before


@pytest.mark.parametrize("generation", [-1, 0, 1, 2, 3, 5, 6, 100])
def test_only_the_generation_after_the_newest_can_be_claimed(tmp_path: Path, generation: int) -> None:
    datastore = datastore_of(tmp_path, VM)
    for taken in (1, 2, 3):
        assert datastore.claim(VM, taken, "esx1")
    if generation > 4:  # what came before it is gone: nobody can tell who owns the VM
        with pytest.raises(DatastoreError, match=f"generation {generation - 1} is gone"):
            datastore.claim(VM, generation, "esx2")
    else:
        assert not datastore.claim(VM, generation, "esx2")
    assert newest(tmp_path).generation == 3
    assert datastore.claim(VM, 4, "esx2")


def test_the_tenth_generation_is_newer_than_the_ninth(tmp_path: Path) -> None:
    datastore = datastore_of(tmp_path, VM)
    for generation in range(1, 12):
        assert datastore.claim(VM, generation, f"esx{generation % 2}")
    assert newest(tmp_path).generation == 11


VMS = ("vm1", "vm10", "vm", "vm.1")


@given(st.lists(st.tuples(st.sampled_from(VMS), st.integers(0, 6)), max_size=20))
def test_each_vm_counts_its_own_generations(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("datastore")
    datastore = datastore_of(folder, *VMS)
    last: Counter[str] = Counter()
    for vm, generation in attempts:
        if generation > last[vm] + 1:
            with pytest.raises(DatastoreError):
                datastore.claim(vm, generation, "esx1")
        else:
            assert bool(datastore.claim(vm, generation, "esx1")) == (generation == last[vm] + 1)
        last[vm] = max(last[vm], generation) if generation == last[vm] + 1 else last[vm]
    for vm, generation in last.items():
        owner = datastore.newest(vm)
        assert (owner.generation if owner else 0) == generation


def test_a_claim_in_vain_leaves_nothing(tmp_path: Path) -> None:
    datastore = datastore_of(tmp_path, VM)
    taken, late = datastore.draft(VM, 1, "esx1"), datastore.draft(VM, 1, "esx2")
    assert taken is not None and late is not None
    assert len(locks_and_drafts(tmp_path)) == 2
    assert taken.take() is not None
    assert late.take() is None
    assert datastore.claim(VM, 1, "esx2") is None
    assert locks_and_drafts(tmp_path) == [f".draft-vm1.{taken.claim.nonce}", ".lck-vm1.1"]
    Keeper(datastore, VM, 1, "esx1").collect()
    assert locks_and_drafts(tmp_path) == [".lck-vm1.1"]


def test_a_draft_that_is_not_taken_leaves_nothing(tmp_path: Path) -> None:
    draft = datastore_of(tmp_path, VM).draft(VM, 1, "esx1")
    assert draft is not None
    draft.discard()
    draft.discard()
    assert locks_and_drafts(tmp_path) == []


# ---------------------------------------------------------------- contention

CONTENDER = """
import os
import sys
from hosts.datastore import Datastore
from hosts.store import open_store

folder, host, generations = sys.argv[1], sys.argv[2], int(sys.argv[3])
datastore = Datastore(open_store(folder))
print("ready", flush=True)
sys.stdin.readline()
for generation in range(1, generations + 1):
    if datastore.claim("vm1", generation, host):
        print(generation, flush=True)
        open(f"{folder}/won.{generation}", "x")
    while not os.path.exists(f"{folder}/won.{generation}"):  # else who is first in the next could win this one's CHECK
        pass
"""


def test_exactly_one_of_many_processes_wins_each_generation(tmp_path: Path) -> None:
    generations = 100
    datastore_of(tmp_path, VM)
    names = [f"esx{number}" for number in range(1, 7)]
    contenders = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER, str(tmp_path), host, str(generations)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for host in names
    ]
    for contender in contenders:
        assert contender.stdout is not None
        assert contender.stdout.readline() == "ready\n"
    for contender in contenders:
        assert contender.stdin is not None
        contender.stdin.write("go\n")
        contender.stdin.flush()
    won = {
        host: contender.communicate(timeout=60)[0].split() for host, contender in zip(names, contenders, strict=True)
    }
    assert all(contender.returncode == 0 for contender in contenders)
    assert sorted(int(number) for numbers in won.values() for number in numbers) == list(range(1, generations + 1))
    for host, numbers in won.items():
        for number in numbers:
            assert msgspec.json.decode(lock(tmp_path, int(number)).read_bytes(), type=Claim).host == host


def test_exactly_one_of_many_threads_wins_a_generation(tmp_path: Path) -> None:
    datastore, together = datastore_of(tmp_path, VM), Barrier(8)

    def contend(number: int) -> list[bool]:
        outcomes = []
        for generation in range(1, 21):
            together.wait(10)
            outcomes.append(datastore.claim(VM, generation, f"esx{number}") is not None)
        return outcomes

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(contend, range(8)))
    assert [sum(round_) for round_ in zip(*outcomes, strict=True)] == [1] * 20


# ---------------------------------------------------------------- what else may lie in the folder


@pytest.mark.parametrize(
    "name",
    [".draft-vm1.0123456789abcdef", ".lck-vm1.9~", ".lck-vm1.", ".lck-vm10.9", ".lck-vm.1.9", "lck-vm1.9", "vm1.vmdk"],
)
def test_other_files_are_no_claims(tmp_path: Path, name: str) -> None:
    datastore = datastore_of(tmp_path, VM)
    assert datastore.claim(VM, 1, "esx1")
    (tmp_path / VM / name).write_text("{}")
    assert newest(tmp_path).generation == 1
    assert datastore.claim(VM, 2, "esx2")


VALID = msgspec.json.encode(Claim(FORMAT, VM, 2, "esx2", True, "0123456789abcdef"))
SPOILT = {
    "empty": b"",
    "cut at its end": VALID[:-1],
    "cut within": VALID[:20],
    "of zeros": b"\x00" * len(VALID),
    "null": b"null",
    "a list": b"[]",
    "without a field": b"{}",
    "with a number for a host": VALID.replace(b'"esx2"', b"7"),
    "with text for a yes": VALID.replace(b"true", b'"yes"'),
    "of a format that is none": VALID.replace(b'"format":1', b'"format":"1"'),
    "with text for a generation": VALID.replace(b'"generation":2', b'"generation":"2"'),
    "with something behind": VALID + b"x",
    "longer than a claim": VALID.replace(b"esx2", b"x" * 5000),
    "with bad UTF-8": VALID.replace(b"esx2", b"esx\xff"),
    "nested too deeply": b'{"x":' + b"[" * 4000,
    "of another generation": VALID.replace(b'"generation":2', b'"generation":1'),
    "of another VM": VALID.replace(b'"vm1"', b'"vm2"'),
}


@pytest.mark.parametrize(
    "content",
    [pytest.param(content, id=what) for what, content in SPOILT.items()],
)
def test_a_lock_file_that_cannot_be_is_named(tmp_path: Path, content: bytes) -> None:
    datastore = datastore_of(tmp_path, VM)
    assert datastore.claim(VM, 1, "esx1")
    lock(tmp_path, 2).write_bytes(content)
    with pytest.raises(DatastoreError) as refusal:
        datastore.newest(VM)
    message = str(refusal.value)
    assert "VM vm1" in message
    assert ".lck-vm1.2" in message
    assert "\n" not in message


def test_a_lock_file_of_a_later_version_is_left_alone_and_says_what_to_do(tmp_path: Path) -> None:
    datastore = datastore_of(tmp_path, VM)
    lock(tmp_path, 1).write_bytes(b'{"format": 2, "owners": ["esx1", "esx2"]}'.ljust(512))
    before = {file: file.read_bytes() for file in (tmp_path / VM).iterdir()}
    why = r"VM vm1: the lock file /vm1/\.lck-vm1\.1 was written by a later version of vmotion .*format 2.*use that"
    for look in (datastore.newest, datastore.await_silence, lambda vm: Keeper(datastore, vm, 1, "esx1")):
        with pytest.raises(DatastoreError, match=why):
            look(VM)
    assert {file: file.read_bytes() for file in (tmp_path / VM).iterdir()} == before


def test_a_lock_file_that_is_a_folder_is_named(tmp_path: Path) -> None:
    datastore = datastore_of(tmp_path, VM)
    lock(tmp_path, 1).mkdir()
    with pytest.raises(DatastoreError, match=r"\.lck-vm1\.1"):
        datastore.newest(VM)
    assert not datastore.claim(VM, 1, "esx1")


def test_a_spoilt_newest_claim_still_counts_as_one(tmp_path: Path) -> None:
    datastore = datastore_of(tmp_path, VM)
    assert datastore.claim(VM, 1, "esx1")
    lock(tmp_path, 2).write_bytes(b"")
    assert not datastore.claim(VM, 2, "esx2")


def test_a_datastore_that_is_not_there_is_an_error_and_no_lost_claim(tmp_path: Path) -> None:
    gone = datastore_of(tmp_path / "gone")
    with pytest.raises(DatastoreError, match=r"VM vm1: its datastore cannot be read: .*gone"):
        gone.claim(VM, 1, "esx1")
    with pytest.raises(DatastoreError, match=r"VM vm1: its datastore cannot be read: .*gone"):
        gone.newest(VM)


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / VM).write_text("")
    with pytest.raises(DatastoreError, match="its folder cannot be read"):
        datastore_of(tmp_path).newest(VM)
    with pytest.raises(DatastoreError, match="its folder cannot be read"):
        datastore_of(tmp_path).claim(VM, 1, "esx1")


# ---------------------------------------------------------------- calls without an answer


class Scene:
    """VM vm1 on a store that is told when not to answer; `clock` moves only while somebody sleeps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock, self.store = folder, Clock(), UnsureStore(folder)
        make_vm(self.store, VM)
        self.datastore = Datastore(self.store, self.clock)
        self.store.calls.clear()

    def drafted(self, generation: int = 1) -> hosts.datastore.Draft:
        draft = self.datastore.draft(VM, generation, "esx1")
        assert draft is not None
        self.store.calls.clear()
        return draft

    def another_claims(self, generation: int) -> None:
        assert datastore_of(self.folder).claim(VM, generation, "esx2")

    @property
    def steps(self) -> list[str]:
        """The calls of a claim: LINK, FENCE, and the reading of its folder."""
        return [call for call in self.store.calls if call in ("link", "chown", "names")]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    scene = Scene(tmp_path)
    monkeypatch.setattr(hosts.datastore, "time", SimpleNamespace(sleep=scene.clock.sleep))
    return scene


def test_a_claim_is_link_fence_check(scene: Scene) -> None:
    assert scene.drafted().take() == Lease(1, scene.clock.now_s)
    assert scene.steps == ["link", "chown", "names"]
    assert scene.store.owners == {disk_path(VM): user_of(1)}


def test_a_link_without_an_answer_is_repeated_and_its_lease_counts_from_the_first(scene: Scene) -> None:
    draft, began_s = scene.drafted(), scene.clock.now_s
    scene.store.mishaps["link"] = ["lost", "lost"]
    assert draft.take() == Lease(1, began_s)
    assert scene.steps == ["link", "link", "link", "chown", "names"]
    assert scene.clock.now_s > began_s


def test_a_link_that_was_done_without_an_answer_is_known_by_its_nonce(scene: Scene) -> None:
    draft = scene.drafted()
    scene.store.mishaps["link"] = ["unheard", "unheard"]
    scene.store.mishaps["read"] = ["lost"]
    assert draft.take() is not None
    assert scene.steps == ["link", "link", "link", "chown", "names"]
    assert newest(scene.folder).nonce == draft.claim.nonce


def test_a_link_that_another_has_forestalled_is_lost(scene: Scene) -> None:
    draft = scene.drafted()
    scene.store.mishaps["link"] = ["lost", lambda: scene.another_claims(1)]
    assert draft.take() is None
    assert scene.store.owners == {}, "the disk is another's"
    assert newest(scene.folder).host == "esx2"
    assert f".draft-vm1.{draft.claim.nonce}" not in locks_and_drafts(scene.folder)


def test_a_link_that_is_refused_changes_nothing(scene: Scene) -> None:
    draft = scene.drafted()
    scene.store.mishaps["link"] = [PermissionError(errno.EACCES, "not for you")]
    with pytest.raises(DatastoreError, match=r"VM vm1: generation 1 cannot be claimed: .*not for you"):
        draft.take()
    assert (scene.steps, locks_and_drafts(scene.folder), scene.store.owners) == (["link"], [], {})


def test_a_link_that_is_refused_after_one_without_an_answer_is_asked_for_on(scene: Scene) -> None:
    """The first may still come to pass: the refusal was of the second."""
    draft = scene.drafted()
    scene.store.mishaps["link"] = ["unheard", OSError(errno.EIO, "disk trouble")]
    assert draft.take() is not None


@pytest.mark.parametrize("mishap", ["lost", "unheard", OSError(errno.EIO, "disk trouble")], ids=str)
@pytest.mark.parametrize("call", ["chown", "names"])
def test_fence_and_check_are_repeated_until_they_are_answered(scene: Scene, call: str, mishap: Mishap) -> None:
    draft, began_s = scene.drafted(), scene.clock.now_s
    scene.store.mishaps[call] = [mishap, mishap, mishap]
    assert draft.take() == Lease(1, began_s)
    assert scene.steps.count(call) == 4
    assert scene.steps.count("link") == 1
    assert scene.store.owners == {disk_path(VM): user_of(1)}


def test_who_is_not_the_newest_when_it_looks_has_lost(scene: Scene) -> None:
    draft = scene.drafted()
    scene.store.mishaps["chown"] = [lambda: scene.another_claims(2)]
    assert draft.take() is None
    assert newest(scene.folder).host == "esx2"


@pytest.mark.parametrize(
    ("call", "mishap"),
    [
        *[("link", "lost"), ("link", "unheard"), ("read", "lost"), ("chown", "lost"), ("names", "lost")],
        ("chown", OSError(errno.EIO, "disk trouble")),
    ],
)
def test_a_claim_that_is_not_answered_in_time_may_be_ours(scene: Scene, call: str, mishap: Mishap) -> None:
    draft, began_s = scene.drafted(), scene.clock.now_s
    scene.store.mishaps["link"] = ["unheard"]
    scene.store.for_good[call] = mishap
    if (call, mishap) == ("link", "unheard"):
        scene.store.for_good["read"] = "lost"
    with pytest.raises(OwnerUnknown, match="VM vm1: whether generation 1 is ours is not known: "):
        draft.take(patience_s=7.0)
    assert 7.0 <= scene.clock.now_s - began_s < 8.0
    assert newest(scene.folder).nonce == draft.claim.nonce
    assert f".draft-vm1.{draft.claim.nonce}" in locks_and_drafts(scene.folder), "a LINK on its way needs it"


def test_a_datastore_that_is_silent_before_anything_was_asked_of_it_is_told_from_one_that_refuses(scene: Scene) -> None:
    scene.store.mishaps["write_new"] = ["lost"]
    with pytest.raises(DatastoreSilent, match="VM vm1: generation 1 cannot be claimed"):
        scene.datastore.claim(VM, 1, "esx1")
    scene.store.mishaps["names"] = ["lost"]
    with pytest.raises(DatastoreSilent, match="VM vm1: its datastore cannot be read"):
        scene.datastore.newest(VM)
    scene.another_claims(1)
    scene.store.mishaps["read"] = ["lost"]
    with pytest.raises(DatastoreSilent, match=r"VM vm1: the lock file /vm1/\.lck-vm1\.1 cannot be read"):
        scene.datastore.newest(VM)


_mishaps = st.lists(st.sampled_from(["lost", "unheard"]), max_size=4)


@given(link=_mishaps, chown=_mishaps, names=_mishaps, rival=st.sampled_from(["", "link", "chown", "names"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_not_answered_one_host_has_the_generation(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    link: list[Mishap],
    chown: list[Mishap],
    names: list[Mishap],
    rival: str,
) -> None:
    """Another claims the same or, once that is taken, the next generation, before one of the calls is answered."""
    scene = Scene(tmp_path_factory.mktemp("datastore"))
    monkeypatch.setattr(hosts.datastore, "time", SimpleNamespace(sleep=scene.clock.sleep))
    draft, outcomes = scene.drafted(), []

    def claim() -> None:
        taken = datastore_of(scene.folder).newest_generation(VM)
        outcomes.append(datastore_of(scene.folder).claim(VM, taken + 1, "esx2"))

    mishaps: dict[str, list[Mishap]] = {"link": link, "chown": chown, "names": names}
    scene.store.mishaps = {call: list(planned) for call, planned in mishaps.items()}
    if rival:
        scene.store.mishaps[rival].append(claim)
    lease = draft.take()
    assert (newest(scene.folder).host == "esx1") == (lease is not None)
    assert (lease is None) == any(outcomes)


# ---------------------------------------------------------------- keeping a generation


@pytest.fixture
def kept(scene: Scene) -> Scene:
    """The same, claimed by esx1."""
    assert scene.datastore.claim(VM, 1, "esx1")
    scene.store.calls.clear()
    return scene


def test_a_pulse_counts_in_the_lock_file_and_tells_the_newest_generation(kept: Scene) -> None:
    keeper = Keeper(kept.datastore, VM, 1, "esx1")
    claimed = newest(kept.folder)
    assert [keeper.pulse(), keeper.pulse()] == [1, 1]
    assert newest(kept.folder) == msgspec.structs.replace(claimed, pulse=claimed.pulse + 2)
    assert lock(kept.folder, 1).stat().st_size == 512
    kept.another_claims(2)
    assert keeper.pulse() == 2
    assert newest(kept.folder).host == "esx2"


def test_a_keeper_that_takes_over_goes_on_counting(kept: Scene) -> None:
    """So that a breaker sees the first pulse of an agent's successor."""
    for pulse in (1, 2, 3):
        Keeper(kept.datastore, VM, 1, "esx1").pulse()
        assert newest(kept.folder).pulse == pulse


@pytest.mark.parametrize(("host", "running"), [("esx2", True), ("esx1", False)])
def test_nobody_keeps_what_is_anothers_or_off(scene: Scene, host: str, running: bool) -> None:
    assert scene.datastore.claim(VM, 1, host, running)
    with pytest.raises(DatastoreError, match="VM vm1: generation 1 is not one under which esx1 runs it"):
        Keeper(scene.datastore, VM, 1, "esx1")


@pytest.mark.parametrize("call", ["write", "names"])
@pytest.mark.parametrize("mishap", ["lost", "unheard"])
def test_a_pulse_that_is_not_acknowledged_is_no_pulse(kept: Scene, call: str, mishap: Mishap) -> None:
    keeper = Keeper(kept.datastore, VM, 1, "esx1")
    kept.store.mishaps[call] = [mishap]
    with pytest.raises((StoreSilent, DatastoreSilent)):
        keeper.pulse()
    assert keeper.pulse() == 1


@pytest.mark.parametrize(("owner", "mended"), [(1, True), (2, False), (3, False)])
def test_a_late_fence_of_an_older_generation_is_mended_and_of_a_newer_one_is_not(
    kept: Scene, owner: int, mended: bool
) -> None:
    assert kept.datastore.claim(VM, 2, "esx1")
    keeper = Keeper(kept.datastore, VM, 2, "esx1")
    kept.store.owners[disk_path(VM)] = user_of(owner)
    assert keeper.mend_fence() == mended
    assert kept.store.owners[disk_path(VM)] == user_of(max(owner, 2))


def test_a_keeper_takes_away_what_nobody_needs_and_nothing_else(kept: Scene) -> None:
    for generation in range(2, 21):
        assert kept.datastore.claim(VM, generation, "esx1")
    keeper = Keeper(kept.datastore, VM, 20, "esx1")
    keeper.pulse()
    drafts = {nonce: kept.folder / VM / f".draft-vm1.{nonce}" for nonce in ("young", "old", "older")}
    for draft in drafts.values():
        draft.write_text("{}")
    pulsed_s = lock(kept.folder, 20).stat().st_mtime
    os.utime(drafts["young"], (pulsed_s - 59, pulsed_s - 59))
    os.utime(drafts["old"], (pulsed_s - 61, pulsed_s - 61))
    os.utime(drafts["older"], (pulsed_s - 1e6, pulsed_s - 1e6))
    for name in locks_and_drafts(kept.folder):  # of the generations before
        if name.startswith(".draft-") and not name.endswith((*drafts, keeper.claim.nonce)):
            os.unlink(kept.folder / VM / name)
    another = kept.folder / VM / ".lck-vm10.1"
    another.touch()
    keeper.collect()
    locks = [f".lck-vm1.{generation}" for generation in range(5, 21)]
    assert locks_and_drafts(kept.folder) == sorted([".draft-vm1.young", ".lck-vm10.1", *locks])
    assert keeper.pulse() == 20


# ---------------------------------------------------------------- breaking a lease


def test_an_owner_whose_pulse_stands_still_for_a_lease_is_dead(kept: Scene) -> None:
    began_s = kept.clock.now_s
    claim = kept.datastore.await_silence(VM)
    assert claim is not None and (claim.generation, claim.host) == (1, "esx1")
    assert LEASE_S <= kept.clock.now_s - began_s < LEASE_S + 0.5


def test_an_owner_that_pulses_lives_however_late_it_is(kept: Scene) -> None:
    keeper, began_s = Keeper(datastore_of(kept.folder), VM, 1, "esx1"), kept.clock.now_s

    def pulse_late() -> None:
        if kept.clock.now_s > began_s + LEASE_S - 0.3:
            keeper.pulse()

    kept.clock.meanwhile = pulse_late
    assert kept.datastore.await_silence(VM) is None
    assert kept.clock.now_s - began_s < LEASE_S


def test_a_vm_that_another_takes_meanwhile_is_alive(kept: Scene) -> None:
    began_s = kept.clock.now_s

    def take() -> None:
        if kept.clock.now_s > began_s + 1 and newest(kept.folder).generation == 1:
            kept.another_claims(2)

    kept.clock.meanwhile = take
    assert kept.datastore.await_silence(VM) is None


def test_a_vm_that_is_off_is_nobodys_at_once(kept: Scene) -> None:
    assert kept.datastore.claim(VM, 2, "esx1", running=False)
    began_s = kept.clock.now_s
    claim = kept.datastore.await_silence(VM)
    assert claim is not None and not claim.running
    assert kept.clock.now_s == began_s


def test_without_a_claim_there_is_nothing_to_break(scene: Scene) -> None:
    with pytest.raises(DatastoreError, match="VM vm1 was never powered on: there is no lease to break"):
        scene.datastore.await_silence(VM)


def test_lock_files_that_are_gone_are_no_silence(kept: Scene) -> None:
    kept.clock.meanwhile = lambda: lock(kept.folder, 1).unlink(missing_ok=True)
    with pytest.raises(DatastoreError, match="VM vm1: its lock files are gone from the datastore"):
        kept.datastore.await_silence(VM)


def test_a_breaker_that_hears_nothing_of_the_datastore_breaks_nothing(kept: Scene) -> None:
    kept.store.mishaps["names"] = [lambda: None, lambda: None]  # its first look
    kept.store.for_good["names"] = "lost"
    began_s = kept.clock.now_s
    with pytest.raises(DatastoreSilent):
        kept.datastore.await_silence(VM)
    assert kept.clock.now_s - began_s > LEASE_S


def silence(calls: int) -> list[Mishap]:
    return ["lost" for _ in range(calls)]


def test_silence_between_two_looks_is_not_the_owners(kept: Scene) -> None:
    kept.store.mishaps["names"] = [lambda: None, lambda: None, *silence(20)]
    keeper = Keeper(datastore_of(kept.folder), VM, 1, "esx1")
    kept.clock.meanwhile = keeper.pulse  # which the breaker sees only when the datastore answers again
    assert kept.datastore.await_silence(VM) is None
    kept.store.mishaps["names"] = [lambda: None, lambda: None, *silence(5)]
    kept.clock.meanwhile = lambda: None
    assert kept.datastore.await_silence(VM) == newest(kept.folder)


def test_an_owner_stands_still_before_its_lease_can_be_broken(kept: Scene) -> None:
    lease = Lease(1, kept.clock.now_s)
    assert kept.datastore.await_silence(VM) is not None
    assert not lease.lasts(kept.clock.now_s - (LEASE_S - RUN_S) + 0.01)
