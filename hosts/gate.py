"""The gate of a VM: its port on a vSwitch opens and shuts by netlink messages that were made beforehand.

They are bytes, so that the VM's vmx (hosts/vmx_process.py) can have them, too; hosts/vswitch.py makes them.
"""

import errno
import os
import socket
import struct

import msgspec

from topologies.errors import TestbedError

_NLMSG_HEADER_BYTES = 16


class VSwitchError(TestbedError):
    """The kernel refused a change to a vSwitch."""


class Messages(msgspec.Struct, frozen=True):
    """The port's states in the bridge, and the bridge's static entry of the VM's MAC."""

    listening: bytes
    forwarding: bytes
    known: bytes
    forgotten: bytes


class Gate:
    """Opens and shuts the port of a VM."""

    def __init__(self, vm: str, messages: Messages) -> None:
        self.messages, self._vm = messages, vm
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)

    def open(self) -> None:
        self._do(self.messages.forwarding)
        self._do(self.messages.known)

    def shut(self) -> None:
        self.darken()
        self._do(self.messages.forgotten, unless=errno.ENOENT)

    def darken(self) -> None:
        """Shut one that has never been open."""
        self._do(self.messages.listening)

    def close(self) -> None:
        self._socket.close()

    def _do(self, message: bytes, unless: int = 0) -> None:
        """Let the kernel carry it out; the error `unless` means that it was so before."""
        self._socket.send(message)
        (code,) = struct.unpack_from("i", self._socket.recv(4096), _NLMSG_HEADER_BYTES)  # struct nlmsgerr
        if code and -code != unless:
            raise VSwitchError(f"VM {self._vm}: its port cannot be changed: {os.strerror(-code)}")
