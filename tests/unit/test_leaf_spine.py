"""Plans of fabrics: any size that can be built is valid, and its vMotion subnet no larger than it must be."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topologies.leaf_spine import MAX_HOSTS, leaf_spine, leaf_spine_toml, vmotion_network
from topologies.plan import LEAF_SPINE, PlanError, read_plan, validate


@settings(max_examples=30, deadline=None)
@given(st.integers(2, MAX_HOSTS), st.integers(1, 9), st.integers(1, 9))
def test_a_fabric_has_what_it_was_asked_for(hosts: int, leaves: int, spines: int) -> None:
    plan = leaf_spine(hosts, leaves, spines)
    assert validate(plan) == plan
    assert len(plan.hosts) == hosts and len(plan.trunks) == leaves * spines
    assert {trunk[0] for trunk in plan.trunks} == {f"leaf{n}" for n in range(1, leaves + 1)}
    sizes = [sum(host.switch == f"leaf{n}" for host in plan.hosts) for n in range(1, leaves + 1)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("hosts", "prefix"), [(2, 30), (3, 29), (6, 29), (7, 28), (14, 28), (15, 27), (80, 25)])
def test_the_vmotion_subnet_is_the_smallest_that_fits(hosts: int, prefix: int) -> None:
    assert vmotion_network(hosts).prefixlen == prefix
    assert {str(h.vmotion_port.interface.network) for h in leaf_spine(hosts).hosts} == {f"50.50.50.0/{prefix}"}


@pytest.mark.parametrize(
    ("numbers", "says"), [((1, 2, 2), "1 hosts"), ((4, 0, 2), "0 leaves"), ((4, 2, 10), "10 spines")]
)
def test_a_fabric_that_cannot_be_is_refused(numbers: tuple[int, int, int], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        leaf_spine(*numbers)


def test_the_plan_that_comes_with_the_project_is_the_default_one() -> None:
    assert LEAF_SPINE.read_text() == leaf_spine_toml() + "\n"
    assert read_plan(LEAF_SPINE) == leaf_spine()
