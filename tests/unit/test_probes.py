"""The pure parts of the probes: counting, packets, the audit's verdict, verifying a stream, thinning arrivals."""

import struct
from collections.abc import Sequence
from itertools import islice, pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from experiments.capture import Count, epoch_ns, parse_counts
from experiments.echo import Tally, icmp_reply, icmp_request, tally
from experiments.streams import (
    BULK_GRAIN_NS,
    Arrivals,
    Audit,
    BrokenConnectionError,
    Entry,
    audit,
    transfers,
    verify,
)
from hosts.bulk import pattern

# ---------------------------------------------------------------- ping and udp


@pytest.mark.parametrize(
    ("sent", "numbers", "expected"),
    [
        (4, [0, 1, 2, 3], Tally(received=4, lost=0, duplicated=0, reordered=0)),
        (4, [0, 3], Tally(received=2, lost=2, duplicated=0, reordered=0)),
        (4, [1, 0, 2, 3], Tally(received=4, lost=0, duplicated=0, reordered=1)),
        (4, [3, 0, 1, 2], Tally(received=4, lost=0, duplicated=0, reordered=3)),  # RFC 4737: each comes late
        (4, [0, 1, 1, 0, 2, 3], Tally(received=4, lost=0, duplicated=2, reordered=0)),  # a late copy is no reordering
        (3, [], Tally(received=0, lost=3, duplicated=0, reordered=0)),
    ],
)
def test_arrivals_are_counted_as_rfc_4737_says(sent: int, numbers: Sequence[int], expected: Tally) -> None:
    assert tally(sent, numbers) == expected


@given(st.lists(st.integers(0, 19), max_size=60))
def test_every_packet_is_received_or_lost_and_every_arrival_is_one_or_a_copy(numbers: list[int]) -> None:
    count = tally(20, numbers)
    assert count.received + count.lost == 20
    assert count.received + count.duplicated == len(numbers)
    assert count.reordered < max(count.received, 1)
    first_arrivals = list(dict.fromkeys(numbers))
    assert (count.reordered == 0) == (first_arrivals == sorted(first_arrivals))


def _checksum_holds(message: bytes) -> bool:
    total = sum(struct.unpack(f"!{len(message) // 2}H", message))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total == 0xFFFF


@given(st.integers(0, 0xFFFF), st.integers(0, 2**40), st.binary(min_size=16, max_size=16))
@example(identifier=0xF7FF, number=8, payload=b"\xff" * 16)  # folding the carry gives another carry
def test_an_echo_request_has_the_right_checksum_and_its_reply_brings_the_payload_back(
    identifier: int, number: int, payload: bytes
) -> None:
    request = icmp_request(identifier, number, payload)
    assert request[:2] == b"\x08\x00"
    assert _checksum_holds(request)

    reply = b"\0" + request[1:]
    for header in (b"\x45" + bytes(19), b"\x46" + bytes(23)):  # without and with IP options
        assert icmp_reply(identifier, header + reply) == payload
        assert icmp_reply(identifier ^ 1, header + reply) == b""
        assert icmp_reply(identifier, header + request) == b""
        assert icmp_reply(identifier, header + reply[:7]) == b""


# ---------------------------------------------------------------- transactions

CLIENT, OTHER = 0xC1, 0xC2


def _acked(count: int, first_entry: int = 1) -> list[Entry]:
    numbered = zip(range(first_entry, first_entry + count), transfers(CLIENT, 1024), strict=False)
    return [Entry(entry, sequence, CLIENT, *rest) for entry, (sequence, *rest) in numbered]


def test_a_client_makes_the_same_transfers_again_and_another_makes_others() -> None:
    mine = list(islice(transfers(CLIENT, 1024), 1000))
    assert mine == list(islice(transfers(CLIENT, 1024), 1000))
    assert [sequence for sequence, *_ in mine] == list(range(1, 1001))
    assert mine != list(islice(transfers(OTHER, 1024), 1000))
    assert all(0 <= source < 1024 and 0 <= target < 1024 and 0 < amount <= 100 for _, source, target, amount in mine)


def test_a_ledger_that_holds_what_was_acknowledged_passes() -> None:
    assert audit(_acked(100), _acked(100)) == Audit(audited=100, lost=0, duplicated=0)
    assert audit(_acked(99), _acked(100)) == Audit(99, 0, 0), "applied but not yet acknowledged"
    assert audit([], []) == Audit(0, 0, 0)


def test_an_empty_ledger_has_lost_everything() -> None:
    assert audit(_acked(100), []) == Audit(audited=100, lost=100, duplicated=0)


def test_a_ledger_that_fell_back_behind_an_acknowledgement_has_lost_it() -> None:
    assert audit(_acked(100), _acked(90)) == Audit(audited=100, lost=10, duplicated=0)


def test_an_acknowledged_transfer_in_another_entry_is_lost_and_there_twice_is_duplicated() -> None:
    acked = _acked(10)
    moved = [*acked[:5], acked[5]._replace(entry=7), *(e._replace(entry=e.entry + 1) for e in acked[6:])]
    assert audit(acked, moved) == Audit(audited=10, lost=5, duplicated=0)
    assert audit(acked, [*acked, acked[3]._replace(entry=11)]) == Audit(audited=10, lost=0, duplicated=1)


