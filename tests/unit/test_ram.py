"""Guest RAM: sets of pages as runs, what is there at all, hashes, and the ways to find what was written."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pairs import page_set

from hosts.ram import (
    NO_RUNS,
    PAGE,
    HashBitmap,
    PageHashes,
    Ram,
    SoftDirtyBitmap,
    WpAsyncBitmap,
    arm,
    chunks,
    count,
    mask_of,
    open_bitmap,
    pages_of,
    runs_from,
    runs_of,
)
from topologies.errors import TestbedError

ROOT = Path(__file__).parents[2]
PAGES = 64
page_numbers = st.integers(0, PAGES - 1)
page_sets = st.sets(page_numbers) | st.builds(lambda first, end: set(range(first, end)), page_numbers, page_numbers)


def sorted_array(pages: set[int]) -> np.ndarray:
    return np.array(sorted(pages), np.int64)


@pytest.fixture
def ram() -> Iterator[Ram]:
    ram = Ram.create("test", PAGES * PAGE)
    yield ram
    ram.close()


def existing_bytes(ram: Ram) -> int:
    """The memory that the kernel has set aside for it."""
    return os.fstat(ram.fd).st_blocks * 512


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("pages", "runs"),
    [
        (set(), []),
        ({0}, [[0, 1]]),
        ({5, 6, 7}, [[5, 8]]),
        ({0, 2, 4}, [[0, 1], [2, 3], [4, 5]]),
        ({0, 1, 3, 4, 9}, [[0, 2], [3, 5], [9, 10]]),
        ({2**32 - 2}, [[2**32 - 2, 2**32 - 1]]),
    ],
)
def test_pages_side_by_side_make_one_run(pages: set[int], runs: list[list[int]]) -> None:
    assert runs_of(sorted_array(pages)).tolist() == runs


@given(st.sets(st.integers(0, 300)) | st.builds(lambda a, b: set(range(a, a + b)), page_numbers, page_numbers))
def test_runs_hold_the_same_pages_as_a_set(pages: set[int]) -> None:
    runs = runs_of(sorted_array(pages))
    assert runs.dtype == np.uint32
    assert runs.shape == (len(runs), 2)
    assert page_set(runs) == pages
    assert count(runs) == len(pages)
    assert pages_of(runs).tolist() == sorted(pages)
    ends, next_firsts = runs[:-1, 1], runs[1:, 0]
    assert (ends < next_firsts).all(), "ascending, and none touches the next"


def test_no_runs_are_no_pages() -> None:
    assert count(NO_RUNS) == 0
    assert pages_of(NO_RUNS).tolist() == []


def test_runs_of_all_pages_there_can_be_are_counted_without_overflow() -> None:
    assert count(np.array([[0, 2**31], [2**31, 2**32 - 1]], np.uint32)) == 2**32 - 1


def runs_in(pages: set[int], cuts: set[int]) -> np.ndarray:
    """The runs of these pages, some of them cut in two that touch: as the owed ones of a round may be."""
    runs: list[list[int]] = []
    for page in sorted(pages):
        if runs and runs[-1][1] == page and page not in cuts:
            runs[-1][1] = page + 1
        else:
            runs.append([page, page + 1])
    return np.array(runs, np.uint32).reshape(-1, 2)


@given(page_sets, page_sets)
def test_a_mask_has_a_boolean_for_each_page(pages: set[int], cuts: set[int]) -> None:
    mask = mask_of(runs_in(pages, cuts), PAGES)
    assert mask.dtype == bool
    assert mask.tolist() == [page in pages for page in range(PAGES)]
    assert set(np.flatnonzero(mask).tolist()) == pages
    assert mask.view(np.uint8).max(initial=0) <= 1, "real booleans, whatever is done with them"


@given(page_sets, page_sets, st.integers(0, PAGES))
def test_the_runs_from_a_page_on_hold_what_lies_there_and_change_nothing(
    pages: set[int], cuts: set[int], first: int
) -> None:
    runs = runs_in(pages, cuts)
    before = runs.copy()
    kept = runs_from(runs, first)
    assert page_set(kept) == {page for page in pages if page >= first}
    assert (kept[:, 0] < kept[:, 1]).all()
    assert np.array_equal(runs, before)


@given(page_sets, page_sets, st.integers(1, 70))
@example(set(range(PAGES)), set(), 16)
@example(set(), set(), 16)
def test_chunks_are_the_runs_again_in_pieces_that_are_full_but_for_the_last(
    pages: set[int], cuts: set[int], size: int
) -> None:
    runs = runs_in(pages, cuts)
    before = runs.copy()
    pieces = list(chunks(runs, size))
    assert [page for piece in pieces for page in pages_of(piece)] == sorted(pages)
    assert [count(piece) for piece in pieces[:-1]] == [size] * (len(pieces) - 1)
    assert all(0 < count(piece) <= size and (piece[:, 0] < piece[:, 1]).all() for piece in pieces)
    assert np.array_equal(runs, before)


# ---------------------------------------------------------------- memory


@given(page_sets, page_sets)
def test_only_what_exists_is_populated_and_asking_makes_nothing_exist(written: set[int], zeroed: set[int]) -> None:
    ram = Ram.create("test", PAGES * PAGE)
    ram.words[sorted_array(written), 3] = 7
    ram.words[sorted_array(zeroed), 3] = 0  # a page that was written exists, though it is zero
    before = existing_bytes(ram)
    assert before == len(written | zeroed) * PAGE
    assert page_set(ram.populated()) == written | zeroed
    assert existing_bytes(ram) == before
    ram.close()


@given(page_sets, st.integers(0, PAGES), st.integers(0, PAGES))
def test_of_a_part_of_memory_only_what_exists_there_is_populated(written: set[int], one: int, other: int) -> None:
    first, end = sorted((one, other))
    ram = Ram.create("test", PAGES * PAGE)
    ram.words[sorted_array(written), 0] = 1
    assert page_set(ram.populated(first, end)) == {page for page in written if first <= page < end}
    assert page_set(ram.populated(first)) == {page for page in written if first <= page}
    ram.close()


@given(page_sets, page_sets, page_sets)
def test_memory_is_made_and_unmade_page_by_page(written: set[int], made: set[int], unmade: set[int]) -> None:
    ram = Ram.create("test", PAGES * PAGE)
    ram.words[sorted_array(written), 0] = 1
    ram.populate(runs_of(sorted_array(made)))
    assert page_set(ram.populated()) == written | made
    assert ram.words[sorted_array(written), 0].all(), "what was there stays"
    ram.punch(runs_of(sorted_array(unmade)))
    assert page_set(ram.populated()) == (written | made) - unmade
    ram.close()


def test_another_mapping_of_the_same_memory_sees_the_same(ram: Ram) -> None:
    other = Ram(os.dup(ram.fd))
    ram.bytes[5 * PAGE] = 9
    assert other.bytes[5 * PAGE] == 9
    assert other.buffer[5 * PAGE] == 9
    assert (other.size, other.pages) == (ram.size, PAGES)
    assert other.address != ram.address
    other.close()
    assert ram.bytes[5 * PAGE] == 9


def test_memory_given_back_leaves_no_descriptor() -> None:
    ram = Ram.create("test", PAGE)
    ram.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ram.fd)


@given(st.dictionaries(page_numbers, st.integers(0, 511)), page_sets)
@example({0: 0, 1: 511}, {0, 1, 2})
def test_a_page_with_anything_in_any_of_its_words_is_not_zero(words: dict[int, int], asked: set[int]) -> None:
    ram = Ram.create("test", PAGES * PAGE)
    for page, word in words.items():
        ram.words[page, word] = 1 << 63
    mask = ram.nonzero(sorted_array(asked))
    assert dict(zip(sorted(asked), mask.tolist(), strict=True)) == {page: page in words for page in asked}
    ram.close()


# ---------------------------------------------------------------- hashes

contents = st.dictionaries(page_numbers, st.integers(1, 3), max_size=8)


def note(hashes: PageHashes, ram: Ram, runs: np.ndarray) -> None:
    hashes.note(runs, ram.views(runs))


def hashed(content: dict[int, int], order: list[int]) -> str:
    """The digest of RAM with this content, its pages noted in this order."""
    ram = Ram.create("test", PAGES * PAGE)
    hashes = PageHashes(ram)
    for page, value in content.items():
        ram.words[page, value] = value
    for page in order:
        note(hashes, ram, runs_of(np.array([page])))
    digest = hashes.digest()
    ram.close()
    return digest


@given(contents, contents, st.randoms(use_true_random=False))
def test_two_digests_are_equal_if_and_only_if_the_contents_are(one: dict, other: dict, random: Random) -> None:
    order = list(other)
    random.shuffle(order)
    assert (hashed(one, list(one)) == hashed(other, order)) == (one == other)
    assert hashed(one, list(one)) == hashed(one, list(range(PAGES))), "a page never noted counts as zero"


def test_a_page_counts_as_it_was_when_it_was_noted(ram: Ram) -> None:
    hashes, page = PageHashes(ram), np.array([[3, 4]], np.uint32)
    empty = hashes.digest()
    ram.words[3, 0] = 1
    assert hashes.digest() == empty
    note(hashes, ram, page)
    noted = hashes.digest()
    assert noted != empty
    ram.words[3, 0] = 0
    assert hashes.digest() == noted
    note(hashes, ram, page)
    assert hashes.digest() == empty


@given(page_sets, page_sets)
def test_a_page_noted_as_zero_is_zero_without_a_look(written: set[int], zeroed: set[int]) -> None:
    ram = Ram.create("test", PAGES * PAGE)
    hashes, remaining = PageHashes(ram), PageHashes(ram)
    ram.words[sorted_array(written), 5] = 5
    note(hashes, ram, runs_of(sorted_array(written)))
    hashes.note_zero(runs_of(sorted_array(zeroed)))
    note(remaining, ram, runs_of(sorted_array(written - zeroed)))
    assert hashes.digest() == remaining.digest()
    ram.close()


@given(page_sets, st.integers(0, 2**64 - 1))
def test_noting_tells_each_pages_hash_in_order(pages: set[int], value: int) -> None:
    ram = Ram.create("test", PAGES * PAGE)
    ram.words[:, 0] = np.arange(PAGES, dtype=np.uint64) ^ np.uint64(value)
    runs = runs_of(sorted_array(pages))
    together, alone = PageHashes(ram), PageHashes(ram)
    noted = together.note(runs, ram.views(runs))
    assert noted.dtype == np.uint64
    assert noted.tolist() == [alone.note_page(page, ram.page(page)) for page in sorted(pages)]
    assert noted.tolist() == [xxhash.xxh3_64_intdigest(bytes(ram.page(page))) for page in sorted(pages)]
    in_one_piece = PageHashes(ram)
    content = memoryview(b"".join(ram.page(page) for page in sorted(pages)))
    assert in_one_piece.note(runs, [content]).tolist() == noted.tolist()
    assert together.digest() == alone.digest() == in_one_piece.digest()
    ram.close()


@given(page_sets, st.integers(0, PAGES), st.integers(0, PAGES))
def test_pages_that_are_not_what_was_noted_are_found(written: set[int], one: int, other: int) -> None:
    first, end = sorted((one, other))
    ram = Ram.create("test", PAGES * PAGE)
    noted = PageHashes(ram)
    ram.words[sorted_array(written), 1] = 1
    assert page_set(noted.differing(ram)) == written
    assert page_set(noted.differing(ram, first, end)) == {page for page in written if first <= page < end}
    note(noted, ram, ram.populated())
    assert page_set(noted.differing(ram)) == set()
    ram.close()


def test_pages_exchanged_give_another_digest() -> None:
    assert hashed({1: 1, 2: 2}, [1, 2]) != hashed({1: 2, 2: 1}, [1, 2])


# ---------------------------------------------------------------- the bitmap of last resort


@given(st.lists(page_sets, min_size=1, max_size=5))
def test_comparing_finds_exactly_the_pages_that_differ_from_what_was_sent(rounds: list[set[int]]) -> None:
    ram = Ram.create("test", PAGES * PAGE)
    bitmap, sent = open_bitmap("hash", os.getpid(), ram.address, ram), PageHashes(ram)
    assert isinstance(bitmap, HashBitmap) and bitmap.needs_copies
    bitmap.begin(sent)
    for number, written in enumerate(rounds, start=1):
        ram.words[sorted_array(written), number] = number
        assert page_set(bitmap.peek()) == written
        taken = bitmap.take()
        assert page_set(taken) == written
        note(sent, ram, taken)
        assert count(bitmap.take()) == 0
    ram.close()


def test_a_page_that_was_changed_sent_and_changed_back_still_differs(ram: Ram) -> None:
    bitmap, sent = HashBitmap(ram), PageHashes(ram)
    bitmap.begin(sent)
    ram.words[3, 0] = 1  # the guest takes a lock
    note(sent, ram, np.array([[3, 4]], np.uint32))  # the page is sent like that
    ram.words[3, 0] = 0  # and gives it back
    assert page_set(bitmap.take()) == {3}


@given(page_sets, page_sets, st.integers(0, PAGES), st.integers(0, PAGES))
def test_comparing_a_part_finds_what_differs_there_and_the_rest_stays_due(
    first_written: set[int], written: set[int], one: int, other: int
) -> None:
    first, end = sorted((one, other))
    ram = Ram.create("test", PAGES * PAGE)
    bitmap, sent = HashBitmap(ram), PageHashes(ram)
    ram.words[sorted_array(first_written), 0] = 1
    note(sent, ram, ram.populated())
    bitmap.begin(sent)
    ram.words[sorted_array(written), 1] = 2
    inside = {page for page in written if first <= page < end}
    taken = bitmap.take(first, end)
    assert page_set(taken) == inside
    note(sent, ram, taken)
    assert page_set(bitmap.peek()) == written - inside
    ram.close()


# ---------------------------------------------------------------- the bitmap that the kernel clears all at once


class Page55(SoftDirtyBitmap):
    """A kernel's part, by a set: `write` as the guest would, `_written` and `clear` as /proc would."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid, 0, PAGES * PAGE)
        self.set: set[int] = set()

    def _written(self) -> np.ndarray:
        return mask_of(runs_of(sorted_array(self.set)), PAGES)

    def clear(self) -> None:
        state = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state in "Tt", "the guest is stopped while it is read and cleared"
        self.set = set()


