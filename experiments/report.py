"""What the person sees: the rounds while they happen, then one table, then where the results lie."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from hosts.precopy import Progress as RoundProgress
from hosts.ram import PAGE
from topologies.units import format_size

console = Console(highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """One line about where the run stands."""
    console.print(line)


@contextmanager
def rounds() -> Iterator[Callable[[RoundProgress], None]]:
    """Shows each pre-copy round: a bar on a terminal, a line when it has ended elsewhere."""
    if not console.is_terminal:
        yield _print_round
        return
    text = (TextColumn("{task.description}"), TextColumn("{task.fields[figures]}"))
    columns = text if console.width < 110 else (text[0], BarColumn(), text[1])
    with Progress(*columns, console=console) as progress:
        bars: dict[int, TaskID] = {}

        def show(note: RoundProgress) -> None:
            if note.number not in bars:
                bars[note.number] = progress.add_task(f"round {note.number:2}", total=max(note.pages, 1), figures="")
            done = max(note.pages, 1) if note.round else note.done_pages
            progress.update(bars[note.number], completed=done, figures=_figures(note))

        yield show


def _print_round(note: RoundProgress) -> None:
    if note.round:
        say(f"round {note.number:2}  {_figures(note)}")


def _figures(note: RoundProgress) -> str:
    done = note.round
    if done is None:
        return format_size(note.done_pages * PAGE)
    rate = done.bytes * 8 / done.ms / 1000 if done.ms else 0.0
    return (
        f"{format_size(done.bytes):>9} in {done.ms:6.0f} ms ({rate:4.0f} Mbit/s), "
        f"{format_size(done.remaining_bytes):>9} dirty: {note.decision}"
    )


def table(summary: dict[str, Any]) -> None:
    """The figures of one migration."""
    grid = Table(title=f"{summary['experiment']}: what happened", show_header=False, title_justify="left")
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in [*_migration(summary["migration"]), *_network(summary["network"]), *_around(summary)]:
        grid.add_row(name, value)
    console.print(grid)


Rows = list[tuple[str, str]]


def _migration(m: dict[str, Any]) -> Rows:
    parts = "  ".join(f"{name} {ms:.1f}" for name, ms in m["downtime_parts_ms"].items())
    target, predicted = m["downtime_target_ms"], m["downtime_predicted_ms"]
    aims = [f"target {target:g}"] if target is not None else []
    aims += [f"predicted {predicted:.1f}"] if predicted is not None else []
    rows = [
        ("moved", f"{m['vm']}  {m['source']} -> {m['destination']}  {format_size(m['ram_bytes'])} RAM  by {m['mode']}"),
        ("rounds", f"{len(m['rounds'])}, then {m['residual_pages']} pages while suspended"),
        ("on the wire", f"{format_size(m['bytes_on_wire'])}, payload at {m['goodput_mbps']:.0f} Mbit/s"),
        ("total time", f"{m['total_ms']:.0f} ms"),
        ("downtime", f"{m['downtime_ms']:.1f} ms" + (f" ({', '.join(aims)})" if aims else "")),
        ("  its parts", f"{parts} ms"),
    ]
    if m["throttles"]:
        rows.insert(2, ("throttled", " ".join(f"{share:.0%}" for share in m["throttles"])))
    if m["postcopy"]:
        rows.append(("post-copy", _postcopy(m["postcopy"])))
    return rows


def _postcopy(p: dict[str, Any]) -> str:
    text = f"{p['pages']} pages in {p['ms']:.0f} ms after the resume, {p['faults']} faults"
    waits = p["fault_us"]
    return f"{text}, each {waits['median']:.0f} us (median; p99 {waits['p99']:.0f})" if waits else text


def _network(n: dict[str, Any]) -> Rows:
    """Each gap beside the longest silence that the same probe saw far from the migration."""
    noise = {probe: f"elsewhere at most {ms:.1f} ms" for probe, ms in n["baseline_ms"].items()}
    return [
        ("ping gap", f"{n['ping_gap_ms']:.1f} ms, {n['ping_lost']} lost ({noise['ping']})"),
        ("UDP gap", f"{n['udp_gap_ms']:.1f} ms, {n['udp_lost']} of {n['udp_sent']} lost ({noise['udp']})"),
        ("TCP stall", f"{n['tcp_stall_ms']:.1f} ms ({noise['tcp']}), {format_size(n['tcp_bytes_verified'])} verified"),
        (
            "transactions",
            f"{n['transactions']} sent, {n['transactions_lost']} lost, {n['transactions_duplicated']} duplicated, "
            f"longest wait {n['transaction_stall_ms']:.1f} ms ({noise['transaction']})",
        ),
    ]


def _around(summary: dict[str, Any]) -> Rows:
    announce, controller, wall = summary["announce"], summary["controller"], summary["wall_s"]
    frames = f"{announce['frames']} frames ({announce['mode']})"
    if announce["frames"]:
        frames += f", the first {announce['first_after_resume_ms']:.1f} ms after the resume began"
    relearned = "not at all"
    if controller["relearn_ms"] is not None:
        relearned = f"{controller['relearn_ms']:.1f} ms after the resume began, by {controller['cause']}"
    agents = "  ".join(f"{host} {format_size(size)}" for host, size in summary["agent_memory_bytes"].items())
    return [
        ("announced", frames),
        ("relearned", relearned),
        ("agents", f"{agents}  beside the guest's RAM"),
        ("this run", f"{wall['setup']:.1f} s to set up, {wall['rest']:.1f} s for the rest"),
    ]


def conclusion(summary: dict[str, Any], folder: Path) -> None:
    """The verdict, what failed, and where to look."""
    failed = [name for name, passed in summary["checks"].items() if not passed]
    colour = "green" if summary["verdict"] == "pass" else "red"
    say(f"verdict  [bold {colour}]{summary['verdict']}[/]" + (f": not {', not '.join(failed)}" if failed else ""))
    say(f"results  {folder}")
    capture = folder / "capture.pcapng"
    if capture.exists():
        say(f"look at  wireshark {capture}")
        say(f"     or  tshark -r {capture} -Y 'eth.type == 0x8035 or arp.isgratuitous == 1'")
