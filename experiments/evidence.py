"""What the captures prove of a migration, read with tshark: who spoke where and when, and that no connection broke."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from experiments.capture import epoch_ns, fields
from experiments.timeline import Clock, Timeline
from hosts import bulk, ledger
from hosts.vcenter import Result
from topologies.plan import VM

_IPV4 = "0x0800"


# A broadcast frame reaches the other host's uplink through the switch within this time (usually 0.1 ms).
_FLOOD_NS = 20_000_000


@dataclass(frozen=True)
class Evidence:
    """Times are monotonic ns."""

    announcements: int  # RARP and gratuitous ARP frames for the VM that left the destination
    first_announcement_ns: int | None
    answers_from_destination: int  # the VM's IP frames on the destination's uplink after the resume
    late_frames_from_source: int  # its IP frames on the source's uplink after the suspend: there must be none
    connections_opened: int  # the client's SYNs to the VM's TCP services
    resets: int  # while the client used them


def examine(
    pcap: Path, vm: VM, result: Result, client: str, until_ns: int, timeline: Timeline, clock: Clock
) -> Evidence:
    """Read <pcap>/<node>.pcapng of both hosts and the client; `until_ns`: when the client was told to stop."""
    with ThreadPoolExecutor() as pool:
        at_destination = pool.submit(_spoken, pcap, result.destination, vm, clock)
        at_source = pool.submit(_spoken, pcap, result.source, vm, clock)
        handshakes = pool.submit(_flags, pcap / f"{client}.pcapng", vm, clock)
    here, there = at_destination.result(), at_source.result()
    announced = originated(here.announcements, there.announcements)
    flags = [(is_reset, is_answer) for at, is_reset, is_answer in handshakes.result() if at <= until_ns]
    return Evidence(
        announcements=len(announced),
        first_announcement_ns=min(announced, default=None),
        answers_from_destination=sum(at >= timeline.resumed_ns for at in here.frames),
        late_frames_from_source=sum(at > timeline.suspended_ns for at in there.frames),
        connections_opened=sum(not is_reset and not is_answer for is_reset, is_answer in flags),
        resets=sum(is_reset for is_reset, _ in flags),
    )


def originated(here: Sequence[int], there: Sequence[int]) -> list[int]:
    """The broadcast frames that left here, by their times: not those that the switch has just brought from there.

    A capture holds both directions of an interface; who sent a broadcast shows in where it was seen first.
    """
    return [at for at in here if not any(at - _FLOOD_NS <= other < at for other in there)]


class _Spoken(NamedTuple):
    announcements: list[int]
    frames: list[int]


def _spoken(pcap: Path, host: str, vm: VM, clock: Clock) -> _Spoken:
    """When frames of the VM passed a host's uplink: announcements (either direction) and unicast IP."""
    uplink = f'eth.src == {vm.mac} and frame.interface_name == "{host}-vmnic0"'
    telling = f"{uplink} and (eth.type == 0x8035 or arp.isgratuitous == 1 or ip)"
    rows = fields(pcap / f"{host}.pcapng", telling, "frame.time_epoch", "eth.type")
    times = [(clock.to_monotonic(epoch_ns(epoch)), kind == _IPV4) for epoch, kind in rows]
    return _Spoken([at for at, is_ip in times if not is_ip], [at for at, is_ip in times if is_ip])


def _flags(pcap: Path, vm: VM, clock: Clock) -> list[tuple[int, bool, bool]]:
    """(when, RST, ACK) of every segment that opens or breaks a connection to the VM's services."""
    ports = f"tcp.port in {{{ledger.PORT}, {bulk.PORT}}}"
    telling = f"ip.addr == {vm.interface.ip} and {ports} and (tcp.flags.syn == 1 or tcp.flags.reset == 1)"
    rows = fields(pcap, telling, "frame.time_epoch", "tcp.flags.reset", "tcp.flags.ack")
    return [(clock.to_monotonic(epoch_ns(epoch)), _true(reset), _true(ack)) for epoch, reset, ack in rows]


def _true(value: str) -> bool:
    """tshark 4.0 prints booleans as 1 and 0, 4.4 as True and False."""
    return value in ("1", "True")