@pytest.fixture(scope="module")
def sleeper() -> Iterator[int]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process.pid
        process.kill()


ranges = st.tuples(st.integers(0, PAGES), st.integers(0, PAGES)).map(lambda edges: (min(edges), max(edges)))


@settings(max_examples=30)
@given(st.lists(st.tuples(page_sets, ranges), max_size=4))
def test_what_the_kernel_has_cleared_and_nobody_has_asked_for_yet_is_kept(
    sleeper: int, steps: list[tuple[set[int], tuple[int, int]]]
) -> None:
    bitmap, dirty = Page55(sleeper), set[int]()
    for written, (first, end) in steps:
        bitmap.set |= written
        dirty |= written
        assert page_set(bitmap.peek()) == dirty
        inside = {page for page in dirty if first <= page < end}
        assert page_set(bitmap.take(first, end)) == inside
        dirty -= inside
        assert page_set(bitmap.peek()) == dirty
    assert page_set(bitmap.take()) == dirty
    assert count(bitmap.take()) == 0


def test_a_guest_that_has_ended_is_not_taken_for_clean() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays, a zombie
        with pytest.raises(TestbedError, match=f"the guest process {process.pid} has ended"):
            Page55(process.pid).take()


# ---------------------------------------------------------------- the kernel's bitmap


