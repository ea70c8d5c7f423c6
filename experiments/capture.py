"""Captures: one `dumpcap` per node with all its interfaces, merged into one time-ordered file, read with `tshark`.

    with Capture(folder, [CaptureNode("esx1", esx1.popen, (("esx1-vmnic0", 0), ("esx1-vmnic1", 128)))]) as capture:
        ...
    capture.merge(results / "capture.pcapng")
    fields(results / "capture.pcapng", "icmp", "frame.number", "ip.src")

Files are pcapng with ns timestamps; each interface has its name, and its node's name as description.
"""

import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from experiments.children import Child, Popen, wait_until_up
from experiments.world import run
from topologies.errors import TestbedError

START_TIMEOUT_S = 10.0  # usually 40 ms
STOP_TIMEOUT_S = 30.0  # usually 0.4 s; more when there is much left to write
# libpcap hands a part-filled block over after this time-out (CAP_READ_TIMEOUT of dumpcap, 250 ms), and what it
# has not handed over when SIGINT comes is lost without being counted: so wait before stopping.
LAST_BLOCK_S = 0.4
# Per interface, of kernel memory: 0.35 s of 30 000 full-size frames a second, for which dumpcap may be kept off
# the CPU. The default, 2 MiB, is 45 ms.
KERNEL_BUFFER_MIB = 16
# Of dumpcap's own, between the threads that read an interface each and the one that writes. The default is 1000
# packets, less than one block of the kernel's buffer can bring at once, and what does not fit is dropped.
WRITER_QUEUE_BYTES = 64 * 2**20
WHOLE_FRAMES = 0  # as a snaplen

_UP = "File: "
_COUNTS = re.compile(r"Packets received/dropped on interface '(?:Loopback: )?([^']+)': (\d+)/(\d+)")


@dataclass(frozen=True)
class CaptureNode:
    """Where to capture: a node, its way to start programs, and (interface, snaplen in bytes) of each link end."""

    name: str
    popen: Popen
    interfaces: tuple[tuple[str, int], ...]


class Count(NamedTuple):
    """What became of one interface's frames; `dropped` ones are missing from the file."""

    node: str
    interface: str
    received: int
    dropped: int


class Capture:
    """Capture on all nodes for the length of the block; `counts` is filled at its end, however it ends.

    The files are <folder>/<node>.pcapng, the logs beside them.
    """

    def __init__(self, folder: Path, nodes: Sequence[CaptureNode]) -> None:
        self.counts: list[Count] = []
        self._folder = folder.resolve()
        self._nodes = nodes
        self._children: list[Child] = []

    def __enter__(self) -> "Capture":
        self._folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            for node in self._nodes:
                log = self._folder / f"{node.name}.log"
                # A relative path: dumpcap gives up root's right to pass through other users' closed folders
                # (a home is one), but it may stay in the folder where it was started.
                child = Child(f"the capture on {node.name}", node.popen, _dumpcap(node), log, cwd=self._folder)
                self._children.append(child)
            wait_until_up(self._children, _UP, deadline)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stop()
        except TestbedError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # the block's own error comes first
        finally:
            self._kill()

    def merge(self, out: Path) -> None:
        """All nodes' frames in the order of their time. (mergecap takes its inputs for ordered; they are not quite.)"""
        unordered = out.with_suffix(".unordered")
        files = [str(self._folder / f"{node.name}.pcapng") for node in self._nodes]
        # -I none: two hosts' equally named interfaces stay two.
        run("mergecap", "-F", "pcapng", "-I", "none", "-w", str(unordered), *files)
        run("reordercap", str(unordered), str(out))
        unordered.unlink()

    def _stop(self) -> None:
        time.sleep(LAST_BLOCK_S)
        # dumpcap stops for all of its interfaces, with status 0, when one of them is removed.
        early = [child for child in self._children if child.process.poll() is not None]
        for child in self._children:
            child.finish(signal.SIGINT)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for node, child in zip(self._nodes, self._children, strict=True):
            child.wait(deadline)
            (self._folder / f"{node.name}.pcapng").chmod(0o644)  # dumpcap's are root's alone
            self.counts += parse_counts(node.name, child.said())
        for child in early:
            reason = [line for line in child.said() if line.startswith("dumpcap:")]
            raise TestbedError(f"{child.name} ended before its time; {' '.join(reason)}")

    def _kill(self) -> None:
        for child in self._children:
            child.kill()


def _dumpcap(node: CaptureNode) -> list[str]:
    words = ["dumpcap", "-q", "-t", "-n", "-C", str(WRITER_QUEUE_BYTES)]
    for interface, snaplen in node.interfaces:
        words += ["-i", interface, "-s", str(snaplen), "-B", str(KERNEL_BUFFER_MIB), "--ifdescr", node.name]
    return [*words, "-w", f"{node.name}.pcapng"]


def parse_counts(node: str, lines: Sequence[str]) -> list[Count]:
    """dumpcap's closing lines; `dropped` is the sum of what the kernel, libpcap and dumpcap itself dropped."""
    found = (_COUNTS.search(line) for line in lines)
    return [Count(node, match[1], int(match[2]), int(match[3])) for match in found if match]


# ---------------------------------------------------------------- reading


class Frame(NamedTuple):
    """One frame of a capture; time is realtime (events.clock_pair leads to monotonic)."""

    number: int
    time_ns: int
    node: str
    interface: str


def fields(pcap: Path, display_filter: str, *names: str) -> list[tuple[str, ...]]:
    """The named fields of each frame that passes the filter ("" for all): "" where it has none, else its first."""
    words = ["tshark", "-n", "-r", str(pcap), "-T", "fields", "-E", "occurrence=f"]
    if display_filter:
        words += ["-Y", display_filter]
    for name in names:
        words += ["-e", name]
    return [tuple(line.split("\t")) for line in run(*words).splitlines()]


def frames(pcap: Path, display_filter: str = "") -> list[Frame]:
    """When and where the frames that pass the filter were seen."""
    rows = fields(
        pcap, display_filter, "frame.number", "frame.time_epoch", "frame.interface_description", "frame.interface_name"
    )
    return [Frame(int(number), epoch_ns(epoch), node, interface) for number, epoch, node, interface in rows]


def epoch_ns(text: str) -> int:
    """tshark's frame.time_epoch in ns, exactly: decimal seconds, or ISO 8601 in UTC as some versions write it."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    if "T" in whole:
        seconds = int(datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp())
    else:
        seconds = int(whole)
    return seconds * 10**9 + int(fraction.ljust(9, "0")[:9] or 0)
