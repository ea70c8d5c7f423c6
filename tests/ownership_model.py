"""A model of who runs a VM, small enough to play every order in which things can happen.

Storage, two or three hosts, and what can go wrong between them; one VM. The decisions are the project's own
(hosts/ownership.py, fate of hosts/adoption.py); around them is as much of hosts/datastore.py, hosts/vmx_process.py,
hosts/source.py and hosts/destination.py as decides which call follows which:

    agent     POWER ON, WATCH, LOOK    and then a claim: LINK, FENCE, CHECK, CHECK answered
              HAND OVER, ABORT, HEAR   the destination claims; a source that hears nothing: CLAIM BACK
              SETTLE                   of a guest that an agent found, or of which nobody said whose it is
    vmx       PULSE, CHECK, CHECK answered, FENCE mended; behind a lapse CLAIM NEXT
    faults    CRASH, GIVE UP (a patience that has ended, or an agent that has died), late and repeated messages
    time      TICK; a clock may stand still meanwhile

A call that is under way may have its effect at any time, or never, and so may its answer: that is a partition, a delay
and a loss alike. So a call has no state of its own but the step that it is in. What has to be told apart is a message
that is still on its way when its sender has gone (`late`), and a second copy of one (`repeated`).

A state knows no moments, only ages, by the clock of the host that counts them, and none that is past caring about.
Numbers that are compared for equality alone (nonces, pulses) are given anew in every state. So there are finitely many
states; generations are bounded, as there is a new one for every way round.

Rates: only what an owner's clock does against a breaker's matters, and only if it is slower. Ages are the breaker's
ticks; an owner's clock may be up to `slips` of them behind when it looks whether its lease lasts. That is the drift
together with the time that stopping takes, rounded up.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hosts import adoption, datastore, ownership
from hosts.ownership import Claiming, Lease, Sight, Step, Watch

NAMES = ("esx1", "esx2", "esx3")
_GONE = -1  # a pulse that nobody can send any more


class Kept(NamedTuple):
    """A Lease; `age`: of the LINK or PULSE in force."""

    generation: int
    age: int


class Call(NamedTuple):
    """A vmx's: PULSE with its CHECK, or FENCE; `newest`: PULSE has arrived, and CHECK's answer is on its way."""

    step: str
    age: int
    pulse: int
    newest: int = 0


class Claim(NamedTuple):
    """A Claiming; `newest`: CHECK's answer on its way."""

    generation: int
    nonce: int
    age: int
    step: str
    newest: int = 0


class Watched(NamedTuple):
    generation: int
    pulse: int
    age: int


class Look(NamedTuple):
    """At a claim; `asked`: at this age of the watch, or so long ago; `generation`: 0 while it has not arrived."""

    asked: int
    generation: int = 0
    pulse: int = 0


class Host(NamedTuple):
    """`guest`: none, runs, stalled, suspended (handed over), restored (at the destination), unsettled (held by nobody).

    `decides`: the generation that a hand-over is about. `word`: of the destination, to one that has handed over.
    """

    guest: str = "none"
    lease: Kept | None = None
    call: Call | None = None
    claim: Claim | None = None
    watch: Watched | None = None
    look: Look | None = None
    decides: int = 0
    word: str = ""


class File(NamedTuple):
    """Of a generation. `vmx`: the host's vmx has claimed it, and not its agent."""

    host: int
    nonce: int
    pulse: int
    vmx: bool = False


class Message(NamedTuple):
    """LINK, PULSE or FENCE that outlives the call."""

    kind: str
    generation: int
    host: int = 0
    number: int = 0
    vmx: bool = False


class State(NamedTuple):
    """`user`: of the disk. `owned`: the generations under which somebody may have sent a write, as bits."""

    hosts: tuple[Host, ...]
    files: tuple[File, ...]
    user: int
    owned: int
    late: tuple[Message, ...] = ()


_NOTHING = Host()
_DEAF = "none any more"
Successor = tuple[str, State]