class Guest:
    """A process that maps RAM and arms the tracking of its writes, then obeys: a line in, a line out.

    `write FIRST END STEP` writes these pages. `run` writes at random to the first 32 MiB until the next line.
    """

    PROGRAM = """
import select, sys
import numpy as np
from hosts.ram import Ram, arm

ram = Ram(int(sys.argv[1]))
tracking, userfaults = arm(ram)
print(tracking, ram.address, flush=True)
random = np.random.Generator(np.random.SFC64(1))
for line in sys.stdin:
    order, *numbers = line.split()
    if order == "write":
        first, end, step = map(int, numbers)
        ram.words[first:end:step, 1] += np.uint64(1)
    while order == "run" and not select.select([sys.stdin], [], [], 0)[0]:
        pages = random.integers(0, 8192, 200)
        ram.words[pages, random.integers(0, 512, 200)] = random.integers(0, 2**63, 200, np.uint64)
    print("done", flush=True)
"""

    def __init__(self, ram: Ram) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, str(ram.fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(ram.fd,),
            cwd=ROOT,
        )
        self.tracking, address = self._answer().split()
        self.pid, self.address = self._process.pid, int(address)

    def tell(self, *order: object) -> None:
        assert self._process.stdin is not None
        print(*order, file=self._process.stdin, flush=True)

    def write(self, first: int, end: int, step: int = 1) -> None:
        self.tell("write", first, end, step)
        assert self._answer() == "done"

    def stop(self) -> None:
        """The end of `run`."""
        self.tell("pause")
        assert [self._answer(), self._answer()] == ["done", "done"]

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


