"""A plan as a Mininet topology: nodes, switches, cables.

physical switches    Open vSwitch; each port is named after what is behind it: s1-esx1, leaf1-spine2
hosts                vSwitches are Linux bridges in the host's namespace, VMkernel ports their addresses
                     vmnic0 to the physical switch, vmnic1 to the vMotion cable, vmnic2 to the management segment
vMotion              a cable between two hosts, a segment for more
mgmt                 a segment: agents, manager, NAS
"""

import sys
from pathlib import Path

from mininet.link import Link, TCIntf
from mininet.node import Host as MininetHost
from mininet.node import OVSSwitch, Switch
from mininet.topo import Topo

from topologies.devices import RPS_CPUS, SYSCTLS, ip6_commands, rps_file
from topologies.errors import TestbedError
from topologies.plan import Host, Plan, PlanError, port_name, read_plan

VMOTION_SEGMENT = "vmotion"
PACKET_INS_PER_S = 4000  # a third of what the controller handles (README, figures)


def sh(node, *words: str) -> None:  # type: ignore[no-untyped-def]
    """Run a command in a Mininet node; TestbedError if it fails (Mininet's own cmd() does not look)."""
    out, err, status = node.pexec(*words)
    if status:
        raise TestbedError(f"{node.name}: {' '.join(words)}: {(err or out).strip()}")


def steady(node, device: str) -> None:  # type: ignore[no-untyped-def]
    """One CPU delivers all frames of a device (topologies/devices.py)."""
    sh(node, "sh", "-c", f"echo {RPS_CPUS} > {rps_file(device)}")


class Machine(MininetHost):
    """A host, its devices steady; without IPv6 unless it has an address for it."""

    def config(self, **params):  # type: ignore[no-untyped-def]
        result = super().config(**params)
        sh(self, "sysctl", "-q", "-w", *SYSCTLS)
        if params.get("ip6"):
            for command in ip6_commands(self.defaultIntf().name, params["ip6"]):
                sh(self, *command)
        for intf in self.intfList():
            steady(self, intf.name)
        return result


class Hypervisor(Machine):
    """A host with its vSwitches (Linux bridges) and VMkernel ports, as the plan has them."""

    def config(self, host: Host | None = None, management: str = "", **params):  # type: ignore[no-untyped-def]
        result = super().config(**params)
        if host is None:
            return result
        sh(self, "ip", "addr", "add", management, "dev", f"{self.name}-vmnic2")
        for vswitch in host.vswitches:
            uplink = f"{self.name}-{vswitch.uplink}"
            sh(self, "ip", "link", "add", vswitch.name, "type", "bridge", "stp_state", "0", "mcast_snooping", "0")
            sh(self, "ip", "link", "set", uplink, "master", vswitch.name)
            # an ESXi vSwitch knows its VMs and sends the rest up; it does not learn from its uplink
            sh(self, "bridge", "link", "set", "dev", uplink, "learning", "off")
            sh(self, "ip", "link", "set", vswitch.name, "up")
        for port in host.vmkernel_ports:
            inner, outer = port.name, f"{port.name}.port"
            sh(self, "ip", "link", "add", inner, "type", "veth", "peer", "name", outer)
            sh(self, "ip", "link", "set", outer, "master", host.vswitch_of(port.port_group).name, "up")
            sh(self, "ip", "addr", "add", str(port.interface), "dev", inner)
            sh(self, "ip", "link", "set", inner, "up")
            steady(self, inner)
            steady(self, outer)
        return result


class PhysicalSwitch(OVSSwitch):
    """Open vSwitch with its userspace datapath, which needs no kernel module.

    Without a controller it does nothing that it was not told ("secure"), or learns by itself ("standalone"). Frames for
    the controller wait in a queue of each port, from which it gets PACKET_INS_PER_S in turn: a port that floods it
    is heard no more than the others.
    """

    def __init__(self, name, **params):  # type: ignore[no-untyped-def]
        super().__init__(name, datapath="user", protocols="OpenFlow13", **params)

    def start(self, controllers):  # type: ignore[no-untyped-def]
        for intf in self.intfList():
            if intf.link:
                # a userspace datapath forwards frames as they are: checksums have to be complete, at both ends
                for end in (intf.link.intf1, intf.link.intf2):
                    sh(end.node, "ethtool", "-K", end.name, "tx", "off")
                steady(self, intf.name)
        super().start(controllers)
        limits = f"controller_rate_limit={PACKET_INS_PER_S}", f"controller_burst_limit={PACKET_INS_PER_S // 4}"
        for connection in self.controllerUUIDs(update=True):
            sh(self, "ovs-vsctl", "set", "controller", connection, *limits)


