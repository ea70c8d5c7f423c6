"""The state table: each role alone, the sequence of frames, and both sides of a migration against each other."""

import re
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pairs import session_in

from hosts import protocol
from hosts.protocol import (
    FINAL,
    TABLE,
    Header,
    InvalidTransition,
    Kind,
    LocalProtocolError,
    RemoteProtocolError,
    Session,
)
from hosts.ram import PAGE

MESSAGES = {f"{direction} {kind.name}" for direction in ("send", "receive") for kind in Kind}
OWN_ACTS = {"resume", "stop", "whole", "claim", "claim lost", "lost"}
EVENTS = sorted(MESSAGES | OWN_ACTS)
CLAIMED = {"claimed", "owned"}  # the points of no return
roles = st.sampled_from(sorted(TABLE))


def reachable(role: str, state: str) -> set[str]:
    """The states that some events lead to from here, this one included."""
    seen, todo = {state}, [state]
    while todo:
        for following in TABLE[role].get(todo.pop(), {}).values():
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return seen


@pytest.mark.parametrize("role", TABLE)
def test_the_table_has_no_event_or_state_that_nobody_knows(role: str) -> None:
    for state, events in TABLE[role].items():
        assert state not in FINAL, "nothing follows a final state"
        assert events
        assert events.keys() <= set(EVENTS)
        assert set(events.values()) <= TABLE[role].keys() | FINAL


@pytest.mark.parametrize("role", TABLE)
def test_every_state_can_be_reached_and_has_a_way_to_an_end(role: str) -> None:
    ends = FINAL if role in ("source", "destination") else {"done", "aborted"}
    assert reachable(role, "new") == TABLE[role].keys() | ends
    for state in TABLE[role]:
        assert reachable(role, state) & FINAL


@pytest.mark.parametrize("role", TABLE)
def test_a_broken_connection_has_a_defined_end_wherever_the_peer_is_needed(role: str) -> None:
    for state, events in TABLE[role].items():
        if any(event in MESSAGES for event in events):
            assert "lost" in events, state


def test_from_a_point_of_no_return_no_event_leads_to_aborted() -> None:
    assert TABLE["destination"]["restoring"]["claim"] == "claimed"
    assert reachable("destination", "claimed") == {"claimed", "running", "done", "lost"}
    assert TABLE["destination"]["rebuilding"]["claim"] == "owned"
    assert reachable("destination", "owned") == {"owned", "resumed", "filling", "filled", "done", "lost"}
    assert reachable("source", "serving") == {"serving", "served", "done", "lost"}
    entries = {
        (state, event) for state, events in TABLE["destination"].items() for event in events if events[event] in CLAIMED
    }
    assert entries == {("restoring", "claim"), ("rebuilding", "claim")}, "there is no other way in"


@pytest.mark.parametrize(
    ("waits", "asks", "after"), [("handed_over", "uncertain", "done"), ("entrusted", "doubtful", "lost")]
)
def test_a_source_that_has_handed_over_is_never_aborted_by_silence(waits: str, asks: str, after: str) -> None:
    assert TABLE["source"][waits]["lost"] == asks
    assert TABLE["source"][asks] == {"claim": "aborted", "claim lost": after}
    assert "send ABORT" not in TABLE["source"][waits]


@pytest.mark.parametrize("role", TABLE)
@pytest.mark.parametrize("state", FINAL)
@pytest.mark.parametrize("event", EVENTS)
def test_nothing_happens_in_a_final_state(role: str, state: str, event: str) -> None:
    session = session_in(role, state)
    assert not session.may(event)
    with pytest.raises((InvalidTransition, RemoteProtocolError)):
        session.step(event)
    assert session.state == state


@given(roles, st.lists(st.sampled_from(EVENTS), max_size=60))
def test_any_sequence_of_events_leaves_a_state_of_the_table_or_is_refused(role: str, events: list[str]) -> None:
    session = Session(role)
    for event in events:
        before, allowed = session.state, session.may(event)
        if allowed:
            session.step(event)
            assert session.state == TABLE[role][before][event]
        else:
            # who is to blame: the peer for what was received, this side for the rest
            blamed = RemoteProtocolError if event.startswith("receive ") else InvalidTransition
            with pytest.raises(blamed, match=f"^{role} in state {before}: {event} is not allowed; before it: "):
                session.step(event)
            assert session.state == before
    assert session.state in TABLE[role].keys() | FINAL


