"""Where each MAC is: frames in, decisions out. Pure: no socket, clock or thread.

A table MAC -> port of the network, filled from the source addresses of frames, as in every
learning switch. What a learning switch does in silence is said aloud here: a known MAC that
appears at another port has *moved*, and that is the decision this testbed is about.

For each frame that a switch shows to the controller:

1) Does it name a machine as its source? A truncated header, a group or all-zero source, LLDP
   (a switch speaking for itself): no location, DONE. From a trunk: seen by another switch before, DONE.
2) Is the MAC unknown?
     2a) may it be there (controller/guard.py)? If not, say Refused, DONE.
     2b) note the port, say Learned, DONE.
3) Is it known at this port? An announcement repeated, or a frame that crossed our flow-mods
   on their way: nothing to decide, DONE. But if it is held elsewhere, then it is still here: Refused.
4) It is known at another port, and the guard believes it at once, refuses it, or has it held:
     4a) note the new port, say Moved;
     4b) say Refused;
     4c) say Held, ask the old place, and if that has not answered in time (`expire`), say Moved.

For each port that is lost:

5) Forget every MAC there and say Forgotten for each. The next frame of such a MAC, wherever, is 2) again.

A manager that knows of a move ahead of any frame enters at step 2, with the cause "manager".
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, NamedTuple

from controller.guard import CONTESTED, DAMPED, HOLD_S, NOT_THERE, STILL_THERE, Guard
from controller.network import Port
from controller.openflow import PROBER

Cause = Literal["rarp", "garp", "frame", "manager"]

_ETHERTYPE_ARP = b"\x08\x06"
_ETHERTYPE_RARP = b"\x80\x35"  # RFC 903
_ETHERTYPE_LLDP = b"\x88\xcc"
_ETHERTYPE_VLAN = b"\x81\x00"
_ARP_ETHERNET_IPV4 = b"\x00\x01\x08\x00\x06\x04"  # hardware and protocol types, address lengths (RFC 826)
_NO_MAC = bytes(6)
_PROBER = bytes.fromhex(PROBER.replace(":", ""))  # it is nowhere: who says so lies
_NO_IP = bytes(4)


class Source(NamedTuple):
    """Who sent a frame, and what the frame says about it; `ip` of an ARP packet's sender, else empty."""

    mac: str
    kind: Literal["rarp", "garp", "frame"]
    ip: str = ""


def classify(frame: bytes) -> Source | None:
    """The source that a raw Ethernet frame names, or None; the first 46 bytes suffice, fewer never raise.

    "rarp" is what ESX and QEMU announce a resumed VM with, "garp" an ARP packet about its own sender
    (RFC 5227: sender IP = target IP), "frame" anything else.
    """
    source, ethertype, payload = frame[6:12], frame[12:14], frame[14:]
    if ethertype == _ETHERTYPE_VLAN:
        ethertype, payload = frame[16:18], frame[18:]
    if len(ethertype) < 2 or ethertype == _ETHERTYPE_LLDP or source[0] & 1 or source in (_NO_MAC, _PROBER):
        return None
    mac = source.hex(":")
    if ethertype == _ETHERTYPE_RARP:
        return Source(mac, "rarp")
    if ethertype != _ETHERTYPE_ARP or not payload.startswith(_ARP_ETHERNET_IPV4) or len(payload) < 28:
        return Source(mac, "frame")
    sender_ip, target_ip = payload[14:18], payload[24:28]
    ip = "" if sender_ip == _NO_IP else ".".join(map(str, sender_ip))
    return Source(mac, "garp" if sender_ip == target_ip != _NO_IP else "frame", ip)


@dataclass(frozen=True, slots=True)
class Learned:
    """A MAC seen for the first time. `time_ns` is when the frame was handled."""

    mac: str
    at: Port
    cause: Cause
    time_ns: int


@dataclass(frozen=True, slots=True)
class Moved:
    """A known MAC is at another port, by a frame's or a manager's word; `announced`: the manager had said so."""

    mac: str
    old: Port
    new: Port
    cause: Cause
    time_ns: int
    announced: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """A known MAC was seen at another port, and may have moved: its old place is to be asked."""

    mac: str
    old: Port
    new: Port
    cause: Cause
    time_ns: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A MAC was seen where it cannot be; `reason` of controller/guard.py. `was_held`: it stays where it was."""

    mac: str
    at: Port
    cause: Cause
    time_ns: int
    reason: str
    was_held: bool = False


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A MAC whose port was lost."""

    mac: str
    at: Port


Decision = Learned | Moved | Held | Refused | Forgotten


