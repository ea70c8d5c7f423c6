"""Plans: every refusal by name, on a plan file as a person would write it; then any damage to that file."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topologies.plan import DEFAULT_PLAN, Plan, PlanError, check_vm, read_plan, validate

PLAN = """\
switch = "s1"
management = "10.0.99.0/24"
link = "1Gbit"

[[hosts]]
name = "esx1"
management = "10.0.99.11"
vswitches = [
  { name = "vSwitch0", uplink = "vmnic0", port_groups = ["VM Network"] },
  { name = "vSwitch1", uplink = "vmnic1", port_groups = ["vMotion"] },
]
vmkernel_ports = [
  { name = "vmk1", port_group = "vMotion", ip = "50.50.50.1", netmask = "255.255.255.252", vmotion = true },
]

[[hosts]]
name = "esx2"
management = "10.0.99.12"
vswitches = [
  { name = "vSwitch0", uplink = "vmnic0", port_groups = ["VM Network"] },
  { name = "vSwitch1", uplink = "vmnic1", port_groups = ["vMotion"] },
]
vmkernel_ports = [
  { name = "vmk1", port_group = "vMotion", ip = "50.50.50.2", netmask = "255.255.255.252", vmotion = true },
]

[[clients]]
name = "c1"
ip = "10.0.0.100/24"
mac = "00:50:56:00:01:64"

