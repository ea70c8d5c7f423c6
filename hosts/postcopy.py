"""Post-copy: the VM runs at the destination while pages are still at the source.

    Server  (source)         pushes what is missing in the background; what the guest waits for goes first, on a
                             connection of its own. Each page is sent exactly once.
    Filler  (destination)    hears of the guest's accesses to missing pages (userfaultfd), asks for them, and
                             places all pages as they come

Each page is compared with the hash that the source sent along *before* the guest can see it: after that it
would be too late. A page that was never listed and does not exist is zero.
"""

import os
import selectors
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hosts.pace import Pace
from hosts.protocol import (
    HASH_BYTES,
    HASH_OF,
    RUN_BYTES,
    Flag,
    Header,
    Kind,
    RemoteProtocolError,
    encode_hashes,
    parse_hashes,
    parse_page,
    parse_runs,
)
from hosts.ram import PAGE, PageHashes, Ram, chunks, pages_of, runs_of
from hosts.stream import Stream, StreamLost
from hosts.urgency import hurry, relax
from hosts.userfaults import UserFaults
from topologies.errors import TestbedError

# Pushed at once. Fewer mean more turns of the interpreter between the two threads, and slower faults: 360 us with 16
_PUSH_PAGES = 64
# In the host's queue: a millisecond of a 1 Gbit/s cable, twice that as the kernel counts (socket(7))
_PUSH_QUEUE_BYTES = 128 * 1024

_UNDUE = "the source sent a page twice, or one that it had not listed"
_CHANGED = "a page was changed on its way"


class Server:
    """The pages of `missing` (a boolean for each page of RAM) that have not left yet. The guest is stopped."""

    def __init__(self, ram: Ram, missing: np.ndarray, hashes: PageHashes, push: Stream, faults: Stream) -> None:
        self._ram, self._hashes, self._push, self._faults = ram, hashes, push, faults
        self._due, self._lock = missing.copy(), threading.Lock()
        self._error: Exception | None = None
        self.asked = 0
        faults.urgent()
        faults.unlimited()  # a guest that misses nothing asks for nothing
        self._thread = threading.Thread(target=self._answer, name="faults", daemon=True)
        self._thread.start()

    def push(self, report: Callable[[int], None]) -> None:
        """Send all that has not been asked for; StreamLost if the hosts lose each other.

        `report` hears again and again how many pages are left, in the end 0.
        """
        self._push.keep_queue_short(_PUSH_QUEUE_BYTES)
        with self._lock:  # what a fault has claimed is hashed by now
            due = np.flatnonzero(self._due)
        pace = Pace()
        for chunk in chunks(runs_of(due), _PUSH_PAGES):
            if self._error is not None:
                raise self._error
            if pace.due():
                report(int(self._due.sum()))
            self._send(self._claim(pages_of(chunk)))
        report(0)

    def close(self) -> None:
        self._faults.interrupt()
        self._thread.join()

    def _answer(self) -> None:
        hurry()  # a virtual CPU waits
        try:
            while True:
                header, _ = self._faults.receive()
                page = parse_page(header, self._faults.exactly(header.length), self._ram.pages)
                self.asked += 1
                with self._lock:  # claimed and hashed at once: the digest at the end of the push has to know it
                    due, self._due[page] = self._due[page], False
                    value = self._note_page(page) if due else None
                if due:
                    self._send_page(page, value)
        except StreamLost as error:  # also the ordinary end
            self._error = error
        except Exception as error:
            self._error = error
            self._push.interrupt()

    def _claim(self, pages: np.ndarray) -> np.ndarray:
        """Those of the pages that have not left yet, which from now on they have."""
        with self._lock:
            due = pages[self._due[pages]]
            self._due[due] = False
        return due

    def _note_page(self, page: int) -> int | None:
        """Its hash; None if it is zero."""
        if self._ram.words[page].any():
            return self._hashes.note_page(page, self._ram.page(page))
        self._hashes.note_zero(np.array([[page, page + 1]], np.uint32))
        return None

    def _send_page(self, page: int, value: int | None) -> None:
        """The page that a fault waits for, in as few steps as possible."""
        if value is None:
            self._faults.send_runs(Kind.ZERO, np.array([[page, page + 1]], np.uint32))
        else:
            self._faults.send_page(page, HASH_OF.pack(value), self._ram.page(page))

    def _send(self, pages: np.ndarray) -> None:
        full = self._ram.nonzero(pages)
        empty, runs = runs_of(pages[~full]), runs_of(pages[full])
        if len(empty):
            self._hashes.note_zero(empty)
            self._push.send_runs(Kind.ZERO, empty)
        if len(runs):
            content = self._ram.views(runs)
            self._push.send_pages(runs, content, hashes=encode_hashes(self._hashes.note(runs, content)))


