"""What every emulated network device needs so that the emulation itself neither loses nor reorders frames."""

import os

# Receive Packet Steering: veth pairs hand frames to any CPU, and two CPUs delivering one flow reorder it
# (7k-104k spurious TCP retransmissions on a bare veth). One CPU, not the first one, does it for all devices.
RPS_CPUS = f"{1 << min(1, (os.cpu_count() or 1) - 1):x}"
SYSCTLS = ("net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")  # no neighbour-discovery chatter


def rps_file(device: str, sysfs: str = "/sys") -> str:
    """Where the mask is written (Documentation/networking/scaling.rst); sysfs shows one network namespace."""
    return f"{sysfs}/class/net/{device}/queues/rx-0/rps_cpus"
