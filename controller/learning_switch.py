"""The textbook's learning switch, to compare with: what Ryu's own simple_switch_13 does. It does not see a move.

The first frame between two MACs comes to the controller, which notes where its sender is, and makes an entry for
(in_port, eth_src, eth_dst) if it knows where the receiver is. The entry has no time-out. When the receiver moves, its
frames do tell the controller; but those of its peers go on to the old port by entries that nobody takes away.
"""

from typing import Any

from controller.sdn_backend import MAIN_DISPATCHER, OPENFLOW_1_3, App, ofp_event, set_ev_cls
from topologies.events import EventLog


class LearningSwitch(App):
    """One table; MAC -> port for each switch."""

    OFP_VERSIONS = [OPENFLOW_1_3]

    def __init__(self, event_log: EventLog) -> None:
        super().__init__()
        self._log = event_log
        self._ports: dict[int, dict[str, int]] = {}

    @set_ev_cls(ofp_event.EventOFPStateChange, MAIN_DISPATCHER)
    def _connected(self, event: Any) -> None:
        datapath = event.datapath
        ofp, parser = datapath.ofproto, datapath.ofproto_parser
        self._ports[datapath.id] = {}
        gone = parser.OFPFlowMod(
            datapath, command=ofp.OFPFC_DELETE, table_id=ofp.OFPTT_ALL, out_port=ofp.OFPP_ANY, out_group=ofp.OFPG_ANY
        )
        datapath.send_msg(gone)
        self._add(datapath, 0, parser.OFPMatch(), parser.OFPActionOutput(ofp.OFPP_CONTROLLER, ofp.OFPCML_NO_BUFFER))
        self._log.emit("switch.connected", switch=f"{datapath.id:016x}", address=datapath.address[0])

    @set_ev_cls(ofp_event.EventOFPPacketIn, MAIN_DISPATCHER)
    def _packet_in(self, event: Any) -> None:
        message = event.msg
        datapath, in_port, frame = message.datapath, message.match["in_port"], message.data
        ofp, parser = datapath.ofproto, datapath.ofproto_parser
        destination, source = frame[0:6].hex(":"), frame[6:12].hex(":")
        ports = self._ports[datapath.id]
        ports[source] = in_port
        output = parser.OFPActionOutput(ports.get(destination, ofp.OFPP_FLOOD))
        if destination in ports:
            self._add(datapath, 1, parser.OFPMatch(in_port=in_port, eth_dst=destination, eth_src=source), output)
        datapath.send_msg(parser.OFPPacketOut(datapath, ofp.OFP_NO_BUFFER, in_port, [output], frame))

    @staticmethod
    def _add(datapath: Any, priority: int, match: Any, output: Any) -> None:
        ofp, parser = datapath.ofproto, datapath.ofproto_parser
        instructions = [parser.OFPInstructionActions(ofp.OFPIT_APPLY_ACTIONS, [output])]
        datapath.send_msg(parser.OFPFlowMod(datapath, priority=priority, match=match, instructions=instructions))
