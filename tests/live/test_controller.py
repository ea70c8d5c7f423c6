"""The controller as a process, on both backends, with a real Open vSwitch; needs a private world.

h1 --- p1 +----+ p3 --- h3        h1, h2: where a VM's MAC appears (the hosts' uplinks)
h2 --- p2 | s1 |                  h3: a client
          +----+
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import arp, ethernet, rarp

from experiments.world import open_vswitch, run
from topologies.events import Event, find, read_events

ROOT = Path(__file__).parents[2]
VM, CLIENT, OTHER = "00:50:56:00:00:01", "00:50:56:00:00:64", "00:50:56:00:00:02"
VM_IP = bytes((10, 0, 0, 11))
S1 = "0000000000000001"
ETHERTYPE = 0x88B5
PATIENCE_S = 20


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{PATIENCE_S} s passed without {what}"
        time.sleep(0.002)
    return result


class Machine:
    """The far end of a cable to the switch: sends any frame, receives those of the test's own type."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE))
        self._socket.bind((f"h{port}", ETHERTYPE))
        self._sent = 0

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def received(self, timeout_s: float = 0.0) -> bytes | None:
        self._socket.settimeout(timeout_s)
        try:
            return self._socket.recv(2048)
        except (BlockingIOError, TimeoutError):
            return None

    def drain(self) -> None:
        while self.received() is not None:
            pass

    def to(self, mac: str, source: str = CLIENT) -> bytes:
        """A frame unlike all others of this machine."""
        self._sent += 1
        return ethernet(source, mac, ETHERTYPE, self._sent.to_bytes(4, "big"))

    def close(self) -> None:
        self._socket.close()


Machines = dict[int, Machine]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """s1 with its three ports, without a controller."""
    # no router solicitations: the only frames are those of the tests
    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    with open_vswitch(tmp_path_factory.mktemp("ovs")):
        run("ovs-vsctl", "add-br", "s1", "--", "set", "bridge", "s1", "datapath_type=netdev")
        run("ovs-vsctl", "set", "bridge", "s1", "protocols=OpenFlow13", f"other-config:datapath-id={S1}")
        run("ovs-vsctl", "set-fail-mode", "s1", "secure")
        for port in (1, 2, 3):
            run("ip", "link", "add", f"h{port}", "type", "veth", "peer", "name", f"p{port}")
            run("ip", "link", "set", f"h{port}", "up")
            run("ip", "link", "set", f"p{port}", "up")
            add_port(port)
        yield
    for port in (1, 2, 3):
        run("ip", "link", "del", f"h{port}")


def add_port(port: int) -> None:
    run("ovs-vsctl", "add-port", "s1", f"p{port}", "--", "set", "interface", f"p{port}", f"ofport_request={port}")


@pytest.fixture
def s1(bridge: None) -> None:
    """The switch without a flow: it keeps them when its controller is gone."""
    run("ovs-ofctl", "-O", "OpenFlow13", "del-flows", "s1")


@pytest.fixture
def machines(s1: None) -> Iterator[Machines]:
    ends = {port: Machine(port) for port in (1, 2, 3)}
    yield ends
    for end in ends.values():
        end.close()


