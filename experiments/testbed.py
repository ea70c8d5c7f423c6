"""Brings a plan up in this world and takes it down: Open vSwitch, controller, network, agents, manager.

    with Testbed(run) as testbed:
        testbed.vcenter.power_on("vm1")
        testbed.vcenter.migrate("vm1", to="esx2")

Everything started is owned here and ends with the block, in the reverse order.
"""

import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any

from experiments import faucet
from experiments.capture import WHOLE_FRAMES, Capture, CaptureNode
from experiments.children import Child, wait_until
from experiments.nas import Nas
from experiments.run import Run
from experiments.world import PRIVATE, open_vswitch, run, widen_port_buffers
from hosts.control import MANAGER, issue_certificates
from hosts.processes import end_behind
from hosts.sdn import SdnController
from hosts.vcenter import VCenter
from hosts.vmx import SUFFIX
from topologies.data_center import DataCenter
from topologies.errors import TestbedError, UsageError
from topologies.events import Event, find, read_events
from topologies.plan import Nas as NasPlan
from topologies.plan import Plan

_ROOT = Path(__file__).parent.parent
_CONTROLLER_PORT = 6653
API_PORT = 8080  # of the controller
API_SOCKET = "controller.sock"  # the same, in the results folder: reached from outside the world
# Enough of a frame for every header and a small request; the RAM itself need not be kept.
HEADERS_BYTES = 192
_STORAGE_BYTES = 640  # of NFS, whose handles are long: all but the contents of large reads and writes
_UP_WITHIN_S = 20.0
_GUESTS = PRIVATE / "guests"  # each host's guests listen here: a short path, for a socket's name has 108 bytes
_DOWN_WITHIN_S = 15.0


