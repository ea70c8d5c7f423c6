"""Network namespaces for live tests, made as Mininet makes its nodes."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyroute2 import netns

from experiments.world import run


class Node:
    """A network namespace, held by a process of its own."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self._holder = subprocess.Popen(["mnexec", "-n", "cat"], stdin=pipe, stdout=pipe, bufsize=0)
        self.pid = self._holder.pid
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.write(b"\n")
        self._holder.stdout.read(1)  # cat answers only once mnexec has made the namespace

    def popen(self, words: list[str], **keywords: Any) -> "subprocess.Popen[bytes]":
        """Start a program in the namespace, as Mininet's node.popen does."""
        return subprocess.Popen(["mnexec", "-da", str(self.pid), *words], **keywords)

    def run(self, *words: str) -> str:
        """Run a program in the namespace to its end."""
        return run("mnexec", "-a", str(self.pid), *words)

    def end(self) -> None:
        """Give the namespace back; the kernel removes its interfaces with it."""
        self._holder.kill()
        self._holder.communicate()


@contextmanager
def inside(pid: int) -> Iterator[None]:
    """This thread is in a process's network namespace: the sockets that it makes belong there."""
    with open(f"/proc/{pid}/ns/net") as there:
        netns.pushns()
        try:
            netns.setns(there.fileno())
            yield
        finally:
            netns.popns()
