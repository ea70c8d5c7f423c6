"""NFS version 3 over TCP in user space: libnfs (a C library) through ctypes, without a kernel mount.

    with Mount("10.0.99.3", "/datastore1") as mount:
        mount.write_new("/vm1/vm1.vmx", b"...")
        with mount.open("/vm1/vm1-flat.vmdk") as disk:
            disk.write(0, block)

A server that does not answer makes a call fail with NasSilent after `timeout_s` at the latest, over and over, until it
answers again. Whether a call that failed so has had its effect, or is yet to have it, is not known; none is ever sent
twice. Every other error of the server is the OSError that its NFS3ERR means (RFC 1813, 2.6).

After a silence the next call connects anew, so it waits neither for TCP's back-off nor behind requests that were given
up: those die with their connection. Open files go on: to NFS version 3 they are names of files, not of connections.
(The library can connect anew by itself; it then asks a port that nobody listens on some ten thousand times a second,
and 5.0.2 says so on stdout.)

Calls of one Mount wait for each other; threads that must not wait have a Mount each.
"""

import ctypes
import errno
import functools
import math
import os
import re
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from hosts.store import Attributes, StoreSilent
from topologies.errors import TestbedError

# libnfs 4.0 (Debian 12) and 5.0 (Debian 13, Ubuntu 24.04). The next release, 6.0, is .16: there pread's and pwrite's
# arguments have another order (LIBNFS_API_V2), which .15, never released, may have already.
_SONAMES = ("libnfs.so.14", "libnfs.so.13")
_CHANGED = ("libnfs.so.15", "libnfs.so.16", "libnfs.so.17")
_NO_RECONNECTING = 0
_TRY_AGAIN_S = 0.05
_CHUNK_BYTES = 1 << 20  # the most that a server takes in one call, as ganesha's default is


class NfsMissing(TestbedError):
    """This machine's libnfs is missing, or one that is not known to have the functions as they are called here."""


class NasSilent(StoreSilent):
    """The server has not answered in time."""


