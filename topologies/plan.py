"""What a testbed consists of: frozen data, read from TOML, validated before anything is touched.

    plan = read_plan("topologies/two_hosts.toml")

A plan mirrors what an administrator enters in vSphere: hosts with vSwitches, port groups and
VMkernel ports, VMs with their RAM, MAC and port group. Everything here is pure and needs the
standard library alone, so that a stock `mn --custom` can load it.
"""

import dataclasses
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv4Address, IPv4Interface, IPv4Network, IPv6Interface, NetmaskValueError
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from topologies.errors import UsageError
from topologies.units import format_size, parse_bitrate, parse_percent, parse_rate, parse_size

DEFAULT_PLAN = Path(__file__).with_name("two_hosts.toml")
LEAF_SPINE = Path(__file__).with_name("leaf_spine.toml")  # four hosts, two leaves, two spines

# An interface is named <host>-<uplink> ("esx1-vmnic0") and Linux allows 15 characters.
NAME_PATTERN = "[a-z][a-z0-9]{0,7}"  # of a node: it is in the names of devices, namespaces, files
_NAME = re.compile(NAME_PATTERN)
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_PAGE = 4096
_MAX_DEVICE = 15
_UPLINKS = {"vmnic0": "to the physical switch", "vmnic1": "the vMotion cable"}
MIN_RAM_BYTES = 16 * 2**20
MIN_DISK_BYTES = 2**20
_MAX_BYTES = 2**44  # of either: beyond it, it is a slip


class PlanError(UsageError):
    """A plan that cannot be built; the message names the table, the key and the remedy."""


@dataclass(frozen=True)
class VSwitch:
    """A virtual switch of a host: its physical uplink and the port groups it offers."""

    name: str
    uplink: str
    port_groups: tuple[str, ...]


@dataclass(frozen=True)
class VMkernelPort:
    """An IP interface of the host itself, on a port group; `vmotion` allows migrations over it."""

    name: str
    port_group: str
    ip: str
    netmask: str
    vmotion: bool = False

    @property
    def interface(self) -> IPv4Interface:
        return IPv4Interface(f"{self.ip}/{self.netmask}")


@dataclass(frozen=True)
class Host:
    """A hypervisor. `management` is its address on the management & storage segment (vmnic2)."""

    name: str
    management: str
    vswitches: tuple[VSwitch, ...]
    vmkernel_ports: tuple[VMkernelPort, ...]
    switch: str = ""  # to which its vmnic0 leads; the plan's first one if it does not say

    def vswitch_of(self, port_group: str) -> VSwitch:
        """The vSwitch that offers a port group."""
        return next(v for v in self.vswitches if port_group in v.port_groups)

    @property
    def vmotion_port(self) -> VMkernelPort:
        return next(port for port in self.vmkernel_ports if port.vmotion)


@dataclass(frozen=True)
class VM:
    """A virtual machine and the work its light guest does.

    `fill` is the fraction of RAM filled with random data at power-on, `compressible` the fraction of each
    filled page that repeats itself (hence is nothing to a packer); the memory dirtier writes
    `dirty_rate` bytes per second (4 KiB pages) at random places of a `working_set`; the bulk
    stream offers `bulk_rate` bits per second to each client that connects. The transaction server keeps its journal
    on a `disk` of so many bytes. Without an `ip6` it has no IPv6.
    """

    name: str
    host: str
    ip: str
    mac: str
    port_group: str = "VM Network"
    ram: int = field(default=512 * 2**20, metadata={"parse": parse_size})
    fill: float = field(default=0.75, metadata={"parse": parse_percent})
    compressible: float = field(default=0.0, metadata={"parse": parse_percent})
    dirty_rate: int = field(default=50_000_000, metadata={"parse": parse_rate})
    working_set: int = field(default=64 * 2**20, metadata={"parse": parse_size})
    bulk_rate: int = field(default=10_000_000, metadata={"parse": parse_bitrate})
    disk: int = field(default=64 * 2**20, metadata={"parse": parse_size})
    ip6: str = ""

    @property
    def interface(self) -> IPv4Interface:
        return IPv4Interface(self.ip)

    @property
    def interface6(self) -> IPv6Interface | None:
        return IPv6Interface(self.ip6) if self.ip6 else None


