"""What lies where in a light guest's RAM, and the memory dirtier that writes there.

In pages:  0 header | ledger | working set | the rest;  from the working set on filled with random data, of which a
part may repeat itself. All of the dirtier's state is in the header, so that it goes on wherever RAM is.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, NamedTuple

import msgspec
import numpy as np

from hosts import ledger
from hosts.ram import PAGE, Ram
from topologies.errors import TestbedError
from topologies.plan import VM

# words of the header: a mark, pages the dirtier has written, datagrams echoed, what is left of a page (a float), boots
_MAGIC_WORD, WORK_WORD, ECHOED_WORD, _REST_WORD, _BOOTS_WORD = range(5)
_MAGIC = 0x564D_4F54_4947_5354
_FILL_CHUNK = 4 * 2**20
_FILL_THREADS = 2
_PAGE_WORDS = PAGE // 8
# An access that takes longer has waited for its page: a page that is here takes less than 5 us, from far at least 60
_WAIT_US = 30


class Life(msgspec.Struct, frozen=True):
    """Counters of a machine, as a disk's power-on hours are."""

    boots: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    pages_written: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    datagrams_echoed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0


def _life(nvram: bytes) -> Life:
    try:
        return msgspec.json.decode(nvram, type=Life) if nvram else Life()
    except (ValueError, RecursionError) as error:
        raise TestbedError(f"the nvram is not one of this machine's: {error}; remove the file to do without") from error


class Writes(NamedTuple):
    """Words of the working set and what is to be written there; arrays of one length."""

    pages: np.ndarray
    words: np.ndarray
    values: np.ndarray


class Memory:
    """Where everything lies in RAM (see the module)."""

    def __init__(self, ram: Ram, vm: VM) -> None:
        ledger_pages = min(ram.pages // 16, 8192)  # a sixteenth of RAM, 32 MiB at most: a million transfers
        self.header = ram.words[0]
        self._dirty_rate = vm.dirty_rate
        self.ledger = ledger.Ledger(ram.buffer[PAGE : (1 + ledger_pages) * PAGE])
        first = 1 + ledger_pages
        self.working_set = ram.words[first : first + vm.working_set // PAGE]
        self._rest = ram.bytes[first * PAGE :]
        self._fill_bytes = min(int(vm.fill * ram.size) // 8 * 8, self._rest.size)
        self._repeated_words = round(vm.compressible * PAGE / 8)

    def format(self, nvram: bytes = b"") -> None:
        """A power-on: random data as far as `fill` says, as compressible as the plan says (by default not at all).

        `nvram`: from the last shut-down. TestbedError if it is none.
        """
        life = _life(nvram)
        self._fill()
        self.header[:] = 0
        self.header[_MAGIC_WORD] = _MAGIC
        self.header[_BOOTS_WORD], self.header[WORK_WORD] = life.boots + 1, life.pages_written
        self.header[ECHOED_WORD] = life.datagrams_echoed
        self.ledger.format()

    def _fill(self) -> None:
        """The same random words everywhere, times another odd number in each chunk: no compressor sees through that.

        A power-on waits for it: making all of it anew takes four times as long, and one thread twice.
        """
        random = np.random.Generator(np.random.SFC64(len(self._rest)))
        words = random.integers(0, 2**64, _FILL_CHUNK // 8, dtype=np.uint64)
        chunks = range(0, self._fill_bytes, _FILL_CHUNK)
        factors = random.integers(0, 2**64, len(chunks), dtype=np.uint64) | np.uint64(1)

        def fill(at: int, factor: np.uint64) -> None:
            piece = self._rest[at : min(at + _FILL_CHUNK, self._fill_bytes)].view(np.uint64)
            np.multiply(words[: piece.size], factor, out=piece)
            pages = piece[: piece.size // _PAGE_WORDS * _PAGE_WORDS].reshape(-1, _PAGE_WORDS)
            pages[:, : self._repeated_words] = pages[:, :1]

        with ThreadPoolExecutor(_FILL_THREADS) as pool:
            list(pool.map(fill, chunks, factors))

    def nvram(self) -> bytes:
        """What outlives a shut-down beside the disk."""
        boots, work, echoed = (int(self.header[word]) for word in (_BOOTS_WORD, WORK_WORD, ECHOED_WORD))
        return msgspec.json.encode(Life(boots, work, echoed)) + b"\n"

    def check(self) -> None:
        if int(self.header[_MAGIC_WORD]) != _MAGIC:
            raise TestbedError("the RAM that arrived is not a guest's")

    def due(self, elapsed: float) -> Writes:
        """What the dirtier has to write after so many seconds: a word in each of the next pages.

        A counter's hash (splitmix64) chooses them.
        """
        due = self._dirty_rate * elapsed / PAGE + float(self.header[_REST_WORD].view(np.float64))
        count = int(due)
        self.header[_REST_WORD] = np.float64(due - count).view(np.uint64)
        counters = np.arange(count, dtype=np.uint64) + self.header[WORK_WORD]
        self.header[WORK_WORD] += np.uint64(count)
        mixed = (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        pages, words = np.uint64(len(self.working_set)), np.uint64(PAGE // 8)
        return Writes(mixed % pages, (mixed >> np.uint64(48)) % words, counters)

    def write(self, writes: Writes) -> None:
        self.working_set[writes.pages, writes.words] = writes.values

    def write_one_by_one(self, writes: Writes) -> list[float]:
        """Each page timed: one that is not here yet stops this virtual CPU until it has come. Those waits, in us."""
        waits_us = []
        for page, word, value in zip(writes.pages.tolist(), writes.words.tolist(), writes.values, strict=True):
            began = time.perf_counter()
            self.working_set[page, word] = value
            took_us = (time.perf_counter() - began) * 1e6
            if took_us > _WAIT_US:
                waits_us.append(took_us)
        return waits_us