LARGE = 40_000  # pages: with every second one written, more regions than one scan returns


@pytest.fixture(scope="module")
def guest_and_ram() -> Iterator[tuple[Guest, Ram]]:
    ram = Ram.create("guest", LARGE * PAGE)
    guest = Guest(ram)
    try:
        if guest.tracking != "wp-async":
            pytest.skip(f"userfaultfd WP_ASYNC needs root and Linux 6.7; here tracking is by {guest.tracking}")
        yield guest, ram
    finally:
        guest.end()
        ram.close()


@pytest.fixture
def tracked(guest_and_ram: tuple[Guest, Ram]) -> tuple[Guest, Ram, WpAsyncBitmap]:
    guest, ram = guest_and_ram
    bitmap = open_bitmap(guest.tracking, guest.pid, guest.address, ram)
    assert isinstance(bitmap, WpAsyncBitmap)
    bitmap.take()
    return guest, ram, bitmap


def test_arming_tells_a_way_that_works_here(ram: Ram) -> None:
    tracking, _userfaults = arm(ram)
    bitmap = open_bitmap(tracking, os.getpid(), ram.address, ram)
    bitmap.take()
    ram.words[[3, 9], 0] = 1
    assert {3, 9} <= page_set(bitmap.peek())
    if not isinstance(bitmap, WpAsyncBitmap):
        return
    assert page_set(bitmap.take()) == {3, 9}
    assert ram.words[9, 0] == 1
    assert count(bitmap.take()) == 0, "reading is no writing"