@dataclass(frozen=True)
class Client:
    """A machine on the VM network that uses the VMs."""

    name: str
    ip: str
    mac: str
    ip6: str = ""
    switch: str = ""  # the plan's first one if it does not say

    @property
    def interface(self) -> IPv4Interface:
        return IPv4Interface(self.ip)

    @property
    def interface6(self) -> IPv6Interface | None:
        return IPv6Interface(self.ip6) if self.ip6 else None


@dataclass(frozen=True)
class Nas:
    """A file server on the management & storage segment. `datastore` is the name of what it exports."""

    name: str
    management: str
    datastore: str = "datastore1"

    @property
    def export(self) -> str:
        """As an NFS client names it."""
        return f"/{self.datastore}"


_Named = TypeVar("_Named", Host, VM, Client)


@dataclass(frozen=True)
class Plan:
    """The whole testbed. `link` is the vMotion cable's rate in bit/s, 0 for unshaped.

    `switch` is the first physical switch; each of `trunks` is a cable between two of them.
    """

    switch: str
    management: str
    link: int = field(metadata={"parse": parse_bitrate})
    hosts: tuple[Host, ...]
    clients: tuple[Client, ...]
    vms: tuple[VM, ...]
    nas: Nas | None = None  # without one the hosts keep their VMs in a folder
    trunks: tuple[tuple[str, str], ...] = ()

    @property
    def switches(self) -> tuple[str, ...]:
        """All physical switches, the first one first; the datapath id of each is its number in this list, from 1."""
        names = [self.switch, *(name for trunk in self.trunks for name in trunk)]
        return tuple(dict.fromkeys(names))

    @property
    def manager_ip(self) -> str:
        """The manager's own address on the management segment: the first one."""
        return str(next(IPv4Network(self.management).hosts()))

    def host(self, name: str) -> Host:
        return self._named(self.hosts, name, "host")

    def vm(self, name: str) -> VM:
        return self._named(self.vms, name, "VM")

    def client(self, name: str) -> Client:
        return self._named(self.clients, name, "client")

    def with_vm(self, vm: VM) -> "Plan":
        """The same plan with one VM's settings replaced, validated again."""
        self.vm(vm.name)
        return validate(dataclasses.replace(self, vms=tuple(vm if v.name == vm.name else v for v in self.vms)))

    @staticmethod
    def _named(things: tuple[_Named, ...], name: str, what: str) -> _Named:
        for thing in things:
            if thing.name == name:
                return thing
        known = ", ".join(thing.name for thing in things)
        raise PlanError(f"the plan has no {what} {name!r}; it has {known}")


def read_plan(path: Path | str = DEFAULT_PLAN) -> Plan:
    """Read and validate a plan file; PlanError names what is wrong with it."""
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # TOML, UTF-8, a number too long, tables nested too deeply
        raise PlanError(f"the plan {path} is no valid TOML: {error}") from error
    try:
        return plan_of(document)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def plan_of(document: dict[str, Any]) -> Plan:
    """The plan of a TOML document."""
    return validate(_build(Plan, document, "the plan"))


def _build(cls: type, table: Any, where: str) -> Any:
    """A dataclass from a TOML table; unknown, missing and mistyped keys are refused by name."""
    if not isinstance(table, dict):
        raise PlanError(f"{where} must be a table")
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in table:
        if key not in fields:
            raise PlanError(f"{where} has an unknown key {key!r}; known are {', '.join(fields)}")
    values = {}
    for name, spec in fields.items():
        if name in table:
            values[name] = _value(hints[name], spec, table[name], f"{where}, key {name!r}")
        elif spec.default is dataclasses.MISSING:
            raise PlanError(f"{where} lacks the key {name!r}")
    return cls(**values)


