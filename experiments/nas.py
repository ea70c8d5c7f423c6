"""The NAS: nfs-ganesha (VFS back end, NFSv3 over TCP) and rpcbind in a node of their own, for as long as a block.

    with Nas(plan.nas, folder, popen, logs) as nas:     # hosts mount <nas.management>:<nas.export>
        nas.kill()                                      # kill -9 of the server
        nas.start()

`folder` is what it exports; its files are plain files there, also afterwards. Where the folder's file system cannot be
exported (a tmpfs, a container's overlay) or the NAS shall have a size, its disk is in memory: mounted over the folder,
and copied into it at the end. After a kill -9 of the run such files are gone; no mount ever outlives the run's world.

The two programs have a /run of their own, where they meet: those of the machine are not in their way. Without rpcbind
ganesha does not serve version 3; without NLM nobody can lock a file, and nobody has to.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from experiments.children import Child, wait_until
from experiments.world import PRIVATE, run
from topologies.errors import TestbedError
from topologies.plan import Nas as NasPlan

_UP_WITHIN_S, _DOWN_WITHIN_S = 15.0, 10.0
# As stat(1) calls them: these two give file handles (name_to_handle_at(2)) and ganesha 6 takes them, which no tmpfs is
_EXPORTABLE = ("ext2/ext3", "xfs")
_SERVES = "NFS SERVER INITIALIZED"  # says ganesha in its log
_COPY = ("cp", "-R", "--sparse=always", "--preserve=mode,ownership,timestamps,links")

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
    """`popen` starts a program in the NAS's node. With `size_bytes` its disk is that small."""

    def __init__(
        self, plan: NasPlan, folder: Path, popen: Callable[..., Any], logs: Path, size_bytes: int | None = None
    ) -> None:
        self.plan, self.folder, self._size_bytes = plan, folder, size_bytes
        self._disk = ExitStack()
        self._popen, self._logs = popen, logs
        self._children: list[Child] = []  # in the order of their starts
        self._beside: tuple[str, ...] = ()  # begins a program where rpcbind runs

    def __enter__(self) -> "Nas":
        self.folder.mkdir(exist_ok=True)
        try:
            if self._size_bytes or run("stat", "-f", "-c", "%T", str(self.folder)).strip() not in _EXPORTABLE:
                self._disk.enter_context(_memory_disk(self.folder, self._size_bytes))
            rpcbind = self._child("rpcbind", *_private_run(), "rpcbind", "-f", "-w", "-h", self.plan.management)
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
        self._disk.close()

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
        refused = [line for line in ganesha.said() if ":CRIT :" in line and str(self.folder) in line]
        if refused:  # then it serves nothing
            raise TestbedError(f"the NAS cannot export its folder: {refused[0]}")

    def kill(self) -> None:
        """kill -9 of the server."""
        self._children[-1].kill()

    def freeze(self) -> None:
        """SIGSTOP; `thaw` lets it go on."""
        ganesha = self._children[-1]
        ganesha.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{ganesha.process.pid}/task")  # each of its threads stops when it gets to it

        def stands_still() -> bool:
            return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.iterdir())

        wait_until(ganesha, stands_still, time.monotonic() + _DOWN_WITHIN_S)

    def thaw(self) -> None:
        self._children[-1].process.send_signal(signal.SIGCONT)

    def _child(self, name: str, *words: str) -> Child:
        child = Child(name, self._popen, list(words), self._logs / f"{name}.log", self._logs)
        self._children.append(child)
        return child


@contextmanager
def _memory_disk(folder: Path, size_bytes: int | None) -> Iterator[None]:
    """A tmpfs over the folder, behind an overlay: that has a type which ganesha 6 does not refuse, and file handles."""
    disk = PRIVATE / "nas"
    disk.mkdir()
    with ExitStack() as stack:
        stack.callback(disk.rmdir)
        size = f"size={size_bytes}" if size_bytes else "size=50%"
        run("mount", "-t", "tmpfs", "-o", size, "nas", str(disk))
        stack.callback(run, "umount", str(disk))
        for name in ("lower", "upper", "work"):
            (disk / name).mkdir()
        # upper's files are copied when nobody can change them any more; disks are sparse
        stack.callback(run, *_COPY, f"{disk}/upper/.", str(folder))
        layers = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work"
        try:
            run("mount", "-t", "overlay", "-o", f"{layers},index=on,nfs_export=on", "nas", str(folder))
        except TestbedError as error:
            raise TestbedError(f"{error}; without overlayfs the NAS needs an ext4 or xfs folder (--out)") from error
        stack.callback(run, "umount", str(folder))
        yield


def _private_run() -> tuple[str, ...]:
    """Begins a program in the run's mount namespace, where the disk is and a node's is not, but with its own /run."""
    return (
        *("nsenter", f"--mount=/proc/{os.getpid()}/ns/mnt", "unshare", "--mount", "--propagation", "private"),
        *("sh", "-c", 'mount -t tmpfs run /run && exec "$@"', "sh"),
    )


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