@pytest.mark.parametrize(
    ("first", "end", "step"),
    [(0, 1, 1), (LARGE - 1, LARGE, 1), (7, 1000, 3), (0, LARGE, 1), (0, LARGE, 2), (1, LARGE, 2)],
)
def test_the_kernel_finds_exactly_the_pages_that_the_guest_wrote(
    tracked: tuple[Guest, Ram, WpAsyncBitmap], first: int, end: int, step: int
) -> None:
    guest, _, bitmap = tracked
    guest.write(first, end, step)
    expected = np.arange(first, end, step)
    assert np.array_equal(pages_of(bitmap.peek()), expected)
    assert np.array_equal(pages_of(bitmap.take()), expected), "a look left them dirty"
    assert count(bitmap.take()) == 0
    guest.write(first, first + 1)
    assert bitmap.take().tolist() == [[first, first + 1]], "written again, dirty again"


@pytest.mark.parametrize(
    ("first", "end"), [(0, 100), (99, 101), (100, LARGE), (LARGE - 1, LARGE), (500, 500), (0, LARGE)]
)
@pytest.mark.parametrize("step", [1, 2, 7])
def test_of_a_part_only_the_written_pages_become_clean_and_all_others_stay_dirty(
    tracked: tuple[Guest, Ram, WpAsyncBitmap], first: int, end: int, step: int
) -> None:
    guest, _, bitmap = tracked
    guest.write(1, LARGE, step)
    written = np.arange(1, LARGE, step)
    inside = (written >= first) & (written < end)
    assert np.array_equal(pages_of(bitmap.take(first, end)), written[inside])
    assert np.array_equal(pages_of(bitmap.peek()), written[~inside])
    assert np.array_equal(pages_of(bitmap.take()), written[~inside])
    assert count(bitmap.peek()) == 0


def test_a_guest_that_goes_on_writing_loses_no_page(tracked: tuple[Guest, Ram, WpAsyncBitmap]) -> None:
    guest, ram, bitmap = tracked
    copy = ram.words.copy()
    scans = 0
    guest.tell("run")
    until = time.monotonic() + 1.5
    while time.monotonic() < until or scans < 10:
        runs = bitmap.take()
        pages = pages_of(runs)
        assert (np.diff(pages) > 0).all(), "each page once, in order"
        copy[pages] = ram.words[pages]
        scans += 1
    guest.stop()
    pages = pages_of(bitmap.take())
    copy[pages] = ram.words[pages]
    assert np.flatnonzero((copy != ram.words).any(axis=1)).tolist() == []
