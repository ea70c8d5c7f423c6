"""One run of an experiment: its options, its results folder, its events, its manifest.

results/<experiment>-<UTC time>/     summary.json  events.jsonl  manifest.json  capture.pcapng  pcap/  logs/
results/latest                       a link to the newest
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from hosts.policy import Policy
from hosts.stream import PEER_TIMEOUT_S
from hosts.transport import Transport
from topologies.errors import UsageError
from topologies.events import EventLog, clock_pair, find, read_events
from topologies.plan import Plan

# Who tells the physical switch where to send a frame: ours; the textbook's; nobody, OVS learns by itself (NORMAL);
# and one of others (experiments/faucet.py)
CONTROLLERS = ("mobility", "learning-switch", "standalone", "faucet")
RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Options:
    """What a person chose, checked; `plan` has the VM options applied."""

    plan: Plan
    plan_file: Path
    announce: str
    schedule_ms: tuple[int, ...]
    policy: Policy
    seed: int
    out: Path | None
    transport: Transport = field(default_factory=Transport)
    only: tuple[str, ...] = ()  # of an experiment with cases: which
    long: bool = False
    datastore: str = "nfs"  # or "local"
    controller: str = "mobility"  # or one to compare with (experiments/testbed.py)
    migrations: int = 1  # of an experiment that repeats one
    peer_timeout_s: float = PEER_TIMEOUT_S
    command_line: tuple[str, ...] = field(default=tuple(sys.argv))


class Run:
    """A run that has begun: the folder exists, events can be written."""

    def __init__(self, experiment: str, options: Options) -> None:
        self.experiment, self.options = experiment, options
        self.folder = _new_folder(experiment, options.out)
        self.logs, self.pcap = self.folder / "logs", self.folder / "pcap"
        for folder in (self.logs, self.pcap):
            folder.mkdir()
        self.events_file = self.folder / "events.jsonl"
        self.events = EventLog(self.events_file, "testbed")
        self._write("manifest.json", self._manifest())
        self.events.emit("run.begin", experiment=experiment, clocks=clock_pair())

    @property
    def plan(self) -> Plan:
        return self.options.plan

    def wall_s(self) -> dict[str, float]:
        """How long the run took: until its first testbed stood, and from then on until now."""
        events = read_events(self.events_file)
        begun = events[0]["t"]
        up = next((event["t"] for event in find(events, "testbed.up")), begun)
        return {"setup": (up - begun) / 1e9, "rest": (time.monotonic_ns() - up) / 1e9}

    def write_summary(self, summary: dict[str, Any]) -> None:
        """summary.json, the last file of a run; then everything belongs to the person who called sudo."""
        self.events.emit("run.end", verdict=summary["verdict"], clocks=clock_pair())
        self._write("summary.json", summary)
        owner = os.environ.get("SUDO_UID", ""), os.environ.get("SUDO_GID", "")
        if all(number.isdigit() for number in owner):
            uid, gid = map(int, owner)
            for path in (self.folder, *self.folder.rglob("*")):
                os.chown(path, uid, gid, follow_symlinks=False)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _manifest(self) -> dict[str, Any]:
        return {
            "experiment": self.experiment,
            "command_line": list(self.options.command_line),
            "begun": datetime.now(UTC).isoformat(timespec="seconds"),
            "kernel": platform.release(),
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs",
            "python": platform.python_version(),
            "versions": {program: _version(*words) for program, words in _PROGRAMS.items()},
            "plan_file": str(self.options.plan_file),
            "plan": asdict(self.options.plan),
            "policy": msgspec.structs.asdict(self.options.policy),
            "transport": msgspec.structs.asdict(self.options.transport),
            "announce": {"mode": self.options.announce, "schedule_ms": list(self.options.schedule_ms)},
            "controller": self.options.controller,
            "seed": self.options.seed,
        }


_PROGRAMS = {
    "openvswitch": ("ovs-vswitchd", "--version"),
    "dumpcap": ("dumpcap", "--version"),
    "iproute2": ("ip", "-V"),
    "ping": ("ping", "-V"),
}


def _version(*words: str) -> str:
    out = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+(\.\d+)+|iproute2-[\w.]+|\b20\d{6}\b", out)
    return found[0] if found else "unknown"


def _new_folder(experiment: str, out: Path | None) -> Path:
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"the results folder {out} is occupied; name a new or an empty one")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the results folder {out} cannot be made: {error.strerror}") from error
        return out.resolve()
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    RESULTS.mkdir(exist_ok=True)
    for suffix in ("", *(f".{number}" for number in range(2, 100))):  # runs that begin in the same second
        folder = RESULTS / f"{experiment}-{stamp}Z{suffix}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        _point_latest_at(folder)
        return folder
    raise UsageError(f"there are a hundred runs of {experiment} in this second; wait for one")


def _point_latest_at(folder: Path) -> None:
    draft = folder.with_name(f".latest-{folder.name}")
    draft.symlink_to(folder.name)
    draft.replace(RESULTS / "latest")
