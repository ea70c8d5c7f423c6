"""The tables of a switch, and OpenFlow 1.3 on the wire for them. Pure.

Four tables, so that a switch forwards every frame by itself and the controller never carries one:

        0 PORTS: what came from where?        1 GUARD: a client may not be     2 SOURCES: who sent it?
      +----------------------------------+    +-------------------------+    +-------------------------------+
      | 300  LLDP of a trunk             |    | 200  told already       |    | 250  quarantined port, RARP   |
      |                    -> controller |    |        -> nowhere       |    |        -> nowhere             |
      | 250  LLDP          -> nowhere    |    | 100  eth_src is a VM's  |    | 200  RARP -> controller and 3 |
      | 200  from a trunk  -> 3          |    |        -> controller    |    | 100  in_port and eth_src      |
      | 200  from a client -> 1          |    |   0  else -> 2          |    |        known -> 3             |
      |   0  else          -> 2          |    +-------------------------+    |  50  quarantined port         |
      +----------------------------------+                                   |        -> nowhere             |
        3 DESTINATIONS: where to?                                            |   0  else -> controller and 3 |
      +----------------------------------+                                   +-------------------------------+
      | 100  eth_dst known -> its port   |
      | 100  the prober    -> controller |
      |   0  else -> flood               |
      +----------------------------------+

Where nobody has said which ports are trunks, every port's LLDP goes to the controller.

A known source at its known port costs the controller nothing; the same source at any other port misses and is
reported with its first frame. An RARP is reported whatever the table knows. A flood leaves through the ports that its
entry lists: those of machines, and those of trunks that belong to the tree; never through the one it came from.

A change of an entry is an ADD with the same match and priority: it is overwritten in one step, at no moment does the
switch flood or forget. Our own words for the wire, because the framework's take 0.1 ms a flow-mod: ten thousand of
them are a resynchronisation, and three are in every relearning. Layouts are of the OpenFlow Switch Specification
1.3.5, sections 7.1 to 7.3; bundles of its extension 230.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

PORTS, GUARD, SOURCES, DESTINATIONS = 0, 1, 2, 3
ETHERTYPE_ARP, ETHERTYPE_RARP, ETHERTYPE_LLDP = 0x0806, 0x8035, 0x88CC
# A packet-in carries the first bytes of its frame: the headers, and all of an ARP packet.
PACKET_IN_BYTES = 128
# Sets our entries apart in a dump of the flows: "vmot".
COOKIE = 0x766D6F74
# Who asks old places whether a MAC is still there (controller/probe.py); "vmot", locally administered
PROBER = "02:76:6d:6f:74:01"
QUARANTINE_S = 10

_CONTROLLER, _ANY = 0xFFFFFFFD, 0xFFFFFFFF
Output = int | Literal["controller"]


class Match(NamedTuple):
    """None: any."""

    in_port: int | None = None
    eth_dst: str | None = None
    eth_src: str | None = None
    eth_type: int | None = None


class Flow(NamedTuple):
    """An entry; `output` comes before `goto`."""

    table: int
    priority: int
    match: Match = Match()
    output: tuple[Output, ...] = ()
    goto: int | None = None
    hard_timeout_s: int = 0

    @property
    def key(self) -> tuple[int, int, Match]:
        """What makes it the same entry for the switch."""
        return self.table, self.priority, self.match


class FlowMod(NamedTuple):
    """A change of one entry."""

    command: Literal["add", "delete", "clear"]
    flow: Flow


_ALL_TABLES = 0xFF
CLEAR = FlowMod("clear", Flow(_ALL_TABLES, 0))  # every entry, whosever

# ---------------------------------------------------------------- entries


def always(*, trunks_are_known: bool) -> list[Flow]:
    """The entries of every switch."""
    return [
        Flow(PORTS, 250, Match(eth_type=ETHERTYPE_LLDP), () if trunks_are_known else ("controller",)),
        Flow(PORTS, 0, goto=SOURCES),
        Flow(GUARD, 0, goto=SOURCES),
        Flow(SOURCES, 200, Match(eth_type=ETHERTYPE_RARP), ("controller",), DESTINATIONS),
        Flow(SOURCES, 0, Match(), ("controller",), DESTINATIONS),
        Flow(DESTINATIONS, 100, Match(eth_dst=PROBER), ("controller",)),
    ]


def flood(ports: Iterable[Output]) -> Flow:
    return Flow(DESTINATIONS, 0, Match(), tuple(sorted(ports, key=int)))


def from_trunk(port: int) -> list[Flow]:
    return [
        Flow(PORTS, 300, Match(in_port=port, eth_type=ETHERTYPE_LLDP), ("controller",)),
        Flow(PORTS, 200, Match(in_port=port), goto=DESTINATIONS),
    ]


def trunks_of(flows: Iterable[Flow]) -> set[int]:
    """The ports that these entries say are trunks."""
    ports = {flow.match.in_port for flow in flows if flow.table == PORTS and flow.goto == DESTINATIONS}
    return {port for port in ports if port is not None}


def from_client(port: int) -> Flow:
    return Flow(PORTS, 200, Match(in_port=port), goto=GUARD)


def guarded(mac: str) -> Flow:
    """A frame that says it is from a VM goes no further, and is told."""
    return Flow(GUARD, 100, Match(eth_src=mac), ("controller",))


def known_source(mac: str, port: int, output: tuple[Output, ...] = ()) -> Flow:
    return Flow(SOURCES, 100, Match(in_port=port, eth_src=mac), output, DESTINATIONS)


def listened_to(mac: str, port: int) -> Flow:
    """A known source each of whose frames is told, from a quarantined port, too."""
    return known_source(mac, port, ("controller",))


def destination(mac: str, port: int) -> Flow:
    return Flow(DESTINATIONS, 100, Match(eth_dst=mac), (port,))


def quarantine(port: int) -> list[Flow]:
    """For some seconds nothing from this port but known sources; the switch drops the rest without a word."""
    return [
        Flow(SOURCES, 250, Match(in_port=port, eth_type=ETHERTYPE_RARP), hard_timeout_s=QUARANTINE_S),
        Flow(SOURCES, 50, Match(in_port=port), hard_timeout_s=QUARANTINE_S),
    ]


def silence(mac: str, port: int) -> Flow:
    """For some seconds a client's lies about this MAC are dropped without a word."""
    return Flow(GUARD, 200, Match(in_port=port, eth_src=mac), hard_timeout_s=QUARANTINE_S)


