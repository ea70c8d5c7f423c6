"""The transaction server's data: exactly once, conserved, wrapping, and surviving as mere bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hosts.ledger import (
    ACCOUNTS,
    MAX_AUDIT_RECORDS,
    OPENING_BALANCE,
    RECORD,
    REPLY,
    REQUEST,
    Ledger,
    LedgerError,
    Transfer,
)

TOTAL = ACCOUNTS * OPENING_BALANCE
SMALLEST = 28672  # bytes: header, clients and accounts, without any record
RING = 5  # records, for the tests that wrap


def ledger_of(records: int = 1000) -> tuple[bytearray, Ledger]:
    memory = bytearray(SMALLEST + records * RECORD.itemsize)
    ledger = Ledger(memory)
    ledger.format()
    return memory, ledger


accounts = st.integers(0, ACCOUNTS - 1)
amounts = st.integers(0, 2**32 - 1)


def test_a_transfer_moves_its_amount_and_is_recorded_as_it_was() -> None:
    _, ledger = ledger_of()
    assert ledger.apply(Transfer(client=7, sequence=1, source=3, target=4, amount=250)) == 1
    assert ledger.records(1, 10).tolist() == [(1, 1, 7, 3, 4, 250)]
    assert ledger.total == TOTAL


def test_a_repeated_transfer_is_answered_again_and_not_applied_again() -> None:
    memory, ledger = ledger_of()
    transfer = Transfer(7, 1, 3, 4, 250)
    entry = ledger.apply(transfer)
    ledger.apply(Transfer(8, 1, 3, 4, 1))
    before = bytes(memory)
    assert ledger.apply(transfer) == entry
    assert bytes(memory) == before


@pytest.mark.parametrize("sequence", [0, 1, 2, 4, 5])
def test_a_gap_or_an_old_number_is_refused_and_changes_nothing(sequence: int) -> None:
    memory, ledger = ledger_of()
    for number in (1, 2, 3):
        ledger.apply(Transfer(7, number, 0, 1, 1))
    before = bytes(memory)
    if sequence == 4:
        assert ledger.apply(Transfer(7, sequence, 0, 1, 1)) == 4
        return
    with pytest.raises(LedgerError, match=f"sent number {sequence} after 3"):
        ledger.apply(Transfer(7, sequence, 0, 1, 1))
    assert bytes(memory) == before


@pytest.mark.parametrize(("source", "target"), [(ACCOUNTS, 0), (0, ACCOUNTS), (2**32 - 1, 2**32 - 1)])
def test_an_account_that_does_not_exist_is_refused_and_changes_nothing(source: int, target: int) -> None:
    memory, ledger = ledger_of()
    before = bytes(memory)
    with pytest.raises(LedgerError, match="beyond 1023"):
        ledger.apply(Transfer(7, 1, source, target, 1))
    assert bytes(memory) == before


def test_memory_that_is_too_small_is_refused() -> None:
    with pytest.raises(LedgerError, match="needs more than"):
        Ledger(bytearray(SMALLEST))


def test_one_client_too_many_is_refused_and_the_known_ones_go_on() -> None:
    _, ledger = ledger_of(records=2000)
    for client in range(1, 1025):
        ledger.apply(Transfer(client, 1, 0, 1, 1))
    with pytest.raises(LedgerError, match="one too many"):
        ledger.apply(Transfer(5000, 1, 0, 1, 1))
    assert ledger.apply(Transfer(1, 2, 0, 1, 1)) == 1025


def test_a_ring_that_has_wrapped_holds_the_newest_records() -> None:
    _, ledger = ledger_of(RING)
    for number in range(1, 13):
        ledger.apply(Transfer(7, number, number, 0, number))
    assert ledger.records(1, 100)["entry"].tolist() == [8, 9, 10, 11, 12]
    assert ledger.records(10, 2)["sequence"].tolist() == [10, 11]
    assert ledger.records(13, 5).size == 0
    assert ledger.total == TOTAL


def test_a_repeat_of_what_the_ring_has_forgotten_is_refused_by_name() -> None:
    _, ledger = ledger_of(RING)
    ledger.apply(Transfer(7, 1, 0, 1, 1))
    for number in range(1, RING + 1):
        ledger.apply(Transfer(8, number, 0, 1, 1))
    with pytest.raises(LedgerError, match="long gone"):
        ledger.apply(Transfer(7, 1, 0, 1, 1))


def test_an_audit_reply_is_limited() -> None:
    _, ledger = ledger_of(records=5000)
    for number in range(1, 5001):
        ledger.apply(Transfer(7, number, 0, 1, 1))
    assert ledger.records(1, 10**9)["entry"].tolist() == list(range(1, MAX_AUDIT_RECORDS + 1))
    assert ledger.records(4097, 10**9).size == 5000 - MAX_AUDIT_RECORDS


def test_the_wire_format_has_the_sizes_that_both_ends_count_on() -> None:
    assert (REQUEST.size, REPLY.size, RECORD.itemsize) == (28, 20, 32)


@settings(max_examples=50)
@given(st.lists(st.tuples(accounts, accounts, amounts), max_size=3 * RING))
def test_the_total_is_conserved_whatever_is_transferred(moves: list[tuple[int, int, int]]) -> None:
    memory, ledger = ledger_of(RING)
    balances = np.full(ACCOUNTS, OPENING_BALANCE)
    for number, (source, target, amount) in enumerate(moves, start=1):
        ledger.apply(Transfer(7, number, source, target, amount))
        balances[source] -= amount
        balances[target] += amount
    assert ledger.total == TOTAL
    assert np.frombuffer(memory, np.int64)[(SMALLEST - ACCOUNTS * 8) // 8 :][:ACCOUNTS].tolist() == balances.tolist()


class MigratingLedger(RuleBasedStateMachine):
    """Clients transfer, repeat and err while the server's memory moves; a list is the truth."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.ledger = ledger_of(RING)
        self.truth: list[tuple[int, int, int, int, int, int]] = []
        self.last: dict[int, tuple[Transfer, int]] = {}

    @rule(client=st.integers(1, 3), out_of=accounts, into=accounts, amount=amounts)
    def transfer(self, client: int, out_of: int, into: int, amount: int) -> None:
        sequence = self.last[client][0].sequence + 1 if client in self.last else 1
        transfer = Transfer(client, sequence, out_of, into, amount)
        entry = self.ledger.apply(transfer)
        assert entry == len(self.truth) + 1
        self.truth.append((entry, sequence, client, out_of, into, amount))
        self.last[client] = transfer, entry

    @precondition(lambda self: self.last)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        transfer, entry = self.last[data.draw(st.sampled_from(sorted(self.last)))]
        if entry > len(self.truth) - RING:
            assert self.ledger.apply(transfer) == entry
        else:
            with pytest.raises(LedgerError):
                self.ledger.apply(transfer)

    @rule()
    def migrate(self) -> None:
        self.memory = bytearray(self.memory)
        self.ledger = Ledger(self.memory)

    @invariant()
    def it_holds_each_transfer_once_and_the_total(self) -> None:
        assert self.ledger.entries == len(self.truth)
        assert self.ledger.records(1, RING).tolist() == self.truth[-RING:]
        assert self.ledger.total == TOTAL


TestMigratingLedger = MigratingLedger.TestCase
TestMigratingLedger.settings = settings(max_examples=50, stateful_step_count=30)
