"""The NAS: nfs-ganesha (VFS back end, NFSv3 over TCP) and rpcbind in a node of their own, for as long as a block.

    with Nas(plan.nas, folder, popen, logs) as nas:     # hosts mount <nas.management>:<nas.export>
        nas.kill()                                      # kill -9 of the server
        nas.start()

`folder` is what it exports. The two have a /run of their own, where they meet: those of the machine are not in their
way. Without rpcbind ganesha does not serve version 3; without NLM nobody can lock a file, and nobody has to.
"""

import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.children import Child
from topologies.errors import TestbedError
from topologies.plan import Nas as NasPlan

_UP_WITHIN_S, _DOWN_WITHIN_S = 15.0, 10.0
# A mount namespace of its own, for a /run that nobody else sees
_PRIVATE = ("unshare", "--mount", "--propagation", "private")
_PRIVATE_RUN = (*_PRIVATE, "sh", "-c", 'mount -t tmpfs run /run && exec "$@"', "sh")

_CONFIGURATION = """\
NFS_CORE_PARAM {{
  Protocols = 3;
  Bind_addr = {ip};
  NFS_Port = 2049;
  MNT_Port = 20048;
  Enable_NLM = false;
  Enable_RQUOTA = false;
  Enable_UDP = false;
  Mount_Path_Pseudo = true;
{further}}}
EXPORT {{
  Export_Id = 1;
  Path = {folder};
  Pseudo = {export};
  Access_Type = RW;
  Squash = No_Root_Squash;
  SecType = sys;
  Protocols = 3;
  Transports = TCP;
  FSAL {{ Name = VFS; }}
}}
LOG {{ Default_Log_Level = EVENT; }}
"""
# Ganesha 6 wants to be a "dirty page flusher", which takes a capability that a container may lack (prctl(2))
_SINCE_6 = "  allow_set_io_flusher_fail = true;\n"


class Nas:
    """`popen` starts a program in the NAS's node."""

    def __init__(self, plan: NasPlan, folder: Path, popen: Callable[..., Any], logs: Path) -> None:
        self.plan, self.folder = plan, folder
        self._popen, self._logs = popen, logs
        self._rpcbind: Child | None = None
        self._ganesha: Child | None = None
        self._starts = 0

    def __enter__(self) -> "Nas":
        self.folder.mkdir(exist_ok=True)
        try:
            words = (*_PRIVATE_RUN, "rpcbind", "-f", "-w", "-h", self.plan.management)
            rpcbind = self._rpcbind = self._child("rpcbind", *words)
            self._await(rpcbind, lambda: Path(f"/proc/{rpcbind.process.pid}/root/run/rpcbind.sock").exists())
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for child in (self._ganesha, self._rpcbind):
            if child is not None:
                _end(child)

    def start(self) -> None:
        """Until it serves; also again, after `kill`."""
        self._starts += 1
        configuration = self._logs / "ganesha.conf"
        further = _SINCE_6 if _major() >= 6 else ""
        configuration.write_text(
            _CONFIGURATION.format(ip=self.plan.management, folder=self.folder, export=self.plan.export, further=further)
        )
        log = self._logs / f"ganesha.{self._starts}.log"
        beside = ("nsenter", f"--mount=/proc/{self._rpcbind.process.pid}/ns/mnt") if self._rpcbind else ()
        words = ("-F", "-f", str(configuration), "-L", str(log), "-p", "/run/ganesha.pid", "-N", "NIV_EVENT")
        self._ganesha = self._child("ganesha", *beside, "ganesha.nfsd", *words)
        self._await(
            self._ganesha,
            lambda: log.exists() and "NFS SERVER INITIALIZED" in log.read_text(errors="replace"),
            lambda: _complaint(log),
        )

    def kill(self) -> None:
        """kill -9 of the server."""
        if self._ganesha is not None:
            self._ganesha.kill()

    def _child(self, name: str, *words: str) -> Child:
        return Child(name, self._popen, list(words), self._logs / f"{name}.out", self._logs)

    def _await(self, child: Child, is_up: Callable[[], bool], complaint: Callable[[], str] = str) -> None:
        deadline = time.monotonic() + _UP_WITHIN_S
        while not is_up():
            status = child.process.poll()
            if status is not None or time.monotonic() > deadline:
                said = complaint() or child.last_words()
                raise TestbedError(f"the NAS does not serve: {child.name}, exit status {status}: {said}")
            time.sleep(0.01)


def _end(child: Child) -> None:
    child.process.send_signal(signal.SIGTERM)
    try:
        child.process.wait(_DOWN_WITHIN_S)
    except subprocess.TimeoutExpired:
        child.kill()


def _complaint(log: Path) -> str:
    """The last thing that ganesha calls critical or fatal."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line for line in reversed(lines) if re.search(r":(CRIT|FATAL|MAJ) ?:", line)), "")


def _major() -> int:
    said = subprocess.run(["ganesha.nfsd", "-v"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"V(\d+)\.", said)
    return int(found[1]) if found else 0