def _value(hint: Any, spec: dataclasses.Field[Any] | None, value: Any, where: str) -> Any:
    if spec is not None and "parse" in spec.metadata:
        if not isinstance(value, str):
            raise PlanError(f"{where}: {value!r} has no unit; write a string with a unit")
        try:
            return spec.metadata["parse"](value)
        except UsageError as error:
            raise PlanError(f"{where}: {error}") from error
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise PlanError(f"{where} must be a list")
        item = get_args(hint)[0]
        if get_args(hint)[-1] is not ...:  # of a fixed length
            if len(value) != len(get_args(hint)):
                raise PlanError(f"{where} must have {len(get_args(hint))} entries, not {len(value)}")
            return tuple(_item(item, element, f"{where}[{i}]") for i, element in enumerate(value))
        return tuple(_item(item, element, f"{where}[{i}]") for i, element in enumerate(value))
    if get_origin(hint) is UnionType:  # an optional table
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
        return _build(hint, value, where)
    if not isinstance(value, hint):
        raise PlanError(f"{where} must be a {hint.__name__}, not {value!r}")
    return value


def _item(kind: type, element: Any, where: str) -> Any:
    if get_origin(kind) is tuple:
        return _value(kind, None, element, where)
    if dataclasses.is_dataclass(kind):
        name = element.get("name") if isinstance(element, dict) else None
        return _build(kind, element, f"{kind.__name__} {name!r}" if isinstance(name, str) else where)
    if not isinstance(element, kind):
        raise PlanError(f"{where} must be a {kind.__name__}, not {element!r}")
    return element


# ---------------------------------------------------------------- validation


def validate(plan: Plan) -> Plan:
    """The same plan, each node with its switch; or PlanError with the first thing that cannot be built."""
    hosts = tuple(dataclasses.replace(host, switch=host.switch or plan.switch) for host in plan.hosts)
    clients = tuple(dataclasses.replace(client, switch=client.switch or plan.switch) for client in plan.clients)
    plan = dataclasses.replace(plan, hosts=hosts, clients=clients)
    for check in _CHECKS:
        check(plan)
    return plan


def port_name(switch: str, node: str) -> str:
    """The port of a physical switch is named after what is behind it."""
    return f"{switch}-{node}"


def _check_names(plan: Plan) -> None:
    if len(plan.hosts) < 2:
        raise PlanError(f"a migration takes two hosts, the plan names {len(plan.hosts)}")
    seen = {"mgmt": "the management segment", "vmotion": "the vMotion segment"}
    for what, name in _names(plan):
        if not _NAME.fullmatch(name):
            raise PlanError(f"{what} {name!r}: a name is a lower-case letter and up to 7 letters or digits")
        if name in seen:
            raise PlanError(f"{what} {name!r} has the name of {seen[name]}; names must differ")
        seen[name] = f"{what} {name!r}"


def _check_switches(plan: Plan) -> None:
    seen: set[tuple[str, str]] = set()
    for trunk in plan.trunks:
        where = f"the trunk {' - '.join(trunk)}"
        if trunk[0] == trunk[1]:
            raise PlanError(f"{where} leads from a switch to itself")
        if (min(trunk), max(trunk)) in seen:
            raise PlanError(f"{where} is there twice; two switches have one trunk between them")
        seen.add((min(trunk), max(trunk)))
    nodes: tuple[Host | Client, ...] = (*plan.hosts, *plan.clients)
    for node in nodes:
        if node.switch not in plan.switches:
            where, known = f"{type(node).__name__} {node.name!r}", ", ".join(plan.switches)
            raise PlanError(f"{where} is at an unknown switch {node.switch!r}; known are {known}")
    ends = [(node.switch, node.name) for node in nodes]
    ends += [(here, there) for trunk in plan.trunks for here, there in (trunk, trunk[::-1])]
    for switch, node_name in ends:
        if len(name := port_name(switch, node_name)) > _MAX_DEVICE:
            raise PlanError(f"port {name!r}: longer than {_MAX_DEVICE} characters; give the switch a shorter name")
    reached, trunks = {plan.switch}, set(plan.trunks)
    while near := [trunk for trunk in trunks if reached & set(trunk)]:
        reached |= {name for trunk in near for name in trunk}
        trunks -= set(near)
    if apart := [name for name in plan.switches if name not in reached]:
        raise PlanError(f"switch {apart[0]!r} is not connected to {plan.switch!r}; add a trunk")


