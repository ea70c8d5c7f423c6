"""Sends one frame a millisecond through a device: python -m experiments.metronome DEVICE HEX. Until SIGTERM."""

import socket
import sys
import time

from experiments.children import Stop, say_ready

_EVERY_NS = 1_000_000


def main() -> int:
    device, frame = sys.argv[1], bytes.fromhex(sys.argv[2])
    stop = Stop()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        sock.bind((device, 0))
        say_ready()
        due_ns = time.monotonic_ns()
        while not stop.at_ns:
            sock.send(frame)
            now_ns = time.monotonic_ns()
            due_ns = max(due_ns + _EVERY_NS, now_ns - _EVERY_NS)  # what was slept through is not made up for
            time.sleep(max(0, due_ns - now_ns) / 1e9)
    return 0


if __name__ == "__main__":
    sys.exit(main())