@given(roles, st.data())
def test_a_walk_along_the_table_never_leaves_aborted_after_a_claim(role: str, data: st.DataObject) -> None:
    entered: list[str] = []
    session = Session(role, lambda role, state: entered.append(state))
    walked: list[str] = []
    while session.state not in FINAL:
        assume(len(walked) < 200)
        walked.append(data.draw(st.sampled_from(sorted(TABLE[role][session.state]))))
        session.step(walked[-1])
    assert entered[-1] == session.state
    assert all(one != other for one, other in pairwise(entered)), "each state is told once"
    if role == "destination":
        assert (session.state == "aborted") == ("claim" not in walked)
        assert (session.state == "done") <= ("resume" in walked)


def test_an_invalid_transition_tells_the_story_so_far() -> None:
    session = Session("source")
    session.sending(Kind.HELLO)
    session.received(Header(Kind.WELCOME, 0, 0, 0, 1, 0))
    for _ in range(500):
        session.sending(Kind.PAGES)
    with pytest.raises(InvalidTransition) as refusal:
        session.sending(Kind.STATE)
    assert str(refusal.value) == (
        "source in state precopy: send STATE is not allowed; before it: send HELLO -> receive WELCOME -> send PAGES"
    )
    assert isinstance(refusal.value, LocalProtocolError)
    with pytest.raises(InvalidTransition, match="destination in state new: claim is not allowed; before it: nothing"):
        Session("destination").step("claim")


def test_a_long_story_is_told_from_its_latest_events() -> None:
    session = session_in("source", "precopy")
    for number in range(1, 40):
        session.sending(Kind.PAGES)
        session.sending(Kind.ROUND_END)
        session.received(Header(Kind.ROUND_ACK, number, 0, 0, number, 0))
    with pytest.raises(InvalidTransition) as refusal:
        session.step("claim")
    told = str(refusal.value).partition("before it: ")[2].split(" -> ")
    assert told == ["send PAGES", "send ROUND_END", "receive ROUND_ACK"] * 4


# ---------------------------------------------------------------- sequence numbers


def test_frames_are_numbered_from_1_in_each_direction() -> None:
    session = Session("source")
    assert session.sending(Kind.HELLO) == 1
    session.received(Header(Kind.WELCOME, 0, 0, 0, 1, 0))
    assert [session.sending(Kind.PAGES), session.sending(Kind.ZERO), session.sending(Kind.ROUND_END)] == [2, 3, 4]
    session.received(Header(Kind.ROUND_ACK, 1, 0, 0, 2, 0))


@given(st.integers(0, 5), st.integers(0, 2**64 - 1))
def test_a_frame_out_of_order_is_refused(before: int, sequence: int) -> None:
    assume(sequence != before + 1)
    session = session_in("destination", "receiving")
    for number in range(before):
        session.received(Header(Kind.PAGES, 1, 1, 1, number + 1, PAGE + 8))
    with pytest.raises(RemoteProtocolError, match=f"PAGES is frame {sequence}, due was {before + 1}"):
        session.received(Header(Kind.PAGES, 1, 1, 1, sequence, PAGE + 8))
    assert session.state == "receiving"


# ---------------------------------------------------------------- the diagrams


class Diagrams(NamedTuple):
    """What the module's drawings show: the states in the columns of each role, and the messages on the arrows."""

    states: dict[str, set[str]]
    messages: set[str]
    text: str


