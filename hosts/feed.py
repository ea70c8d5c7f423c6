"""Feeds pages into a migration's connections: zero pages by their number, the others packed where that pays.

With one connection the caller's thread sends. With more, each has a thread of its own, and the pages of a
round are dealt out in turn; a round has ended when each connection's end was acknowledged.
"""

import queue
import threading
import time
from collections.abc import Callable

import numpy as np

from hosts.packing import Choice, packer
from hosts.protocol import PLAIN, Kind
from hosts.ram import PAGE, PageHashes, Ram, count, pages_of, runs_of
from hosts.stream import Stream

# With runs of so many pages on average, not copying is worth the calls that it takes
_LONG_RUN = 16


class Feed:
    """`sent` and `zero` count pages since the feed began. `copies`: what is hashed and what is sent is one copy."""

    def __init__(
        self, ram: Ram, hashes: PageHashes, streams: list[Stream], compress: str = "none", *, copies: bool = False
    ) -> None:
        self.ram, self.hashes, self.copies = ram, hashes, copies
        self.sent = self.zero = 0
        self._packing, _ = packer(compress)
        self._pack = {stream: packer(compress)[1] for stream in streams}  # a zstd compressor serves one thread
        self._choice = Choice()
        self._streams = streams
        self._lanes = [_Lane(stream) for stream in streams] if len(streams) > 1 else []
        self._turn = 0
        self._counting = threading.Lock()

    def begin_round(self, pages: int) -> None:
        self._choice.begin_round(pages)

    @property
    def bytes_sent(self) -> int:
        return sum(stream.bytes_sent for stream in self._streams)

    @property
    def packs(self) -> bool:
        """Does packing pay, as far as is known?"""
        return self._packing is not PLAIN and self._choice.pays

    def send(self, chunk: np.ndarray, number: int) -> None:
        """Send these pages, at most CHUNK_PAGES, as part of a round.

        The guest may write to a page between the look at it and the send: its bitmap knows.
        """
        if not self._lanes:
            self._send(self._streams[0], chunk, number)
            return
        lane = self._lanes[self._turn]
        self._turn = (self._turn + 1) % len(self._lanes)
        lane.put(lambda stream: self._send(stream, chunk, number))

    def flush(self, number: int) -> None:
        """The round ends: until every connection's end of it is acknowledged, so that every page has arrived."""
        if not self._lanes:
            end_round(self._streams[0], number)
        for lane in self._lanes:
            lane.put(lambda stream: end_round(stream, number))
        self._join()

    def drain(self, number: int) -> None:
        """The same without the first connection: what follows on it comes behind its pages anyway."""
        for lane in self._lanes[1:]:
            lane.put(lambda stream: end_round(stream, number))
        self._join()

    def _join(self) -> None:
        for lane in self._lanes:
            lane.join()

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()

    def _send(self, stream: Stream, chunk: np.ndarray, number: int) -> None:
        pages = pages_of(chunk)
        copy = self.ram.words[pages] if self.copies else None  # (indexing by an array copies)
        full = self.ram.nonzero(pages) if copy is None else copy.any(axis=1)
        if not full.all():
            empty = runs_of(pages[~full])
            with self._counting:
                self.zero += count(empty)
            self.hashes.note_zero(empty)
            stream.send_runs(Kind.ZERO, empty, number)
            chunk = runs_of(pages[full])
        if len(chunk):
            content = self.ram.views(chunk) if copy is None else [memoryview(copy[full]).cast("B")]
            self._send_full(stream, chunk, content, number)

    def _send_full(self, stream: Stream, chunk: np.ndarray, content: list[memoryview], number: int) -> None:
        self.hashes.note(chunk, content)
        pages = count(chunk)
        began, packed = time.perf_counter(), self._packing is not PLAIN and self._choice.packed()
        small = self._pack[stream](b"".join(content)) if packed else b""
        size = pages * PAGE
        if packed and len(small) < size:
            size = len(small)
            stream.send_pages(chunk, [memoryview(small)], number, packing=self._packing)
        elif pages >= _LONG_RUN * len(chunk) and not (self.copies or stream.encrypted):
            stream.send_file_pages(chunk, self.ram, number)
        else:
            stream.send_pages(chunk, content, number)
        with self._counting:
            self._choice.sent(packed, pages, size, time.perf_counter() - began)
            self.sent += pages


def end_round(stream: Stream, number: int) -> None:
    """Until the peer has acknowledged everything on this connection."""
    stream.mark(Kind.ROUND_END, number)
    stream.expect(Kind.ROUND_ACK)


class _Lane:
    """A thread that sends on one connection. After an error it takes what it is given and does nothing."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._work: queue.Queue[Callable[[Stream], None] | None] = queue.Queue(maxsize=2)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="lane", daemon=True)
        self._thread.start()

    def put(self, work: Callable[[Stream], None]) -> None:
        self._check()
        self._work.put(work)

    def join(self) -> None:
        """Until all of it is done; raises what went wrong."""
        self._work.join()
        self._check()

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                if self._error is None:
                    work(self._stream)
            except Exception as error:  # whoever feeds is told
                self._error = error
            finally:
                self._work.task_done()
