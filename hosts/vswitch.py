"""A host's vSwitches: Linux bridges in its namespace, and the VMs' ports on them.

A VM's port is in one of four states. The kernel drops nothing by itself: what a frame meets is

    dark     the port is not in the bridge: nothing in, nothing out
    hold     inbound frames queue in order                                   (not used yet)
    open     the port is in the bridge, and the bridge knows the VM's MAC
    divert   inbound frames go to the agent, which relays them               (not used yet)

Like ESXi's, this vSwitch does not learn the MACs of its own VMs from traffic: it knows them, and a
frame for one goes to its port from the moment the port is open. Taking the port out of the bridge
is the gate; setting the link down is not (the guest's stack would back off for seconds).
"""

import subprocess
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from topologies.devices import RPS_CPUS, SYSCTLS, rps_file
from topologies.errors import TestbedError
from topologies.plan import VM

# linux/neighbour.h: a static bridge entry, which forwards and does not age (NUD_PERMANENT would mean the bridge itself)
_NUD_NOARP, _NTF_MASTER = 0x40, 0x04
_VM_DEVICE = "eth0"
# Settings of the VM's own namespace. The send queue is capped because it is copied during the downtime.
_VM_SYSCTLS = (*SYSCTLS, "net.ipv4.tcp_wmem=4096 16384 1048576")


class VSwitchError(TestbedError):
    """The kernel refused a change to a vSwitch."""


class VmPort:
    """The port of one VM on a vSwitch of this host: a veth pair into the VM's namespace. Starts dark."""

    def __init__(self, netlink: IPRoute, vswitch: str, vm: VM, pid: int) -> None:
        self.vm, self.state = vm, "dark"
        self.name = f"{vm.name}.{_VM_DEVICE}"
        self._netlink = netlink
        try:
            (self._bridge,) = netlink.link_lookup(ifname=vswitch)
            peer = {"ifname": _VM_DEVICE, "address": vm.mac, "net_ns_pid": pid}
            netlink.link("add", ifname=self.name, kind="veth", peer=peer)
            (self._index,) = netlink.link_lookup(ifname=self.name)
        except (NetlinkError, ValueError) as error:
            raise VSwitchError(f"VM {vm.name}: no port on {vswitch}: {error}") from error
        _in_namespace(pid, ["sysctl", "-q", "-w", *_VM_SYSCTLS])
        setup = f"link set lo up\naddr add {vm.ip} dev {_VM_DEVICE}\nlink set {_VM_DEVICE} up\n"
        _in_namespace(pid, ["ip", "-batch", "-"], setup)
        netlink.link("set", index=self._index, state="up")
        for file in (rps_file(self.name), rps_file(_VM_DEVICE, f"/proc/{pid}/root/sys")):
            Path(file).write_text(RPS_CPUS)

    def open(self) -> None:
        """dark -> open. All that the VM needs of the network has to be in place."""
        self._change("set", master=self._bridge)
        self._netlink.fdb("add", ifindex=self._index, lladdr=self.vm.mac, state=_NUD_NOARP, flags=_NTF_MASTER)
        self.state = "open"

    def shut(self) -> None:
        """open -> dark. The bridge forgets the VM's MAC with its port."""
        self._change("set", master=0)
        self.state = "dark"

    def remove(self) -> None:
        """Take the port away, as far as the end of the VM's namespace has not done so already."""
        if self._netlink.link_lookup(ifname=self.name):
            self._change("del")

    def _change(self, command: str, **settings: int) -> None:
        try:
            self._netlink.link(command, index=self._index, **settings)
        except NetlinkError as error:
            raise VSwitchError(f"VM {self.vm.name}: port {self.name}: {command} {settings}: {error}") from error


def _in_namespace(pid: int, command: list[str], text: str = "") -> None:
    words = ["nsenter", f"--net=/proc/{pid}/ns/net", *command]
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise VSwitchError(f"{' '.join(command)} in the VM's namespace: {done.stderr.strip()}")