def diagrams() -> Diagrams:
    states: dict[str, set[str]] = {}
    messages: set[str] = set()
    columns: dict[str, int] = {}
    text = protocol.__doc__ or ""
    for line in text.splitlines():
        heading = re.fullmatch(r" {4}(\w+)(?: \(\w+\))? +(\w+)(?: \(\w+\))?", line)
        if heading and {heading[1], heading[2]} <= TABLE.keys():
            columns = {heading[1]: heading.start(1), heading[2]: heading.start(2)}
        elif line[:1].strip():  # text at the margin: the drawing has ended
            columns = {}
        elif columns and "ending" not in line:
            for role, at in columns.items():
                if state := re.match(r"[a-z_]+", line[at:]):
                    states.setdefault(role, set()).add(state[0])
            if "--" in line:
                messages |= set(re.findall(r"\b[A-Z_]{4,}\b", line))
    return Diagrams(states, messages, text)


@pytest.mark.parametrize("role", TABLE)
def test_the_diagrams_show_exactly_the_states_of_the_table(role: str) -> None:
    shown = diagrams()
    in_words = {state for state in ("uncertain", "doubtful", "lost") if f"`{state}`" in shown.text}
    assert in_words == {"uncertain", "doubtful", "lost"}
    assert shown.states[role] <= TABLE[role].keys() | FINAL, "nothing that the table does not have"
    assert TABLE[role].keys() <= shown.states[role] | in_words, "and nothing is missing"


def test_the_diagrams_show_exactly_the_messages_that_there_are() -> None:
    shown = diagrams()
    assert "ABORT goes either way" in shown.text
    assert shown.messages | {"ABORT"} == {kind.name for kind in Kind}


# ---------------------------------------------------------------- both sides together


class World(NamedTuple):
    """Two sides of a connection, what is under way between them, and who has claimed the next generation."""

    here: str = "new"  # source or sender
    there: str = "new"  # destination or receiver
    to_there: tuple[str, ...] = ()
    to_here: tuple[str, ...] = ()
    owner: str = ""


UNDER_WAY = 2  # messages: TCP keeps their order, so longer queues show nothing new
# What a further connection never carries, by its purpose
SILENT = {"pages": {"FETCH"}, "faults": {"ROUND_END"}}


def successors(world: World, pair: tuple[str, str], silent: set[str]) -> Iterator[tuple[str, World]]:
    """Everything that may happen next: either side acts, receives, or loses the connection."""
    for role, side, inbox, outbox in zip(
        pair, ("here", "there"), ("to_here", "to_there"), ("to_there", "to_here"), strict=True
    ):
        waiting, sent = getattr(world, inbox), getattr(world, outbox)
        for event, following in TABLE[role].get(getattr(world, side), {}).items():
            verb, _, message = event.partition(" ")
            changes: dict = {side: following}
            if verb == "send":
                if len(sent) == UNDER_WAY or message in silent:
                    continue
                changes[outbox] = (*sent, message)
            elif verb == "receive":
                if waiting[:1] != (message,):
                    continue
                changes[inbox] = waiting[1:]
            elif verb == "claim":
                if (event == "claim") == bool(world.owner):
                    continue  # exactly one claim of a generation succeeds
                changes["owner"] = world.owner or role
            yield f"{role}: {event}", world._replace(**changes)


Worlds = dict[World, dict[str, World]]


def explore(pair: tuple[str, str], silent: set[str]) -> Worlds:
    """Every world that can come about, and what may happen in it."""
    worlds: Worlds = {}
    todo = deque([World()])
    while todo:
        world = todo.popleft()
        if world not in worlds:
            worlds[world] = dict(successors(world, pair, silent))
            todo.extend(worlds[world].values())
    return worlds


MAIN = explore(("source", "destination"), set())
# connection -> its worlds, its roles
ALL: dict[str, tuple[Worlds, tuple[str, str]]] = {"main": (MAIN, ("source", "destination"))} | {
    purpose: (explore(("sender", "receiver"), silent), ("sender", "receiver")) for purpose, silent in SILENT.items()
}


def finished(world: World) -> bool:
    return {world.here, world.there} <= FINAL


@pytest.mark.parametrize("connections", [["main"], ["pages", "faults"]], ids="-".join)
def test_every_state_of_the_table_comes_about_between_the_two_sides(connections: list[str]) -> None:
    worlds = {world for name in connections for world in ALL[name][0]}
    here, there = ALL[connections[0]][1]
    assert {world.here for world in worlds} == reachable(here, "new")
    assert {world.there for world in worlds} == reachable(there, "new")


