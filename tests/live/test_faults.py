"""Whatever breaks at whatever state of a migration, the end is the one that was promised (experiments/faults.py)."""

import dataclasses
import time
from collections.abc import Iterator

import pytest
from testbeds import elsewhere, events, small_testbed

from experiments.fault_cases import Case, all_cases, short_cases
from experiments.faults import PEER_TIMEOUT_S, play
from experiments.testbed import Testbed
from hosts import control
from hosts.announce import SCHEDULE_MS


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    testbed = small_testbed(tmp_path_factory.mktemp("faults") / "results")
    testbed.run.options = dataclasses.replace(testbed.run.options, peer_timeout_s=PEER_TIMEOUT_S)
    with testbed:
        testbed.vcenter.power_on("vm1")
        yield testbed


def test_a_preparation_that_nobody_comes_for_is_given_up_and_the_vm_can_move(testbed: Testbed) -> None:
    there = elsewhere(testbed)
    order = control.Prepare("vm1", "vm1-0badcafe", "rarp", SCHEDULE_MS)
    testbed.vcenter._call(there, order)
    assert testbed.vcenter.status()[there]["migrations"]
    deadline = time.monotonic() + 20 * PEER_TIMEOUT_S
    while testbed.vcenter.status()[there]["migrations"]:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    (discarded,) = events(testbed, "migration.discarded", migration="vm1-0badcafe")
    assert discarded["reason"] == f"no source has come within {10 * PEER_TIMEOUT_S:g} s"
    assert testbed.vcenter.migrate("vm1", there).outcome.digests_equal


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = all_cases() if metafunc.config.getoption("--long") else short_cases(injuries=1)
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


def test_a_fault_ends_as_promised_and_the_vm_can_move_again(testbed: Testbed, case: Case) -> None:
    verdict = play(testbed, "vm1", case)
    assert verdict.passed, verdict
