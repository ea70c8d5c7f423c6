"""Whom the controller believes: stories of frames, orders and time, decisions compared."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.guard import (
    CONTESTED,
    DAMPED,
    DAMPED_MOVES,
    DAMPED_S,
    HOLD_S,
    MACS_OF_A_CLIENT,
    MAX_INTENT_S,
    NOT_THERE,
    OF_A_VM,
    STILL_THERE,
    TOO_MANY,
    Guard,
    Intent,
    Place,
    Policy,
)
from controller.locations import Decision, Held, Learned, Locations, Moved, Refused
from controller.network import Port
from controller.policy import policy_of
from topologies.leaf_spine import leaf_spine
from topologies.plan import read_plan

VM, CLIENT, STRANGER = "00:50:56:00:00:01", "00:50:56:00:01:64", "02:00:00:00:00:01"
S1 = "0000000000000001"
ESX1, ESX2, C1, UNKNOWN = (Port(S1, number) for number in (1, 2, 3, 4))
SECOND = 10**9


class Story:
    """Frames at ports, with a clock."""

    def __init__(self) -> None:
        guard = Guard(policy_of(read_plan()))
        for port, name in ((ESX1, "s1-esx1"), (ESX2, "s1-esx2"), (C1, "s1-c1"), (UNKNOWN, "s1-x")):
            guard.name_port(port, name)
        self.guard, self.locations, self.now_ns = guard, Locations(guard), 0
        self.intents = 0

    def sees(self, mac: str, at: Port, after_s: float = 0.001) -> Decision | None:
        self.now_ns += int(after_s * SECOND)
        return self.locations.place(mac, at, "rarp", self.now_ns)

    def intend(self, to: str, for_s: float = 60.0) -> bool:
        self.intents += 1  # two of the same moment differ by their microseconds
        until_s = self.now_ns / SECOND + for_s + self.intents / 1e6
        return self.guard.intend(Intent(VM, "esx1", to, until_s), self.now_ns / SECOND)

    def wait(self, seconds: float) -> list[Moved | Refused]:
        self.now_ns += int(seconds * SECOND)
        return self.locations.expire(self.now_ns)

    def at(self, mac: str = VM) -> Port | None:
        return self.locations.at(mac)


@pytest.fixture
def story() -> Story:
    story = Story()
    assert isinstance(story.sees(VM, ESX1), Learned)
    assert isinstance(story.sees(CLIENT, C1), Learned)
    return story


def reason(decision: Decision | None) -> str:
    assert isinstance(decision, Refused), decision
    return decision.reason


def test_the_plan_says_what_is_behind_a_port() -> None:
    policy = policy_of(leaf_spine())
    assert policy.place("leaf1-esx1") == Place("uplink", "esx1")
    assert policy.place("leaf2-c1") == Place("client", "c1")
    assert policy.place("spine1-leaf2") == Place("trunk", "leaf2")
    assert policy.place("leaf1-nobody").role == "client"
    assert (policy.vms, policy.clients) == ({VM: "10.0.0.11"}, {CLIENT: "10.0.0.100"})
    assert policy.switches == {f"{n:016x}": s for n, s in enumerate(("leaf1", "spine1", "spine2", "leaf2"), 1)}


def test_without_a_plan_everything_is_believed() -> None:
    guard = Guard(Policy())
    locations = Locations(guard)
    locations.place(VM, ESX1, "frame", 0)
    assert locations.place(VM, C1, "rarp", 1) == Moved(VM, ESX1, C1, "rarp", 1)


@pytest.mark.parametrize("port", [C1, UNKNOWN])
def test_a_vms_mac_is_refused_behind_a_client_whether_known_or_not(story: Story, port: Port) -> None:
    assert reason(story.sees(VM, port)) == OF_A_VM
    assert story.at() == ESX1
    assert reason(Story().sees(VM, port)) == OF_A_VM


def test_a_client_has_few_macs_and_a_host_many(story: Story) -> None:
    macs = [f"02:00:00:00:01:{number:02x}" for number in range(50)]
    decisions = [story.sees(mac, C1) for mac in macs]
    learned = [d for d in decisions if isinstance(d, Learned)]
    assert len(learned) == MACS_OF_A_CLIENT - 1, "its own was there before"
    assert {reason(d) for d in decisions[len(learned) :]} == {TOO_MANY}
    assert all(isinstance(story.sees(f"02:00:00:00:02:{n:02x}", ESX1), Learned) for n in range(50))


# ---------------------------------------------------------------- announced by the manager


def test_an_announced_move_is_believed_at_once_and_for_once(story: Story) -> None:
    story.intend("esx2")
    assert story.sees(VM, ESX2) == Moved(VM, ESX1, ESX2, "rarp", story.now_ns, announced=True)
    assert isinstance(story.sees(VM, ESX1), Held), "a late frame of the old place is no move back"
    story.wait(HOLD_S)
    assert story.at() == ESX1
    assert isinstance(story.sees(VM, ESX2), Held), "it was for one move"


def test_an_announcement_is_for_one_host_and_ends(story: Story) -> None:
    story.intend("esx1")
    assert isinstance(story.sees(VM, ESX2), Held)
    story = Story()
    story.sees(VM, ESX1)
    story.intend("esx2", for_s=5)
    assert isinstance(story.sees(VM, ESX2, after_s=6), Held)


def test_an_announcement_does_not_open_a_clients_port(story: Story) -> None:
    story.intend("c1")
    assert reason(story.sees(VM, C1)) == OF_A_VM


def test_a_new_vm_is_one_from_its_first_announcement_on(story: Story) -> None:
    assert story.guard.intend(Intent(STRANGER, "", "esx1", 60), 0)
    assert not story.guard.intend(Intent(STRANGER, "", "esx1", 61), 0)
    assert reason(story.sees(STRANGER, C1)) == OF_A_VM


def test_an_announcement_is_not_taken_twice_nor_after_a_newer_one(story: Story) -> None:
    first, second = (Intent(VM, "esx1", to, until_s) for to, until_s in (("esx2", 60.0), ("esx1", 61.0)))
    story.guard.intend(first, 0)
    assert isinstance(story.sees(VM, ESX2), Moved)
    with pytest.raises(ValueError, match="told before"):
        story.guard.intend(first, 1)
    story.guard.intend(second, 1)
    with pytest.raises(ValueError, match="told before"):
        story.guard.intend(first, 2)


def test_a_mac_that_becomes_a_vms_while_it_is_held_for_a_client_stays(story: Story) -> None:
    story.sees(STRANGER, ESX1)
    assert isinstance(story.sees(STRANGER, C1), Held)
    story.guard.intend(Intent(STRANGER, "", "esx1", 60), 0)
    assert [reason(decision) for decision in story.wait(HOLD_S)] == [OF_A_VM]
    assert story.at(STRANGER) == ESX1


def test_a_move_that_is_decided_already_is_not_decided_again(story: Story) -> None:
    held = story.sees(VM, ESX2)
    assert isinstance(held, Held)
    story.sees(VM, ESX1)
    assert story.locations.believe(held, story.now_ns) is None and story.at() == ESX1


def test_an_announcement_lasts_an_hour_at_most(story: Story) -> None:
    with pytest.raises(ValueError, match="3600 s at most"):
        story.intend("esx2", for_s=MAX_INTENT_S + 1)


def test_a_manager_may_move_a_vm_to_and_fro_as_often_as_it_likes(story: Story) -> None:
    for number in range(10 * DAMPED_MOVES):
        story.intend(f"esx{2 - number % 2}")
        assert isinstance(story.sees(VM, (ESX2, ESX1)[number % 2]), Moved)


# ---------------------------------------------------------------- not announced


def test_a_move_that_nobody_announced_is_one_once_its_old_place_is_silent(story: Story) -> None:
    assert story.sees(VM, ESX2) == Held(VM, ESX1, ESX2, "rarp", story.now_ns)
    assert story.sees(VM, ESX2) is None
    assert story.wait(HOLD_S / 2) == [] and story.at() == ESX1
    assert story.wait(HOLD_S) == [Moved(VM, ESX1, ESX2, "rarp", story.now_ns)]
    assert story.at() == ESX2 and story.wait(1) == []


def test_an_answer_of_the_old_place_refutes_it(story: Story) -> None:
    story.sees(VM, ESX2)
    assert reason(story.sees(VM, ESX1)) == STILL_THERE
    assert story.wait(1) == [] and story.at() == ESX1


def test_two_places_at_once_are_not_believed(story: Story) -> None:
    story.guard.name_port(UNKNOWN, "s1-esx1")
    story.sees(VM, ESX2)
    assert reason(story.sees(VM, UNKNOWN)) == CONTESTED


def test_a_lost_port_takes_what_is_held_with_it(story: Story) -> None:
    story.sees(VM, ESX2)
    assert [reason(d) for d in story.locations.forget_port(ESX2)] == [NOT_THERE]
    assert story.wait(1) == [] and story.at() == ESX1


def test_too_many_moves_that_nobody_announced_are_refused_for_a_while(story: Story) -> None:
    places = [ESX2, ESX1] * DAMPED_MOVES
    for place in places[:DAMPED_MOVES]:
        assert isinstance(story.sees(VM, place), Held)
        assert len(story.wait(HOLD_S)) == 1
    assert reason(story.sees(VM, places[DAMPED_MOVES])) == DAMPED
    story.intend("esx1" if places[DAMPED_MOVES] == ESX1 else "esx2")
    assert isinstance(story.sees(VM, places[DAMPED_MOVES]), Moved), "the manager lifts it"
    story = Story()
    story.sees(VM, ESX1)
    for place in places[:DAMPED_MOVES]:
        story.sees(VM, place)
        story.wait(HOLD_S)
    assert isinstance(story.sees(VM, places[DAMPED_MOVES], after_s=DAMPED_S), Held), "and so does time"


steps = st.one_of(
    st.tuples(st.just("sees"), st.sampled_from([VM, CLIENT, STRANGER]), st.sampled_from([ESX1, ESX2, C1, UNKNOWN])),
    st.tuples(st.just("intend"), st.sampled_from(["esx1", "esx2", "c1"]), st.none()),
    st.tuples(st.just("wait"), st.sampled_from([0.01, HOLD_S, 60.0]), st.none()),
)


@given(st.lists(steps, max_size=40))
def test_whatever_happens_a_vm_is_only_behind_uplinks_and_each_move_is_said(told: list[tuple]) -> None:
    story, places = Story(), dict[str, Port]()
    for step, what, port in told:
        match step:
            case "sees":
                said = [story.sees(what, port)]
            case "intend":
                story.intend(what)
                said = []
            case _:
                said = list(story.wait(what))
        for decision in said:
            if isinstance(decision, Learned):
                places[decision.mac] = decision.at
            elif isinstance(decision, Moved):
                assert places[decision.mac] == decision.old
                places[decision.mac] = decision.new
        assert story.locations.all() == places
        assert places.get(VM, ESX1) in (ESX1, ESX2)
