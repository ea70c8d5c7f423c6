"""A leaf-spine fabric with any number of hosts: each leaf has a trunk to each spine.

         spine1      spine2              two ways between any two leaves: no tree could use both,
         |  |  \\    /  | |               the controller (controller/network.py) does
         |  |    \\/    | |
         |  |    /\\    | |
         leaf1 --  -- leaf2
         /  \\          /  \\
      esx1  esx3    esx2  esx4   c1      hosts take turns; the client is at the last leaf

    python -m topologies.leaf_spine --hosts 4 --leaves 2 --spines 2 > my_plan.toml      # then: --plan my_plan.toml

All hosts share one vMotion subnet, the smallest that fits: a /30 for two, which is a cable then, a segment for more.
"""

import argparse
import sys
import tomllib
from ipaddress import IPv4Network

from topologies.errors import UsageError
from topologies.plan import Plan, PlanError, plan_of

_VMOTION = "50.50.50.0"
MAX_HOSTS = 80  # of the addresses and names below


def vmotion_network(hosts: int) -> IPv4Network:
    """The smallest subnet with an address for each: /30 for two, /29 for up to six, ..."""
    prefix = 32 - (hosts + 1).bit_length()  # two addresses are no host's
    return IPv4Network(f"{_VMOTION}/{min(prefix, 30)}")


def leaf_spine_toml(hosts: int = 4, leaves: int = 2, spines: int = 2) -> str:
    """A plan file. PlanError if there cannot be such a fabric."""
    for what, number, lowest, highest in (
        ("hosts", hosts, 2, MAX_HOSTS),
        ("leaves", leaves, 1, 9),
        ("spines", spines, 1, 9),
    ):
        if not lowest <= number <= highest:
            raise PlanError(f"{number} {what}: a fabric has {lowest} to {highest}")
    network = vmotion_network(hosts)
    trunks = [[f"leaf{leaf}", f"spine{spine}"] for leaf in range(1, leaves + 1) for spine in range(1, spines + 1)]
    parts = [f"# A leaf-spine fabric: {hosts} hosts, {leaves} leaves, {spines} spines."]
    parts.append(f'switch = "leaf1"\nmanagement = "10.0.99.0/24"\nlink = "1Gbit"\ntrunks = {trunks}'.replace("'", '"'))
    for number in range(1, hosts + 1):
        parts.append(
            _HOST.format(
                number=number,
                leaf=(number - 1) % leaves + 1,
                management=10 + number,
                vmotion=network[number],
                netmask=network.netmask,
            )
        )
    return "\n\n".join([*parts, _REST.format(leaf=leaves)])


_HOST = """\
[[hosts]]
name = "esx{number}"
switch = "leaf{leaf}"
management = "10.0.99.{management}"
vswitches = [
  {{ name = "vSwitch0", uplink = "vmnic0", port_groups = ["VM Network"] }},
  {{ name = "vSwitch1", uplink = "vmnic1", port_groups = ["vMotion"] }},
]
vmkernel_ports = [
  {{ name = "vmk1", port_group = "vMotion", ip = "{vmotion}", netmask = "{netmask}", vmotion = true }},
]"""

_REST = """\
[nas]
name = "nas"
management = "10.0.99.3"
datastore = "datastore1"

[[clients]]
name = "c1"
switch = "leaf{leaf}"
ip = "10.0.0.100/24"
ip6 = "fd00::100/64"
mac = "00:50:56:00:01:64"

[[vms]]
name = "vm1"
host = "esx1"
ip = "10.0.0.11/24"
ip6 = "fd00::11/64"
mac = "00:50:56:00:00:01"
port_group = "VM Network"
ram = "512MiB"
fill = "75%"
dirty_rate = "50MB/s"
working_set = "64MiB"
bulk_rate = "10Mbit"
disk = "64MiB"
"""


def leaf_spine(hosts: int = 4, leaves: int = 2, spines: int = 2) -> Plan:
    return plan_of(tomllib.loads(leaf_spine_toml(hosts, leaves, spines)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m topologies.leaf_spine", description="Prints a leaf-spine plan.")
    for what, number in (("hosts", 4), ("leaves", 2), ("spines", 2)):
        parser.add_argument(f"--{what}", type=int, default=number, help="default %(default)s")
    options = parser.parse_args()
    try:
        print(leaf_spine_toml(options.hosts, options.leaves, options.spines))
    except UsageError as error:
        print(f"fabric: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
