"""Ownership on a real folder: one winner for each generation, no gaps, and a lock file that lies is named."""

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosts.datastore import Claim, DatastoreError, LocalDatastore

ROOT = Path(__file__).parents[2]
VM = "vm1"


def lock(folder: Path, generation: int, vm: str = VM) -> Path:
    return folder / vm / f".lck-{vm}.{generation}"


def newest(folder: Path, vm: str = VM) -> Claim:
    claim = LocalDatastore(folder).newest(vm)
    assert claim is not None
    return claim


# ---------------------------------------------------------------- claims


def test_a_vm_that_was_never_powered_on_has_no_owner(tmp_path: Path) -> None:
    assert LocalDatastore(tmp_path).newest(VM) is None


def test_a_claim_tells_who_owns_the_vm_and_whether_it_runs(tmp_path: Path) -> None:
    datastore = LocalDatastore(tmp_path)
    assert datastore.claim(VM, 1, "esx1")
    claim = newest(tmp_path)
    assert (claim.vm, claim.generation, claim.host, claim.running) == (VM, 1, "esx1", True)
    assert datastore.claim(VM, 2, "esx1", running=False)
    again = newest(tmp_path)
    assert (again.generation, again.running) == (2, False)
    assert again.nonce != claim.nonce


def test_claims_survive_the_process_that_made_them(tmp_path: Path) -> None:
    claim = "from pathlib import Path; from hosts.datastore import LocalDatastore; "
    claim += f"assert LocalDatastore(Path({str(tmp_path)!r})).claim('vm1', 1, 'esx1')"
    subprocess.run([sys.executable, "-c", claim], check=True, cwd=ROOT)
    assert newest(tmp_path).host == "esx1"
    assert not LocalDatastore(tmp_path).claim(VM, 1, "esx2")
    assert newest(tmp_path).host == "esx1"


def test_no_generation_is_claimed_twice_even_by_its_owner(tmp_path: Path) -> None:
    datastore = LocalDatastore(tmp_path)
    assert datastore.claim(VM, 1, "esx1")
    before = lock(tmp_path, 1).read_bytes()
    assert not datastore.claim(VM, 1, "esx1")
    assert not datastore.claim(VM, 1, "esx2")
    assert lock(tmp_path, 1).read_bytes() == before


@pytest.mark.parametrize("generation", [-1, 0, 1, 2, 3, 5, 6, 100])
def test_only_the_generation_after_the_newest_can_be_claimed(tmp_path: Path, generation: int) -> None:
    datastore = LocalDatastore(tmp_path)
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
    for generation in range(1, 12):
        assert LocalDatastore(tmp_path).claim(VM, generation, f"esx{generation % 2}")
    assert newest(tmp_path).generation == 11


