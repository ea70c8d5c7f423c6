"""What the person sees: the rounds while they happen, then one table, then where the results lie."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from hosts.pace import Pace
from hosts.policy import Action
from hosts.precopy import Progress as RoundProgress
from hosts.ram import PAGE
from topologies.units import format_size

_ALL_ROUNDS = 30  # as many are shown one by one

Rows = list[tuple[str, str]]
console = Console(highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """One line about where the run stands."""
    console.print(line)


@contextmanager
def rounds() -> Iterator[Callable[[RoundProgress], None]]:
    """Shows each pre-copy round: a bar on a terminal, a line when it has ended elsewhere."""
    if not console.is_terminal:
        yield _Lines()
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


class _Lines:
    """A line for each round; of the many that one has that does not converge, one a second."""

    def __init__(self) -> None:
        self._pace = Pace(1.0)

    def __call__(self, note: RoundProgress) -> None:
        one_of_many = note.number > _ALL_ROUNDS and note.decision == Action.CONTINUE.value
        if note.round and (not one_of_many or self._pace.due()):
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
    rows = [*_migration(summary["migration"]), *_network(summary["network"]), *_around(summary)]
    figures(f"{summary['experiment']}: what happened", rows)


def failure(summary: dict[str, Any]) -> None:
    """What there is to tell of a migration that did not take place."""
    rounds, silence = summary["failed_migration"]["rounds"], summary["longest_silence_ms"]
    rows = [("rounds", str(len(rounds)))]
    if rounds:
        sent = sum(r["bytes"] for r in rounds)
        rows.append(("on the wire", f"{format_size(sent)}; {format_size(rounds[-1]['remaining_bytes'])} still dirty"))
    rows.append(("longest silence", ", ".join(f"{probe} {ms:.1f} ms" for probe, ms in silence.items())))
    figures(f"{summary['experiment']}: the VM has not moved", rows)


def figures(title: str, rows: Rows) -> None:
    """A table of names and what there is to say of each."""
    grid = Table(title=title, show_header=False, title_justify="left")
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    console.print(grid)


def _migration(m: dict[str, Any]) -> Rows:
    parts = "  ".join(f"{name} {ms:.1f}" for name, ms in m["downtime_parts_ms"].items())
    target, predicted = m["downtime_target_ms"], m["downtime_predicted_ms"]
    aims = [f"target {target:g}"] if target is not None else []
    aims += [f"predicted {predicted:.1f}"] if predicted is not None else []
    by = m["mode"] + (", then post-copy" if m["postcopy"] and m["mode"] != "postcopy" else "")
    rows = [
        ("moved", f"{m['vm']}  {m['source']} -> {m['destination']}  {format_size(m['ram_bytes'])} RAM  by {by}"),
        ("rounds", f"{len(m['rounds'])}, then {m['residual_pages']} pages while suspended"),
        ("on the wire", f"{format_size(m['bytes_on_wire'])}, payload at {m['goodput_mbps']:.0f} Mbit/s"),
        ("total time", f"{m['total_ms']:.0f} ms"),
        ("downtime", f"{m['downtime_ms']:.1f} ms" + (f" ({', '.join(aims)})" if aims else "")),
        ("  parts, ms", parts),
    ]
    if m["throttles"]:
        rows.insert(2, ("throttled", " ".join(f"{share:.0%}" for share in m["throttles"])))
    if m["postcopy"]:
        rows.append(("post-copy", _postcopy(m["postcopy"])))
    return rows


def _postcopy(p: dict[str, Any]) -> str:
    text = f"{p['pages']} pages in {p['ms']:.0f} ms after the resume, {p['faults']} faults"
    waits = p["fault_us"]
    if not waits:
        return text
    each = f"{waits['median']:.0f} us (median; p99 {waits['p99']:.0f})"
    return f"{text}, each {each}: the guest waited {p['waited_ms']:.0f} ms for pages"


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
    for parts in sorted(folder.glob("*/pcap")):
        say(f"look at  wireshark {parts}/NODE.pcapng")
    capture = folder / "capture.pcapng"
    if not capture.exists():
        return
    say(f"look at  wireshark {capture}")
    if "migration" in summary:
        there = f'frame.interface_name == "{summary["migration"]["destination"]}-vmnic0"'
        say(f"     or  tshark -r {capture} -Y '{there} and (eth.type == 0x8035 or arp.isgratuitous == 1)'")
