"""The verdict: a migration that keeps every promise, then one defect at a time and the one check that it turns."""

import dataclasses
from typing import Any, NamedTuple

import msgspec
import pytest

from experiments.echo import EchoResult
from experiments.evidence import Evidence
from experiments.probes import Results
from experiments.streams import BulkResult, TransactionsResult
from experiments.timeline import Timeline
from experiments.verdict import Findings, judge
from hosts.policy import MODES, STRATEGIES, Policy, Round
from hosts.ram import PAGE
from hosts.source import Outcome, PostCopy
from hosts.vcenter import Result

MS = 1_000_000
SUSPENDING, RESUMING, RESUMED = 10_000 * MS, 10_018 * MS, 10_020 * MS
STARTED, STOPPED = 8_000 * MS, 14_000 * MS
POLICY = Policy(downtime_ms=50.0)
DIGEST = "d41d8cd98f00b204e9800998ecf8427e"


def every(step_ms: int, silent_until_ms: int) -> list[int]:
    """Arrivals at this pace, but for a silence from the suspend on."""
    times = range(STARTED, STOPPED, step_ms * MS)
    return [t for t in times if not SUSPENDING < t < silent_until_ms * MS]


def _echo(sent: int, arrived_ns: list[int]) -> EchoResult:
    return EchoResult(10 * MS, STOPPED, sent, sent, 0, 0, 0, 0, {}, [], [], arrived_ns)


class Case(NamedTuple):
    """What the verdict is made of."""

    outcome: Outcome
    timeline: Timeline
    probes: Results
    evidence: Evidence

    def judged(self, announce: str = "rarp", policy: Policy = POLICY) -> Findings:
        result = Result("vm1-0badcafe", "vm1", "esx1", "esx2", self.outcome)
        return judge(
            result,
            self.timeline,
            self.probes,
            self.evidence,
            ram_bytes=2**29,
            policy=policy,
            announce=announce,
        )

    def but(self, part: str, **changes: Any) -> "Case":
        """The same with a defect: `part` is a field, or one of the probes."""
        if part in ("ping", "udp", "transactions", "bulk"):
            probe = msgspec.structs.replace(getattr(self.probes, part), **changes)
            return self._replace(probes=msgspec.structs.replace(self.probes, **{part: probe}))
        replace = msgspec.structs.replace if part == "outcome" else dataclasses.replace
        return self._replace(**{part: replace(getattr(self, part), **changes)})


GOOD = Case(
    outcome=Outcome(
        rounds=[Round(1000, 10, 4_096_000, 40.0, 819_200), Round(200, 0, 819_200, 8.0, 40_960)],
        residual_pages=10,
        bytes_on_wire=5_000_000,
        predicted_downtime_ms=9.0,
        source_digest=DIGEST,
        destination_digest=DIGEST,
        generation=2,
    ),
    timeline=Timeline(
        vm="vm1",
        migration="vm1-0badcafe",
        begun_ns=9_900 * MS,
        suspending_ns=SUSPENDING,
        suspended_ns=10_002 * MS,
        resuming_ns=RESUMING,
        resumed_ns=RESUMED,
        total_ms=120.0,
        downtime_ms=20.0,
        parts_ms={"suspend": 2.0, "residual": 6.0, "state": 6.0, "claim": 2.0, "resume": 4.0},
        announced=5,
        relearn_ms=2.5,
        relearn_cause="rarp",
    ),
    probes=Results(
        ping=_echo(1900, every(10, 10_030)),
        udp=_echo(19_000, every(1, 10_025)),
        transactions=TransactionsResult(
            connection_survived=True,
            failure="",
            stopped_ns=STOPPED,
            client=7,
            local_port=40_000,
            retransmits=0,
            sent=5001,
            acked=5000,
            audited=5000,
            lost=0,
            duplicated=0,
            total_conserved=True,
            arrived_ns=every(2, 10_040),
        ),
        bulk=BulkResult(True, "", STOPPED, 40_001, 12_345_678, every(5, 10_060)),
    ),
    evidence=Evidence(
        announcements=5,
        first_announcement_ns=10_019 * MS,
        answers_from_destination=9000,
        late_frames_from_source=0,
        connections_opened=2,
        resets=0,
    ),
)

CHECKS = {
    "ram_digests_equal",
    "no_stale_page",
    "tcp_connection_survived",
    "no_transaction_lost",
    "no_transaction_duplicated",
    "money_conserved",
    "vm_answers_from_destination",
    "downtime_within_target",
    "announced_after_resume",
}