def _names(plan: Plan) -> Iterator[tuple[str, str]]:
    yield from (("switch", name) for name in plan.switches)
    yield from (("host", h.name) for h in plan.hosts)
    yield from (("client", c.name) for c in plan.clients)
    if plan.nas:
        yield "NAS", plan.nas.name
    yield from (("VM", v.name) for v in plan.vms)


def _check_addresses(plan: Plan) -> None:
    try:
        segment = IPv4Network(plan.management)
    except ValueError as error:
        raise PlanError(f"management {plan.management!r} is no IPv4 network; write it like 10.0.99.0/24") from error
    if segment.num_addresses < len(plan.hosts) + 3 + bool(plan.nas):  # the manager, the network, the broadcast
        raise PlanError(f"management {segment} is too small for the manager and {len(plan.hosts)} hosts; take a /24")
    if plan.nas:
        _check_management(plan.nas.management, f"NAS {plan.nas.name!r}", segment)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,41}", plan.nas.datastore):
            is_none = "a name of letters, digits, - and _, 42 at most"
            raise PlanError(f"NAS {plan.nas.name!r}: datastore {plan.nas.datastore!r} is not {is_none}")
    for host in plan.hosts:
        _check_management(host.management, f"host {host.name!r}", segment)
        for port in host.vmkernel_ports:
            _check_netmask(host, port)
    things: tuple[Client | VM, ...] = (*plan.clients, *plan.vms)
    for thing in things:
        _check_addresses_of(thing)


def _check_addresses_of(thing: Client | VM) -> None:
    where = f"{type(thing).__name__} {thing.name!r}"
    if "/" not in thing.ip:
        raise PlanError(f"{where}: ip {thing.ip!r} lacks its prefix; write it like 10.0.0.11/24")
    try:
        IPv4Interface(thing.ip)
    except ValueError as error:
        raise PlanError(f"{where}: ip {thing.ip!r} is no IPv4 address with prefix") from error
    if thing.ip6:
        _check_ip6(thing.ip6, where)
    if not _MAC.fullmatch(thing.mac):
        raise PlanError(f"{where}: mac {thing.mac!r} is none; write it like 00:50:56:00:00:01, in lower case")
    if int(thing.mac[:2], 16) & 1:
        raise PlanError(f"{where}: mac {thing.mac} is a group address; a machine has a unicast one")


def _check_management(text: str, where: str, segment: IPv4Network) -> None:
    address = _address(text, f"{where}, management")
    if address not in segment:
        raise PlanError(f"{where}: {address} is outside the management network {segment}")
    if address in (segment.network_address, segment.broadcast_address):
        raise PlanError(f"{where}: {address} is the network or broadcast address of {segment}")


def _check_ip6(text: str, where: str) -> None:
    if "/" not in text:
        raise PlanError(f"{where}: ip6 {text!r} lacks its prefix; write it like fd00::11/64")
    try:
        ip = IPv6Interface(text).ip
    except ValueError as error:
        raise PlanError(f"{where}: ip6 {text!r} is no IPv6 address with prefix") from error
    if ip.is_multicast or ip.is_link_local or ip.is_loopback or ip.is_unspecified or ip.ipv4_mapped or "%" in text:
        raise PlanError(f"{where}: ip6 {text!r} is none by which others reach a machine; write it like fd00::11/64")


