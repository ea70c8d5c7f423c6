"""A virtual machine as its host's agent handles it: the Guest interface, and the light guest behind it.

A guest owns its RAM (hosts/ram.py) and a network namespace with the device eth0, which the agent
connects to a vSwitch (hosts/vswitch.py). Its life:

    power_on ---> running <---> suspended          source: suspend gives the device state
    await_state -> restored --> running            target: RAM arrives, then restore, then run
"""

import os
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from hosts import channel
from hosts.ram import DirtyBitmap, Ram, open_bitmap
from hosts.urgency import hurry, relax
from topologies.errors import TestbedError
from topologies.plan import VM

# A request that changes nothing outside the guest is answered in milliseconds; filling RAM takes 0.6 s a GiB.
_ANSWER_TIMEOUT_S = 10
_BOOT_TIMEOUT_S = 120

_ROOT = Path(__file__).parent.parent  # what the program is imported from
_Reply = TypeVar("_Reply", bound=channel.Message)


class GuestError(TestbedError):
    """The guest process refused, failed or is gone."""


class Guest(ABC):
    """What the migration engine needs of a virtual machine."""

    vm: VM
    ram: Ram
    bitmap: DirtyBitmap  # these two are valid once it is powered on or awaits its state
    tracking: str  # how the bitmap is read (hosts/ram.py)

    @property
    @abstractmethod
    def pid(self) -> int:
        """A process in the VM's network namespace."""

    @abstractmethod
    def power_on(self) -> None:
        """Run with fresh RAM."""

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
    def check(self) -> None:
        """GuestError if it has ended: what its bitmap says then is nothing."""

    @abstractmethod
    def power_off(self) -> None:
        """End it, running or not, and give back its RAM; never fails on a dead guest."""


class LightGuest(Guest):
    """hosts/light_guest.py in a process and a network namespace of its own."""

    def __init__(self, vm: VM, log: Path) -> None:
        self.vm, self._log = vm, log
        self.ram = Ram.create(vm.name, vm.ram)
        self._channel, theirs = socket.socketpair()
        # the new mount namespace is for /sys, which shows the network namespace it is mounted in
        inside = 'mount -t sysfs sysfs /sys && exec "$@"'
        program = [sys.executable, "-m", "hosts.light_guest", str(theirs.fileno()), str(self.ram.fd)]
        with theirs, open(log, "ab") as out:
            self._process = subprocess.Popen(
                ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", inside, "sh", *program],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                pass_fds=(theirs.fileno(), self.ram.fd),
                start_new_session=True,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # its thread pool would only cost memory
                cwd=_ROOT,
            )
        self._channel.settimeout(_ANSWER_TIMEOUT_S)
        try:
            self._answer(channel.Done)  # it has its namespaces now
        except GuestError:
            self.power_off()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def power_on(self) -> None:
        self._begin(channel.Boot(self.vm), _BOOT_TIMEOUT_S)

    def await_state(self) -> None:
        self._begin(channel.Await(self.vm), _ANSWER_TIMEOUT_S)

    def _begin(self, request: channel.Message, timeout_s: float) -> None:
        self._tell(request, timeout_s)
        ready = self._answer(channel.Ready)
        self.bitmap = open_bitmap(ready.tracking, self.pid, ready.address, self.ram)
        self.tracking = ready.tracking

    def suspend(self) -> bytes:
        hurry(self.pid)
        self._tell(channel.Suspend())
        return self._answer(channel.State).device

    def restore(self, device: bytes) -> None:
        hurry(self.pid)
        self._tell(channel.Restore(device))
        self._answer(channel.Done)

    def run(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._tell(channel.Run())
        meanwhile()
        self._answer(channel.Done)
        relax(self.pid)

    def check(self) -> None:
        if self._process.poll() is not None:
            raise self._gone(ChildProcessError("it has ended"))

    def power_off(self) -> None:
        self._process.kill()
        self._process.wait()
        self._channel.close()
        self.ram.close()

    def _tell(self, request: channel.Message, timeout_s: float = _ANSWER_TIMEOUT_S) -> None:
        self._channel.settimeout(timeout_s)
        try:
            channel.send(self._channel, request)
        except OSError as error:
            raise self._gone(error) from error

    def _answer(self, expected: type[_Reply]) -> _Reply:
        try:
            reply = channel.receive(self._channel)
        except (EOFError, OSError, msgspec.MsgspecError) as error:
            raise self._gone(error) from error
        if isinstance(reply, channel.Failed):
            raise GuestError(f"VM {self.vm.name}: {reply.reason}")
        if not isinstance(reply, expected):
            raise GuestError(f"VM {self.vm.name} answered {type(reply).__name__} where {expected.__name__} was due")
        return reply

    def _gone(self, error: Exception) -> GuestError:
        status = self._process.poll()
        how = f"ended with status {status}" if status is not None else f"does not answer ({error})"
        return GuestError(f"VM {self.vm.name}: its guest process {self.pid} {how}; see {self._log}")
