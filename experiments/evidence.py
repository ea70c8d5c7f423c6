"""What the captures prove of a migration, read with tshark: who spoke from where and when, and that no connection broke."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from experiments.capture import epoch_ns, fields
from experiments.timeline import Clock, Timeline
from hosts import bulk, ledger
from topologies.plan import VM

_RARP = "0x8035"
_ARP = "0x0806"


@dataclass(frozen=True)
class Evidence:
    """Times are monotonic ns."""

    announcements: int  # RARP and gratuitous ARP frames for the VM on the destination's uplink
    first_announcement_ns: int | None
    answers_from_destination: int  # the VM's IP frames on the destination's uplink after the resume
    late_frames_from_source: int  # its frames on the source's uplink after the suspend: there must be none
    connections_opened: int  # the client's SYNs to the VM's TCP services
    resets: int


def examine(
    pcap: Path, vm: VM, source: str, destination: str, client: str, timeline: Timeline, clock: Clock
) -> Evidence:
    """Read <pcap>/<node>.pcapng of both hosts and the client."""
    with ThreadPoolExecutor() as pool:
        at_destination = pool.submit(_spoken, pcap, destination, vm)
        at_source = pool.submit(_spoken, pcap, source, vm)
        ports = f"tcp.port in {{{ledger.PORT},{bulk.PORT}}}"
        telling = f"ip.addr == {vm.interface.ip} and {ports} and (tcp.flags.syn == 1 or tcp.flags.reset == 1)"
        flags = pool.submit(fields, pcap / f"{client}.pcapng", telling, "tcp.flags.reset", "tcp.flags.ack")
    spoken = [(clock.to_monotonic(at), kind) for at, kind in at_destination.result()]
    announced = [at for at, kind in spoken if kind == "announcement"]
    late = [at for at, _ in at_source.result() if clock.to_monotonic(at) > timeline.suspended_ns]
    rows = [(_true(reset), _true(ack)) for reset, ack in flags.result()]
    return Evidence(
        announcements=len(announced),
        first_announcement_ns=min(announced, default=None),
        answers_from_destination=sum(kind == "frame" and at >= timeline.resumed_ns for at, kind in spoken),
        late_frames_from_source=len(late),
        connections_opened=sum(not reset and not ack for reset, ack in rows),
        resets=sum(reset for reset, _ in rows),
    )


def _spoken(pcap: Path, host: str, vm: VM) -> list[tuple[int, str]]:
    """(realtime ns, "announcement" or "frame") of every frame that the VM sent over a host's uplink."""
    names = ("frame.time_epoch", "eth.type", "arp.isgratuitous")
    rows = fields(pcap / f"{host}.pcapng", f'eth.src == {vm.mac} and frame.interface_name == "{host}-vmnic0"', *names)
    return [
        (epoch_ns(epoch), "announcement" if kind == _RARP or (kind == _ARP and _true(gratuitous)) else "frame")
        for epoch, kind, gratuitous in rows
    ]


def _true(value: str) -> bool:
    """tshark prints booleans as 1 and 0, later ones as True and False."""
    return value in ("1", "True")