class Controller:
    """The process under test and what it has told, in this test."""

    def __init__(self, backend: str, events: Path, *options: str) -> None:
        words = [sys.executable, "-m", "controller", "--events", str(events), *options]
        environment = os.environ | {"SDN_BACKEND": backend}
        self._path = events
        self._told_before = 0
        self.process = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    def events(self) -> list[Event]:
        return self._all_events()[self._told_before :]

    def turn_page(self) -> None:
        """What was told so far belongs to another test."""
        self._told_before = len(self._all_events())

    def _all_events(self) -> list[Event]:
        return read_events(self._path) if self._path.exists() else []

    def wait_for(self, kind: str, count: int = 1, **fields: Any) -> Event:
        """The latest of at least `count` events of this kind."""

        def told() -> Event | None:
            found = find(self.events(), kind, **fields)
            return found[-1] if len(found) >= count else None

        return wait_until(told, f"{count} x {kind} {fields}: {self.events()}")

    @contextmanager
    def told_from_now(self) -> Iterator[Callable[[], str]]:
        """What was written since it was asked last, without reading all of it again."""
        with open(self._path, encoding="utf-8") as tail:
            tail.seek(0, os.SEEK_END)
            yield tail.read

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Signal it; the exit status and everything it wrote to stderr."""
        self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, stderr


@pytest.fixture(scope="module", params=["ryu", "os_ken"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(backend: str, events: Path, port: int = 0) -> Iterator[tuple[Controller, int]]:
    """A controller without a switch, and the port on which it listens."""
    controller = Controller(backend, events, "--listen", "0.0.0.0", "--port", str(port))
    try:
        yield controller, controller.wait_for("controller.listening")["port"]
    finally:
        controller.process.kill()
        controller.process.communicate()


@pytest.fixture(scope="module")
def listening(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Controller, int]]:
    """One process for many tests, because it takes a second to start."""
    with running(backend, tmp_path_factory.mktemp(backend) / "events.jsonl") as (controller, port):
        yield controller, port
        assert controller.stop() == (0, ""), "a controller ends cleanly and has nothing to complain about"


@pytest.fixture
def controller(s1: None, listening: tuple[Controller, int]) -> Iterator[Controller]:
    """A controller to which s1 has just connected: it knows no MAC."""
    controller, port = listening
    controller.turn_page()
    with connected(controller, port):
        yield controller
        forget_all(controller)


def forget_all(controller: Controller) -> None:
    """MACs are remembered while a switch is away, but not without their port."""
    for port in (1, 2, 3):
        run("ovs-vsctl", "del-port", "s1", f"p{port}")
        add_port(port)
    run("ovs-ofctl", "-O", "OpenFlow13", "dump-flows", "s1")
    known = {e["mac"] for e in find(controller.events(), "mac.learned")}
    wait_until(lambda: not any(mac in flows() for mac in known), "flows free of all MACs")


@contextmanager
def connected(controller: Controller, port: int) -> Iterator[None]:
    connections = len(find(controller.events(), "switch.connected"))
    try:
        run("ovs-vsctl", "set-controller", "s1", f"tcp:127.0.0.1:{port}")
        controller.wait_for("switch.connected", connections + 1, switch=S1)
        yield
    finally:
        run("ovs-vsctl", "del-controller", "s1")
    controller.wait_for("switch.disconnected", connections + 1, switch=S1)


def learn(machine: Machine, mac: str) -> None:
    """Let the switch see this MAC until it has a flow to it; a cached flow may keep the first frame from us."""

    def known() -> bool:
        machine.send(ethernet(mac))
        return f"dl_dst={mac} actions=output:{machine.port}\n" in flows()

    wait_until(known, f"a flow to {mac} at port {machine.port}")


def flows() -> str:
    return run("ovs-ofctl", "-O", "OpenFlow13", "dump-flows", "s1")


def misses() -> int:
    """How many frames of unknown sources the switch has counted."""
    entry = next(line for line in flows().splitlines() if "table=2" in line and "priority=0 " in line)
    return int(entry.split("n_packets=")[1].split(",")[0])


def assert_frames_go(mac: str, client: Machine, here: Machine, not_there: Machine) -> None:
    """Before long, ten frames in a row arrive here and none of them there.

    A barrier is none for the datapath: for some milliseconds after it, OVS still uses the flows it has
    cached, and one that floods reaches both.
    """

    def only_here() -> bool:
        not_there.drain()
        for _ in range(10):
            client.send(frame := client.to(mac))
            if here.received(0.05) != frame:
                here.drain()
                return False
        return not_there.received() is None

    wait_until(only_here, f"frames to {mac} arriving at port {here.port} alone")


# ---------------------------------------------------------------- moves


def test_an_rarp_moves_the_mac_and_its_traffic(controller: Controller, machines: Machines) -> None:
    esx1, esx2, client = machines.values()
    learn(client, CLIENT)
    learn(esx1, VM)
    assert_frames_go(VM, client, esx1, esx2)

    esx2.send(rarp(VM))

    moved = controller.wait_for("mac.moved", mac=VM)
    relearned = controller.wait_for("mac.relearned", mac=VM)
    expected = {"source": "controller", "switch": S1, "from": 1, "to": 2, "cause": "rarp"}
    for event in (moved, relearned):
        assert {key: event[key] for key in expected} == expected
    assert relearned["packet_in"] == moved["packet_in"]
    assert relearned["packet_in"] < relearned["flow_mod"] < relearned["barrier"] == relearned["t"]
    assert_frames_go(VM, client, esx2, esx1)


@pytest.mark.parametrize(
    ("cause", "frame"), [("frame", ethernet(VM, CLIENT)), ("garp", arp(VM, VM_IP, VM_IP))], ids=["frame", "garp"]
)
def test_the_first_other_frame_at_a_new_port_moves_too(
    controller: Controller, machines: Machines, cause: str, frame: bytes
) -> None:
    esx1, esx2, client = machines.values()
    learn(client, CLIENT)
    learn(esx1, VM)

    def moved() -> list[Event]:
        esx2.send(frame)
        return find(controller.events(), "mac.moved")

    wait_until(moved, "a move")
    assert controller.wait_for("mac.relearned", mac=VM)["cause"] == cause
    assert_frames_go(VM, client, esx2, esx1)


def test_a_mac_that_moves_twenty_times_is_followed_twenty_times(controller: Controller, machines: Machines) -> None:
    esx1, esx2, client = machines.values()
    learn(client, CLIENT)
    learn(esx1, VM)
    here, there = esx1, esx2
    for moves in range(1, 21):
        here, there = there, here
        here.send(rarp(VM))
        controller.wait_for("mac.relearned", moves, mac=VM)
        assert_frames_go(VM, client, here, there)
    assert [e["to"] for e in find(controller.events(), "mac.moved")] == [2, 1] * 10
    assert [e["to"] for e in find(controller.events(), "mac.relearned")] == [2, 1] * 10


def test_a_thousand_moves_are_a_thousand_events(controller: Controller, machines: Machines) -> None:
    esx1, esx2, _ = machines.values()
    learn(esx1, VM)
    with controller.told_from_now() as lines:
        for move in range(1000):
            (esx2, esx1)[move % 2].send(rarp(VM))
            wait_until(lambda: "mac.relearned" in lines(), "an event for each")
    for kind in ("mac.moved", "mac.relearned"):
        assert [e["to"] for e in find(controller.events(), kind)] == [2, 1] * 500


def test_an_announcement_repeated_is_one_move(controller: Controller, machines: Machines) -> None:
    esx1, esx2, _ = machines.values()
    learn(esx1, VM)
    for _ in range(5):
        esx2.send(rarp(VM))
    learn(esx2, OTHER)  # its frame is behind them
    assert len(find(controller.events(), "mac.moved")) == 1
    assert len(find(controller.events(), "mac.learned")) == 2


def test_a_frame_of_a_known_mac_never_reaches_the_controller(controller: Controller, machines: Machines) -> None:
    esx1, _, client = machines.values()
    learn(client, CLIENT)
    learn(esx1, VM)
    before = misses()
    for _ in range(100):
        client.send(client.to(VM))
        assert esx1.received(PATIENCE_S) is not None
    assert misses() - before < 100


# ---------------------------------------------------------------- losses


@contextmanager
def away(controller: Controller, port: int) -> Iterator[None]:
    """s1 asks for its controller in vain."""
    connections = len(find(controller.events(), "switch.connected"))
    run("ovs-vsctl", "set-controller", "s1", "tcp:127.0.0.1:1")
    controller.wait_for("switch.disconnected", connections)
    yield
    run("ovs-vsctl", "set-controller", "s1", f"tcp:127.0.0.1:{port}")
    controller.wait_for("switch.connected", connections + 1)


def test_a_switch_whose_controller_is_away_goes_on_and_keeps_what_it_knows(
    controller: Controller, listening: tuple[Controller, int], machines: Machines
) -> None:
    esx1, esx2, client = machines.values()
    learn(client, CLIENT)
    learn(esx1, VM)
    before = flows_without_counters()
    with away(*listening):
        assert_frames_go(VM, client, esx1, esx2)
    assert flows_without_counters() == before
    back = controller.wait_for("switch.connected", 2)
    assert (back["kept"], back["added"], back["deleted"]) == (len(before), 0, 0)
    assert_frames_go(VM, client, esx1, esx2)


def test_a_move_while_the_controller_is_away_is_seen_when_it_is_back(
    controller: Controller, listening: tuple[Controller, int], machines: Machines
) -> None:
    esx1, esx2, client = machines.values()
    learn(esx1, VM)
    with away(*listening):
        esx2.send(rarp(VM))  # nobody hears it
    learn(esx2, VM)
    assert [e["to"] for e in find(controller.events(), "mac.moved")] == [2]
    assert_frames_go(VM, client, esx2, esx1)


def test_a_switch_that_has_lost_its_entries_gets_them_back(
    controller: Controller, listening: tuple[Controller, int], machines: Machines
) -> None:
    learn(machines[1], VM)
    before = flows_without_counters()
    with away(*listening):
        run("ovs-ofctl", "-O", "OpenFlow13", "del-flows", "s1")
        run("ovs-ofctl", "-O", "OpenFlow13", "add-flow", "s1", "priority=60000,in_port=1,actions=drop")
    assert flows_without_counters() == before
    back = controller.wait_for("switch.connected", 2)
    assert (back["kept"], back["added"], back["deleted"]) == (0, len(before), 1)


def test_another_controller_takes_over_what_the_switch_knows(
    s1: None, machines: Machines, backend: str, tmp_path: Path
) -> None:
    esx1, esx2, client = machines.values()
    try:
        with running(backend, tmp_path / "first.jsonl") as (controller, port):
            run("ovs-vsctl", "set-controller", "s1", f"tcp:127.0.0.1:{port}")
            learn(client, CLIENT)
            learn(esx1, VM)
            before = flows_without_counters()
        assert_frames_go(VM, client, esx1, esx2)
        with running(backend, tmp_path / "second.jsonl") as (controller, port):
            run("ovs-vsctl", "set-controller", "s1", f"tcp:127.0.0.1:{port}")
            assert controller.wait_for("switch.connected")["kept"] == len(before)
            assert flows_without_counters() == before
            esx2.send(rarp(VM))
            assert controller.wait_for("mac.moved")["from"] == 1
            assert find(controller.events(), "mac.learned") == []
            assert_frames_go(VM, client, esx2, esx1)
    finally:
        run("ovs-vsctl", "del-controller", "s1")


def test_what_another_controller_has_left_is_cleared(
    s1: None, listening: tuple[Controller, int], machines: Machines
) -> None:
    controller, port = listening
    controller.turn_page()
    run("ovs-ofctl", "-O", "OpenFlow13", "add-flow", "s1", "priority=60000,in_port=1,actions=drop")
    with connected(controller, port):
        assert "priority=60000" not in flows()
        learn(machines[1], VM)
        forget_all(controller)


def flows_without_counters() -> set[str]:
    lines = [line.split(",") for line in flows().splitlines() if "cookie" in line]
    return {",".join(part for part in parts if not re.match(r" (duration|n_\w+)=", part)) for parts in lines}


def test_a_newer_connection_of_a_switch_replaces_the_older(
    s1: None, listening: tuple[Controller, int], machines: Machines
) -> None:
    """As after a power loss: the switch is back, and nobody has closed its old connection yet."""
    controller, port = listening
    controller.turn_page()
    esx1, esx2, client = machines.values()
    with connected(controller, port):
        learn(esx1, VM)
        run("ovs-vsctl", "set-controller", "s1", f"tcp:127.0.0.1:{port}", f"tcp:127.0.0.2:{port}")
        controller.wait_for("switch.connected", 2)
        learn(esx1, VM)
        esx2.send(rarp(VM))
        controller.wait_for("mac.relearned")
        assert_frames_go(VM, client, esx2, esx1)
        kinds = [e["kind"] for e in controller.events() if e.get("mac") != CLIENT]
        assert kinds == [
            *("switch.connected", "mac.learned"),
            *("switch.disconnected", "switch.connected", "mac.moved", "mac.relearned"),
        ]
        forget_all(controller)


def test_a_port_that_goes_down_takes_its_macs(controller: Controller, machines: Machines) -> None:
    esx1, esx2, _ = machines.values()
    learn(esx1, VM)
    learn(esx2, OTHER)
    run("ip", "link", "set", "h1", "down")
    try:
        controller.wait_for("mac.forgotten", mac=VM, switch=S1, port=1)
        wait_until(lambda: VM not in flows(), f"flows free of {VM}")
        assert OTHER in flows()
    finally:
        run("ip", "link", "set", "h1", "up")


def test_a_port_that_is_removed_takes_its_macs(controller: Controller, machines: Machines) -> None:
    learn(machines[1], VM)
    run("ovs-vsctl", "del-port", "s1", "p1")
    try:
        controller.wait_for("mac.forgotten", mac=VM, switch=S1, port=1)
    finally:
        add_port(1)


# ---------------------------------------------------------------- the process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_with_a_switch_connected(
    s1: None, machines: Machines, backend: str, tmp_path: Path, number: signal.Signals
) -> None:
    with running(backend, tmp_path / "events.jsonl") as (controller, port):
        try:
            run("ovs-vsctl", "set-controller", "s1", f"tcp:127.0.0.1:{port}")
            learn(machines[1], VM)
            assert controller.stop(number) == (0, "")
        finally:
            run("ovs-vsctl", "del-controller", "s1")


def test_without_an_event_file_it_works_as_well(s1: None, machines: Machines, backend: str) -> None:
    port = free_port()
    words = [sys.executable, "-m", "controller", "--port", str(port)]
    process = subprocess.Popen(words, cwd=ROOT, env=os.environ | {"SDN_BACKEND": backend})
    try:
        run("ovs-vsctl", "set-controller", "s1", f"tcp:127.0.0.1:{port}")
        run("ovs-vsctl", "set", "controller", "s1", "max_backoff=1000")  # ms: it may ask before we listen
        learn(machines[1], VM)
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
        run("ovs-vsctl", "del-controller", "s1")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--port", "70000"], "70000"),
        (["--listen", "203.0.113.1"], "203.0.113.1"),
        (["--events", "/nowhere/events.jsonl"], "/nowhere/events.jsonl"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_input_is_one_clear_line_and_status_2(options: list[str], says: str) -> None:
    assert_refused(options, says)


def test_a_port_in_use_is_refused(backend: str, tmp_path: Path) -> None:
    with running(backend, tmp_path / "events.jsonl", free_port()) as (_, port):
        assert_refused(["--listen", "0.0.0.0", "--port", str(port)], str(port), backend)


def test_an_unknown_backend_is_refused() -> None:
    assert_refused([], "nox", "nox")


def assert_refused(options: list[str], says: str, backend: str = "ryu") -> None:
    words = [sys.executable, "-m", "controller", *options]
    environment = os.environ | {"SDN_BACKEND": backend}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