def _address(text: str, where: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except AddressValueError as error:
        raise PlanError(f"{where}: {text!r} is no IPv4 address") from error


def _check_netmask(host: Host, port: VMkernelPort) -> None:
    where = f"host {host.name!r}, VMkernel port {port.name!r}"
    _address(port.ip, f"{where}, ip")
    if port.netmask.count(".") != 3:
        # the article prints its second mask so; Python's ipaddress would name no reason
        raise PlanError(f"{where}: netmask {port.netmask!r} has no four parts; for a /30 write 255.255.255.252")
    try:
        network = IPv4Network(f"0.0.0.0/{port.netmask}")
    except (NetmaskValueError, ValueError) as error:
        raise PlanError(f"{where}: {port.netmask!r} is no netmask; for a /30 write 255.255.255.252") from error
    if str(network.netmask) != port.netmask:  # ipaddress also accepts inverted (wildcard) masks
        raise PlanError(f"{where}: {port.netmask!r} is a wildcard, no netmask; write {network.netmask}")
    if port.interface.ip in (port.interface.network.network_address, port.interface.network.broadcast_address):
        raise PlanError(f"{where}: {port.ip} is the network or broadcast address of {port.interface.network}")


def _check_vm_network(plan: Plan) -> None:
    """Clients and VMs reach each other without a router: one subnet, each an address of its own in it."""
    things: tuple[Client | VM, ...] = (*plan.clients, *plan.vms)
    for thing in things:
        where, network = f"{type(thing).__name__} {thing.name!r}", thing.interface.network
        if thing.interface.ip in (network.network_address, network.broadcast_address):
            raise PlanError(f"{where}: {thing.interface.ip} is the network or broadcast address of {network}")
        if network != things[0].interface.network:
            first = f"{type(things[0]).__name__} {things[0].name!r} ({things[0].interface.network})"
            raise PlanError(f"{where} ({network}) is in another subnet than {first}; the VM network is one")
    with_ip6 = [(thing, thing.interface6) for thing in things if thing.interface6]
    for thing, interface6 in with_ip6:
        where, network6 = f"{type(thing).__name__} {thing.name!r}", interface6.network
        if interface6.ip == network6.network_address:
            raise PlanError(f"{where}: {interface6.ip} is the router address of {network6} (RFC 4291); take another")
        first_thing, first6 = with_ip6[0]
        if network6 != first6.network:
            first = f"{type(first_thing).__name__} {first_thing.name!r} ({first6.network})"
            raise PlanError(f"{where} ({network6}) is in another subnet than {first}; the VM network is one")


def _check_unique(plan: Plan) -> None:
    ips = [(plan.manager_ip, "the manager")]
    ips += [(h.management, f"host {h.name!r}") for h in plan.hosts]
    ips += [(plan.nas.management, f"NAS {plan.nas.name!r}")] if plan.nas else []
    ips += [(p.ip, f"host {h.name!r}, {p.name}") for h in plan.hosts for p in h.vmkernel_ports]
    ips += [(str(c.interface.ip), f"client {c.name!r}") for c in plan.clients]
    ips += [(str(v.interface.ip), f"VM {v.name!r}") for v in plan.vms]
    ips += [(str(c.interface6.ip), f"client {c.name!r}") for c in plan.clients if c.interface6]
    ips += [(str(v.interface6.ip), f"VM {v.name!r}") for v in plan.vms if v.interface6]
    macs = [(c.mac, f"client {c.name!r}") for c in plan.clients] + [(v.mac, f"VM {v.name!r}") for v in plan.vms]
    for kind, pairs in (("IP address", ips), ("MAC", macs)):
        owners: dict[str, str] = {}
        for address, owner in pairs:
            if address in owners:
                raise PlanError(f"{owner} has the {kind} {address} of {owners[address]}; give it its own")
            owners[address] = owner


def _check_hosts(plan: Plan) -> None:
    for host in plan.hosts:
        groups = [group for vswitch in host.vswitches for group in vswitch.port_groups]
        for group in groups:
            if groups.count(group) > 1:
                raise PlanError(f"host {host.name!r}: two vSwitches offer the port group {group!r}")
        for port in host.vmkernel_ports:
            if port.port_group not in groups:
                where = f"host {host.name!r}, VMkernel port {port.name!r}"
                raise PlanError(f"{where}: no vSwitch offers the port group {port.port_group!r}")
        for vswitch in host.vswitches:
            if vswitch.uplink not in _UPLINKS:
                known = ", ".join(f"{uplink} ({to})" for uplink, to in _UPLINKS.items())
                raise PlanError(
                    f"host {host.name!r}: {vswitch.name!r} has the uplink {vswitch.uplink!r}; it has {known}"
                )
        devices = [v.name for v in host.vswitches] + [v.uplink for v in host.vswitches]
        devices += [p.name for p in host.vmkernel_ports] + ["vmnic2"]
        for device in devices:
            if devices.count(device) > 1:
                raise PlanError(f"host {host.name!r}: {device!r} is used twice")
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]{0,8}", device) or len(f"{host.name}-{device}") > _MAX_DEVICE:
                raise PlanError(
                    f"host {host.name!r}: {device!r} is no device name: a letter, up to 8 letters or digits"
                )