@given(st.lists(st.tuples(st.sampled_from(["vm1", "vm10", "vm", "vm.1"]), st.integers(0, 6)), max_size=20))
def test_each_vm_counts_its_own_generations(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("datastore")
    datastore = LocalDatastore(folder)
    last: Counter[str] = Counter()
    for vm, generation in attempts:
        if generation > last[vm] + 1:
            with pytest.raises(DatastoreError):
                datastore.claim(vm, generation, "esx1")
        else:
            assert datastore.claim(vm, generation, "esx1") == (generation == last[vm] + 1)
        last[vm] = max(last[vm], generation) if generation == last[vm] + 1 else last[vm]
    for vm, generation in last.items():
        owner = datastore.newest(vm)
        assert (owner.generation if owner else 0) == generation


def test_a_claim_leaves_nothing_but_its_lock_file(tmp_path: Path) -> None:
    LocalDatastore(tmp_path).claim(VM, 1, "esx1")
    LocalDatastore(tmp_path).claim(VM, 1, "esx2")
    assert [file.name for file in (tmp_path / VM).iterdir()] == [".lck-vm1.1"]


# ---------------------------------------------------------------- contention

CONTENDER = """
import sys
from pathlib import Path
from hosts.datastore import LocalDatastore

folder, host, generations = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
datastore = LocalDatastore(folder)
print("ready", flush=True)
sys.stdin.readline()
for generation in range(1, generations + 1):
    if datastore.claim("vm1", generation, host):
        print(generation, flush=True)
    while (newest := datastore.newest("vm1")) is None or newest.generation < generation:
        pass
"""


def test_exactly_one_of_many_processes_wins_each_generation(tmp_path: Path) -> None:
    generations = 100
    hosts = [f"esx{number}" for number in range(1, 7)]
    contenders = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER, str(tmp_path), host, str(generations)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for host in hosts
    ]
    for contender in contenders:
        assert contender.stdout is not None
        assert contender.stdout.readline() == "ready\n"
    for contender in contenders:
        assert contender.stdin is not None
        contender.stdin.write("go\n")
        contender.stdin.flush()
    won = {
        host: contender.communicate(timeout=60)[0].split() for host, contender in zip(hosts, contenders, strict=True)
    }
    assert all(contender.returncode == 0 for contender in contenders)
    assert sorted(int(number) for numbers in won.values() for number in numbers) == list(range(1, generations + 1))
    for host, numbers in won.items():
        for number in numbers:
            assert msgspec.json.decode(lock(tmp_path, int(number)).read_bytes(), type=Claim).host == host


def test_exactly_one_of_many_threads_wins_a_generation(tmp_path: Path) -> None:
    datastore, together = LocalDatastore(tmp_path), Barrier(8)

    def contend(number: int) -> list[bool]:
        outcomes = []
        for generation in range(1, 21):
            together.wait(10)
            outcomes.append(datastore.claim(VM, generation, f"esx{number}"))
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
    datastore = LocalDatastore(tmp_path)
    assert datastore.claim(VM, 1, "esx1")
    (tmp_path / VM / name).write_text("{}")
    assert newest(tmp_path).generation == 1
    assert datastore.claim(VM, 2, "esx2")


VALID = msgspec.json.encode(Claim(VM, 2, "esx2", True, "0123456789abcdef"))
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
    assert LocalDatastore(tmp_path).claim(VM, 1, "esx1")
    lock(tmp_path, 2).write_bytes(content)
    with pytest.raises(DatastoreError) as refusal:
        LocalDatastore(tmp_path).newest(VM)
    message = str(refusal.value)
    assert "VM vm1" in message
    assert ".lck-vm1.2" in message
    assert "\n" not in message


def test_a_lock_file_that_is_a_folder_is_named(tmp_path: Path) -> None:
    lock(tmp_path, 1).mkdir(parents=True)
    with pytest.raises(DatastoreError, match=r"\.lck-vm1\.1"):
        LocalDatastore(tmp_path).newest(VM)
    assert not LocalDatastore(tmp_path).claim(VM, 1, "esx1")


def test_a_spoilt_newest_claim_still_counts_as_one(tmp_path: Path) -> None:
    datastore = LocalDatastore(tmp_path)
    assert datastore.claim(VM, 1, "esx1")
    lock(tmp_path, 2).write_bytes(b"")
    assert not datastore.claim(VM, 2, "esx2")


def test_a_datastore_that_is_not_there_is_an_error_and_no_lost_claim(tmp_path: Path) -> None:
    with pytest.raises(DatastoreError, match="VM vm1: generation 1 cannot be claimed"):
        LocalDatastore(tmp_path / "gone").claim(VM, 1, "esx1")
    with pytest.raises(DatastoreError, match=r"VM vm1: its folder cannot be read: .*gone"):
        LocalDatastore(tmp_path / "gone").newest(VM)


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / VM).write_text("")
    with pytest.raises(DatastoreError, match="its folder cannot be read"):
        LocalDatastore(tmp_path).newest(VM)
    with pytest.raises(DatastoreError, match="generation 1 cannot be claimed"):
        LocalDatastore(tmp_path).claim(VM, 1, "esx1")
