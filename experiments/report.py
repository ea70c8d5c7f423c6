"""What the person sees: the rounds while they happen, then one table, then where the results lie."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from hosts.ram import PAGE
from hosts.source import Progress as RoundProgress
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
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=console) as progress:
        bars: dict[int, TaskID] = {}

        def show(note: RoundProgress) -> None:
            if note.number not in bars:
                bars[note.number] = progress.add_task(f"round {note.number:2}", total=max(note.pages, 1), figures="")
            figures = _figures(note) if note.round else format_size(note.done_pages * PAGE)
            progress.update(bars[note.number], completed=max(note.done_pages, note.round is not None), figures=figures)

        yield show


def _print_round(note: RoundProgress) -> None:
    if note.round:
        say(f"round {note.number:2}  {_figures(note)}")


def _figures(note: RoundProgress) -> str:
    done = note.round
    assert done is not None
    rate = done.bytes * 8 / done.ms / 1000 if done.ms else 0.0
    return (
        f"{format_size(done.bytes):>9} in {done.ms:6.0f} ms ({rate:4.0f} Mbit/s), "
        f"{format_size(done.remaining_bytes):>9} dirty since: {note.decision}"
    )


def table(summary: dict[str, Any]) -> None:
    """The figures of one migration and the verdict."""
    migration, network = summary["migration"], summary["network"]
    announce, controller = summary["announce"], summary["controller"]
    parts = "  ".join(f"{name} {ms:.1f}" for name, ms in migration["downtime_parts_ms"].items())
    noise = network["baseline_ms"]
    rows = [
        ("moved", f"{migration['vm']}  {migration['source']} -> {migration['destination']}  {format_size(migration['ram_bytes'])} RAM"),
        ("rounds", f"{len(migration['rounds'])}, then {migration['residual_pages']} pages while suspended"),
        ("on the wire", f"{format_size(migration['bytes_on_wire'])}, payload at {migration['goodput_mbps']:.0f} Mbit/s"),
        ("total time", f"{migration['total_ms']:.0f} ms"),
        ("downtime", f"{migration['downtime_ms']:.1f} ms (target {migration['downtime_target_ms']:g}, predicted {migration['downtime_predicted_ms']:.1f})"),
        ("  its parts", f"{parts} ms"),
        ("ping gap", f"{network['ping_gap_ms']:.1f} ms, {network['ping_lost']} lost (elsewhere in this run at most {noise['ping']:.1f} ms)"),
        ("UDP gap", f"{network['udp_gap_ms']:.1f} ms, {network['udp_lost']} of {network['udp_sent']} lost (elsewhere {noise['udp']:.1f} ms)"),
        ("TCP stall", f"{network['tcp_stall_ms']:.1f} ms on the bulk stream (elsewhere {noise['tcp']:.1f} ms), {format_size(network['tcp_bytes_verified'])} verified"),
        (
            "transactions",
            f"{network['transactions']} sent, {network['transactions_lost']} lost, "
            f"{network['transactions_duplicated']} duplicated, longest wait {network['transaction_stall_ms']:.1f} ms",
        ),
        ("announced", _announced(announce)),
        ("relearned", f"{controller['relearn_ms']:.1f} ms after the resume, by {controller['cause']}" if controller["relearn_ms"] else "not at all"),
        ("agents", "  ".join(f"{host} {size}" for host, size in summary["agent_memory"].items()) + " beside the guest's RAM"),
    ]
    grid = Table(title=f"{summary['experiment']}: what happened", show_header=False, title_justify="left")
    for name, value in rows:
        grid.add_row(name, value)
    console.print(grid)


def _announced(announce: dict[str, Any]) -> str:
    if not announce["frames"]:
        return f"nothing ({announce['mode']})"
    return f"{announce['frames']} {announce['mode']} frames, the first {announce['first_after_resume_ms']:.1f} ms after the resume began"


def conclusion(summary: dict[str, Any], folder: Path) -> None:
    """The verdict, what failed, and where to look."""
    failed = [name for name, passed in summary["checks"].items() if not passed]
    colour = "green" if summary["verdict"] == "pass" else "red"
    say(f"verdict  [bold {colour}]{summary['verdict']}[/]" + (f": not {', not '.join(failed)}" if failed else ""))
    say(f"results  {folder}")
    capture = folder / "capture.pcapng"
    if capture.exists():
        say(f"look at  wireshark {capture}      (or: tshark -r {capture} -Y 'eth.type == 0x8035')")
