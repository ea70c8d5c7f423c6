"""Who may run a VM: the rules by which a host takes, keeps and loses a generation. Pure: no storage, no clock.

Whoever holds a VM's newest generation on the datastore may run it, as long as its lease lasts; nobody else ever does.
Everything that a host does about it is one of these steps, each a call to the datastore (hosts/datastore.py):

    claim    LINK     a complete file to the next generation's name: link(2) has exactly one winner
             FENCE    the disk to that generation's user: the server refuses the writes of every older one
             CHECK    is it still the newest?
    keep     PULSE    a number in the generation's file, every PULSE_EVERY_S; what is acknowledged in time extends the
                      lease
    break    WATCH    another's number: if it stands still for a whole lease, the next generation is claimed

The rules, in the order in which they are needed:

1.  A call without an answer may have had its effect, may have it later, or never. It is repeated until its effect is
    known; a LINK tells by the nonce in the file whose it was.
2.  An owner runs the VM for RUN_S after it *sent* the last LINK or PULSE that was acknowledged, by its own clock.
3.  A breaker waits for LEASE_S by its own clock, from the answer to its first look to the sending of its last.
    RUN_S is shorter by what the two clocks may differ, and by the time that stopping takes.
4.  A lease that has lapsed is not extended. Between a breaker's last look and its LINK a late PULSE would not be seen;
    so its owner claims the next generation, like everybody else, and one of the two has it.
5.  Who is not the newest after a CHECK has lost, whatever it was before.

The fence is for the disk, not for the VM: by the rules nobody else runs it by then. A FENCE whose answer was lost may
still arrive, and open the disk to its own generation, until the newest owner mends that at its next PULSE. A PULSE is
sent only once (hosts/nfs.py): a copy that came late would put the number back to what a breaker has seen.

A migration needs no lease to run out: the source suspends the VM, and then hands it over (hosts/protocol.py).
"""

import math
from dataclasses import dataclass, replace
from enum import Enum

LEASE_S = 3.0
# Two thirds of it: clocks that differ by a tenth, and a quarter of a second to stop in, are no danger
RUN_S = 2.0
PULSE_EVERY_S = 0.5


class Step(Enum):
    """Of a claim."""

    LINK = "link"
    FENCE = "fence"
    CHECK = "check"
    OWNED = "owned"
    LOST = "lost"


@dataclass(frozen=True)
class Claiming:
    """A host on its way to a generation; `sent_s`: when its LINK was sent for the first time.

    `step` says what has to be called next. A call that brings no answer changes nothing: it is repeated.
    """

    generation: int
    nonce: str
    sent_s: float
    step: Step = Step.LINK

    def linked(self, nonce: str) -> "Claiming":
        """LINK was answered: the generation's file has this nonce now."""
        return replace(self, step=Step.FENCE if nonce == self.nonce else Step.LOST)

    def fenced(self) -> "Claiming":
        """FENCE was answered."""
        return replace(self, step=Step.CHECK)

    def checked(self, newest: int) -> "Claiming":
        """CHECK was answered."""
        return replace(self, step=Step.OWNED if newest == self.generation else Step.LOST)

    @property
    def lease(self) -> "Lease":
        """Of one that is OWNED."""
        return Lease(self.generation, self.sent_s)


@dataclass(frozen=True)
class Lease:
    """How long the owner of a generation may run the VM; `sent_s` of the LINK or PULSE that is in force."""

    generation: int
    sent_s: float

    @classmethod
    def lapsed(cls, generation: int) -> "Lease":
        """Of a generation that is ours, since nobody knows when: it has to be followed by the next (rule 4)."""
        return cls(generation, -math.inf)

    @property
    def until_s(self) -> float:
        return self.sent_s + RUN_S

    def lasts(self, now_s: float) -> bool:
        return now_s <= self.until_s

    def pulsed(self, sent_s: float, answered_s: float) -> "Lease | None":
        """A PULSE was acknowledged. None: too late, the lease has lapsed."""
        return replace(self, sent_s=sent_s) if self.lasts(answered_s) else None


class Sight(Enum):
    """What a breaker makes of an owner."""

    UNSURE = "unsure"
    ALIVE = "alive"
    DEAD = "dead"


@dataclass(frozen=True)
class Watch:
    """Another host's generation, as its first look found it; `since_s`: when that was answered."""

    generation: int
    pulse: int
    since_s: float

    def saw(self, generation: int, pulse: int, asked_s: float) -> Sight:
        """A further look."""
        if (generation, pulse) != (self.generation, self.pulse):
            return Sight.ALIVE
        return Sight.DEAD if asked_s >= self.since_s + LEASE_S else Sight.UNSURE