@dataclass(frozen=True)
class World:
    """What there is and what can go wrong."""

    hosts: int = 2
    generations: int = 3
    late: frozenset[str] = frozenset({"LINK", "PULSE"})
    room: int = 1  # for so many messages that are late
    repeated: frozenset[str] = frozenset()  # kinds of which a second copy may come late: hosts/nfs.py sends none twice
    disk: bool = False  # whose writes are accepted is looked at
    slips: int = 1
    hand_over: bool = True
    crashes: bool = True
    restarts: bool = True


@dataclass(frozen=True)
class Rules:
    """What is decided outside hosts/ownership.py; a mutation changes one of them."""

    unlinked_is_lost: bool = False  # a LINK that finds its name taken has lost, whoever has it
    watch_from_asking: bool = False  # ... instead of from the first answer
    watch_until_answer: bool = False  # ... instead of until the last asking
    lease_from_end_of_claim: bool = False  # ... instead of from the sending of LINK
    resume_on_silence: bool = False  # a source that hears nothing does not claim
    abort_unanswered: bool = False  # a destination says ABORT when its LINK has no answer
    resume_what_is_found: bool = False  # an agent lets a suspended guest run without a claim
    forget_when_overtaken: bool = False  # an owner that is overtaken while it is held has no lease, not a lapsed one
    hear_after_claim: bool = False  # a source that has asked for the generation goes by an ABORT all the same
    discard_undecided: bool = False  # a destination without an answer to its LINK goes by a generation before it
    stamped: bool = False  # a look sees that a lock file was written, even with the same content (needless: none is)


class Violation(NamedTuple):
    what: str
    story: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([self.what, *(f"{number:3}  {line}" for number, line in enumerate(self.story, 1))])


