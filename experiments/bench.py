"""vmotion bench: the figures that this project promises, each measured here and now, beside its target.

Ratios are taken within one run, pair by pair, because machines differ and are noisy. Groups, in the order of --list:

    demo        the demo as a person runs it, probes and captures included: downtime, client, wall time, memory
    goodput     payload goodput against iperf3 on the same cable: 1 Gbit/s, 10 Gbit/s, unshaped
    scattered   the same for a round of scattered dirty pages, about a tenth of RAM
    precopy     1 GiB at 1 Gbit/s, written to: total time against its lower bound, downtime
    unshaped    1 GiB, written to all over, on an unshaped cable: downtime
    postcopy    post-copy: downtime, and how long the guest waits for a page
    hopeless    a guest that writes faster than pre-copy converges: hybrid, and throttle
    stop        stop-and-copy beside pre-copy
    tracking    what dirty tracking costs the guest
    size        how cost grows with RAM: 256 MiB, 1 GiB, 4 GiB
    count       how cost grows with the number of VMs at once: 1, 2, 4, 8
    storage     a write to the NAS, the claim in a downtime, a power-on, a restart after a host's death
    relearn     from an RARP to the first frame at the new port: our controller, Faucet, the switch by itself
    controller  MACs learned, packet-ins handled, entries put back, memory
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments import faucet
from experiments.laboratory import Laboratory, laboratory
from experiments.preflight import check_machine, check_nfs
from experiments.switchyard import Switchyard
from experiments.world import run_inside
from hosts.ownership import LEASE_S
from hosts.policy import Policy
from hosts.ram import PAGE
from hosts.tasks import migrations_at_once
from topologies.errors import TestbedError, UsageError
from topologies.plan import read_plan

_LISTED = (__doc__ or "").split("\n\n")[-1].rstrip()  # the groups, as told above
_P99_SAMPLES = 30
_DEMO_WALL_S = 25.0
_AGENT_MIB = 80.0
# 100 MB/s over all of 1 GiB do not converge at 1 Gbit/s; 1.3 times what RAM takes to cross
_HOPELESS: dict[str, Any] = {"ram": "1GiB", "working_set": "1GiB", "dirty_rate": "100MB/s", "link": "1Gbit"}
_HOPELESS_TOTAL_MS = 1.3 * 2**30 * 8 / 1e9 * 1000


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


def row(
    name: str,
    conditions: str,
    unit: str,
    samples: Sequence[float],
    at_most: float | None = None,
    p99_at_most: float | None = None,
) -> Row:
    """A figure that should be low: its median, or its 99th percentile, against a limit."""
    spread = _spread(samples)
    median, p99 = spread[1], spread[4]
    target, met = [], True
    if at_most is not None:
        target, met = [f"<= {at_most:g}"], median <= at_most
    if p99_at_most is not None:
        target, met = [*target, f"p99 <= {p99_at_most:g}"], met and p99 <= p99_at_most
    return Row(name, conditions, unit, *spread, None, None, ", ".join(target), met if target else None)


def at_least_row(name: str, conditions: str, unit: str, samples: Sequence[float], at_least: float) -> Row:
    """A figure that should be high: its median, against a limit."""
    spread = _spread(samples)
    return Row(name, conditions, unit, *spread, None, None, f">= {at_least:g}", spread[1] >= at_least)


def ratio_row(
    name: str,
    conditions: str,
    unit: str,
    samples: Sequence[float],
    references: Sequence[float],
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """A figure against a reference measured beside it, pair by pair."""
    ratio = statistics.median(sample / reference for sample, reference in zip(samples, references, strict=True))
    target, met = "", None
    if at_least is not None:
        target, met = f">= {at_least:g}", ratio >= at_least
    elif at_most is not None:
        target, met = f"<= {at_most:g}", ratio <= at_most
    return Row(name, conditions, unit, *_spread(samples), statistics.median(references), ratio, target, met)


def _spread(samples: Sequence[float]) -> tuple[int, float, float, float, float]:
    """n, median, lowest, highest, 99th percentile (nearest rank: the highest of fewer than a hundred)."""
    ordered = sorted(samples)
    rank = -(-99 * len(ordered) // 100) - 1
    return len(ordered), statistics.median(ordered), ordered[0], ordered[-1], ordered[rank]


# ---------------------------------------------------------------- the groups: (folder, samples) -> rows


def goodput(folder: Path, samples: int) -> list[Row]:
    rows = []
    for link, at_least in (("1Gbit", 0.98), ("10Gbit", 0.95), ("unshaped", 0.80)):
        with laboratory(folder, link=link, ram="1GiB", working_set="16MiB", dirty_rate="1MB/s") as lab:
            lab.move()  # the first one finds memory that this machine may never have used
            pairs = [(lab.iperf3(), lab.move()) for _ in range(samples)]
            rates = [move.round_mbps(1) for _, move in pairs]
            mbps = [mbps for mbps, _ in pairs]
            rows.append(ratio_row("goodput / iperf3", lab.conditions, "Mbit/s", rates, mbps, at_least))
    return rows


def scattered(folder: Path, samples: int) -> list[Row]:
    """Round 2 of a guest that has written to about a tenth of its pages, here and there, since round 1 sent them."""
    rows = []
    for link, rate, at_least in (("1Gbit", "24MB/s", 0.95), ("10Gbit", "240MB/s", 0.75)):
        with laboratory(folder, link=link, ram="1GiB", fill="100%", working_set="1GiB", dirty_rate=rate) as lab:
            lab.move()
            pairs = [(lab.iperf3(), lab.move()) for _ in range(samples)]
            rates = [move.round_mbps(2) for _, move in pairs]
            share = statistics.median(move.outcome.rounds[1].pages * PAGE / lab.vm.ram for _, move in pairs)
            name = f"goodput / iperf3, {share:.0%} of the pages"
            rows.append(ratio_row(name, lab.conditions, "Mbit/s", rates, [mbps for mbps, _ in pairs], at_least))
    return rows


def precopy(folder: Path, samples: int) -> list[Row]:
    with laboratory(folder, ram="1GiB", working_set="128MB", dirty_rate="50MB/s", link="1Gbit") as lab:
        lab.move()
        pairs = [(lab.iperf3(), lab.move()) for _ in range(samples)]
        totals = [move.timeline.total_ms for _, move in pairs]
        bounds = [move.bound_ms(mbps) for mbps, move in pairs]
        moves = [move for _, move in pairs] + [lab.move() for _ in range(_P99_SAMPLES - samples)]
        downtimes = [move.timeline.downtime_ms for move in moves]
        filled = lab.vm.ram * lab.vm.fill
        sent = [move.outcome.bytes_on_wire / filled for move in moves]
        predicted = [move.outcome.predicted_downtime_ms or 0.0 for move in moves]
        # the bound is of the bytes of the same move: that ratio says how busy the link was, the next how few they were
        return [
            ratio_row("total time / lower bound", lab.conditions, "ms", totals, bounds, at_most=1.05),
            row("bytes sent / bytes of RAM that are filled", lab.conditions, "", sent),
            row("downtime", lab.conditions, "ms", downtimes, 20, 50),
            row("  as it was predicted", lab.conditions, "ms", predicted),
            *(
                row(f"  of it {part}", lab.conditions, "ms", [move.timeline.parts_ms[part] for move in moves])
                for part in moves[0].timeline.parts_ms
            ),
        ]


def unshaped(folder: Path, samples: int) -> list[Row]:
    with laboratory(folder, ram="1GiB", working_set="1GiB", dirty_rate="100MB/s", link="unshaped") as lab:
        moves = [lab.move() for _ in range(samples + 1)][1:]
        return [
            row("downtime", lab.conditions, "ms", [move.timeline.downtime_ms for move in moves], 15),
            row("total time", lab.conditions, "ms", [move.timeline.total_ms for move in moves]),
        ]


def postcopy(folder: Path, samples: int) -> list[Row]:
    rows = []
    for rate in ("10MB/s", "100MB/s", "400MB/s"):
        with laboratory(folder, **(_HOPELESS | {"dirty_rate": rate})) as lab:
            moves = [lab.move(Policy(mode="postcopy")) for _ in range(samples)]
            waits = [move.outcome.postcopy.fault_us for move in moves if move.outcome.postcopy]
            medians = [statistics.median(wait) for wait in waits]
            rows += [
                row("post-copy: downtime", lab.conditions, "ms", [m.timeline.downtime_ms for m in moves], 15),
                row("post-copy: a wait for a page, median of each move", lab.conditions, "us", medians, 300),
                row("post-copy: total time", lab.conditions, "ms", [m.timeline.total_ms for m in moves]),
            ]
    return rows


def hopeless(folder: Path, samples: int) -> list[Row]:
    rows = []
    policies = {
        "hybrid": Policy(mode="hybrid"),
        "throttle": Policy(timeout_s=1, timeout_strategy="throttle"),
    }
    with laboratory(folder, **_HOPELESS) as lab:
        for name, policy in policies.items():
            moves = [lab.move(policy) for _ in range(samples)]
            rows += [
                row(f"{name}: downtime", lab.conditions, "ms", [move.timeline.downtime_ms for move in moves], 50),
                row(
                    f"{name}: total time",
                    lab.conditions,
                    "ms",
                    [move.timeline.total_ms for move in moves],
                    round(_HOPELESS_TOTAL_MS),
                ),
            ]
    return rows


def stop(folder: Path, samples: int) -> list[Row]:
    with laboratory(folder) as lab:
        pairs = [(lab.move(Policy(mode="stop-and-copy")), lab.move()) for _ in range(samples)]
        stopped = [stop.timeline.downtime_ms for stop, _ in pairs]
        live = [live.timeline.downtime_ms for _, live in pairs]
        return [
            row("downtime, stop-and-copy", lab.conditions, "ms", stopped),
            ratio_row("downtime, pre-copy / stop-and-copy", lab.conditions, "ms", live, stopped),
        ]


def tracking(folder: Path, samples: int) -> list[Row]:
    """A guest that writes as fast as it can: its rate in the first seconds of a migration against the ones before."""
    with laboratory(folder, ram="1GiB", working_set="128MB", dirty_rate="20GB/s", link="1Gbit") as lab:
        pairs = [_tracked(lab) for _ in range(samples)]
        free, tracked = [free for free, _ in pairs], [tracked for _, tracked in pairs]
        return [ratio_row("guest's write rate, tracked / free", lab.conditions, "pages/s", tracked, free, 0.90)]


def _tracked(lab: Laboratory) -> tuple[float, float]:
    free = _work_rate(lab)
    vcenter, vm = lab.testbed.vcenter, lab.vm.name
    task = vcenter.start_migration(vm, vcenter.elsewhere(vm))
    time.sleep(1.0)
    tracked = _work_rate(lab)
    task.cancel()
    task.over.wait()
    return free, tracked


def _work_rate(lab: Laboratory, seconds: float = 2.0) -> float:
    work, began = lab.work(), time.monotonic()
    time.sleep(seconds)
    return (lab.work() - work) / (time.monotonic() - began)


def size(folder: Path, samples: int) -> list[Row]:
    """Time and agent work for each GiB: no more than for the smallest."""
    rows: list[Row] = []
    smallest: list[float] = []
    for ram in ("256MiB", "1GiB", "4GiB"):
        with laboratory(folder, ram=ram, working_set="16MiB", dirty_rate="10MB/s", link="10Gbit") as lab:
            lab.move()
            moves = [lab.move() for _ in range(samples)]
            per_gib = [move.timeline.total_ms / (lab.vm.ram / 2**30) for move in moves]
            smallest = smallest or per_gib
            rows += [
                ratio_row("total time for each GiB", lab.conditions, "ms", per_gib, smallest, at_most=1.1),
                row("downtime", lab.conditions, "ms", [move.timeline.downtime_ms for move in moves]),
            ]
    return rows


def count(folder: Path, samples: int) -> list[Row]:
    """All at once in one direction, until the last has arrived; time for each VM, no more than for one alone."""
    rows: list[Row] = []
    alone: list[float] = []
    for vms in (1, 2, 4, 8):
        with laboratory(folder, vms, ram="256MiB", working_set="16MiB", dirty_rate="5MB/s", link="1Gbit") as lab:
            each = [_all_at_once(lab) / vms for _ in range(samples)]
            alone = alone or each
            where = f"{vms} x {lab.conditions}, at most {migrations_at_once(lab.plan.link)} at once"
            rows.append(ratio_row("time for each VM", where, "ms", each, alone, at_most=1.1))
    return rows


def _all_at_once(lab: Laboratory) -> float:
    began = time.monotonic()
    vcenter = lab.testbed.vcenter
    tasks = [vcenter.start_migration(vm.name, vcenter.elsewhere(vm.name)) for vm in lab.plan.vms]
    for task in tasks:
        task.wait()
    return (time.monotonic() - began) * 1000


def storage(folder: Path, samples: int) -> list[Row]:
    """The datastore is a NAS: what that costs."""
    rows: list[Row] = []
    with laboratory(folder) as lab:
        timed = [lab.storage_us() for _ in range(samples)]
        writes, bounds = [t.nfs for t in timed], [t.local + t.round_trip for t in timed]
        where = "4 KiB, O_SYNC, one after the other, against the NAS's own disk and a round trip of 4 KiB"
        rows.append(ratio_row("write through libnfs", where, "us", writes, bounds, at_most=1.5))
        rows += [
            row("  of that bound, the NAS's own disk", where, "us", [t.local for t in timed]),
            row("  of that bound, the round trip", where, "us", [t.round_trip for t in timed]),
        ]
        moves = [lab.move() for _ in range(max(10, 2 * samples))]
        rows.append(row("claim", lab.conditions, "ms", [m.timeline.parts_ms["claim"] for m in moves], at_most=5))
        powered = [lab.power_cycle_s() for _ in range(samples)]
        rows.append(row("power-on, from its files", lab.conditions, "s", powered, at_most=1))
    with laboratory(folder, ram="64MiB", working_set="8MiB", dirty_rate="5MB/s") as lab:
        restarts = [lab.restart_after_death_s() for _ in range(samples)]
        where = f"{lab.conditions}, lease {LEASE_S:g} s"
        rows.append(row("from a host's death until its VM runs elsewhere", where, "s", restarts, LEASE_S + 5))
    return rows


def relearn(folder: Path, _samples: int) -> list[Row]:
    """A hundred moves back and forth under each controller, one controller after the other; no hosts, no captures."""
    rows, moves = [], 100
    where = f"{moves} moves back and forth, RARP to the first of a client's frames, 1 per ms, at the new port"
    with Switchyard(folder / "relearn-mobility", "mobility") as yard:
        ours = yard.moves_ms(moves)
    rows.append(row("mobility, each move announced by the manager", where, "ms", ours, 2, 10))
    for name in ("faucet", "standalone"):
        if name == "faucet" and not faucet.is_installed():
            continue
        with Switchyard(folder / f"relearn-{name}", name) as yard:
            theirs = yard.moves_ms(moves)
        rows.append(ratio_row(f"mobility / {name}", where, "ms", ours, theirs, at_most=1))
    return rows


def controller(folder: Path, samples: int) -> list[Row]:
    """What a controller of ten thousand MACs needs."""
    macs = [f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}" for number in range(10_000)]
    learned, resynced, refilled, handled, each = [], [], [], [], []
    for sample in range(samples):
        with Switchyard(folder / f"controller-{sample}", "mobility") as yard:
            handled.append(yard.packet_ins_per_s(2.0))
            before = yard.memory_bytes()
            learned.append(yard.learn_s(macs))
            each.append((yard.memory_bytes() - before) / len(macs))
            resynced.append(yard.resync_ms())
            refilled.append(yard.resync_ms(empty=True))
    where = f"{len(macs)} MACs behind one port, on {os.environ.get('SDN_BACKEND', 'ryu')}"
    return [
        at_least_row("packet-ins handled", "announcements, more than can be handled", "/s", handled, 10_000),
        row("MACs learned", where, "s", learned, 4),
        row("a new controller has compared the switch's entries", where, "ms", resynced, 1000),
        row("a switch that had lost its entries has them again", where, "ms", refilled, 1000),
        row("memory for each MAC", where, "bytes", each),
    ]


def demo(samples: int) -> list[Row]:
    """The whole demo, each in a process of its own."""
    summaries = [_one_demo() for _ in range(samples)]

    def each(figure: Callable[[dict[str, Any]], float]) -> list[float]:
        return [figure(summary) for summary in summaries]

    where = "default demo: ping, UDP, transactions and bulk TCP running, captures on"
    memory = each(lambda s: max(s["agent_memory_bytes"].values()) / 2**20)
    return [
        row("downtime", where, "ms", each(lambda s: s["migration"]["downtime_ms"]), 50),
        row("UDP gap", where, "ms", each(lambda s: s["network"]["udp_gap_ms"])),
        row("UDP datagrams lost (1 per ms)", where, "", each(lambda s: s["network"]["udp_lost"])),
        row("ping gap (10 ms pings)", where, "ms", each(lambda s: s["network"]["ping_gap_ms"])),
        row("longest transaction", where, "ms", each(lambda s: s["network"]["transaction_stall_ms"])),
        row("transactions lost", where, "", each(lambda s: s["network"]["transactions_lost"]), 0),
        row("relearn after resume", where, "ms", each(lambda s: s["controller"]["relearn_ms"])),
        row("wall time, set-up aside", where, "s", each(lambda s: s["wall_s"]["rest"]), _DEMO_WALL_S),
        row("set-up", where, "s", each(lambda s: s["wall_s"]["setup"])),
        row("agent memory beside RAM", where, "MiB", memory, _AGENT_MIB),
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


# inside a world, one after the other
GROUPS: dict[str, Callable[[Path, int], list[Row]]] = {
    "goodput": goodput,
    "scattered": scattered,
    "precopy": precopy,
    "unshaped": unshaped,
    "postcopy": postcopy,
    "hopeless": hopeless,
    "stop": stop,
    "tracking": tracking,
    "size": size,
    "count": count,
    "storage": storage,
    "relearn": relearn,
    "controller": controller,
}


# ---------------------------------------------------------------- the command


def main(only: Sequence[str], list_groups: bool, json_file: Path | None, samples: int) -> int:
    """Measure and print; exit status 0 if every target is met."""
    known = ["demo", *GROUPS]
    if list_groups:
        print(_LISTED)
        return 0
    for name in only:
        if name not in known:
            raise UsageError(f"there is no group {name!r} in the bench; it has {', '.join(known)}")
    if not 1 <= samples <= 1000:
        raise UsageError(f"--samples {samples}: take 1 to 1000 samples of each figure")
    if json_file is not None and not json_file.parent.is_dir():
        raise UsageError(f"--json {json_file}: there is no folder {json_file.parent}")
    check_machine(read_plan())
    check_nfs()
    names = list(only) or known
    rows: list[Row] = []
    if "demo" in names:  # in worlds of their own; this process can enter one only once, and then stays there
        print("measuring demo ...", flush=True)
        rows += _shown(demo(samples))
    rows += _inside([name for name in names if name != "demo"], samples)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(r) for r in rows], indent=2) + "\n", encoding="utf-8")
    return 0 if all(r.met is not False for r in rows) else 1


def _inside(names: list[str], samples: int) -> list[Row]:
    if not names:
        return []
    with tempfile.TemporaryDirectory(prefix="vmotion-bench-") as folder:
        out = Path(folder) / "rows.json"

        def measure() -> int:
            rows: list[Row] = []
            for name in names:
                print(f"measuring {name} ...", flush=True)
                rows += _shown(GROUPS[name](Path(folder), samples))
                out.write_text(json.dumps([asdict(r) for r in rows]))
            return 0

        status = run_inside(measure)
        if status == 128 + signal.SIGINT:
            raise KeyboardInterrupt
        if status:
            raise TestbedError("bench: a group failed, see above")
        return [Row(**fields) for fields in json.loads(out.read_text())]


def _shown(rows: list[Row]) -> list[Row]:
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
        Console(width=140, soft_wrap=True).print(table)
    return rows