class Segment(Switch):
    """A plain Ethernet segment: a Linux bridge in the root namespace, where the manager may have its address."""

    def __init__(self, name, address: str = "", **params):  # type: ignore[no-untyped-def]
        super().__init__(name, dpid="ff", **params)
        self.address = address

    def start(self, _controllers):  # type: ignore[no-untyped-def]
        sh(self, "ip", "link", "add", self.name, "type", "bridge", "stp_state", "0", "mcast_snooping", "0")
        for intf in self.intfList():
            if intf.link:
                sh(self, "ip", "link", "set", intf.name, "master", self.name, "up")
                steady(self, intf.name)
        if self.address:
            sh(self, "ip", "addr", "add", self.address, "dev", self.name)
        sh(self, "ip", "link", "set", self.name, "up")

    def stop(self, deleteIntfs: bool = True) -> None:  # noqa: N803  (Mininet's name)
        if self.name in self.cmd("ip -brief link show dev", self.name):  # not if the start was interrupted
            sh(self, "ip", "link", "del", self.name)
        super().stop(deleteIntfs)

    def connected(self) -> bool:
        return True


# What may leave at once: the timer that meters the rate is no finer, and a fast cable would not be filled
_BURST_US = 200


class CableIntf(TCIntf):
    """An end of the vMotion cable; Mininet's own limit of 1 Gbit/s is lifted."""

    bwParamMax = 1_000_000  # noqa: N815  (Mininet's name; Mbit/s)

    def bwCmds(self, bw=None, **_params):  # type: ignore[no-untyped-def]  # noqa: N802
        """HTB, as Mininet has it, with two queues: what is marked DSCP EF (RFC 3246) goes before all the rest.

        The quantum that HTB would derive is refused with a warning at 1 Gbit/s.
        """
        if bw is None:
            return [], " root "
        burst = max(15_000, int(bw * _BURST_US / 8))
        limits = f"ceil {bw:f}Mbit burst {burst} cburst {burst} quantum 60000"
        return [
            "%s qdisc add dev %s root handle 5:0 htb default 1",
            f"%s class add dev %s parent 5:0 classid 5:10 htb rate {bw:f}Mbit {limits}",
            f"%s class add dev %s parent 5:10 classid 5:1 htb rate {bw / 2:f}Mbit {limits} prio 1",
            f"%s class add dev %s parent 5:10 classid 5:2 htb rate {bw / 2:f}Mbit {limits} prio 0",
            "%s filter add dev %s parent 5:0 protocol ip prio 1 u32 match ip tos 0xb8 0xfc flowid 5:2",
        ], " parent 5:1 "


class DataCenter(Topo):
    """The topology of a plan, or of a plan file."""

    def build(self, plan: Plan | str | Path, fail_mode: str = "secure") -> None:
        if not isinstance(plan, Plan):
            plan = _read(plan)
        prefix = plan.management.partition("/")[2]
        for number, switch in enumerate(plan.switches, start=1):
            self.addSwitch(switch, cls=PhysicalSwitch, dpid=f"{number:x}", failMode=fail_mode)
        self.addSwitch("mgmt", cls=Segment, address=f"{plan.manager_ip}/{prefix}")
        for one, other in plan.trunks:
            self.addLink(one, other, intfName1=port_name(one, other), intfName2=port_name(other, one))
        for client in plan.clients:
            self.addHost(client.name, cls=Machine, ip=client.ip, mac=client.mac, ip6=client.ip6)
            self.addLink(client.name, client.switch, intfName2=port_name(client.switch, client.name))
        for host in plan.hosts:
            self.addHost(host.name, cls=Hypervisor, ip=None, host=host, management=f"{host.management}/{prefix}")
            ports = {"intfName1": f"{host.name}-vmnic0", "intfName2": port_name(host.switch, host.name)}
            self.addLink(host.name, host.switch, **ports)
        self._add_vmotion(plan)
        for host in plan.hosts:
            self.addLink(host.name, "mgmt", intfName1=f"{host.name}-vmnic2")
        if plan.nas:
            self.addHost(plan.nas.name, cls=Machine, ip=f"{plan.nas.management}/{prefix}")
            self.addLink(plan.nas.name, "mgmt")

    def _add_vmotion(self, plan: Plan) -> None:
        cable = {"cls": Link, "intf": CableIntf, "bw": plan.link / 1e6} if plan.link else {}
        ends = [(host.name, f"{host.name}-vmnic1") for host in plan.hosts]
        if len(ends) == 2:
            (first, end), (second, other_end) = ends
            self.addLink(first, second, intfName1=end, intfName2=other_end, **cable)
            return
        self.addSwitch(VMOTION_SEGMENT, cls=Segment)
        for host, end in ends:
            self.addLink(host, VMOTION_SEGMENT, intfName1=end, **cable)


def _read(path: str | Path) -> Plan:
    """For `mn`, which meets any Exception by cleaning up: that kills by name all over the machine."""
    try:
        return read_plan(path)
    except PlanError as error:
        print(f"vmotion: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from error
