"""A page of memory that a VM's agent, its vmx and its guest share: until when the guest may run, and under what.

    run_until_ns    CLOCK_MONOTONIC; the guest looks at it in each step of its loop (hosts/ownership.py, rule 2)
    generation      under which this host owns the VM; 0 while it does not
    silent_since_ns since when the datastore has not answered the vmx; 0 if it does
    full            the disk's last write found no room

Written by the vmx, and by the agent when it has claimed the VM and hands it to the vmx.
"""

import math
import mmap
import os
import time
from enum import IntEnum

from hosts.ownership import Lease


class _Word(IntEnum):
    RUN_UNTIL_NS = 0
    GENERATION = 1
    SILENT_SINCE_NS = 2
    FULL = 3


class LeasePage:
    """`fd` is a memfd, and the holder's to pass on; each holder maps it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, mmap.PAGESIZE)
        self._words = memoryview(self._map).cast("q")
        self._is_open = True

    @classmethod
    def create(cls, name: str) -> "LeasePage":
        fd = os.memfd_create(f"{name}-lease", os.MFD_CLOEXEC)
        os.ftruncate(fd, mmap.PAGESIZE)
        return cls(fd)

    def grant(self, lease: Lease) -> None:
        """The guest may run under this lease."""
        self._words[_Word.RUN_UNTIL_NS] = max(0, round(lease.until_s * 1e9)) if lease.sent_s > -math.inf else 0
        self._words[_Word.GENERATION] = lease.generation

    def revoke(self) -> None:
        self._words[_Word.RUN_UNTIL_NS] = 0

    def _get(self, word: _Word) -> int:
        """Also of one that was closed a moment ago, by another thread."""
        return self._words[word] if self._is_open else 0

    @property
    def run_until_ns(self) -> int:
        return self._get(_Word.RUN_UNTIL_NS)

    @property
    def lasts(self) -> bool:
        """Whether the guest may run now."""
        return time.monotonic_ns() <= self.run_until_ns

    @property
    def generation(self) -> int:
        return self._get(_Word.GENERATION)

    @generation.setter
    def generation(self, generation: int) -> None:
        self._words[_Word.GENERATION] = generation

    @property
    def silent_since_ns(self) -> int:
        return self._get(_Word.SILENT_SINCE_NS)

    @silent_since_ns.setter
    def silent_since_ns(self, since: int) -> None:
        self._words[_Word.SILENT_SINCE_NS] = since

    @property
    def full(self) -> bool:
        return bool(self._get(_Word.FULL))

    @full.setter
    def full(self, full: bool) -> None:
        self._words[_Word.FULL] = full

    def close(self) -> None:
        self._is_open = False
        self._words.release()
        self._map.close()
        os.close(self.fd)
