"""What a light guest's RAM holds at its power-on: the network, the loop and the life of a guest are tested live."""

import zlib
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from hosts.guest_memory import ECHOED_WORD, WORK_WORD, Memory
from hosts.ledger import ACCOUNTS, OPENING_BALANCE
from hosts.ram import PAGE, Ram
from topologies.errors import TestbedError
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


def memory() -> Memory:
    return Memory(Ram.create("nvram", RAM_BYTES), replace(read_plan().vm("vm1"), ram=RAM_BYTES, working_set=2**20))


def life_of(nvram: bytes) -> dict[str, int]:
    life: dict[str, int] = msgspec.json.decode(nvram)
    return life


def test_what_it_was_and_did_before_outlives_a_shut_down() -> None:
    first = memory()
    first.format()
    assert life_of(first.nvram()) == {"boots": 1, "pages_written": 0, "datagrams_echoed": 0}
    first.header[WORK_WORD], first.header[ECHOED_WORD] = 17, 2**63 - 1
    again = memory()
    again.format(first.nvram())
    assert life_of(again.nvram()) == {"boots": 2, "pages_written": 17, "datagrams_echoed": 2**63 - 1}


def test_a_power_on_without_an_nvram_is_the_first() -> None:
    used = memory()
    used.format(b'{"boots": 8}')
    used.format()
    assert life_of(used.nvram())["boots"] == 1


@pytest.mark.parametrize(
    "nvram",
    [b"no nvram", b"\xff", b"[]", b'{"boots": -1}', b'{"boots": "1"}', b'{"boots": 9223372036854775808}', b"[" * 4000],
    ids=lambda nvram: nvram[:20].decode(errors="replace"),
)
def test_an_nvram_that_is_none_is_refused_before_the_ram_is_touched(nvram: bytes) -> None:
    spoilt = memory()
    with pytest.raises(
        TestbedError, match=r"the nvram is not one of this machine's: .*; remove the file to do without"
    ):
        spoilt.format(nvram)
    assert not spoilt.header.any()