class _Stat(ctypes.Structure):
    """struct nfs_stat_64 of libnfs.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("dev", "ino", "mode", "nlink", "uid", "gid", "rdev", "size", "blksize", "blocks"),
            *("atime", "mtime", "ctime", "atime_nsec", "mtime_nsec", "ctime_nsec", "used"),
        )
    ]

    uid: int
    size: int
    used: int
    mtime: int
    mtime_nsec: int


class _Entry(ctypes.Structure):
    """The beginning of struct nfsdirent."""


_Entry._fields_ = [("next", ctypes.POINTER(_Entry)), ("name", ctypes.c_char_p)]

_pointer, _int, _u64, _text = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_char_p
# Called with a call's status (0, a count or minus an errno), context and result, which lasts as long as this call
_Answered = ctypes.CFUNCTYPE(None, _int, _pointer, _pointer, _pointer)
_PROTOTYPES: dict[str, tuple[Any, Sequence[Any]]] = {
    "nfs_init_context": (_pointer, ()),
    "nfs_destroy_context": (None, (_pointer,)),
    "nfs_get_error": (_text, (_pointer,)),
    "nfs_set_version": (_int, (_pointer, _int)),
    "nfs_set_uid": (None, (_pointer, _int)),
    "nfs_set_gid": (None, (_pointer, _int)),
    "nfs_set_autoreconnect": (None, (_pointer, _int)),
    "nfs_set_dircache": (None, (_pointer, _int)),
    "nfs_get_fd": (_int, (_pointer,)),
    "nfs_which_events": (_int, (_pointer,)),
    "nfs_service": (_int, (_pointer, _int)),
    "nfs_readdir": (ctypes.POINTER(_Entry), (_pointer, _pointer)),
    "nfs_closedir": (None, (_pointer, _pointer)),
} | {
    f"nfs_{name}_async": (_int, (_pointer, *arguments, _Answered, _pointer))
    for name, arguments in {
        "mount": (_text, _text),
        "open2": (_text, _int, _int),
        "close": (_pointer,),
        "pread": (_pointer, _u64, _u64),
        "pwrite": (_pointer, _u64, _u64, _pointer),
        "ftruncate": (_pointer, _u64),
        "fstat64": (_pointer,),
        "stat64": (_text,),
        "opendir": (_text,),
        "mkdir": (_text,),
        "rmdir": (_text,),
        "link": (_text, _text),
        "rename": (_text, _text),
        "unlink": (_text,),
        "chown": (_text, _int, _int),
    }.items()
}


_load = ctypes.CDLL


@functools.cache
def library() -> Any:
    """libnfs; NfsMissing without one that has the functions as they are called here."""
    known = " or ".join(_SONAMES)
    for soname in (*_SONAMES, *_CHANGED):
        try:
            library = _load(soname)
        except OSError:
            continue
        if soname in _CHANGED:
            raise NfsMissing(f"{soname} is newer than what is known here, {known}; use --datastore local")
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        return library
    raise NfsMissing(f"there is no {known} here; apt-get install libnfs-utils brings it, or use --datastore local")


# Makes of a call's status (0 or a count) and the address of its result what the caller gets
Take = Callable[[int, int], Any]


def _status(status: int, _result: int) -> int:
    return status


def _content(count: int, result: int) -> bytes:
    return ctypes.string_at(result, count)


def _attributes(_status: int, result: int) -> Attributes:
    found = _Stat.from_buffer_copy(ctypes.string_at(result, ctypes.sizeof(_Stat)))
    return Attributes(found.size, found.used, found.uid, found.mtime + found.mtime_nsec / 1e9)


class Mount:
    """An export of an NFS server, as user `uid` and a group of the same number."""

    def __init__(self, ip: str, export: str, uid: int = 0, timeout_s: float = 2.0) -> None:
        """It is not asked for before the first call: NasSilent, if there is no such server or export."""
        self.where, self.uid = f"{ip}:{export}", uid
        self._ip, self._export, self._timeout_s = ip, export, timeout_s
        self._nfs = library()
        self._one_at_a_time = threading.Lock()
        self._closed = False
        self._context: int | None = None  # None: not connected

    # ------------------------------------------------------------ files

    def open(self, path: str, flags: int = os.O_RDWR, mode: int = 0o640) -> "File":
        """As open(2); O_CREAT makes a file only if O_EXCL is given too (libnfs takes it so)."""
        return File(self, path, self._call("open2", path.encode(), flags, mode, take=lambda _, handle: handle))

    def read(self, path: str, limit: int) -> bytes:
        """The first `limit` bytes of a file."""
        with self.open(path, os.O_RDONLY) as file:
            return file.read(0, limit)

    def write_new(self, path: str, content: bytes, mode: int = 0o640) -> None:
        """A file that does not exist yet, on stable storage; FileExistsError."""
        # not a WRITE and a COMMIT: of a server that restarts between them nobody would learn that it has lost the WRITE
        with self.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_SYNC, mode) as file:
            file.write(0, content)

    def attributes(self, path: str) -> Attributes:
        found: Attributes = self._call("stat64", path.encode(), take=_attributes)
        return found

    def names(self, path: str) -> list[str]:
        """What a folder holds."""

        def take(_: int, folder: int) -> list[str]:
            names = []
            while entry := self._nfs.nfs_readdir(self._context, folder):
                names.append(os.fsdecode(entry.contents.name))
            self._nfs.nfs_closedir(self._context, folder)
            return names

        names = self._call("opendir", path.encode(), take=take)
        return [name for name in names if name not in (".", "..")]

    def link(self, path: str, new: str) -> None:
        self._call("link", path.encode(), new.encode())

    def rename(self, path: str, new: str) -> None:
        self._call("rename", path.encode(), new.encode())

    def unlink(self, path: str) -> None:
        self._call("unlink", path.encode())

    def mkdir(self, path: str) -> None:
        self._call("mkdir", path.encode())

    def rmdir(self, path: str) -> None:
        self._call("rmdir", path.encode())

    def chown(self, path: str, uid: int) -> None:
        """To a user and the group of the same number."""
        self._call("chown", path.encode(), uid, uid)

    def act_as(self, uid: int) -> None:
        """Be another user from here on, and a group of the same number: files that are open stay so."""
        with self._one_at_a_time:
            self.uid = uid
            if self._context:
                self._nfs.nfs_set_uid(self._context, uid)
                self._nfs.nfs_set_gid(self._context, uid)

    # ------------------------------------------------------------ its end

    def close(self) -> None:
        with self._one_at_a_time:
            self._closed = True
            self._disconnect()

    def __enter__(self) -> "Mount":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ calls

    def _call(self, name: str, *arguments: Any, take: Take = _status) -> Any:
        with self._one_at_a_time:
            if self._closed:
                raise OSError(errno.EBADF, f"{self.where} is not mounted any more")
            deadline = time.monotonic() + self._timeout_s
            if self._context and self._poll(0, select.POLLIN):  # nothing is due: the server has closed an idle one
                self._disconnect()
            if not self._context:
                self._connect(deadline)
            # NFS3ERR_JUKEBOX: not done yet, ask again (RFC 1813); ganesha 6 says it of a folder in which much happens
            return self._persist(deadline, BlockingIOError, lambda: self._exchange(deadline, name, arguments, take))

    def _connect(self, deadline: float) -> None:
        def connect() -> None:
            self._context = self._nfs.nfs_init_context()
            self._nfs.nfs_set_version(self._context, 3)
            self._nfs.nfs_set_uid(self._context, self.uid)
            self._nfs.nfs_set_gid(self._context, self.uid)
            self._nfs.nfs_set_dircache(self._context, 0)  # what another host has just made must be seen
            self._nfs.nfs_set_autoreconnect(self._context, _NO_RECONNECTING)
            try:
                self._exchange(deadline, "mount", (self._ip.encode(), self._export.encode()), _status)
            except OSError:
                self._disconnect()
                raise

        self._persist(deadline, OSError, connect)  # a server that comes back may not be there at once

    def _persist(self, deadline: float, not_yet: type[OSError], attempt: Callable[[], Any]) -> Any:
        """What the attempt returns that is the first to raise no such error; NasSilent if none does."""
        while True:
            try:
                return attempt()
            except not_yet as error:
                if time.monotonic() + _TRY_AGAIN_S > deadline:
                    raise NasSilent(errno.ETIMEDOUT, error.strerror) from error
            time.sleep(_TRY_AGAIN_S)

    def _disconnect(self) -> None:
        if self._context:
            self._nfs.nfs_destroy_context(self._context)
            self._context = None

    def _exchange(self, deadline: float, name: str, arguments: Sequence[Any], take: Take) -> Any:
        """Send one request, once, and return what `take` makes of its answer."""
        answers: list[tuple[int, Any]] = []

        @_Answered
        def answered(status: int, _context: int, result: int, _private: int) -> None:
            answers.append((status, take(status, result) if status >= 0 else None))

        try:
            alive = getattr(self._nfs, f"nfs_{name}_async")(self._context, *arguments, answered, None) >= 0
            while not answers:
                left_s = deadline - time.monotonic()
                if not alive or left_s <= 0:
                    raise self._silence()
                ready = self._poll(left_s, self._nfs.nfs_which_events(self._context))
                alive = self._nfs.nfs_service(self._context, ready) >= 0
            status, result = answers[0]
            if status < 0:
                raise self._error(-status)
        except BaseException as error:
            if not answers or isinstance(error, NasSilent):
                self._disconnect()  # calls `answered`, which must still be there, for what is under way
            raise
        return result

    def _poll(self, for_s: float, events: int) -> int:
        poll = select.poll()
        poll.register(self._nfs.nfs_get_fd(self._context), events)
        return sum(ready for _, ready in poll.poll(math.ceil(for_s * 1000)))

    def _error(self, number: int) -> OSError:
        """EFAULT is libnfs's word for a lost connection, and for a refused write, whose reason is only in the text."""
        said = self._said()
        if number == errno.EFAULT and (refused := re.search(r"NFS3ERR_\w+\(-(\d+)\)", said)):
            number = int(refused[1])
        if number == errno.ENOSPC:
            return OSError(number, f"the disk of {self.where} is full")
        if number in (errno.EFAULT, errno.EINTR, errno.ETIMEDOUT):
            return self._silence()
        return OSError(number, f"{self.where}: {said}")

    def _silence(self) -> NasSilent:
        said = self._said()
        return NasSilent(errno.ETIMEDOUT, f"{self.where} does not answer{': ' if said else ''}{said}")

    def _said(self) -> str:
        said: bytes = self._nfs.nfs_get_error(self._context) or b""
        return said.decode(errors="replace").strip()


