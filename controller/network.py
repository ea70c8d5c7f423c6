"""The switches and the trunks between them: shortest paths, and a tree for what goes to everybody. Pure.

A trunk is used once both of its ends have been seen (controller/discovery.py). A frame to a known MAC takes a
shortest path to the switch where that MAC is; of several, MACs are spread over them by a hash, as ECMP does, so
that one MAC's frames stay in order. A flood goes along one spanning tree: redundant trunks make no loops.

A switch that has lost its controller forwards by the entries it has. It stays the end of the ways to its machines, but
nobody can tell it of changes: a way leads through it only where there is no other.
"""

from collections import Counter
from collections.abc import Collection
from heapq import heappop, heappush
from typing import NamedTuple
from zlib import crc32


class Port(NamedTuple):
    """A port of a switch: its datapath id in 16 hex digits, its OpenFlow number."""

    switch: str
    number: int


_A_DETOUR = 1_000_000  # trunks, which a way goes rather than through a switch that is away


class Network:
    """Switches that are connected or away, trunks that are up."""

    def __init__(self) -> None:
        self._peers: dict[str, dict[int, Port]] = {}  # switch -> number of a trunk's port -> its other end
        self._away: dict[str, set[int]] = {}  # switch -> the ports through which it goes on flooding
        self._distances: dict[str, dict[str, int]] = {}  # to a switch -> from each; of the network as it is

    @property
    def switches(self) -> set[str]:
        return set(self._peers)

    @property
    def away(self) -> set[str]:
        return set(self._away)

    def add_switch(self, switch: str) -> None:
        """It is connected, for the first time or again."""
        self._peers.setdefault(switch, {})
        self._away.pop(switch, None)
        self._distances.clear()

    def lose_switch(self, switch: str, floods_over: Collection[int]) -> None:
        """It is not connected any more; its trunks stay, until their ports go down."""
        self._away[switch] = set(floods_over)
        self._distances.clear()

    def connect(self, one: Port, other: Port) -> bool:
        """A trunk is up; whether that is news. What either port was connected to before is not any more."""
        if self.peer(one) == other and self.peer(other) == one:
            return False
        self.disconnect(one)
        self.disconnect(other)
        for here, there in ((one, other), (other, one)):
            self._peers.setdefault(here.switch, {})[here.number] = there
        self._distances.clear()
        return True

    def disconnect(self, port: Port) -> bool:
        """The trunk at this port is down; whether there was one."""
        other = self._peers.get(port.switch, {}).pop(port.number, None)
        if other is None:
            return False
        self._peers[other.switch].pop(other.number, None)
        self._distances.clear()
        return True

    def peer(self, port: Port) -> Port | None:
        return self._peers.get(port.switch, {}).get(port.number)

    def trunks(self) -> list[tuple[Port, Port]]:
        """Each once."""
        ends = [(Port(switch, n), peer) for switch, peers in self._peers.items() for n, peer in peers.items()]
        return sorted(ends_of for ends_of in ends if ends_of[0] < ends_of[1])

    def distances(self, to: str) -> dict[str, int]:
        """How far it is from each switch to `to`, in trunks and detours; without those that cannot reach it."""
        if to not in self._distances:
            found: dict[str, int] = {}
            queue = [(0, to)]
            while queue:
                distance, switch = heappop(queue)
                if switch in found:
                    continue
                found[switch] = distance
                for peer in self._peers.get(switch, {}).values():
                    heappush(queue, (distance + self._step(switch, to), peer.switch))
            self._distances[to] = found
        return self._distances[to]

    def _step(self, into: str, to: str) -> int:
        """What it costs to enter a switch on the way to another."""
        return 1 + _A_DETOUR * (into in self._away and into != to)

    def _nearer(self, switch: str, to: str) -> list[int]:
        """The ports through which a shortest path leads."""
        distances = self.distances(to)
        peers = self._peers[switch].items()
        return sorted(
            n for n, peer in peers if distances[peer.switch] + self._step(peer.switch, to) == distances[switch]
        )

    def way(self, switch: str, at: Port, mac: str) -> int | None:
        """Through which port `switch` sends frames for a MAC that is `at` a port; None if there is no way."""
        if switch == at.switch:
            return at.number
        if switch not in self.distances(at.switch):
            return None
        nearer = self._nearer(switch, at.switch)
        return nearer[crc32(mac.encode()) % len(nearer)]

    def tree(self, inhabited: Collection[str] | None = None) -> set[Port]:
        """The ports of trunks over which floods go: shortest paths to the lowest switch of each part.

        A switch that is away goes on flooding as it did: its part of the tree is given, and the rest grows around it.
        The tree ends at switches that are `inhabited`, all by default. A flood has nothing to do elsewhere and would do
        harm: a switch beside the tree's way that knows its receiver would send it on, a second time.
        """
        given = [end for switch, over in self._away.items() for end in self._trunks_at(switch) if end[0].number in over]
        free = [trunk for trunk in self.trunks() if not self._away.keys() & {port.switch for port in trunk}]
        shortest = self._shortest_to_roots()
        ports: set[Port] = set()
        part = {switch: {switch} for switch in self._peers}  # switches that hang together already
        for one, other in (*given, *sorted(free, key=lambda trunk: (not shortest & set(trunk), trunk))):
            if part[one.switch] is not part[other.switch]:
                ports |= {one, other}
                both = part[one.switch] | part[other.switch]
                part.update(dict.fromkeys(both, both))
        return ports if inhabited is None else self._pruned(ports, inhabited)

    def _trunks_at(self, switch: str) -> list[tuple[Port, Port]]:
        return [(Port(switch, number), peer) for number, peer in sorted(self._peers.get(switch, {}).items())]

    def _shortest_to_roots(self) -> set[Port]:
        """Of each switch, the port that leads nearer to the lowest one of its part."""
        found: set[str] = set()
        ports: set[Port] = set()
        for root in sorted(self._peers):
            if root not in found:
                found |= set(self.distances(root))
                ports |= {
                    Port(switch, self._nearer(switch, root)[0]) for switch in self.distances(root).keys() - {root}
                }
        return ports

    def _pruned(self, tree: set[Port], inhabited: Collection[str]) -> set[Port]:
        """Without the twigs at whose end nobody is."""
        while True:
            degrees = Counter(port.switch for port in tree)
            twigs = {port for port in tree if degrees[port.switch] == 1 and port.switch not in inhabited}
            if not twigs:
                return tree
            tree = tree - twigs - {peer for port in twigs if (peer := self.peer(port)) is not None}
