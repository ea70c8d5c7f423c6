"""Brings a plan up in this world and takes it down: Open vSwitch, controller, network, agents, manager.

    with Testbed(run) as testbed:
        testbed.vcenter.power_on("vm1")
        testbed.vcenter.migrate("vm1", to="esx2")

Everything started is owned here and ends with the block, in the reverse order.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

from experiments.capture import WHOLE_FRAMES, Capture, CaptureNode
from experiments.children import Child
from experiments.run import Run
from experiments.world import PRIVATE, open_vswitch, widen_port_buffers
from hosts.control import MANAGER, issue_certificates
from hosts.vcenter import VCenter
from topologies.errors import TestbedError
from topologies.events import find, read_events
from topologies.two_hosts import TwoHosts

_ROOT = Path(__file__).parent.parent
_CONTROLLER_PORT = 6653
# Enough of a frame for every header and a small request; the RAM itself need not be kept.
HEADERS_BYTES = 192
_UP_WITHIN_S = 20.0
_DOWN_WITHIN_S = 15.0


class Testbed:
    """The emulated data centre of one run."""

    __test__ = False  # not a test, whatever pytest makes of the name

    def __init__(self, run: Run) -> None:
        self.run = run
        self.children: dict[str, Child] = {}
        self._stack = ExitStack()
        self.net: Any
        self.vcenter: VCenter

    def __enter__(self) -> "Testbed":
        with self._stack as stack:
            vswitchd = stack.enter_context(open_vswitch(self.run.logs))
            self._start_controller()
            self.net = stack.enter_context(self._network())
            self._await_event("switch.connected", "controller")
            widen_port_buffers(vswitchd)
            certificates = self._certificates()
            self._start_agents(certificates)
            options = self.run.options
            self.vcenter = VCenter(self.run.plan, certificates, self.run.events, options.announce, options.schedule_ms)
            stack.callback(self.vcenter.close)
            self.run.events.emit("testbed.up")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.run.events.emit("testbed.going_down")
        self._stack.__exit__(*exception)

    def popen(self, node: str) -> Callable[..., Any]:
        """Mininet's popen of a node: starts a program in its namespace."""
        popen: Callable[..., Any] = self.net[node].popen
        return popen

    def capture(self) -> Capture:
        """A capture of every node's ends of links, and of the OpenFlow connection (lo of the root namespace)."""
        plan, nodes = self.run.plan, []
        for name in [*(host.name for host in plan.hosts), *(client.name for client in plan.clients), plan.switch]:
            links = [intf.name for intf in self.net[name].intfList() if intf.link]
            interfaces = [(link, HEADERS_BYTES) for link in links]
            if name == plan.switch:
                interfaces.append(("lo", WHOLE_FRAMES))
            nodes.append(CaptureNode(name, Popen if name == plan.switch else self.popen(name), tuple(interfaces)))
        return Capture(self.run.pcap, nodes)

    def agent_memory_bytes(self) -> dict[str, int]:
        """Each agent's memory beside the guests' RAM."""
        return {name: status["memory_bytes"] for name, status in self.vcenter.status().items()}

    # ------------------------------------------------------------ parts

    def _start(self, name: str, popen: Callable[..., Any], *words: str) -> Child:
        child = Child(name, popen, [sys.executable, "-m", *words], self.run.logs / f"{name}.log", _ROOT)
        self.children[name] = child
        self._stack.callback(self._stop, child)
        return child

    def _stop(self, child: Child) -> None:
        """A part may have been killed by the experiment itself; what it was for is judged elsewhere."""
        child.process.send_signal(signal.SIGTERM)
        try:
            child.wait(time.monotonic() + _DOWN_WITHIN_S)
        except TestbedError as error:
            self.run.events.emit("child.failed", name=child.name, reason=str(error))
        finally:
            child.kill()

    def _start_controller(self) -> None:
        """In the world's root namespace. It listens before the network starts, or Mininet goes on without it."""
        listening = ("--port", str(_CONTROLLER_PORT), "--events", str(self.run.events_file))
        self._start("controller", Popen, "controller.app", *listening)
        self._await_event("controller.listening", "controller")

    @contextmanager
    def _network(self) -> Iterator[Any]:
        from mininet.log import setLogLevel
        from mininet.net import Mininet
        from mininet.node import Controller

        class Running(Controller):
            """A controller that was started by someone else."""

            def checkListening(self) -> None:  # noqa: N802  (Mininet's name; its own check needs telnet)
                pass

            def start(self) -> None:
                pass

            def stop(self, *_: Any, **__: Any) -> None:
                self.terminate()

        setLogLevel("error")
        Mininet.inited = True  # it would raise limits of the whole machine; a run touches only its own world
        net = Mininet(topo=TwoHosts(self.run.plan), controller=None, build=False)
        try:
            net.addController("controller", Running, ip="127.0.0.1", port=_CONTROLLER_PORT)
            net.build()
            net.start()
            yield net
        finally:
            net.stop()

    def _certificates(self) -> Path:
        """Keys of this run, in a folder that ends with its world."""
        plan = self.run.plan
        names = {MANAGER: [plan.manager_ip]} | {host.name: [host.management] for host in plan.hosts}
        issue_certificates(PRIVATE, names)
        return PRIVATE

    def _start_agents(self, certificates: Path) -> None:
        datastore = self.run.folder / "datastore"
        datastore.mkdir()
        for host in self.run.plan.hosts:
            words = ["hosts.agent", "--plan", str(self.run.options.plan_file), "--host", host.name]
            words += ["--certificates", str(certificates), "--datastore", str(datastore)]
            words += ["--events", str(self.run.events_file), "--logs", str(self.run.logs)]
            self._start(f"agent-{host.name}", self.popen(host.name), *words)
        for host in self.run.plan.hosts:
            self._await_event("agent.listening", host.name, f"agent-{host.name}")

    def _await_event(self, kind: str, source: str, name: str = "controller") -> None:
        """Until a part has said that it is up; TestbedError if it ended instead or takes too long."""
        child, deadline = self.children[name], time.monotonic() + _UP_WITHIN_S
        while not find(read_events(self.run.events_file), kind, source=source):
            status = child.process.poll()
            if status is not None:
                last = (child.said() or ["it said nothing"])[-1]
                raise TestbedError(f"{name} ended with status {status} before it was up: {last}")
            if time.monotonic() > deadline:
                raise TestbedError(f"{name} gave no {kind} within {_UP_WITHIN_S:g} s; see {self.run.logs}/{name}.log")
            time.sleep(0.01)
