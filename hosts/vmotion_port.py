"""The vMotion VMkernel port of a host: migrations leave and arrive by it, over the vMotion cable.

Connections are plain, or TLS 1.3 between the hosts' certificates (--encrypt). Who calls here is told apart by
the first byte: a TLS record or the protocol's magic. A token decides about everything else.
"""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hosts.control import common_name, tls_context
from hosts.protocol import PORT, Kind, Session
from hosts.stream import Stream
from topologies.errors import TestbedError
from topologies.plan import Host, Plan

_TLS_HANDSHAKE = b"\x16"  # RFC 8446, 5.1: content type of the first record


class VmotionPortError(TestbedError):
    """No connection over the vMotion network, or not with whom it should be."""


class VmotionPort:
    """Of `host`, among the hosts of `plan`; a peer that is silent for `timeout_s` is gone.

    `entered` hears of the states of every session (hosts/protocol.py).
    """

    def __init__(
        self, host: Host, plan: Plan, certificates: Path, timeout_s: float, entered: Callable[[str, str], None]
    ) -> None:
        self._ip, self._entered, self._timeout_s = host.vmotion_port.ip, entered, timeout_s
        self._peers = {other.name for other in plan.hosts if other != host}
        self._caller = tls_context(certificates, host.name, server=False)
        self._called = tls_context(certificates, host.name, server=True)

    def connect(self, ip: str, port: int, role: str, *, encrypt: bool) -> Stream:
        """A connection from our own vMotion address, so that it takes the vMotion cable."""
        try:
            sock = socket.create_connection((ip, port), self._timeout_s, (self._ip, 0))
        except OSError as error:
            why = error.strerror or str(error)
            raise VmotionPortError(f"no vMotion connection to {ip}: {why}; check the cable") from error
        if encrypt:
            sock = self._encrypted(sock, self._caller, server_hostname=ip)
        return Stream(sock, Session(role, self._entered), self._timeout_s)

    def listen(self) -> socket.socket:
        return socket.create_server((self._ip, PORT))

    def callers(self, listener: socket.socket, log: Callable[[str], None]) -> Iterator[tuple[socket.socket, str]]:
        """Whoever calls, for ever: a socket and an address."""
        while True:
            try:
                sock, (ip, _) = listener.accept()
            except OSError as error:  # no descriptor, no memory: this caller is lost, the port is not
                log(f"vMotion port: {error}")
                time.sleep(0.1)
                continue
            yield sock, ip

    def open(self, sock: socket.socket) -> tuple[Stream, Any]:
        """A caller's stream and its first message, Hello or Join.

        Each wait for a caller is bounded, but it may send byte by byte: as long as it has shown no token, all of
        it is bounded too.
        """
        sock.settimeout(self._timeout_s)
        bound = threading.Timer(2 * self._timeout_s, lambda: _shut(sock))  # (a handshake of TLS has a bound of its own)
        bound.daemon = True
        bound.start()
        try:
            sock = self._decrypted(sock)
            stream = Stream(sock, Session("destination", self._entered), self._timeout_s)
            try:
                return stream, stream.receive_opening({Kind.JOIN: Session("receiver", self._entered)})
            except TestbedError:
                stream.abort("refused")
                stream.close()
                raise
        finally:
            bound.cancel()

    def _decrypted(self, sock: socket.socket) -> socket.socket:
        try:
            encrypted = sock.recv(1, socket.MSG_PEEK) == _TLS_HANDSHAKE
        except OSError as error:
            sock.close()
            raise VmotionPortError(f"a caller said nothing: {error}") from error
        return self._encrypted(sock, self._called, server_side=True) if encrypted else sock

    def _encrypted(self, sock: socket.socket, context: ssl.SSLContext, **how: Any) -> ssl.SSLSocket:
        try:
            safe = context.wrap_socket(sock, **how)
        except OSError as error:
            sock.close()
            raise VmotionPortError(f"no encrypted vMotion connection: {error}") from error
        if common_name(safe) not in self._peers:
            safe.close()
            raise VmotionPortError(f"{common_name(safe)!r} is no host that VMs may come from or go to")
        return safe


def _shut(sock: socket.socket) -> None:
    """Whoever waits for the caller hears of its end."""
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        return  # it has ended already
