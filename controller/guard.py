"""Whom to believe about where a MAC is. Pure; times are seconds of one clock, as given.

A port has a role, by what the plan has behind it:

    uplink    of a host: the VMs' MACs are behind these, and behind no others
    client    its own MAC, and few others
    trunk     to another switch: no evidence at all, for the other switch has seen the frame first
    any       nobody has said: whatever comes is believed, as in any learning switch

A MAC that is known and shows up elsewhere may have moved, or somebody pretends. In this order:

1) Behind a client's port, a VM's MAC is refused, and so are more than MACS_OF_A_CLIENT of them.
2) The manager has announced it (an Intent: this MAC, to this host, until then): believed at once, and for once.
3) More than DAMPED_MOVES moves within DAMPED_S that nobody has announced: refused, as EVPN does (RFC 7432,
   section 15.1: 5 moves in 180 s). There an operator lifts it; here it ends by itself, or with an Intent.
4) Else it is held: its old place is listened to, and asked (ARP) if its IP address is known; if nothing comes from
   there for HOLD_S, it has moved.
"""

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from controller.network import Port

Role = Literal["uplink", "client", "trunk", "any"]

MACS_OF_A_CLIENT = 8
DAMPED_MOVES = 5
DAMPED_S = 180.0
HOLD_S = 0.1
MAX_INTENT_S = 3600.0
_MAX_INTENTS = 10_000

OF_A_VM = "a VM's MAC is only behind a host's uplink"
TOO_MANY = f"more than {MACS_OF_A_CLIENT} MACs behind a client's port"
DAMPED = f"more than {DAMPED_MOVES} moves in {DAMPED_S:g} s that nobody has announced"
CONTESTED = "it is held for another port"
STILL_THERE = "its old place answers"
NOT_THERE = "the port where it was seen is down"


@dataclass(frozen=True)
class Intent:
    """The manager's word: the VM with this MAC will be on host `to`; `from_host` is "" at a power-on."""

    mac: str
    from_host: str
    to: str
    until_s: float


@dataclass(frozen=True)
class Place:
    """What is behind a port: its role, and the name of the node."""

    role: Role = "any"
    node: str = ""


@dataclass(frozen=True)
class Policy:
    """What a plan says: what is behind the ports of these names, and which MACs are VMs'.

    Without `places` nobody is guarded.
    """

    places: Mapping[str, Place] = field(default_factory=dict)
    switches: Mapping[str, str] = field(default_factory=dict)  # datapath id -> name
    vms: Mapping[str, str] = field(default_factory=dict)  # MAC -> IPv4 address, "" if unknown
    clients: Mapping[str, str] = field(default_factory=dict)  # the same of others

    def place(self, port_name: str) -> Place:
        """A port that the plan does not know is nobody's uplink."""
        return self.places.get(port_name, Place("client", port_name)) if self.places else Place()


class Guard:
    """The policy, and what has happened so far."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self.vms = set(self.policy.vms)
        self.intents: dict[str, Intent] = {}
        self._latest: dict[str, float] = {}  # MAC -> the end of its last intent, used or not
        self._places: dict[Port, Place] = {}
        self._moves: dict[str, deque[float]] = defaultdict(deque)  # MAC -> when it moved unannounced

    @property
    def is_on(self) -> bool:
        return bool(self.policy.places)

    def name_port(self, port: Port, name: str) -> None:
        if self.is_on:
            self._places[port] = self.policy.place(name)

    def become_trunk(self, port: Port, is_trunk: bool) -> None:
        """Another switch was found behind it, or is not there any more; only where nobody has said what is there."""
        if not self.is_on:
            self._places[port] = Place("trunk" if is_trunk else "any")

    def place(self, port: Port) -> Place:
        return self._places.get(port) or self.policy.place("")

    def intend(self, intent: Intent, now_s: float) -> bool:
        """Whether this makes the MAC known as a VM's. ValueError if it says too much."""
        if intent.until_s > now_s + MAX_INTENT_S:
            raise ValueError(f"an intent lasts {MAX_INTENT_S:g} s at most")
        for mac in [mac for mac, known in self.intents.items() if known.until_s < now_s]:
            del self.intents[mac]
        for mac in [mac for mac, until_s in self._latest.items() if until_s < now_s]:
            del self._latest[mac]
        if intent.until_s <= self._latest.get(intent.mac, -inf):
            raise ValueError("it has been told before, or one that is newer has")
        if len(self.intents) >= _MAX_INTENTS and intent.mac not in self.intents:
            raise ValueError(f"there are {_MAX_INTENTS} intents already")
        self.intents[intent.mac] = intent
        self._latest[intent.mac] = intent.until_s
        self._moves.pop(intent.mac, None)
        is_new = intent.mac not in self.vms
        self.vms.add(intent.mac)
        return is_new

    def objection(self, mac: str, at: Port, others_there: int) -> str:
        """Why this MAC cannot be at a port (1), whatever else is known; empty if it can."""
        if self.place(at).role != "client":
            return ""
        if mac in self.vms:
            return OF_A_VM
        return TOO_MANY if others_there >= MACS_OF_A_CLIENT else ""

    def is_announced(self, mac: str, at: Port, now_s: float) -> bool:
        """Whether the manager has said so (2); it counts once."""
        intent = self.intents.get(mac)
        if intent is None or intent.to != self.place(at).node or now_s > intent.until_s:
            return False
        del self.intents[mac]
        return True

    def is_damped(self, mac: str, now_s: float) -> bool:
        """Whether one more unannounced move would be too many (3)."""
        moves = self._moves[mac]
        while moves and now_s - moves[0] > DAMPED_S:
            moves.popleft()
        return len(moves) >= DAMPED_MOVES

    def note_move(self, mac: str, now_s: float) -> None:
        """One that nobody has announced, held or not."""
        self._moves[mac].append(now_s)