def test_a_migration_that_keeps_every_promise_passes_every_check() -> None:
    assert GOOD.judged().checks == dict.fromkeys(CHECKS, True)


DEFECTS: list[tuple[str, str, dict[str, Any]]] = [
    ("ram_digests_equal", "outcome", {"destination_digest": "0" * 32}),
    ("ram_digests_equal", "outcome", {"destination_digest": ""}),
    ("ram_digests_equal", "outcome", {"source_digest": "", "destination_digest": ""}),
    ("no_stale_page", "outcome", {"stale_pages": 1}),
    ("tcp_connection_survived", "transactions", {"connection_survived": False}),
    ("tcp_connection_survived", "bulk", {"connection_survived": False}),
    ("tcp_connection_survived", "evidence", {"connections_opened": 3}),  # a client that connected again
    ("tcp_connection_survived", "evidence", {"connections_opened": 0}),  # a capture that saw nothing
    ("tcp_connection_survived", "evidence", {"resets": 1}),
    ("no_transaction_lost", "transactions", {"lost": 1}),
    ("no_transaction_lost", "transactions", {"audited": 4999}),
    ("no_transaction_lost", "transactions", {"audited": 0}),
    ("no_transaction_lost", "transactions", {"audited": 0, "acked": 0}),  # nothing was proved
    ("no_transaction_duplicated", "transactions", {"duplicated": 1}),
    ("money_conserved", "transactions", {"total_conserved": False}),
    ("money_conserved", "transactions", {"total_conserved": None}),  # nobody looked
    ("vm_answers_from_destination", "evidence", {"answers_from_destination": 0}),
    ("vm_answers_from_destination", "evidence", {"late_frames_from_source": 1}),
    ("downtime_within_target", "timeline", {"downtime_ms": 50.001}),
    ("announced_after_resume", "evidence", {"first_announcement_ns": None, "announcements": 0}),
    ("announced_after_resume", "evidence", {"first_announcement_ns": RESUMING - 1}),
]


@pytest.mark.parametrize(("check", "part", "changes"), DEFECTS)
def test_a_defect_turns_its_own_check_and_no_other(check: str, part: str, changes: dict[str, Any]) -> None:
    checks = GOOD.but(part, **changes).judged().checks
    assert {name for name, passed in checks.items() if passed is not True} == {check}
    assert checks.keys() == CHECKS


def test_every_check_has_a_defect_that_turns_it() -> None:
    assert {check for check, _, _ in DEFECTS} == CHECKS


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("ping", {"lost": 3}),  # frames may be lost: TCP and the client's patience are for that
        ("udp", {"lost": 30, "duplicated": 1, "reordered": 2}),
        ("transactions", {"retransmits": 4}),
        ("timeline", {"downtime_ms": 50.0}),
        ("timeline", {"relearn_ms": None, "relearn_cause": None}),
        ("evidence", {"first_announcement_ns": RESUMING}),
    ],
)
def test_what_is_no_broken_promise_turns_no_check(part: str, changes: dict[str, Any]) -> None:
    assert all(GOOD.but(part, **changes).judged().checks.values())


