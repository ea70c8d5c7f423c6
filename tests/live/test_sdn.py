"""The experiments about the SDN controller, and what a person asks of it while a run is under way."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, SMALL

from topologies.leaf_spine import leaf_spine_toml

WITHIN_S = 60


def run(*words: str, timeout_s: float = 280) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([ROOT / "vmotion", *words], capture_output=True, text=True, timeout=timeout_s, check=False)


def summary_of(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def passes(experiment: str, out: Path, *options: str) -> dict[str, Any]:
    done = run("run", experiment, "--out", str(out), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = summary_of(out)
    assert summary["verdict"] == "pass" and all(summary["checks"].values())
    return summary


def test_whoever_announces_itself_is_found(tmp_path: Path) -> None:
    outcomes = passes("announcements", tmp_path / "out", "--only", "mobility", *SMALL)["announcements"]
    assert len(outcomes) == 8
    assert (tmp_path / "out/announcements.png").stat().st_size > 10_000


def test_mallory_is_not_believed(tmp_path: Path) -> None:
    summary = passes("mac_spoof", tmp_path / "out", "--only", "mobility", *SMALL)
    assert not any(o["stolen"] for o in summary["mac_spoof"])
    assert summary["alarms"]


def test_all_kinds_of_switches_are_compared(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--long"):
        pytest.skip("the long form only")
    spoofed = passes("mac_spoof", tmp_path / "spoof", *SMALL)["mac_spoof"]
    assert {o["controller"] for o in spoofed if o["stolen"]} == {"learning-switch", "standalone"}
    announced = passes("announcements", tmp_path / "announce", *SMALL)["announcements"]
    assert {o["controller"] for o in announced} >= {"mobility", "learning-switch", "standalone"}


def test_the_network_goes_on_without_its_controller_and_is_healed_by_another(tmp_path: Path) -> None:
    acts = passes("controller_failure", tmp_path / "out")["controller_failure"]
    assert [act["lost"] for act in acts if act["name"] == "nothing moves"] == [0]


def test_a_fabric_forwards_around_what_fails(tmp_path: Path) -> None:
    acts = passes("fabric_failover", tmp_path / "out", *SMALL)["fabric_failover"]
    assert not any(act["duplicated"] for act in acts)


def test_a_demo_in_a_fabric_has_the_same_verdict(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.toml", tmp_path / "out"
    plan.write_text(leaf_spine_toml(hosts=2))
    done = run("demo", "--plan", str(plan), "--out", str(out), *SMALL, "--downtime-ms", "300")
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary_of(out)["controller"]["relearn_ms"] is not None


def test_a_baseline_cannot_forward_over_redundant_trunks() -> None:
    done = run("demo", "--plan", "topologies/leaf_spine.toml", "--controller", "standalone")
    assert done.returncode == 2
    assert "--controller standalone" in done.stderr and "loops" in done.stderr


def test_while_a_run_is_under_way_another_terminal_sees_what_its_controller_knows() -> None:
    words = [str(ROOT / "vmotion"), "demo", *SMALL]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as under_way:
        told = until_told("locations", "--json")
        locations = {place["node"]: place for place in json.loads(told)}
        assert "00:50:56:00:00:01" in [place["mac"] for place in locations.values()]
        assert "controller" in run("flows").stdout
        assert run("moves").returncode == 0
        said = under_way.communicate(timeout=120)[0]
    assert under_way.returncode == 0, said
    afterwards = run("locations")
    assert afterwards.returncode == 2
    assert "start an experiment" in afterwards.stderr and len(afterwards.stderr.splitlines()) == 1


def until_told(*words: str) -> str:
    deadline = time.monotonic() + WITHIN_S
    while True:
        done = run(*words)
        if done.returncode == 0 and "00:50:56:00:00:01" in done.stdout:
            return done.stdout
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.2)
