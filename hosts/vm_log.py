"""vmware.log: what happened to a VM, in its folder, written by the host that has it and a new one at each hand-over.

    2026-11-25T13:06:59.123Z| esx1| vm.powered_on generation=1

It is written by a thread of the agent's, over a connection of its own: a datastore that is slow holds up nobody.
"""

import contextlib
import os
import queue
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hosts.store import Store, StoreFile, open_store

_OLD_LOGS = 6  # so many are kept (VMware's default, log.keepOld)
_OLD = re.compile(r"vmware-(\d{1,9})\.log")
_CLOSE_WITHIN_S = 2.0


class VmLog:
    """One agent's. What cannot be written is told to `complain`, and lost."""

    def __init__(self, where: str, host: str, complain: Callable[[str], None]) -> None:
        self._where, self._host, self._complain = where, host, complain
        self._lines: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="vmware.log", daemon=True)
        self._thread.start()

    def begin(self, vm: str) -> None:
        """The VM is this host's now: a new log."""
        self._lines.put((vm, ""))

    def add(self, vm: str, kind: str, fields: Mapping[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
        said = "".join(f" {name}={_short(value)}" for name, value in fields.items() if name != "t")
        self._lines.put((vm, f"{now}Z| {self._host}| {kind}{said}\n"))

    def close(self) -> None:
        """What is still to be written has a moment for it."""
        self._lines.put(None)
        self._thread.join(_CLOSE_WITHIN_S)

    def _write_all(self) -> None:
        store = open_store(self._where)
        logs: dict[str, _Log] = {}  # a file that another host has renamed is still the same
        while (entry := self._lines.get()) is not None:
            vm, line = entry
            try:
                if not line:
                    _forget(logs, vm)
                    _rotate(store, vm)
                    continue
                log = logs[vm] = logs.get(vm) or _open(store, f"/{vm}/vmware.log")
                log.file.write(log.size, line.encode())
                log.size += len(line.encode())
            except OSError as error:
                _forget(logs, vm)  # it may be another file by now, and nobody knows how long it is
                self._complain(f"VM {vm}: vmware.log lacks {line.strip() or 'its new beginning'!r}: {error}")
        store.close()


@dataclass
class _Log:
    file: StoreFile
    size: int


def _open(store: Store, path: str) -> _Log:
    try:
        return _Log(store.open(path), store.attributes(path).size)
    except FileNotFoundError:
        return _Log(store.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), 0)


def _forget(logs: dict[str, _Log], vm: str) -> None:
    if vm in logs:
        with contextlib.suppress(OSError):  # each line was written and complained of by itself: nothing hangs on it
            logs.pop(vm).file.close()


def _short(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _rotate(store: Store, vm: str) -> None:
    names = store.names(f"/{vm}")
    if "vmware.log" not in names:
        return
    old = sorted(int(match[1]) for name in names if (match := _OLD.fullmatch(name)))
    store.rename(f"/{vm}/vmware.log", f"/{vm}/vmware-{(old or [0])[-1] + 1}.log")
    for number in old[: max(0, len(old) + 1 - _OLD_LOGS)]:
        store.unlink(f"/{vm}/vmware-{number}.log")
