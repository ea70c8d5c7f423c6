"""A switch that is connected: what the controller tells it, and asks it."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from controller import openflow
from controller.network import Port
from controller.openflow import Flow, FlowMod, FlowStats
from controller.sdn_backend import Reply, wait_for_reply

_ANSWER_WITHIN_S = 10.0
_HIGHEST_PORT = 0xFFFFFF00  # those above are no cables (OFPP_MAX)


class SwitchGone(Exception):
    """It does not answer any more."""


class Switch:
    """One connection of a switch; `name` is its datapath id in 16 hex digits."""

    def __init__(self, datapath: Any) -> None:
        self.datapath = datapath
        self.name = name_of(datapath)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these are not kept up to date, and that is known
            ports = dict(datapath.ports)
        self.ports = {number: port.name.decode() for number, port in ports.items() if is_cable(number)}
        self.down = {number for number, port in ports.items() if is_down(port, datapath.ofproto)}
        self.is_synced = False
        self.refused = False  # a change; it is known no more what its tables say
        self._bundles = 0
        self._confirmed: dict[int, Callable[[], None]] = {}  # xid of a barrier -> what it was for
        self._dumps: dict[int, tuple[list[FlowStats], Reply]] = {}  # by xid

    # ------------------------------------------------------------ told

    def send(self, changes: Iterable[FlowMod], confirmed: Callable[[], None] | None = None) -> None:
        """The changes, and a barrier behind them; `confirmed` is called when that is answered."""
        data = b"".join(openflow.encode(change, self._xid()) for change in changes)
        self._with_barrier(data, confirmed)

    def send_at_once(self, changes: list[FlowMod], confirmed: Callable[[], None] | None = None) -> None:
        """The same in a bundle: all of them or none, and no frame meets half of them."""
        self._bundles += 1
        self._with_barrier(openflow.bundle(changes, self._bundles, self._xid()) if changes else b"", confirmed)

    def _with_barrier(self, data: bytes, confirmed: Callable[[], None] | None) -> None:
        xid = self._xid()
        if confirmed is not None:
            self._confirmed[xid] = confirmed
        self.datapath.send(data + openflow.barrier(xid))

    def send_frames(self, frames: Iterable[tuple[int, bytes]]) -> None:
        """Each through a port of the switch."""
        ofp, parser = self.datapath.ofproto, self.datapath.ofproto_parser
        for number, frame in frames:
            actions = [parser.OFPActionOutput(number)]
            out = parser.OFPPacketOut(self.datapath, ofp.OFP_NO_BUFFER, ofp.OFPP_CONTROLLER, actions, frame)
            self.datapath.send_msg(out)

    # ------------------------------------------------------------ asked

    def dump(self) -> list[FlowStats]:
        """All its entries; SwitchGone if it does not say. Waits, in a greenlet of its own."""
        ofp, parser = self.datapath.ofproto, self.datapath.ofproto_parser
        everything = parser.OFPMatch()
        request = parser.OFPFlowStatsRequest(
            self.datapath, 0, ofp.OFPTT_ALL, ofp.OFPP_ANY, ofp.OFPG_ANY, 0, 0, everything
        )
        xid = self.datapath.set_xid(request)
        stats, reply = self._dumps[xid] = [], Reply()
        self.datapath.send_msg(request)
        if not wait_for_reply(reply, _ANSWER_WITHIN_S):
            self._dumps.pop(xid, None)
            raise SwitchGone(self.name)
        return stats

    def dumped(self, xid: int, part: list[FlowStats], is_last: bool) -> None:
        if xid in self._dumps:
            stats, reply = self._dumps[xid]
            stats += part
            if is_last:
                del self._dumps[xid]
                reply.send(True)

    def flows(self) -> list[Flow]:
        return [stats.flow for stats in self.dump() if stats.flow is not None]

    def barrier_reply(self, xid: int) -> None:
        confirmed = self._confirmed.pop(xid, None)
        if confirmed is not None:
            confirmed()

    # ------------------------------------------------------------ its ports

    @property
    def up(self) -> set[int]:
        """Those that have a link."""
        return self.ports.keys() - self.down

    def cables(self) -> list[Port]:
        return [Port(self.name, number) for number in sorted(self.ports)]

    def _xid(self) -> int:
        self.datapath.xid = (self.datapath.xid + 1) & self.datapath.ofproto.MAX_XID
        xid: int = self.datapath.xid
        return xid


def is_down(port: Any, ofp: Any) -> bool:
    """Of a port as the switch describes it."""
    return bool(port.state & ofp.OFPPS_LINK_DOWN or port.config & ofp.OFPPC_PORT_DOWN)


def is_cable(number: int) -> bool:
    return number <= _HIGHEST_PORT


def name_of(datapath: Any) -> str:
    return f"{datapath.id:016x}"
