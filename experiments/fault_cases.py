"""What can go wrong with a migration, when, and how it has to end. Pure: a table, and the cases that follow from it.

A case stops a migration at a state of the protocol's table (hosts/protocol.py), does an injury to it there, lets it
go on, heals what can be healed (a new agent, the cable plugged in again, the frozen process continued), and looks at
the end:

    S   the VM runs at the source          D   the VM runs at the destination
    C   cold: it is off, or its guest is dead, and it can be powered on again

Two letters mean that either may happen: what decides has been sent already, or has not, when the injury is done.

kill-source-agent, kill-target-agent     kill -9; a new agent is started afterwards
kill-source-guest, kill-target-guest     kill -9 of the VM's process there; a VM whose process is killed has crashed
cut                                      nothing crosses the vMotion cable any more, either way
freeze-peer                              SIGSTOP to the other side's agent, until the stopped side has lost its patience
"""

from dataclasses import dataclass
from enum import Enum

from hosts.policy import Policy
from hosts.transport import Transport

# How the VM moves; a hybrid that no pre-copy suffices for, a guest that has to be throttled at once
WAYS = {
    "precopy": (Policy(), Transport()),
    "postcopy": (Policy(mode="postcopy"), Transport()),
    "hybrid": (Policy(mode="hybrid", downtime_ms=0.001), Transport()),
    "throttled": (Policy(timeout_s=0.1, timeout_strategy="throttle"), Transport(bandwidth_limit=20_000_000)),
    "streams": (Policy(), Transport(streams=3)),
    "encrypted": (Policy(), Transport(encrypt=True)),
}

INJURIES = (
    "kill-source-agent",
    "kill-target-agent",
    "kill-source-guest",
    "kill-target-guest",
    "cut",
    "freeze-peer",
)

# way, state, and the end after each injury, in the order above
_TABLE = """
    precopy   source:greeting          S   S   C   S   S   S
    precopy   source:precopy           S   S   C   S   S   S
    precopy   source:round_ended       S   S   C   S   S   S
    precopy   source:suspended         S   S   C   S   S   S
    precopy   source:handed_over       S   S   D   S   S   S
    precopy   destination:greeted      S   S   C   S   S   S
    precopy   destination:receiving    S   S   C   S   S   S
    precopy   destination:round_ended  S   S   C   S   S   S
    precopy   destination:switching    SD  S   CD  S   SD  SD
    precopy   destination:restoring    D   S   D   S   D   D
    precopy   destination:claimed      D   D   D   C   D   D
    precopy   destination:running      D   D   D   C   D   D
    postcopy  source:listed            S   S   D   S   S   S
    postcopy  source:entrusted         S   S   D   S   S   S
    postcopy  source:serving           C   C   D   C   C   C
    postcopy  source:served            CD  C   D   C   CD  CD
    postcopy  destination:listed       S   S   D   S   S   S
    postcopy  destination:rebuilding   S   S   D   S   S   S
    postcopy  destination:owned        C   C   D   C   C   C
    postcopy  destination:resumed      C   C   D   C   C   C
    postcopy  destination:filling      C   C   D   C   C   C
    postcopy  destination:filled       D   C   D   C   D   D
    streams   sender:joining           S   S   C   S   S   S
    streams   sender:streaming         S   S   C   S   S   S
    streams   sender:round_ended       S   S   C   S   S   S
    streams   receiver:joined          S   S   C   S   S   S
    streams   receiver:streaming       S   S   C   S   S   S
    streams   receiver:round_ended     S   S   C   S   S   S
"""


class End(Enum):
    SOURCE = "S"
    DESTINATION = "D"
    COLD = "C"


