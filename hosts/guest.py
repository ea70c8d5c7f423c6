"""A virtual machine as its host's agent handles it: the Guest interface, and the light guest behind it.

A guest owns its RAM (hosts/ram.py) and a network namespace with the device eth0, which the agent
connects to a vSwitch (hosts/vswitch.py). Its life:

    power_on ---> running <---> suspended          source: suspend gives the device state
    await_state -> restored --> running            target: RAM arrives, then restore, then run

It outlives its agent, unless it is new or awaits its state: the next agent finds its socket and adopts it.
"""

import os
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from hosts import channel
from hosts.guest_memory import WORK_WORD
from hosts.processes import ROOT, connect, has_ended, last_words
from hosts.ram import DirtyBitmap, Ram, open_bitmap
from hosts.urgency import hurry, relax
from hosts.userfaults import UserFaults
from topologies.errors import TestbedError
from topologies.plan import VM

# A request that changes nothing outside the guest is answered in milliseconds; filling RAM takes 0.6 s a GiB.
_ANSWER_TIMEOUT_S = 10
_BOOT_TIMEOUT_S = 120

# Of the name of a guest's socket while pages are still to come to it (post-copy)
_INCOMPLETE = ".incomplete"

_Reply = TypeVar("_Reply", bound=channel.Message)


class GuestError(TestbedError):
    """The guest process refused, failed or is gone."""


class GuestEnded(GuestError):
    """Nobody is behind this socket any more."""


