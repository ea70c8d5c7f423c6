"""The controller process: OpenFlow in, locations decided, OpenFlow out; and its launcher.

    python -m controller.app --listen 127.0.0.1 --port 6653 --events events.jsonl

Events, besides the t, source and kind that every event has; `switch` is the datapath id in 16 hex
digits, ports are OpenFlow numbers, times are CLOCK_MONOTONIC in ns:

    controller.listening  address, port
    switch.connected      switch, address     its tables hold the pipeline: what it sends now is learned
    switch.disconnected   switch
    switch.error          switch, type, code  it refused a message: OFPET_ and OFPxxFC_ numbers of OpenFlow 1.3
    mac.learned           mac, switch, port, cause                        cause: rarp, garp, frame, manager
    mac.forgotten         mac, switch, port                               the port went down or away
    mac.moved             mac, switch, from, to, cause, packet_in, flow_mod
    mac.relearned         the same and barrier (= t)                      the switch confirmed that move

`packet_in` is when the frame was handled here, `flow_mod` when the changes were handed to the
connection, `barrier` when the switch said it had processed them.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from controller import openflow
from controller.locations import Cause, Decision, Forgotten, Learned, Locations, Moved, classify
from controller.sdn_backend import (
    DEAD_DISPATCHER,
    MAIN_DISPATCHER,
    OPENFLOW_1_3,
    App,
    listen,
    ofp_event,
    set_ev_cls,
    start,
)
from topologies.errors import UsageError
from topologies.events import EventLog


class Mobility(App):
    """Makes every switch that connects a learning switch, and tells of each move."""

    OFP_VERSIONS = [OPENFLOW_1_3]

    def __init__(self, event_log: EventLog) -> None:
        super().__init__()
        self._log = event_log
        self._locations = Locations()
        self._datapaths: dict[str, Any] = {}
        # What to tell when the barrier of this transaction is answered: (switch, xid) -> (kind, fields)
        self._unconfirmed: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {}

    # ------------------------------------------------------------ from the switches

    @set_ev_cls(ofp_event.EventOFPStateChange, [MAIN_DISPATCHER, DEAD_DISPATCHER])
    def _state_changed(self, event: Any) -> None:
        datapath = event.datapath
        if event.state == MAIN_DISPATCHER:
            switch = _name(datapath)
            if switch in self._datapaths:  # it came back before its old connection was known to be dead
                self._lost(switch)
            self._datapaths[switch] = datapath
            xid = self._send(datapath, openflow.pipeline())
            self._unconfirmed[switch, xid] = "switch.connected", {"switch": switch, "address": datapath.address[0]}
        elif self._is_current(datapath):
            self._lost(_name(datapath))

    def _lost(self, switch: str) -> None:
        """A switch without its controller changes on its own: when it is back, it starts from nothing."""
        del self._datapaths[switch]
        self._locations.forget_switch(switch)
        for key in [key for key in self._unconfirmed if key[0] == switch]:
            del self._unconfirmed[key]
        self._log.emit("switch.disconnected", switch=switch)

    @set_ev_cls(ofp_event.EventOFPPacketIn, MAIN_DISPATCHER)
    def _packet_in(self, event: Any) -> None:
        now_ns = time.monotonic_ns()
        message = event.msg
        source = classify(message.data)
        if source is not None and self._is_current(message.datapath):
            self.steer(_name(message.datapath), source.mac, message.match["in_port"], source.kind, now_ns)

    @set_ev_cls(ofp_event.EventOFPPortStatus, MAIN_DISPATCHER)
    def _port_status(self, event: Any) -> None:
        message, ofp = event.msg, event.msg.datapath.ofproto
        port = message.desc
        is_down = port.state & ofp.OFPPS_LINK_DOWN or port.config & ofp.OFPPC_PORT_DOWN
        if (message.reason == ofp.OFPPR_DELETE or is_down) and self._is_current(message.datapath):
            for decision in self._locations.forget_port(_name(message.datapath), port.port_no):
                self._carry_out(decision)

    @set_ev_cls(ofp_event.EventOFPBarrierReply, MAIN_DISPATCHER)
    def _barrier_reply(self, event: Any) -> None:
        now_ns = time.monotonic_ns()
        kind, fields = self._unconfirmed.pop((_name(event.msg.datapath), event.msg.xid), (None, {}))
        if kind == "mac.relearned":
            fields["barrier"] = now_ns
        if kind is not None:
            self._log.emit(kind, t=now_ns, **fields)

    @set_ev_cls(ofp_event.EventOFPErrorMsg, MAIN_DISPATCHER)
    def _refused(self, event: Any) -> None:
        """The switch refused a change, a full table for instance; a barrier alone would not tell."""
        message = event.msg
        self._log.emit("switch.error", switch=_name(message.datapath), type=message.type, code=message.code)

    # ------------------------------------------------------------ to the switches

    def steer(self, switch: str, mac: str, port: int, cause: Cause, time_ns: int) -> None:
        """Frames for `mac` go to `port` of this switch from now on, whoever says so."""
        for decision in self._locations.place(switch, mac, port, cause, time_ns):
            self._carry_out(decision)

    def _carry_out(self, decision: Decision) -> None:
        """Change the switch first, tell of it afterwards: writing must not delay a move."""
        xid = self._send(self._datapaths[decision.switch], openflow.flow_mods(decision))
        fields: dict[str, Any] = {"mac": decision.mac, "switch": decision.switch}
        match decision:
            case Learned():
                self._log.emit("mac.learned", **fields, port=decision.port, cause=decision.cause)
            case Forgotten():
                self._log.emit("mac.forgotten", **fields, port=decision.port)
            case Moved():
                fields |= {"from": decision.old_port, "to": decision.new_port, "cause": decision.cause}
                fields |= {"packet_in": decision.time_ns, "flow_mod": time.monotonic_ns()}
                self._unconfirmed[decision.switch, xid] = "mac.relearned", fields
                self._log.emit("mac.moved", **fields)

    @staticmethod
    def _send(datapath: Any, changes: Sequence[openflow.FlowMod]) -> int:
        """Send the changes and a barrier behind them; returns the barrier's transaction id."""
        for message in openflow.messages(datapath, changes):
            datapath.send_msg(message)
        barrier = datapath.ofproto_parser.OFPBarrierRequest(datapath)
        xid: int = datapath.set_xid(barrier)
        datapath.send_msg(barrier)
        return xid

    def _is_current(self, datapath: Any) -> bool:
        """False for a connection that never came up or that a newer one of the same switch replaced."""
        return datapath.id is not None and self._datapaths.get(_name(datapath)) is datapath


