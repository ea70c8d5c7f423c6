"""The experiments about shared storage, as a person runs them."""

from pathlib import Path

from programs import SMALL, Program


def passes(tmp_path: Path, name: str, *words: str) -> dict[str, object]:
    program = Program(tmp_path / "out", "run", name, *words)
    status, out, err = program.end(timeout_s=200)
    assert (status, err) == (0, ""), out + err
    section: dict[str, object] = program.summary()[name]
    return section


def test_shared_storage(tmp_path: Path) -> None:
    figures = passes(tmp_path, "shared_storage", *SMALL)
    assert figures["overlap_ms"] == 0
    files = "\n".join(figures["files"])  # type: ignore[arg-type]
    for name in ("vm1.vmx", "vm1.vmdk", "vm1-flat.vmdk", "vm1.nvram", ".lck-vm1.3", "vmware.log", "vmware-1.log"):
        assert f"  {name}" in files
    folder = tmp_path / "out/datastore/vm1"
    assert {"vm1.vmx", ".lck-vm1.5"} <= {path.name for path in folder.iterdir()}  # a person can look at them afterwards
    assert "vm.lost" in (folder / "vmware.log").read_text()


def test_shared_storage_in_a_folder(tmp_path: Path) -> None:
    assert passes(tmp_path, "shared_storage", *SMALL, "--datastore", "local")["nfs_calls"] == {}


def test_host_failure(tmp_path: Path) -> None:
    figures = passes(tmp_path, "host_failure")
    assert figures["overlap_ms"] == 0
    assert figures["late_writes_refused"] != 0


def test_split_brain(tmp_path: Path) -> None:
    figures = passes(tmp_path, "split_brain")
    assert figures["overlap_ms"] == 0
    assert len(figures["stories"]) == 6  # type: ignore[arg-type]
