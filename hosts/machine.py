"""A VM on this host, put together and taken apart: guest, port on a vSwitch, announcement, generation."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosts.announce import Announcer
from hosts.datastore import Datastore
from hosts.guest import Guest, LightGuest
from hosts.vswitch import VmPort
from topologies.events import EventLog
from topologies.plan import VM, Host


@dataclass(frozen=True)
class Site:
    """What every VM of one host shares: the host's plan, its datastore, events and logs."""

    host: Host
    datastore: Datastore
    events: EventLog
    logs: Path


@dataclass
class Machine:
    """A VM on this host. `generation` is the one under which this host owns it, 0 while it does not."""

    site: Site
    vm: VM
    guest: Guest
    port: VmPort
    announcer: Announcer
    vswitch: str
    generation: int = 0
    owner_unknown: bool = False  # suspended after a hand-over, and the datastore did not answer

    @classmethod
    def build(cls, site: Site, vm: VM, mode: str, schedule_ms: tuple[int, ...]) -> "Machine":
        """RAM, a guest process in its namespace, a dark port, announcement frames; nothing runs, nothing shows."""
        vswitch = site.host.vswitch_of(vm.port_group).name
        announcer = Announcer(mode, vm.mac, str(vm.interface.ip), schedule_ms)
        try:
            guest = LightGuest(vm, site.logs / f"{vm.name}@{site.host.name}.log")
            try:
                port = VmPort(vswitch, vm, guest.pid)
                announcer.prepare(vswitch)
            except BaseException:
                guest.power_off()
                raise
        except BaseException:
            announcer.close()
            raise
        return cls(site, vm, guest, port, announcer, vswitch)

    def emit(self, kind: str, **fields: Any) -> int:
        return self.site.events.emit(kind, vm=self.vm.name, **fields)

    def dismantle(self) -> None:
        """Take it apart, whatever state it is in; its port goes before its guest, so its connections end in silence."""
        with ExitStack() as steps:  # in the reverse order, and each whatever becomes of the others
            steps.callback(self.guest.power_off)
            steps.callback(self.port.remove)
            steps.callback(self.announcer.close)
        self.generation = 0
