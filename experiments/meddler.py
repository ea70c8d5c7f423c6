"""A stream with one byte changed: what a broken network card, or somebody on the cable, would do.

    python -m experiments.meddler IP LISTEN_PORT TO_PORT BYTE       writes "ready" when it listens

Forwards TCP connections; of the first one, the byte at offset BYTE of what the caller sends is inverted.
"""

import socket
import sys
import threading

from experiments.children import say_ready


def main() -> None:
    ip, (port, to_port, at) = sys.argv[1], map(int, sys.argv[2:5])
    with socket.create_server((ip, port)) as listener:
        say_ready()
        while True:
            caller, _ = listener.accept()
            called = socket.create_connection((ip, to_port))
            threading.Thread(target=_forward, args=(caller, called, at), daemon=True).start()
            threading.Thread(target=_forward, args=(called, caller, -1), daemon=True).start()
            at = -1


def _forward(source: socket.socket, target: socket.socket, at: int) -> None:
    passed = 0
    try:
        while data := bytearray(source.recv(1 << 16)):
            if passed <= at < passed + len(data):
                data[at - passed] ^= 0xFF
            passed += len(data)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:  # one of the two has gone: so does the other
        for sock in (source, target):
            sock.close()


if __name__ == "__main__":
    main()
