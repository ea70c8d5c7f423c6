"""Guest RAM and its dirty bitmap.

RAM is a memfd that the guest maps shared; the agent maps the same memfd to read pages for a
stream and to write received ones. What the guest writes is known from the kernel. In the order in
which they are probed:

    wp-async     userfaultfd WP_ASYNC + PAGEMAP_SCAN (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst)
    soft-dirty   /proc/PID/clear_refs and pagemap bit 55 (admin-guide/mm/soft-dirty.rst), guest stopped meanwhile
    hash         xxh3 of every page: no kernel help needed, 0.12 s for each GiB (here, 2026)

None of them sees writes through another mapping than the guest's own (the agent's, pwrite): whoever
writes so has to know what it wrote. Sets of pages are *runs*: an (n, 2) uint32 array of [first, end).
"""

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from hosts.userfaults import UserFaults
from topologies.errors import TestbedError
from topologies.units import format_size

PAGE = mmap.PAGESIZE
NO_RUNS = np.empty((0, 2), np.uint32)
_PIECE_PAGES = 256  # hashed in about 0.1 ms

_MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h
_PUNCH = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)


def runs_of(pages: np.ndarray) -> np.ndarray:
    """The runs of a sorted array of page numbers."""
    if not len(pages):
        return NO_RUNS
    if pages[-1] - pages[0] == len(pages) - 1:  # one run: the usual case, and a fault may wait for it
        return np.array([[pages[0], pages[-1] + 1]], np.uint32)
    breaks = np.flatnonzero(np.diff(pages) != 1)
    first = pages[np.concatenate(([0], breaks + 1))]
    last = pages[np.concatenate((breaks, [len(pages) - 1]))]
    return np.stack([first, last + 1], 1).astype(np.uint32)


def pages_of(runs: np.ndarray) -> np.ndarray:
    """The sorted page numbers of runs."""
    if len(runs) == 1:
        return np.arange(runs[0, 0], runs[0, 1], dtype=np.int64)
    first, lengths = runs[:, 0].astype(np.int64), _lengths(runs)
    before = np.cumsum(lengths) - lengths
    return np.repeat(first - before, lengths) + np.arange(int(lengths.sum()))


def _lengths(runs: np.ndarray) -> np.ndarray:
    return runs[:, 1].astype(np.int64) - runs[:, 0]


def mask_of(runs: np.ndarray, pages: int) -> np.ndarray:
    """Runs as one boolean for each of `pages` pages."""
    edges = np.zeros(pages + 1, np.int8)
    edges[runs[:, 0]] += 1
    edges[runs[:, 1]] -= 1
    return edges[:-1].cumsum(dtype=np.int8).view(bool)


def runs_from(runs: np.ndarray, first: int) -> np.ndarray:
    """What of the runs lies at or behind page `first`."""
    kept = runs[runs[:, 1] > first].copy()
    kept[:1, 0] = np.maximum(kept[:1, 0], first)
    return kept


def count(runs: np.ndarray) -> int:
    """How many pages runs hold."""
    return int(_lengths(runs).sum())


