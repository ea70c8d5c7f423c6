"""The SDN controller's application: OpenFlow in, locations decided, OpenFlow out.

What it decides is in pure modules: where a MAC is (locations), whether to believe it (guard), which trunks there are
(discovery, network), what the tables have to say (forwarding), how that is said (openflow). Here is when.

Events, besides the t, source and kind that every event has; `switch` is the datapath id in 16 hex
digits, ports are OpenFlow numbers, times are CLOCK_MONOTONIC in ns:

    controller.listening  address, port
    switch.connected      switch, address, kept, added, deleted, ms   its tables are as they have to be: what it sends
                                                                  now is learned. Entries it had, got, and lost by
                                                                  that; how long it took
    switch.disconnected   switch                                  it goes on with the entries it has
    switch.error          switch, type, code  it refused a message: OFPET_ and OFPxxFC_ numbers of OpenFlow 1.3; if it
                                              was a change, all its entries are compared again, a little later
    mac.learned           mac, switch, port, cause                        cause: rarp, garp, frame, manager
    mac.forgotten         mac, switch, port                               the port went down or away
    mac.held              mac, switch, from_switch, from, to, cause       not announced: the old place is asked
    mac.stays             mac, switch, port                       it was held for this port, which is down now
    mac.moved             mac, switch, from_switch, from, to, cause, announced, packet_in, flow_mod
    mac.relearned         the same and barrier (= t)                      every switch confirmed that move
    mac.refused           mac, switch, port, node, cause, reason, times   an alarm; at most one a second for each
                                                                          port and reason, `times` since the last
    port.quarantined      switch, port, node                              the switch drops what is unknown from there
    trunk.up, trunk.down  switch, port, other_switch, other_port
    intent.taken          mac, from, to                                   the manager's word (controller/intents.py)

`packet_in` is when the frame was handled here, `flow_mod` when the changes were handed to the first connection,
`barrier` when the last switch said it had processed them.
"""

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

from controller import discovery, openflow
from controller.discovery import Change, Discovery
from controller.forwarding import Forwarding, Step
from controller.guard import HOLD_S, NOT_THERE, TOO_MANY, Guard, Intent, Policy
from controller.locations import (
    Cause,
    Decision,
    Forgotten,
    Held,
    Learned,
    Locations,
    Moved,
    Refused,
    Source,
    classify,
)
from controller.network import Network, Port
from controller.openflow import Flow, FlowMod, FlowStats
from controller.probe import arp_probe
from controller.sdn_backend import (
    DEAD_DISPATCHER,
    MAIN_DISPATCHER,
    OPENFLOW_1_3,
    App,
    ofp_event,
    read_flow_stats_as,
    set_ev_cls,
    sleep,
    spawn,
)
from controller.switches import Switch, SwitchGone, is_cable, is_down, name_of
from topologies.events import EventLog

_MOVES_REMEMBERED = 1000
_IPS_REMEMBERED = 20_000
_ALARM_EVERY_S = 1.0
_SETTLE_WITHIN_S = 10.0  # a switch that has lost its controller asks again after 8 s at most (Open vSwitch)
_AGAIN_AFTER_S = 5.0  # what a switch has refused
_LATE_S = 2 * discovery.EVERY_S
_HOLD_AT_MOST_S = 1.0  # a switch may not say that it has told all
_NETWORK = "the network"  # in the place of a MAC


