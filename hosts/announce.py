"""Telling the physical network where a VM's MAC is now: gratuitous RARP, gratuitous ARP, both, or none.

VMware's vSwitch sends RARP requests for the VM's own MAC (RFC 903); a switch learns from their source
address. They carry no IP address, so where ARP is suppressed a gratuitous ARP (RFC 5227) is needed too.

    python -m hosts.announce      # reads lines like "rarp 00:50:56:00:00:01 10.0.0.11", answers with frames in hex

scapy builds the frames, in a process that stays beside the agent: its import takes a second and 40 MB, and
sending through it 24 ms a frame, where bytes written to a bound packet socket take 4 us.
"""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from hosts.processes import ROOT
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


class FrameBuilder:
    """The process with scapy: it is started at once, and who asks before its import is done waits for that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = self._started()

    def _started(self) -> "subprocess.Popen[str]":
        words = [sys.executable, "-m", "hosts.announce"]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def frames(self, mode: str, mac: str, ip: str) -> list[bytes]:
        """As `frames`; a process that has ended is started again, and one that ends over it is an error."""
        with self._lock:
            if self._process.poll() is not None:
                self._end()
                self._process = self._started()
            assert self._process.stdin is not None and self._process.stdout is not None
            try:
                print(mode, mac, ip, file=self._process.stdin, flush=True)
                line = self._process.stdout.readline()
            except OSError as error:
                raise TestbedError(f"scapy could not build the announcement: {error}") from error
        if not line:
            raise TestbedError(f"scapy could not build the announcement: its process ended ({self._process.wait()})")
        return [bytes.fromhex(frame) for frame in line.split()]

    def close(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        self._process.kill()
        with self._process:  # its pipes are closed, it is waited for
            pass


class Announcer:
    """Frames ready to be sent through a vSwitch of this network namespace, on schedule."""

    def __init__(self, mode: str, frames: list[bytes], vswitch: str, schedule_ms: tuple[int, ...]) -> None:
        self._mode, self._frames, self._schedule_ms = mode, frames, schedule_ms
        self._silent, self._sending = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.bind((vswitch, 0))

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
        self._socket.close()


def main() -> None:
    """Until its input ends, which it does with the agent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    frames("rarp", "00:00:00:00:00:00", "0.0.0.0")  # the import
    for line in sys.stdin:
        print(" ".join(frame.hex() for frame in frames(*line.split())), flush=True)


if __name__ == "__main__":
    main()
