"""Injuries to a testbed while a migration runs, and how they heal. Only processes and devices of this run are touched.

Each function does its injury and returns a function that heals it.
"""

import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.children import READY, wait_until_up
from experiments.testbed import Testbed, guest_pids
from experiments.world import run as run_program
from hosts.protocol import PORT
from topologies.errors import TestbedError

Heal = Callable[[], None]

_MEDDLER_PORT = 8001
# So far into the stream that it hits a page that is sent once: the working set, which is written to, comes first
_INTO_THE_PAGES = 20_000_000


@dataclass(frozen=True)
class Scene:
    """Whom a case is about: `vm` moves, or is to move, from `source` to `target`."""

    testbed: Testbed
    vm: str
    source: str
    target: str


def kill_agent(scene: Scene, host: str) -> Heal:
    """kill -9; healed by a new agent."""
    scene.testbed.kill_agent(host)
    return lambda: scene.testbed.restart_agent(host)


def kill_guest(pid: int) -> Heal:
    """kill -9 of a VM's process; nothing heals that."""
    os.kill(pid, signal.SIGKILL)
    return lambda: None


def freeze_agent(scene: Scene, host: str) -> Heal:
    process = scene.testbed.children[f"agent-{host}"].process
    process.send_signal(signal.SIGSTOP)
    return lambda: process.send_signal(signal.SIGCONT)


def cut(scene: Scene, *from_hosts: str) -> Heal:
    """What these hosts send on the vMotion cable vanishes."""
    return _all([_blackhole(scene, host, parent) for host in from_hosts for parent in ("5:1", "5:2")])


def isolate(scene: Scene, host: str) -> Heal:
    """A host without storage, management and vMotion: all but the VM network, on which its VMs still speak."""
    return _all([cut_storage(scene, host), cut(scene, *(one.name for one in scene.testbed.run.plan.hosts))])


def cut_storage(scene: Scene, host: str) -> Heal:
    """Nothing passes between a host and the management & storage segment."""
    inside = scene.testbed.net[host].intf(f"{host}-vmnic2")
    outside = inside.link.intf2 if inside.link.intf1 is inside else inside.link.intf1
    ends = (("mnexec", "-a", str(inside.node.pid), "tc"), inside.name), (("tc",), outside.name)
    for tc, device in ends:
        run_program(*tc, "qdisc", "add", "dev", device, "root", "blackhole")
    scene.testbed.run.events.emit("host.isolated", host=host)

    def heal() -> None:
        for tc, device in ends:
            run_program(*tc, "qdisc", "del", "dev", device, "root")
        scene.testbed.run.events.emit("host.healed", host=host)

    return heal


def hide_datastore(scene: Scene) -> Heal:
    """It does not answer; or, if it is a folder, it is not where the hosts look for it."""
    nas = scene.testbed.nas
    if nas is not None:
        nas.freeze()
        return nas.thaw
    folder = scene.testbed.datastore
    hidden = folder.with_name("datastore-away")
    folder.rename(hidden)

    def heal() -> None:
        hidden.rename(folder)

    return heal


def take_memory(scene: Scene, host: str) -> Heal:
    """The agent may map so much more as its work takes, and not the RAM of the VM."""
    pid = scene.testbed.children[f"agent-{host}"].process.pid
    mapped = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    limit = mapped + scene.testbed.run.plan.vm(scene.vm).ram // 2
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, before[1]))

    def heal() -> None:
        resource.prlimit(pid, resource.RLIMIT_AS, before)

    return heal


def corrupt(scene: Scene) -> Heal:
    """The next stream takes a way on which one byte of a page is changed."""
    testbed = scene.testbed
    ip = testbed.run.plan.host(scene.target).vmotion_port.ip
    words = [ip, str(_MEDDLER_PORT), str(PORT), str(_INTO_THE_PAGES)]
    child = testbed.start_child("meddler", testbed.popen(scene.target), "experiments.meddler", *words)
    wait_until_up([child], READY, time.monotonic() + 10)
    testbed.vcenter.detour = lambda ip, _port: (ip, _MEDDLER_PORT)

    def heal() -> None:
        testbed.vcenter.detour = lambda ip, port: (ip, port)
        child.kill()

    return heal


def lose_rarp(scene: Scene) -> Heal:
    """RARP frames vanish on the target's uplink."""
    device = f"{scene.target}-vmnic0"
    htb = "htb rate 10gbit quantum 60000"
    for words in (
        f"qdisc add dev {device} root handle 5: htb default 1",
        f"class add dev {device} parent 5: classid 5:1 {htb}",
        f"class add dev {device} parent 5: classid 5:9 {htb}",
        f"qdisc add dev {device} parent 5:9 blackhole",
        f"filter add dev {device} parent 5: protocol 0x8035 prio 1 u32 match u32 0 0 flowid 5:9",
    ):
        _tc(scene, scene.target, *words.split())
    return lambda: _tc(scene, scene.target, "qdisc", "del", "dev", device, "root")


def send_rarp(scene: Scene, host: str) -> Heal:
    """An announcement of the VM from a host, as if it were there."""
    vm = scene.testbed.run.plan.vm(scene.vm)
    vswitch = scene.testbed.run.plan.host(host).vswitch_of(vm.port_group).name
    words = ("experiments.rarp_sender", vswitch, vm.mac, str(vm.interface.ip))
    scene.testbed.start_child("rarp_sender", scene.testbed.popen(host), *words).wait(time.monotonic() + 10)
    return lambda: None


def _blackhole(scene: Scene, host: str, parent: str) -> Heal:
    device = f"{host}-vmnic1"
    _tc(scene, host, "qdisc", "add", "dev", device, "parent", parent, "blackhole")
    return lambda: _tc(scene, host, "qdisc", "del", "dev", device, "parent", parent)


def _tc(scene: Scene, host: str, *words: str) -> None:
    run_program("mnexec", "-a", str(scene.testbed.net[host].pid), "tc", *words)


def _all(heals: list[Heal]) -> Heal:
    def heal() -> None:
        for each in heals:
            each()

    return heal


def has_port(scene: Scene, host: str) -> bool:
    """Is there a port of the VM on this host?"""
    device = f"{scene.vm}.eth0"
    words = ("mnexec", "-a", str(scene.testbed.net[host].pid), "ip", "-o", "link", "show")
    return any(device in line.split()[1] for line in run_program(*words).splitlines())


def guest_of(scene: Scene, host: str) -> int:
    """The process that is the VM at the source, or is to become it at the target."""
    at_source = int(scene.testbed.vcenter.status()[scene.source]["vms"][scene.vm]["pid"])
    if host == scene.source:
        return at_source
    others = guest_pids() - {at_source}
    if len(others) != 1:
        raise TestbedError(f"there are {len(others)} guests beside the VM's own")
    return others.pop()
