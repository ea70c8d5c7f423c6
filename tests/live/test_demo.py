"""The main experiment as a person runs it, judged by what it leaves in its results folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from programs import SMALL, Program

from experiments.capture import epoch_ns, fields


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    program = Program(tmp_path_factory.mktemp("demo") / "results", "demo", *SMALL)
    status, out, err = program.end()
    assert (status, err) == (0, ""), out
    return program.out, out


@pytest.fixture(scope="module")
def summary(demo: tuple[Path, str]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((demo[0] / "summary.json").read_text())
    return loaded


def test_the_verdict_is_pass_and_every_check_is_true(summary: dict[str, Any]) -> None:
    assert summary["verdict"] == "pass"
    assert summary["schema"] == 1 and summary["experiment"] == "basic_vmotion"
    assert summary["checks"] == dict.fromkeys(summary["checks"], True)
    promised = {"ram_digests_equal", "tcp_connection_survived", "no_transaction_lost", "no_transaction_duplicated"}
    promised |= {
        "vm_answers_from_destination",
        "announced_after_resume",
        "downtime_within_target",
        "nothing_left_behind",
    }
    assert promised <= set(summary["checks"])


def test_the_summary_has_every_figure_of_the_contract(summary: dict[str, Any]) -> None:
    migration, network = summary["migration"], summary["network"]
    assert migration["mode"] == "precopy" and migration["ram_bytes"] == 96 * 2**20
    assert sum(r["bytes"] for r in migration["rounds"]) <= migration["bytes_on_wire"]
    assert set(migration["downtime_parts_ms"]) == {"suspend", "residual", "state", "claim", "resume"}
    assert sum(migration["downtime_parts_ms"].values()) == pytest.approx(migration["downtime_ms"])
    assert migration["downtime_ms"] < migration["total_ms"]
    assert network["transactions"] > 100 and network["udp_gap_ms"] > 0 and network["ping_gap_ms"] > 0
    assert summary["announce"] == {"mode": "rarp", "frames": 5} | {
        "first_after_resume_ms": summary["announce"]["first_after_resume_ms"]
    }
    assert summary["controller"]["relearn_ms"] > 0


def test_only_filled_pages_cross_the_cable(summary: dict[str, Any]) -> None:
    first = summary["migration"]["rounds"][0]
    filled = 0.75 * 96 * 2**20 / 4096
    assert filled <= first["pages"] <= filled * 1.1


def test_the_person_sees_the_rounds_the_table_and_where_to_look(demo: tuple[Path, str]) -> None:
    folder, out = demo
    for words in (
        "round  1",
        "downtime",
        "UDP gap",
        "transactions",
        "verdict  pass",
        f"wireshark {folder}/capture.pcapng",
    ):
        assert words in out


def test_the_merged_capture_is_in_the_order_of_time_and_has_every_link(demo: tuple[Path, str]) -> None:
    rows = fields(demo[0] / "capture.pcapng", "", "frame.time_epoch", "frame.interface_name")
    times = [epoch_ns(epoch) for epoch, _ in rows]
    assert times == sorted(times)
    links = {"c1-eth0", "esx1-vmnic0", "esx1-vmnic1", "esx1-vmnic2", "esx2-vmnic0", "esx2-vmnic1", "esx2-vmnic2"}
    assert links <= {name for _, name in rows}


def test_the_capture_shows_the_rarp_frames_that_the_article_asks_for(demo: tuple[Path, str]) -> None:
    rarp = fields(
        demo[0] / "pcap/esx2.pcapng", "eth.type == 0x8035", "eth.dst", "eth.src", "arp.src.hw_mac", "arp.opcode"
    )
    assert set(rarp) == {("ff:ff:ff:ff:ff:ff", "00:50:56:00:00:01", "00:50:56:00:00:01", "3")}


def test_ram_crosses_the_vmotion_cable_and_nothing_else(demo: tuple[Path, str]) -> None:
    conversation = {"50.50.50.1", "50.50.50.2"}
    assert {row[0] for row in fields(demo[0] / "pcap/esx1.pcapng", "tcp.port == 8000", "ip.src")} == conversation
    elsewhere = 'tcp.port == 8000 and frame.interface_name != "esx1-vmnic1"'
    assert fields(demo[0] / "pcap/esx1.pcapng", elsewhere, "ip.src") == []


def test_events_and_manifest_tell_the_story(demo: tuple[Path, str]) -> None:
    events = [json.loads(line) for line in (demo[0] / "events.jsonl").read_text().splitlines()]
    kinds = [event["kind"] for event in sorted(events, key=lambda event: event["t"])]
    story = ["run.begin", "testbed.up", "vm.powered_on", "migration.begin", "migration.prepared", "vm.suspending"]
    story += ["vm.suspended", "state.received", "sockets.restored", "generation.claimed", "vm.resuming", "vm.resumed"]
    story += ["vm.discarded", "migration.end", "run.end"]
    places = [kinds.index(kind) for kind in story]
    assert places == sorted(places)
    manifest = json.loads((demo[0] / "manifest.json").read_text())
    assert manifest["plan"]["vms"][0]["ram"] == 96 * 2**20 and manifest["seed"] == 1


# ---------------------------------------------------------------- another mode


@pytest.fixture(scope="module")
def encrypted_postcopy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("postcopy") / "results"
    program = Program(out, "demo", *SMALL, "--mode", "postcopy", "--encrypt")
    status, said, err = program.end()
    assert (status, err) == (0, ""), said
    return out, said


def test_a_demo_by_encrypted_post_copy_passes_too(encrypted_postcopy: tuple[Path, str]) -> None:
    folder, said = encrypted_postcopy
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["verdict"] == "pass"
    assert summary["checks"] == dict.fromkeys(summary["checks"], True)
    assert {"ram_digests_equal", "downtime_within_target"} <= set(summary["checks"])
    assert "verdict  pass" in said
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["policy"]["mode"], manifest["transport"]["encrypt"]) == ("postcopy", True)


def test_its_summary_tells_of_pages_that_crossed_after_the_resume(encrypted_postcopy: tuple[Path, str]) -> None:
    migration = json.loads((encrypted_postcopy[0] / "summary.json").read_text())["migration"]
    postcopy = migration["postcopy"]
    assert (migration["mode"], migration["rounds"], migration["residual_pages"]) == ("postcopy", [], 0)
    assert 0.75 * 96 * 2**20 <= postcopy["pages"] * 4096 <= migration["bytes_on_wire"] < 0.8 * 96 * 2**20
    assert 0 < postcopy["fault_us"]["median"] <= postcopy["fault_us"]["p99"]
    assert postcopy["faults"] > 0
    assert migration["downtime_ms"] + postcopy["ms"] < 1.5 * migration["total_ms"]


def test_the_predicted_downtime_stands_beside_the_measured_one(
    summary: dict[str, Any], encrypted_postcopy: tuple[Path, str]
) -> None:
    for one in (summary, json.loads((encrypted_postcopy[0] / "summary.json").read_text())):
        migration = one["migration"]
        assert 0 < migration["downtime_predicted_ms"] <= migration["downtime_target_ms"] == 50
        assert 0 < migration["downtime_ms"] <= migration["downtime_target_ms"]


def test_an_encrypted_stream_is_tls_and_shows_no_message(
    demo: tuple[Path, str], encrypted_postcopy: tuple[Path, str]
) -> None:
    client_hello, message = "tcp.payload[0:3] == 16:03:01", 'tcp.payload contains "VMOT"'

    def seen(run: tuple[Path, str], what: str) -> list[tuple[str, ...]]:
        return fields(run[0] / "pcap/esx1.pcapng", f"tcp.port == 8000 and {what}", "ip.src")

    assert len(seen(encrypted_postcopy, client_hello)) == 2  # the main connection, and the one for faults
    assert seen(encrypted_postcopy, message) == seen(demo, client_hello) == []
    assert seen(demo, message)