class Filler:
    """Fills the pages of `missing` into the guest behind `userfaults`. `asked` counts the guest's faults.

    `doom` is called when a page cannot come any more: whoever waits for the guest waits in vain.
    """

    def __init__(
        self,
        ram: Ram,
        missing: np.ndarray,
        userfaults: UserFaults,
        hashes: PageHashes,
        push: Stream,
        faults: Stream,
        doom: Callable[[], None],
    ) -> None:
        self._doom = doom
        self._ram, self._missing, self._userfaults, self._hashes = ram, missing, userfaults, hashes
        self._push, self._faults = push, faults
        self._come, self._placed = np.zeros(ram.pages, bool), np.zeros(ram.pages, bool)
        self._awaited: set[int] = set()  # pages asked for that have not come
        self._asked_at = 0.0
        self._left, self._whole = int(missing.sum()), threading.Condition()
        self._error: Exception | None = None
        self._stop_read, self._stop_write = os.pipe()
        self.asked = 0
        self._thread = threading.Thread(target=self._provide, name="faults", daemon=True)
        self._thread.start()

    def receive(self) -> str | None:
        """What the source pushes, until RAM is whole; returns the digest that it says RAM must have.

        None if the source was lost when nothing was missing any more; StreamLost if something still is.
        """
        while True:
            try:
                header, body = self._push.receive()
            except StreamLost:
                self.check()
                if self._left:
                    raise
                return None
            if header.kind is Kind.ALL_SENT:
                break
            self._place(header)
        with self._whole:
            come = self._whole.wait_for(lambda: self._left == 0 or self._error is not None, self._push.timeout_s)
        self.check()
        if not come:
            raise RemoteProtocolError(f"the source says that all pages have left, and {self._left} pages have not come")
        return str(body.ram_digest)

    def check(self) -> None:
        """Raise what went wrong beside us."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """No fault is answered any more."""
        os.write(self._stop_write, b".")
        self._thread.join()
        os.close(self._stop_read)
        os.close(self._stop_write)

    # ------------------------------------------------------------ faults, in a thread of their own

    def _provide(self) -> None:
        hurry()  # a virtual CPU waits
        try:
            faults = self._faults.fileno()
            with selectors.DefaultSelector() as selector:
                for fd in (self._userfaults.fd, faults, self._stop_read):
                    selector.register(fd, selectors.EVENT_READ)
                while True:
                    ready = {key.fd for key, _ in selector.select(self._faults.timeout_s)}
                    self._check_patience()
                    if self._stop_read in ready:
                        return
                    if self._userfaults.fd in ready:
                        for page in self._userfaults.faults():
                            self._ask(page)
                    if faults in ready:
                        try:
                            self._hear()
                        except StreamLost:
                            if self._left:
                                raise
                            selector.unregister(faults)  # nothing is missing: the source has done its part and left
        except Exception as error:  # whoever waits for the pages is told
            with self._whole:
                self._error = error
                self._whole.notify_all()
            self._push.interrupt()
            self._doom()
        finally:
            relax()

    def _ask(self, page: int) -> None:
        self.asked += 1
        if self._placed[page]:  # several of the guest's threads may wait for the same page
            self._userfaults.wake(page)
        elif not self._missing[page]:
            self._placed[page] = True
            try:
                self._userfaults.place_zero(page, page + 1)
            except TestbedError:
                if self._left:
                    raise  # with nothing missing, faults are being switched off: the kernel has helped itself
        elif page not in self._awaited:
            self._awaited.add(page)
            self._asked_at = time.monotonic()
            self._faults.send_fetch(page)

    def _check_patience(self) -> None:
        """A page may also come by the push, in its turn; but something has to come."""
        if self._awaited and time.monotonic() - self._asked_at > self._faults.timeout_s:
            self._awaited = {page for page in self._awaited if not self._placed[page]}
            if self._awaited:
                raise StreamLost(f"a page that was asked for has not come within {self._faults.timeout_s:g} s")

    def _hear(self) -> None:
        while True:
            header, _ = self._faults.receive()
            if header.kind not in (Kind.PAGES, Kind.ZERO):
                raise RemoteProtocolError(f"{header.kind.name} on the connection for faults")
            self._place_page(header)
            if not self._faults.pending:
                return

    # ------------------------------------------------------------ pages

    def _place_page(self, header: Header) -> None:
        """The page that a fault waits for, in as few steps as possible."""
        body = memoryview(self._faults.exactly(header.length))
        page = parse_page(header, body[:RUN_BYTES], self._ram.pages)
        self._expect(page)
        if header.kind is Kind.ZERO:
            self._hashes.note_zero(np.array([[page, page + 1]], np.uint32))
            self._userfaults.place_zero(page, page + 1)
        else:
            self._check_flags(header)
            content = body[RUN_BYTES + HASH_BYTES :]
            if self._hashes.note_page(page, content) != HASH_OF.unpack_from(body, RUN_BYTES)[0]:
                raise TestbedError(_CHANGED)
            self._userfaults.place(page, content)
        self._placed[page] = True
        self._awaited.discard(page)
        self._count(1)

    def _place(self, header: Header) -> None:
        body = memoryview(self._push.exactly(header.length))
        runs = parse_runs(body[: header.table_bytes], header.pages, self._ram.pages)
        pages = pages_of(runs)
        self._expect(pages)
        if header.kind is Kind.ZERO:
            self._hashes.note_zero(runs)
            for first, end in runs.tolist():
                self._userfaults.place_zero(first, end)
        else:
            self._place_content(header, runs, body[header.table_bytes :])
        self._placed[pages] = True
        self._count(len(pages))

    def _expect(self, pages: Any) -> None:
        """These pages, one or an array, come now: each once, on whichever connection."""
        with self._whole:
            if not np.all(self._missing[pages]) or np.any(self._come[pages]):
                raise RemoteProtocolError(_UNDUE)
            self._come[pages] = True

    def _count(self, pages: int) -> None:
        with self._whole:
            self._left -= pages
            if not self._left:
                self._whole.notify_all()

    def _check_flags(self, header: Header) -> None:
        if header.flags != Flag.HASHED:
            raise RemoteProtocolError("pages came packed, or without their hashes; after the switchover none may")

    def _place_content(self, header: Header, runs: np.ndarray, body: memoryview) -> None:
        self._check_flags(header)
        hashes, content = parse_hashes(body[: header.hash_bytes]), body[header.hash_bytes :]
        if (self._hashes.note(runs, [content]) != hashes).any():
            raise TestbedError(_CHANGED)
        at = 0
        for first, end in runs.tolist():
            self._userfaults.place(first, content[at : at + (end - first) * PAGE])
            at += (end - first) * PAGE
