"""A VM's folder: made in steps that can be repeated, read with suspicion, and never half of anything."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import Mishap, UnsureStore
from hypothesis import given
from hypothesis import strategies as st
from stores import SEED_VM

from hosts.store import Folder, StoreSilent
from hosts.vm_files import VmFileError
from hosts.vm_folder import VmFolder
from topologies.plan import VM

SMALL = replace(SEED_VM, disk=2**20)


@pytest.fixture
def folder(tmp_path: Path) -> VmFolder:
    return VmFolder(Folder(tmp_path), "vm1")


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


# ---------------------------------------------------------------- create and read


def test_a_vm_that_is_made_is_read_as_it_was_wherever_it_is_to_run(folder: VmFolder) -> None:
    folder.create(SMALL)
    assert folder.read("esx1") == SMALL
    assert folder.read("esx2") == replace(SMALL, host="esx2")


def test_a_vm_is_three_files_and_its_disk_is_empty(folder: VmFolder, tmp_path: Path) -> None:
    folder.create(SMALL)
    made = contents(tmp_path / "vm1")
    assert sorted(made) == ["vm1-flat.vmdk", "vm1.vmdk", "vm1.vmx"]
    assert made["vm1-flat.vmdk"] == bytes(2**20)
    assert (tmp_path / "vm1/vm1-flat.vmdk").stat().st_blocks == 0


def test_whoever_is_to_own_a_disk_may_look_at_it_before(folder: VmFolder, tmp_path: Path) -> None:
    folder.create(SMALL)
    assert (tmp_path / "vm1/vm1-flat.vmdk").stat().st_mode & 0o777 == 0o644


def test_a_vm_that_is_there_stays_as_it_is(folder: VmFolder, tmp_path: Path) -> None:
    folder.create(SMALL)
    (tmp_path / "vm1/vm1-flat.vmdk").write_bytes(b"journal".ljust(2**20))
    before = contents(tmp_path / "vm1")
    folder.create(replace(SMALL, ram=2**25, disk=2**22, ip="10.0.0.99/24"))
    assert contents(tmp_path / "vm1") == before


CALLS = ("open", "truncate", "attributes", "write_new", "write", "rename")
_mishaps = st.sampled_from(["lost", "unheard"])


@given(st.lists(st.tuples(st.sampled_from(CALLS), st.integers(0, 2), _mishaps), min_size=1, max_size=4))
def test_a_vm_whose_making_was_broken_off_is_whole_after_the_next_try(
    tmp_path_factory: pytest.TempPathFactory, broken: list[tuple[str, int, Mishap]]
) -> None:
    """Whatever was not answered, once in each try: done, or not."""
    root = tmp_path_factory.mktemp("store")
    store = UnsureStore(root)
    folder = VmFolder(store, "vm1")
    for call, after, mishap in broken:
        store.mishaps = {call: [lambda: None] * after + [mishap]}
        try:
            folder.create(SMALL)
        except StoreSilent:
            continue
    store.mishaps = {}
    folder.create(SMALL)
    assert folder.read("esx1") == SMALL
    assert sorted(os.listdir(root / "vm1")) == ["vm1-flat.vmdk", "vm1.vmdk", "vm1.vmx"]


def test_without_a_configuration_it_is_no_vm(folder: VmFolder, tmp_path: Path) -> None:
    """It is written last."""
    store = UnsureStore(tmp_path)
    store.mishaps["write_new"] = [lambda: None, "lost"]
    with pytest.raises(StoreSilent):
        VmFolder(store, "vm1").create(SMALL)
    with pytest.raises(FileNotFoundError, match=r"vm1\.vmx"):
        folder.read("esx1")


@pytest.mark.parametrize("missing", ["vm1.vmx", "vm1.vmdk", "vm1-flat.vmdk"])
def test_a_file_that_is_missing_is_named(folder: VmFolder, tmp_path: Path, missing: str) -> None:
    folder.create(SMALL)
    (tmp_path / "vm1" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        folder.read("esx1")


def spoil(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (
            spoil("vm1.vmx", lambda text: text.replace(b'displayName = "vm1"', b'displayName = "vm2"')),
            r"/vm1/vm1\.vmx is the configuration of 'vm2'; a VM's files have its name",
        ),
        (spoil("vm1.vmx", lambda text: b"\xff" + text), r"/vm1/vm1\.vmx is no text"),
        (spoil("vm1.vmx", lambda text: text + b"#" * 70_000), r"/vm1/vm1\.vmx is longer than 65536 bytes"),
        (spoil("vm1.vmx", lambda text: b""), r"/vm1/vm1\.vmx has no displayName"),
        (spoil("vm1.vmdk", lambda text: b""), r"vm1\.vmdk is no disk descriptor"),
        (spoil("vm1.vmdk", lambda text: text.replace(b"vm1-flat", b"vm2-flat")), r"vm1\.vmdk: its extents are .*vm2"),
        (spoil("vm1-flat.vmdk", lambda disk: disk[:-512]), "/vm1/vm1-flat.vmdk has 1048064 bytes, .* says 1048576"),
        (spoil("vm1-flat.vmdk", lambda disk: disk + b"x"), "/vm1/vm1-flat.vmdk has 1048577 bytes, .* says 1048576"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(
    folder: VmFolder, tmp_path: Path, spoil: Callable[[Path], None], why: str
) -> None:
    folder.create(SMALL)
    spoil(tmp_path / "vm1")
    with pytest.raises(VmFileError, match=why):
        folder.read("esx1")


def test_two_vms_of_one_store_are_each_its_own(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    vms: list[VM] = [replace(SMALL, name=name, ram=2**24 * number) for number, name in enumerate(("vm1", "vm10"), 1)]
    for vm in vms:
        VmFolder(store, vm.name).create(vm)
    assert [VmFolder(store, vm.name).read("esx1") for vm in vms] == vms


# ---------------------------------------------------------------- nvram


def test_a_vm_that_was_never_shut_down_has_no_nvram(folder: VmFolder) -> None:
    folder.create(SMALL)
    assert folder.nvram() == b""


def test_the_last_nvram_counts(folder: VmFolder, tmp_path: Path) -> None:
    folder.create(SMALL)
    for content in (b"a long first one", b"second"):
        folder.save_nvram(content)
        assert folder.nvram() == content
    assert not (tmp_path / "vm1/vm1.nvram.new").exists()


@pytest.mark.parametrize("call", ["write_new", "rename"])
@pytest.mark.parametrize("mishap", ["lost", "unheard", OSError(28, "full")], ids=str)
def test_an_nvram_is_the_old_or_the_new_one(folder: VmFolder, tmp_path: Path, call: str, mishap: Mishap) -> None:
    folder.create(SMALL)
    folder.save_nvram(b"old")
    store = UnsureStore(tmp_path)
    store.mishaps[call] = [mishap]
    with pytest.raises(OSError, match=r"no answer|full"):
        VmFolder(store, "vm1").save_nvram(b"new")
    assert folder.nvram() == (b"new" if (call, mishap) == ("rename", "unheard") else b"old")
    folder.save_nvram(b"newer")
    assert folder.nvram() == b"newer"


def test_what_is_left_of_a_save_that_was_broken_off_is_in_nobodys_way(folder: VmFolder, tmp_path: Path) -> None:
    folder.create(SMALL)
    (tmp_path / "vm1/vm1.nvram.new").write_bytes(b"half of somethi")
    assert folder.nvram() == b""
    folder.save_nvram(b"whole")
    assert folder.nvram() == b"whole"


# ---------------------------------------------------------------- swap


def test_swap_is_as_large_as_ram_and_takes_no_room(folder: VmFolder, tmp_path: Path) -> None:
    folder.create(SMALL)
    folder.add_swap("esx1", 2**30)
    swap = (tmp_path / "vm1/vm1-esx1.vswp").stat()
    assert (swap.st_size, swap.st_blocks, swap.st_mode & 0o777) == (2**30, 0, 0o600)


def test_each_host_has_its_own_swap_and_takes_only_that_away(folder: VmFolder, tmp_path: Path) -> None:
    folder.create(SMALL)
    for host in ("esx1", "esx2"):
        folder.add_swap(host, 2**24)
    folder.remove_swap("esx1")
    folder.remove_swap("esx1")
    assert [file.name for file in (tmp_path / "vm1").glob("*.vswp")] == ["vm1-esx2.vswp"]


def test_swap_of_a_host_that_could_not_clear_up_is_made_anew(folder: VmFolder, tmp_path: Path) -> None:
    folder.create(SMALL)
    (tmp_path / "vm1/vm1-esx1.vswp").write_bytes(b"old" * 1000)
    folder.add_swap("esx1", 2**24)
    assert (tmp_path / "vm1/vm1-esx1.vswp").stat().st_size == 2**24
    assert not any((tmp_path / "vm1/vm1-esx1.vswp").read_bytes())