@dataclass(frozen=True)
class Case:
    """`way`: how the VM moves; `at`: the state at which that is stopped; `ends`: which are right.

    Without `at` nothing is stopped: the injury is done before it begins, or as soon as there is an event `after`.
    `says`: words that the hosts must have for it, if the end alone does not tell what was noticed.
    """

    injury: str
    at: str
    way: str
    ends: frozenset[End]
    says: str = ""
    after: str = ""

    @property
    def at_source(self) -> bool:
        """Is it the source's side that is stopped?"""
        return self.at.startswith(("source:", "sender:"))

    @property
    def unsure(self) -> bool:
        """Is it about a source that cannot know whether the destination has claimed?"""
        return self.at in ("source:uncertain", "source:doubtful")

    @property
    def name(self) -> str:
        """With the way, unless that is pre-copy or plain from the moment."""
        moment = self.at or self.after
        plain = self.way == "precopy" or (moment != "" and self.way in ("postcopy", "streams", "throttled"))
        return self.injury + (f"@{moment}" if moment else "") + ("" if plain else f"-in-{self.way}")


def _ends(letters: str) -> frozenset[End]:
    return frozenset(End(letter) for letter in letters)


def _tabled() -> list[Case]:
    cases = []
    for line in _TABLE.strip().splitlines():
        way, state, *ends = line.split()
        cases += [Case(injury, state, way, _ends(end)) for injury, end in zip(INJURIES, ends, strict=True)]
    return cases


# Injuries of other kinds, each where it hurts most
_OTHERS = [
    # one direction of the cable only
    Case("cut-to-destination", "source:precopy", "precopy", _ends("S")),
    Case("cut-to-source", "source:precopy", "precopy", _ends("S")),
    Case("cut-to-destination", "source:handed_over", "precopy", _ends("S")),
    Case("cut-to-source", "destination:restoring", "precopy", _ends("D")),
    Case("cut-to-source", "destination:claimed", "precopy", _ends("D")),
    Case("cut-to-destination", "destination:filling", "postcopy", _ends("C")),
    Case("cut-to-source", "source:serving", "postcopy", _ends("C")),
    # a source that does not know whether the destination has claimed, and dies
    Case("kill-source-agent", "source:uncertain", "precopy", _ends("D")),
    Case("kill-source-agent", "source:doubtful", "postcopy", _ends("S")),
    # other ways of moving, which share the states above
    Case("kill-target-agent", "source:suspended", "hybrid", _ends("S")),
    Case("cut", "destination:rebuilding", "hybrid", _ends("S")),
    Case("kill-source-agent", "destination:filling", "hybrid", _ends("C")),
    Case("kill-source-agent", "", "throttled", _ends("S"), after="guest.throttled"),
    Case("kill-target-agent", "", "throttled", _ends("S"), after="guest.throttled"),
    Case("cut", "", "throttled", _ends("S"), after="guest.throttled"),
    Case("kill-target-agent", "destination:receiving", "encrypted", _ends("S")),
    Case("cut", "source:handed_over", "encrypted", _ends("S")),
    Case("freeze-peer", "destination:claimed", "encrypted", _ends("D")),
    # memory and storage
    Case("destination-out-of-memory", "", "precopy", _ends("S"), "no memory to map"),
    # both ask for the generation, and neither runs the VM, until it answers: then one of the two has it
    Case("datastore-unreachable", "destination:restoring", "precopy", _ends("SD")),
    Case("datastore-unreachable", "destination:rebuilding", "postcopy", _ends("SC")),
    Case("datastore-away-for-a-while", "source:uncertain", "precopy", _ends("S")),
    # a byte of the stream is another one when it arrives
    Case("corrupt-byte", "", "precopy", _ends("S"), "RAM differs"),
    Case("corrupt-byte", "", "postcopy", _ends("C"), "a page was changed on its way"),
    Case("corrupt-byte", "", "encrypted", _ends("S"), "[SSL: "),
    # the announcement
    Case("rarp-lost", "", "precopy", _ends("D")),
    Case("rarp-duplicated", "destination:running", "precopy", _ends("D")),
    Case("rarp-early", "source:precopy", "precopy", _ends("D")),
]


def all_cases() -> list[Case]:
    return [*_tabled(), *_OTHERS]


def short_cases(injuries: int = 2) -> list[Case]:
    """So many injuries at each state, every injury in turn, and all the others: what a person has time for."""
    states = len(_tabled()) // len(INJURIES)
    turns = {(state, (state * injuries + turn) % len(INJURIES)) for state in range(states) for turn in range(injuries)}
    tabled = [case for index, case in enumerate(_tabled()) if divmod(index, len(INJURIES)) in turns]
    return [*tabled, *_OTHERS]
