"""Where each MAC is: frames in, decisions out. Pure: no socket, clock or thread.

A table MAC -> port for each switch, filled from the source addresses of frames, as in every
learning switch. What a learning switch does in silence is said aloud here: a known MAC that
appears at another port has *moved*, and that is the decision this testbed is about.

For each frame that a switch shows to the controller:

1) Does it name a machine as its source? A truncated header, a group or all-zero source, LLDP
   (a switch speaking for itself): no location, DONE.
2) Is the MAC unknown on this switch?
     2a) note the port, say Learned, DONE.
3) Is it known at this port? An announcement repeated, or a frame that crossed our flow-mods
   on their way: nothing to decide, DONE.
4) It is known at another port:
     4a) note the new port, say Moved, DONE.

For each port or switch that is lost:

5) Forget every MAC there and, if there still is a switch to hear it, say Forgotten for each.
   The next frame of such a MAC, wherever, is 2) again.

A manager that knows of a move ahead of any frame enters at step 2, with the cause "manager".
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Cause = Literal["rarp", "garp", "frame", "manager"]

_ETHERTYPE_ARP = b"\x08\x06"
_ETHERTYPE_RARP = b"\x80\x35"  # RFC 903
_ETHERTYPE_LLDP = b"\x88\xcc"
_ETHERTYPE_VLAN = b"\x81\x00"
_ARP_ETHERNET_IPV4 = b"\x00\x01\x08\x00\x06\x04"  # hardware and protocol types, address lengths (RFC 826)
_NO_MAC = bytes(6)
_NO_IP = bytes(4)


class Source(NamedTuple):
    """Who sent a frame, and what the frame says about it."""

    mac: str
    kind: Literal["rarp", "garp", "frame"]


def classify(frame: bytes) -> Source | None:
    """The source that a raw Ethernet frame names, or None; the first 46 bytes suffice, fewer never raise.

    "rarp" is what ESX and QEMU announce a resumed VM with, "garp" an ARP packet about its own sender
    (RFC 5227: sender IP = target IP), "frame" anything else.
    """
    source, ethertype, payload = frame[6:12], frame[12:14], frame[14:]
    if ethertype == _ETHERTYPE_VLAN:
        ethertype, payload = frame[16:18], frame[18:]
    if len(ethertype) < 2 or ethertype == _ETHERTYPE_LLDP or source[0] & 1 or source == _NO_MAC:
        return None
    mac = source.hex(":")
    if ethertype == _ETHERTYPE_RARP:
        return Source(mac, "rarp")
    sender_ip, target_ip = payload[14:18], payload[24:28]
    is_ipv4_arp = ethertype == _ETHERTYPE_ARP and payload.startswith(_ARP_ETHERNET_IPV4)
    if is_ipv4_arp and sender_ip == target_ip != _NO_IP and len(target_ip) == 4:
        return Source(mac, "garp")
    return Source(mac, "frame")


@dataclass(frozen=True)
class Learned:
    """A MAC seen on a switch for the first time. `time_ns` is when the frame was handled."""

    mac: str
    switch: str
    port: int
    cause: Cause
    time_ns: int


@dataclass(frozen=True)
class Moved:
    """A known MAC seen, or sent by a manager, to another port of the same switch."""

    mac: str
    switch: str
    old_port: int
    new_port: int
    cause: Cause
    time_ns: int


@dataclass(frozen=True)
class Forgotten:
    """A MAC whose port was lost."""

    mac: str
    switch: str
    port: int


Decision = Learned | Moved | Forgotten


class Locations:
    """The table. A switch is named by its datapath id, a port by its OpenFlow number.

    Each switch has its own view: between two switches, a MAC is at the port towards the other one.
    """

    def __init__(self) -> None:
        self._ports: dict[str, dict[str, int]] = {}

    def port_of(self, switch: str, mac: str) -> int | None:
        return self._ports.get(switch, {}).get(mac)

    def place(self, switch: str, mac: str, port: int, cause: Cause, time_ns: int) -> list[Decision]:
        """A MAC is at this port: what follows from it (steps 2 to 4)."""
        ports = self._ports.setdefault(switch, {})
        old_port = ports.get(mac)
        if old_port == port:  # 3
            return []
        ports[mac] = port
        if old_port is None:  # 2
            return [Learned(mac, switch, port, cause, time_ns)]
        return [Moved(mac, switch, old_port, port, cause, time_ns)]  # 4

    def forget_port(self, switch: str, port: int) -> list[Decision]:
        """A port went down or away (step 5)."""
        ports = self._ports.get(switch, {})
        lost = [mac for mac, known_port in ports.items() if known_port == port]
        return [Forgotten(mac, switch, ports.pop(mac)) for mac in lost]

    def forget_switch(self, switch: str) -> None:
        """A switch was lost; nobody is left to carry out a decision (step 5)."""
        self._ports.pop(switch, None)
