"""Where files are: a folder of this machine, or an export of a NAS, with the same few calls.

    store = open_store("nfs://10.0.99.3/datastore1")        hosts/nfs.py
    store = open_store("/tmp/datastore")                    a folder

Paths begin with "/" and are the store's own. Errors are OSError, with the errno that the server or the kernel gave;
StoreSilent if there was no answer in time: what was asked may have been done, or may be done later.
"""

import os
from pathlib import Path
from typing import NamedTuple, Protocol

from topologies.errors import UsageError

_SCHEME = "nfs://"


class StoreSilent(TimeoutError):
    """No answer in time; the call may have had its effect, may have it later, or never."""


class Attributes(NamedTuple):
    """Of a file: sizes in bytes, `used` on the disk; `changed_s` of its content, by the server's clock."""

    size: int
    used: int
    uid: int
    changed_s: float


class StoreFile(Protocol):
    """An open file."""

    def read(self, offset: int, length: int) -> bytes:
        """At most `length` bytes; fewer at the end of the file."""

    def write(self, offset: int, content: bytes) -> None:
        """All of it, and on stable storage if the file was opened with O_SYNC."""

    def truncate(self, length: int) -> None: ...

    def close(self) -> None: ...


class Store(Protocol):
    def open(self, path: str, flags: int = os.O_RDWR, mode: int = 0o640) -> StoreFile:
        """As open(2); O_CREAT only together with O_EXCL."""

    def read(self, path: str, limit: int) -> bytes:
        """The first `limit` bytes of a file."""

    def write_new(self, path: str, content: bytes, mode: int = 0o640) -> None:
        """A file that does not exist yet, on stable storage; FileExistsError."""

    def names(self, path: str) -> list[str]:
        """What a folder holds."""

    def attributes(self, path: str) -> Attributes: ...

    def link(self, path: str, new: str) -> None: ...

    def rename(self, path: str, new: str) -> None: ...

    def unlink(self, path: str) -> None: ...

    def mkdir(self, path: str) -> None: ...

    def rmdir(self, path: str) -> None: ...

    def chown(self, path: str, uid: int) -> None:
        """To a user, and the group of the same number."""

    def act_as(self, uid: int) -> None:
        """What is called from now on is asked for by this user; a folder does not distinguish."""

    def close(self) -> None: ...


def open_store(where: str, timeout_s: float = 2.0) -> Store:
    """A store by its name, nfs://<server>/<export> or a folder's path. Whether it is there shows when it is used."""
    if where.startswith(_SCHEME):
        from hosts.nfs import Mount  # a folder needs no libnfs

        server, _, export = where.removeprefix(_SCHEME).partition("/")
        return Mount(server, f"/{export}", timeout_s=timeout_s)
    if not where.startswith("/"):
        raise UsageError(f"{where!r} is no datastore; name a folder by its full path, or {_SCHEME}<server>/<export>")
    return Folder(Path(where))


class Folder:
    """A folder of this machine. It is never silent, and root may write whatever belongs to whom."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self, path: str, flags: int = os.O_RDWR, mode: int = 0o640) -> "LocalFile":
        if flags & os.O_ACCMODE == os.O_RDONLY:
            flags |= os.O_RDWR  # as over NFS, where each write is judged when it comes
        return LocalFile(os.open(self._at(path), flags | os.O_CLOEXEC, mode))

    def read(self, path: str, limit: int) -> bytes:
        with open(self._at(path), "rb") as file:
            return file.read(limit)

    def write_new(self, path: str, content: bytes, mode: int = 0o640) -> None:
        file = self.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_SYNC, mode)
        try:
            file.write(0, content)
        finally:
            file.close()

    def names(self, path: str) -> list[str]:
        return os.listdir(self._at(path))

    def attributes(self, path: str) -> Attributes:
        found = os.stat(self._at(path))
        return Attributes(found.st_size, found.st_blocks * 512, found.st_uid, found.st_mtime)

    def link(self, path: str, new: str) -> None:
        os.link(self._at(path), self._at(new))

    def rename(self, path: str, new: str) -> None:
        os.rename(self._at(path), self._at(new))

    def unlink(self, path: str) -> None:
        os.unlink(self._at(path))

    def mkdir(self, path: str) -> None:
        os.mkdir(self._at(path))

    def rmdir(self, path: str) -> None:
        os.rmdir(self._at(path))

    def chown(self, path: str, uid: int) -> None:
        if os.geteuid() == 0:  # in a test without root there is nobody else whom it could keep out
            os.chown(self._at(path), uid, uid)

    def act_as(self, uid: int) -> None:
        pass

    def close(self) -> None:
        pass

    def _at(self, path: str) -> str:
        return f"{self._root}{path}"


class LocalFile:
    """An open file of a Folder."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def write(self, offset: int, content: bytes) -> None:
        done = 0
        while done < len(content):
            done += os.pwrite(self._descriptor, content[done:], offset + done)

    def truncate(self, length: int) -> None:
        os.ftruncate(self._descriptor, length)

    def close(self) -> None:
        os.close(self._descriptor)