def chunks(runs: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """The runs again, cut into pieces of `size` pages; the last may be smaller."""
    ends = np.cumsum(_lengths(runs))
    begins = ends - _lengths(runs)
    total = int(ends[-1]) if len(ends) else 0
    for at in range(0, total, size):
        to = min(at + size, total)
        first, last = int(np.searchsorted(ends, at, "right")), int(np.searchsorted(begins, to))
        piece = runs[first:last].copy()
        piece[0, 0] += at - int(begins[first])
        piece[-1, 1] -= int(ends[last - 1]) - to
        yield piece


class Ram:
    """A guest's memory as this process sees it: `bytes` (uint8), `words` (pages x 512 uint64), `buffer`.

    It owns the descriptor. TestbedError if it cannot be mapped.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = os.fstat(fd).st_size
        try:
            self._map = mmap.mmap(fd, self.size, mmap.MAP_SHARED)
        except OSError as error:
            os.close(fd)
            raise TestbedError(f"no memory to map {format_size(self.size)} of guest RAM: {error.strerror}") from error
        self.buffer = memoryview(self._map)
        self.bytes = np.frombuffer(self._map, np.uint8)
        self.words = self.bytes.view(np.uint64).reshape(-1, PAGE // 8)

    @classmethod
    def create(cls, name: str, size: int) -> "Ram":
        """Fresh zeroed memory; `size` in bytes, whole pages."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return cls(fd)

    @property
    def pages(self) -> int:
        return self.size // PAGE

    @property
    def address(self) -> int:
        """Where the mapping lies in this process."""
        return self.bytes.ctypes.data

    def populated(self, first: int = 0, end: int | None = None) -> np.ndarray:
        """Runs of the pages of [first, end) that exist at all.

        The others are zero, and looking at them would make them exist.
        """
        runs, at, stop = [], first * PAGE, (self.pages if end is None else end) * PAGE
        while at < stop:
            try:
                data = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data up to the end
                    break
                raise
            if data >= stop:
                break
            at = min(os.lseek(self.fd, data, os.SEEK_HOLE), stop)
            runs.append((data // PAGE, -(-at // PAGE)))
        return np.array(runs, np.uint32).reshape(-1, 2)

    def populate(self, runs: np.ndarray) -> None:
        """Make these pages exist now, rather than one by one at their first write.

        TestbedError if there is no memory for them; a write would end this process by SIGBUS then.
        """
        for first, end in runs.tolist():
            start, length = ctypes.c_void_p(self.address + first * PAGE), ctypes.c_size_t((end - first) * PAGE)
            if _libc.madvise(start, length, _MADV_POPULATE_WRITE):
                code = ctypes.get_errno()
                if code != errno.EINVAL:  # EINVAL: before Linux 5.14, then they come into being one by one
                    raise TestbedError(f"no memory for {count(runs)} pages of guest RAM: {os.strerror(code)}")

    def punch(self, runs: np.ndarray) -> None:
        """Make these pages not exist (fallocate(2), FALLOC_FL_PUNCH_HOLE), whoever maps them."""
        for first, end in runs.tolist():
            if _libc.fallocate(self.fd, _PUNCH, ctypes.c_long(first * PAGE), ctypes.c_long((end - first) * PAGE)):
                raise TestbedError(f"guest RAM cannot be punched: {os.strerror(ctypes.get_errno())}")

    def views(self, runs: np.ndarray) -> list[memoryview]:
        """The content of runs, in their order: a view for each run, or of short runs for each page."""
        if 2 * len(runs) > count(runs):  # as hashes need them
            begins = (pages_of(runs).astype(np.int64) * PAGE).tolist()
            return [self.buffer[begin : begin + PAGE] for begin in begins]
        return [self.buffer[first * PAGE : end * PAGE] for first, end in runs.tolist()]

    def page(self, page: int) -> memoryview:
        """The content of one page."""
        return self.buffer[page * PAGE : (page + 1) * PAGE]

    def nonzero(self, pages: np.ndarray) -> np.ndarray:
        """Which of these pages hold anything: a boolean array."""
        mask = self.words[pages, 0] != 0
        maybe = np.flatnonzero(~mask)
        if len(maybe):
            mask[maybe] = self.words[pages[maybe]].any(axis=1)
        return mask

    def close(self) -> None:
        """Give the memory back, as soon as nothing refers to a piece of it any more (a traceback may)."""
        del self.bytes, self.words, self.buffer, self._map
        os.close(self.fd)


class PageHashes:
    """One xxh3 for each page, updated as pages are sent or received; the digest of all of RAM at any moment.

    At switchover only the last pages have to be hashed, not all of RAM. A page never noted counts as zero.
    """

    _ZERO = xxhash.xxh3_64_intdigest(bytes(PAGE))

    def __init__(self, ram: Ram) -> None:
        self._hashes = np.full(ram.pages, self._ZERO, np.uint64)

    def note(self, runs: np.ndarray, contents: list[memoryview]) -> np.ndarray:
        """These pages have this content for now: whole pages, in the order of the runs. Returns their hashes."""
        pages: Iterable[Any] = contents
        if len(contents) != count(runs):  # rows of an array are cut more quickly than views
            pages = chain.from_iterable(np.frombuffer(content, np.uint8).reshape(-1, PAGE) for content in contents)
        hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, pages), np.uint64, count(runs))
        self._hashes[pages_of(runs)] = hashes
        return hashes

    def note_page(self, page: int, content: memoryview) -> int:
        """One page has this content; returns its hash."""
        value = xxhash.xxh3_64_intdigest(content)
        self._hashes[page] = value
        return value

    def note_zero(self, runs: np.ndarray) -> None:
        self._hashes[pages_of(runs)] = self._ZERO

    def differing(self, ram: Ram, first: int = 0, end: int | None = None) -> np.ndarray:
        """Runs of the pages of [first, end) whose content in RAM is another than the one noted; reads all that exist.

        Piece by piece: a single call would keep every other thread of this process waiting for the interpreter.
        """
        now = PageHashes(ram)
        for piece in chunks(ram.populated(first, end), _PIECE_PAGES):
            now.note(piece, ram.views(piece))
        return runs_of(np.flatnonzero(self._hashes[first:end] != now._hashes[first:end]) + first)

    def digest(self, without: np.ndarray | None = None) -> str:
        """Of all of RAM, or as if the pages of this mask were zero."""
        hashes = self._hashes if without is None else np.where(without, np.uint64(self._ZERO), self._hashes)
        return xxhash.xxh3_128_hexdigest(hashes.tobytes())


# ---------------------------------------------------------------- tracking: the guest's side

# linux/fs.h (kernel 6.7)
_PAGEMAP_SCAN = 0xC0606610
_PAGE_IS_WRITTEN = 2
_PM_SCAN_WP_MATCHING, _PM_SCAN_CHECK_WPASYNC = 1, 2
_SOFT_DIRTY_BIT = 55


def arm(ram: Ram) -> tuple[str, UserFaults | None]:
    """Let the kernel track this process's writes to `ram`: the way to read them (see the module).

    Also the userfaultfd on it, to be kept as long as the guest lives; None if this kernel has none.
    """
    try:
        userfaults = UserFaults.open(ram.address, ram.size)
    except TestbedError:
        userfaults = None
    if userfaults is not None and userfaults.tracks_writes:
        try:
            userfaults.watch_writes()
            WpAsyncBitmap(os.getpid(), ram.address, ram.size).peek()  # an older kernel fails here
        except OSError:
            userfaults.tracks_writes = False
            userfaults.unwatch()
        else:
            return "wp-async", userfaults
    return "soft-dirty" if _soft_dirty_works() else "hash", userfaults


def _soft_dirty_works() -> bool:
    """Some kernels accept clear_refs and never set the bit: written, cleared, written must read 1, 0, 1."""
    seen = []
    with mmap.mmap(-1, PAGE) as page:
        anchor = ctypes.c_char.from_buffer(page)
        bitmap = SoftDirtyBitmap(os.getpid(), ctypes.addressof(anchor), PAGE)
        page[0] = 1
        seen.append(count(bitmap.peek()))
        bitmap.clear()
        seen.append(count(bitmap.peek()))
        page[0] = 2
        seen.append(count(bitmap.peek()))
        del anchor
    return seen == [1, 0, 1]


# ---------------------------------------------------------------- tracking: the agent's side


class DirtyBitmap(ABC):
    """The pages that a guest has written since they were last taken."""

    # Pages have to be copied, and the copy hashed and sent: set where contents are compared
    needs_copies = False

    def begin(self, sent: PageHashes) -> None:
        """A migration begins: from here on no write is missed. `sent` are the pages as the destination has them."""
        self.take()

    @abstractmethod
    def take(self, first: int = 0, end: int | None = None) -> np.ndarray:
        """Runs of the dirty pages of [first, end); they count as clean from the moment at which they were read."""

    @abstractmethod
    def peek(self) -> np.ndarray:
        """Runs of the dirty pages; they stay dirty."""

    def close(self) -> None:  # noqa: B027  (most have nothing to close)
        """Nobody asks any more."""


class WpAsyncBitmap(DirtyBitmap):
    """PAGEMAP_SCAN reads and write-protects in one step, so no write falls between."""

    _REGION = np.dtype([("start", "<u8"), ("end", "<u8"), ("categories", "<u8")])
    _SCAN = struct.Struct("12Q")  # struct pm_scan_arg

    def __init__(self, pid: int, address: int, size: int) -> None:
        self._pagemap = open(f"/proc/{pid}/pagemap", "rb", buffering=0)  # noqa: SIM115  (held as long as the guest)
        self._first, self._end = address, address + size
        self._regions = np.zeros(1 << 14, self._REGION)

    def take(self, first: int = 0, end: int | None = None) -> np.ndarray:
        return self._scan(_PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC, first, end)

    def peek(self) -> np.ndarray:
        return self._scan(_PM_SCAN_CHECK_WPASYNC, 0, None)

    def close(self) -> None:
        self._pagemap.close()

    def _scan(self, flags: int, first: int, end: int | None) -> np.ndarray:
        found, at = [], self._first + first * PAGE
        stop = self._end if end is None else self._first + end * PAGE
        while at < stop:
            vector = (self._regions.ctypes.data, len(self._regions))
            masks = (0, 0, _PAGE_IS_WRITTEN, 0, _PAGE_IS_WRITTEN)  # max_pages, inverted, mask, any-of, return
            argument = bytearray(self._SCAN.pack(self._SCAN.size, flags, at, stop, 0, *vector, *masks))
            filled = int(fcntl.ioctl(self._pagemap, _PAGEMAP_SCAN, argument, True))
            walked = int(self._SCAN.unpack(argument)[4])
            if filled:
                found.append(self._regions[:filled].copy())
                # With more than 512 regions the kernel leaves walk_end where its inner buffer was last full, below
                # regions that it goes on to report (Linux 6.18): from there, pages written since would come twice.
                walked = max(walked, int(found[-1]["end"][-1]))
            if walked <= at:
                raise TestbedError("PAGEMAP_SCAN makes no progress: the guest's memory mapping is gone")
            at = walked
        if not found:
            return NO_RUNS
        regions = np.concatenate(found)
        edges = np.stack([regions["start"], regions["end"]], 1) - np.uint64(self._first)
        return (edges // np.uint64(PAGE)).astype(np.uint32)


class SoftDirtyBitmap(DirtyBitmap):
    """pagemap bit 55. Reading and clearing are two steps: the guest is stopped for both.

    The kernel clears all of it or nothing: what was cleared and not asked for yet is kept here.
    """

    def __init__(self, pid: int, address: int, size: int) -> None:
        self._pid, self._address, self._size = pid, address, size
        self._kept = np.zeros(size // PAGE, bool)

    def take(self, first: int = 0, end: int | None = None) -> np.ndarray:
        os.kill(self._pid, signal.SIGSTOP)
        try:
            while (state := Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0]) not in "TtZX":
                os.sched_yield()
            if state in "ZX":
                raise TestbedError(f"the guest process {self._pid} has ended")
            self._kept |= self._written()
            self.clear()
        finally:
            os.kill(self._pid, signal.SIGCONT)
        taken = np.zeros_like(self._kept)
        taken[first:end] = self._kept[first:end]
        self._kept[first:end] = False
        return runs_of(np.flatnonzero(taken))

    def peek(self) -> np.ndarray:
        return runs_of(np.flatnonzero(self._kept | self._written()))

    def _written(self) -> np.ndarray:
        with open(f"/proc/{self._pid}/pagemap", "rb", buffering=0) as pagemap:
            entries = np.frombuffer(
                os.pread(pagemap.fileno(), self._size // PAGE * 8, self._address // PAGE * 8), np.uint64
            )
        return (entries >> np.uint64(_SOFT_DIRTY_BIT) & np.uint64(1)).astype(bool)

    def clear(self) -> None:
        Path(f"/proc/{self._pid}/clear_refs").write_text("4")


class HashBitmap(DirtyBitmap):
    """The pages that differ from what the destination has.

    Comparing with an earlier look at the guest would not do: a page may be changed, sent, and changed back.
    """

    needs_copies = True

    def __init__(self, ram: Ram) -> None:
        self._ram, self._sent = ram, PageHashes(ram)

    def begin(self, sent: PageHashes) -> None:
        self._sent = sent

    def take(self, first: int = 0, end: int | None = None) -> np.ndarray:
        return self._sent.differing(self._ram, first, end)

    def peek(self) -> np.ndarray:
        return self.take()


def open_bitmap(tracking: str, pid: int, address: int, ram: Ram) -> DirtyBitmap:
    """The bitmap of the guest `pid`, whose mapping of `ram` lies at `address` there."""
    if tracking == "wp-async":
        return WpAsyncBitmap(pid, address, ram.size)
    if tracking == "soft-dirty":
        return SoftDirtyBitmap(pid, address, ram.size)
    return HashBitmap(ram)
