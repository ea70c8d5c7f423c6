"""Stand-ins for tests without a network: a switch that obeys flow-mods, and the frames to feed it; a machine whose
guest writes when it is told to.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from controller.openflow import DESTINATIONS, SOURCES, FlowMod
from hosts.ram import DirtyBitmap, Ram, runs_of

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
    """Two flow tables with OpenFlow 1.3's rules: highest priority wins, no match drops, ADD overwrites."""

    port_numbers: frozenset[int]
    tables: dict[int, dict[tuple[int, frozenset[tuple[str, int | str]]], FlowMod]] = field(
        default_factory=lambda: {SOURCES: {}, DESTINATIONS: {}}
    )

    def apply(self, changes: Iterable[FlowMod]) -> None:
        for change in changes:
            key = change.priority, frozenset(change.match.items())
            match change.command:
                case "add":
                    self.tables[change.table][key] = change
                case "delete_strict":
                    self.tables[change.table].pop(key, None)
                case "delete_all":
                    for table in self.tables.values():
                        table.clear()

    def forward(self, in_port: int, frame: bytes) -> Forwarded:
        fields: dict[str, int | str] = {
            "in_port": in_port,
            "eth_dst": frame[0:6].hex(":"),
            "eth_src": frame[6:12].hex(":"),
            "eth_type": int.from_bytes(frame[12:14], "big"),
        }
        ports: set[int] = set()
        to_controller = False
        table: int | None = SOURCES
        while table is not None:
            entry = self._lookup(table, fields)
            if entry is None:
                break
            for output in entry.output:
                if output == "controller":
                    to_controller = True
                else:
                    ports |= self.port_numbers if output == "flood" else {int(output)}
            table = entry.goto
        return Forwarded(frozenset(ports - {in_port}), to_controller)

    def _lookup(self, table: int, fields: dict[str, int | str]) -> FlowMod | None:
        hits = [entry for entry in self.tables[table].values() if entry.match.items() <= fields.items()]
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