def _name(datapath: Any) -> str:
    return f"{datapath.id:016x}"


# ---------------------------------------------------------------- launcher


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)  # one line, without argparse's usage text


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m controller.app", description="The mobility controller (OpenFlow 1.3).")
    parser.add_argument("--listen", default="127.0.0.1", metavar="ADDRESS", help="default %(default)s")
    parser.add_argument("--port", default=6653, type=int, help="TCP port, default %(default)s; 0 for any free one")
    parser.add_argument("--events", default=os.devnull, metavar="PATH", help="append events here; default: none")
    parser.add_argument("--log-level", default="warning", choices=["debug", "info", "warning", "error"])
    options = parser.parse_args(words)
    if not 0 <= options.port <= 65535:
        raise UsageError(f"argument --port: {options.port} is no TCP port; choose one of 0 to 65535")
    return options


def _run(words: Sequence[str] | None) -> None:
    options = _parse(words)
    logging.basicConfig(level=options.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    stopped = _stop_signals()
    try:
        event_log = EventLog(options.events, "controller")
    except OSError as error:
        raise UsageError(f"cannot write to {options.events}: {error.strerror}; choose another --events") from error
    try:
        listener = listen(options.listen, options.port)
    except OSError as error:
        where = f"{options.listen} port {options.port}"
        raise UsageError(f"cannot listen on {where}: {error.strerror}; choose another --listen or --port") from error
    start(listener, Mobility, event_log)
    address, port = listener.getsockname()[:2]
    event_log.emit("controller.listening", address=address, port=port)
    stopped.recv(1)


def _stop_signals() -> socket.socket:
    """A socket that becomes readable at SIGTERM or SIGINT.

    An exception raised by a handler would end whichever greenlet happens to run, and only that one.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    return reader


def main(words: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    try:
        _run(words)
    except UsageError as error:
        print(f"controller: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
