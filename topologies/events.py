"""The event record and its writer: one JSON line an event, appended by every process of a run.

    {"t": CLOCK_MONOTONIC in ns, "source": "esx1", "kind": "vm.suspended", "vm": "vm1", ...}

All processes of a run share one kernel, so one monotonic clock orders them. Captures carry
CLOCK_REALTIME; `clock_pair` is recorded at the start and at the end of a run, so the two meet.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class EventLog:
    """Appends events of one source to a file that several processes share.

    Each event is a single write(2) to an O_APPEND descriptor: lines of different processes never mix.
    """

    def __init__(self, path: Path | str, source: str) -> None:
        self.path = Path(path)
        self.source = source
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def emit(self, kind: str, *, t: int | None = None, **fields: Any) -> int:
        """Append an event and return its time; `t` overrides "now" (ns, monotonic)."""
        stamp = time.monotonic_ns() if t is None else t
        record = {"t": stamp, "source": self.source, "kind": kind, **fields}
        try:
            os.write(self._fd, json.dumps(record, separators=(",", ":")).encode() + b"\n")
        except OSError as error:  # a full disk: a record must not decide about a VM
            say(f"event lost: {record}: {error}")
        return stamp

    def close(self) -> None:
        os.close(self._fd)


def say(line: str) -> None:
    """For people, into the process's log; on a full disk the work goes on without."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def clock_pair() -> dict[str, int]:
    """The two clocks read together: {"monotonic": ns, "realtime": ns}."""
    before = time.monotonic_ns()
    realtime = time.time_ns()
    return {"monotonic": (before + time.monotonic_ns()) // 2, "realtime": realtime}


def read_events(path: Path | str) -> list[Event]:
    """All events of a file, ordered by time."""
    with open(path, encoding="utf-8") as lines:
        return sorted((json.loads(line) for line in lines), key=lambda event: event["t"])


def find(events: Iterable[Event], kind: str, **fields: Any) -> list[Event]:
    """The events of a kind whose fields have these values, in order."""
    return [e for e in events if e["kind"] == kind and all(e.get(k) == v for k, v in fields.items())]
