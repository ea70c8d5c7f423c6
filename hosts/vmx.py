"""A VM's vmx as its host's agent handles it: the process that has the disk and keeps the lease."""

import os
import signal
import socket
import struct
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from hosts import channel
from hosts.gate import Gate
from hosts.lease_page import LeasePage
from hosts.ownership import Lease
from hosts.processes import ROOT, connect, end_behind, has_ended, last_words
from topologies.errors import TestbedError

_ANSWER_TIMEOUT_S = 10.0
SUFFIX = ".vmx"  # of the name of its socket


class Where(NamedTuple):
    """What a vmx works with: a datastore's name, files for its events and for what it says."""

    datastore: str
    events: Path
    log: Path


class VmxError(TestbedError):
    """The vmx refused, or is gone."""


class VmxGone(VmxError):
    """Nobody is behind this socket any more."""


class Vmx:
    """Made by `start` or `adopt`; serves from `greet` on."""

    page: LeasePage

    def __init__(self, vm: str, home: Path, log: Path) -> None:
        self.vm, self._home, self._log = vm, home, log
        self._process: subprocess.Popen[bytes] | None = None
        self._line: channel.Line
        self._pidfd = -1
        self._number = 0
        self._said_before = 0

    @classmethod
    def start(cls, vm: str, host: str, where: Where, home: Path, disk: socket.socket) -> "Vmx":
        """A new one, reached by the socket `home`; `disk`: its end of the guest's disk."""
        vmx = cls(vm, home, where.log)
        with ExitStack() as undo, socket.socket(socket.AF_UNIX) as listener, open(where.log, "ab") as out:
            vmx._said_before = out.tell()
            vmx.page = LeasePage.create(vm)
            undo.callback(vmx.page.close)
            try:
                end_behind(home)  # one that has lost its guest, and not noticed
                listener.bind(str(home))
                undo.callback(home.unlink, missing_ok=True)
                listener.listen()
                vmx._line = channel.Line(connect(home))
            except OSError as error:
                raise VmxError(f"VM {vm}: no socket {home} for its vmx: {error.strerror}") from error
            undo.callback(vmx._line.close)
            descriptors = {"--listener": listener.fileno(), "--disk": disk.fileno(), "--page": vmx.page.fd}
            words = [sys.executable, "-m", "hosts.vmx_process", "--vm", vm, "--host", host]
            words += ["--datastore", where.datastore, "--events", str(where.events)]
            words += [word for option, fd in descriptors.items() for word in (option, str(fd))]
            vmx._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                pass_fds=tuple(descriptors.values()),
                start_new_session=True,
                cwd=ROOT,
            )
            vmx._pidfd = os.pidfd_open(vmx._process.pid)
            undo.pop_all()
        return vmx

    def greet(self) -> None:
        """Until it has opened the disk; VmxError with its reason if it cannot."""
        self._line.settimeout(_ANSWER_TIMEOUT_S)
        try:
            _, descriptors = self._line.receive_with_descriptors()
        except (EOFError, OSError, msgspec.MsgspecError) as error:
            said = last_words(self._log, self._said_before)
            raise VmxError(f"VM {self.vm}: its vmx did not come up{said or f': {error}'}; see {self._log}") from error
        for descriptor in descriptors:  # the page, which is here already
            os.close(descriptor)

    @classmethod
    def adopt(cls, vm: str, home: Path, log: Path) -> "Vmx":
        """The one behind a socket, which another agent has started. VmxGone if there is none any more."""
        vmx = cls(vm, home, log)
        with ExitStack() as undo:
            try:
                connection = connect(home)
                vmx._line = channel.Line(connection)
                undo.callback(vmx._line.close)
                credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                vmx._line.settimeout(_ANSWER_TIMEOUT_S)
                _, (page,) = vmx._line.receive_with_descriptors()
                vmx.page = LeasePage(page)
                undo.callback(vmx.page.close)
                vmx._pidfd = os.pidfd_open(struct.unpack("iII", credentials)[0])
            except (EOFError, ConnectionError, FileNotFoundError, ProcessLookupError) as error:
                home.unlink(missing_ok=True)
                raise VmxGone(f"VM {vm}: its vmx at {home} has ended; see {log}") from error
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                raise VmxError(f"VM {vm}: its vmx at {home} cannot be reached: {error}; see {log}") from error
            undo.pop_all()
        return vmx

    @property
    def generation(self) -> int:
        """Under which this host owns the VM, 0 if it does not, or has ended."""
        return self.page.generation if self._line.fileno() >= 0 else 0

    @property
    def is_alive(self) -> bool:
        return self._line.fileno() >= 0 and not has_ended(self._pidfd)

    def own(self, lease: Lease, pid: int, gate: Gate) -> None:
        """From here on it keeps the VM, whose guest is `pid`. It is told, and not waited for: this is in a downtime."""
        self._tell(channel.Own(lease.generation, lease.sent_s, pid, gate.messages))

    def hold(self) -> None:
        """It goes on pulsing, and leaves gate and claims to us."""
        self._order(channel.Hold())

    def go_on(self) -> None:
        """The gate is its again, and open if the lease lasts."""
        self._order(channel.GoOn())

    def let_go(self) -> None:
        """Leave it as it is, for another agent to adopt."""
        self._line.close()
        self.page.close()
        os.close(self._pidfd)

    def end(self) -> None:
        """It ends at once, and its disk with it; never fails on a dead one."""
        if self._line.fileno() < 0:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        has_ended(self._pidfd, None)
        self._home.unlink(missing_ok=True)
        self.let_go()

    def _order(self, request: channel.Message) -> None:
        self._tell(request)
        self._line.settimeout(_ANSWER_TIMEOUT_S)
        try:
            while True:
                number, reply = self._line.receive()
                if number == self._number:  # not the answer to an Own
                    break
        except (EOFError, OSError, msgspec.MsgspecError) as error:
            raise VmxError(f"VM {self.vm}: its vmx does not answer: {error}; see {self._log}") from error
        if isinstance(reply, channel.Failed):
            raise VmxError(f"VM {self.vm}: {reply.reason}")

    def _tell(self, request: channel.Message) -> None:
        self._number += 1
        try:
            self._line.send(request, self._number)
        except OSError as error:
            raise VmxError(f"VM {self.vm}: its vmx is gone: {error}; see {self._log}") from error