class Model:
    """`successors` of a state; the first one is `initial`: esx1 runs the VM under generation 1."""

    def __init__(self, world: World, rules: Rules | None = None) -> None:
        self.world, self.rules = world, rules or Rules()
        self.lease_s, self.run_s = int(ownership.LEASE_S), int(ownership.RUN_S)
        self.lapsed_at = self.run_s + world.slips + 1
        # whether it matters how old a pulse is whose lease has lapsed
        self.lapses = Lease(1, -self.lapsed_at).pulsed(0, 0) is None
        self.slow_looks = self.rules.watch_from_asking or self.rules.watch_until_answer
        self.forgets = not (self.rules.resume_on_silence or self.rules.resume_what_is_found)
        self.generations = world.generations

    def initial(self) -> State:
        runs = Host("runs", Kept(1, 0))
        return State((runs, *(_NOTHING for _ in range(self.world.hosts - 1))), (File(0, 0, 0),), 1, 2)

    # ------------------------------------------------------------ the project's rules, for ages

    def lasts(self, lease: Kept, slip: int) -> bool:
        """To its owner, whose clock is behind by `slip`."""
        return Lease(lease.generation, -lease.age).lasts(-slip)

    def slips(self, lease: Kept) -> range:
        """By which an owner's clock may be behind, if it makes a difference."""
        late = not self.lasts(lease, 0) and self.lasts(lease, self.world.slips)
        return range(self.world.slips + 1) if late else range(1)

    def linked(self, claim: Claim, nonce: int) -> Claim:
        return _as(claim, _claiming(claim).linked(str(nonce)))

    def owned(self, claim: Claim) -> Kept:
        lease = _claiming(claim).lease
        if self.rules.lease_from_end_of_claim:
            return Kept(claim.generation, 0)
        return Kept(lease.generation, int(-lease.sent_s))

    # ------------------------------------------------------------ what may happen next

    def successors(self, state: State) -> Iterator[Successor]:
        yield "TICK", self.tick(state)
        for at in range(len(state.hosts)):
            yield from self.steps(state, at)
            yield from self.faults(state, at)
        for message in dict.fromkeys(state.late):
            rest = list(state.late)
            rest.remove(message)
            after = self.deliver(state._replace(late=tuple(rest)), message)
            yield f"{_told(message)} arrives late", self.tidy(after)

    def tick(self, state: State) -> State:
        return self.tidy(state._replace(hosts=tuple(map(self._older, state.hosts))))

    def _older(self, host: Host) -> Host:
        if host == _NOTHING:
            return host
        lease, call, claim, watch, look = host.lease, host.call, host.claim, host.watch, host.look
        most, guest = self.lapsed_at, host.guest
        if lease is not None:
            lease = Kept(lease.generation, min(lease.age + 1, most))
            if guest == "runs" and not self.lasts(lease, self.world.slips):
                guest = "stalled"
        if call is not None:
            call = call._replace(age=min(call.age + 1, most))
        if claim is not None:
            claim = claim._replace(age=min(claim.age + 1, most))
        if watch is not None:
            watch = watch._replace(age=min(watch.age + 1, self.lease_s))
        elif look is not None and self.slow_looks:
            look = look._replace(asked=min(look.asked + 1, self.lease_s))
        return Host(guest, lease, call, claim, watch, look, host.decides, host.word)

    def steps(self, state: State, at: int) -> Iterator[Successor]:
        """Of one host, without faults."""
        host, name = state.hosts[at], NAMES[at]
        for what, after in self._agents(state, at, host):
            yield f"{name}: {what}", self.tidy(after)
        if host.claim is not None:
            for what, after in self._claims(state, at, host, host.claim):
                yield f"{name}: {what}", self.tidy(after)
        if host.lease is not None and not (host.claim is not None and host.guest == "stalled"):  # one thread
            for what, after in self._vmxs(state, at, host, host.lease):
                yield f"{name}: {what}", self.tidy(after)

    # ------------------------------------------------------------ claim

    def _begin(self, state: State, at: int, generation: int, **changes: object) -> State:
        claim = Claim(generation, at + 1, 0, Step.LINK.name)  # nobody looks for another nonce of this host's any more
        return _with(state, at, state.hosts[at]._replace(claim=claim, **changes))  # type: ignore[arg-type]

    def _claims(self, state: State, at: int, host: Host, claim: Claim) -> Iterator[Successor]:
        match claim.step:
            case Step.LINK.name if claim.generation <= self.generations:
                after = self.deliver(state, Message("LINK", claim.generation, at, claim.nonce, host.guest == "stalled"))
                nonce = after.files[claim.generation - 1].nonce
                linked = self.linked(claim, 0 if self.rules.unlinked_is_lost and after is state else nonce)
                what = f"LINK {claim.generation}"
                if linked.step == Step.FENCE.name and not self.world.disk:
                    what += ", FENCE"
                    linked = _as(claim, _claiming(linked).fenced())
                yield f"{what}, answered: {linked.step}", self._claimed(after, at, linked)
                if after is not state:
                    yield f"{what}, its answer is lost", after
            case Step.FENCE.name:
                after = self.deliver(state, Message("FENCE", claim.generation))
                fenced = _as(claim, _claiming(claim).fenced())
                yield f"FENCE {claim.generation}, answered", self._claimed(after, at, fenced)
                for late in self._leave(after, Message("FENCE", claim.generation), self.world.late):
                    yield f"FENCE {claim.generation}, sent twice, answered", self._claimed(late, at, fenced)
            case Step.CHECK.name:
                newest = len(state.files)
                if claim.newest != newest:
                    yield f"CHECK: {newest}", _with(state, at, host._replace(claim=claim._replace(newest=newest)))
                if claim.newest:
                    checked = _as(claim, _claiming(claim).checked(claim.newest))
                    yield f"CHECK answered: {checked.step}", self._claimed(state, at, checked)

    def _claimed(self, state: State, at: int, claim: Claim) -> State:
        host = state.hosts[at]
        if claim.step == Step.OWNED.name:
            return self._own(state, at, self.owned(claim))
        if claim.step != Step.LOST.name:
            return _with(state, at, host._replace(claim=claim))
        state = _with(state, at, host._replace(claim=None))
        match host.guest:
            case "none" | "unsettled":
                return state
            case "restored":
                return self._abort(state, at)
            case "suspended":  # source: _claim
                if len(state.files) == host.decides and state.files[-1].host == at:
                    return self._own(state, at, self._lapsed(host.decides))
                return _with(state, at, _NOTHING)
            case _:
                return self._overtaken(state, at)

    def _lapsed(self, generation: int) -> Kept:
        lapsed = Lease.lapsed(generation)
        return Kept(lapsed.generation, int(min(-lapsed.sent_s, self.lapsed_at)))

    def _own(self, state: State, at: int, lease: Kept) -> State:
        host = state.hosts[at]
        if host.guest == "restored":  # destination: resume
            state = self._say(state, host.decides, "RESUMED")
        state = state._replace(owned=state.owned | 1 << lease.generation)
        return _with(state, at, Host("runs" if self.lasts(lease, self.world.slips) else "stalled", lease))

    # ------------------------------------------------------------ vmx

    def _vmxs(self, state: State, at: int, host: Host, lease: Kept) -> Iterator[Successor]:
        call, newest = host.call, len(state.files)
        if host.guest == "runs" and not self.lasts(lease, 0):
            yield "stop_if_lapsed", _with(state, at, host._replace(guest="stalled"))
        if self._forgets(state, host):  # nobody will run under this lease any more; it shows only to those who look
            if lease.generation == newest:
                yield "PULSE arrives", self.deliver(state, Message("PULSE", newest, at, _fresh(state)))
        elif call is None:
            yield "PULSE", _with(state, at, host._replace(call=Call("PULSE", 0, _fresh(state))))
        elif call.step == "FENCE":
            mended = self.deliver(state, Message("FENCE", lease.generation))
            yield "FENCE mended", _with(mended, at, host._replace(call=None))
        elif not call.newest:
            message = Message("PULSE", lease.generation, at, call.pulse)
            arrived = _with(state, at, host._replace(call=Call("PULSE", call.age, 0, newest)))
            yield f"PULSE arrives, CHECK: {newest}", self.deliver(arrived, message)
            for late in self._leave(self.deliver(arrived, message), message, self.world.repeated):
                yield f"PULSE arrives, and will once more, CHECK: {newest}", late
        else:
            for slip in self.slips(lease):
                after = self._pulsed(state, at, call, slip)
                lapsed = after.hosts[at].claim is not None and host.claim is None
                yield f"CHECK answered{', CLAIM NEXT' if lapsed else ''}", after

    def _pulsed(self, state: State, at: int, call: Call, slip: int) -> State:
        """vmx: _pulse, and then mend_fence."""
        host = state.hosts[at]
        state = _with(state, at, host._replace(call=None))
        lease = host.lease
        assert lease is not None
        if call.newest != lease.generation:
            return self._overtaken(state, at)
        held = host.guest not in ("runs", "stalled")
        extended = Lease(lease.generation, -lease.age).pulsed(-call.age, -slip)
        mend = Call("FENCE", call.age, 0) if self.world.disk and state.user < lease.generation else None
        if extended is not None:
            kept = Kept(extended.generation, int(-extended.sent_s))
            runs = host.guest == "stalled" and self.lasts(kept, self.world.slips)
            return _with(state, at, host._replace(lease=kept, call=mend, guest="runs" if runs else host.guest))
        if held:
            return _with(state, at, host._replace(call=mend))
        stalled = _with(state, at, host._replace(guest="stalled", call=None))
        return self._begin(stalled, at, lease.generation + 1)

    def _overtaken(self, state: State, at: int) -> State:
        host, newest = state.hosts[at], len(state.files)
        assert host.lease is not None
        if host.guest not in ("runs", "stalled"):  # held
            kept = None if self.rules.forget_when_overtaken else self._lapsed(host.lease.generation)
            return _with(state, at, host._replace(lease=kept, call=None))
        if state.files[-1].host == at and state.files[-1].vmx and newest > host.lease.generation:
            return _with(state, at, Host("stalled", self._lapsed(newest)))
        return _with(state, at, _NOTHING)  # _end_fenced

    # ------------------------------------------------------------ agent

    def _agents(self, state: State, at: int, host: Host) -> Iterator[Successor]:
        newest, file = len(state.files), state.files[-1]
        match host.guest:
            case "none" if host.claim is None and self.world.restarts:
                yield from self._breaks(state, at, host)
                if file.host == at and host.watch is None and host.look is None and newest < self.generations:
                    yield f"POWER ON, claims {newest + 1}", self._begin(state, at, newest + 1)
            case "runs" if self.world.hand_over and host.lease is not None and newest < self.generations:
                generation = host.lease.generation
                if generation == newest:  # destination: the draft was made, so it was the newest
                    for to, other in enumerate(state.hosts):
                        if other == _NOTHING:
                            away = host._replace(guest="suspended", decides=generation + 1)
                            there = Host("restored", decides=generation + 1)
                            yield f"HAND OVER to {NAMES[to]}", _with(_with(state, at, away), to, there)
            case "suspended":
                if host.word in ("RESUMED", "ABORT"):
                    yield f"HEAR {host.word}", self._hear(state, at, host)
                if host.claim is None:
                    yield "hears nothing: CLAIM BACK", self._claim_back(state, at, host)
            case "restored" if host.claim is None:
                yield f"claims {host.decides}", self._begin(state, at, host.decides)
                yield "ABORT", self._abort(state, at)
            case "unsettled" if host.claim is None:
                yield from self._settles(state, at, host)

    def _breaks(self, state: State, at: int, host: Host) -> Iterator[Successor]:
        """Datastore.await_silence. Unless it matters when a look is asked for, it is when it arrives."""
        newest, file = len(state.files), state.files[-1]
        look, watch = host.look, host.watch
        if look is None and watch is None and file.host != at and newest < self.generations:
            first = Look(0) if self.slow_looks else Look(0, newest, file.pulse)
            yield "WATCH", _with(state, at, host._replace(look=first))
        elif look is None and watch is not None and (self.slow_looks or watch.age >= self.lease_s):
            further = Look(watch.age) if self.slow_looks else Look(watch.age, newest, file.pulse)
            yield "LOOK", _with(state, at, host._replace(look=further))
        elif look is not None and not look.generation:
            arrived = look._replace(generation=newest, pulse=file.pulse)
            yield "the look arrives", _with(state, at, host._replace(look=arrived))
        elif look is not None and watch is None:
            age = look.asked if self.rules.watch_from_asking else 0
            began = host._replace(look=None, watch=Watched(look.generation, look.pulse, age))
            yield "WATCH answered", _with(state, at, began)
        elif look is not None and watch is not None:
            asked = watch.age if self.rules.watch_until_answer else look.asked
            sight = Watch(watch.generation, watch.pulse, 0).saw(look.generation, look.pulse, asked)
            seen = _with(state, at, host._replace(look=None, watch=watch if sight is Sight.UNSURE else None))
            if sight is Sight.DEAD:
                seen = self._begin(seen, at, watch.generation + 1)
            yield f"LOOK answered: {sight.name}", seen

    def _hear(self, state: State, at: int, host: Host) -> State:
        if host.word == "RESUMED":
            return _with(state, at, _NOTHING)
        return self._go_on(state, at, host)

    def _go_on(self, state: State, at: int, host: Host) -> State:
        guest = "runs" if host.lease is not None and self.lasts(host.lease, self.world.slips) else "stalled"
        return _with(state, at, Host(guest, host.lease, host.call))

    def _claim_back(self, state: State, at: int, host: Host) -> State:
        if self.rules.resume_on_silence:
            return self._go_on(state, at, host)
        return self._begin(state, at, host.decides, word=host.word if self.rules.hear_after_claim else _DEAF)

    def _settles(self, state: State, at: int, host: Host) -> Iterator[Successor]:
        newest, owner = len(state.files), NAMES[state.files[-1].host]
        claim = datastore.Claim(datastore.FORMAT, "vm1", newest, owner, running=True, nonce="")
        if newest < host.decides:
            yield f"SETTLE: claims {host.decides}", self._begin(state, at, host.decides)
            return
        match adoption.fate(claim, NAMES[at], "suspended"):
            case adoption.Fate.DISCARDED:
                yield "SETTLE: discarded", _with(state, at, _NOTHING)
            case adoption.Fate.RUNS_AGAIN if self.rules.resume_what_is_found:
                yield "SETTLE: runs again", self._go_on(state, at, host)
            case adoption.Fate.RUNS_AGAIN if newest < self.generations:
                yield f"SETTLE: claims {newest + 1}", self._begin(state, at, newest + 1)

    def _abort(self, state: State, at: int) -> State:
        return _with(self._say(state, state.hosts[at].decides, "ABORT"), at, _NOTHING)

    def _say(self, state: State, decides: int, word: str) -> State:
        for at, host in enumerate(state.hosts):
            if (host.guest, host.decides, host.word) == ("suspended", decides, ""):
                state = _with(state, at, host._replace(word=word))
        return state

    # ------------------------------------------------------------ faults

    def faults(self, state: State, at: int) -> Iterator[Successor]:
        host, name = state.hosts[at], NAMES[at]
        if host == _NOTHING:
            return
        for how, after in self._unanswered(state, at, host):
            if self.world.crashes:
                yield f"{name}: CRASH{how}", self.tidy(_with(after, at, _NOTHING))
        if host.call is not None:
            pending = self._message(at, host, host.call)
            idle = _with(state, at, host._replace(call=None))
            yield f"{name}: {host.call.step} is not answered", self.tidy(idle)
            for late in self._leave(idle, pending, self.world.late):
                yield f"{name}: {host.call.step} is not answered, and on its way", self.tidy(late)
        if host.guest in ("suspended", "restored"):
            for how, after in self._left_link(state, at, host):
                undecided = host.guest == "restored" and host.claim is not None and not self.rules.discard_undecided
                decides = host.decides if undecided else 0
                given_up = host._replace(guest="unsettled", claim=None, word="", decides=decides)
                yield f"{name}: GIVE UP{how}", self.tidy(self._given_up(after, at, given_up))
            if host.guest == "suspended" and host.claim is not None:
                for how, after in self._left_link(state, at, host):
                    yield f"{name}: GIVE UP{how}; asks again", self.tidy(_with(after, at, host._replace(claim=None)))
        elif host.claim is not None:
            for how, after in self._left_link(state, at, host):
                yield f"{name}: GIVE UP{how}", self.tidy(_with(after, at, host._replace(claim=None)))

    def _given_up(self, state: State, at: int, host: Host) -> State:
        if self.rules.abort_unanswered and state.hosts[at].guest == "restored":
            return self._abort(state, at)
        return _with(state, at, host)

    def _message(self, at: int, host: Host, call: Call) -> Message | None:
        if host.lease is None or call.newest:
            return None
        return Message(call.step, host.lease.generation, at if call.step == "PULSE" else 0, call.pulse)

    def _left_link(self, state: State, at: int, host: Host) -> Iterator[Successor]:
        yield "", state
        claim = host.claim
        if claim is not None and claim.step == Step.LINK.name and claim.generation <= self.generations:
            link = Message("LINK", claim.generation, at, vmx=host.guest == "stalled")
            for late in self._leave(state, link, self.world.late):
                yield f", LINK {claim.generation} is on its way", late

    def _unanswered(self, state: State, at: int, host: Host) -> Iterator[Successor]:
        yield from self._left_link(state, at, host)
        if host.call is not None:
            for late in self._leave(state, self._message(at, host, host.call), self.world.late):
                yield f", {host.call.step} is on its way", late

    def _leave(self, state: State, message: Message | None, kinds: frozenset[str]) -> Iterator[State]:
        if message is not None and message.kind in kinds and len(state.late) < self.world.room:
            yield state._replace(late=(*state.late, message))

    # ------------------------------------------------------------ storage

    def deliver(self, state: State, message: Message) -> State:
        files, generation = state.files, message.generation
        match message.kind:
            case "LINK" if generation == len(files) + 1:
                return state._replace(files=(*files, File(message.host, message.number, 0, message.vmx)))
            case "PULSE" if generation == len(files):
                pulse = _fresh(state) if self.rules.stamped else message.number
                return state._replace(files=(*files[:-1], files[-1]._replace(pulse=pulse)))
            case "FENCE" if self.world.disk:
                return state._replace(user=generation)
        return state

    # ------------------------------------------------------------ states that are the same

    def _forgets(self, state: State, host: Host) -> bool:
        """It has handed over, or found a guest, and will not go on under the lease that it has."""
        if host.guest not in ("suspended", "unsettled") or host.word == "ABORT" or not self.forgets:
            return False
        return (
            host.guest == "unsettled"
            or host.word != ""
            or not any(other.guest == "restored" and other.decides == host.decides for other in state.hosts)
        )

    def tidy(self, state: State) -> State:
        hosts, files, late = state.hosts, state.files, state.late
        newest, pulse = len(files), files[-1].pulse
        if late:  # a name that is taken; a file at which nobody looks
            late = tuple(
                message
                for message in late
                if not (message.kind == "LINK" and message.generation <= newest)
                and not (message.kind == "PULSE" and message.generation != newest)
            )
        coming = [message.number for message in late if message.kind == "PULSE"]
        for host in hosts:
            if host.call is not None and host.call.pulse:
                coming.append(host.call.pulse)
        pulses = {pulse: 0}
        tidied, nonces = [], []
        for host in hosts:
            if host is _NOTHING:
                tidied.append(host)
                continue
            guest, lease, call, claim, watch, look, decides, word = host
            if lease is not None and guest in ("suspended", "unsettled") and self._forgets(state, host):
                lease, call = (Kept(lease.generation, self.lapsed_at) if lease.generation == newest else None), None
            if watch is not None:
                if look is None and (
                    watch.generation != newest or (watch.pulse != pulse and watch.pulse not in coming)
                ):
                    watch = Watched(0, _GONE, self.lease_s)  # it will see that the owner lives
                elif watch.pulse != _GONE:
                    number = pulses.setdefault(watch.pulse, len(pulses))
                    watch = Watched(watch.generation, number, watch.age)
            if look is not None and look.generation:
                look = Look(look.asked, look.generation, pulses.setdefault(look.pulse, len(pulses)))
            if call is not None:
                sent = pulses.setdefault(call.pulse, len(pulses)) if call.pulse else 0
                matters = call.step == "PULSE" and not (self.lapses and lease and lease.age >= self.lapsed_at)
                call = Call(call.step, call.age if matters else self.lapsed_at, sent, call.newest)
            if claim is not None:
                nonces.append((claim.generation, claim.nonce))
            tidied.append(Host(guest, lease, call, claim, watch, look, decides, word))
        if late:
            late = tuple(
                sorted(
                    m._replace(number=pulses.setdefault(m.number, len(pulses))) if m.kind == "PULSE" else m
                    for m in late
                )
            )
        names = []
        for generation, file in enumerate(files, 1):
            nonce = file.nonce if (generation, file.nonce) in nonces else 0
            lease = hosts[file.host].lease
            vmx = generation == newest and file.vmx and lease is not None and lease.generation < newest
            names.append(File(file.host if generation == newest else 0, nonce, 0, vmx))
        user, owned = (state.user, state.owned) if self.world.disk else (0, 0)
        return State(tuple(tidied), tuple(names), user, owned, late)


