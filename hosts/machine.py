"""A VM on this host, put together and taken apart: guest, vmx, port on a vSwitch, announcement, ownership."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hosts.announce import Announcer, FrameBuilder
from hosts.datastore import Datastore
from hosts.disk_channel import socket_pair
from hosts.guest import Guest, GuestEnded, LightGuest
from hosts.ownership import Lease
from hosts.vm_folder import VmFolder
from hosts.vm_log import VmLog
from hosts.vmx import SUFFIX, Vmx, VmxGone, Where
from hosts.vswitch import VmPort
from topologies.errors import TestbedError
from topologies.events import EventLog
from topologies.plan import VM, Host


@dataclass(frozen=True)
class Site:
    """What every VM of one host shares: its plan, its datastore (and the name of it), events, logs, sockets, scapy."""

    host: Host
    where: str
    datastore: Datastore
    vm_log: VmLog
    events: EventLog
    logs: Path
    guests: Path
    frame_builder: FrameBuilder

    def log_of(self, vm: str) -> Path:
        """What a guest's process says."""
        return self.logs / f"{vm}@{self.host.name}.log"

    def vmx_log_of(self, vm: str) -> Path:
        return self.logs / f"{vm}@{self.host.name}.vmx.log"

    def folder_of(self, vm: str) -> VmFolder:
        return VmFolder(self.datastore.store, vm)


class Memo(msgspec.Struct, frozen=True):
    """What an agent has to know of a VM beside the guest's own words: how to announce it (hosts/announce.py)."""

    announce: str
    schedule_ms: tuple[int, ...]


@dataclass
class Machine:
    """A VM on this host."""

    site: Site
    vm: VM
    guest: Guest
    vmx: Vmx
    port: VmPort
    announcer: Announcer
    unsettled: int = 0  # suspended in a switchover: the generation that may be ours, and the datastore did not answer
    _logs: bool = False  # what happens to it goes into its vmware.log, too

    @classmethod
    def build(cls, site: Site, vm: VM, mode: str, schedule_ms: tuple[int, ...]) -> "Machine":
        """RAM, guest, vmx with the disk opened, a dark port, the announcement; nothing runs, nothing shows."""
        vswitch, name = site.host.vswitch_of(vm.port_group).name, vm.name
        with ExitStack() as undo:
            memo = msgspec.json.encode(Memo(mode, schedule_ms))
            home, log = site.guests / name, site.log_of(name)
            guests_end, vmx_end = socket_pair()
            with guests_end, vmx_end:
                beside = home.with_suffix(SUFFIX)
                where = Where(site.where, site.events.path, site.vmx_log_of(name))
                vmx = Vmx.start(name, site.host.name, where, beside, vmx_end)
                undo.callback(vmx.end)
                guest = LightGuest.start(vm, memo, home, log, guests_end, vmx.page.fd)
                undo.callback(guest.power_off)
            vmx.greet()
            _add_swap(site, vm)
            undo.callback(_remove_swap, site, vm)
            port = VmPort(vswitch, vm, guest.pid)
            undo.callback(port.remove)
            announcer = _announcer(site, vm, Memo(mode, schedule_ms))
            undo.pop_all()
        return cls(site, vm, guest, vmx, port, announcer)

    @classmethod
    def adopt(cls, site: Site, home: Path) -> "Machine":
        """A VM as another agent of this host has left it; whatever fails, it stays as it is. GuestEnded: it is gone."""
        with ExitStack() as undo:
            guest = LightGuest.adopt(home, site.log_of(home.name))
            undo.callback(guest.let_go)
            try:
                vmx = Vmx.adopt(home.name, home.with_suffix(SUFFIX), site.vmx_log_of(home.name))
            except VmxGone as error:  # a suspended guest has not noticed
                guest.power_off()
                raise GuestEnded(str(error)) from error
            undo.callback(vmx.let_go)
            vm, memo = guest.vm, msgspec.json.decode(guest.memo, type=Memo)
            announcer = _announcer(site, vm, memo)
            undo.callback(announcer.close)
            port = VmPort.adopt(site.host.vswitch_of(vm.port_group).name, vm, guest.pid)
            undo.pop_all()
        return cls(site, vm, guest, vmx, port, announcer)

    @property
    def generation(self) -> int:
        """The one under which this host owns it, 0 while it does not."""
        return self.vmx.generation

    @property
    def is_alive(self) -> bool:
        return self.guest.state != "dead" and self.vmx.is_alive

    @property
    def is_stalled(self) -> bool:
        """Whether it stands still for the want of a lease."""
        return self.guest.state == "running" and not self.vmx.page.lasts

    # ------------------------------------------------------------ ownership

    def own(self, lease: Lease) -> None:
        """It is this host's, and may be told to run."""
        if self.generation in (0, lease.generation):  # it was not before
            self.site.vm_log.begin(self.vm.name)
        self._logs = True
        self.vmx.page.grant(lease)
        self.vmx.own(lease, self.guest.pid, self.port.gate)

    def open_gate(self) -> bool:
        """Whether it may run; if not, its vmx opens the gate as soon as it may."""
        lasts = self.vmx.page.lasts
        if lasts:
            self.port.open()
        return lasts

    def hold(self) -> None:
        """Before a suspend: its vmx keeps the lease, the rest is up to us."""
        self._logs = False
        self.vmx.hold()

    def keep(self) -> None:
        """It is this host's as before, and its vmx's to look after."""
        self._logs = True
        self.vmx.go_on()

    def go_on(self) -> None:
        """After a hold that was in vain: it runs here, at once or as soon as it has a lease again."""
        try:
            self.keep()
        finally:
            self.guest.run()

    def emit(self, kind: str, **fields: Any) -> int:
        if self._logs:
            self.site.vm_log.add(self.vm.name, kind, fields)
        return self.site.events.emit(kind, vm=self.vm.name, **fields)

    # ------------------------------------------------------------ its end

    def let_go(self) -> None:
        """Forget it, and leave it as it is."""
        self.announcer.close()
        self.guest.let_go()
        self.vmx.let_go()

    def dismantle(self) -> None:
        """Take it apart, whatever state it is in; its port goes before its guest, so its connections end in silence."""
        with ExitStack() as steps:  # in the reverse order, and each whatever becomes of the others
            steps.callback(_remove_swap, self.site, self.vm)
            steps.callback(self.vmx.end)
            steps.callback(self.guest.power_off)
            steps.callback(self.port.remove)
            steps.callback(self.announcer.close)


def _announcer(site: Site, vm: VM, memo: Memo) -> Announcer:
    frames = site.frame_builder.frames(memo.announce, vm.mac, str(vm.interface.ip))
    return Announcer(memo.announce, frames, site.host.vswitch_of(vm.port_group).name, memo.schedule_ms)


def _add_swap(site: Site, vm: VM) -> None:
    try:
        site.folder_of(vm.name).add_swap(site.host.name, vm.ram)
    except OSError as error:
        raise TestbedError(f"VM {vm.name}: its swap file cannot be made: {error}") from error


def _remove_swap(site: Site, vm: VM) -> None:
    """If it cannot be removed now, who powers the VM off does it."""
    try:
        site.folder_of(vm.name).remove_swap(site.host.name)
    except OSError as error:
        site.events.emit("swap.left", vm=vm.name, host=site.host.name, reason=str(error))
