"""A throw-away VM in one process: UDP echo, ledger and bulk stream on their ports. SIGUSR1 resets its connections.

    python tests/small_vm.py IP [LIE]      writes "up" when it listens

The lies: `lose` alters a record that it has acknowledged, `double` applies a transfer twice, `corrupt` sends a
wrong byte in the bulk stream.
"""

import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

from hosts import bulk, ledger

LIE_AT_SEQUENCE = 20
LIE_AT_BYTE = 50_000
_SO_RCVBUFFORCE = 33
_CHUNK_BYTES = 1250  # each ms: 10 Mbit/s


class SmallVM:
    """The services and the connections that they have."""

    def __init__(self, ip: str, lie: str) -> None:
        self._lie = lie
        self._memory = bytearray(2**21)
        self._ledger = ledger.Ledger(self._memory)
        self._ledger.format()
        self._connections: list[socket.socket] = []
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 2**22)
        udp.bind((ip, 7))
        threading.Thread(target=self._echo, args=(udp,), daemon=True).start()
        for port, service in ((ledger.PORT, self._transactions), (bulk.PORT, self._stream)):
            listener = socket.create_server((ip, port))
            threading.Thread(target=self._accept, args=(listener, service), daemon=True).start()

    def reset(self, *_signal: object) -> None:
        """Answer every connection with RST."""
        for sock in self._connections:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.shutdown(socket.SHUT_RD)  # wakes the thread that reads, which would keep the socket alive
            os.close(sock.detach())

    def _accept(self, listener: socket.socket, service: Callable[[socket.socket], None]) -> None:
        while True:
            sock, _ = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.append(sock)
            threading.Thread(target=self._serve, args=(sock, service), daemon=True).start()

    def _serve(self, sock: socket.socket, service: Callable[[socket.socket], None]) -> None:
        try:
            service(sock)
        except OSError:  # the client went, or a reset was ordered
            return

    def _echo(self, sock: socket.socket) -> None:
        while True:
            data, address = sock.recvfrom(2048)
            sock.sendto(data, address)

    def _transactions(self, sock: socket.socket) -> None:
        while request := sock.recv(ledger.REQUEST.size, socket.MSG_WAITALL):
            kind, client, sequence, source, target, amount = ledger.REQUEST.unpack(request)
            if kind == ledger.AUDIT:
                records = self._ledger.records(sequence, amount)
                head = ledger.REPLY.pack(ledger.LEDGER, records.size, self._ledger.total)
                sock.sendall(head + records.tobytes())
                continue
            transfer = ledger.Transfer(client, sequence, source, target, amount)
            entry = self._ledger.apply(transfer)
            if sequence == LIE_AT_SEQUENCE:
                self._misbehave(transfer)
            sock.sendall(ledger.REPLY.pack(ledger.DONE, sequence, entry))

    def _misbehave(self, transfer: ledger.Transfer) -> None:
        if self._lie == "lose":
            record = self._ledger.records(self._ledger.entries, 1).tobytes()
            at = self._memory.index(record)
            self._memory[at + len(record) - 1] ^= 1  # the amount
        if self._lie == "double":
            self._ledger._clients[0, 1] -= 1  # as if that page of RAM had come from an older round
            self._ledger.apply(transfer)

    def _stream(self, sock: socket.socket) -> None:
        offset = 0
        while True:
            chunk = bytearray(bulk.pattern(offset, _CHUNK_BYTES))
            if offset == LIE_AT_BYTE and self._lie == "corrupt":
                chunk[0] ^= 1
            sock.sendall(chunk)
            offset += len(chunk)
            time.sleep(0.001)


if __name__ == "__main__":
    vm = SmallVM(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
    signal.signal(signal.SIGUSR1, vm.reset)
    print("up", flush=True)
    while True:
        signal.pause()