class Locations:
    """The table: each MAC is at one port of the network, an edge of it."""

    def __init__(self, guard: Guard | None = None) -> None:
        self.guard = guard or Guard()
        self._at: dict[str, Port] = {}
        self._there: dict[Port, set[str]] = defaultdict(set)
        self._held: dict[str, Held] = {}

    def __len__(self) -> int:
        return len(self._at)

    def at(self, mac: str) -> Port | None:
        return self._at.get(mac)

    def all(self) -> dict[str, Port]:
        return dict(self._at)

    def held(self) -> dict[str, Held]:
        return dict(self._held)

    def place(self, mac: str, at: Port, cause: Cause, time_ns: int) -> Decision | None:
        """A MAC is at this port: what follows from it (steps 1 to 4)."""
        guard, old = self.guard, self._at.get(mac)
        if guard.place(at).role == "trunk":
            return None
        if old == at:  # 3
            held = self._held.pop(mac, None)
            return Refused(mac, held.new, held.cause, time_ns, STILL_THERE, was_held=True) if held else None
        reason = guard.objection(mac, at, len(self._there[at])) if guard.is_on and cause != "manager" else ""
        if reason:
            return Refused(mac, at, cause, time_ns, reason)
        now_s = time_ns / 1e9
        announced = not guard.is_on or cause == "manager" or guard.is_announced(mac, at, now_s)
        if old is None:  # 2
            self._put(mac, at)
            return Learned(mac, at, cause, time_ns)
        if announced:  # 4a
            self._put(mac, at)
            return Moved(mac, old, at, cause, time_ns, guard.is_on)
        if (held := self._held.get(mac)) is not None:  # 4c: the first one counts, until it is decided
            return None if held.new == at else Refused(mac, at, cause, time_ns, CONTESTED)
        if guard.is_damped(mac, now_s):  # 4b
            return Refused(mac, at, cause, time_ns, DAMPED)
        guard.note_move(mac, now_s)
        self._held[mac] = Held(mac, old, at, cause, time_ns)
        return self._held[mac]

    def expire(self, time_ns: int, after_s: float = HOLD_S) -> list[Moved | Refused]:
        """Those that were held, and whose old place has been silent for long enough (4c)."""
        due = [held for held in self._held.values() if time_ns - held.time_ns >= after_s * 1e9]
        return [decision for held in due if (decision := self.believe(held, time_ns)) is not None]

    def believe(self, held: Held, time_ns: int) -> Moved | Refused | None:
        """Its old place has been silent; None if it has been decided already. What is known may be more than then."""
        if self._held.get(held.mac) is not held:
            return None
        reason = self.guard.objection(held.mac, held.new, len(self._there[held.new]))
        if reason:
            del self._held[held.mac]
            return Refused(held.mac, held.new, held.cause, time_ns, reason, was_held=True)
        self._put(held.mac, held.new)
        return Moved(held.mac, held.old, held.new, held.cause, time_ns)

    def ports(self, switch: str) -> set[Port]:
        """Of a switch, those where MACs are, or are held for."""
        ports = [*self._at.values(), *(held.new for held in self._held.values())]
        return {port for port in ports if port.switch == switch}

    def forget_port(self, port: Port) -> list[Forgotten | Refused]:
        """A port went down or away, or turned out to be a trunk (step 5); what is held for it is not there either."""
        lost = sorted(self._there.pop(port, ()))
        for mac in lost:
            del self._at[mac]
            self._held.pop(mac, None)
        vain = [held for held in self._held.values() if held.new == port]
        for held in vain:
            del self._held[held.mac]
        refused = [Refused(held.mac, port, held.cause, held.time_ns, NOT_THERE, was_held=True) for held in vain]
        return [*(Forgotten(mac, port) for mac in lost), *refused]

    def forget(self, mac: str) -> Forgotten:
        """One that is known."""
        at = self._at.pop(mac)
        self._there[at].discard(mac)
        self._held.pop(mac, None)
        return Forgotten(mac, at)

    def adopt(self, mac: str, at: Port) -> bool:
        """What a switch knew from before; False if it is known better, or cannot be."""
        if mac in self._at or self.guard.place(at).role == "trunk":
            return False
        if self.guard.is_on and self.guard.objection(mac, at, len(self._there[at])):
            return False
        self._put(mac, at)
        return True

    def _put(self, mac: str, at: Port) -> None:
        self._held.pop(mac, None)
        if (old := self._at.get(mac)) is not None:
            self._there[old].discard(mac)
        self._at[mac] = at
        self._there[at].add(mac)
