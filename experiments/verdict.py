"""Whether a migration was what vMotion promises: measurements in, named checks and figures out. Pure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from experiments.evidence import Evidence
from experiments.gaps import Silence, Window, baseline, blackout
from experiments.probes import Results
from experiments.streams import TransactionsResult
from experiments.timeline import Timeline
from hosts.policy import Policy
from hosts.ram import PAGE
from hosts.source import Outcome, PostCopy
from hosts.vcenter import Result


@dataclass(frozen=True)
class Findings:
    """What an experiment has found. It passes if every check is true; `sections` go into summary.json as they are.

    `error`: what went wrong, in a line for the person, if the experiment could not be what it was to be.
    """

    checks: dict[str, bool]
    sections: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def judge(
    result: Result,
    timeline: Timeline,
    probes: Results,
    evidence: Evidence,
    *,
    ram_bytes: int,
    policy: Policy,
    announce: str,
) -> Findings:
    """One migration with all probes running: its checks and the sections of its summary."""
    outcome, transactions, bulk = result.outcome, probes.transactions, probes.bulk
    checks = {
        "ram_digests_equal": outcome.digests_equal,
        "no_stale_page": outcome.stale_pages == 0,
        "tcp_connection_survived": transactions.connection_survived
        and bulk.connection_survived
        and evidence.connections_opened == 2
        and evidence.resets == 0,
        **ledger_checks(transactions),
        "vm_answers_from_destination": evidence.answers_from_destination > 0 and evidence.late_frames_from_source == 0,
    }
    if policy.aims_at_downtime:
        checks["downtime_within_target"] = timeline.downtime_ms <= policy.downtime_ms
    if announce != "none":
        first = evidence.first_announcement_ns
        checks["announced_after_resume"] = first is not None and first >= timeline.resuming_ns
    return Findings(
        checks,
        {
            "migration": _migration(result, timeline, ram_bytes, policy)
            | {"ram_digest_equal": checks["ram_digests_equal"]},
            "network": _network(probes, timeline),
            "announce": {
                "mode": announce,
                "frames": evidence.announcements,
                "first_after_resume_ms": _ms_after(evidence.first_announcement_ns, timeline.resuming_ns),
            },
            "evidence": asdict(evidence),
            "controller": {"relearn_ms": timeline.relearn_ms, "cause": timeline.relearn_cause},
        },
    )


def ledger_checks(seen: TransactionsResult) -> dict[str, bool]:
    """Every acknowledged transfer is in the VM's ledger, and there once."""
    return {
        "no_transaction_lost": seen.audited == seen.acked > 0 and seen.lost == 0,
        "no_transaction_duplicated": seen.duplicated == 0,
        "money_conserved": seen.total_conserved is True,
    }


def judge_failed(error: str, probes: Results, rounds: Sequence[dict[str, Any]]) -> Findings:
    """A migration that did not take place: its clients must not have lost anything all the same.

    `rounds`: those that there were, as in summary.json of one that did.
    """
    transactions, bulk = probes.transactions, probes.bulk
    silence = {
        "ping": baseline(probes.ping.arrived_ns, probes.ping.stopped_ns, []),
        "udp": baseline(probes.udp.arrived_ns, probes.udp.stopped_ns, []),
        "tcp": baseline(bulk.arrived_ns, bulk.stopped_ns, []),
        "transaction": baseline(transactions.arrived_ns, transactions.stopped_ns, []),
    }
    return Findings(
        {
            "vm_moved": False,
            "connections_survived": transactions.connection_survived and bulk.connection_survived,
            **ledger_checks(transactions),
        },
        {
            "failed_migration": {"reason": error, "rounds": list(rounds)},
            "longest_silence_ms": {probe: gap.length_ms for probe, gap in silence.items()},
        },
        error,
    )