@given(st.data())
def test_the_audit_finds_exactly_what_is_wrong(data: st.DataObject) -> None:
    """A ring that has wrapped, other clients' entries in between, and random damage."""
    owners = data.draw(st.lists(st.booleans(), min_size=1, max_size=40))
    ledger: list[Entry] = []
    mine = transfers(CLIENT, 1024)
    for number, is_mine in enumerate(owners, start=1):
        sequence, *rest = next(mine) if is_mine else (number, 1, 2, 3)
        ledger.append(Entry(number, sequence, CLIENT if is_mine else OTHER, *rest))
    acked = [record for record in ledger if record.client == CLIENT]
    kept = ledger[data.draw(st.integers(0, len(ledger) - 1)) :]
    auditable = [record for record in kept if record.client == CLIENT]

    wrong = data.draw(st.sets(st.sampled_from(auditable))) if auditable else set()
    twice = data.draw(st.sets(st.sampled_from(auditable))) if auditable else set()
    damaged = [record._replace(amount=record.amount + 1) if record in wrong else record for record in kept]
    copies = [record._replace(entry=len(ledger) + n) for n, record in enumerate(sorted(twice), start=1)]
    assert audit(acked, damaged + copies) == Audit(len(auditable), len(wrong), len(twice))


# ---------------------------------------------------------------- bulk


@given(st.integers(0, 2**40), st.integers(1, 5000), st.data())
def test_a_wrong_byte_is_found_where_it_is(offset: int, length: int, data: st.DataObject) -> None:
    stream = bytearray(pattern(offset, length))
    verify(bytes(stream), offset)
    at = data.draw(st.integers(0, length - 1))
    stream[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(BrokenConnectionError, match=f"^byte {offset + at} of the stream is"):
        verify(bytes(stream), offset)


@given(st.integers(0, 2**40), st.sampled_from([1, 64, 1448, 4096, 65536]))
def test_a_stream_that_lost_or_repeated_a_segment_is_noticed(offset: int, segment: int) -> None:
    for start in (offset + segment, max(0, offset - segment)):
        if start != offset:
            with pytest.raises(BrokenConnectionError):
                verify(pattern(start, 1448), offset)


@given(st.lists(st.integers(0, 3 * BULK_GRAIN_NS), min_size=1, max_size=200))
def test_thinned_arrivals_keep_both_ends_of_every_long_silence(steps_ns: list[int]) -> None:
    arrivals, times = Arrivals(), [0]
    for step_ns in steps_ns:
        times.append(times[-1] + step_ns)
    for time_ns in times:
        arrivals.add(time_ns)
    kept = arrivals.all()

    def long(points: list[int]) -> list[tuple[int, int]]:
        return [(a, b) for a, b in pairwise(points) if b - a >= BULK_GRAIN_NS]

    assert set(kept) <= set(times)
    assert (kept[0], kept[-1]) == (times[0], times[-1])
    assert kept == sorted(set(kept))
    assert set(long(times)) <= set(long(kept)), "no silence is lost"
    assert max(b - a for a, b in pairwise([*kept, kept[-1]])) <= max(BULK_GRAIN_NS * 2, *steps_ns)
    assert len(kept) <= 2 * (times[-1] // BULK_GRAIN_NS + 1)
    assert arrivals.all() == kept


# ---------------------------------------------------------------- captures


@pytest.mark.parametrize(
    ("text", "expected_ns"),
    [
        ("1795384346.349749761", 1795384346_349749761),
        ("1795384346.349749", 1795384346_349749000),
        ("1795384346", 1795384346_000000000),
        ("0.000000001", 1),
        ("2026-11-22T21:52:26.349749761Z", 1795384346_349749761),
        ("2026-11-22T21:52:26Z", 1795384346_000000000),
    ],
)
def test_tshark_times_are_read_to_the_nanosecond(text: str, expected_ns: int) -> None:
    assert epoch_ns(text) == expected_ns


@given(st.integers(0, 2**62))
def test_decimal_times_lose_nothing(time_ns: int) -> None:
    assert epoch_ns(f"{time_ns // 10**9}.{time_ns % 10**9:09d}") == time_ns


def test_dumpcaps_closing_lines_say_what_was_received_and_dropped() -> None:
    lines = [
        "Capturing on 'esx1-vmnic0' and 'Loopback: lo'",
        "File: esx1.pcapng",
        "",
        "Packets captured: 3",
        "Packets received/dropped on interface 'esx1-vmnic0': 938/62 (pcap:0/dumpcap:60/flushed:2/ps_ifdrop:0) (93.8%)",
        "Packets received/dropped on interface 'Loopback: lo': 0/0 (pcap:0/dumpcap:0/flushed:0/ps_ifdrop:0) (0.0%)",
    ]
    assert parse_counts("esx1", lines) == [Count("esx1", "esx1-vmnic0", 938, 62), Count("esx1", "lo", 0, 0)]
