"""Who ran a VM, and when: from the events of the hosts, and from what the VM's disk itself has recorded.

A tenure begins before the VM may run on a host, and ends after it has stopped there, so an overlap of two is never
overlooked; the disk's sectors say under which generation each entry of the ledger's journal was written.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hosts.journal import written_under
from hosts.vm_files import disk_path
from topologies.events import Event

# The VM may run from here on
_BEGINS = {"vm.powering_on", "vm.resuming", "vm.unstalled"}
# It does not any more
_ENDS = {"vm.suspended", "vm.stalled", "vm.fenced", "vm.powered_off", "vm.lost", "vm.discarded", "guest.ended"}


@dataclass(frozen=True)
class Tenure:
    """Times are ns on the run's monotonic clock; `until_ns` is None if it lasts."""

    host: str
    since_ns: int
    until_ns: int | None


def tenures(events: Iterable[Event], vm: str) -> list[Tenure]:
    """In the order in which they began."""
    since: dict[str, int] = {}
    found: list[Tenure] = []
    for event in sorted((e for e in events if e.get("vm") == vm), key=lambda e: e["t"]):
        host = str(event.get("host", event["source"]))
        if event["kind"] in _BEGINS and not event.get("stalled"):  # if it is, it begins with vm.unstalled
            since.setdefault(host, event["t"])
        elif event["kind"] in _ENDS and host in since:
            found.append(Tenure(host, since.pop(host), event["t"]))
    found += [Tenure(host, begun, None) for host, begun in since.items()]
    return sorted(found, key=lambda tenure: tenure.since_ns)


def overlap_ms(found: Iterable[Tenure]) -> float:
    """For how long two hosts ran it at once."""
    inf = float("inf")
    spans = sorted((t.since_ns, inf if t.until_ns is None else t.until_ns, t.host) for t in found)
    shared = 0.0
    for index, (_, until, host) in enumerate(spans):
        for since, other_until, other in spans[index + 1 :]:
            if other != host and since < until:
                shared += min(until, other_until) - since
    return shared / 1e6


def show(found: Sequence[Tenure], width: int = 72) -> list[str]:
    """A line for each host, with a block wherever it ran the VM."""
    if not found:
        return []
    begin = found[0].since_ns
    end = max(tenure.until_ns or tenure.since_ns for tenure in found) + 1
    lines = []
    for host in dict.fromkeys(tenure.host for tenure in found):
        cells = [" "] * width
        for tenure in found:
            if tenure.host == host:
                first = (tenure.since_ns - begin) * width // (end - begin)
                last = ((tenure.until_ns or end) - begin) * width // (end - begin)
                cells[first : last + 1] = "█" * (min(last, width - 1) + 1 - first)
        lines.append(f"{host:>8} |{''.join(cells)}|")
    return [*lines, f"{'s':>8} 0{(end - begin) / 1e9:{width}.1f}"]


def disk_record(datastore: Path, vm: str) -> list[int]:
    """The generations under which the journal on a VM's disk was written, in the order of its entries."""
    with open(f"{datastore}{disk_path(vm)}", "rb") as disk:

        def read(offset: int, length: int) -> bytes:
            return os.pread(disk.fileno(), length, offset)

        spans = written_under(read, os.fstat(disk.fileno()).st_size)
    return [generation for _, _, generation in spans]