class Mobility(App):
    """Makes the switches that connect one learning network, and tells of each move."""

    OFP_VERSIONS = [OPENFLOW_1_3]

    def __init__(self, event_log: EventLog, policy: Policy | None = None) -> None:
        super().__init__()
        self._log = event_log
        self.guard = Guard(policy)
        self.network, self.locations = Network(), Locations(self.guard)
        self.switches: dict[str, Switch] = {}
        self.moves: deque[dict[str, Any]] = deque(maxlen=_MOVES_REMEMBERED)
        self.alarms = self.packet_ins = 0
        self.forwarding = Forwarding(self.network, self.locations)
        self._discovery = Discovery()
        self._ips = self._known_ips()  # MAC -> where it can be asked
        self._rest: dict[str, list[Step]] = {}  # MAC that moves -> what follows once its new edge has confirmed
        self._awaited: set[Port] = set()  # trunks that inherited entries lead over, and that have not been found yet
        self._settle_at_s = inf
        self._is_changed = False  # the network, while it is still being rerouted
        self._ports_of: dict[str, dict[int, str]] = {}  # of each switch, when it was connected last
        self._alarmed: dict[tuple[Port, str], tuple[float, int]] = {}  # -> when, how often since
        read_flow_stats_as(FlowStats)

    def start(self) -> Any:
        spawn(self._look_around)
        return super().start()

    # ------------------------------------------------------------ switches come and go

    @set_ev_cls(ofp_event.EventOFPStateChange, [MAIN_DISPATCHER, DEAD_DISPATCHER])
    def _state_changed(self, event: Any) -> None:
        datapath = event.datapath
        if event.state == MAIN_DISPATCHER:
            switch = Switch(datapath)
            if switch.name in self.switches:  # it came back before its old connection was known to be dead
                self._lost(switch.name)
            self.switches[switch.name] = switch
            spawn(self._take_on, switch)
        elif (lost := self._of(datapath)) is not None:
            self._lost(lost.name)

    def _take_on(self, switch: Switch) -> None:
        """Its entries are the memory of its locations; what differs from what they have to be is changed at once."""
        began_ns = time.monotonic_ns()
        try:
            stats = switch.dump()
        except SwitchGone:  # alive or not: it has to begin anew
            switch.datapath.close()
            return
        if self.switches.get(switch.name) is not switch:
            return
        self._flush()
        switch.refused = False
        youngest_first = sorted(stats, key=lambda entry: entry.age_s)
        kept = [entry.flow for entry in youngest_first if entry.flow is not None]
        self._take_ports(switch, kept)
        self._adopt(switch, kept)
        desired = self.forwarding.desired(switch.name)
        if len(kept) < len(stats):  # the others are not ours: nothing of them may stay
            changes, deleted = [openflow.CLEAR, *(FlowMod("add", flow) for flow in desired)], len(stats)
        else:
            changes = openflow.difference(kept, desired)
            deleted = len({flow for flow in kept if not flow.hard_timeout_s} - set(desired))
        added = sum(change.command == "add" for change in changes)
        fields = {"kept": len(stats) - deleted, "added": added, "deleted": deleted}
        switch.is_synced = True
        switch.send_at_once(changes, partial(self._taken_on, switch, fields, began_ns))
        self._discover([switch])

    def _take_ports(self, switch: Switch, kept: list[Flow]) -> None:
        """Those that it has; those that went away or down while it was, with the MACs that were there."""
        before = self._ports_of.get(switch.name, {})
        self._ports_of[switch.name] = switch.ports
        gone = {number for number, name in before.items() if switch.ports.get(number) != name}
        for port in [Port(switch.name, number) for number in sorted(gone)]:
            self.forwarding.remove_port(port)
        for port in self.locations.ports(switch.name):
            if port.number in gone or port.number not in switch.up:
                for decision in self.locations.forget_port(port):
                    self._carry_out(decision)
        if switch.name not in self.network.switches or not self.forwarding.is_settled:
            self._inherit(switch, kept)
        self.network.add_switch(switch.name)
        for number in sorted(gone | switch.down):
            self._carry_on(self._discovery.lose(Port(switch.name, number)))
        for number in switch.ports:
            self._name_port(switch, number)

    def _inherit(self, switch: Switch, kept: list[Flow]) -> None:
        needed = self.forwarding.inherit(switch.name, kept)
        for port in needed:
            self.guard.become_trunk(port, is_trunk=True)
        self._awaited |= {port for port in needed if port.number in switch.up}  # nothing will be heard of the others
        if needed:
            self._settle_at_s = min(self._settle_at_s, time.monotonic() + _SETTLE_WITHIN_S)

    def _settle(self) -> None:
        """The trunks that were awaited have been found; those that were not are none."""
        awaited, self._awaited, self._settle_at_s = self._awaited, set(), inf
        self.forwarding.settle()
        for port in awaited:
            self._become_trunk(port, is_up=False)
        self._reroute()

    def _adopt(self, switch: Switch, kept: list[Flow]) -> None:
        for mac in [flow.match.eth_src for flow in kept if flow.table == openflow.GUARD and not flow.hard_timeout_s]:
            if mac is not None:  # an intent has said so to a controller before us
                self.guard.vms.add(mac)
        for flow in kept:
            mac, number = flow.match.eth_src, flow.match.in_port
            if flow.table == openflow.SOURCES and mac is not None and number is not None and number in switch.up:
                self.locations.adopt(mac, Port(switch.name, number))

    def _taken_on(self, switch: Switch, counts: dict[str, int], began_ns: int) -> None:
        if switch.refused:
            return
        fields = {"switch": switch.name, "address": switch.datapath.address[0], **counts}
        self._log.emit("switch.connected", **fields, ms=(time.monotonic_ns() - began_ns) / 1e6)
        if self.network.trunks():  # ways may lead through it again
            self._reroute()
        self._ask_all(switch)

    def _ask_all(self, switch: Switch) -> None:
        """Where the VMs are: one may have moved while nobody looked, and says nothing by itself."""
        probes = [arp_probe(ip) for ip in self.guard.policy.vms.values() if ip]
        edges = [port.number for port in switch.cables() if self.guard.place(port).role == "uplink"]
        switch.send_frames((number, probe) for probe in probes for number in edges)

    def _lost(self, name: str) -> None:
        """It goes on with the entries that it has; so its locations stay, and its trunks."""
        self._flush()
        del self.switches[name]
        self.forwarding.lose_switch(name)
        self._log.emit("switch.disconnected", switch=name)
        if self.network.trunks():
            self._reroute()

    # ------------------------------------------------------------ frames

    @set_ev_cls(ofp_event.EventOFPPacketIn, MAIN_DISPATCHER)
    def _packet_in(self, event: Any) -> None:
        now_ns, message = time.monotonic_ns(), event.msg
        switch = self._of(message.datapath)
        self.packet_ins += 1
        if switch is None or not switch.is_synced:
            return
        port = Port(switch.name, message.match["in_port"])
        source = classify(message.data)
        if source is not None:
            self._seen(source, port, now_ns)
        elif (said := discovery.sender(message.data)) is not None and self._may_be_trunk(port):
            self._carry_on(self._discovery.hear(said, port, now_ns / 1e9))

    def _seen(self, source: Source, port: Port, now_ns: int) -> None:
        if source.ip and self.locations.at(source.mac) in (None, port):
            if len(self._ips) >= _IPS_REMEMBERED:
                self._ips = self._known_ips()
            self._ips.setdefault(source.mac, source.ip)
        self.steer(source.mac, port, source.kind, now_ns)

    def _known_ips(self) -> dict[str, str]:
        return {**self.guard.policy.clients, **self.guard.policy.vms}

    def steer(self, mac: str, port: Port, cause: Cause, time_ns: int) -> None:
        """Frames for `mac` go to this port from now on, whoever says so, if it is to be believed."""
        decision = self.locations.place(mac, port, cause, time_ns)
        if decision is not None:
            self._carry_out(decision)

    # ------------------------------------------------------------ decisions

    def _carry_out(self, decision: Decision) -> None:
        """Change the switches first, tell of it afterwards: writing must not delay a move."""
        self._flush(decision.mac)
        match decision:
            case Learned(mac, at, cause, _):
                self._send(self.forwarding.steps(decision))
                self._log.emit("mac.learned", mac=mac, switch=at.switch, port=at.number, cause=cause)
            case Forgotten(mac, at):
                self._send(self.forwarding.steps(decision))
                self._log.emit("mac.forgotten", mac=mac, switch=at.switch, port=at.number)
            case Moved():
                self._move(decision)
            case Held(mac, old, new, cause, _):
                spawn(self._decide_soon, decision)
                self._send(self.forwarding.steps(decision))
                if (ip := self._ips.get(mac)) and old.switch in self.switches:
                    self.switches[old.switch].send_frames([(old.number, arp_probe(ip))])
                self._log.emit("mac.held", mac=mac, **_from_to(old, new), cause=cause)
            case Refused(mac, at, reason=reason) if reason == NOT_THERE:  # nobody has lied
                self._send(self.forwarding.steps(decision))
                self._log.emit("mac.stays", mac=mac, switch=at.switch, port=at.number)
            case Refused():
                self._send(self.forwarding.steps(decision))
                self._alarm(decision)

    def _move(self, moved: Moved) -> None:
        """The new edge is told first, and the others once it has confirmed: before, frames sent there are lost."""
        first, *rest = self.forwarding.steps(moved) or [Step(moved.new.switch, [])]
        fields: dict[str, Any] = {"mac": moved.mac, **_from_to(moved.old, moved.new)}
        fields |= {"cause": moved.cause, "announced": moved.announced, "packet_in": moved.time_ns}
        if rest:
            self._rest[moved.mac] = rest
        self._send([first], partial(self._first_confirmed, moved.mac, fields, rest))
        fields["flow_mod"] = time.monotonic_ns()
        self.moves.append(fields)
        self._log.emit("mac.moved", **fields)

    def _first_confirmed(self, mac: str, fields: dict[str, Any], rest: list[Step]) -> None:
        if rest and self._rest.get(mac) is rest:
            del self._rest[mac]
            self._send(rest, partial(self._relearned, fields))
        else:  # there is none, or a newer move was faster and has sent it
            self._relearned(fields)

    def _relearned(self, fields: dict[str, Any]) -> None:
        fields["barrier"] = time.monotonic_ns()
        self._log.emit("mac.relearned", t=fields["barrier"], **fields)

    def _flush(self, mac: str = "") -> None:
        """What waits for a confirmation is sent now, of the network and a MAC, or of all: it must not come later."""
        for waiting in [mac] if mac else list(self._rest):
            self._send_rest(waiting)
        while _NETWORK in self._rest:
            self._send_rest(_NETWORK)

    def _send_rest(self, waiting: str) -> None:
        self._send(self._rest.pop(waiting, []), at_once=waiting == _NETWORK)
        if waiting == _NETWORK and self._is_changed:
            self._is_changed = False
            self._reroute()

    def _send(self, steps: list[Step], confirmed: Callable[[], None] | None = None, *, at_once: bool = False) -> None:
        """To those switches that are there; one that is not is compared when it is back. `at_once`: all or nothing."""
        told = [(self.switches[step.switch], step.changes) for step in steps if step.switch in self.switches]
        waiting = len(told)

        def one_more() -> None:
            nonlocal waiting
            waiting -= 1
            if not waiting and confirmed is not None:
                confirmed()

        for switch, changes in told:
            (switch.send_at_once if at_once else switch.send)(changes, one_more)
        if not told and confirmed is not None:
            confirmed()

    def _decide_soon(self, held: Held) -> None:
        """Once the switch at the old place has told all that it has seen until then."""
        sleep(HOLD_S)
        self._send([Step(held.old.switch, [])], partial(self._decide, held))

    def _decide(self, held: Held) -> None:
        decision = self.locations.believe(held, time.monotonic_ns())
        if decision is not None:
            self._carry_out(decision)

    def _alarm(self, refused: Refused) -> None:
        """The first at once, then one a second with how many there were: an attacker must not fill the disk."""
        self.alarms += 1
        is_a_lie = refused.reason != TOO_MANY and self.guard.place(refused.at).role == "client"
        if is_a_lie:  # the switch need not tell it again
            lies = openflow.silence(refused.mac, refused.at.number)
            self._send([Step(refused.at.switch, [FlowMod("add", lies)])])
        key, now_s = (refused.at, refused.reason), refused.time_ns / 1e9
        last_s, times = self._alarmed.get(key, (float("-inf"), 0))
        if now_s - last_s < _ALARM_EVERY_S:
            self._alarmed[key] = last_s, times + 1
            return
        self._alarmed[key] = now_s, 0
        at, node = refused.at, self.guard.place(refused.at).node
        fields: dict[str, Any] = {"mac": refused.mac, "switch": at.switch, "port": at.number, "node": node}
        self._log.emit("mac.refused", **fields, cause=refused.cause, reason=refused.reason, times=times + 1)
        if refused.reason == TOO_MANY:
            self._send([Step(at.switch, [FlowMod("add", flow) for flow in openflow.quarantine(at.number)])])
            self._log.emit("port.quarantined", switch=at.switch, port=at.number, node=node)

    # ------------------------------------------------------------ ports and trunks

    @set_ev_cls(ofp_event.EventOFPPortStatus, MAIN_DISPATCHER)
    def _port_status(self, event: Any) -> None:
        message, ofp = event.msg, event.msg.datapath.ofproto
        switch, described = self._of(message.datapath), message.desc
        if switch is None or not is_cable(described.port_no):
            return
        port = Port(switch.name, described.port_no)
        has_no_link = is_down(described, ofp)
        (switch.down.add if has_no_link else switch.down.discard)(port.number)
        self._flush(_NETWORK)
        if message.reason == ofp.OFPPR_DELETE or has_no_link:
            for decision in self.locations.forget_port(port):
                self._carry_out(decision)
            self._carry_on(self._discovery.lose(port))
            self._found({port})
        before = switch.ports.pop(port.number, None)
        if message.reason != ofp.OFPPR_DELETE:
            switch.ports[port.number] = described.name.decode()
        if not switch.is_synced:
            return
        if message.reason == ofp.OFPPR_DELETE:
            self._send([self.forwarding.remove_port(port)])
        elif switch.ports[port.number] != before:
            self._send([self._name_port(switch, port.number)])
        if self.network.trunks() and switch.ports.get(port.number) != before:  # somebody may be where nobody was
            self._reroute()
        if not has_no_link:
            self._discover([switch])

    def _name_port(self, switch: Switch, number: int) -> Step:
        self.guard.name_port(Port(switch.name, number), switch.ports[number])
        return self.forwarding.add_port(Port(switch.name, number))

    def _may_be_trunk(self, port: Port) -> bool:
        """A client that speaks LLDP is no switch."""
        return not self.guard.is_on or self.guard.place(port).role == "trunk"

    def _look_around(self) -> None:
        """For ever: who is silent, and what has waited for too long."""
        waited: dict[str, list[Step]] = {}
        before_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            self._discover([switch for switch in self.switches.values() if switch.is_synced])
            if now_s - before_s < _LATE_S:  # else it is we who were away, and what was said has not been read yet
                self._carry_on(self._discovery.expire(now_s, self.network.away))
            if now_s > self._settle_at_s:
                self._settle()
            for waiting, rest in waited.items():  # a switch does not confirm: the others must not wait for it
                if self._rest.get(waiting) is rest:
                    self._send_rest(waiting)
            waited, before_s = dict(self._rest), now_s
            for decision in self.locations.expire(time.monotonic_ns(), _HOLD_AT_MOST_S):
                self._carry_out(decision)
            sleep(discovery.EVERY_S)

    def _discover(self, switches: list[Switch]) -> None:
        for switch in switches:
            ports = [port for port in switch.cables() if self._may_be_trunk(port)]
            switch.send_frames([(port.number, discovery.frame(port)) for port in ports])

    def _carry_on(self, changes: list[Change]) -> None:
        """Trunks that have come or gone: other ways, another tree."""
        if not changes:
            return
        for one, other, is_up in changes:
            if is_up:
                self.network.connect(one, other)
            else:
                self.network.disconnect(one)
            for port in (one, other):
                self._become_trunk(port, is_up)
            fields: dict[str, Any] = {"switch": one.switch, "port": one.number}
            fields |= {"other_switch": other.switch, "other_port": other.number}
            self._log.emit("trunk.up" if is_up else "trunk.down", **fields)
        self._reroute()
        self._found({port for one, other, is_up in changes if is_up for port in (one, other)})

    def _found(self, ports: set[Port]) -> None:
        """These need not be awaited any more."""
        if self._awaited and not (self._awaited - ports):
            self._settle()
        self._awaited -= ports

    def _reroute(self) -> None:
        """In two phases (Forwarding.reroute); what changes between them follows as a whole."""
        if not self.forwarding.is_settled:
            return
        if _NETWORK in self._rest:
            self._is_changed = True
            return
        for mac in list(self._rest):
            self._send_rest(mac)
        first, then = self.forwarding.reroute()
        self._rest[_NETWORK] = then
        self._send(first, partial(self._rerouted, then), at_once=True)

    def _rerouted(self, then: list[Step]) -> None:
        if self._rest.get(_NETWORK) is then:
            self._send_rest(_NETWORK)

    def _become_trunk(self, port: Port, is_up: bool) -> None:
        """Where no plan has said so before."""
        if self.guard.is_on:
            return
        self._flush(_NETWORK)
        for decision in self.locations.forget_port(port):
            self._carry_out(decision)
        before = self.forwarding.remove_port(port)
        self.guard.become_trunk(port, is_up)
        self._send([before, self.forwarding.add_port(port)])

    # ------------------------------------------------------------ the manager

    def intend(self, intent: Intent) -> None:
        """ValueError if it says too much."""
        if self.guard.intend(intent, time.monotonic()):
            at = self.locations.at(intent.mac)
            if at is not None and self.guard.place(at).role == "client":  # somebody else has used it
                self._carry_out(self.locations.forget(intent.mac))
            self._send(self.forwarding.guard_mac(intent.mac))
        fields: dict[str, Any] = {"mac": intent.mac, "from": intent.from_host, "to": intent.to}
        self._log.emit("intent.taken", **fields)

    # ------------------------------------------------------------ answers

    @set_ev_cls(ofp_event.EventOFPBarrierReply, MAIN_DISPATCHER)
    def _barrier_reply(self, event: Any) -> None:
        switch = self._of(event.msg.datapath)
        if switch is not None:
            switch.barrier_reply(event.msg.xid)

    @set_ev_cls(ofp_event.EventOFPFlowStatsReply, MAIN_DISPATCHER)
    def _flows_told(self, event: Any) -> None:
        switch, message = self._of(event.msg.datapath), event.msg
        if switch is not None:
            is_last = not message.flags & message.datapath.ofproto.OFPMPF_REPLY_MORE
            switch.dumped(message.xid, message.body, is_last)

    @set_ev_cls(ofp_event.EventOFPErrorMsg, MAIN_DISPATCHER)
    def _refused(self, event: Any) -> None:
        """The switch refused a change or a bundle, a full table for instance; a barrier alone would not tell."""
        message, switch = event.msg, self._of(event.msg.datapath)
        code = getattr(message, "code", message.type)
        self._log.emit("switch.error", switch=name_of(message.datapath), type=message.type, code=code)
        if switch is not None and not switch.refused and openflow.is_change(message.data or b""):
            switch.refused = True
            spawn(self._take_on_again, switch)

    def _take_on_again(self, switch: Switch) -> None:
        sleep(_AGAIN_AFTER_S)
        if self.switches.get(switch.name) is switch:
            self._take_on(switch)

    def _of(self, datapath: Any) -> Switch | None:
        """None for a connection that never came up, or that a newer one of the same switch has replaced."""
        if datapath.id is None:
            return None
        switch = self.switches.get(name_of(datapath))
        return switch if switch is not None and switch.datapath is datapath else None


def _from_to(old: Port, new: Port) -> dict[str, Any]:
    return {"switch": new.switch, "from_switch": old.switch, "from": old.number, "to": new.number}
