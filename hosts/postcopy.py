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

import numpy as np

from hosts.protocol import Flag, Header, Kind, RemoteProtocolError, encode_hashes, parse_hashes
from hosts.ram import PAGE, PageHashes, Ram, chunks, pages_of, runs_of
from hosts.stream import Stream, StreamLost
from hosts.urgency import hurry, relax
from hosts.userfaults import UserFaults
from topologies.errors import TestbedError

# Pushed at once: a page that a fault waits for is behind at most so many, and what the host still holds of them
_PUSH_PAGES = 16
_PUSH_QUEUE_BYTES = 128 * 1024


class Server:
    """The pages of `missing` (a boolean for each page of RAM) that have not left yet. The guest is stopped."""

    def __init__(self, ram: Ram, missing: np.ndarray, hashes: PageHashes, push: Stream, faults: Stream) -> None:
        self._ram, self._hashes, self._push, self._faults = ram, hashes, push, faults
        self._due, self._lock = missing.copy(), threading.Lock()
        self._error: Exception | None = None
        self.asked = 0
        faults.unlimited()  # a guest that misses nothing asks for nothing
        self._thread = threading.Thread(target=self._answer, name="faults", daemon=True)
        self._thread.start()

    def push(self) -> None:
        """Send all that has not been asked for; StreamLost if the hosts lose each other."""
        self._push.keep_queue_short(_PUSH_QUEUE_BYTES)
        for chunk in chunks(runs_of(np.flatnonzero(self._due)), _PUSH_PAGES):
            if self._error is not None:
                raise self._error
            self._send(self._push, self._claim(pages_of(chunk)))

    def close(self) -> None:
        self._faults.interrupt()
        self._thread.join()

    def _answer(self) -> None:
        hurry()  # a virtual CPU waits
        try:
            while True:
                header, _ = self._faults.receive()
                wanted = pages_of(self._faults.receive_runs(header, self._ram.pages))
                self.asked += 1
                self._send(self._faults, self._claim(wanted))
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

    def _send(self, stream: Stream, pages: np.ndarray) -> None:
        if not len(pages):
            return
        full = self._ram.nonzero(pages)
        empty, runs = runs_of(pages[~full]), runs_of(pages[full])
        if len(empty):
            self._hashes.note_zero(empty)
            stream.send_runs(Kind.ZERO, empty)
        if len(runs):
            content = self._ram.views(runs)
            stream.send_pages(runs, content, hashes=encode_hashes(self._hashes.note(runs, content)))


class Filler:
    """Fills the pages of `missing` into the guest behind `userfaults`. `asked` counts the guest's faults."""

    def __init__(
        self, ram: Ram, missing: np.ndarray, userfaults: UserFaults, hashes: PageHashes, push: Stream, faults: Stream
    ) -> None:
        self._ram, self._missing, self._userfaults, self._hashes = ram, missing, userfaults, hashes
        self._push, self._faults = push, faults
        self._placed = np.zeros(ram.pages, bool)
        self._requested: set[int] = set()
        self._left, self._whole = int(missing.sum()), threading.Condition()
        self._error: Exception | None = None
        self._stop_read, self._stop_write = os.pipe()
        self.asked = 0
        self._thread = threading.Thread(target=self._provide, name="faults", daemon=True)
        self._thread.start()

    def receive(self) -> str:
        """What the source pushes, until RAM is whole; returns the digest that it says RAM must have."""
        while True:
            header, body = self._push.receive()
            if header.kind is Kind.ALL_SENT:
                break
            self._place(self._push, header)
        with self._whole:
            self._whole.wait_for(lambda: self._left == 0 or self._error is not None)
        self.check()
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
            with selectors.DefaultSelector() as selector:
                for fd in (self._userfaults.fd, self._faults.fileno(), self._stop_read):
                    selector.register(fd, selectors.EVENT_READ)
                while True:
                    ready = {key.fd for key, _ in selector.select()}
                    if self._stop_read in ready:
                        return
                    if self._userfaults.fd in ready:
                        for page in self._userfaults.faults():
                            self._ask(page)
                    if self._faults.fileno() in ready:
                        self._hear()
        except Exception as error:  # whoever waits for the pages is told
            with self._whole:
                self._error = error
                self._whole.notify_all()
            self._push.interrupt()
        finally:
            relax()

    def _ask(self, page: int) -> None:
        self.asked += 1
        if not self._missing[page]:
            self._userfaults.place_zero(page, page + 1)
        elif self._placed[page]:
            self._userfaults.wake(page)
        elif page not in self._requested:
            self._requested.add(page)
            self._faults.send_runs(Kind.FETCH, np.array([[page, page + 1]], np.uint32))

    def _hear(self) -> None:
        while True:
            header, _ = self._faults.receive()
            self._place(self._faults, header)
            if not self._faults.pending:
                return

    # ------------------------------------------------------------ pages

    def _place(self, stream: Stream, header: Header) -> None:
        runs = stream.receive_runs(header, self._ram.pages)
        pages = pages_of(runs)
        if not self._missing[pages].all() or self._placed[pages].any():
            raise RemoteProtocolError("the source sent a page twice, or one that it had not listed")
        if header.kind is Kind.ZERO:
            self._hashes.note_zero(runs)
            for first, end in runs.tolist():
                self._userfaults.place_zero(first, end)
        else:
            self._place_content(stream, header, runs)
        self._placed[pages] = True
        with self._whole:
            self._left -= len(pages)
            self._whole.notify_all()

    def _place_content(self, stream: Stream, header: Header, runs: np.ndarray) -> None:
        if Flag.HASHED not in header.flags:
            raise RemoteProtocolError("pages came without their hashes; after the switchover each must have one")
        hashes = parse_hashes(stream.exactly(header.hash_bytes))
        content = stream.receive_content(header)
        if (self._hashes.note(runs, [content]) != hashes).any():
            raise TestbedError("a page was changed on its way")
        pages, at = np.frombuffer(content, np.uint8), 0
        for first, end in runs.tolist():
            self._userfaults.place(first, pages[at : at + (end - first) * PAGE])
            at += (end - first) * PAGE
