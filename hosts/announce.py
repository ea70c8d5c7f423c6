"""Telling the physical network where a VM's MAC is now: gratuitous RARP, gratuitous ARP, both, or none.

VMware's vSwitch sends RARP requests for the VM's own MAC (RFC 903); a switch learns from their source
address. They carry no IP address, so where ARP is suppressed a gratuitous ARP (RFC 5227) is needed too.

    python -m hosts.announce rarp 00:50:56:00:00:01 10.0.0.11      # the frames in hex, one a line

scapy builds the frames, in a process of its own: its import takes a second and 40 MB, and sending
through it 24 ms a frame, where bytes written to a bound packet socket take 4 us.
"""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from topologies.errors import TestbedError

MODES = ("rarp", "garp", "both", "none")
# QEMU's schedule (migration/announce: initial 50 ms, step 100, rounds 5), counted from the resume
SCHEDULE_MS = (0, 50, 200, 450, 800)


def frames(mode: str, mac: str, ip: str) -> list[bytes]:
    """The announcement frames of a VM, built by scapy: 60 bytes each, as they go on the wire."""
    from scapy.layers.l2 import ARP, Ether

    everyone = "ff:ff:ff:ff:ff:ff"
    rarp = Ether(src=mac, dst=everyone, type=0x8035) / ARP(op=3, hwsrc=mac, hwdst=mac, psrc="0.0.0.0", pdst="0.0.0.0")
    garp = Ether(src=mac, dst=everyone, type=0x0806) / ARP(op=1, hwsrc=mac, hwdst="00:00:00:00:00:00", psrc=ip, pdst=ip)
    chosen = {"rarp": [rarp], "garp": [garp], "both": [rarp, garp], "none": []}[mode]
    return [bytes(frame).ljust(60, b"\0") for frame in chosen]


# Told after each round of frames: its number, the mode, how many frames.
Sent = Callable[[int, str, int], None]


class Announcer:
    """Frames ready to be sent through a vSwitch of this network namespace, on schedule."""

    def __init__(self, mode: str, mac: str, ip: str, schedule_ms: tuple[int, ...]) -> None:
        self._mode, self._schedule_ms = mode, schedule_ms
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._builder = subprocess.Popen(
            [sys.executable, "-m", "hosts.announce", mode, mac, ip],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        self._silent, self._sending = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None

    def prepare(self, vswitch: str) -> None:
        """Bind to the vSwitch and wait for the frames; everything slow happens here."""
        self._socket.bind((vswitch, 0))
        out, err = self._builder.communicate()
        if self._builder.returncode:
            last = err.decode(errors="replace").strip().splitlines()[-1:]
            raise TestbedError(f"scapy could not build the announcement: {' '.join(last)}")
        self._frames = [bytes.fromhex(line) for line in out.decode().split()]

    def start(self, sent: Sent) -> None:
        """The schedule begins now; a round due at 0 ms has left when this returns. `sent` hears of each round."""
        if not self._frames or not self._schedule_ms:
            return
        began, later = time.monotonic(), list(enumerate(self._schedule_ms))
        if later[0][1] == 0:
            self._send(later.pop(0)[0], sent)
        self._thread = threading.Thread(target=self._rest, args=(began, later, sent), name="announcer", daemon=True)
        self._thread.start()

    def _rest(self, began: float, rounds: list[tuple[int, int]], sent: Sent) -> None:
        for number, due_ms in rounds:
            if self._silent.wait(max(0.0, began + due_ms / 1000 - time.monotonic())):
                return
            self._send(number, sent)

    def _send(self, number: int, sent: Sent) -> None:
        with self._sending:
            if self._silent.is_set():
                return
            try:
                for frame in self._frames:
                    self._socket.send(frame)
            except OSError as error:  # the VM runs all the same, and its own frames tell where it is
                print(f"announcement {number} could not be sent: {error}", file=sys.stderr, flush=True)
                return
        sent(number, self._mode, len(self._frames))

    def silence(self) -> None:
        """No frame after this returns: one from here would pull a VM's traffic back after it has left."""
        with self._sending:
            self._silent.set()

    def close(self) -> None:
        """Give everything back. Closing a packet socket waits for an RCU grace period: not during a downtime."""
        self.silence()
        if self._thread is not None:
            self._thread.join()
        self._builder.kill()
        self._builder.wait()
        for pipe in (self._builder.stdout, self._builder.stderr):
            if pipe is not None:
                pipe.close()
        self._socket.close()


if __name__ == "__main__":
    print("\n".join(frame.hex() for frame in frames(*sys.argv[1:4])))