def _with(state: State, at: int, host: Host) -> State:
    hosts, files, user, owned, late = state
    return State((*hosts[:at], host, *hosts[at + 1 :]), files, user, owned, late)


def _claiming(claim: Claim) -> Claiming:
    return Claiming(claim.generation, str(claim.nonce), -claim.age, Step[claim.step])


def _as(claim: Claim, claiming: Claiming) -> Claim:
    return claim._replace(step=claiming.step.name, newest=0)


def _fresh(state: State) -> int:
    """A pulse that has never been."""
    numbers = [state.files[-1].pulse, *(message.number for message in state.late)]
    for host in state.hosts:
        numbers += [thing.pulse for thing in (host.call, host.watch, host.look) if thing is not None]
    return max(numbers) + 1


def _told(message: Message) -> str:
    return f"{message.kind} {message.generation}"


# ------------------------------------------------------------ what must hold


def two_run(state: State) -> str | None:
    run = [NAMES[at] for at, host in enumerate(state.hosts) if host.guest == "runs"]
    return f"{' and '.join(run)} run the VM" if len(run) > 1 else None


def two_winners(state: State) -> str | None:
    owned = [host.lease.generation for host in state.hosts if host.lease is not None]
    return "two hosts own one generation" if len(set(owned)) < len(owned) else None


