"""A physical switch and its controller, and nothing else: what a move costs without hosts, guests and captures.

with Switchyard(folder, "mobility") as yard:
    yard.move_ms("esx2")              an RARP there: until a client's frame arrives there
    yard.learn_s(macs)                until the controller knows them all
    yard.resync_ms()                  the controller dies; another one, until the switch's entries are compared

    c1 ---- s1-c1 +----+ s1-esx1 ---- esx1        each end is a device of this world's root namespace
                  | s1 | s1-esx2 ---- esx2
                  +----+
"""

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from experiments import faucet
from experiments.children import READY, Child, wait_until_up
from experiments.sdn_view import ask
from experiments.testbed import API_SOCKET
from experiments.waiting import until
from experiments.world import open_vswitch, run
from hosts.agent import memory_bytes
from hosts.announce import frames
from hosts.control import MANAGER, issue_certificates
from hosts.sdn import SdnController
from topologies.errors import TestbedError
from topologies.events import find, read_events
from topologies.plan import DEFAULT_PLAN, port_name, read_plan

_ROOT = Path(__file__).parent.parent
_PORT, _API_PORT = 6653, 8080
_WITHIN_S = 30.0
_FOUND_WITHIN_S = 5.0  # the switch by itself may take a second
_BURST, _LEARN_RATE = 20, 10_000  # frames at once, frames a second
_ETHERTYPE = 0x88B5  # for experiments (IEEE 802)
_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("@ll")


