"""NFS version 3 over TCP in user space: libnfs (a C library) through ctypes, without a kernel mount.

    with Mount("10.0.99.3", "/datastore1") as mount:
        mount.write_new("/vm1/vm1.vmx", b"...")
        with mount.open("/vm1/vm1-flat.vmdk") as disk:
            disk.write(0, block)

A server that does not answer makes a call fail with NasSilent after `timeout_s`, over and over, until it answers
again: the library connects anew by itself. Whether a call that failed so has had its effect is not known: reissue it
if it may be done twice. Every other error of the server is the OSError that its NFS3ERR means (RFC 1813, 2.6).

Calls of one Mount wait for each other; threads that must not wait have a Mount each.
"""

import ctypes
import errno
import functools
import os
import threading
from collections.abc import Sequence
from typing import Any

from hosts.store import Attributes, StoreSilent
from topologies.errors import TestbedError

# Debian 12 has .13, Debian 13 and Ubuntu 24.04 .14. In .16 (6.0) pread's and pwrite's arguments have another order.
_SONAMES = ("libnfs.so.14", "libnfs.so.13")
_CHANGED = ("libnfs.so.15", "libnfs.so.16", "libnfs.so.17")
_RECONNECT_FOR_EVER = -1
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

    @property
    def attributes(self) -> Attributes:
        return Attributes(self.size, self.used, self.uid, self.mtime + self.mtime_nsec / 1e9)


class _Entry(ctypes.Structure):
    """The beginning of struct nfsdirent."""


_Entry._fields_ = [("next", ctypes.POINTER(_Entry)), ("name", ctypes.c_char_p)]

_pointer, _int, _u64, _text = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_char_p
_PROTOTYPES: dict[str, tuple[Any, Sequence[Any]]] = {
    "nfs_init_context": (_pointer, ()),
    "nfs_destroy_context": (None, (_pointer,)),
    "nfs_get_error": (_text, (_pointer,)),
    "nfs_set_version": (_int, (_pointer, _int)),
    "nfs_set_uid": (None, (_pointer, _int)),
    "nfs_set_gid": (None, (_pointer, _int)),
    "nfs_set_timeout": (None, (_pointer, _int)),
    "nfs_set_autoreconnect": (None, (_pointer, _int)),
    "nfs_set_dircache": (None, (_pointer, _int)),
    "nfs_mount": (_int, (_pointer, _text, _text)),
    "nfs_open2": (_int, (_pointer, _text, _int, _int, ctypes.POINTER(_pointer))),
    "nfs_close": (_int, (_pointer, _pointer)),
    "nfs_pread": (_int, (_pointer, _pointer, _u64, _u64, _pointer)),
    "nfs_pwrite": (_int, (_pointer, _pointer, _u64, _u64, _pointer)),
    "nfs_fsync": (_int, (_pointer, _pointer)),
    "nfs_ftruncate": (_int, (_pointer, _pointer, _u64)),
    "nfs_fstat64": (_int, (_pointer, _pointer, ctypes.POINTER(_Stat))),
    "nfs_stat64": (_int, (_pointer, _text, ctypes.POINTER(_Stat))),
    "nfs_opendir": (_int, (_pointer, _text, ctypes.POINTER(_pointer))),
    "nfs_readdir": (ctypes.POINTER(_Entry), (_pointer, _pointer)),
    "nfs_closedir": (None, (_pointer, _pointer)),
    "nfs_mkdir": (_int, (_pointer, _text)),
    "nfs_rmdir": (_int, (_pointer, _text)),
    "nfs_link": (_int, (_pointer, _text, _text)),
    "nfs_rename": (_int, (_pointer, _text, _text)),
    "nfs_unlink": (_int, (_pointer, _text)),
    "nfs_chown": (_int, (_pointer, _text, _int, _int)),
}


@functools.cache
def library() -> Any:
    """libnfs; NfsMissing without it."""
    for soname in _SONAMES:
        try:
            library = ctypes.CDLL(soname)
        except OSError:
            continue
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        return library
    for soname in _CHANGED:
        try:
            ctypes.CDLL(soname)
        except OSError:
            continue
        raise NfsMissing(f"{soname} is newer than what is known here; install one of {', '.join(_SONAMES)}")
    raise NfsMissing(f"there is no libnfs here; install {' or '.join(_SONAMES)} (libnfs14, libnfs13)")


