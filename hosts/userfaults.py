"""userfaultfd(2): the kernel tells of writes to guest RAM, and of accesses to pages that are not there yet.

A guest opens one for its mapping of RAM and keeps it open. Two things are watched with it:

    writes         WP_ASYNC: the kernel notes written pages by itself (hosts/ram.py reads them). Linux 6.7
    missing pages  post-copy: an access to a page that RAM does not have yet stops the guest, and whoever
                   reads the descriptor hears of it and provides the page (Documentation/admin-guide/mm/userfaultfd.rst)

The guest hands the descriptor to its agent (SCM_RIGHTS), which is another process: what it places goes
into the guest's memory, and wakes it.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator

from topologies.errors import TestbedError

_PAGE = mmap.PAGESIZE
_SYS_USERFAULTFD = 323

# linux/userfaultfd.h
_API = 0xAA
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_UNREGISTER = 0xC018AA3F, 0xC020AA00, 0x8010AA01
_UFFDIO_WAKE, _UFFDIO_COPY, _UFFDIO_ZEROPAGE = 0x8010AA02, 0xC028AA03, 0xC020AA04
_MISSING_SHMEM = 1 << 5
_WP_FEATURES = 1 << 0 | 1 << 12 | 1 << 13 | 1 << 15  # PAGEFAULT_FLAG_WP, WP_HUGETLBFS_SHMEM, WP_UNPOPULATED, WP_ASYNC
_MODE_MISSING, _MODE_WP = 1, 2
_MESSAGE = struct.Struct("=B7xQQQ")  # struct uffd_msg of a fault: event, flags, address
_EVENT_PAGEFAULT = 0x12
_FAULTS_AT_ONCE = 16

_libc = ctypes.CDLL(None, use_errno=True)


class UserFaults:
    """The descriptor `fd` for a guest's mapping of RAM, `size` bytes from `address` on in the guest."""

    def __init__(self, fd: int, address: int, size: int, tracks_writes: bool) -> None:
        self.fd, self._address, self._size, self.tracks_writes = fd, address, size, tracks_writes

    @classmethod
    def open(cls, address: int, size: int) -> "UserFaults":
        """In the guest. `tracks_writes` is set if the kernel can; TestbedError if it has no userfaultfd at all."""
        for features in (_WP_FEATURES | _MISSING_SHMEM, _MISSING_SHMEM):
            fd = _libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
            if fd < 0:
                raise TestbedError(f"userfaultfd(2): {os.strerror(ctypes.get_errno())}")
            try:
                fcntl.ioctl(fd, _UFFDIO_API, bytearray(struct.pack("QQQ", _API, features, 0)), True)
            except OSError:  # this kernel lacks one of the features; a descriptor is asked once
                os.close(fd)
                continue
            return cls(fd, address, size, features != _MISSING_SHMEM)
        raise TestbedError("userfaultfd(2) cannot tell of missing pages of shared memory")

    # ------------------------------------------------------------ the guest's side

    def watch_writes(self) -> None:
        self._register(_MODE_WP)

    def watch_missing(self) -> None:
        """From here on an access to a page that does not exist waits for `place`; writes stay tracked."""
        self._register(_MODE_MISSING | (_MODE_WP if self.tracks_writes else 0))

    def unwatch(self) -> None:
        fcntl.ioctl(self.fd, _UFFDIO_UNREGISTER, bytearray(struct.pack("QQ", self._address, self._size)), True)

    def _register(self, mode: int) -> None:
        fcntl.ioctl(self.fd, _UFFDIO_REGISTER, bytearray(struct.pack("QQQQ", self._address, self._size, mode, 0)), True)

    # ------------------------------------------------------------ the agent's side

    def faults(self) -> Iterator[int]:
        """The pages that the guest waits for now."""
        try:
            messages = os.read(self.fd, _FAULTS_AT_ONCE * _MESSAGE.size)
        except BlockingIOError:
            return
        for event, _flags, address, _ in _MESSAGE.iter_unpack(messages):
            if event != _EVENT_PAGEFAULT:
                raise TestbedError(f"userfaultfd told of event {event:#x}, which was not asked for")
            yield (address - self._address) // _PAGE

    def place(self, first: int, content: memoryview) -> None:
        """Whole writable pages from page `first` on, none of which exists; a guest that waits for them goes on."""
        source = ctypes.addressof(ctypes.c_char.from_buffer(content))
        self._fill(_UFFDIO_COPY, first, len(content), source)

    def place_zero(self, first: int, end: int) -> None:
        self._fill(_UFFDIO_ZEROPAGE, first, (end - first) * _PAGE, None)

    def wake(self, page: int) -> None:
        """Let an access to a page that exists by now be tried again."""
        fcntl.ioctl(self.fd, _UFFDIO_WAKE, bytearray(struct.pack("QQ", self._address + page * _PAGE, _PAGE)), True)

    def _fill(self, request: int, first: int, length: int, source: int | None) -> None:
        """The kernel may stop half-way (EAGAIN) and says how far it came; TestbedError if a page is there already."""
        done = 0
        while done < length:
            at = self._address + first * _PAGE + done
            words = [at, length - done, 0] if source is None else [at, source + done, length - done, 0]
            argument = bytearray(struct.pack(f"{len(words)}Qq", *words, 0))
            try:
                fcntl.ioctl(self.fd, request, argument, True)
                return
            except OSError as error:
                (filled,) = struct.unpack_from("q", argument, 8 * len(words))
                if error.errno != errno.EAGAIN:
                    page = first + done // _PAGE
                    raise TestbedError(f"page {page} of guest RAM cannot be placed: {error.strerror}") from error
                done += max(0, filled)

    def close(self) -> None:
        os.close(self.fd)
