"""Stand-ins for tests without a network: a switch that obeys flow-mods, and the frames to feed it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from controller.openflow import DESTINATIONS, SOURCES, FlowMod

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