class Guest(ABC):
    """What the migration engine needs of a virtual machine."""

    vm: VM
    memo: bytes  # what an agent notes for the one after it
    pid: int  # a process in the VM's network namespace
    ram: Ram
    bitmap: DirtyBitmap
    tracking: str  # how the bitmap is read (hosts/ram.py)
    userfaults: UserFaults | None  # None where the kernel has none

    @property
    @abstractmethod
    def state(self) -> str:
        """A channel.GuestState, or "dead"."""

    @property
    @abstractmethod
    def work(self) -> int:
        """How much its workload has done since it was powered on, in pages written: does it run, and how fast?"""

    @abstractmethod
    def power_on(self, nvram: bytes) -> channel.Booted:
        """Run with fresh RAM, what is on its disk, and the nvram of its last shut-down, empty if there was none."""

    @abstractmethod
    def await_state(self) -> None:
        """Be the target of a migration: RAM is mapped, nothing runs."""

    @abstractmethod
    def suspend(self) -> bytes:
        """Stop; returns the device state. Its port must be dark. `run` continues."""

    @abstractmethod
    def restore(self, device: bytes) -> None:
        """Take over a device state; RAM is complete, the port still dark."""

    @abstractmethod
    def run(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Run, after `restore` or after a `suspend` in vain; `meanwhile` is called once it has been told to."""

    @abstractmethod
    def shut_down(self) -> bytes:
        """Stop for good, with all that it has done on its disk; returns its nvram."""

    @abstractmethod
    def throttle(self, share: float) -> None:
        """Keep it from running for this share of its time, 0 to 0.99."""

    @abstractmethod
    def expect_missing(self) -> UserFaults:
        """From now on an access to a page that does not exist waits until it is placed (post-copy)."""

    @abstractmethod
    def missing_over(self) -> list[float]:
        """RAM is whole; returns the waits of its own accesses meanwhile, in microseconds."""

    @abstractmethod
    def check(self) -> None:
        """GuestError if it has ended: what its bitmap says then is nothing."""

    @abstractmethod
    def let_go(self) -> None:
        """Leave it as it is, for another agent to adopt."""

    @abstractmethod
    def kill(self) -> None:
        """End it at once, from any thread; whoever waits for its answer has a GuestError."""

    @abstractmethod
    def power_off(self) -> None:
        """End it, running or not, and give back its RAM; never fails on a dead guest."""


class LightGuest(Guest):
    """hosts/light_guest.py in a process and a network namespace of its own. Made by `start` or `adopt`."""

    def __init__(self, home: Path, log: Path, connection: socket.socket, process: "subprocess.Popen[bytes] | None"):
        """Hear the guest's first words on a connection to its socket `home`; `process` if it is a child of ours."""
        self._log, self._line, self._process = log, channel.Line(connection), process
        self._number = 0  # of the latest request
        self._home = home
        hello, (ram, self._pidfd, *others) = self._line.receive_with_descriptors()
        self.pid, self.tracking, self.vm, self.memo = hello.pid, hello.tracking, hello.vm, hello.memo
        self._state = hello.state
        with ExitStack() as undo:
            for descriptor in (self._pidfd, *others):
                undo.callback(os.close, descriptor)
            self.ram = Ram(ram)
            undo.callback(self.ram.close)
            self.bitmap = open_bitmap(hello.tracking, hello.pid, hello.address, self.ram)
            undo.callback(self.bitmap.close)
            undo.callback(self._line.close)
            self._let_go = undo.pop_all()
        writes = hello.tracking == "wp-async"
        self.userfaults = UserFaults(others[0], hello.address, self.ram.size, writes) if others else None

    @classmethod
    def start(cls, vm: VM, memo: bytes, home: Path, log: Path, disk: socket.socket, page: int) -> "LightGuest":
        """A new guest, in namespaces of its own; it is reached by the socket `home`.

        `disk`: its end of the channel to its vmx, `page`: a descriptor of their lease page.
        """
        # the new mount namespace is for /sys, which shows the network namespace it is mounted in
        inside = 'mount -t sysfs sysfs /sys && exec "$@"'
        with socket.socket(socket.AF_UNIX) as listener, open(log, "ab") as out:
            said_before = out.tell()  # by earlier guests of this VM
            try:
                listener.bind(str(home))
                listener.listen()
                connection = connect(home)  # before there is a guest: should we end now, it will notice
            except OSError as error:
                raise GuestError(f"VM {vm.name}: no socket {home} for its guest: {error.strerror}") from error
            descriptors = (listener.fileno(), disk.fileno(), page)
            program = [sys.executable, "-m", "hosts.light_guest", *map(str, descriptors), vm.name, str(vm.ram)]
            process = subprocess.Popen(
                ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", inside, "sh", *program],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                pass_fds=descriptors,
                start_new_session=True,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # its thread pool would only cost memory
                cwd=ROOT,
            )
        try:
            guest = cls(home, log, connection, process)
        except (EOFError, OSError, msgspec.MsgspecError, TestbedError) as error:
            process.kill()
            status = process.wait()
            connection.close()
            home.unlink()
            if isinstance(error, TestbedError):
                raise GuestError(f"VM {vm.name} cannot be started: {error}") from error
            said = last_words(log, said_before)
            raise GuestError(f"VM {vm.name}: its guest process ended with status {status}{said}; see {log}") from error
        guest.vm, guest.memo = vm, memo
        return guest

    @classmethod
    def adopt(cls, home: Path, log: Path) -> "LightGuest":
        """The guest behind a socket, which another agent has started. GuestEnded if there is none any more."""
        try:
            with ExitStack() as undo:
                connection = undo.enter_context(connect(home))
                connection.settimeout(_BOOT_TIMEOUT_S)  # it may be filling its RAM
                guest = cls(home, log, connection, None)
                undo.pop_all()
            return guest
        except TimeoutError:
            raise GuestError(f"the guest at {home} does not answer, or another agent has it; see {log}") from None
        except (EOFError, ConnectionError, FileNotFoundError) as error:
            home.unlink(missing_ok=True)
            raise GuestEnded(f"the guest at {home} has ended; see {log}") from error
        except (OSError, msgspec.MsgspecError) as error:  # it may live: its socket stays
            raise GuestError(f"the guest at {home} cannot be reached: {error}; see {log}") from error

    @property
    def state(self) -> str:
        return "dead" if has_ended(self._pidfd) else self._state

    @property
    def work(self) -> int:
        return int(self.ram.words[0, WORK_WORD]) if self._line.fileno() >= 0 else 0  # (its RAM is given back)

    def power_on(self, nvram: bytes) -> channel.Booted:
        self._tell(channel.Boot(self.vm, self.memo, nvram), _BOOT_TIMEOUT_S)
        booted = self._answer(channel.Booted)
        self._state = "running"
        return booted

    def await_state(self) -> None:
        self._order(channel.Await(self.vm, self.memo), "awaiting")

    def suspend(self) -> bytes:
        hurry(self.pid)
        self._tell(channel.Suspend())
        self._state = "suspended"
        return self._answer(channel.State).device

    def restore(self, device: bytes) -> None:
        hurry(self.pid)
        self._order(channel.Restore(device), "restored")

    def run(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._order(channel.Run(), "running", meanwhile=meanwhile)
        relax(self.pid)

    def shut_down(self) -> bytes:
        self._tell(channel.Shutdown())
        nvram = self._answer(channel.Halted).nvram
        self._state = "suspended"
        return nvram

    def throttle(self, share: float) -> None:
        self._tell(channel.Throttle(share))
        self._answer(channel.Done)

    def expect_missing(self) -> UserFaults:
        if self.userfaults is None:
            raise GuestError(f"VM {self.vm.name}: this kernel has no userfaultfd, which post-copy needs")
        self._move_home(_INCOMPLETE)
        self.userfaults.watch_missing()
        self._tell(channel.Missing(True))
        self._answer(channel.Waits)
        return self.userfaults

    def missing_over(self) -> list[float]:
        if self.userfaults is None:
            return []
        self._tell(channel.Missing(False))
        waits = self._answer(channel.Waits).us
        self.userfaults.unwatch()
        if self.userfaults.tracks_writes:
            self.userfaults.watch_writes()
        self._move_home("")
        return waits

    def _move_home(self, suffix: str) -> None:
        """Where another agent would find it says whether there is anything to adopt."""
        self._home = self._home.rename(self._home.with_suffix(suffix))

    def check(self) -> None:
        if has_ended(self._pidfd):
            raise self._gone(ChildProcessError("it has ended"))

    def let_go(self) -> None:
        self._let_go.close()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def power_off(self) -> None:
        if self._line.fileno() < 0:
            return
        self.kill()
        if self._process is not None:
            self._process.wait()
        has_ended(self._pidfd, None)
        self._home.unlink(missing_ok=True)
        self._let_go.close()

    def _order(
        self,
        request: channel.Message,
        state: str,
        timeout_s: float = _ANSWER_TIMEOUT_S,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Have something done that leads to a state; `meanwhile` is called once it has been told to."""
        self._tell(request, timeout_s)
        meanwhile()
        self._answer(channel.Done)
        self._state = state

    def _tell(self, request: channel.Message, timeout_s: float = _ANSWER_TIMEOUT_S) -> None:
        self._line.settimeout(timeout_s)
        self._number += 1
        try:
            self._line.send(request, self._number)
        except OSError as error:
            raise self._gone(error) from error

    def _answer(self, expected: type[_Reply]) -> _Reply:
        try:
            while True:
                number, reply = self._line.receive()
                if number == self._number:  # not one to an earlier request, which comes too late
                    break
        except (EOFError, OSError, msgspec.MsgspecError) as error:
            raise self._gone(error) from error
        if isinstance(reply, channel.Failed):
            raise GuestError(f"VM {self.vm.name}: {reply.reason}")
        if not isinstance(reply, expected):
            raise GuestError(f"VM {self.vm.name} answered {type(reply).__name__} where {expected.__name__} was due")
        return reply

    def _gone(self, error: Exception) -> GuestError:
        how = f"does not answer ({error})"
        if has_ended(self._pidfd):
            status = self._process and self._process.wait()
            how = "has ended" if status is None else f"ended with status {status}"
        return GuestError(f"VM {self.vm.name}: its guest process {self.pid} {how}; see {self._log}")


def is_whole(home: Path) -> bool:
    """Whether the guest of this socket has all of its RAM: else it cannot go on without the agent that it had."""
    return home.suffix != _INCOMPLETE