def difference(actual: Iterable[Flow], desired: Iterable[Flow]) -> list[FlowMod]:
    """What makes a switch's entries the desired ones; those that end by themselves are left alone."""
    there = {flow.key: flow for flow in actual}
    wanted = {flow.key: flow for flow in desired}
    adds = [FlowMod("add", flow) for key, flow in wanted.items() if there.get(key) != flow]
    gone = [FlowMod("delete", flow) for key, flow in there.items() if key not in wanted and not flow.hard_timeout_s]
    return adds + gone


# ---------------------------------------------------------------- on the wire

_HEADER = struct.Struct("!BBHI")  # version, type, length, xid
_VERSION, _FLOW_MOD, _BARRIER_REQUEST, _EXPERIMENTER = 4, 14, 20, 4
_FLOW_MOD_BODY = struct.Struct("!QQBBHHHIIIHxx")
_COMMANDS = {"add": 0, "delete": 4, "clear": 3}  # OFPFC_ADD, OFPFC_DELETE_STRICT, OFPFC_DELETE
_NO_BUFFER = 0xFFFFFFFF
_MATCH_HEAD = struct.Struct("!HH")
_OXM = {"in_port": (0, 4), "eth_dst": (3, 6), "eth_src": (4, 6), "eth_type": (5, 2)}  # field, bytes
_OXM_HEADS = {name: struct.pack("!HBB", 0x8000, field << 1, size) for name, (field, size) in _OXM.items()}
_OXM_NAMES = {field: name for name, (field, _) in _OXM.items()}
_OUTPUT = struct.Struct("!HHIH6x")
_APPLY_HEAD = struct.Struct("!HH4x")
_GOTO = struct.Struct("!HHB3x")
_GOTO_TABLE, _APPLY_ACTIONS = 1, 4
_STATS = struct.Struct("!HBxIIHHHH4xQQQ")  # of a flow, in a dump
_ONF, _BUNDLE_CONTROL, _BUNDLE_ADD = 0x4F4E4600, 2300, 2301
_EXPERIMENT = struct.Struct("!II")
_CONTROL = struct.Struct("!IHH")  # bundle, type, flags
_ADD = struct.Struct("!I2xH")
_OPEN, _COMMIT, _ATOMIC, _ORDERED = 0, 4, 1, 2


def encode(change: FlowMod, xid: int) -> bytes:
    """One OFPT_FLOW_MOD."""
    flow = change.flow
    body = _FLOW_MOD_BODY.pack(
        COOKIE,
        0,
        flow.table,
        _COMMANDS[change.command],
        0,
        flow.hard_timeout_s,
        flow.priority,
        _NO_BUFFER,
        _ANY,
        _ANY,
        0,
    )
    body += _encoded_match(flow.match) + (_encoded_instructions(flow) if change.command == "add" else b"")
    return _HEADER.pack(_VERSION, _FLOW_MOD, _HEADER.size + len(body), xid) + body


def is_change(message: bytes) -> bool:
    """Whether a message that a switch has refused was to change its entries, by its first bytes."""
    return message[1:2] in (bytes([_FLOW_MOD]), bytes([_EXPERIMENTER]))


def barrier(xid: int) -> bytes:
    return _HEADER.pack(_VERSION, _BARRIER_REQUEST, _HEADER.size, xid)


