"""Decisions -> flow-mods. Pure up to `messages`, which words them for one switch's OpenFlow version.

Two tables, so that the switch forwards every frame by itself and the controller never carries one:

                table 0: who sent it?                           table 1: where to?
          +----------------------------------+          +----------------------------+
          | 200  RARP          -> controller |          |                            |
          |                       and table 1|          |  100  eth_dst known        |
  frame   |                                  |  frame   |         -> its port        |
  ------> | 100  in_port and eth_src known   | -------> |                            | ------>
          |                    -> table 1    |          |    0  else -> flood        |
          |                                  |          |       (all but in_port)    |
          |   0  else          -> controller |          |                            |
          |                       and table 1|          |                            |
          +----------------------------------+          +----------------------------+

A known source at its known port costs the controller nothing; the same source at any other port
misses and is reported with its first frame. An RARP is reported whatever the table knows.

A MAC that moves from port a to port b (three flow-mods; the sender of them adds a barrier):

1) table 1: ADD eth_dst -> b. Same match and priority as the entry to a: it is overwritten in
   one step, at no moment does the switch flood or forget.
2) table 0: DELETE_STRICT (a, eth_src), so that a return to a is noticed again.
3) table 0: ADD (b, eth_src), so that the new place is no news any more.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from controller.locations import Decision, Forgotten, Learned, Moved

SOURCES, DESTINATIONS = 0, 1  # tables
ETHERTYPE_RARP = 0x8035
# A packet-in carries the first bytes of its frame: the headers, and all of an ARP packet.
PACKET_IN_BYTES = 128
# Sets our entries apart in a dump of the flows: "vmot".
COOKIE = 0x766D6F74

_ANNOUNCEMENT, _KNOWN, _MISS = 200, 100, 0  # priorities

Command = Literal["add", "delete_strict", "delete_all"]
Output = int | Literal["controller", "flood"]


@dataclass(frozen=True)
class FlowMod:
    """A change of one table entry; `match` in OXM field names, `output` before `goto`."""

    command: Command
    table: int = SOURCES
    priority: int = _MISS
    match: dict[str, int | str] = field(default_factory=dict)
    output: tuple[Output, ...] = ()
    goto: int | None = None


def pipeline() -> list[FlowMod]:
    """What a switch that has just connected gets: empty tables and the entries that are always there."""
    rarp: dict[str, int | str] = {"eth_type": ETHERTYPE_RARP}
    return [
        FlowMod("delete_all"),
        FlowMod("add", DESTINATIONS, _MISS, output=("flood",)),
        FlowMod("add", SOURCES, _ANNOUNCEMENT, rarp, output=("controller",), goto=DESTINATIONS),
        FlowMod("add", SOURCES, _MISS, output=("controller",), goto=DESTINATIONS),
    ]


def flow_mods(decision: Decision) -> list[FlowMod]:
    """What a decision changes in the tables of its switch."""
    match decision:
        case Learned(mac, _, port):
            return [_add_destination(mac, port), _add_source(mac, port)]
        case Moved(mac, _, old_port, new_port):
            return [
                _add_destination(mac, new_port),  # 1
                _delete_source(mac, old_port),  # 2
                _add_source(mac, new_port),  # 3
            ]
        case Forgotten(mac, _, port):
            return [FlowMod("delete_strict", DESTINATIONS, _KNOWN, {"eth_dst": mac}), _delete_source(mac, port)]


def _add_destination(mac: str, port: int) -> FlowMod:
    return FlowMod("add", DESTINATIONS, _KNOWN, {"eth_dst": mac}, output=(port,))


def _add_source(mac: str, port: int) -> FlowMod:
    return FlowMod("add", SOURCES, _KNOWN, {"in_port": port, "eth_src": mac}, goto=DESTINATIONS)


def _delete_source(mac: str, port: int) -> FlowMod:
    return FlowMod("delete_strict", SOURCES, _KNOWN, {"in_port": port, "eth_src": mac})


def messages(datapath: Any, changes: Iterable[FlowMod]) -> list[Any]:
    """OpenFlow 1.3 messages for a connected switch, in the same order."""
    return [_message(datapath, change) for change in changes]


def _message(datapath: Any, change: FlowMod) -> Any:
    ofp, parser = datapath.ofproto, datapath.ofproto_parser
    commands = {"add": ofp.OFPFC_ADD, "delete_strict": ofp.OFPFC_DELETE_STRICT, "delete_all": ofp.OFPFC_DELETE}
    ports = {"controller": ofp.OFPP_CONTROLLER, "flood": ofp.OFPP_FLOOD}
    numbers = [port if isinstance(port, int) else ports[port] for port in change.output]
    actions = [parser.OFPActionOutput(number, PACKET_IN_BYTES) for number in numbers]
    instructions = [parser.OFPInstructionActions(ofp.OFPIT_APPLY_ACTIONS, actions)] if actions else []
    if change.goto is not None:
        instructions.append(parser.OFPInstructionGotoTable(change.goto))
    return parser.OFPFlowMod(
        datapath,
        cookie=COOKIE,
        table_id=ofp.OFPTT_ALL if change.command == "delete_all" else change.table,
        command=commands[change.command],
        priority=change.priority,
        match=parser.OFPMatch(**change.match),
        instructions=instructions,
        out_port=ofp.OFPP_ANY,
        out_group=ofp.OFPG_ANY,
    )
