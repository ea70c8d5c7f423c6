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

Like ESXi's, this vSwitch does not learn the MACs of its own VMs from traffic: it knows them from the
moment a port exists, dark or open.
"""

import os
import socket
import struct
import subprocess
import time
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import RTM_SETLINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from topologies.devices import RPS_CPUS, SYSCTLS, rps_file
from topologies.errors import TestbedError
from topologies.plan import VM

# linux/neighbour.h: a static bridge entry, which forwards and does not age (NUD_PERMANENT would mean the bridge itself)
_NUD_NOARP, _NTF_MASTER = 0x40, 0x04
_LISTENING, _FORWARDING = 1, 3  # linux/if_bridge.h, BR_STATE_*
_NLA_F_NESTED, _NLMSG_HEADER_BYTES = 0x8000, 16
_VM_DEVICE = "eth0"
_CARRIER_WITHIN_S = 3.0
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
            (bridge,) = netlink.link_lookup(ifname=vswitch)
            peer = {"ifname": _VM_DEVICE, "address": vm.mac, "net_ns_pid": pid}
            netlink.link("add", ifname=self.name, kind="veth", peer=peer)
            (self._index,) = netlink.link_lookup(ifname=self.name)
            _in_namespace(pid, ["sysctl", "-q", "-w", *_VM_SYSCTLS])
            _in_namespace(pid, ["ip", "-batch", "-"], f"link set lo up\nlink set {_VM_DEVICE} up\n")
            netlink.link("set", index=self._index, state="up")
            self._gate = _Gate(vm.name, self._index)
            # without an address the namespace says nothing and answers nothing: it gets one when its port is dark
            netlink.link("set", index=self._index, master=bridge)
            self._darken()
            netlink.fdb("add", ifindex=self._index, lladdr=vm.mac, state=_NUD_NOARP, flags=_NTF_MASTER)
        except (NetlinkError, ValueError) as error:
            raise VSwitchError(f"VM {vm.name}: no port on {vswitch}: {error}") from error
        _in_namespace(pid, ["ip", "addr", "add", vm.ip, "dev", _VM_DEVICE])
        for file in (rps_file(self.name), rps_file(_VM_DEVICE, f"/proc/{pid}/root/sys")):
            Path(file).write_text(RPS_CPUS)

    def open(self) -> None:
        """dark -> open. All that the VM needs of the network has to be in place."""
        self._gate.set(_FORWARDING)
        self.state = "open"

    def shut(self) -> None:
        """open -> dark."""
        self._gate.set(_LISTENING)
        self.state = "dark"

    def remove(self) -> None:
        """Take the port away, as far as the end of the VM's namespace has not done so already."""
        self._gate.close()
        if self._netlink.link_lookup(ifname=self.name):
            self._netlink.link("del", index=self._index)

    def _darken(self) -> None:
        """A new link's carrier is reported with a delay, and until then the bridge refuses to set its state."""
        deadline = time.monotonic() + _CARRIER_WITHIN_S
        while True:
            try:
                return self._gate.set(_LISTENING)
            except VSwitchError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.005)


class _Gate:
    """Sets a bridge port's state. The messages are made beforehand: each of the two is in every downtime."""

    def __init__(self, vm: str, index: int) -> None:
        self._vm = vm
        self._messages = {state: self._message(index, state) for state in (_LISTENING, _FORWARDING)}
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)

    @staticmethod
    def _message(index: int, state: int) -> bytes:
        message = ifinfmsg()
        message["header"] = {"type": RTM_SETLINK, "flags": NLM_F_REQUEST | NLM_F_ACK, "sequence_number": 1}
        message["family"], message["index"] = socket.AF_BRIDGE, index
        message["attrs"] = [("IFLA_PROTINFO", {"attrs": [("IFLA_BRPORT_STATE", state)]}, _NLA_F_NESTED)]
        message.encode()
        return bytes(message.data)

    def set(self, state: int) -> None:
        self._socket.send(self._messages[state])
        (code,) = struct.unpack_from("i", self._socket.recv(4096), _NLMSG_HEADER_BYTES)  # struct nlmsgerr
        if code:
            raise VSwitchError(f"VM {self._vm}: the state of its port cannot be set: {os.strerror(-code)}")

    def close(self) -> None:
        self._socket.close()


def _in_namespace(pid: int, command: list[str], text: str = "") -> None:
    words = ["nsenter", f"--net=/proc/{pid}/ns/net", *command]
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise VSwitchError(f"{' '.join(command)} in the VM's namespace: {done.stderr.strip()}")
