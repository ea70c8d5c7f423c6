"""What every emulated network device needs so that the emulation itself neither loses nor reorders frames."""

import os

# Receive Packet Steering: veth pairs hand frames to any CPU, and two CPUs delivering one flow reorder it
# (7k-104k spurious TCP retransmissions on a bare veth). One CPU, not the first one, does it for all devices.
RPS_CPUS = f"{1 << min(1, (os.cpu_count() or 1) - 1):x}"
# A machine without an IPv6 address of its own has no IPv6 at all.
SYSCTLS = ("net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")  # no neighbour-discovery chatter


def ip6_commands(device: str, address: str) -> tuple[list[str], list[str]]:
    """What gives a device that had no IPv6 an address, of use at once; and nothing else of IPv6's own chatter.

    No link-local address (addr_gen_mode 1), no router asked for or believed, no detection of duplicates (`nodad`).
    `lo` gets IPv6 too: what a machine sends to itself takes it. What cannot be turned off are the reports of its
    multicast groups (MLD), two within a second after the address was added.
    """
    settings = ("addr_gen_mode=1", "accept_ra=0", "autoconf=0", "router_solicitations=0", "disable_ipv6=0")
    sysctl = ["sysctl", "-q", "-w", *(f"net.ipv6.conf.{device}.{setting}" for setting in settings)]
    sysctl += ["net.ipv6.conf.lo.disable_ipv6=0"]
    return sysctl, ["ip", "addr", "add", address, "dev", device, "nodad"]


def rps_file(device: str, sysfs: str = "/sys") -> str:
    """Where the mask is written (Documentation/networking/scaling.rst); sysfs shows one network namespace."""
    return f"{sysfs}/class/net/{device}/queues/rx-0/rps_cpus"
