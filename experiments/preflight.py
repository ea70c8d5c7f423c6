"""What has to be true before a run begins: root, programs, memory, kernel. Each miss is one line with its remedy."""

import importlib.util
import os
import shutil
from pathlib import Path

from experiments.world import run
from hosts.nfs import NfsMissing, library
from topologies.errors import TestbedError, UsageError
from topologies.plan import Plan
from topologies.units import format_size

PROGRAMS = {
    "mnexec": "mininet",
    "ifconfig": "net-tools",
    "ovs-vsctl": "openvswitch-switch",
    "ovs-vswitchd": "openvswitch-switch",
    "ovsdb-server": "openvswitch-switch",
    "ovsdb-tool": "openvswitch-switch",
    "ip": "iproute2",
    "bridge": "iproute2",
    "tc": "iproute2",
    "ethtool": "ethtool",
    "ping": "iputils-ping",
    "dumpcap": "wireshark-common",
    "mergecap": "wireshark-common",
    "reordercap": "wireshark-common",
    "tshark": "tshark",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "sysctl": "procps",
}
# Besides two copies of each guest's RAM: agents, Open vSwitch, controller, probes, captures.
_OVERHEAD_BYTES = 600 * 2**20


def check_machine(plan: Plan) -> None:
    """Outside, before anything is made; UsageError if this machine cannot carry the run."""
    if os.geteuid():
        raise UsageError("network namespaces need root; run it with sudo")
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # where some sudo configurations do not look
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise UsageError(f"the program {program} is missing; install it with: apt-get install {package}")
    backend = os.environ.get("SDN_BACKEND", "ryu")
    if backend not in ("ryu", "os_ken") or importlib.util.find_spec(backend) is None:
        raise UsageError(f"SDN_BACKEND={backend} is unknown or not installed; set it to ryu or os_ken")
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(memory["MemAvailable"].split()[0]) * 1024
    needed = 2 * sum(vm.ram for vm in plan.vms) + _OVERHEAD_BYTES
    if needed > available:
        raise UsageError(
            f"RAM of {format_size(sum(vm.ram for vm in plan.vms))} is on both hosts during a migration: with the "
            f"testbed that takes {format_size(needed)}, there are {format_size(available)} left; choose less --ram"
        )


def check_nfs() -> None:
    """Before a run whose datastore is on the NAS; UsageError names what is missing for that."""
    ganesha = shutil.which("ganesha.nfsd")
    there = {
        "the program ganesha.nfsd": ("nfs-ganesha", ganesha),
        "the program rpcbind": ("rpcbind", shutil.which("rpcbind")),
        "libfsalvfs.so, by which ganesha exports a folder,": ("nfs-ganesha-vfs", ganesha and _has_vfs(Path(ganesha))),
    }
    for what, (package, is_there) in there.items():
        if not is_there:
            raise UsageError(f"{what} is missing; apt-get install {package} brings it, or use --datastore local")
    try:
        library()
    except NfsMissing as error:
        raise UsageError(str(error)) from error


def _has_vfs(ganesha: Path) -> bool:
    return any(any(ganesha.parents[1].glob(f"{lib}/ganesha/libfsalvfs.so")) for lib in ("lib*", "lib/*"))


def check_kernel(plan: Plan) -> None:
    """Inside the run's world, on devices of its own; UsageError names what this kernel lacks."""
    _probe("veth pairs (CONFIG_VETH)", "ip", "link", "add", "probe0", "type", "veth", "peer", "name", "probe1")
    try:
        _probe("bridges (CONFIG_BRIDGE)", "ip", "link", "add", "probe2", "type", "bridge")
        if plan.link:
            remedy = "; or run with --link unshaped"
            _probe(f"HTB (CONFIG_NET_SCH_HTB){remedy}", "tc", "qdisc", "add", "dev", "probe0", "root", "htb")
    finally:
        for device in ("probe0", "probe2"):
            if Path(f"/sys/class/net/{device}").exists():
                run("ip", "link", "del", device)


def _probe(feature: str, *words: str) -> None:
    try:
        run(*words)
    except TestbedError as error:
        raise UsageError(f"this kernel has no {feature}: {error}") from error
