"""Finding the trunks: each switch says through each of its ports who it is, in LLDP (IEEE 802.1AB). Pure.

The controller has the switches send these frames, and gets those that arrive. A trunk is up once each of its ends
has heard the other; it is down when one of them has been silent for LOST_AFTER_S, or its port goes down.
"""

import struct
from collections.abc import Collection
from typing import NamedTuple

from controller.network import Port

EVERY_S = 0.5
LOST_AFTER_S = 1.8
ETHERTYPE_LLDP = 0x88CC

_NEAREST_BRIDGE = bytes.fromhex("0180c200000e")
_SENDER = bytes.fromhex("02766d6f7400")  # a locally administered address: "vmot"
_CHASSIS_ID, _PORT_ID, _TTL, _END = 1, 2, 3, 0
_LOCAL = b"\x07"  # the subtype "locally assigned", of chassis and port alike
_MIN_BYTES = 60


def frame(port: Port) -> bytes:
    """What `port` says of itself; 60 bytes."""
    tlvs = [
        (_CHASSIS_ID, _LOCAL + port.switch.encode()),
        (_PORT_ID, _LOCAL + str(port.number).encode()),
        (_TTL, struct.pack("!H", 2)),
        (_END, b""),
    ]
    body = b"".join(struct.pack("!H", kind << 9 | len(value)) + value for kind, value in tlvs)
    return (_NEAREST_BRIDGE + _SENDER + struct.pack("!H", ETHERTYPE_LLDP) + body).ljust(_MIN_BYTES, b"\0")


def sender(data: bytes) -> Port | None:
    """Who has sent this frame; None if it is no LLDP of ours. Never raises, whatever the bytes."""
    if data[12:14] != struct.pack("!H", ETHERTYPE_LLDP):
        return None
    values: dict[int, bytes] = {}
    rest = data[14:]
    while len(rest) >= 2:
        (head,) = struct.unpack_from("!H", rest)
        kind, length = head >> 9, head & 0x1FF
        if kind == _END or len(rest) < 2 + length:
            break
        values[kind], rest = rest[2 : 2 + length], rest[2 + length :]
    chassis, number = values.get(_CHASSIS_ID, b""), values.get(_PORT_ID, b"")
    if not chassis.startswith(_LOCAL) or not number.startswith(_LOCAL):
        return None
    switch, digits = chassis[1:], number[1:]
    if len(switch) != 16 or not set(switch) <= set(b"0123456789abcdef"):
        return None
    if not (0 < len(digits) <= 10 and digits.isdigit()):
        return None
    return Port(switch.decode(), int(digits))


class Change(NamedTuple):
    """A trunk has come up or gone down."""

    one: Port
    other: Port
    is_up: bool


class Discovery:
    """What has been heard, and when (seconds of one clock, as given)."""

    def __init__(self) -> None:
        self._heard: dict[tuple[Port, Port], float] = {}  # (sender, receiver) -> the last time
        self._up: set[tuple[Port, Port]] = set()  # the lower port first

    def hear(self, said: Port, at: Port, now_s: float) -> list[Change]:
        if said.switch == at.switch:  # a cable from a switch to itself is no trunk
            return []
        self._heard[said, at] = now_s
        ends = min(said, at), max(said, at)
        if ends in self._up or (at, said) not in self._heard:
            return []
        changes = [change for port in ends for change in self._drop(port, but=ends)]  # it hangs elsewhere now
        self._up.add(ends)
        return [*changes, Change(*ends, is_up=True)]

    def lose(self, port: Port) -> list[Change]:
        """The port went down or away."""
        return self._drop(port)

    def expire(self, now_s: float, away: Collection[str] = ()) -> list[Change]:
        """Whoever has not been heard for too long. Switches that are `away` can neither be asked nor tell."""
        for said, at in self._heard:
            if said.switch in away or at.switch in away:
                self._heard[said, at] = now_s
        silent = {pair for pair, heard_s in self._heard.items() if now_s - heard_s > LOST_AFTER_S}
        for pair in silent:
            del self._heard[pair]
        lost = [ends for ends in sorted(self._up) if ends in silent or ends[::-1] in silent]
        self._up -= set(lost)
        return [Change(*ends, is_up=False) for ends in lost]

    def _drop(self, port: Port, but: tuple[Port, Port] | None = None) -> list[Change]:
        for pair in [pair for pair in self._heard if port in pair and (min(pair), max(pair)) != but]:
            del self._heard[pair]
        lost = [ends for ends in sorted(self._up) if port in ends and ends != but]
        self._up -= set(lost)
        return [Change(*ends, is_up=False) for ends in lost]
