"""The processes of a VM, guest and vmx, seen from an agent: how they are reached, whether they live, what they said."""

import os
import select
import signal
import socket
import struct
from pathlib import Path

CONNECT_WITHIN_S = 10.0
ROOT = Path(__file__).parent.parent  # what their programs are imported from


def connect(home: Path) -> socket.socket:
    """A connection to the process that listens on a Unix socket."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(CONNECT_WITHIN_S)
        connection.connect(str(home))
    except BaseException:
        connection.close()
        raise
    return connection


def has_ended(pidfd: int, within_ms: int | None = 0) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(within_ms))


def end_behind(home: Path) -> bool:
    """End the guest or vmx behind a socket, which need not answer and has no agent any more; False if there is none."""
    try:
        with connect(home) as connection:
            pid, _, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            pidfd = os.pidfd_open(pid)
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if not {b"hosts.light_guest", b"hosts.vmx_process"} & set(words):
                    return False  # the agent that has made the socket: the process has not begun to listen
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                has_ended(pidfd, None)
            finally:
                os.close(pidfd)
    except (FileNotFoundError, ConnectionRefusedError, ProcessLookupError):
        return False
    finally:
        home.unlink(missing_ok=True)
    return True


def last_words(log: Path, begin: int) -> str:
    """The last line that was written behind `begin`, as the end of a sentence; empty if there is none."""
    lines = log.read_bytes()[begin:].decode(errors="replace").split("\n")
    last = next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")
    return f" ({last})" if last else ""
