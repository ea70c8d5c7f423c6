"""A VM's port on a vSwitch, dark and open, with every frame on either side of it seen.

client --- uplink | vSwitch0 | vm1.eth0 --- vm1
                  |          | vm2.eth0 --- vm2
"""

import errno
import gc
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from fakes import BROADCAST, arp, ethernet, rarp
from namespaces import Node, inside
from programs import eventually

from experiments.world import run
from hosts.gate import VSwitchError
from hosts.vswitch import VmPort
from topologies.plan import VM

EVERY_TYPE = 0x0003  # ETH_P_ALL, linux/if_ether.h
CLIENT, CLIENT_IP = "00:50:56:00:01:64", "10.0.0.100"
NOBODY, MULTICAST = "00:50:56:00:09:99", "01:00:5e:00:00:05"
VM1 = VM("vm1", "esx1", "10.0.0.11/24", "00:50:56:00:00:01")
VM2 = VM("vm2", "esx1", "10.0.0.12/24", "00:50:56:00:00:02")
PATIENCE_S = 20.0


class Wire:
    """A device of this namespace: sends frames and sees those that come in."""

    def __init__(self, device: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._socket.bind((device, EVERY_TYPE))
        self._socket.settimeout(PATIENCE_S)

    def send(self, frame: bytes) -> None:
        try:
            self._socket.send(frame)
        except OSError as error:
            if error.errno != errno.ENETDOWN:
                raise
            self._socket.send(frame)  # the link was down meanwhile, which a packet socket reports once

    def until(self, last: bytes) -> list[bytes]:
        """What came in before a frame that is known to come; frames do not overtake each other."""
        seen: list[bytes] = []
        while True:
            frame, (_, _, direction, *_) = self._socket.recvfrom(2048)
            if frame == last:
                return seen
            if direction != socket.PACKET_OUTGOING:
                seen.append(frame)

    def close(self) -> None:
        self._socket.close()


class PoweredOn:
    """A VM on the vSwitch: its namespace, its port, its end of the wire."""

    def __init__(self, vm: VM) -> None:
        self.vm, self.node = vm, Node()
        self.port = VmPort("vSwitch0", vm, self.node.pid)
        with inside(self.node.pid):
            self.wire = Wire("eth0")

    def udp(self) -> socket.socket:
        return udp(self.node, str(self.vm.interface.ip))

    def end(self) -> None:
        self.wire.close()
        self.port.remove()
        self.node.end()


class Network:
    """A vSwitch as topologies/two_hosts.py makes it, and a client behind its uplink."""

    def __init__(self) -> None:
        self.client = Node()
        self.client.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
        run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        run("ip", "link", "add", "vSwitch0", "type", "bridge", "stp_state", "0", "mcast_snooping", "0")
        peer = ("peer", "name", "eth0", "address", CLIENT, "netns", str(self.client.pid))
        run("ip", "link", "add", "uplink", "type", "veth", *peer)
        run("ip", "link", "set", "uplink", "master", "vSwitch0", "up")
        run("bridge", "link", "set", "dev", "uplink", "learning", "off")
        run("ip", "link", "set", "vSwitch0", "up")
        self.client.run("ip", "addr", "add", f"{CLIENT_IP}/24", "dev", "eth0")
        self.client.run("ip", "link", "set", "eth0", "up")
        eventually(lambda: state_of("uplink") == "forwarding", "carrier")
        self.host = Wire("vSwitch0")
        with inside(self.client.pid):
            self.wire = Wire("eth0")
        self._vms: list[PoweredOn] = []

    def power_on(self, vm: VM) -> PoweredOn:
        self._vms.append(PoweredOn(vm))
        return self._vms[-1]

    def end(self) -> None:
        for vm in self._vms:
            vm.end()
        self.wire.close()
        self.host.close()
        run("ip", "link", "del", "uplink")
        run("ip", "link", "del", "vSwitch0")
        self.client.end()


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    yield network
    network.end()


def state_of(port: str) -> str:
    """The bridge's word for the state of a port."""
    words = run("bridge", "link", "show", "dev", port).split()
    return words[words.index("state") + 1]


def entries(port: str) -> list[str]:
    """The MACs that the bridge knows behind a port, beside the port's own."""
    lines = run("bridge", "fdb", "show", "dev", port).splitlines()
    return [line.split()[0] for line in lines if "permanent" not in line and "self" not in line]


def udp(node: Node, ip: str) -> socket.socket:
    with inside(node.pid):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((ip, 9))
    sock.settimeout(PATIENCE_S)
    return sock


def pings(node: Node, ip: str, patience_s: int = 10) -> bool:
    done = node.popen(["ping", "-c1", "-W", str(patience_s), ip], stdout=subprocess.DEVNULL)
    return done.wait(PATIENCE_S) == 0


def numbered(source: str, destination: str, number: int = 0) -> bytes:
    return ethernet(source, destination, payload=number.to_bytes(4, "big"))


def every_kind(source: str, destination: str, source_ip: bytes, destination_ip: bytes) -> list[bytes]:
    """Frames to one, to all, to many, to nobody; a question, and an announcement."""
    to = [numbered(source, mac) for mac in (destination, BROADCAST, MULTICAST, NOBODY)]
    return [*to, arp(source, source_ip, destination_ip), rarp(source)]


def ip_bytes(ip: str) -> bytes:
    return socket.inet_aton(ip)


INBOUND = every_kind(CLIENT, VM1.mac, ip_bytes(CLIENT_IP), ip_bytes("10.0.0.11"))
OUTBOUND = every_kind(VM1.mac, CLIENT, ip_bytes("10.0.0.11"), ip_bytes(CLIENT_IP))


def nothing_passes(network: Network, vm1: PoweredOn) -> None:
    """Everything is tried while the port is dark; once it is open the first frame through it is the next one sent."""
    with closing(Wire("uplink")) as at_uplink, closing(Wire(vm1.port.name)) as at_port:
        for inbound, outbound in zip(INBOUND, OUTBOUND, strict=True):
            network.wire.send(inbound)
            network.host.send(inbound)  # the vSwitch itself sends too: announcements
            vm1.wire.send(outbound)
            at_uplink.until(inbound)  # a frame waits for its CPU, and would find the port open
            at_port.until(outbound)
    vm1.port.open()
    last = numbered(CLIENT, VM1.mac, 1)
    network.wire.send(last)
    assert vm1.wire.until(last) == []
    last = numbered(VM1.mac, CLIENT, 2)
    vm1.wire.send(last)
    assert [frame for frame in network.wire.until(last) if frame not in INBOUND] == []


# ---------------------------------------------------------------- dark and open


def test_through_a_new_port_nothing_passes_until_it_opens(network: Network) -> None:
    vm1 = network.power_on(VM1)
    assert state_of("vm1.eth0") == "listening"
    nothing_passes(network, vm1)
    assert state_of("vm1.eth0") == "forwarding"


def test_through_a_port_that_was_shut_again_nothing_passes(network: Network) -> None:
    vm1 = network.power_on(VM1)
    for _ in range(3):
        vm1.port.open()
        vm1.port.shut()
        assert state_of("vm1.eth0") == "listening"
        nothing_passes(network, vm1)


def test_through_an_open_port_everything_passes_both_ways_in_order(network: Network) -> None:
    vm1 = network.power_on(VM1)
    vm1.port.open()
    for sender, receiver, frames in ((network.wire, vm1.wire, INBOUND), (vm1.wire, network.wire, OUTBOUND)):
        for frame in frames:
            sender.send(frame)
        last = numbered(frames[0][6:12].hex(":"), BROADCAST, 1)
        sender.send(last)
        answered = receiver.until(last)
        assert [frame for frame in answered if frame in frames] == frames


def test_the_stacks_of_both_sides_reach_each_other_only_through_an_open_port(network: Network) -> None:
    vm1 = network.power_on(VM1)
    network.client.run("ip", "neigh", "add", "10.0.0.11", "lladdr", VM1.mac, "dev", "eth0")
    vm1.node.run("ip", "neigh", "add", CLIENT_IP, "lladdr", CLIENT, "dev", "eth0")
    with udp(network.client, CLIENT_IP) as client, vm1.udp() as vm:
        for is_open in (False, True, False, True):
            (vm1.port.open if is_open else vm1.port.shut)()
            client.sendto(f"client {is_open}".encode(), ("10.0.0.11", 9))
            vm.sendto(f"vm {is_open}".encode(), (CLIENT_IP, 9))
            assert pings(network.client, "10.0.0.11", 10 if is_open else 1) == is_open
            assert pings(vm1.node, CLIENT_IP, 10 if is_open else 1) == is_open
            if is_open:  # the first datagram is the one of this time
                assert vm.recv(100) == b"client True"
                assert client.recv(100) == b"vm True"


def test_a_question_for_the_vms_address_is_answered_only_through_an_open_port(network: Network) -> None:
    vm1 = network.power_on(VM1)
    assert not pings(network.client, "10.0.0.11", 1)
    vm1.port.open()
    assert pings(network.client, "10.0.0.11")
    assert VM1.mac in network.client.run("ip", "neigh", "show", "10.0.0.11")


# ---------------------------------------------------------------- what else happens on the vSwitch


def another_port_comes_and_goes() -> None:
    run("ip", "link", "add", "vm3.eth0", "type", "veth", "peer", "name", "vm3.peer")
    run("ip", "link", "set", "vm3.peer", "up")
    run("ip", "link", "set", "vm3.eth0", "master", "vSwitch0", "up")
    eventually(lambda: state_of("vm3.eth0") == "forwarding", "carrier")
    run("ip", "link", "del", "vm3.eth0")


def the_uplink_loses_its_carrier() -> None:
    run("ip", "link", "set", "uplink", "down")
    assert state_of("uplink") == "disabled"
    run("ip", "link", "set", "uplink", "up")
    eventually(lambda: state_of("uplink") == "forwarding", "carrier")


def the_uplink_is_taken_out_and_put_back() -> None:
    run("ip", "link", "set", "uplink", "nomaster")
    run("ip", "link", "set", "uplink", "master", "vSwitch0")
    eventually(lambda: state_of("uplink") == "forwarding", "carrier")
    run("bridge", "link", "set", "dev", "uplink", "learning", "off")


def settings_of_the_vswitch_change() -> None:
    run("ip", "link", "set", "vSwitch0", "mtu", "1400")
    run("ip", "link", "set", "vSwitch0", "mtu", "1500")
    run("ip", "link", "set", "vSwitch0", "type", "bridge", "ageing_time", "1000", "forward_delay", "200")
    run("ip", "link", "set", "vSwitch0", "promisc", "on")


OTHER_EVENTS = (
    another_port_comes_and_goes,
    the_uplink_loses_its_carrier,
    the_uplink_is_taken_out_and_put_back,
    settings_of_the_vswitch_change,
)


@pytest.mark.parametrize("happens", OTHER_EVENTS, ids=lambda event: event.__name__)
def test_a_dark_port_stays_dark_when(network: Network, happens: Callable[[], None]) -> None:
    vm1 = network.power_on(VM1)
    happens()
    nothing_passes(network, vm1)


def test_a_dark_port_stays_dark_when_the_port_of_another_vm_opens_and_shuts(network: Network) -> None:
    vm1, vm2 = network.power_on(VM1), network.power_on(VM2)
    vm2.port.open()
    vm2.port.shut()
    vm2.port.remove()
    nothing_passes(network, vm1)


# ---------------------------------------------------------------- who is where


def test_the_vswitch_knows_its_vm_before_the_vm_has_said_a_word(network: Network) -> None:
    vm1, vm2 = network.power_on(VM1), network.power_on(VM2)
    vm1.port.open()
    vm2.port.open()
    assert (entries("vm1.eth0"), entries("vm2.eth0")) == ([VM1.mac], [VM2.mac])
    for_vm1, for_all = numbered(CLIENT, VM1.mac), numbered(CLIENT, BROADCAST)
    network.wire.send(for_vm1)
    network.wire.send(for_all)
    assert vm1.wire.until(for_all) == [for_vm1]
    assert vm2.wire.until(for_all) == []


def test_an_announcement_from_elsewhere_does_not_take_the_mac_away(network: Network) -> None:
    """The RARP of the host where the VM was before comes back over the uplink when the network floods it."""
    vm1, vm2 = network.power_on(VM1), network.power_on(VM2)
    vm1.port.open()
    vm2.port.open()
    network.wire.send(rarp(VM1.mac))
    network.host.send(rarp(VM1.mac))
    for_vm1, for_all = numbered(VM2.mac, VM1.mac), numbered(VM2.mac, BROADCAST)
    vm2.wire.send(for_vm1)
    vm2.wire.send(for_all)
    assert for_vm1 in vm1.wire.until(for_all)
    assert for_vm1 not in network.wire.until(for_all)
    assert entries("uplink") == []


def test_two_vms_on_one_vswitch_reach_each_other_and_the_client(network: Network) -> None:
    vm1, vm2 = network.power_on(VM1), network.power_on(VM2)
    vm1.port.open()
    vm2.port.open()
    assert pings(vm1.node, "10.0.0.12")
    assert pings(vm2.node, "10.0.0.11")
    vm1.port.shut()
    assert not pings(vm2.node, "10.0.0.11", 1)
    assert pings(vm2.node, CLIENT_IP)
    assert pings(network.client, "10.0.0.12")


def test_beside_a_dark_port_the_mac_is_reached_where_the_vm_is(network: Network) -> None:
    """A VM that is still coming here, or has left, runs elsewhere: its neighbours reach it over the uplink."""
    vm1, vm2 = network.power_on(VM1), network.power_on(VM2)
    vm2.port.open()
    for number, (change, is_here) in enumerate([(None, False), (vm1.port.open, True), (vm1.port.shut, False)]):
        if change is not None:
            change()
        for_vm1, for_all = numbered(VM2.mac, VM1.mac, number), numbered(VM2.mac, BROADCAST, number)
        vm2.wire.send(for_vm1)
        vm2.wire.send(for_all)
        assert (for_vm1 in network.wire.until(for_all)) == (not is_here)
        if is_here:
            assert vm1.wire.until(for_all) == [for_vm1]


# ---------------------------------------------------------------- the end


def left() -> tuple[list[str], str, int]:
    """Devices and MACs of the vSwitch's side, and our open files."""
    gc.collect()  # not those of an earlier test
    devices = sorted(name for _, name in socket.if_nameindex())
    return devices, run("bridge", "fdb", "show"), len(os.listdir("/proc/self/fd"))


def test_a_removed_port_leaves_nothing_on_either_side(network: Network) -> None:
    before = left()
    node = Node()
    for use in (lambda port: None, VmPort.open, VmPort.shut):
        port = VmPort("vSwitch0", VM1, node.pid)
        use(port)
        port.remove()
        assert "eth0" not in node.run("ip", "link", "show")
    node.end()
    assert left() == before


def test_a_port_whose_vm_has_ended_before_is_removed_all_the_same(network: Network) -> None:
    before = left()
    for _ in range(20):  # the kernel takes the device away a moment after the namespace's last process
        node = Node()
        port = VmPort("vSwitch0", VM1, node.pid)
        port.open()
        node.end()
        port.remove()
        eventually(lambda: left() == before, "end of the device")


def test_without_its_vswitch_or_its_vm_no_port_is_made_and_none_is_left(network: Network) -> None:
    before = left()
    node = Node()
    with pytest.raises(VSwitchError, match="VM vm1: no port on vSwitch7"):
        VmPort("vSwitch7", VM1, node.pid)
    node.end()
    with pytest.raises(VSwitchError, match="VM vm1: no port on vSwitch0"):
        VmPort("vSwitch0", VM1, node.pid)
    assert left() == before


def test_a_second_port_of_the_same_vm_is_refused_and_the_first_goes_on(network: Network) -> None:
    vm1 = network.power_on(VM1)
    vm1.port.open()
    node = Node()
    with pytest.raises(VSwitchError, match="VM vm1: no port on vSwitch0"):
        VmPort("vSwitch0", VM1, node.pid)
    node.end()
    assert pings(network.client, "10.0.0.11")