def _check_vmotion(plan: Plan) -> None:
    networks: dict[str, IPv4Network] = {}
    for host in plan.hosts:
        ports = [port for port in host.vmkernel_ports if port.vmotion]
        if len(ports) != 1:
            raise PlanError(f"host {host.name!r} has {len(ports)} VMkernel ports for vMotion; enable it on one")
        networks[host.name] = ports[0].interface.network
    first = plan.hosts[0].name
    for name, network in networks.items():
        if network != networks[first]:
            raise PlanError(
                f"the vMotion addresses of {first!r} ({networks[first]}) and {name!r} "
                f"({network}) are in different subnets; they must share one"
            )


def _check_vms(plan: Plan) -> None:
    if not plan.clients or not plan.vms:
        raise PlanError("the plan needs at least one client and one VM")
    hosts = [host.name for host in plan.hosts]
    for vm in plan.vms:
        if vm.host not in hosts:
            raise PlanError(f"VM {vm.name!r} is on an unknown host {vm.host!r}; known are {', '.join(hosts)}")
        for host in plan.hosts:
            check_vm(vm, host)


def check_vm(vm: VM, host: Host) -> None:
    """PlanError if this host cannot run such a VM, wherever its description comes from."""
    if not _NAME.fullmatch(vm.name):
        raise PlanError(f"VM {vm.name!r}: a name is a lower-case letter and up to 7 letters or digits")
    _check_addresses_of(vm)
    if not any(vm.port_group in v.port_groups for v in host.vswitches):
        raise PlanError(f"VM {vm.name!r}: host {host.name!r} has no port group {vm.port_group!r}")
    if not MIN_RAM_BYTES <= vm.ram <= _MAX_BYTES or vm.ram % _PAGE:
        raise PlanError(f"VM {vm.name!r}: RAM of {vm.ram} bytes; it takes 16MiB to 16384GiB, in whole 4 KiB pages")
    if not 0 <= vm.fill <= 1:
        raise PlanError(f"VM {vm.name!r}: fill of {vm.fill:.0%}; it must be 0% to 100%")
    if not 0 <= vm.compressible <= 1:
        raise PlanError(f"VM {vm.name!r}: compressible by {vm.compressible:.0%}; it must be 0% to 100%")
    if not MIN_DISK_BYTES <= vm.disk <= _MAX_BYTES or vm.disk % 512:
        raise PlanError(f"VM {vm.name!r}: a disk of {vm.disk} bytes; it takes 1MiB to 16384GiB, in whole sectors")
    if not vm.bulk_rate:
        raise PlanError(f"VM {vm.name!r}: the bulk stream cannot be unshaped; write a rate like 10Mbit")
    if not _PAGE <= vm.working_set <= vm.ram:
        size, ram = format_size(vm.working_set), format_size(vm.ram)
        limits = f"it must be at most its RAM, here {ram}, and a page at least; choose another (--working-set)"
        raise PlanError(f"VM {vm.name!r}: working set of {size}; {limits}")


_CHECKS = (
    _check_names,
    _check_switches,
    _check_addresses,
    _check_vm_network,
    _check_unique,
    _check_hosts,
    _check_vmotion,
    _check_vms,
)
