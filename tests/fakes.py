"""Stand-ins for tests without a network: a switch that obeys flow-mods, and the frames to feed it; a machine whose
guest writes when it is told to; a store whose server does not always answer, and a clock.
"""

import errno
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from controller.openflow import PORTS, Flow, FlowMod, Match
from hosts.ram import DirtyBitmap, Ram, runs_of
from hosts.store import Attributes, Folder, LocalFile, StoreSilent

Result = TypeVar("Result")

BROADCAST = "ff:ff:ff:ff:ff:ff"


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ethernet(source: str, destination: str = BROADCAST, ethertype: int = 0x88B5, payload: bytes = b"") -> bytes:
    """A frame of at least 60 bytes; 0x88b5 is set aside for experiments (IEEE 802)."""
    return (_mac(destination) + _mac(source) + ethertype.to_bytes(2, "big") + payload).ljust(60, b"\0")


def rarp(mac: str) -> bytes:
    """What a hypervisor announces a resumed VM with: a reverse request for its own MAC, without any IP."""
    return ethernet(mac, ethertype=0x8035, payload=bytes.fromhex("0001080006040003") + (_mac(mac) + bytes(4)) * 2)


def arp(mac: str, sender_ip: bytes, target_ip: bytes, operation: int = 1) -> bytes:
    """An ARP packet; gratuitous if both addresses are the same."""
    header = bytes.fromhex("000108000604") + operation.to_bytes(2, "big")
    return ethernet(mac, ethertype=0x0806, payload=header + _mac(mac) + sender_ip + bytes(6) + target_ip)


class Forwarded(NamedTuple):
    """Where a frame went."""

    ports: frozenset[int]
    to_controller: bool


@dataclass
class FakeSwitch:
    """Flow tables with OpenFlow 1.3's rules: highest priority wins, no match drops, ADD overwrites."""

    entries: dict[tuple[int, int, Match], Flow] = field(default_factory=dict)

    def apply(self, changes: Iterable[FlowMod]) -> None:
        for command, flow in changes:
            match command:
                case "add":
                    self.entries[flow.key] = flow
                case "delete":
                    self.entries.pop(flow.key, None)
                case "clear":
                    self.entries.clear()

    def forward(self, in_port: int, frame: bytes) -> Forwarded:
        fields = Match(in_port, frame[0:6].hex(":"), frame[6:12].hex(":"), int.from_bytes(frame[12:14], "big"))
        ports: set[int] = set()
        to_controller = False
        table: int | None = PORTS
        while table is not None:
            entry = self._lookup(table, fields)
            if entry is None:
                break
            to_controller |= "controller" in entry.output
            ports |= {port for port in entry.output if isinstance(port, int)}
            table = entry.goto
        return Forwarded(frozenset(ports - {in_port}), to_controller)

    def _lookup(self, table: int, fields: Match) -> Flow | None:
        hits = [
            entry
            for entry in self.entries.values()
            if entry.table == table
            and all(want in (None, have) for want, have in zip(entry.match, fields, strict=True))
        ]
        return max(hits, key=lambda entry: entry.priority, default=None)


class ToldBitmap(DirtyBitmap):
    """The pages that `write` was told of since they were taken, as a kernel that loses none would tell them."""

    def __init__(self, ram: Ram) -> None:
        self._ram, self._dirty = ram, np.zeros(ram.pages, bool)

    def write(self, pages: Iterable[int], value: int) -> None:
        for page in pages:
            self._ram.words[page, page % 512] = value
            self._dirty[page] = True

    def take(self, first: int = 0, end: int | None = None) -> np.ndarray:
        runs = runs_of(np.flatnonzero(self._dirty[first:end]) + first)
        self._dirty[first:end] = False
        return runs

    def peek(self) -> np.ndarray:
        return runs_of(np.flatnonzero(self._dirty))


class ToldGuest:
    """Its RAM, its bitmap, and how it was throttled."""

    def __init__(self, ram: Ram, bitmap: DirtyBitmap) -> None:
        self.ram, self.bitmap = ram, bitmap
        self.shares: list[float] = []

    def throttle(self, share: float) -> None:
        self.shares.append(share)


class ToldMachine:
    """A machine of nothing but a guest; it keeps its events."""

    def __init__(self, guest: ToldGuest) -> None:
        self.guest = guest
        self.events: list[tuple[str, dict[str, object]]] = []

    def emit(self, kind: str, **fields: object) -> int:
        self.events.append((kind, fields))
        return time.monotonic_ns()


Mishap = Literal["lost", "unheard"] | OSError | Callable[[], object]


class UnsureStore(Folder):
    """A folder behind a network that fails: what happens to the next calls of a name is planned, the last for good.

    "lost": it is not done, and there is no answer; "unheard": it is done, and there is none. An error is an answer.
    A function is called first, whatever it does. Owners are only noted, so no test needs root.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: list[str] = []
        self.owners: dict[str, int] = {}
        self.mishaps: dict[str, list[Mishap]] = {}
        self.for_good: dict[str, Mishap] = {}

    def link(self, path: str, new: str) -> None:
        self.do("link", lambda: super(UnsureStore, self).link(path, new))

    def names(self, path: str) -> list[str]:
        return self.do("names", lambda: super(UnsureStore, self).names(path))

    def read(self, path: str, limit: int) -> bytes:
        return self.do("read", lambda: super(UnsureStore, self).read(path, limit))

    def write_new(self, path: str, content: bytes, mode: int = 0o640) -> None:
        self.do("write_new", lambda: super(UnsureStore, self).write_new(path, content, mode))

    def rename(self, path: str, new: str) -> None:
        self.do("rename", lambda: super(UnsureStore, self).rename(path, new))

    def open(self, path: str, flags: int = os.O_RDWR, mode: int = 0o640) -> "UnsureFile":
        return UnsureFile(self, self.do("open", lambda: super(UnsureStore, self).open(path, flags, mode)))

    def chown(self, path: str, uid: int) -> None:
        self.do("chown", lambda: self.owners.update({path: uid}))

    def attributes(self, path: str) -> Attributes:
        found = self.do("attributes", lambda: super(UnsureStore, self).attributes(path))
        return found._replace(uid=self.owners.get(path, 0))

    def do(self, name: str, call: Callable[[], Result]) -> Result:
        self.calls.append(name)
        planned = self.mishaps.get(name)
        mishap = planned.pop(0) if planned else self.for_good.get(name)
        if isinstance(mishap, OSError):
            raise mishap
        if callable(mishap):
            mishap()
        if mishap == "lost":
            raise StoreSilent(errno.ETIMEDOUT, "no answer")
        result = call()
        if mishap == "unheard":
            raise StoreSilent(errno.ETIMEDOUT, "no answer")
        return result


class UnsureFile(LocalFile):
    """An open file of an UnsureStore."""

    def __init__(self, store: UnsureStore, file: LocalFile) -> None:
        super().__init__(file._descriptor)
        self._store = store

    def write(self, offset: int, content: bytes) -> None:
        self._store.do("write", lambda: super(UnsureFile, self).write(offset, content))

    def truncate(self, length: int) -> None:
        self._store.do("truncate", lambda: super(UnsureFile, self).truncate(length))

    def close(self) -> None:
        self._store.do("close", super().close)


class Clock:
    """Time passes only by sleeping; `meanwhile` happens in each sleep."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.meanwhile: Callable[[], object] = lambda: None

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.meanwhile()
