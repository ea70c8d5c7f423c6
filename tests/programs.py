"""Runs ./vmotion as a person would, and watches what it leaves behind."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# A small VM: the same parts and the same phases in a third of the time
SMALL = ("--ram", "96MiB", "--working-set", "8MiB", "--dirty-rate", "20MB/s")


class Program:
    """A ./vmotion process; `out` is its results folder."""

    def __init__(self, out: Path, *words: str) -> None:
        self.out = out
        self.process = subprocess.Popen(
            [str(ROOT / "vmotion"), *words, "--out", str(out)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def events(self) -> list[dict[str, Any]]:
        file = self.out / "events.jsonl"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]

    def wait_for(self, kind: str, timeout_s: float = 60) -> None:
        """Until an event of this kind is recorded."""
        eventually(
            lambda: any(event["kind"] == kind for event in self.events()), f"event {kind}", timeout_s, self.process
        )

    def descendants(self) -> dict[int, str]:
        """pid -> command line of every process below this one."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    stat = (entry / "stat").read_text()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
        found, todo = {}, [self.process.pid]
        while todo:
            for pid in children.get(todo.pop(), []):
                found[pid] = command_line(pid)
                todo.append(pid)
        return found

    def find(self, *words: str) -> int:
        """The pid of the descendant with all of these words in its command line."""
        (pid,) = [pid for pid, command in self.descendants().items() if all(word in command.split() for word in words)]
        return pid

    def end(self, timeout_s: float = 90) -> tuple[int, str, str]:
        """(exit status, stdout, stderr)."""
        try:
            out, err = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        return self.process.returncode, out, err

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.out / "summary.json").read_text())
        return summary


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def eventually(
    condition: Callable[[], bool], what: str, timeout_s: float = 20, process: subprocess.Popen[str] | None = None
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process is None or process.poll() is None, f"ended before {what}: {process.communicate()}"
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.02)


def nothing_is_left(pids: dict[int, str]) -> None:
    """None of these processes lives on (a number may be in use again, by another program)."""

    def alive() -> list[str]:
        return [command for pid, command in pids.items() if command and command_line(pid) == command]

    eventually(lambda: not alive(), "end of all processes", 10)
