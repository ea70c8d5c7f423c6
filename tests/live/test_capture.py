"""Captures on a real cable: one end here, the other in a namespace of its own."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import Node

from experiments.capture import WHOLE_FRAMES, Capture, CaptureNode, fields, frames
from experiments.world import run
from topologies.errors import TestbedError
from topologies.events import clock_pair

EXPERIMENT = b"\xff" * 6 + bytes.fromhex("025056000001 88b5")  # to all, from a local MAC; an ethertype for experiments
FILTER = "eth.type == 0x88b5"


@pytest.fixture
def nodes() -> Iterator[list[CaptureNode]]:
    """esx1 is here, with `near`; esx2 has `far` in its namespace, and stores 60 bytes of each frame."""
    node = Node()
    try:
        run("ip", "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", str(node.pid))
        run("ip", "link", "set", "near", "up")
        node.run("ip", "link", "set", "far", "up")
        yield [
            CaptureNode("esx1", subprocess.Popen, (("near", WHOLE_FRAMES), ("lo", WHOLE_FRAMES))),
            CaptureNode("esx2", node.popen, (("far", 60),)),
        ]
    finally:
        run("ip", "link", "delete", "near")
        node.end()


def send(count: int, length: int = 200, interface: str = "near") -> None:
    """Numbered frames, all at once."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((interface, 0))
        for number in range(count):
            sock.send((EXPERIMENT + number.to_bytes(4, "big")).ljust(length, b"\0"))


def no_dumpcap_is_left() -> bool:
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    return not any(command.startswith(b"dumpcap") for command in commands)


def test_every_frame_of_all_links_is_in_the_merged_file_in_order(nodes: list[CaptureNode], tmp_path: Path) -> None:
    begin_ns = clock_pair()["realtime"]
    with Capture(tmp_path / "pcap", nodes) as capture:
        for _ in range(3):
            send(50)
            time.sleep(0.01)
        send(1, interface="lo")
    end_ns = clock_pair()["realtime"]
    merged = tmp_path / "capture.pcapng"
    capture.merge(merged)

    seen = frames(merged, FILTER)
    assert [frame.time_ns for frame in seen] == sorted(frame.time_ns for frame in seen)
    assert all(begin_ns < frame.time_ns < end_ns for frame in seen)
    where = [(frame.node, frame.interface) for frame in seen]
    assert where.count(("esx1", "near")) == where.count(("esx2", "far")) == 150
    assert where.count(("esx1", "lo")) == 1  # loopback shows a raw frame once
    assert len({frame.time_ns % 1000 for frame in seen}) > 1, "ns, not microseconds"
    lengths = fields(merged, FILTER, "frame.interface_name", "frame.len", "frame.cap_len")
    assert set(lengths) == {("near", "200", "200"), ("lo", "200", "200"), ("far", "200", "60")}

    assert {(count.node, count.interface) for count in capture.counts} == {
        ("esx1", "near"),
        ("esx1", "lo"),
        ("esx2", "far"),
    }
    assert all(count.dropped == 0 for count in capture.counts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["capture.pcapng", "pcap"]
    assert no_dumpcap_is_left()


def test_the_last_frame_before_the_end_and_a_burst_are_not_lost(nodes: list[CaptureNode], tmp_path: Path) -> None:
    with Capture(tmp_path, nodes) as capture:
        send(20_000, length=1500)
    for name in ("esx1", "esx2"):
        assert len(fields(tmp_path / f"{name}.pcapng", FILTER, "frame.number")) == 20_000
    assert [count.dropped for count in capture.counts] == [0, 0, 0]


def test_frames_that_are_not_in_order_within_a_file_are_put_in_order(nodes: list[CaptureNode], tmp_path: Path) -> None:
    esx1 = nodes[:1]
    with Capture(tmp_path / "earlier", esx1):
        send(2)
    with Capture(tmp_path / "later", esx1) as capture:
        send(2)
    earlier, later = (tmp_path / folder / "esx1.pcapng" for folder in ("earlier", "later"))
    run("mergecap", "-a", "-w", str(tmp_path / "swapped"), str(later), str(earlier))
    (tmp_path / "swapped").replace(later)
    capture.merge(tmp_path / "capture.pcapng")

    times_ns = [frame.time_ns for frame in frames(tmp_path / "capture.pcapng", FILTER)]
    assert len(times_ns) == 4
    assert times_ns == sorted(times_ns)


def test_a_folder_that_dumpcap_may_not_reach_by_its_path_is_no_obstacle(
    nodes: list[CaptureNode], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 1000, 1000)
    home.chmod(0o700)
    with Capture(home / "pcap", nodes):
        send(1)
    assert len(frames(home / "pcap" / "esx1.pcapng", FILTER)) == 1


def test_an_interface_that_does_not_exist_is_named_and_nothing_is_left(
    nodes: list[CaptureNode], tmp_path: Path
) -> None:
    absent = CaptureNode("esx3", subprocess.Popen, (("vmnic9", WHOLE_FRAMES),))
    with pytest.raises(TestbedError, match=r"the capture on esx3 ended .*vmnic9"), Capture(tmp_path, [*nodes, absent]):
        pass
    assert no_dumpcap_is_left()


def test_a_failing_block_keeps_its_error_and_its_capture(nodes: list[CaptureNode], tmp_path: Path) -> None:
    capture = Capture(tmp_path, nodes)

    def block() -> None:
        with capture:
            send(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert len(frames(tmp_path / "esx2.pcapng", FILTER)) == 3
    assert capture.counts
    assert no_dumpcap_is_left()


def test_a_capture_that_died_is_an_error_at_the_end(nodes: list[CaptureNode], tmp_path: Path) -> None:
    with (
        pytest.raises(TestbedError, match="the capture on esx1 ended with status -9"),
        Capture(tmp_path, nodes) as capture,
    ):
        capture._children[0].process.kill()
    assert no_dumpcap_is_left()


def test_a_capture_that_stopped_because_an_interface_went_away_is_an_error_at_the_end(
    nodes: list[CaptureNode], tmp_path: Path
) -> None:
    run("ip", "link", "add", "brief", "type", "veth", "peer", "name", "other")
    run("ip", "link", "set", "brief", "up")
    here = CaptureNode("esx1", subprocess.Popen, (("near", WHOLE_FRAMES), ("brief", WHOLE_FRAMES)))

    def block() -> None:
        with Capture(tmp_path, [here]):
            run("ip", "link", "delete", "brief")
            time.sleep(0.2)

    with pytest.raises(TestbedError, match=r'the capture on esx1 ended before its time; .*"brief"'):
        block()
    assert no_dumpcap_is_left()


def test_a_filter_that_tshark_does_not_understand_is_an_error(nodes: list[CaptureNode], tmp_path: Path) -> None:
    with Capture(tmp_path, nodes):
        send(1)
    with pytest.raises(TestbedError, match="tshark"):
        frames(tmp_path / "esx1.pcapng", "no such filter ==")
