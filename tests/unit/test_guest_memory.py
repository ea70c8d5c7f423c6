"""What a light guest's RAM holds at its power-on: the network, the loop and the life of a guest are tested live."""

import zlib
from dataclasses import replace

import numpy as np
import pytest

from hosts.guest_memory import Memory
from hosts.ledger import ACCOUNTS, OPENING_BALANCE
from hosts.ram import PAGE, Ram
from topologies.plan import read_plan

RAM_BYTES = 16 * 2**20


def formatted(fill: float, compressible: float) -> Ram:
    vm = replace(read_plan().vm("vm1"), ram=RAM_BYTES, working_set=2**20, fill=fill, compressible=compressible)
    ram = Ram.create("formatted", RAM_BYTES)
    memory = Memory(ram, vm)
    memory.format()
    memory.check()
    assert memory.ledger.total == ACCOUNTS * OPENING_BALANCE
    return ram


def filled(ram: Ram) -> np.ndarray:
    """Its pages of data, behind header and ledger."""
    first = 1 + ram.pages // 16
    pages = ram.words[first:]
    return pages[pages.any(axis=1)]


@pytest.mark.parametrize("fill", [0.0, 0.25, 0.75])
def test_so_much_is_filled_as_the_plan_says(fill: float) -> None:
    assert len(filled(formatted(fill, 0))) == fill * RAM_BYTES / PAGE


@pytest.mark.parametrize("compressible", [0.0, 0.5, 0.9, 1.0])
def test_so_much_of_each_filled_page_packs_to_nothing_as_the_plan_says(compressible: float) -> None:
    for page in filled(formatted(0.5, compressible))[::100]:
        packed = len(zlib.compress(page.tobytes())) / PAGE
        assert 1 - compressible <= packed + 0.001 <= 1 - compressible + 0.03


@pytest.mark.parametrize("compressible", [0.0, 1.0])
def test_no_two_filled_pages_are_equal_and_none_is_zero(compressible: float) -> None:
    pages = filled(formatted(0.5, compressible))
    assert len({page.tobytes() for page in pages}) == len(pages) == RAM_BYTES / PAGE / 2
