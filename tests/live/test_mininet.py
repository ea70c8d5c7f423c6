"""The seed network under Mininet's own command line, as README shows it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import ROOT, eventually

from experiments.world import open_vswitch
from topologies.events import find, read_events
from topologies.plan import DEFAULT_PLAN

TOPOLOGY = ROOT / "topologies/two_hosts.py"


@pytest.fixture(autouse=True)
def switch_daemons(tmp_path: Path) -> Iterator[None]:
    with open_vswitch(tmp_path):
        yield


def mn(
    folder: Path, typed: str, topo: str = "vmotion", controller: str = "none", topology: Path = TOPOLOGY
) -> tuple[int, str]:
    """Debian's mn with its own Python, as a person calls it: nothing of this project on its path."""
    words = ["mn", "--custom", os.path.relpath(topology, folder), "--topo", topo, "--controller", controller]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        words, cwd=folder, env=environment, input=typed, capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_mn_loads_the_network_from_any_folder(tmp_path: Path) -> None:
    for folder in (ROOT, tmp_path):
        status, said = mn(folder, "esx1 ping -c1 50.50.50.2\nesx2 bridge link show\nesx1 ping -c1 10.0.99.12\nexit\n")
        assert (status, said.count("1 packets transmitted, 1 received")) == (0, 2), said
        assert "master vSwitch0 state forwarding" in said and "master vSwitch1 state forwarding" in said


def test_mn_says_in_one_line_what_is_wrong_with_a_plan_and_kills_nobody(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(DEFAULT_PLAN.read_text().replace('"50.50.50.2"', '"50.50.50.9"'))
    status, said = mn(tmp_path, "exit\n", f"vmotion,{plan}")
    assert status == 2
    assert "different subnets" in said
    assert "Cleanup" not in said and "Traceback" not in said


def test_mn_builds_the_network_of_another_plan(tmp_path: Path) -> None:
    plan = DEFAULT_PLAN.read_text().replace("esx2", "lab2").replace("50.50.50.", "172.16.9.").replace('"c1"', '"pc"')
    (tmp_path / "plan.toml").write_text(plan)
    status, said = mn(
        tmp_path, "esx1 ping -c1 172.16.9.2\nlab2 ping -c1 10.0.99.11\npc hostname -I\n", "vmotion,plan.toml"
    )
    assert (status, said.count("1 packets transmitted, 1 received")) == (0, 2), said
    assert "10.0.0.100" in said


def test_mn_with_our_controller_beside_it_forwards_on_the_vm_network(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    words = [sys.executable, "-m", "controller", "--port", "0", "--events", str(events)]
    with subprocess.Popen(words, cwd=ROOT) as controller:
        eventually(lambda: events.exists() and bool(find(read_events(events), "controller.listening")), "controller")
        (listening,) = find(read_events(events), "controller.listening")
        typed = "esx1 ip addr add 10.0.0.1/24 dev vSwitch0\nesx2 ip addr add 10.0.0.2/24 dev vSwitch0\n"
        typed += "c1 ping -c1 -w10 10.0.0.1\nesx1 ping -c1 -w10 10.0.0.2\n"
        status, said = mn(ROOT, typed, controller=f"remote,ip=127.0.0.1,port={listening['port']}")
        controller.terminate()
    assert status == 0
    assert all(f"64 bytes from 10.0.0.{host}" in said for host in (1, 2)), said
    assert find(read_events(events), "switch.connected")


def test_mn_builds_a_fabric_over_which_our_controller_forwards_without_loops(tmp_path: Path) -> None:
    """It has no plan here: it finds the trunks by LLDP alone."""
    events = tmp_path / "events.jsonl"
    words = [sys.executable, "-m", "controller", "--port", "0", "--events", str(events)]
    with subprocess.Popen(words, cwd=ROOT) as process:
        try:
            eventually(
                lambda: events.exists() and bool(find(read_events(events), "controller.listening")), "controller"
            )
            port = find(read_events(events), "controller.listening")[0]["port"]
            typed = "esx1 ip addr add 10.0.0.21/24 dev vSwitch0\nsh sleep 3\n"
            typed += "c1 ping -c3 10.0.0.21\nesx1 ping -c1 50.50.50.4\n"
            remote = f"remote,ip=127.0.0.1,port={port}"
            status, said = mn(tmp_path, typed, "fabric,4,2,2", remote, ROOT / "topologies/fabric.py")
        finally:
            process.terminate()
    assert (status, said.count("3 packets transmitted, 3 received"), said.count("1 received")) == (0, 1, 1), said
    assert "duplicates" not in said
    assert len(find(read_events(events), "trunk.up")) == 4