def disk_open(state: State) -> str | None:
    """Somebody runs the VM, and a write that was sent under an older generation would be accepted."""
    for at, host in enumerate(state.hosts):
        own = host.lease.generation if host.guest == "runs" and host.lease is not None else 0
        if state.user < own and state.owned >> state.user & 1:
            return f"{NAMES[at]} runs under {own}, and the disk takes writes of {state.user}"
    return None


def nobody_left(state: State) -> str | None:
    """For a world without crashes: its RAM is nowhere any more."""
    return None if any(host.guest != "none" for host in state.hosts) else "nobody has the VM any more"


Invariant = Callable[[State], str | None]


class Found(NamedTuple):
    """`actions`: what has happened, without who and which."""

    states: int
    actions: set[str]
    violation: Violation | None


def explore(model: Model, *invariants: Invariant, at_most: int = 3_000_000) -> Found:
    """Breadth first, so that the story of a violation is a shortest one."""
    first = model.tidy(model.initial())
    came: dict[State, tuple[State, str] | None] = {first: None}
    queue = deque([first])
    while queue:
        state = queue.popleft()
        for invariant in invariants:
            if what := invariant(state):
                return Found(len(came), _actions(came), Violation(what, _story(came, state)))
        for label, after in model.successors(state):
            if after not in came:
                came[after] = (state, label)
                queue.append(after)
        if len(came) > at_most:
            raise AssertionError(f"more than {at_most} states")
    return Found(len(came), _actions(came), None)


