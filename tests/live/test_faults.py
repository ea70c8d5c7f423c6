"""Whatever breaks at whatever state of a migration, the end is the one that was promised (experiments/faults.py)."""

import dataclasses
from collections.abc import Iterator

import pytest
from testbeds import small_testbed

from experiments.fault_cases import Case, all_cases, short_cases
from experiments.faults import PEER_TIMEOUT_S, play
from experiments.testbed import Testbed


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    testbed = small_testbed(tmp_path_factory.mktemp("faults") / "results")
    testbed.run.options = dataclasses.replace(testbed.run.options, peer_timeout_s=PEER_TIMEOUT_S)
    with testbed:
        testbed.vcenter.power_on("vm1")
        yield testbed


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = all_cases() if metafunc.config.getoption("--long") else short_cases()
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


def test_a_fault_ends_as_promised_and_the_vm_can_move_again(testbed: Testbed, case: Case) -> None:
    verdict = play(testbed, "vm1", case)
    assert verdict.passed, verdict