@pytest.mark.parametrize("announce", ["rarp", "garp", "both"])
def test_an_announcement_is_checked_where_one_was_ordered(announce: str) -> None:
    silent = GOOD.but("evidence", first_announcement_ns=None)
    assert silent.judged(announce).checks["announced_after_resume"] is False
    assert silent.judged("none").checks == dict.fromkeys(CHECKS - {"announced_after_resume"}, True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_downtime_is_checked_where_one_was_aimed_at(mode: str, strategy: str) -> None:
    policy = Policy(50.0, 120.0, mode, strategy)  # type: ignore[arg-type]
    findings = GOOD.but("timeline", downtime_ms=5000.0).judged(policy=policy)
    if policy.aims_at_downtime:
        assert findings.checks["downtime_within_target"] is False
        assert findings.sections["migration"]["downtime_target_ms"] == 50.0
    else:
        assert findings.checks == dict.fromkeys(CHECKS - {"downtime_within_target"}, True)
        assert findings.sections["migration"]["downtime_target_ms"] is None


# ---------------------------------------------------------------- the sections of the summary


def test_the_summary_has_the_figures_that_every_experiment_promises() -> None:
    sections = GOOD.judged().sections
    migration, network = sections["migration"], sections["network"]
    assert migration.keys() >= {"mode", "ram_bytes", "rounds", "bytes_on_wire", "total_ms", "downtime_ms"}
    assert migration.keys() >= {"downtime_parts_ms", "goodput_mbps", "ram_digest_equal"}
    assert migration["downtime_parts_ms"].keys() == {"suspend", "residual", "state", "claim", "resume"}
    assert migration["rounds"][0].keys() >= {"pages", "bytes", "ms"}
    assert network.keys() >= {"ping_gap_ms", "udp_gap_ms", "udp_lost", "tcp_stall_ms"}
    assert network.keys() >= {"transactions", "transactions_lost", "transactions_duplicated"}
    assert sections["announce"].keys() >= {"mode", "frames"}
    assert sections["controller"].keys() >= {"relearn_ms"}
    assert msgspec.json.decode(msgspec.json.encode(sections)) == sections, "it is mere data"


def test_the_figures_are_those_that_were_measured() -> None:
    sections = GOOD.judged().sections
    migration, network = sections["migration"], sections["network"]
    assert (migration["vm"], migration["source"], migration["destination"]) == ("vm1", "esx1", "esx2")
    assert (migration["total_ms"], migration["downtime_ms"], migration["residual_pages"]) == (120.0, 20.0, 10)
    assert migration["goodput_mbps"] == pytest.approx(819.2)  # of the longest round: 4 096 000 bytes in 40 ms
    assert migration["ram_digest_equal"] is True
    # from the last arrival before the suspend to the first after the silence, on the probe's own grid
    assert (network["ping_gap_ms"], network["udp_gap_ms"], network["tcp_stall_ms"]) == (30, 25, 60)
    assert network["transaction_stall_ms"] == 40
    assert network["baseline_ms"] == {"ping": 10, "udp": 1, "tcp": 5, "transaction": 2}
    assert sections["announce"] == {"mode": "rarp", "frames": 5, "first_after_resume_ms": 1.0}
    assert sections["controller"] == {"relearn_ms": 2.5, "cause": "rarp"}


def test_without_an_announcement_there_is_no_time_of_the_first() -> None:
    sections = GOOD.but("evidence", announcements=0, first_announcement_ns=None).judged("none").sections
    assert sections["announce"] == {"mode": "none", "frames": 0, "first_after_resume_ms": None}


def postcopy(pages: int, rounds: list[Round], waits: list[float]) -> dict[str, Any]:
    """The summary's section on a migration by post-copy."""
    outcome = {"rounds": rounds, "residual_pages": 0, "postcopy": PostCopy(pages, 1000.0, len(waits), waits)}
    sections = GOOD.but("outcome", **outcome).judged(policy=Policy(mode="hybrid")).sections
    assert msgspec.json.decode(msgspec.json.encode(sections)) == sections, "it is mere data"
    migration: dict[str, Any] = sections["migration"]
    return migration


def test_post_copy_tells_its_pages_and_how_long_the_guest_waited_for_one() -> None:
    waits = [float(us) for us in range(200, 0, -1)]
    section = postcopy(25_000, [], waits)
    assert section["mode"] == "hybrid"
    assert section["postcopy"] == {
        "pages": 25_000,
        "ms": 1000.0,
        "faults": 200,
        "waited_ms": 20.1,
        "fault_us": {"median": 101.0, "p99": 199.0},
    }
    assert section["goodput_mbps"] == pytest.approx(25_000 * PAGE * 8 / 1e6)


def test_post_copy_without_a_fault_has_no_waits() -> None:
    assert postcopy(5, [], [])["postcopy"]["fault_us"] == {}
    assert GOOD.judged().sections["migration"]["postcopy"] is None


def test_the_goodput_is_taken_where_most_pages_crossed() -> None:
    rounds = [Round(1000, 0, 4_096_000, 40.0, 0)]
    assert postcopy(999, rounds, [])["goodput_mbps"] == pytest.approx(819.2)
    assert postcopy(1001, rounds, [])["goodput_mbps"] == pytest.approx(1001 * PAGE * 8 / 1e6)
    stopped = GOOD.but("outcome", rounds=[], residual_pages=750).judged(policy=Policy(mode="stop-and-copy"))
    assert stopped.sections["migration"]["goodput_mbps"] == pytest.approx(750 * PAGE * 8 / 6e3)  # in 6 ms


def test_what_a_guest_was_throttled_by_and_whether_pages_were_packed_is_told() -> None:
    section = GOOD.but("outcome", throttles=[0.2, 0.3], packed=True, zero_pages=7).judged().sections["migration"]
    assert (section["throttles"], section["packed"], section["zero_pages"]) == ([0.2, 0.3], True, 7)