class Mount:
    """An export of an NFS server, as user `uid` and a group of the same number."""

    def __init__(self, ip: str, export: str, uid: int = 0, timeout_s: float = 2.0) -> None:
        """OSError if there is no such export or no such server."""
        self.where, self.uid = f"{ip}:{export}", uid
        self._nfs = library()
        self._one_at_a_time = threading.Lock()
        self._context = self._nfs.nfs_init_context()
        try:
            self._nfs.nfs_set_version(self._context, 3)
            self._nfs.nfs_set_uid(self._context, uid)
            self._nfs.nfs_set_gid(self._context, uid)
            self._nfs.nfs_set_timeout(self._context, int(timeout_s * 1000))
            self._nfs.nfs_set_dircache(self._context, 0)  # what another host has just made must be seen
            self._call("nfs_mount", ip.encode(), export.encode())
            self._nfs.nfs_set_autoreconnect(self._context, _RECONNECT_FOR_EVER)  # (a first connection may just fail)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------ files

    def open(self, path: str, flags: int = os.O_RDWR, mode: int = 0o640) -> "File":
        """As open(2); O_CREAT makes a file only if O_EXCL is given too (libnfs takes it so)."""
        handle = _pointer()
        self._call("nfs_open2", path.encode(), flags, mode, ctypes.byref(handle))
        return File(self, path, handle)

    def read(self, path: str, limit: int) -> bytes:
        """The first `limit` bytes of a file."""
        with self.open(path, os.O_RDONLY) as file:
            return file.read(0, limit)

    def write_new(self, path: str, content: bytes, mode: int = 0o640) -> None:
        """A file that does not exist yet, on stable storage; FileExistsError."""
        with self.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode) as file:
            file.write(0, content)
            file.sync()

    def attributes(self, path: str) -> Attributes:
        found = _Stat()
        self._call("nfs_stat64", path.encode(), ctypes.byref(found))
        return found.attributes

    def names(self, path: str) -> list[str]:
        """What a folder holds."""
        folder = _pointer()
        self._call("nfs_opendir", path.encode(), ctypes.byref(folder))
        names = []
        with self._one_at_a_time:  # (these two do not call the server)
            while entry := self._nfs.nfs_readdir(self._context, folder):
                names.append(entry.contents.name.decode())
            self._nfs.nfs_closedir(self._context, folder)
        return [name for name in names if name not in (".", "..")]

    def link(self, path: str, new: str) -> None:
        self._call("nfs_link", path.encode(), new.encode())

    def rename(self, path: str, new: str) -> None:
        self._call("nfs_rename", path.encode(), new.encode())

    def unlink(self, path: str) -> None:
        self._call("nfs_unlink", path.encode())

    def mkdir(self, path: str) -> None:
        self._call("nfs_mkdir", path.encode())

    def rmdir(self, path: str) -> None:
        self._call("nfs_rmdir", path.encode())

    def chown(self, path: str, uid: int) -> None:
        """To a user and the group of the same number."""
        self._call("nfs_chown", path.encode(), uid, uid)

    def act_as(self, uid: int) -> None:
        """Be another user from here on, and a group of the same number: files that are open stay so."""
        with self._one_at_a_time:
            self._nfs.nfs_set_uid(self._context, uid)
            self._nfs.nfs_set_gid(self._context, uid)
            self.uid = uid

    # ------------------------------------------------------------ its end

    def close(self) -> None:
        with self._one_at_a_time:
            if self._context is not None:
                self._nfs.nfs_destroy_context(self._context)
                self._context = None

    def __enter__(self) -> "Mount":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ calls

    def _call(self, name: str, *arguments: Any) -> int:
        with self._one_at_a_time:
            if self._context is None:
                raise OSError(errno.EBADF, f"{self.where} is not mounted any more")
            result: int = getattr(self._nfs, name)(self._context, *arguments)
            if result >= 0:
                return result
            said = (self._nfs.nfs_get_error(self._context) or b"").decode(errors="replace").strip()
        if -result in (errno.EINTR, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH):
            raise NasSilent(-result, f"{self.where} does not answer: {said}")
        raise OSError(-result, f"{self.where}: {said}")


class File:
    """An open file of a Mount. Offsets and lengths in bytes."""

    def __init__(self, mount: Mount, path: str, handle: Any) -> None:
        self.path = path
        self._mount, self._handle = mount, handle

    def read(self, offset: int, length: int) -> bytes:
        """At most `length` bytes; fewer at the end of the file."""
        content = bytearray()
        while length > len(content):
            buffer = ctypes.create_string_buffer(min(length - len(content), _CHUNK_BYTES))
            got = self._call("nfs_pread", offset + len(content), len(buffer), buffer)
            if not got:
                break
            content += buffer.raw[:got]
        return bytes(content)

    def write(self, offset: int, content: bytes) -> None:
        """All of it; on stable storage after `sync`, or if the file was opened with O_SYNC."""
        done = 0
        while done < len(content):
            piece = content[done : done + _CHUNK_BYTES]
            try:
                done += self._call("nfs_pwrite", offset + done, len(piece), piece)
            except OSError as error:
                raise self._explained(error) from error

    def _explained(self, error: OSError) -> OSError:
        """libnfs tells of a refused write only that it was (EFAULT, lib/nfs_v3.c)."""
        if error.errno != errno.EFAULT:
            return error
        owner, uid = self.attributes().uid, self._mount.uid
        if uid not in (0, owner):
            return PermissionError(errno.EACCES, f"{self.path} belongs to user {owner}, not to {uid}")
        return OSError(errno.EIO, f"{self.path} could not be written: the server refused; is its disk full?")

    def sync(self) -> None:
        self._call("nfs_fsync")

    def truncate(self, length: int) -> None:
        self._call("nfs_ftruncate", length)

    def attributes(self) -> Attributes:
        found = _Stat()
        self._call("nfs_fstat64", ctypes.byref(found))
        return found.attributes

    def close(self) -> None:
        if self._handle is not None:
            handle, self._handle = self._handle, None
            self._mount._call("nfs_close", handle)

    def _call(self, name: str, *arguments: Any) -> int:
        if self._handle is None:
            raise OSError(errno.EBADF, f"{self.path} is closed")
        return self._mount._call(name, self._handle, *arguments)

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
