"""The neighbour table of this network namespace: who has which address, for IPv4 (ARP) and IPv6 (NDP) alike.

    entries = known()          # [("10.0.0.100", "00:50:56:00:01:64"), ("fd00::100", "00:50:56:00:01:64")]
    learn("eth0", entries)

Over rtnetlink(7), by hand: a guest does both in its downtime, and a library's import takes a fraction of a second.
"""

import errno
import os
import socket
import struct

from topologies.errors import TestbedError

# linux/rtnetlink.h, linux/netlink.h, linux/neighbour.h
_RTM_NEWNEIGH, _RTM_GETNEIGH = 28, 30
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP, _NLM_F_CREATE, _NLM_F_REPLACE = 0x001, 0x300, 0x400, 0x100
_NDA_DST, _NDA_LLADDR = 1, 2
_NUD_STALE = 0x04
_USABLE = 0x02 | _NUD_STALE | 0x08 | 0x10 | 0x80  # reachable, delay, probe, permanent: not incomplete, not failed
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_ENTRY = struct.Struct("=BxxxiHBB")  # family, interface, state, flags, type
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_MAC_BYTES = 6


def known() -> list[tuple[str, str]]:
    """IP and MAC of every neighbour that could be sent to without asking for it first."""
    with _netlink() as netlink:
        netlink.send(_message(_RTM_GETNEIGH, _NLM_F_DUMP, _ENTRY.pack(socket.AF_UNSPEC, 0, 0, 0, 0)))
        entries: list[tuple[str, str]] = []
        while True:
            for kind, body in _messages(netlink.recv(1 << 16)):
                if kind == _NLMSG_DONE:
                    return entries
                if kind == _NLMSG_ERROR:
                    raise _refusal("read", body)
                entries += _entry(body)


def learn(device: str, entries: list[tuple[str, str]]) -> None:
    """Enter neighbours, as STALE: each is used at once, and verified by the kernel while it is in use."""
    index = socket.if_nametoindex(device)
    requests = b""
    for ip, mac in entries:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        body = _ENTRY.pack(family, index, _NUD_STALE, 0, 0)
        body += _attribute(_NDA_DST, socket.inet_pton(family, ip))
        body += _attribute(_NDA_LLADDR, bytes.fromhex(mac.replace(":", "")))
        requests += _message(_RTM_NEWNEIGH, _NLM_F_CREATE | _NLM_F_REPLACE, body)
    if not requests:
        return
    with _netlink() as netlink:
        netlink.send(requests)  # carried out when this returns; only a refusal is answered
        try:
            answer = netlink.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        raise _refusal("entered", next(body for _, body in _messages(answer)))


def _netlink() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | flags, 0, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value.ljust(_aligned(len(value)), b"\0")


def _messages(data: bytes) -> list[tuple[int, bytes]]:
    """(type, body) of each netlink message in a datagram."""
    messages, at = [], 0
    while at < len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        messages.append((kind, data[at + _HEADER.size : at + length]))
        at += _aligned(length)
    return messages


def _entry(body: bytes) -> list[tuple[str, str]]:
    """The neighbour in a message, if it is a usable one on an Ethernet."""
    family, _, state, _, _ = _ENTRY.unpack_from(body)
    if not state & _USABLE or family not in (socket.AF_INET, socket.AF_INET6):
        return []
    values, at = {}, _ENTRY.size
    while at < len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        values[kind] = body[at + _ATTRIBUTE.size : at + length]
        at += _aligned(length)
    mac = values.get(_NDA_LLADDR, b"")
    if len(mac) != _MAC_BYTES or not any(mac):  # `lo` has zeros
        return []
    return [(socket.inet_ntop(family, values[_NDA_DST]), mac.hex(":"))]


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _refusal(what: str, error: bytes) -> TestbedError:
    code = -struct.unpack_from("=i", error)[0]
    name = errno.errorcode.get(code, str(code))
    return TestbedError(f"neighbours could not be {what}: {os.strerror(code)} ({name})")