def test_the_vm_never_runs_at_both_ends_and_runs_or_is_known_to_be_lost_in_the_end() -> None:
    at_the_source = {"new", "greeting", "precopy", "round_ended", "aborted"}
    at_the_destination = {"running", "resumed", "filling", "filled", "done"}
    ends = set()
    for world in MAIN:
        assert not (world.here in at_the_source and world.there in at_the_destination), world
        if finished(world):
            ends.add((world.here, world.there))
    assert ends == {
        ("aborted", "aborted"),  # it runs at the source
        ("done", "done"),  # it runs at the destination
        ("done", "lost"),  # claimed there, and could not be resumed
        ("lost", "lost"),  # they lost each other while it needed both
        ("lost", "done"),  # COMPLETE was lost: it runs at the destination, and the datastore says so
    }


def test_at_most_one_side_thinks_that_it_owns_the_vm() -> None:
    """The source owns it until somebody claims; a source that has handed over claims itself before it goes on."""
    for world in MAIN:
        claimed = world.there in reachable("destination", "claimed") | reachable("destination", "owned")
        assert claimed == (world.owner == "destination"), world
        assert (world.here in ("done", "lost", "serving", "served")) <= claimed, world
        assert (world.here == "aborted") <= (not claimed), world
        assert (world.owner == "source") <= (world.here == "aborted"), world


def test_after_the_destinations_claim_no_way_leads_the_source_to_aborted_and_before_it_none_elsewhere() -> None:
    for world, following in MAIN.items():
        for event, after in following.items():
            if after.here == world.here or after.here not in FINAL:
                continue
            assert (after.here == "aborted") == (world.owner != "destination"), (event, world)


# The states in which a side listens
WAITS = {
    "source": {"greeting", "round_ended", "handed_over", "entrusted", "served"},
    "destination": {"new", "receiving", "switching", "listed", "filling"},
    "sender": {"joining", "streaming", "round_ended"},
    "receiver": {"new", "streaming"},
}


def is_answer(event: str) -> bool:
    return event.startswith("receive ") and event != "receive ABORT"


@pytest.mark.parametrize("connection", ALL)
def test_a_side_that_waits_for_the_other_never_gets_a_message_that_it_must_refuse(connection: str) -> None:
    worlds, (here, there) = ALL[connection]
    for role in (here, there):
        assert {state for state, events in TABLE[role].items() if any(map(is_answer, events))} == WAITS[role]
    for world, following in worlds.items():
        if world.here in WAITS[here] and world.to_here:
            assert f"{here}: receive {world.to_here[0]}" in following, world
        if world.there in WAITS[there] and world.to_there:
            assert f"{there}: receive {world.to_there[0]}" in following, world


@pytest.mark.parametrize("ending", ["pre-copy", "post-copy"])
def test_without_a_fault_every_migration_can_be_completed(ending: str) -> None:
    faults = ("lost", "ABORT", "stop", "whole")
    seen: set[World] = set()
    todo = [World()]
    while todo:
        world = todo.pop()
        if world in seen:
            continue
        seen.add(world)
        steps = {event: after for event, after in MAIN[world].items() if not event.endswith(faults)}
        assert steps or (world.here, world.there) == ("done", "done"), world
        other = "listed" if ending == "pre-copy" else "handed_over"
        todo += [after for after in steps.values() if after.here != other]
    assert World("done", "done", owner="destination") in seen


@pytest.mark.parametrize("connection", ALL)
def test_whatever_has_happened_both_sides_can_come_to_an_end(connection: str) -> None:
    worlds, _ = ALL[connection]
    ended = {world for world in worlds if finished(world)}
    before: dict[World, list[World]] = {}
    for world, following in worlds.items():
        for after in following.values():
            before.setdefault(after, []).append(world)
    todo = list(ended)
    while todo:
        for world in before.get(todo.pop(), []):
            if world not in ended:
                ended.add(world)
                todo.append(world)
    assert ended == worlds.keys()