def _actions(came: dict[State, tuple[State, str] | None]) -> set[str]:
    labels = {step[1] for step in came.values() if step is not None}
    return {re.sub(r"esx\d(: )?|\d", "", label).strip() for label in labels}


def _story(came: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    told: list[str] = []
    while (step := came[state]) is not None:
        before, label = step
        told.append(f"{label:60} {_changes(before, state)}".rstrip())
        state = before
    return tuple(reversed(told))


def _changes(before: State, after: State) -> str:
    """Which guests are in another state now."""
    pairs = zip(NAMES, before.hosts, after.hosts, strict=False)
    return ", ".join(f"{name} {now.guest}" for name, was, now in pairs if was.guest != now.guest)


class Survivor:
    """For `explore`: wherever it has come to, and whoever is left alone with the storage, the VM comes to run again.

    It can write its disk then, and nobody else can. The others have crashed, or are cut off for good, and nothing goes
    wrong any more: late messages have arrived.
    """

    def __init__(self, world: World, rules: Rules | None = None) -> None:
        self.model = Model(world, rules)
        self.model.generations += 4
        self._well: set[State] = set()

    def __call__(self, state: State) -> str | None:
        for at, host in enumerate(state.hosts):
            alone = state._replace(hosts=tuple(host if other == at else _NOTHING for other in range(len(state.hosts))))
            if (stuck := self._runs(alone, at)) is not None:
                return f"{NAMES[at]} is alone, and the VM does not run again: {stuck.hosts[at]}"
        return None

    def _runs(self, state: State, at: int) -> State | None:
        """Where it is stuck."""
        for message in state.late:
            state = self.model.deliver(state, message)
        state = self.model.tidy(state._replace(late=()))
        way: list[State] = []
        for _ in range(100):
            if state in self._well or self._is_well(state, state.hosts[at]):
                self._well.update(way)
                return None
            way.append(state)
            steps = list(self.model.steps(state, at))
            ready = [after for label, after in steps if self._is_due(label, state.hosts[at])]
            state = ready[-1] if ready else self.model.tick(state)
        return state

    def _is_well(self, state: State, host: Host) -> bool:
        fenced = not self.model.world.disk or (host.lease is not None and host.lease.generation == state.user)
        return host.guest == "runs" and fenced

    def _is_due(self, label: str, host: Host) -> bool:
        """Not what a fault would be, and not a pulse that is none of this tick's."""
        what = label.partition(": ")[2]
        if "lost" in what or "twice" in what or "more" in what or what == "ABORT":
            return False
        if host.guest in ("suspended", "unsettled") and what.startswith("PULSE"):
            return False
        return not (what.startswith("CHECK: ") and (host.claim or host.call) and _answered(host))


def _answered(host: Host) -> bool:
    return any(thing is not None and thing.newest for thing in (host.claim, host.call))
