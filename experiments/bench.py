"""vmotion bench: the figures that this project promises, each measured here and now, beside its target.

Ratios are taken within one run, pair by pair, because machines differ and are noisy. Groups:

    cable   iperf3 and a migration in turn on the same cable, nothing else running: goodput, downtime, total time
    demo    the demo as a person runs it, probes and captures included: downtime, client, wall time, memory
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.preflight import check_machine
from experiments.run import Options, Run
from experiments.testbed import Testbed
from experiments.timeline import timeline
from experiments.world import run as run_program
from experiments.world import run_inside
from hosts.announce import SCHEDULE_MS
from hosts.policy import Policy
from topologies.errors import TestbedError, UsageError
from topologies.events import read_events
from topologies.plan import DEFAULT_PLAN, Plan, read_plan
from topologies.units import format_bitrate, format_size

_IPERF_S = 2
_CABLE_GOODPUT = 0.95
_DOWNTIME_MS = 50.0
_DEMO_WALL_S = 25.0
_AGENT_MIB = 80.0


@dataclass(frozen=True)
class Row:
    """One figure. `ratio` is to the `reference`; `met` is None where there is no target."""

    name: str
    conditions: str
    unit: str
    n: int
    median: float
    low: float
    high: float
    p99: float
    reference: float | None
    ratio: float | None
    target: str
    met: bool | None


def row(name: str, conditions: str, unit: str, samples: Sequence[float], at_most: float | None = None) -> Row:
    """A figure that should be low: its median against `at_most`."""
    middle = statistics.median(samples)
    target, met = ("", None) if at_most is None else (f"<= {at_most:g}", middle <= at_most)
    return Row(name, conditions, unit, *_spread(samples), None, None, target, met)


def ratio_row(
    name: str, conditions: str, unit: str, samples: Sequence[float], references: Sequence[float], at_least: float
) -> Row:
    """A figure against a reference measured beside it, pair by pair."""
    ratio = statistics.median(sample / reference for sample, reference in zip(samples, references, strict=True))
    spread = _spread(samples)
    return Row(
        name, conditions, unit, *spread, statistics.median(references), ratio, f">= {at_least:g}", ratio >= at_least
    )


def _spread(samples: Sequence[float]) -> tuple[int, float, float, float, float]:
    """n, median, lowest, highest, 99th percentile (nearest rank: the highest of fewer than a hundred)."""
    ordered = sorted(samples)
    rank = -(-99 * len(ordered) // 100) - 1
    return len(ordered), statistics.median(ordered), ordered[0], ordered[-1], ordered[rank]


# ---------------------------------------------------------------- the groups


def cable(samples: int) -> list[Row]:
    """iperf3, then a migration, in turn, back and forth."""
    plan = read_plan()
    with tempfile.TemporaryDirectory(prefix="vmotion-bench-") as folder:
        out = Path(folder) / "samples.json"

        def measure() -> int:
            options = Options(plan, DEFAULT_PLAN, "rarp", SCHEDULE_MS, Policy(), 1, Path(folder) / "run")
            out.write_text(json.dumps(_cable_samples(Run("bench", options), samples)))
            return 0

        if run_inside(measure):
            raise TestbedError("bench: the group cable failed, see above")
        measured = json.loads(out.read_text())
    vm = plan.vms[0]
    where = f"{format_size(vm.ram)}, {vm.fill:.0%} filled, {vm.dirty_rate / 1e6:g} MB/s over "
    where += f"{format_size(vm.working_set)}, {format_bitrate(plan.link)}"
    return [
        ratio_row(
            "pre-copy goodput / iperf3", where, "Mbit/s", measured["goodput"], measured["iperf3"], _CABLE_GOODPUT
        ),
        row("downtime, no client", where, "ms", measured["downtime"], _DOWNTIME_MS),
        row("total time, no client", where, "ms", measured["total"]),
    ]


def _cable_samples(run: Run, samples: int) -> dict[str, list[float]]:
    vm, measured = run.plan.vms[0], {"iperf3": [], "goodput": [], "downtime": [], "total": []}  # type: ignore[var-annotated]
    with Testbed(run) as testbed:
        testbed.vcenter.power_on(vm.name)
        for _ in range(samples):
            measured["iperf3"].append(_iperf3(testbed, run.plan))
            here = testbed.vcenter.places[vm.name]
            there = next(host.name for host in run.plan.hosts if host.name != here)
            result = testbed.vcenter.migrate(vm.name, there)
            line = timeline(read_events(run.events_file), result.migration, vm.mac)
            longest = max(result.outcome.rounds, key=lambda r: r.bytes)
            measured["goodput"].append(longest.bytes * 8 / longest.ms / 1000)
            measured["downtime"].append(line.downtime_ms)
            measured["total"].append(line.total_ms)
    return measured


def _iperf3(testbed: Testbed, plan: Plan) -> float:
    """TCP payload rate from the first host to the second over the vMotion cable, Mbit/s."""
    first, second = plan.hosts
    server = testbed.popen(second.name)(
        ["iperf3", "--server", "--one-off", "--bind", second.vmotion_port.ip, "--forceflush"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    try:
        while "listening" not in server.stdout.readline().decode():
            if server.poll() is not None:
                raise TestbedError(f"iperf3 server ended with status {server.returncode}")
        client = ["iperf3", "--client", second.vmotion_port.ip, "--bind", first.vmotion_port.ip]
        pid = str(testbed.net[first.name].pid)
        report = json.loads(run_program("mnexec", "-a", pid, *client, "--time", str(_IPERF_S), "--json"))
    finally:
        server.kill()
        server.communicate()
    return float(report["end"]["sum_received"]["bits_per_second"]) / 1e6


def demo(samples: int) -> list[Row]:
    """The whole demo, each in a process of its own."""
    summaries = [_one_demo() for _ in range(samples)]

    def each(figure: Callable[[dict[str, Any]], float]) -> list[float]:
        return [figure(summary) for summary in summaries]

    where = "default demo: ping, UDP, transactions and bulk TCP running, captures on"
    return [
        row("downtime", where, "ms", each(lambda s: s["migration"]["downtime_ms"]), _DOWNTIME_MS),
        row("UDP gap", where, "ms", each(lambda s: s["network"]["udp_gap_ms"])),
        row("UDP datagrams lost (1 per ms)", where, "", each(lambda s: s["network"]["udp_lost"])),
        row("ping gap (10 ms pings)", where, "ms", each(lambda s: s["network"]["ping_gap_ms"])),
        row("longest transaction", where, "ms", each(lambda s: s["network"]["transaction_stall_ms"])),
        row("transactions lost", where, "", each(lambda s: s["network"]["transactions_lost"]), 0),
        row("relearn after resume", where, "ms", each(lambda s: s["controller"]["relearn_ms"])),
        row("wall time, set-up aside", where, "s", each(lambda s: s["wall_s"]["rest"]), _DEMO_WALL_S),
        row("set-up", where, "s", each(lambda s: s["wall_s"]["setup"])),
        row(
            "agent memory beside RAM",
            where,
            "MiB",
            each(lambda s: max(s["agent_memory_bytes"].values()) / 2**20),
            _AGENT_MIB,
        ),
    ]


def _one_demo() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="vmotion-bench-") as folder:
        out = Path(folder) / "results"
        done = subprocess.run(
            [sys.executable, "-m", "experiments.basic_vmotion", "--out", str(out)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent.parent,
        )
        if done.returncode:
            raise TestbedError(f"bench: a demo failed: {(done.stderr or done.stdout).strip()}")
        summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
        return summary


GROUPS: dict[str, Callable[[int], list[Row]]] = {"cable": cable, "demo": demo}


# ---------------------------------------------------------------- the command


def main(only: str | None, list_groups: bool, json_file: Path | None, samples: int) -> int:
    """Measure and print; exit status 0 if every target is met."""
    if list_groups:
        print("\n".join(GROUPS))
        return 0
    if only is not None and only not in GROUPS:
        raise UsageError(f"there is no group {only!r} in the bench; it has {', '.join(GROUPS)}")
    if not 1 <= samples <= 1000:
        raise UsageError(f"--migrations {samples}: take 1 to 1000 samples of each figure")
    if json_file is not None and not json_file.parent.is_dir():
        raise UsageError(f"--json {json_file}: there is no folder {json_file.parent}")
    check_machine(read_plan())
    rows: list[Row] = []
    # demos first: entering a world, as `cable` does, can be done once by a process
    for name in [only] if only else ["demo", "cable"]:
        print(f"measuring {name} ...", flush=True)
        rows += GROUPS[name](samples)
    _print(rows)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(r) for r in rows], indent=2) + "\n", encoding="utf-8")
    return 0 if all(r.met is not False for r in rows) else 1


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("figure", "n", "median", "lowest-highest", "unit", "reference", "ratio", "target", "met")
    for conditions in dict.fromkeys(r.conditions for r in rows):
        table = Table(title=conditions, title_justify="left")
        for column in columns:
            table.add_column(column, no_wrap=True)
        for r in (r for r in rows if r.conditions == conditions):
            reference = "" if r.reference is None else f"{r.reference:.4g}"
            ratio = "" if r.ratio is None else f"{r.ratio:.3f}"
            met = {True: "yes", False: "NO", None: ""}[r.met]
            figures = (str(r.n), f"{r.median:.4g}", f"{r.low:.4g}-{r.high:.4g}", r.unit)
            table.add_row(r.name, *figures, reference, ratio, r.target, met)
        Console(width=130, soft_wrap=True).print(table)
