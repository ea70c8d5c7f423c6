"""A run's private world: its own network, mount and PID namespaces with their own Open vSwitch.

    status = run_inside(main)          # the caller waits outside, main() runs as PID 1 inside

Whatever happens to a run, nothing of it survives: the inner process is PID 1 of its PID namespace
and dies with the outer one (PR_SET_PDEATHSIG), and the kernel then ends every process and
namespace of that world. Worlds never meet: not each other, not a system's Open vSwitch.
"""

import ctypes
import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from topologies.errors import TestbedError

# linux/sched.h, linux/prctl.h
_CLONE_NEWNS, _CLONE_NEWPID, _CLONE_NEWNET = 0x00020000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG = 1
_SYS_PIDFD_GETFD = 438
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h

_OVS_RUN, _OVS_ETC, _OVS_LOG = Path("/run/openvswitch"), Path("/etc/openvswitch"), Path("/var/log/openvswitch")
_OVS_SCHEMA = Path("/usr/share/openvswitch/vswitch.ovsschema")
# A folder that only this world sees: for what must not outlive it, whatever happens, like keys.
PRIVATE = _OVS_RUN / "vmotion"
# The kernel gives OVS's packet sockets 212 992 bytes by default and they drop silently beyond it.
_PORT_BUFFER_BYTES = 16 * 2**20

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise TestbedError(f"{what}: {os.strerror(code)}; the kernel must allow namespaces to root")
    return result


# ---------------------------------------------------------------- entering and leaving


def run_inside(main: Callable[[], int]) -> int:
    """Run main() as PID 1 of a new world and return its exit status (130 for Ctrl-C, 143 for TERM)."""
    sys.stdout.flush()
    sys.stderr.flush()
    outer = os.getpid()
    _check(_libc.unshare(_CLONE_NEWPID), "cannot make a PID namespace")
    child = os.fork()
    if child == 0:
        os._exit(_inner(main, outer))

    def forward(number: int, _frame: FrameType | None) -> None:
        os.kill(child, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if not os.WIFSIGNALED(status) else 128 + os.WTERMSIG(status)


def _inner(main: Callable[[], int], outer: int) -> int:
    try:
        _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL), "cannot tie the world to its owner")
        if not Path(f"/proc/{outer}").exists():  # it died before the line above: /proc is still the outer one
            return 128 + signal.SIGKILL
        _take_signals()
        _make_private()
        return main()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _take_signals() -> None:
    """The first INT, TERM or HUP unwinds the run; later ones must not interrupt the taking down.

    Set explicitly: a background job starts with SIGINT ignored, and PID 1 ignores what it has no handler for.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


def _make_private() -> None:
    for folder in (_OVS_RUN, _OVS_ETC, _OVS_LOG):  # absent where OVS never ran
        folder.mkdir(parents=True, exist_ok=True)
    _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET), "cannot make a network and mount namespace")
    run("mount", "--make-rprivate", "/")
    run("mount", "-t", "proc", "proc", "/proc")
    run("mount", "-t", "sysfs", "sysfs", "/sys")  # /sys/class/net shows the namespace it was mounted in
    for folder in (_OVS_RUN, _OVS_ETC, _OVS_LOG):
        run("mount", "-t", "tmpfs", "tmpfs", str(folder))
    PRIVATE.mkdir(mode=0o700)
    run("ip", "link", "set", "lo", "up")


def run(*words: str) -> str:
    """Run a program to its end and return its output; TestbedError with its own words if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise TestbedError(f"{' '.join(words)}: {said[-1] if said else f'exit status {done.returncode}'}")
    return done.stdout


# ---------------------------------------------------------------- Open vSwitch


@contextmanager
def open_vswitch(logs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A private Open vSwitch for the length of the block; yields its ovs-vswitchd."""
    database = _OVS_ETC / "conf.db"
    run("ovsdb-tool", "create", str(database), str(_OVS_SCHEMA))
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        with open(logs / f"{words[0]}.log", "wb") as log:
            daemon = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        daemons.append(daemon)
        return daemon

    try:
        server = start("ovsdb-server", str(database), f"--remote=punix:{_OVS_RUN}/db.sock", "--pidfile", "--no-chdir")
        _wait_for_socket(_OVS_RUN / "db.sock", server)
        run("ovs-vsctl", "--no-wait", "init")
        vswitchd = start("ovs-vswitchd", "--pidfile", "--no-chdir")
        yield vswitchd
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        database.unlink()


def _wait_for_socket(path: Path, owner: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while not path.is_socket():
        if owner.poll() is not None or time.monotonic() > deadline:
            raise TestbedError(f"{owner.args!r} did not come up (exit status {owner.returncode}); see logs/")
        time.sleep(0.005)


def widen_port_buffers(vswitchd: subprocess.Popen[bytes]) -> int:
    """Give each packet socket of OVS large buffers, so that the emulation itself drops nothing.

    net.core.rmem_default would do it for the whole machine; instead the sockets of this world's
    own ovs-vswitchd are borrowed by pidfd_getfd(2). Returns the number of sockets.
    """
    pidfd = os.pidfd_open(vswitchd.pid)
    count = 0
    try:
        for entry in Path(f"/proc/{vswitchd.pid}/fd").iterdir():
            borrowed = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, int(entry.name), 0)
            if borrowed < 0 and ctypes.get_errno() == errno.EBADF:  # closed while we looked
                continue
            _check(borrowed, "the sockets of ovs-vswitchd cannot be borrowed")
            if not stat.S_ISSOCK(os.fstat(borrowed).st_mode):
                os.close(borrowed)
                continue
            with socket.socket(fileno=borrowed) as port:
                if port.family == socket.AF_PACKET:
                    port.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _PORT_BUFFER_BYTES)
                    port.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _PORT_BUFFER_BYTES)
                    count += 1
    finally:
        os.close(pidfd)
    return count


# ---------------------------------------------------------------- what is left


def leftovers() -> set[str]:
    """What is in this world beside this process: processes, network devices, namespaces held by a mount."""
    while True:  # orphans were adopted by PID 1: collect those that have ended
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                break
        except ChildProcessError:
            break
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
                continue
            found.add(f"process {entry.name} {command}")
    found |= {f"device {name}" for _, name in socket.if_nameindex() if name != "lo"}
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return found | {f"namespace {mount.split()[4]}" for mount in mounts if " - nsfs " in mount}