def bundle(changes: Iterable[FlowMod], number: int, xid: int) -> bytes:
    """All of them or none, at once for the datapath: open, add each, commit. A refusal is told with `xid`."""
    parts = [_experiment(_BUNDLE_CONTROL, _CONTROL.pack(number, _OPEN, _ATOMIC | _ORDERED), xid)]
    head = _ADD.pack(number, _ATOMIC | _ORDERED)
    parts += [_experiment(_BUNDLE_ADD, head + encode(change, xid), xid) for change in changes]
    parts.append(_experiment(_BUNDLE_CONTROL, _CONTROL.pack(number, _COMMIT, _ATOMIC | _ORDERED), xid))
    return b"".join(parts)


def _experiment(kind: int, body: bytes, xid: int) -> bytes:
    length = _HEADER.size + _EXPERIMENT.size + len(body)
    return _HEADER.pack(_VERSION, _EXPERIMENTER, length, xid) + _EXPERIMENT.pack(_ONF, kind) + body


def _encoded_match(match: Match) -> bytes:
    fields = b""
    if match.in_port is not None:
        fields += _OXM_HEADS["in_port"] + match.in_port.to_bytes(4, "big")
    if match.eth_dst is not None:
        fields += _OXM_HEADS["eth_dst"] + bytes.fromhex(match.eth_dst.replace(":", ""))
    if match.eth_src is not None:
        fields += _OXM_HEADS["eth_src"] + bytes.fromhex(match.eth_src.replace(":", ""))
    if match.eth_type is not None:
        fields += _OXM_HEADS["eth_type"] + match.eth_type.to_bytes(2, "big")
    length = _MATCH_HEAD.size + len(fields)
    return _MATCH_HEAD.pack(1, length) + fields + bytes(-length % 8)


def _encoded_instructions(flow: Flow) -> bytes:
    parts = b""
    if flow.output:
        ports = [_CONTROLLER if port == "controller" else port for port in flow.output]
        actions = b"".join(_OUTPUT.pack(0, _OUTPUT.size, port, PACKET_IN_BYTES) for port in ports)
        parts += _APPLY_HEAD.pack(_APPLY_ACTIONS, _APPLY_HEAD.size + len(actions)) + actions
    if flow.goto is not None:
        parts += _GOTO.pack(_GOTO_TABLE, _GOTO.size, flow.goto)
    return parts


class FlowStats(NamedTuple):
    """An entry as a switch tells it, in a dump; `flow` is None if it is none that we could have made."""

    length: int
    age_s: float
    packets: int
    flow: Flow | None

    @classmethod
    def parser(cls, data: bytes, offset: int) -> "FlowStats":
        """In the place of the framework's own class (controller/sdn_backend.py), which takes 0.1 ms for each."""
        length, table, seconds, nanoseconds, priority, _, hard, _, cookie, packets, _ = _STATS.unpack_from(data, offset)
        end = offset + max(length, _STATS.size)
        try:
            flow = _decoded(memoryview(data)[offset + _STATS.size : end], table, priority, hard)
        except (KeyError, ValueError, struct.error):
            flow = None
        age_s = seconds + nanoseconds / 1e9
        return cls(max(length, _STATS.size), age_s, packets, flow if cookie == COOKIE else None)


def _decoded(rest: memoryview, table: int, priority: int, hard: int) -> Flow:
    """Of the match and the instructions behind it. KeyError or ValueError: they are none of ours."""
    _, length = _MATCH_HEAD.unpack_from(rest)
    match = Match(**dict(_fields(rest[_MATCH_HEAD.size : length])))
    rest = rest[length + -length % 8 :]
    output: tuple[Output, ...] = ()
    goto = None
    while rest:
        kind, length = _MATCH_HEAD.unpack_from(rest)
        if kind == _GOTO_TABLE:
            goto = rest[4]
        elif kind == _APPLY_ACTIONS:
            output = tuple(_outputs(rest[_APPLY_HEAD.size : length]))
        else:
            raise ValueError(f"instruction {kind}")
        if not length:
            raise ValueError("an instruction without a length")
        rest = rest[length:]
    return Flow(table, priority, match, output, goto, hard)


def _fields(rest: memoryview) -> Iterator[tuple[str, Any]]:
    while rest:
        kind, field, size = struct.unpack_from("!HBB", rest)
        if kind != 0x8000 or field & 1:
            raise ValueError(f"match field {kind}/{field}")
        name, value = _OXM_NAMES[field >> 1], bytes(rest[4 : 4 + size])
        yield name, value.hex(":") if name in ("eth_dst", "eth_src") else int.from_bytes(value, "big")
        rest = rest[4 + size :]


def _outputs(rest: memoryview) -> Iterator[Output]:
    while rest:
        kind, length, port, _ = _OUTPUT.unpack_from(rest)
        if kind or length != _OUTPUT.size:
            raise ValueError(f"action {kind}")
        yield "controller" if port == _CONTROLLER else port
        rest = rest[length:]
