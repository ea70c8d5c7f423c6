"""A VM on this host, put together and taken apart: guest, port on a vSwitch, announcement, generation."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hosts.announce import Announcer
from hosts.datastore import Datastore
from hosts.guest import Guest, LightGuest
from hosts.vswitch import VmPort
from topologies.events import EventLog
from topologies.plan import VM, Host


@dataclass(frozen=True)
class Site:
    """What every VM of one host shares: the host's plan, its datastore, events, logs and guests' sockets."""

    host: Host
    datastore: Datastore
    events: EventLog
    logs: Path
    guests: Path

    def log_of(self, vm: str) -> Path:
        """What a guest's process says."""
        return self.logs / f"{vm}@{self.host.name}.log"


class Memo(msgspec.Struct, frozen=True):
    """What an agent has to know of a VM beside the guest's own words: how to announce it (hosts/announce.py)."""

    announce: str
    schedule_ms: tuple[int, ...]


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
        with ExitStack() as undo:
            announcer = Announcer(mode, vm.mac, str(vm.interface.ip), schedule_ms)
            undo.callback(announcer.close)
            memo = msgspec.json.encode(Memo(mode, schedule_ms))
            guest = LightGuest.start(vm, memo, site.guests / vm.name, site.log_of(vm.name))
            undo.callback(guest.power_off)
            port = VmPort(vswitch, vm, guest.pid)
            undo.callback(port.remove)
            announcer.prepare(vswitch)
            undo.pop_all()
        return cls(site, vm, guest, port, announcer, vswitch)

    @classmethod
    def adopt(cls, site: Site, home: Path) -> "Machine":
        """A VM as another agent of this host has left it; whatever fails, it stays as it is. GuestEnded: it is gone."""
        with ExitStack() as undo:
            guest = LightGuest.adopt(home, site.log_of(home.name))
            undo.callback(guest.let_go)
            vm, memo = guest.vm, msgspec.json.decode(guest.memo, type=Memo)
            vswitch = site.host.vswitch_of(vm.port_group).name
            announcer = Announcer(memo.announce, vm.mac, str(vm.interface.ip), memo.schedule_ms)
            undo.callback(announcer.close)
            port = VmPort.adopt(vswitch, vm, guest.pid)
            announcer.prepare(vswitch)
            undo.pop_all()
        return cls(site, vm, guest, port, announcer, vswitch)

    @property
    def is_alive(self) -> bool:
        return self.guest.state != "dead"

    def emit(self, kind: str, **fields: Any) -> int:
        return self.site.events.emit(kind, vm=self.vm.name, **fields)

    def let_go(self) -> None:
        """Forget it, and leave it as it is."""
        self.announcer.close()
        self.guest.let_go()

    def dismantle(self) -> None:
        """Take it apart, whatever state it is in; its port goes before its guest, so its connections end in silence."""
        with ExitStack() as steps:  # in the reverse order, and each whatever becomes of the others
            steps.callback(self.guest.power_off)
            steps.callback(self.port.remove)
            steps.callback(self.announcer.close)
        self.generation = 0