[[vms]]
name = "vm1"
host = "esx1"
ip = "10.0.0.11/24"
mac = "00:50:56:00:00:01"
ram = "512MiB"
working_set = "64MiB"
"""
SECOND_VM = """
[[vms]]
name = "vm2"
host = "esx2"
ip = "10.0.0.12/24"
mac = "00:50:56:00:00:02"
"""
PORT_1 = 'ip = "50.50.50.1", netmask = "255.255.255.252", vmotion = true },'
PORT_2 = PORT_1.replace("50.1", "50.2")
VMK0 = '\n  { name = "vmk0", port_group = "vMotion", ip = "50.50.51.1", netmask = "255.255.255.0" },'
THIRD_HOST = """
[[hosts]]
name = "esx3"
management = "10.0.99.13"
vswitches = []
vmkernel_ports = []
"""


def read(folder: Path, text: str) -> Plan:
    file = folder / "plan.toml"
    file.write_text(text, encoding="utf-8")
    return read_plan(file)


def refused(error: PlanError, *named: str) -> None:
    """One line for a person, exit status 2, and everything named that has to be."""
    message = str(error)
    assert "\n" not in message
    assert error.exit_status == 2
    for words in named:
        assert words in message


# ---------------------------------------------------------------- what is accepted


def test_the_default_plan_is_valid() -> None:
    plan = read_plan()
    assert validate(plan) == plan
    assert DEFAULT_PLAN.name == "two_hosts.toml"
    assert [host.name for host in plan.hosts] == ["esx1", "esx2"]
    assert plan.vm("vm1").mac == "00:50:56:00:00:01"


def test_a_plan_file_becomes_the_data_it_describes(tmp_path: Path) -> None:
    plan = read(tmp_path, PLAN + SECOND_VM)
    assert (plan.switch, plan.management, plan.link, plan.manager_ip) == ("s1", "10.0.99.0/24", 10**9, "10.0.99.1")
    host = plan.host("esx1")
    assert [vswitch.uplink for vswitch in host.vswitches] == ["vmnic0", "vmnic1"]
    assert host.vswitch_of("vMotion").name == "vSwitch1"
    assert str(host.vmotion_port.interface) == "50.50.50.1/30"
    vm = plan.vm("vm1")
    assert (vm.host, str(vm.interface.ip), vm.ram, vm.working_set) == ("esx1", "10.0.0.11", 512 * 2**20, 64 * 2**20)
    assert plan.vm("vm2").port_group == "VM Network", "the default"
    assert str(plan.client("c1").interface) == "10.0.0.100/24"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('link = "1Gbit"', 'link = "unshaped"'),
        ("255.255.255.252", "255.255.255.0"),
        (PORT_1, PORT_1 + VMK0),
        ("512MiB", "128MiB"),
        ("64MiB", "512MiB"),
        ("64MiB", "4KiB"),
        ('ram = "512MiB"', 'fill = "100%"\ndirty_rate = "0B/s"\nbulk_rate = "1Mbit"\nport_group = "VM Network"'),
        ('ram = "512MiB"', 'compressible = "100%"'),
        ('name = "vm1"', 'name = "a2345678"'),
    ],
)
def test_a_plan_within_its_limits_is_accepted(tmp_path: Path, old: str, new: str) -> None:
    assert old in PLAN
    assert read(tmp_path, PLAN.replace(old, new)).vms


# ---------------------------------------------------------------- what is refused

# old text, new text, what the message names
TRUNKS = 'link = "1Gbit"'
REFUSALS = {
    # keys
    "an unknown key": ('switch = "s1"', 'switch = "s1"\nspeed = 3', ["the plan", "unknown key 'speed'", "known are"]),
    "an unknown key of a host": ('name = "esx1"', 'name = "esx1"\nram = "1GiB"', ["Host 'esx1'", "'ram'"]),
    "an unknown key of a vSwitch": ('"vSwitch0",', '"vSwitch0", mtu = 9000,', ["VSwitch 'vSwitch0'", "'mtu'"]),
    "an unknown key of a VMkernel port": ("vmotion = true", "vMotion = true", ["VMkernelPort 'vmk1'", "'vMotion'"]),
    "an unknown key of a client": ("[[clients]]", '[[clients]]\nram = "1GiB"', ["Client 'c1'", "'ram'"]),
    "an unknown key of a VM": ('host = "esx1"', 'hots = "esx1"', ["VM 'vm1'", "unknown key 'hots'"]),
    "a missing key": ('link = "1Gbit"\n', "", ["the plan", "lacks the key 'link'"]),
    "a missing key of a host": ('management = "10.0.99.12"\n', "", ["Host 'esx2'", "lacks the key 'management'"]),
    "a missing key of a vSwitch": (', uplink = "vmnic1"', "", ["VSwitch 'vSwitch1'", "lacks the key 'uplink'"]),
    "a missing key of a VM": ('mac = "00:50:56:00:00:01"\n', "", ["VM 'vm1'", "lacks the key 'mac'"]),
    "a missing name": ('name = "vm1"\n', "", ["'vms'[0]", "lacks the key 'name'"]),
    # types
    "a number where text is due": ('switch = "s1"', "switch = 1", ["the plan, key 'switch'", "must be a str, not 1"]),
    "text where a list is due": ('["VM Network"]', '"VM Network"', ["VSwitch 'vSwitch0', key 'port_groups'", "a list"]),
    "a number in a list of texts": ('["VM Network"]', '["VM Network", 7]', ["'port_groups'[1]", "be a str, not 7"]),
    "a number where a yes is due": ("vmotion = true", "vmotion = 1", ["VMkernelPort 'vmk1'", "must be a bool, not 1"]),
    "a table where text is due": ('host = "esx1"', "host = { name = 1 }", ["VM 'vm1', key 'host'", "must be a str"]),
    "a list of no tables": ("vmkernel_ports = [", "vmkernel_ports = [ 5,", ["'vmkernel_ports'[0]", "must be a table"]),
    "one table where a list is due": ("[[clients]]", "[clients]", ["key 'clients'", "must be a list"]),
    "a date": ('management = "10.0.99.11"', "management = 1999-12-31", ["Host 'esx1', key 'management'"]),
    # quantities
    "RAM without a unit": ('"512MiB"', "512", ["VM 'vm1', key 'ram'", "512 has no unit"]),
    "RAM as text without a unit": ('"512MiB"', '"512"', ["VM 'vm1', key 'ram'", "'512' has no unit", "512MiB"]),
    "RAM of 0": ('"512MiB"', '"0MiB"', ["VM 'vm1'", "RAM of 0 bytes", "16MiB to 16384GiB"]),
    "too little RAM": ('"512MiB"', '"15MiB"', ["VM 'vm1'", "RAM of 15728640 bytes", "16MiB to 16384GiB"]),
    "too much RAM": ('"512MiB"', '"32768GiB"', ["VM 'vm1'", "RAM of 35184372088832 bytes", "16MiB to 16384GiB"]),
    "RAM in no whole pages": ('"512MiB"', '"600000001B"', ["VM 'vm1'", "RAM of 600000001 bytes", "whole 4 KiB pages"]),
    "negative RAM": ('"512MiB"', '"-512MiB"', ["VM 'vm1', key 'ram'", "'-512MiB' is no quantity"]),
    "a working set too large": ('"64MiB"', '"513MiB"', ["VM 'vm1'", "working set of 513 MiB", "at most its RAM"]),
    "a working set of 0": ('"64MiB"', '"0MiB"', ["VM 'vm1'", "working set of 0 B", "a page at least"]),
    "a disk without a unit": ('ram = "512MiB"', 'ram = "512MiB"\ndisk = 64', ["'vm1', key 'disk'", "64 has no unit"]),
    "too small a disk": ('ram = "512MiB"', 'ram = "512MiB"\ndisk = "1023KiB"', ["VM 'vm1'", "a disk of 1047552 bytes"]),
    "a disk in no whole sectors": (
        'ram = "512MiB"',
        'ram = "512MiB"\ndisk = "2000001B"',
        ["VM 'vm1'", "a disk of 2000001 bytes", "whole sectors"],
    ),
    "a fill beyond the whole": ('ram = "512MiB"', 'ram = "512MiB"\nfill = "101%"', ["VM 'vm1', key 'fill'", "'101%'"]),
    "more to pack than the whole": (
        'ram = "512MiB"',
        'ram = "512MiB"\ncompressible = "101%"',
        ["VM 'vm1', key 'compressible'", "'101%'"],
    ),
    "a link without a unit": ('"1Gbit"', '"1000"', ["the plan, key 'link'", "'1000' has no unit", "1Gbit"]),
    "a link with an unknown unit": ('"1Gbit"', '"1Gb"', ["the plan, key 'link'", "unknown unit 'Gb'"]),
    # names
    "a name with a capital": ('name = "vm1"', 'name = "VM1"', ["VM 'VM1'", "lower-case letter"]),
    "a name too long": ('name = "vm1"', 'name = "vm1234567"', ["VM 'vm1234567'", "up to 7 letters or digits"]),
    "a name of nothing": ('name = "c1"', 'name = ""', ["client ''", "lower-case letter"]),
    "a name of two lines": ('name = "vm1"', 'name = "vm\\n1"', ["VM 'vm\\n1'", "lower-case letter"]),
    "a path for a name": ('name = "vm1"', 'name = "../vm1"', ["VM '../vm1'"]),
    "two hosts of one name": ('name = "esx2"', 'name = "esx1"', ["host 'esx1'", "names must differ"]),
    "a VM with a host's name": ('name = "vm1"', 'name = "esx2"', ["VM 'esx2'", "the name of host 'esx2'"]),
    "a client with the switch's name": ('name = "c1"', 'name = "s1"', ["client 's1'", "the name of switch 's1'"]),
    "the management segment's name": ('switch = "s1"', 'switch = "mgmt"', ["switch 'mgmt'", "the management segment"]),
    # addresses
    "no management network": ('"10.0.99.0/24"', '"10.0.99/24"', ["management '10.0.99/24'", "write it like"]),
    "a management network with host bits": ('"10.0.99.0/24"', '"10.0.99.1/24"', ["management '10.0.99.1/24'"]),
    "a management address elsewhere": ('"10.0.99.12"', '"10.0.98.12"', ["host 'esx2'", "10.0.98.12 is outside"]),
    "a management address that is none": ('"10.0.99.12"', '"10.0.99.256"', ["host 'esx2'", "'10.0.99.256'"]),
    "an IPv6 management address": ('"10.0.99.12"', '"fe80::1"', ["host 'esx2'", "'fe80::1'"]),
    "a VM's address without its prefix": ('"10.0.0.11/24"', '"10.0.0.11"', ["VM 'vm1'", "lacks its prefix"]),
    "a VM's address that is none": ('"10.0.0.11/24"', '"10.0.0.011/24"', ["VM 'vm1'", "'10.0.0.011/24'"]),
    "a client's prefix that is none": ('"10.0.0.100/24"', '"10.0.0.100/33"', ["Client 'c1'", "'10.0.0.100/33'"]),
    "a MAC that is none": ("00:50:56:00:00:01", "00:50:56:00:00", ["VM 'vm1'", "'00:50:56:00:00'"]),
    "an upper-case MAC": ("00:50:56:00:01:64", "00:50:56:00:01:AB", ["Client 'c1'", "00:50:56:00:01:AB", "lower case"]),
    "a MAC with dashes": ("00:50:56:00:00:01", "00-50-56-00-00-01", ["VM 'vm1'", "'00-50-56-00-00-01'"]),
    "a group MAC": ("00:50:56:00:00:01", "01:50:56:00:00:01", ["VM 'vm1'", "01:50:56:00:00:01 is a group address"]),
    "the broadcast MAC": ("00:50:56:00:01:64", "ff:ff:ff:ff:ff:ff", ["Client 'c1'", "is a group address"]),
    "the same MAC twice": ("00:50:56:00:00:01", "00:50:56:00:01:64", ["VM 'vm1'", "the MAC", "client 'c1'"]),
    "the same IP twice": ('"10.0.0.11/24"', '"10.0.0.100/24"', ["VM 'vm1'", "IP address 10.0.0.100", "client 'c1'"]),
    "two hosts of one address": ('"10.0.99.12"', '"10.0.99.11"', ["host 'esx2'", "10.0.99.11", "host 'esx1'"]),
    "the manager's own address": ('"10.0.99.12"', '"10.0.99.1"', ["host 'esx2'", "10.0.99.1", "the manager"]),
    "two VMkernel ports of one address": ("50.50.50.2", "50.50.50.1", ["host 'esx2', vmk1", "host 'esx1', vmk1"]),
    # netmasks
    "a mask of three parts": ("255.255.255.252", "255.255.252", ["'vmk1'", "no four parts", "write 255.255.255.252"]),
    "a wildcard mask": ("255.255.255.252", "0.0.0.3", ["host 'esx1'", "'0.0.0.3' is a wildcard"]),
    "a mask with a hole": ("255.255.255.252", "255.0.255.252", ["host 'esx1'", "'255.0.255.252' is no netmask"]),
    "a mask beyond 255": ("255.255.255.252", "255.255.255.256", ["'vmk1'", "'255.255.255.256' is no netmask"]),
    "a prefix for a mask": ("255.255.255.252", "/30", ["'vmk1'", "'/30'"]),
    "a network's address": ("50.50.50.1", "50.50.50.0", ["50.50.50.0 is the network or broadcast address"]),
    "a broadcast address": ("50.50.50.2", "50.50.50.3", ["host 'esx2'", "50.50.50.3 is the network or broadcast"]),
    "a VMkernel port's address that is none": ("50.50.50.2", "50.50.50", ["host 'esx2'", "'50.50.50' is no IPv4"]),
    # hosts
    "a third host without vMotion": ("[[clients]]", THIRD_HOST + "[[clients]]", ["host 'esx3'", "0 VMkernel ports"]),
    "a trunk to itself": (TRUNKS, TRUNKS + '\ntrunks = [["s1", "s1"]]', ["s1 - s1", "itself"]),
    "a trunk of three": (TRUNKS, TRUNKS + '\ntrunks = [["s1", "s2", "s3"]]', ["trunks", "2 entries, not 3"]),
    "a trunk twice": (TRUNKS, TRUNKS + '\ntrunks = [["s1", "s2"], ["s2", "s1"]]', ["s2 - s1", "twice"]),
    "an island": (TRUNKS, TRUNKS + '\ntrunks = [["s2", "s3"]]', ["switch 's2'", "not connected to 's1'"]),
    "a switch with a host's name": (TRUNKS, TRUNKS + '\ntrunks = [["s1", "esx1"]]', ["'esx1'", "names must differ"]),
    "a host at no switch": ('name = "esx1"', 'name = "esx1"\nswitch = "s9"', ["Host 'esx1'", "'s9'", "known are s1"]),
    "a client at no switch": ('name = "c1"', 'name = "c1"\nswitch = "s9"', ["Client 'c1'", "'s9'"]),
    "a long port": (TRUNKS, TRUNKS + '\ntrunks = [["s1", "leaf2222"], ["leaf2222", "leaf3333"]]', ["2-leaf3333"]),
    "an unknown port group": ('port_group = "vMotion"', 'port_group = "vmotion"', ["port 'vmk1'", "'vmotion'"]),
    "a port group on two vSwitches": ('["VM Network"]', '["vMotion"]', ["host 'esx1'", "two vSwitches", "'vMotion'"]),
    "a port group twice": ('["vMotion"]', '["vMotion", "vMotion"]', ["host 'esx1'", "'vMotion'"]),
    "an uplink of two vSwitches": ('"vmnic1"', '"vmnic0"', ["host 'esx1'", "'vmnic0' is used twice"]),
    "the management uplink": ('"vmnic1"', '"vmnic2"', ["host 'esx1'", "'vmnic2'"]),
    "a device name too long": ('"vmnic1"', '"physical10"', ["host 'esx1'", "'physical10'", "uplink"]),
    "a device name with a space": ('"vSwitch1"', '"v Switch1"', ["host 'esx1'", "'v Switch1'"]),
    # vMotion
    "no vMotion port": (PORT_2, PORT_2.replace("true", "false"), ["host 'esx2'", "0 VMkernel ports for vMotion"]),
    "no VMkernel port": ('{ name = "vmk1", port_group = "vMotion", ' + PORT_2, "", ["'esx2'", "0 VMkernel ports"]),
    "two vMotion ports": (PORT_1, PORT_1 + VMK0.replace(" }", ", vmotion = true }"), ["host 'esx1'", "2 VMkernel"]),
    "vMotion in two subnets": ("50.50.50.2", "50.50.50.6", ["'esx1'", "50.50.50.0/30", "'esx2'", "50.50.50.4/30"]),
    "vMotion with two masks": (PORT_2, PORT_2.replace(".252", ".0"), ["50.50.50.0/30", "50.50.50.0/24", "subnets"]),
    # VMs
    "a VM on an unknown host": ('host = "esx1"', 'host = "esx9"', ["VM 'vm1'", "unknown host 'esx9'", "esx1, esx2"]),
    "a VM on a client": ('host = "esx1"', 'host = "c1"', ["VM 'vm1'", "unknown host 'c1'"]),
    "a VM's unknown port group": ('host = "esx1"', 'host = "esx1"\nport_group = "VLAN 7"', ["VM 'vm1'", "'VLAN 7'"]),
    "no VM": (PLAN[PLAN.index("[[vms]]"):], "", ["lacks the key 'vms'"]),
    "empty lists": (PLAN[PLAN.index("[[hosts]]"):], "hosts = []\nclients = []\nvms = []", ["two hosts", "names 0"]),
    # TOML
    "bad TOML": ('switch = "s1"', "switch = s1", ["no valid TOML", "line 1"]),
    "a key twice": ('switch = "s1"', 'switch = "s1"\nswitch = "s2"', ["no valid TOML"]),
    "text without an end": ('switch = "s1"', 'switch = "s1', ["no valid TOML", "line 1"]),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "named"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_plan_that_cannot_be_built_is_refused_by_name(tmp_path: Path, old: str, new: str, named: list[str]) -> None:
    assert old in PLAN
    with pytest.raises(PlanError) as refusal:
        read(tmp_path, PLAN.replace(old, new, 1))
    refused(refusal.value, str(tmp_path / "plan.toml"), *named)


def test_a_second_vm_must_differ_from_the_first(tmp_path: Path) -> None:
    for old, new, what in (
        ("vm2", "vm1", "names must differ"),
        ("10.0.0.12/24", "10.0.0.11/24", "IP address 10.0.0.11"),
        ("00:50:56:00:00:02", "00:50:56:00:00:01", "MAC 00:50:56:00:00:01"),
    ):
        with pytest.raises(PlanError) as refusal:
            read(tmp_path, PLAN + SECOND_VM.replace(old, new))
        refused(refusal.value, "'vm1'", what)


def test_a_plan_without_clients_is_refused(tmp_path: Path) -> None:
    begin, end = PLAN.index("[[clients]]"), PLAN.index("[[vms]]")
    with pytest.raises(PlanError, match="at least one client and one VM"):
        read(tmp_path, "clients = []\n" + PLAN[:begin] + PLAN[end:])


@pytest.mark.parametrize(
    ("content", "named"), [(None, "cannot read the plan"), (b'switch = "\xff"', "no valid TOML"), (b"", "'switch'")]
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: bytes | None, named: str) -> None:
    file = tmp_path / "plan.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PlanError) as refusal:
        read_plan(file)
    refused(refusal.value, str(file), named)


def test_a_folder_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as refusal:
        read_plan(tmp_path)
    refused(refusal.value, str(tmp_path), "cannot read the plan")


@pytest.mark.parametrize("ask", [Plan.host, Plan.vm, Plan.client])
def test_asking_for_what_the_plan_does_not_have_names_what_it_has(ask: Callable[[Plan, str], object]) -> None:
    plan = read_plan()
    with pytest.raises(PlanError) as refusal:
        ask(plan, "nobody")
    refused(refusal.value, "'nobody'", "esx1, esx2" if ask is Plan.host else "it has ")


# ---------------------------------------------------------------- the NAS

NAS = '[nas]\nname = "nas"\nmanagement = "10.0.99.3"\n'


def test_a_plan_may_have_a_nas_and_need_not(tmp_path: Path) -> None:
    assert read(tmp_path, PLAN).nas is None
    nas = read(tmp_path, PLAN + NAS).nas
    assert nas is not None
    assert (nas.name, nas.management, nas.export) == ("nas", "10.0.99.3", "/datastore1")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"nas"', '"esx1"', ["NAS 'esx1'", "names must differ"]),
        ("10.0.99.3", "10.0.98.3", ["NAS 'nas'", "outside the management network"]),
        ("10.0.99.3", "10.0.99.255", ["NAS 'nas'", "broadcast address"]),
        ("10.0.99.3", "10.0.99.11", ["IP address 10.0.99.11", "give it its own"]),
        ("10.0.99.3", "there", ["NAS 'nas', management", "no IPv4 address"]),
        ('name = "nas"', 'name = "nas"\ndatastore = "../etc"', ["datastore '../etc'", "42 at most"]),
        ('name = "nas"', 'name = "nas"\nsize = 3', ["unknown key 'size'"]),
        ('name = "nas"\n', "", ["lacks the key 'name'"]),
    ],
)
def test_a_nas_that_cannot_be_built_is_refused_by_name(tmp_path: Path, old: str, new: str, named: list[str]) -> None:
    assert old in NAS
    with pytest.raises(PlanError) as refusal:
        read(tmp_path, PLAN + NAS.replace(old, new, 1))
    refused(refusal.value, str(tmp_path / "plan.toml"), *named)


# ---------------------------------------------------------------- IPv6

IP6 = PLAN.replace('ip = "10.0.0.100/24"', 'ip = "10.0.0.100/24"\nip6 = "fd00::100/64"')
IP6 = IP6.replace('ip = "10.0.0.11/24"', 'ip = "10.0.0.11/24"\nip6 = "fd00::11/64"')


def test_an_ipv6_address_is_optional_for_each_machine(tmp_path: Path) -> None:
    without = read(tmp_path, PLAN)
    assert without.vm("vm1").interface6 is without.client("c1").interface6 is None
    plan = read(tmp_path, IP6 + SECOND_VM)
    assert str(plan.vm("vm1").interface6) == "fd00::11/64"
    assert str(plan.client("c1").interface6) == "fd00::100/64"
    assert plan.vm("vm2").interface6 is None


@pytest.mark.parametrize(
    ("ip6", "named"),
    [
        ("fd00::11", "'fd00::11' lacks its prefix; write it like fd00::11/64"),
        ("fd00::11/129", "is no IPv6 address with prefix"),
        ("fd00:11/64", "is no IPv6 address with prefix"),
        ("10.0.0.11/24", "is no IPv6 address with prefix"),
        ("/64", "is no IPv6 address with prefix"),
        ("ff02::1/64", "is none by which others reach a machine; write it like fd00::11/64"),
        ("fe80::11/64", "is none by which others reach a machine"),
        ("fd00::11%eth0/64", "is none by which others reach a machine"),
        ("::1/64", "is none by which others reach a machine"),
        ("::/64", "is none by which others reach a machine"),
        ("::ffff:10.0.0.11/64", "is none by which others reach a machine"),
        ("fd00::/64", "fd00:: is the router address of fd00::/64"),
        ("fd01::11/64", "(fd01::/64) is in another subnet than Client 'c1' (fd00::/64)"),
        ("fd00::11/80", "is in another subnet than Client 'c1'"),
        ("fd00::100/64", "the IP address fd00::100 of client 'c1'"),
        ("FD00:0::0100/64", "the IP address fd00::100 of client 'c1'"),
    ],
)
def test_an_ipv6_address_that_cannot_be_used_is_refused(tmp_path: Path, ip6: str, named: str) -> None:
    with pytest.raises(PlanError) as refusal:
        read(tmp_path, IP6.replace("fd00::11/64", ip6))
    refused(refusal.value, "VM 'vm1'", named)


# ---------------------------------------------------------------- another VM


def test_a_vm_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    plan = read(tmp_path, PLAN + SECOND_VM)
    small = dataclasses.replace(plan.vm("vm1"), ram=32 * 2**20, working_set=2**20)
    changed = plan.with_vm(small)
    assert changed.vm("vm1") == small
    assert dataclasses.replace(changed, vms=plan.vms) == plan
    assert changed.vm("vm2") == plan.vm("vm2")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ram": 0}, "RAM of 0 bytes"),
        ({"ram": 2**26 + 1}, "whole 4 KiB pages"),
        ({"ram": 2**25}, "working set of 64 MiB"),
        ({"working_set": 0}, "working set of 0 B"),
        ({"disk": 2**20 - 512}, "a disk of 1048064 bytes"),
        ({"host": "esx3"}, "unknown host 'esx3'"),
        ({"ip": "10.0.0.100/24"}, "client 'c1'"),
        ({"mac": "01:00:5e:00:00:01"}, "group address"),
        ({"port_group": "none"}, "'none'"),
    ],
)
def test_a_replaced_vm_is_validated_again(changes: dict, named: str) -> None:
    plan = read_plan()
    with pytest.raises(PlanError) as refusal:
        plan.with_vm(dataclasses.replace(plan.vm("vm1"), **changes))
    refused(refusal.value, "'vm1'", named)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "VM 1"}, "'VM 1'"),
        ({"name": "../../etc"}, "'../../etc'"),
        ({"name": "vm1234567"}, "'vm1234567'"),
        ({"ip": "10.0.0.11"}, "lacks its prefix"),
        ({"ip": "nowhere/24"}, "no IPv4 address"),
        ({"ip6": "fe80::1/64"}, "'fe80::1/64'"),
        ({"mac": "00:50:56:00:00"}, "mac '00:50:56:00:00'"),
        ({"mac": "01:00:5e:00:00:01"}, "group address"),
        ({"port_group": "none"}, "host 'esx2' has no port group 'none'"),
        ({"ram": 2**63 - 1}, "whole 4 KiB pages"),
        ({"fill": 1.1}, "fill of 110%"),
        ({"fill": float("nan")}, "fill of nan%"),
        ({"compressible": -0.1}, "compressible by -10%"),
        ({"disk": 0}, "a disk of 0 bytes"),
        ({"bulk_rate": 0}, "unshaped"),
        ({"working_set": 2**40}, "working set of"),
    ],
)
def test_a_vm_from_elsewhere_is_looked_at_before_a_host_runs_it(changes: dict, named: str) -> None:
    """Its files may say anything."""
    plan = read_plan()
    check_vm(plan.vm("vm1"), plan.host("esx2"))
    with pytest.raises(PlanError) as refusal:
        check_vm(dataclasses.replace(plan.vm("vm1"), **changes), plan.host("esx2"))
    assert named in str(refusal.value)


# ---------------------------------------------------------------- what would fail later, far from its cause

FATAL_LATER = {
    "a wildcard's remedy": ("255.255.255.252", "0.0.0.3", "write 255.255.255.252"),
    "a VMkernel port of two lines": ('"vmk1", port_group = "vMotion"', '"vmk\\n1", port_group = "?"', "port group '?'"),
    "a working set of less than a page": ('"64MiB"', '"100B"', "working set of 100 B"),
    "an uplink that the topology does not have": ('"vmnic1"', '"vmnic7"', "'vmnic7'"),
    "a management address that is the network's": ('"10.0.99.12"', '"10.0.99.0"', "10.0.99.0"),
    "a management address that is the broadcast": ('"10.0.99.12"', '"10.0.99.255"', "10.0.99.255"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "named"), FATAL_LATER.values(), ids=FATAL_LATER.keys())
def test_a_plan_that_would_fail_later_is_refused_at_once(tmp_path: Path, old: str, new: str, named: str) -> None:
    assert old in PLAN
    with pytest.raises(PlanError) as refusal:
        read(tmp_path, PLAN.replace(old, new, 1))
    refused(refusal.value, named)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("switch = " + "[" * 5000, id="nested too deeply"),
        pytest.param("switch = " + "9" * 5000, id="a number too long"),
    ],
)
def test_toml_that_its_reader_gives_up_on_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(PlanError, match="no valid TOML"):
        read(tmp_path, text)


def test_a_management_network_of_one_address_is_refused(tmp_path: Path) -> None:
    text = re.sub(r"10\.0\.99\.(0/24|12)", "10.0.99.11", PLAN)
    with pytest.raises(PlanError, match=r"10\.0\.99\.11/32 is too small"):
        read(tmp_path, text)


@pytest.mark.parametrize("share", ["fill", "compressible"])
@pytest.mark.parametrize("value", [1.5, -0.1])
def test_no_share_of_a_replaced_vm_is_more_than_its_whole_or_less_than_nothing(share: str, value: float) -> None:
    plan = read_plan()
    with pytest.raises(PlanError, match=f"VM 'vm1': {share}"):
        plan.with_vm(dataclasses.replace(plan.vm("vm1"), **{share: value}))  # type: ignore[arg-type]


def test_a_vm_that_the_plan_does_not_have_cannot_be_replaced() -> None:
    plan = read_plan()
    with pytest.raises(PlanError, match="'vm9'"):
        plan.with_vm(dataclasses.replace(plan.vm("vm1"), name="vm9"))


# ---------------------------------------------------------------- any damage

LITERALS = (
    *("0", "1", "-1", "1.5", "nan", "true", "1979-05-27", "07:32:00", "[]", "[[]]", '["x"]', "{}", "{ name = 1 }"),
    *('""', '"x"', "'é'", '"\\u0000"', '"255.255.252"', '"0.0.0.255"', '"1MiB"', '"0B"', '"1Gbit"', '"unshaped"'),
    *('"0.0.0.0/0"', '"10.0.0.11"', '"fe80::1/64"', '"ff:ff:ff:ff:ff:ff"', '"esx2"', '"c1"', '"vMotion"', '"vmnic2"'),
)
TOKEN = re.compile(r'"[^"\n]*"|true|^\w+(?= =)|\b[a-z]\w*(?= =)|\[\[\w+\]\]', re.MULTILINE)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """The plan after a few small mistakes: a word exchanged, a line lost, doubled or moved, some letters typed over."""
    text = PLAN + SECOND_VM
    for _ in range(draw(st.integers(1, 3))):
        lines = text.splitlines(keepends=True)
        tokens = list(TOKEN.finditer(text))
        line = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["exchange", "exchange", "lose", "move", "double", "type"])):
            case "exchange" if tokens:
                token = draw(st.sampled_from(tokens))
                words = st.sampled_from(LITERALS) | st.sampled_from([t[0] for t in tokens])
                text = text[: token.start()] + draw(words) + text[token.end() :]
            case "lose":
                text = "".join(lines[:line] + lines[line + 1 :])
            case "double":
                text = "".join(lines[: line + 1] + lines[line:])
            case "move":
                moved = lines.pop(line)
                lines.insert(draw(st.integers(0, len(lines))), moved)
                text = "".join(lines)
            case _:
                at = draw(st.integers(0, len(text)))
                text = text[:at] + draw(st.text(max_size=4)) + text[at + draw(st.integers(0, 4)) :]
    return text


@settings(max_examples=400)
@given(damaged())
def test_a_damaged_plan_is_refused_or_answers_every_question(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        plan = read(folder, text)
    except PlanError as error:
        refusal = error
    else:
        assert validate(plan) == plan
        for host in plan.hosts:
            assert host.vmotion_port.interface.network
            assert all(host.vswitch_of(port.port_group) for port in host.vmkernel_ports)
            assert all(host.vswitch_of(vm.port_group) for vm in plan.vms)
        assert all(plan.host(vm.host) and vm.interface for vm in plan.vms)
        assert all(client.interface for client in plan.clients)
        assert plan.manager_ip
        return
    refused(refusal, str(folder / "plan.toml"))


@given(st.integers(0, len(PLAN) - 1), st.integers(0, 255))
def test_a_byte_of_a_plan_may_be_any_other(tmp_path_factory: pytest.TempPathFactory, at: int, byte: int) -> None:
    file = tmp_path_factory.getbasetemp() / "bytes.toml"
    content = bytearray(PLAN.encode())
    content[at] = byte
    file.write_bytes(content)
    try:
        read_plan(file)
    except PlanError as error:
        refusal = error
    else:
        return
    refused(refusal, str(file))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("10.0.0.100/24", "10.0.1.100/24", "another subnet"),
        ("10.0.0.11/24", "10.0.0.0/24", "network or broadcast"),
        ("10.0.0.11/24", "10.0.0.255/24", "network or broadcast"),
        ('bulk_rate = "10Mbit"', 'bulk_rate = "unshaped"', "cannot be unshaped"),
    ],
)
def test_a_vm_that_its_client_could_not_use_is_refused(tmp_path: Path, old: str, new: str, named: str) -> None:
    text = DEFAULT_PLAN.read_text()
    assert old in text
    with pytest.raises(PlanError, match=named):
        read(tmp_path, text.replace(old, new, 1))
