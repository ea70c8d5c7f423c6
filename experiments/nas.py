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
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.children import Child, wait_until
from experiments.world import run
from topologies.errors import TestbedError
from topologies.plan import Nas as NasPlan

_UP_WITHIN_S, _DOWN_WITHIN_S = 15.0, 10.0
_SERVES = "NFS SERVER INITIALIZED"  # says ganesha in its log
# A mount namespace of its own, for a /run that nobody else sees
_PRIVATE_RUN = (
    *("unshare", "--mount", "--propagation", "private"),
    *("sh", "-c", 'mount -t tmpfs run /run && exec "$@"', "sh"),
)

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
        self._children: list[Child] = []  # in the order of their starts
        self._beside: tuple[str, ...] = ()  # begins a program where rpcbind runs

    def __enter__(self) -> "Nas":
        self.folder.mkdir(exist_ok=True)
        try:
            rpcbind = self._child("rpcbind", *_PRIVATE_RUN, "rpcbind", "-f", "-w", "-h", self.plan.management)
            process = Path(f"/proc/{rpcbind.process.pid}")
            self._beside = ("nsenter", f"--mount={process}/ns/mnt")
            wait_until(rpcbind, (process / "root/run/rpcbind.sock").exists, time.monotonic() + _UP_WITHIN_S)
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for child in reversed(self._children):
            child.finish(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):  # then it is killed; what it was for is judged elsewhere
                child.process.wait(_DOWN_WITHIN_S)
            child.kill()

    def start(self) -> None:
        """Until it serves; also again, after `kill`."""
        configuration = self._logs / "ganesha.conf"
        further = _SINCE_6 if _major() >= 6 else ""
        configuration.write_text(
            _CONFIGURATION.format(ip=self.plan.management, folder=self.folder, export=self.plan.export, further=further)
        )
        options = ("-F", "-f", str(configuration), "-L", "/dev/stdout", "-p", "/run/ganesha.pid", "-N", "NIV_EVENT")
        ganesha = self._child(f"ganesha.{len(self._children)}", *self._beside, "ganesha.nfsd", *options)
        try:
            wait_until(ganesha, lambda: _SERVES in "".join(ganesha.said()), time.monotonic() + _UP_WITHIN_S)
        except TestbedError as error:
            raise TestbedError(f"the NAS does not serve: {_complaint(ganesha.said())}; {error}") from error

    def kill(self) -> None:
        """kill -9 of the server."""
        self._children[-1].kill()

    def freeze(self) -> None:
        """SIGSTOP; `thaw` lets it go on."""
        self._children[-1].process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._children[-1].process.send_signal(signal.SIGCONT)

    def _child(self, name: str, *words: str) -> Child:
        child = Child(name, self._popen, list(words), self._logs / f"{name}.log", self._logs)
        self._children.append(child)
        return child


def _complaint(said: list[str]) -> str:
    """The last thing that ganesha calls critical or fatal."""
    grave = [line for line in said if re.search(r":(CRIT|FATAL|MAJ) ?:", line)]
    return grave[-1] if grave else "it does not complain of anything"


def _major() -> int:
    """Of ganesha's version, 4 of "NFS-Ganesha Release = V4.3"."""
    said = run("ganesha.nfsd", "-v")
    found = re.search(r"V(\d+)\.", said)
    if found is None:
        raise TestbedError(f"ganesha.nfsd tells no version: {said.strip()}")
    return int(found[1])