class Switchyard:
    """`controller`: one of experiments/run.py's."""

    def __init__(self, folder: Path, controller: str) -> None:
        self.plan, self._kind, self._folder = read_plan(), controller, folder
        self.vm, self.client = self.plan.vms[0], self.plan.clients[0]
        self._events = folder / "events.jsonl"
        self._stack = ExitStack()
        self._controller: Child | None = None
        self._sdn: SdnController | None = None
        self._lives = 0

    def __enter__(self) -> "Switchyard":
        self._folder.mkdir(parents=True)
        self._events.touch()
        with self._stack as stack:
            stack.enter_context(open_vswitch(self._folder))
            self._lay_cables(stack)
            if self._kind == "mobility":
                issue_certificates(self._folder, {MANAGER: [self.plan.manager_ip]})
                self._sdn = SdnController(_API_PORT, self._folder / f"{MANAGER}.pem")
            stack.callback(self._kill)
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    # ------------------------------------------------------------ what is measured

    def moves_ms(self, count: int) -> list[float]:
        """Back and forth: from each RARP to the first of the client's frames, one a millisecond, at the new port."""
        frame = _frame(self.client.mac, self.vm.mac)
        words = [sys.executable, "-m", "experiments.metronome", self.client.name, frame.hex()]
        client = Child("the client", subprocess.Popen, words, self._folder / "client.log", _ROOT)
        ends = {host.name: _listener(host.name) for host in self.plan.hosts}
        try:
            wait_until_up([client], READY, time.monotonic() + _WITHIN_S)
            hosts = [*ends, *ends] * (count // 2 + 1)  # there and back again
            self._announce(hosts[0], ends[hosts[0]])
            return [self._announce(host, ends[host]) for host in hosts[1 : count + 1]]
        finally:
            client.kill()
            for sock in ends.values():
                sock.close()

    def _announce(self, host: str, end: socket.socket) -> float:
        if self._sdn is not None:
            self._sdn.expect(self.vm.mac, "", host)
        (rarp,) = frames("rarp", self.vm.mac, str(self.vm.interface.ip))
        time.sleep(0.05)
        _drain(end)
        sent_ns = time.time_ns()
        end.send(rarp)
        end.settimeout(_FOUND_WITHIN_S)
        arrived_ns = _next_ns(end)
        return (arrived_ns - sent_ns) / 1e6

    def learn_s(self, macs: Sequence[str]) -> float:
        """How long until the controller knows all of them; they are behind one host."""
        missing, began = set(macs), time.monotonic()
        with _listener(self.plan.hosts[0].name) as end:
            while missing:
                if time.monotonic() - began > _WITHIN_S:
                    raise TestbedError(f"{len(missing)} of {len(macs)} MACs are not known after {_WITHIN_S:g} s")
                for number, mac in enumerate(sorted(missing)):  # again, those that the switch has dropped
                    end.send(_frame(mac, self.client.mac))
                    if number % _BURST == 0:
                        time.sleep(_BURST / _LEARN_RATE)
                missing -= {place["mac"] for place in ask(self._folder, "locations")}
        return time.monotonic() - began

    def packet_ins_per_s(self, seconds: float) -> float:
        """How many RARPs of a known MAC are handled while more come than can be."""
        vm, host = self.vm, self.plan.hosts[0].name
        words = [sys.executable, "-m", "experiments.attacker", "claim", host, vm.mac, str(vm.interface.ip)]
        words += ["--seconds", str(seconds + 2), "--rate", "30000"]
        flood = Child("the flood", subprocess.Popen, words, self._folder / "flood.log", _ROOT)
        try:
            wait_until_up([flood], READY, time.monotonic() + _WITHIN_S)
            time.sleep(0.5)
            before, began = ask(self._folder, "guard")["packet_ins"], time.monotonic()
            time.sleep(seconds)
            after, ended = ask(self._folder, "guard")["packet_ins"], time.monotonic()
        finally:
            flood.kill()
        return float(after - before) / (ended - began)

    def memory_bytes(self) -> int:
        """Of the controller's process."""
        assert self._controller is not None
        return memory_bytes(self._controller.process.pid)

    def resync_ms(self, empty: bool = False) -> float:
        """Another controller takes the switch over; `empty`: the switch has lost its entries, the controller lives."""
        before, lost = self._count("switch.connected"), self._count("switch.disconnected")
        if empty:
            address = run("ovs-vsctl", "get-controller", self.plan.switch).strip()
            run("ovs-vsctl", "set-controller", self.plan.switch, "tcp:127.0.0.1:1")
            until(lambda: self._count("switch.disconnected") > lost, "it is away", _WITHIN_S)
            run("ovs-ofctl", "-O", "OpenFlow13", "del-flows", self.plan.switch)
            self._connect(address)
        else:
            self._kill()
            self._start()
        until(lambda: self._count("switch.connected") > before, "it is back", _WITHIN_S)
        return float(find(read_events(self._events), "switch.connected")[-1]["ms"])

    # ------------------------------------------------------------ parts

    def _count(self, kind: str) -> int:
        return len(find(read_events(self._events), kind))

    def _lay_cables(self, stack: ExitStack) -> None:
        switch = self.plan.switch
        fail_mode = "standalone" if self._kind == "standalone" else "secure"
        of_bridge = ["datapath_type=netdev", "protocols=OpenFlow13", f"fail_mode={fail_mode}"]
        of_bridge.append("other-config:datapath-id=0000000000000001")
        run("ovs-vsctl", "add-br", switch, "--", "set", "bridge", switch, *of_bridge)
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")  # the only frames are ours
        for number, node in enumerate((self.client.name, *(host.name for host in self.plan.hosts)), start=1):
            port = port_name(switch, node)
            run("ip", "link", "add", node, "type", "veth", "peer", "name", port)
            stack.callback(run, "ip", "link", "del", node)
            for device in (node, port):
                run("ip", "link", "set", device, "up")
            run("ovs-vsctl", "add-port", switch, port, "--", "set", "interface", port, f"ofport_request={number}")

    def _start(self) -> None:
        if self._kind == "standalone":
            return
        self._lives += 1
        environment = dict(os.environ)
        if self._kind == "faucet":
            environment |= faucet.environment(self.plan, self._folder)
            words = faucet.words(_PORT)
        else:
            words = [sys.executable, "-m", "controller", "--application", self._kind, "--port", str(_PORT)]
            words += ["--events", str(self._events)]
            if self._kind == "mobility":
                words += ["--plan", str(DEFAULT_PLAN), "--manager", str(self._folder / f"{MANAGER}.crt")]
                words += ["--api-port", str(_API_PORT), "--api-socket", str(self._folder / API_SOCKET)]

        def popen(words: list[str], **settings: Any) -> "subprocess.Popen[Any]":
            return subprocess.Popen(words, env=environment, **settings)

        self._controller = Child("the controller", popen, words, self._folder / f"controller.{self._lives}.log", _ROOT)
        self._connect(f"tcp:127.0.0.1:{_PORT}")
        until(_is_connected, "the switch is connected", _WITHIN_S)

    def _connect(self, address: str) -> None:
        run("ovs-vsctl", "set-controller", self.plan.switch, address)
        run("ovs-vsctl", "set", "controller", self.plan.switch, "max_backoff=1000")  # ms

    def _kill(self) -> None:
        if self._controller is not None:
            self._controller.finish(signal.SIGKILL)
            self._controller.kill()
            self._controller = None


def _is_connected() -> bool:
    return bool(run("ovs-vsctl", "--bare", "find", "controller", "is_connected=true"))


def _frame(source: str, destination: str) -> bytes:
    head = bytes.fromhex((destination + source).replace(":", "")) + _ETHERTYPE.to_bytes(2, "big")
    return head.ljust(60, b"\0")


def _listener(device: str) -> socket.socket:
    """Sends anything, receives the client's frames, each with the kernel's time."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETHERTYPE))
    sock.bind((device, _ETHERTYPE))
    sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    return sock


def _next_ns(sock: socket.socket) -> int:
    """When the next frame arrived, Unix time; TestbedError if none does."""
    try:
        _, extras, _, _ = sock.recvmsg(2048, 64)
    except TimeoutError as error:
        raise TestbedError(f"no frame of the client arrived within {_FOUND_WITHIN_S:g} s of the RARP") from error
    seconds, nanoseconds = _TIMESPEC.unpack(extras[0][2])
    return int(seconds) * 10**9 + int(nanoseconds)


def _drain(sock: socket.socket) -> None:
    sock.setblocking(False)
    try:
        while True:
            sock.recv(2048)
    except BlockingIOError:
        return