class Testbed:
    """The emulated data centre of one run."""

    __test__ = False  # not a test, whatever pytest makes of the name

    def __init__(self, run: Run) -> None:
        self.run = run
        self.datastore = run.folder / "datastore"
        self.children: dict[str, Child] = {}
        self._starts: Counter[str] = Counter()
        self._stack = ExitStack()
        self.net: Any
        self.nas: Nas | None = None
        self.vcenter: VCenter

    def __enter__(self) -> "Testbed":
        with self._stack as stack:
            vswitchd = stack.enter_context(open_vswitch(self.run.logs))
            certificates = self._certificates()
            if self.has_controller:
                self.start_controller()
            self.net = stack.enter_context(self._network())
            if self.has_controller:
                self._await_switches()
            widen_port_buffers(vswitchd)
            if self.run.options.datastore == "nfs":
                plan = _nas(self.run.plan)
                self.nas = stack.enter_context(Nas(plan, self.datastore, self.popen(plan.name), self.run.logs))
            self._start_agents()
            announce, schedule_ms = self.run.options.announce, self.run.options.schedule_ms
            sdn = SdnController(API_PORT, certificates / f"{MANAGER}.pem") if self._is_ours else None
            self.vcenter = VCenter(self.run.plan, certificates, self.run.events, announce, schedule_ms, sdn)
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
        names = [host.name for host in plan.hosts] + [client.name for client in plan.clients]
        names += [self.nas.plan.name] if self.nas else []
        for name in [*names, *plan.switches]:
            links = [intf.name for intf in self.net[name].intfList() if intf.link]
            interfaces = [(link, _STORAGE_BYTES if self._is_storage(link) else HEADERS_BYTES) for link in links]
            if name == plan.switch:
                interfaces.append(("lo", WHOLE_FRAMES))
            nodes.append(CaptureNode(name, Popen if name in plan.switches else self.popen(name), tuple(interfaces)))
        return Capture(self.run.pcap, nodes)

    def _is_storage(self, link: str) -> bool:
        return link.endswith("-vmnic2") or (self.nas is not None and link.startswith(f"{self.nas.plan.name}-"))

    def agent_memory_bytes(self) -> dict[str, int]:
        """Each agent's memory beside the guests' RAM, of those that answer."""
        said = {host.name: self.vcenter.status_of(host.name) for host in self.run.plan.hosts}
        return {host: status["memory_bytes"] for host, status in said.items() if status}

    def kill_agent(self, host: str) -> None:
        """kill -9. The host's VMs go on as they are."""
        self.children[f"agent-{host}"].kill()
        self.run.events.emit("agent.killed", host=host)

    def kill_host(self, host: str) -> None:
        """A power failure: kill -9 of its agent and of all that its VMs are. `restart_agent` is its return."""
        self.kill_agent(host)
        self.end_vms(host)
        self.run.events.emit("host.killed", host=host)

    def restart_agent(self, host: str) -> None:
        """A new agent of a host whose agent was killed; it has adopted what VMs there are when this returns."""
        before = self._listened(host)
        self._launch_agent(host)
        self._await(f"agent-{host}", partial(self._has_listened, host, before + 1))

    # ------------------------------------------------------------ parts

    def start_child(self, name: str, popen: Callable[..., Any], *words: str) -> Child:
        """A Python module as a program of its own, which ends with the testbed."""
        return self._start(name, popen, [sys.executable, "-m", *words])

    def _start(self, name: str, popen: Callable[..., Any], words: list[str]) -> Child:
        self._starts[name] += 1  # a second one must not overwrite what the first has said
        log = self.run.logs / (f"{name}.log" if self._starts[name] == 1 else f"{name}.{self._starts[name]}.log")
        child = Child(name, popen, words, log, _ROOT)
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

    @property
    def has_controller(self) -> bool:
        return self.run.options.controller != "standalone"

    @property
    def _is_ours(self) -> bool:
        """It guards, believes the manager, and answers."""
        return self.run.options.controller == "mobility"

    def start_controller(self) -> None:
        """In the world's root namespace. It listens before the network starts, or Mininet goes on without it."""
        name, run = self.run.options.controller, self.run
        if name == "faucet":
            environment = os.environ | faucet.environment(run.plan, run.logs)
            self._start("controller", partial(Popen, env=environment), faucet.words(_CONTROLLER_PORT))
        else:
            words = ["--application", name, "--port", str(_CONTROLLER_PORT), "--events", str(run.events_file)]
            self.start_child("controller", Popen, "controller", *words, *(self._api() if self._is_ours else []))
        self._await("controller", _answers)

    def _api(self) -> list[str]:
        at = self.run.folder / API_SOCKET
        self._stack.callback(at.unlink, missing_ok=True)
        words = ["--plan", str(self.run.options.plan_file), "--manager", str(PRIVATE / f"{MANAGER}.crt")]
        return [*words, "--api-port", str(API_PORT), "--api-socket", str(at)]

    def kill_controller(self) -> None:
        """kill -9. The switches go on with the entries that they have; `start_controller` is its return."""
        self.children["controller"].kill()
        self.run.events.emit("controller.killed")

    def _await_switches(self) -> None:
        """All of them, and with ours all trunks; another's says nothing that we could read, so OVS is asked."""
        plan, trunks = self.run.plan, len(self.run.plan.trunks)
        if self.run.options.controller == "faucet":
            self._await(
                "controller", lambda: "true" in run("ovs-vsctl", "--bare", "find", "controller", "is_connected=true")
            )
            return
        self._await("controller", lambda: len(self._told("switch.connected")) >= len(plan.switches))
        self._await("controller", lambda: len(self._told("trunk.up")) >= trunks)

    def _told(self, kind: str) -> list[Event]:
        return find(read_events(self.run.events_file), kind, source="controller")

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
        fail_mode = "secure" if self.has_controller else "standalone"
        net = Mininet(topo=DataCenter(self.run.plan, fail_mode), controller=None, build=False)
        try:
            if self.has_controller:
                net.addController("controller", Running, ip="127.0.0.1", port=_CONTROLLER_PORT)
            net.build()
            net.start()
            yield net
        finally:
            net.stop()

    def _certificates(self) -> Path:
        """Keys of this run, in a folder that ends with its world."""
        plan = self.run.plan
        names = {MANAGER: [plan.manager_ip]} | {
            host.name: [host.management, host.vmotion_port.ip] for host in plan.hosts
        }
        issue_certificates(PRIVATE, names)
        return PRIVATE

    def _start_agents(self) -> None:
        self.datastore.mkdir(exist_ok=True)
        self._stack.callback(self._end_guests)
        for host in self.run.plan.hosts:
            (_GUESTS / host.name).mkdir(parents=True, exist_ok=True)
            self._launch_agent(host.name)
        for host in self.run.plan.hosts:
            self._await(f"agent-{host.name}", partial(self._has_listened, host.name))

    def _launch_agent(self, host: str) -> None:
        words = ["hosts.agent", "--plan", str(self.run.options.plan_file), "--host", host]
        words += ["--certificates", str(PRIVATE), "--datastore", self.where, "--guests", str(_GUESTS / host)]
        words += ["--peer-timeout-s", str(self.run.options.peer_timeout_s)]
        words += ["--events", str(self.run.events_file), "--logs", str(self.run.logs)]
        self.start_child(f"agent-{host}", self.popen(host), *words)

    @property
    def where(self) -> str:
        """The datastore's name for the hosts (hosts/store.py)."""
        return f"nfs://{self.nas.plan.management}{self.nas.plan.export}" if self.nas else str(self.datastore)

    def _listened(self, host: str) -> int:
        """How many agents of a host have come up so far."""
        return len(find(read_events(self.run.events_file), "agent.listening", source=host))

    def _has_listened(self, host: str, times: int = 1) -> bool:
        return self._listened(host) >= times

    def _end_guests(self) -> None:
        """An agent ends its VMs, but one that was killed and not restarted has left them."""
        for host in self.run.plan.hosts:
            self.end_vms(host.name)

    def kill_vmx(self, host: str, vm: str) -> None:
        """kill -9 of a VM's vmx, and by that of the VM."""
        end_behind(_GUESTS / host / f"{vm}{SUFFIX}")
        self.run.events.emit("vmx.killed", host=host, vm=vm)

    def end_vms(self, host: str) -> None:
        """kill -9 of everything that is a VM on a host."""
        for home in sorted((_GUESTS / host).iterdir()):
            if end_behind(home):
                self.run.events.emit("guest.ended", host=host, vm=home.stem)

    def _await(self, name: str, is_up: Callable[[], bool]) -> None:
        """Until a part is up; TestbedError if it ended instead or takes too long."""
        wait_until(self.children[name], is_up, time.monotonic() + _UP_WITHIN_S)


def _nas(plan: Plan) -> NasPlan:
    if plan.nas is None:
        raise UsageError("the plan has no NAS; add a table [nas] to it, or run with --datastore local")
    return plan.nas


def _answers() -> bool:
    """Whether somebody listens on the controller's port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", _CONTROLLER_PORT)) == 0


def guest_pids() -> set[int]:
    """Every guest process of this world."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
                continue
            if b"hosts.light_guest" in words and words[0].endswith(b"python"):
                found.add(int(entry.name))
    return found
