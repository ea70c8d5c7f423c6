"""The page that a VM's agent, vmx and guest share: what one writes the others read, across processes."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosts.lease_page import LeasePage
from hosts.ownership import RUN_S, Lease

ROOT = Path(__file__).parents[2]


@pytest.fixture
def page() -> Iterator[LeasePage]:
    page = LeasePage.create("vm1")
    yield page
    page.close()


def test_a_new_page_lets_nobody_run(page: LeasePage) -> None:
    assert (page.lasts, page.run_until_ns, page.generation) == (False, 0, 0)
    assert (page.silent_since_ns, page.full) == (0, False)


def test_a_lease_lets_the_guest_run_until_it_ends(page: LeasePage) -> None:
    sent_s = time.monotonic()
    page.grant(Lease(7, sent_s))
    assert (page.lasts, page.generation) == (True, 7)
    assert page.run_until_ns == pytest.approx((sent_s + RUN_S) * 1e9, abs=1000)
    page.grant(Lease(7, sent_s - RUN_S - 0.001))
    assert not page.lasts


def test_a_lease_ends_while_nobody_does_anything(page: LeasePage) -> None:
    page.grant(Lease(7, time.monotonic() - RUN_S + 0.1))
    assert page.lasts
    time.sleep(0.12)
    assert not page.lasts


@pytest.mark.parametrize("lease", [Lease.lapsed(8), Lease(8, -5.0)], ids=["of nobody knows when", "before the boot"])
def test_a_lease_of_long_ago_names_the_generation_and_lets_nobody_run(page: LeasePage, lease: Lease) -> None:
    page.grant(Lease(7, time.monotonic()))
    page.grant(lease)
    assert (page.lasts, page.run_until_ns, page.generation) == (False, 0, 8)


def test_what_is_revoked_is_still_this_hosts(page: LeasePage) -> None:
    page.grant(Lease(7, time.monotonic()))
    page.revoke()
    assert (page.lasts, page.generation) == (False, 7)


def test_each_word_is_of_its_own(page: LeasePage) -> None:
    page.grant(Lease(7, 100.0))
    until_ns = page.run_until_ns
    page.silent_since_ns, page.full = 2**62, True
    assert (page.run_until_ns, page.generation, page.silent_since_ns, page.full) == (until_ns, 7, 2**62, True)
    page.generation, page.full = 9, False
    assert (page.run_until_ns, page.generation, page.silent_since_ns, page.full) == (until_ns, 9, 2**62, False)


OTHER = """
import sys
from hosts.lease_page import LeasePage
from hosts.ownership import Lease
import time

page = LeasePage(int(sys.argv[1]))
print(page.lasts, page.generation, flush=True)
page.silent_since_ns, page.full = 5, True
page.grant(Lease(8, time.monotonic()))
page.close()
"""


def test_another_process_sees_it_and_is_seen(page: LeasePage) -> None:
    page.grant(Lease(7, time.monotonic()))
    words = [sys.executable, "-c", OTHER, str(page.fd)]
    said = subprocess.run(words, check=True, pass_fds=[page.fd], stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    assert said == "True 7\n"
    assert (page.lasts, page.generation, page.silent_since_ns, page.full) == (True, 8, 5, True)


def test_a_page_that_is_closed_gives_back_its_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    page = LeasePage.create("vm1")
    copy = LeasePage(os.dup(page.fd))
    page.grant(Lease(7, 1.0))
    assert copy.generation == 7
    page.close()
    copy.close()
    assert os.listdir("/proc/self/fd") == before
