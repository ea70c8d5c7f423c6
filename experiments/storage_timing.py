"""How long a 4 KiB write takes that is on stable storage when it returns: over NFS, on the NAS's own disk, on the way.

    python -m experiments.storage_timing nfs WHERE                in a host: writes and reads of a file there
    python -m experiments.storage_timing local FOLDER             the same writes, where the NAS has its files
    python -m experiments.storage_timing serve IP | ask IP        the way: 4 KiB there, a word back, over TCP

Each prints the microseconds of every one, as a JSON list.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable

from hosts.store import open_store

_BYTES = 4096
_WARM_UP, _COUNT = 50, 500
_PORT = 8002
_FILE = "/timing"


def main() -> int:
    what, where = sys.argv[1:3]
    match what:
        case "serve":
            _serve(where)
        case "ask":
            print(json.dumps(_round_trips(where)))
        case _:
            print(json.dumps(_writes(where)))
    return 0


def _writes(where: str) -> list[float]:
    store = open_store(where)
    store.write_new(_FILE, bytes(_BYTES * 16))
    file = store.open(_FILE, os.O_RDWR | os.O_SYNC)
    content = os.urandom(_BYTES)
    took = _timed(lambda number: file.write(number % 16 * _BYTES, content))
    file.close()
    store.unlink(_FILE)
    store.close()
    return took


def _round_trips(ip: str) -> list[float]:
    content = bytes(_BYTES)
    with socket.create_connection((ip, _PORT), 5) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def ask(_number: int) -> None:
            sock.sendall(content)
            sock.recv(1)

        return _timed(ask)


def _serve(ip: str) -> None:
    with socket.create_server((ip, _PORT)) as listener:
        print("ready", flush=True)
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while sock.recv(_BYTES, socket.MSG_WAITALL):
            sock.sendall(b".")


def _timed(act: Callable[[int], object]) -> list[float]:
    took = []
    for number in range(_WARM_UP + _COUNT):
        began = time.perf_counter()
        act(number)
        took.append((time.perf_counter() - began) * 1e6)
    return took[_WARM_UP:]


if __name__ == "__main__":
    sys.exit(main())
