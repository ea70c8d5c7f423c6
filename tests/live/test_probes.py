"""The probes against a throw-away server: two namespaces and a cable, real sockets, a real reset, a real freeze."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import Node

from experiments import probes as probes_module
from experiments.gaps import Window, baseline, blackout
from experiments.probes import KINDS, Probes, Results
from experiments.world import run
from topologies.errors import TestbedError

SERVER_IP = "10.9.0.1"
MS = 1_000_000
_ROOT = Path(__file__).parents[2]


class Network:
    """A client and a server on a cable, and the server's process."""

    def __init__(self) -> None:
        self.client, self.server = Node(), Node()
        ends = ("netns", str(self.client.pid)), ("netns", str(self.server.pid))
        run("ip", "link", "add", "eth0", *ends[0], "type", "veth", "peer", "name", "eth0", *ends[1])
        for node, address in ((self.client, "10.9.0.100/24"), (self.server, f"{SERVER_IP}/24")):
            node.run("ip", "addr", "add", address, "dev", "eth0")
            node.run("ip", "link", "set", "eth0", "up")
        self.process: subprocess.Popen[bytes] | None = None

    def serve(self, *lie: str) -> None:
        words = [sys.executable, str(_ROOT / "tests" / "small_vm.py"), SERVER_IP, *lie]
        self.process = self.server.popen(words, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(_ROOT)})
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"up\n"

    def freeze(self, seconds: float) -> Window:
        """Stop the server, and its kernel's answers to ping, for a while."""
        assert self.process is not None
        begin_ns = time.monotonic_ns()
        self.server.run("sysctl", "-qw", "net.ipv4.icmp_echo_ignore_all=1")
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)
        self.server.run("sysctl", "-qw", "net.ipv4.icmp_echo_ignore_all=0")
        return Window(begin_ns, time.monotonic_ns())

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.client.end()
        self.server.end()


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    try:
        yield network
    finally:
        network.end()


def probes_of(network: Network, folder: Path) -> Probes:
    return Probes(network.client.popen, SERVER_IP, folder, seed=7)


def arrivals(results: Results, kind: str) -> tuple[list[int], int]:
    result = getattr(results, kind)
    return result.arrived_ns, result.stopped_ns


def test_all_probes_of_a_healthy_server_find_nothing_wrong(network: Network, tmp_path: Path) -> None:
    network.serve()
    with probes_of(network, tmp_path) as probes:
        time.sleep(1)
        results = probes.stop()

    for result in (results.ping, results.udp):
        assert result.received == result.sent
        assert (result.lost, result.duplicated, result.reordered, result.errors) == (0, 0, 0, {})
        assert len(result.arrived_ns) == result.received
        late = [
            arrived - result.sent_ns[number] for number, arrived in zip(result.numbers, result.arrived_ns, strict=True)
        ]
        assert min(late) >= 0
        assert sorted(late)[len(late) // 2] < 20 * MS
        assert 0.8 * MS * result.sent < result.stopped_ns - result.sent_ns[0] or result.interval_ns > MS
    assert results.udp.sent + results.udp.skipped > 900
    assert results.ping.sent + results.ping.skipped > 90

    transactions = results.transactions
    assert transactions.connection_survived
    assert transactions.failure == ""
    assert 50 < transactions.sent == transactions.acked == transactions.audited == len(transactions.arrived_ns)
    assert (transactions.lost, transactions.duplicated, transactions.total_conserved) == (0, 0, True)
    assert transactions.retransmits < 50
    assert 1024 <= transactions.local_port != results.bulk.local_port

    assert results.bulk.connection_survived
    assert results.bulk.verified_bytes > 100_000
    assert results.bulk.arrived_ns == sorted(results.bulk.arrived_ns)


def test_a_freeze_of_300_ms_is_a_silence_of_300_ms_in_its_window_for_every_probe(
    network: Network, tmp_path: Path
) -> None:
    network.serve()
    with probes_of(network, tmp_path) as probes:
        time.sleep(0.5)
        window = network.freeze(0.3)
        time.sleep(1.5)
        results = probes.stop()

    for kind in KINDS:
        silence = blackout(*arrivals(results, kind), window)
        assert 250 < silence.length_ms < 1000, kind  # what was in flight when it began shortens it
        assert window.suspending_ns - 200 * MS < silence.begin_ns < window.resumed_ns, kind
        assert baseline(*arrivals(results, kind), [window]).length_ms < silence.length_ms, kind
    # what waited in the frozen server's socket is answered late, not lost; its kernel ignored the pings
    assert results.udp.lost == 0
    assert results.ping.lost > 20
    assert results.transactions.connection_survived
    assert results.transactions.lost == 0
    assert results.bulk.connection_survived


def test_a_connection_that_is_reset_is_reported_and_its_silence_lasts_to_the_end(
    network: Network, tmp_path: Path
) -> None:
    network.serve()
    with probes_of(network, tmp_path) as probes:
        time.sleep(0.5)
        begin_ns = time.monotonic_ns()
        assert network.process is not None
        network.process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        results = probes.stop()

    for result in (results.transactions, results.bulk):
        assert not result.connection_survived
        assert "reset" in result.failure
        last_ns = result.arrived_ns[-1]
        assert last_ns < begin_ns + 200 * MS
        assert (
            blackout(result.arrived_ns, result.stopped_ns, Window(begin_ns - 100 * MS, begin_ns)).length_ns >= 300 * MS
        )
    transactions = results.transactions
    assert 0 < transactions.acked <= transactions.sent <= transactions.acked + 1
    assert (transactions.audited, transactions.total_conserved) == (0, None)
    assert results.udp.lost == 0


@pytest.mark.parametrize(("lie", "kind"), [("lose", "transactions"), ("double", "transactions"), ("corrupt", "bulk")])
def test_a_lying_server_is_found_out(network: Network, tmp_path: Path, lie: str, kind: str) -> None:
    network.serve(lie)
    with probes_of(network, tmp_path) as probes:
        time.sleep(0.5)
        results = probes.stop()

    transactions, bulk = results.transactions, results.bulk
    assert (transactions.lost > 0) == (lie == "lose")
    assert (transactions.duplicated > 0) == (lie == "double")
    assert transactions.total_conserved
    assert bulk.connection_survived == (lie != "corrupt")
    assert bulk.failure == "" or bulk.failure.startswith("byte 50000 of the stream is")


def test_without_a_server_a_probe_that_cannot_begin_is_named_and_none_is_left(network: Network, tmp_path: Path) -> None:
    with (
        pytest.raises(TestbedError, match=r"the (transactions|bulk) probe ended .*refused"),
        probes_of(network, tmp_path),
    ):
        pass
    assert_no_probe_is_left()


def test_a_probe_without_an_answer_is_named_at_the_deadline(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network.serve()
    network.server.run("sysctl", "-qw", "net.ipv4.icmp_echo_ignore_all=1")
    monkeypatch.setattr(probes_module, "READY_TIMEOUT_S", 2.0)
    with pytest.raises(TestbedError, match="the ping probe did not come up in time"), probes_of(network, tmp_path):
        pass
    assert_no_probe_is_left()


def test_an_error_in_the_block_leaves_no_probe(network: Network, tmp_path: Path) -> None:
    network.serve()
    with pytest.raises(ZeroDivisionError), probes_of(network, tmp_path):
        raise ZeroDivisionError
    assert_no_probe_is_left()


def assert_no_probe_is_left() -> None:
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not [command for command in commands if b"experiments.probes" in command]
