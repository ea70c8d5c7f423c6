"""The experiments about shared storage, as a person runs them; of split_brain two moments, all with --long."""

from pathlib import Path

import pytest
from programs import SMALL, Program
from testbeds import elsewhere, events, small_testbed

from experiments.clerk import Clerk
from experiments.split_brain import MOMENTS, Moment, play
from experiments.tenures import overlap_ms, tenures
from experiments.verdict import ledger_checks
from hosts.availability import Availability
from topologies.events import read_events


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
    figures = passes(tmp_path, "host_failure", *SMALL)
    assert figures["overlap_ms"] == 0
    assert figures["late_writes_refused"] != 0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "moment" in metafunc.fixturenames:
        moments = MOMENTS if metafunc.config.getoption("--long") else (MOMENTS[0], MOMENTS[-1])
        metafunc.parametrize("moment", moments, ids=[moment.name for moment in moments])


def test_split_brain(tmp_path: Path, moment: Moment) -> None:
    with small_testbed(tmp_path / "results") as testbed:
        testbed.vcenter.power_on("vm1")
        with Availability(testbed.vcenter), Clerk(testbed, "vm1", "clerk", patience_s=1.0) as clerk:
            play(testbed, "vm1", moment)
            seen = clerk.audit()
        story = read_events(testbed.run.events_file)
        assert events(testbed, "host.isolated") and events(testbed, "vm.stalled")
        assert overlap_ms(tenures(story, "vm1")) == 0
        assert all(ledger_checks(seen).values())
        assert testbed.vcenter.migrate("vm1", elsewhere(testbed)).outcome.digests_equal
