"""What every switch's tables have to say, from where the MACs are and how the switches hang together. Pure.

A MAC that moves changes, on each switch whose way to it is another one now, its entry in DESTINATIONS; and on the two
switches at the edge its entry in SOURCES. The new edge comes first: until it knows, what the others send there is
lost.
"""

from collections import defaultdict
from typing import NamedTuple

from controller import openflow
from controller.guard import NOT_THERE, STILL_THERE
from controller.locations import Decision, Forgotten, Held, Learned, Locations, Moved, Refused
from controller.network import Network, Port
from controller.openflow import Flow, FlowMod

_STAYS = (STILL_THERE, NOT_THERE)


class Step(NamedTuple):
    """Changes of one switch."""

    switch: str
    changes: list[FlowMod]


class Forwarding:
    """Remembers what each connected switch has been told of the ways."""

    def __init__(self, network: Network, locations: Locations) -> None:
        self._network, self._locations, self._guard = network, locations, locations.guard
        self._ways: dict[str, dict[str, int]] = defaultdict(dict)  # switch -> MAC -> port
        self._ports: dict[str, set[int]] = defaultdict(set)
        self._floods: dict[str, Flow] = {}

    def add_port(self, port: Port) -> Step:
        """A switch has it; its role is known."""
        self._ports[port.switch].add(port.number)
        return Step(port.switch, [FlowMod("add", flow) for flow in (*self._of_port(port), self._flood(port.switch))])

    def remove_port(self, port: Port) -> Step:
        self._ports[port.switch].discard(port.number)
        gone = [FlowMod("delete", flow) for flow in self._of_port(port)]
        return Step(port.switch, [*gone, FlowMod("add", self._flood(port.switch))])

    def forget_switch(self, switch: str) -> None:
        """It is not connected: it keeps its entries, and is compared with what it should have when it is back."""
        self._ways.pop(switch, None)
        self._ports.pop(switch, None)

    def desired(self, switch: str) -> list[Flow]:
        """All entries of a switch; from here on it is taken to have them."""
        flows = [*openflow.always(), self._flood(switch)]
        for number in sorted(self._ports[switch]):
            flows += self._of_port(Port(switch, number))
        flows += [openflow.guarded(mac) for mac in sorted(self._guard.vms)] if self._guard.is_on else []
        ways = self._ways[switch] = {}
        for mac, at in self._locations.all().items():
            if at.switch == switch:
                flows.append(openflow.known_source(mac, at.number))
            way = self._network.way(switch, at, mac)
            if way is not None:
                ways[mac] = way
                flows.append(openflow.destination(mac, way))
        return flows

    def guard_mac(self, mac: str) -> list[Step]:
        """It is a VM's from here on."""
        return [Step(switch, [FlowMod("add", openflow.guarded(mac))]) for switch in self._ways] * self._guard.is_on

    def steps(self, decision: Decision) -> list[Step]:
        """What a decision changes; the switch where the MAC is comes first."""
        match decision:
            case Learned(mac, at, _, _):
                return self._towards(mac, at, None)
            case Moved(mac, old, new, _, _, _):
                return self._towards(mac, new, old)
            case Forgotten(mac, at):
                return self._nowhere(mac, at)
            case Held(mac, old, _, _, _):  # what still comes from there is to be noticed
                return self._listening(old, FlowMod("delete", openflow.known_source(mac, old.number)))
            case Refused(mac, reason=reason) if reason in _STAYS and (here := self._locations.at(mac)) is not None:
                return self._listening(here, FlowMod("add", openflow.known_source(mac, here.number)))
            case _:
                return []

    def _listening(self, at: Port, change: FlowMod) -> list[Step]:
        return [Step(at.switch, [change])] if at.switch in self._ways else []

    def reroute(self) -> tuple[list[Step], list[Step]]:
        """After a change of the network: what is harmless by itself, and what may follow once all have that.

        First entries for MACs that a switch had no way to, since nobody sends there yet, and floods without what leaves
        the tree: better a flood that does not come everywhere than one that goes in circles. Then all the rest.
        """
        first, then = [], []
        for switch in sorted(self._ways):
            was, flood = self._floods.get(switch), self._flood(switch)
            before, after = [], []
            if was is not None and was != flood:
                before.append(FlowMod("add", openflow.flood(set(was.output) & set(flood.output))))
                after.append(FlowMod("add", flood))
            for mac, at in self._locations.all().items():
                is_new = mac not in self._ways[switch]
                (before if is_new else after).extend(self._way(switch, mac, at))
            first += [Step(switch, before)] if before else []
            then += [Step(switch, after)] if after else []
        return first, then

    def _towards(self, mac: str, at: Port, old: Port | None) -> list[Step]:
        distances = self._network.distances(at.switch)
        steps = []
        for switch in sorted(self._ways, key=lambda switch: (distances.get(switch, len(distances)), switch)):
            changes = self._way(switch, mac, at)
            if old is not None and switch == old.switch:  # a return to the old place is to be noticed
                changes.append(FlowMod("delete", openflow.known_source(mac, old.number)))
            if switch == at.switch:
                changes.append(FlowMod("add", openflow.known_source(mac, at.number)))
            if changes:
                steps.append(Step(switch, changes))
        return steps

    def _way(self, switch: str, mac: str, at: Port) -> list[FlowMod]:
        ways, way = self._ways[switch], self._network.way(switch, at, mac)
        before = ways.get(mac)
        if way == before:
            return []
        if way is None:  # flooding is better than nowhere
            del ways[mac]
            return [FlowMod("delete", openflow.destination(mac, before or 0))]
        ways[mac] = way
        return [FlowMod("add", openflow.destination(mac, way))]

    def _nowhere(self, mac: str, at: Port) -> list[Step]:
        steps = []
        for switch, ways in self._ways.items():
            changes = [FlowMod("delete", openflow.destination(mac, ways.pop(mac)))] if mac in ways else []
            if switch == at.switch:
                changes.append(FlowMod("delete", openflow.known_source(mac, at.number)))
            if changes:
                steps.append(Step(switch, changes))
        return steps

    def _flood(self, switch: str) -> Flow:
        edges = {
            name: [number for number in numbers if self._guard.place(Port(name, number)).role != "trunk"]
            for name, numbers in self._ports.items()
        }
        tree = self._network.tree({name for name, numbers in edges.items() if numbers})
        chosen = [*edges[switch], *(port.number for port in tree if port.switch == switch)]
        flood = self._floods[switch] = openflow.flood(chosen)
        return flood

    def _of_port(self, port: Port) -> list[Flow]:
        role = self._guard.place(port).role
        if role == "trunk":
            return [openflow.from_trunk(port.number)]
        return [openflow.from_client(port.number)] if role == "client" else []