class File:
    """An open file of a Mount. Offsets and lengths in bytes."""

    def __init__(self, mount: Mount, path: str, handle: Any) -> None:
        self.path = path
        self._mount, self._handle = mount, handle

    def read(self, offset: int, length: int) -> bytes:
        """At most `length` bytes; fewer at the end of the file."""
        content = bytearray()
        while length > len(content):
            wanted = min(length - len(content), _CHUNK_BYTES)
            got = self._call("pread", offset + len(content), wanted, take=_content)
            if not got:
                break
            content += got
        return bytes(content)

    def write(self, offset: int, content: bytes) -> None:
        """All of it, and on stable storage if the file was opened with O_SYNC."""
        done = 0
        while done < len(content):
            piece = content[done : done + _CHUNK_BYTES]
            try:
                done += self._call("pwrite", offset + done, len(piece), piece)
            except PermissionError as error:
                raise self._explained(error) from error

    def _explained(self, error: PermissionError) -> PermissionError:
        owner, uid = self.attributes().uid, self._mount.uid
        if owner == uid:
            return error
        return PermissionError(errno.EACCES, f"{self.path} belongs to user {owner}, not to {uid}")

    def truncate(self, length: int) -> None:
        self._call("ftruncate", length)

    def attributes(self) -> Attributes:
        found: Attributes = self._call("fstat64", take=_attributes)
        return found

    def close(self) -> None:
        if self._handle is not None:
            handle, self._handle = self._handle, None
            self._mount._call("close", handle)

    def _call(self, name: str, *arguments: Any, take: Take = _status) -> Any:
        if self._handle is None:
            raise OSError(errno.EBADF, f"{self.path} is closed")
        return self._mount._call(name, self._handle, *arguments, take=take)

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
