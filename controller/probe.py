"""Asking whether a machine is where it was: an ARP probe (RFC 5227), whose answer comes to the controller. Pure."""

from ipaddress import IPv4Address

from controller.openflow import ETHERTYPE_ARP, PROBER


def arp_probe(ip: str) -> bytes:
    """Who has `ip`? 60 bytes. With the sender's IP 0.0.0.0 it changes nobody's neighbour table."""
    me = bytes.fromhex(PROBER.replace(":", ""))
    arp = bytes.fromhex("0001080006040001") + me + bytes(4) + bytes(6) + IPv4Address(ip).packed
    return (b"\xff" * 6 + me + ETHERTYPE_ARP.to_bytes(2, "big") + arp).ljust(60, b"\0")
