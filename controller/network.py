"""The switches and the trunks between them: shortest paths, and a tree for what goes to everybody. Pure.

A trunk is used once both of its ends have been seen (controller/discovery.py). A frame to a known MAC takes a
shortest path to the switch where that MAC is; of several, MACs are spread over them by a hash, as ECMP does, so
that one MAC's frames stay in order. A flood goes along one spanning tree: redundant trunks make no loops.
"""

from collections import Counter, deque
from collections.abc import Collection
from typing import NamedTuple
from zlib import crc32


class Port(NamedTuple):
    """A port of a switch: its datapath id in 16 hex digits, its OpenFlow number."""

    switch: str
    number: int


class Network:
    """Switches that are connected, trunks that are up."""

    def __init__(self) -> None:
        self._peers: dict[str, dict[int, Port]] = {}  # switch -> number of a trunk's port -> its other end
        self._distances: dict[str, dict[str, int]] = {}  # to a switch -> from each; of the network as it is

    @property
    def switches(self) -> set[str]:
        return set(self._peers)

    def add_switch(self, switch: str) -> None:
        self._peers.setdefault(switch, {})
        self._distances.clear()

    def remove_switch(self, switch: str) -> None:
        for number in list(self._peers.get(switch, ())):
            self.disconnect(Port(switch, number))
        self._peers.pop(switch, None)
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
        """How many trunks lie between each switch and `to`; without those that cannot reach it."""
        if to not in self._distances:
            found, queue = {to: 0}, deque([to])
            while queue:
                switch = queue.popleft()
                for peer in self._peers.get(switch, {}).values():
                    if peer.switch not in found:
                        found[peer.switch] = found[switch] + 1
                        queue.append(peer.switch)
            self._distances[to] = found
        return self._distances[to]

    def way(self, switch: str, at: Port, mac: str) -> int | None:
        """Through which port `switch` sends frames for a MAC that is `at` a port; None if there is no way."""
        if switch == at.switch:
            return at.number
        distances = self.distances(at.switch)
        if switch not in distances:
            return None
        nearer = sorted(n for n, peer in self._peers[switch].items() if distances[peer.switch] < distances[switch])
        return nearer[crc32(mac.encode()) % len(nearer)]

    def tree(self, inhabited: Collection[str] | None = None) -> set[Port]:
        """The ports of trunks over which floods go: a breadth-first tree from the lowest switch of each part.

        It ends at switches that are `inhabited`, all by default. A flood has nothing to do elsewhere and would do harm:
        a switch beside the tree's way that knows its receiver would send it on, a second time.
        """
        found: set[str] = set()
        ports: set[Port] = set()
        for root in sorted(self._peers):
            if root in found:
                continue
            found.add(root)
            queue = deque([root])
            while queue:
                switch = queue.popleft()
                for number, peer in sorted(self._peers[switch].items()):
                    if peer.switch not in found:
                        found.add(peer.switch)
                        queue.append(peer.switch)
                        ports |= {Port(switch, number), peer}
        return ports if inhabited is None else self._pruned(ports, inhabited)

    def _pruned(self, tree: set[Port], inhabited: Collection[str]) -> set[Port]:
        """Without the twigs at whose end nobody is."""
        while True:
            degrees = Counter(port.switch for port in tree)
            twigs = {port for port in tree if degrees[port.switch] == 1 and port.switch not in inhabited}
            if not twigs:
                return tree
            tree = tree - twigs - {peer for port in twigs if (peer := self.peer(port)) is not None}
