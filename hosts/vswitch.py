"""A host's vSwitches: Linux bridges in its namespace, and the VMs' ports on them.

A VM's port is in one of four states. The kernel drops nothing by itself: what a frame meets is

    dark     nothing in, nothing out (bridge port state "listening")
    hold     inbound frames queue in order                                   (not used yet)
    open     frames pass (bridge port state "forwarding")
    divert   inbound frames go to the agent, which relays them               (not used yet)

The gate is the port's state in the bridge, because it changes in a fraction of a millisecond. Taking
the port out of the bridge waits for an RCU grace period (13-17 ms on two busy CPUs, all of it
downtime), and with its link down the guest's stack would back off for seconds. Of the dark states
"disabled" and "blocking" do not last: without STP the bridge turns them into "forwarding" by itself.

Like ESXi's, this vSwitch does not learn the MACs of its own VMs from traffic: it knows them as long as
their ports are open. A VM whose port is dark is elsewhere, and its frames leave by the uplink.
"""

import errno
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import RTM_DELNEIGH, RTM_NEWNEIGH, RTM_SETLINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg

from hosts.gate import Gate, Messages, VSwitchError
from topologies.devices import RPS_CPUS, SYSCTLS, ip6_commands, rps_file
from topologies.plan import VM

# linux/neighbour.h: a static bridge entry, which forwards and does not age (NUD_PERMANENT would mean the bridge itself)
_NUD_NOARP, _NTF_MASTER = 0x40, 0x04
_LISTENING, _FORWARDING = 1, 3  # linux/if_bridge.h, BR_STATE_*
_NLA_F_NESTED = 0x8000
_VM_DEVICE = "eth0"
_CARRIER_WITHIN_S = 3.0
# Settings of the VM's own namespace. The send queue is capped because it is copied during the downtime.
_VM_SYSCTLS = (*SYSCTLS, "net.ipv4.tcp_wmem=4096 16384 1048576")


class VmPort:
    """The port of one VM on a vSwitch of this host: a veth pair into the VM's namespace. Starts dark."""

    def __init__(self, vswitch: str, vm: VM, pid: int) -> None:
        self.vm = vm
        self.name = f"{vm.name}.{_VM_DEVICE}"
        self._index = 0  # of its device, once there is something of ours to take away
        self._gate: Gate | None = None
        try:
            with IPRoute() as netlink:
                self._build(netlink, vswitch, pid)
        except (NetlinkError, ValueError, OSError) as error:
            self.remove()
            raise VSwitchError(f"VM {vm.name}: no port on {vswitch}: {error}") from error
        except VSwitchError:
            self.remove()
            raise

    @classmethod
    def adopt(cls, vswitch: str, vm: VM, pid: int) -> "VmPort":
        """The port as another agent has left it; built anew if that agent had taken it away already."""
        port = cls.__new__(cls)
        port.vm, port.name = vm, f"{vm.name}.{_VM_DEVICE}"
        with IPRoute() as netlink:
            found = netlink.link_lookup(ifname=port.name)
        if not found:
            return cls(vswitch, vm, pid)
        port._index, port._gate = found[0], _gate_of(vm, found[0])
        return port

    def _build(self, netlink: IPRoute, vswitch: str, pid: int) -> None:
        (bridge,) = netlink.link_lookup(ifname=vswitch)
        peer = {"ifname": _VM_DEVICE, "address": self.vm.mac, "net_ns_pid": pid}
        netlink.link("add", ifname=self.name, kind="veth", peer=peer)
        (index,) = netlink.link_lookup(ifname=self.name)
        self._index, self._gate = index, _gate_of(self.vm, index)
        _in_namespace(pid, ["sysctl", "-q", "-w", *_VM_SYSCTLS])
        _in_namespace(pid, ["ip", "-batch", "-"], f"link set lo up\nlink set {_VM_DEVICE} up\n")
        netlink.link("set", index=index, state="up")
        # without an address the namespace says nothing and answers nothing: it gets one when its port is dark
        netlink.link("set", index=index, master=bridge)
        _darken_at_first(self.gate)
        _in_namespace(pid, ["ip", "addr", "add", self.vm.ip, "dev", _VM_DEVICE])
        if self.vm.ip6:
            for command in ip6_commands(_VM_DEVICE, self.vm.ip6):
                _in_namespace(pid, command)
        for file in (rps_file(self.name), rps_file(_VM_DEVICE, f"/proc/{pid}/root/sys")):
            Path(file).write_text(RPS_CPUS)

    def open(self) -> None:
        """dark -> open. All that the VM needs of the network has to be in place."""
        self.gate.open()

    def shut(self) -> None:
        """open -> dark."""
        self.gate.shut()

    def remove(self) -> None:
        """Take the port away, as far as the end of the VM's namespace has not done so already."""
        if self._gate is None:
            return
        self._gate.close()
        with IPRoute() as netlink:
            try:
                netlink.link("del", index=self._index)
            except NetlinkError as error:
                if error.code != errno.ENODEV:
                    raise VSwitchError(f"VM {self.vm.name}: port {self.name} stays: {error}") from error

    @property
    def gate(self) -> Gate:
        if self._gate is None:
            raise VSwitchError(f"VM {self.vm.name}: port {self.name} was never built")
        return self._gate


def _gate_of(vm: VM, index: int) -> Gate:
    """The messages are made beforehand: opening and shutting are in every downtime."""
    listening, forwarding = _state(index, _LISTENING), _state(index, _FORWARDING)
    known = _entry(index, vm.mac, RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE)
    return Gate(vm.name, Messages(listening, forwarding, known, _entry(index, vm.mac, RTM_DELNEIGH, 0)))


def _darken_at_first(gate: Gate) -> None:
    """A new link's carrier is reported with a delay, and until then the bridge refuses to set its state."""
    deadline = time.monotonic() + _CARRIER_WITHIN_S
    while True:
        try:
            return gate.darken()
        except VSwitchError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.005)


def _state(index: int, state: int) -> bytes:
    message = ifinfmsg()
    message["family"], message["index"] = socket.AF_BRIDGE, index
    message["attrs"] = [("IFLA_PROTINFO", {"attrs": [("IFLA_BRPORT_STATE", state)]}, _NLA_F_NESTED)]
    return _encoded(message, RTM_SETLINK, 0)


def _entry(index: int, mac: str, kind: int, flags: int) -> bytes:
    message = ndmsg()
    message["family"], message["ifindex"] = socket.AF_BRIDGE, index
    message["state"], message["flags"] = _NUD_NOARP, _NTF_MASTER
    message["attrs"] = [("NDA_LLADDR", mac)]
    return _encoded(message, kind, flags)


def _encoded(message: Any, kind: int, flags: int) -> bytes:
    message["header"] = {"type": kind, "flags": NLM_F_REQUEST | NLM_F_ACK | flags, "sequence_number": 1}
    message.encode()
    return bytes(message.data)


def _in_namespace(pid: int, command: list[str], text: str = "") -> None:
    words = ["nsenter", f"--net=/proc/{pid}/ns/net", *command]
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise VSwitchError(f"{' '.join(command)} in the VM's namespace: {done.stderr.strip()}")