def _migration(result: Result, timeline: Timeline, ram_bytes: int, policy: Policy) -> dict[str, Any]:
    outcome = result.outcome
    return {
        "vm": result.vm,
        "source": result.source,
        "destination": result.destination,
        "mode": policy.mode,
        "ram_bytes": ram_bytes,
        "rounds": [msgspec.structs.asdict(r) for r in outcome.rounds],
        "zero_pages": outcome.zero_pages,
        "residual_pages": outcome.residual_pages,
        "stale_pages": outcome.stale_pages,
        "bytes_on_wire": outcome.bytes_on_wire,
        "packed": outcome.packed,
        "throttles": outcome.throttles,
        "total_ms": timeline.total_ms,
        "downtime_ms": timeline.downtime_ms,
        "downtime_target_ms": policy.downtime_ms if policy.aims_at_downtime else None,
        "downtime_predicted_ms": outcome.predicted_downtime_ms,
        "downtime_parts_ms": timeline.parts_ms,
        "goodput_mbps": goodput_mbps(outcome, timeline),
        "postcopy": outcome.postcopy and _postcopy(outcome.postcopy),
    }


def goodput_mbps(outcome: Outcome, timeline: Timeline) -> float:
    """Payload over time where most of it crossed: the largest round, the residual, or post-copy."""
    if outcome.postcopy and outcome.postcopy.pages > sum(r.pages for r in outcome.rounds):
        return outcome.postcopy.pages * PAGE * 8 / outcome.postcopy.ms / 1000
    if not outcome.rounds:
        return outcome.residual_pages * PAGE * 8 / timeline.parts_ms["residual"] / 1000
    longest = max(outcome.rounds, key=lambda r: r.bytes)
    return longest.bytes * 8 / longest.ms / 1000


def _postcopy(postcopy: PostCopy) -> dict[str, Any]:
    waits = sorted(postcopy.fault_us)
    quantiles = {"median": waits[len(waits) // 2], "p99": waits[len(waits) * 99 // 100]} if waits else {}
    return {
        "pages": postcopy.pages,
        "ms": postcopy.ms,
        "faults": postcopy.faults,
        "fault_us": quantiles,
        "waited_ms": sum(waits) / 1000,
    }


def _network(probes: Results, timeline: Timeline) -> dict[str, Any]:
    window = Window(timeline.suspending_ns, timeline.resumed_ns)

    def around(name: str, arrived_ns: list[int], stopped_ns: int) -> tuple[Silence, Silence]:
        return blackout(arrived_ns, stopped_ns, window), baseline(arrived_ns, stopped_ns, [window])

    ping, quiet_ping = around("ping", probes.ping.arrived_ns, probes.ping.stopped_ns)
    udp, quiet_udp = around("udp", probes.udp.arrived_ns, probes.udp.stopped_ns)
    bulk, quiet_bulk = around("bulk", probes.bulk.arrived_ns, probes.bulk.stopped_ns)
    answers, quiet_answers = around("transactions", probes.transactions.arrived_ns, probes.transactions.stopped_ns)
    return {
        "ping_gap_ms": ping.length_ms,
        "ping_lost": probes.ping.lost,
        "udp_gap_ms": udp.length_ms,
        "udp_sent": probes.udp.sent,
        "udp_lost": probes.udp.lost,
        "udp_duplicated": probes.udp.duplicated,
        "tcp_stall_ms": bulk.length_ms,
        "tcp_bytes_verified": probes.bulk.verified_bytes,
        "transaction_stall_ms": answers.length_ms,
        "transactions": probes.transactions.sent,
        "transactions_acknowledged": probes.transactions.acked,
        "transactions_lost": probes.transactions.lost,
        "transactions_duplicated": probes.transactions.duplicated,
        # the longest silences of the same run far from the migration: the testbed's own noise
        "baseline_ms": {
            "ping": quiet_ping.length_ms,
            "udp": quiet_udp.length_ms,
            "tcp": quiet_bulk.length_ms,
            "transaction": quiet_answers.length_ms,
        },
    }


def _ms_after(moment_ns: int | None, origin_ns: int) -> float | None:
    return None if moment_ns is None else (moment_ns - origin_ns) / 1e6
