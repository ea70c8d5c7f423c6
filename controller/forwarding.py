"""What every switch's tables have to say, from where the MACs are and how the switches hang together. Pure.

A controller that has just begun has found no trunk yet, but a switch may have entries of one before it, which lead over
them. These are inherited: they stay until the trunks have been found, or looked for long enough (`settle`).

A MAC that moves changes, on each switch whose way to it is another one now, its entry in DESTINATIONS; and on the two
switches at the edge its entry in SOURCES. The new edge comes first: until it knows, what the others send there is
lost.
"""

from collections import defaultdict
from collections.abc import Collection
from math import inf
from typing import NamedTuple

from controller import openflow
from controller.locations import Decision, Forgotten, Held, Learned, Locations, Moved, Refused
from controller.network import Network, Port
from controller.openflow import Flow, FlowMod


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
        self._inherited: dict[str, set[int]] = {}  # switch -> over which trunks it floods; empty: all is settled

    def add_port(self, port: Port) -> Step:
        """A switch has it; its role is known."""
        self._ports[port.switch].add(port.number)
        return Step(port.switch, [FlowMod("add", flow) for flow in (*self._of_port(port), self._flood(port.switch))])

    def remove_port(self, port: Port) -> Step:
        self._ports[port.switch].discard(port.number)
        gone = [FlowMod("delete", flow) for flow in self._of_port(port)]
        return Step(port.switch, [*gone, FlowMod("add", self._flood(port.switch))])

    def lose_switch(self, switch: str) -> None:
        """It is not connected: it keeps its entries, and is compared with what it should have when it is back."""
        self._ways.pop(switch, None)
        flood = self._floods.get(switch, openflow.flood([]))
        self._network.lose_switch(switch, {port for port in flood.output if port != "controller"})

    @property
    def is_settled(self) -> bool:
        return not self._inherited

    def inherit(self, switch: str, flows: Collection[Flow]) -> set[Port]:
        """What a switch that was not known before has; the ports of the trunks that these entries need."""
        trunks, floods = openflow.trunks_of(flows), openflow.flood([]).key
        ways, flooded = dict[str, int](), set[int]()
        for flow in (flow for flow in flows if flow.table == openflow.DESTINATIONS):
            over = {port for port in flow.output if port != "controller"} & trunks
            if flow.key == floods:
                flooded = over
            elif over and flow.match.eth_dst is not None:
                ways[flow.match.eth_dst] = min(over)
        needed = flooded | set(ways.values())
        if needed:
            self._ways[switch], self._inherited[switch] = ways, flooded
        return {Port(switch, number) for number in needed}

    def settle(self) -> None:
        """The trunks that there are have been found: `reroute` is next."""
        self._inherited.clear()

    def desired(self, switch: str) -> list[Flow]:
        """All entries of a switch; from here on it is taken to have them."""
        flows = [*openflow.always(trunks_are_known=self._guard.is_on), self._flood(switch)]
        for number in sorted(self._ports[switch]):
            flows += self._of_port(Port(switch, number))
        flows += [openflow.guarded(mac) for mac in sorted(self._guard.vms)] if self._guard.is_on else []
        ways = self._ways[switch] = {} if self.is_settled else self._ways[switch]
        held = self._locations.held()
        for mac, at in self._locations.all().items():
            if at.switch == switch:
                flows.append((openflow.listened_to if mac in held else openflow.known_source)(mac, at.number))
            way = self._network.way(switch, at, mac)
            if way is not None:
                ways[mac] = way
        return flows + [openflow.destination(mac, way) for mac, way in ways.items()]

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
                return self._listening(old, FlowMod("add", openflow.listened_to(mac, old.number)))
            case Refused(mac, was_held=True) if (here := self._locations.at(mac)) is not None:
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
            places = self._locations.all()
            for mac in {**self._ways[switch], **places}:
                is_new = mac not in self._ways[switch]
                (before if is_new else after).extend(self._way(switch, mac, places.get(mac)))
            first += [Step(switch, before)] if before else []
            then += [Step(switch, after)] if after else []
        return first, then

    def _towards(self, mac: str, at: Port, old: Port | None) -> list[Step]:
        distances = self._network.distances(at.switch)
        steps = []
        for switch in sorted(self._ways, key=lambda switch: (distances.get(switch, inf), switch)):
            changes = self._way(switch, mac, at)
            if old is not None and switch == old.switch:  # a return to the old place is to be noticed
                changes.append(FlowMod("delete", openflow.known_source(mac, old.number)))
            if switch == at.switch:
                changes.append(FlowMod("add", openflow.known_source(mac, at.number)))
            if changes:
                steps.append(Step(switch, changes))
        return steps

    def _way(self, switch: str, mac: str, at: Port | None) -> list[FlowMod]:
        ways, way = self._ways[switch], self._network.way(switch, at, mac) if at is not None else None
        before = ways.get(mac)
        if way == before or (way is None and not self.is_settled):
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
        over = self._inherited.get(switch, set())
        if self.is_settled:
            over = {port.number for port in self.tree() if port.switch == switch}
        flood = self._floods[switch] = openflow.flood(over | self._edges().get(switch, set()))
        return flood

    def tree(self) -> set[Port]:
        """The ports of trunks over which floods go, once all is settled."""
        return self._network.tree({switch for switch, numbers in self._edges().items() if numbers})

    def _edges(self) -> dict[str, set[int]]:
        """The ports of each switch behind which machines may be."""
        place = self._guard.place
        return {
            switch: {number for number in numbers if place(Port(switch, number)).role != "trunk"}
            for switch, numbers in self._ports.items()
        }

    def _of_port(self, port: Port) -> list[Flow]:
        role = self._guard.place(port).role
        if role == "trunk":
            return openflow.from_trunk(port.number)
        return [openflow.from_client(port.number)] if role == "client" else []
