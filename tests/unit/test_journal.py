"""The ledger's journal: whatever a crash leaves of a write, what was acknowledged is there, exactly once, after it."""

import random
import struct
import zlib
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hosts.journal import MIN_DISK_BYTES, Journal, JournalError, Recovered, Write, format_disk, recover
from hosts.ledger import ACCOUNTS, OPENING_BALANCE, RECORD, Ledger, LedgerError, Transfer

SECTOR = 512
SLOT = 49 * SECTOR  # a checkpoint
RING_AT = SECTOR + 2 * SLOT
RING = 8  # sectors, 120 records: of the smallest disk
SMALLEST_RAM = 28672  # of a ledger without any record
TOTAL = ACCOUNTS * OPENING_BALANCE


class Disk:
    """Bytes that note how much was read of them."""

    def __init__(self, size: int = MIN_DISK_BYTES) -> None:
        self.content = bytearray(size)
        self.reads: list[int] = []

    def read(self, offset: int, size: int) -> bytes:
        assert offset % SECTOR == 0 and size % SECTOR == 0 and size <= 2**20
        self.reads.append(size)
        return bytes(self.content[offset : offset + size])

    def put(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data

    def tear(self, write: Write | None, kept: Iterable[int]) -> None:
        """What a crash leaves of a write: only these of its sectors."""
        assert write is not None
        for at in (sector * SECTOR for sector in kept):
            self.put(write.offset + at, write.data[at : at + SECTOR])

    def sector(self, number: int) -> bytes:
        """One of the ring."""
        return bytes(self.content[RING_AT + number * SECTOR :][:SECTOR])

    def spoil(self, offset: int) -> None:
        self.content[offset] ^= 1


class Guest:
    """A power-on with that disk."""

    def __init__(self, disk: Disk, records: int = 1000) -> None:
        self.disk = disk
        self.memory = bytearray(SMALLEST_RAM + records * RECORD.itemsize)
        self.ledger = Ledger(self.memory)
        self.ledger.format()
        self.recovered = recover(self.ledger, disk.read, len(disk.content))
        if self.recovered.fresh:
            for offset, data in format_disk(len(disk.content)):
                disk.put(offset, data)
        self.journal = Journal(self.ledger, len(disk.content))

    def migrate(self) -> None:
        self.memory = bytearray(self.memory)
        self.ledger = Ledger(self.memory)
        self.journal = Journal(self.ledger, len(self.disk.content))

    def transfer(self, count: int, amount: int = 1) -> None:
        """So many more of one client, if there is no other."""
        for sequence in range(self.ledger.entries + 1, self.ledger.entries + count + 1):
            self.ledger.apply(Transfer(7, sequence, sequence % ACCOUNTS, 0, amount))

    def commit(self, generation: int = 1) -> list[Write]:
        """All there is to write."""
        writes = []
        while write := self.journal.next_write(generation):
            self.disk.put(write.offset, write.data)
            self.journal.written(write)
            writes.append(write)
        return writes

    def amounts(self) -> list[int]:
        assert self.ledger.oldest == 1
        return self.ledger.records(1, 4096)["amount"].tolist()


def used_disk(entries: int = 100) -> Disk:
    disk = Disk()
    guest = Guest(disk)
    guest.transfer(entries)
    guest.commit()
    return disk


# ---------------------------------------------------------------- a new disk


def test_a_disk_of_zeros_is_a_new_one_and_is_not_read_whole() -> None:
    disk = Disk(64 * 2**20)
    guest = Guest(disk)
    assert guest.recovered == Recovered(entries=0, replayed=0, generation=0, fresh=True)
    assert sum(disk.reads) < 64 * 1024
    assert (guest.ledger.entries, guest.journal.durable, guest.ledger.total) == (0, 0, TOTAL)
    assert not Guest(disk).recovered.fresh


@pytest.mark.parametrize("sectors", [0, 1, 48, 49])
def test_a_disk_whose_formatting_was_cut_off_is_still_a_new_one(sectors: int) -> None:
    disk = Disk()
    offset, checkpoint = format_disk(MIN_DISK_BYTES)[0]
    disk.put(offset, checkpoint[: sectors * SECTOR])
    assert Guest(disk).recovered.fresh
    assert not Guest(disk).recovered.fresh


@pytest.mark.parametrize(
    "use",
    [
        format_disk,
        lambda size: Journal(Guest(Disk()).ledger, size),
        lambda size: recover(Guest(Disk()).ledger, Disk().read, size),
    ],
)
def test_a_disk_that_is_too_small_is_refused(use: Callable[[int], object]) -> None:
    with pytest.raises(JournalError, match=f"needs {MIN_DISK_BYTES} bytes, this one has {MIN_DISK_BYTES - 1}"):
        use(MIN_DISK_BYTES - 1)


def test_a_ledger_that_no_disk_gave_has_no_journal() -> None:
    ledger = Ledger(bytearray(2**16))
    ledger.format()
    with pytest.raises(JournalError, match="recovered from its disk first"):
        Journal(ledger, MIN_DISK_BYTES)


def test_a_ring_in_ram_that_is_smaller_than_a_sector_is_refused() -> None:
    with pytest.raises(JournalError, match="RAM for 15 records, not 14"):
        Guest(Disk(), records=14)


# ---------------------------------------------------------------- writing


def test_each_boot_begins_with_a_checkpoint_and_then_a_record_is_one_sector() -> None:
    guest = Guest(Disk())
    guest.transfer(1)
    checkpoint, write = guest.commit()
    assert (checkpoint.checkpoint, checkpoint.entries) == (True, 0)
    assert (write.checkpoint, write.entries, write.offset, len(write.data)) == (False, 1, RING_AT, SECTOR)


def test_an_entry_is_durable_when_its_write_is() -> None:
    guest = Guest(Disk())
    guest.commit()
    guest.transfer(3)
    write = guest.journal.next_write(1)
    assert guest.journal.durable == 0
    assert write is not None and write == guest.journal.next_write(1)  # it may have failed
    guest.journal.written(write)
    assert guest.journal.durable == 3
    assert guest.journal.next_write(1) is None


def test_a_sector_is_laid_out_as_the_module_says() -> None:
    disk = Disk()
    guest = Guest(disk)
    guest.transfer(17, amount=9)
    guest.commit(generation=5)
    sector = disk.sector(1)
    assert struct.unpack("!4sIQQQ", sector[:32]) == (b"VMJR", zlib.crc32(sector[8:]), 17, 5, 1)
    records = np.frombuffer(sector[32:], RECORD).tolist()
    assert records == [(16, 16, 7, 16, 0, 9), (17, 17, 7, 17, 0, 9), *[(0,) * 6] * 13]


def test_the_ledger_may_go_on_while_a_write_is_under_way() -> None:
    disk = Disk()
    guest = Guest(disk, records=40)
    guest.commit()
    guest.transfer(20)
    write = guest.journal.next_write(1)
    assert write is not None
    guest.transfer(20, amount=2)
    disk.put(write.offset, write.data)
    guest.journal.written(write)
    assert guest.journal.durable == 20
    assert Guest(disk).amounts() == [1] * 20


def test_a_commit_begins_with_the_sector_that_is_partly_filled() -> None:
    guest = Guest(Disk())
    guest.transfer(20)
    guest.commit()
    guest.transfer(30)
    (write,) = guest.commit()
    assert (write.offset, len(write.data), write.entries) == (RING_AT + SECTOR, 3 * SECTOR, 50)


def test_a_write_is_of_64_kib_at_most_and_does_not_go_round_the_ring() -> None:
    disk = Disk(RING_AT + 300 * SECTOR)
    guest = Guest(disk, records=5000)
    for _ in range(5):
        guest.transfer(4000)
        for write in guest.commit():
            assert len(write.data) <= 64 * 1024
            assert write.offset + len(write.data) <= (RING_AT if write.checkpoint else len(disk.content))
    assert Guest(disk).recovered.entries == guest.journal.durable == 20_000


def test_a_checkpoint_is_due_when_half_of_the_ring_was_filled_and_they_take_turns() -> None:
    guest = Guest(Disk())
    guest.transfer(500)
    checkpoints = [write for write in guest.commit() if write.checkpoint]
    assert guest.journal.durable == 500
    assert len(checkpoints) > 3
    assert all(after.entries - before.entries >= RING * 15 // 2 for before, after in pairwise(checkpoints))
    assert [write.offset for write in checkpoints[:3]] == [SECTOR + SLOT, SECTOR, SECTOR + SLOT]


def test_a_checkpoint_covers_what_is_durable_and_nothing_else() -> None:
    disk = Disk()
    guest = Guest(disk)
    guest.transfer(60)
    guest.commit()
    balances = guest.ledger.as_of(60)[1].tolist()
    guest.journal = Journal(guest.ledger, MIN_DISK_BYTES)
    guest.ledger.covered = 0  # so that one is due
    guest.transfer(3, amount=2**32 - 1)
    guest.ledger.apply(Transfer(8, 1, 5, 6, 3))
    write = guest.journal.next_write(1)
    assert write is not None and (write.checkpoint, write.entries) == (True, 60)
    disk.put(write.offset, write.data)
    after = Guest(disk)
    assert after.recovered == Recovered(entries=60, replayed=0, generation=1, fresh=False)
    clients, accounts = after.ledger.as_of(60)
    assert clients.tolist() == [[7, 60], [8, 0]]
    assert accounts.tolist() == balances


# ---------------------------------------------------------------- the ring in RAM


def test_a_ledger_is_full_before_a_record_would_be_lost_that_is_yet_to_be_written() -> None:
    disk = Disk()
    guest = Guest(disk, records=40)
    guest.transfer(20)
    guest.commit()
    guest.transfer(35)  # and 16 to 20 are written once more
    assert guest.ledger.is_full
    with pytest.raises(LedgerError, match="full: its journal is at 20 of 55 entries"):
        guest.transfer(1)
    assert guest.ledger.apply(Transfer(7, 55, 55, 0, 1)) == 55  # a repeat takes no room
    guest.commit()
    assert not guest.ledger.is_full
    assert Guest(disk).amounts() == [1] * 55


@pytest.mark.parametrize("records", [15, 16, 29, 31])
def test_the_smallest_ring_in_ram_goes_on_for_ever(records: int) -> None:
    disk = Disk()
    guest = Guest(disk, records)
    for _ in range(300):
        if guest.ledger.is_full:
            guest.commit()
        guest.transfer(1)
    guest.commit()
    assert Guest(disk).recovered.entries == 300


def test_a_migration_takes_along_how_far_the_journal_has_got() -> None:
    disk = Disk()
    guest = Guest(disk)
    guest.transfer(70)
    guest.commit(generation=1)
    guest.transfer(20)
    disk.tear(guest.journal.next_write(1), [1])  # the old owner's last, cut off
    guest.migrate()
    assert guest.journal.durable == 70
    disk.tear(guest.journal.next_write(2), [0])  # the new one's, too: sectors of generations 1, 2, 1
    assert Guest(disk).recovered == Recovered(entries=90, replayed=20, generation=2, fresh=False)


# ---------------------------------------------------------------- crashes


def test_what_was_written_is_recovered_and_goes_on() -> None:
    disk = Disk()
    guest = Guest(disk)
    guest.transfer(40)
    guest.commit(generation=4)
    for entries in (50, 60):
        guest = Guest(disk)
        assert guest.recovered == Recovered(entries - 10, replayed=guest.recovered.replayed, generation=4, fresh=False)
        assert guest.journal.durable == entries - 10
        guest.transfer(10)
        guest.commit(generation=4)
    assert Guest(disk).amounts() == [1] * 60
    assert Guest(disk).ledger.total == TOTAL


@pytest.mark.parametrize("generation", [1, 2])
def test_numbers_that_are_given_away_again_bring_nothing_back_of_what_had_them(generation: int) -> None:
    disk = Disk()
    guest = Guest(disk)
    guest.transfer(20)
    guest.commit()
    guest.transfer(40, amount=666)
    disk.tear(guest.journal.next_write(1), [1, 2])  # 31 to 60 are there, and 21 to 30 are not
    guest = Guest(disk)
    assert guest.recovered.entries == 20
    guest.transfer(10, amount=2)
    guest.commit(generation)  # up to where the old ones begin
    guest = Guest(disk)
    assert guest.amounts() == [1] * 20 + [2] * 10
    guest.transfer(20, amount=3)
    disk.tear(guest.journal.next_write(generation), [])  # a checkpoint that does not come
    assert Guest(disk).amounts() == [1] * 20 + [2] * 10


def test_a_boot_whose_first_writes_were_torn_is_not_taken_for_the_next_one() -> None:
    disk = Disk()
    guest = Guest(disk)
    guest.transfer(15)
    guest.commit()
    guest = Guest(disk)
    assert [write.checkpoint for write in guest.commit()] == [True]
    guest.transfer(45, amount=666)
    disk.tear(guest.journal.next_write(1), [1, 2])
    guest = Guest(disk)  # saw nothing of that boot but its checkpoint
    guest.transfer(15, amount=2)
    guest.commit()
    assert Guest(disk).amounts() == [1] * 15 + [2] * 15


@pytest.mark.parametrize("kept", [[], [0], range(1, 49), [0, *range(2, 49)]])
def test_a_torn_checkpoint_leaves_the_one_before(kept: Iterable[int]) -> None:
    disk = Disk()
    guest = Guest(disk)
    guest.transfer(200)
    while (write := guest.journal.next_write(1)) and not (write.checkpoint and write.entries > 100):
        disk.put(write.offset, write.data)
        guest.journal.written(write)
    disk.tear(write, kept)
    guest = Guest(disk)
    assert guest.recovered.entries >= 100 and guest.recovered.replayed >= RING * 15 // 2
    guest.commit()
    assert Guest(disk).recovered.replayed == 0


@pytest.mark.parametrize("before", [0, 14, 60, 75, 100, 119])
def test_no_write_takes_away_what_is_durable_and_not_covered(before: int) -> None:
    disk = used_disk(before)
    guest = Guest(disk)
    guest.transfer(400)
    while write := guest.journal.next_write(1):
        sectors = len(write.data) // SECTOR
        for kept in ([], [0], [sectors - 1], range(1, sectors), range(sectors)):
            torn = Disk()
            torn.put(0, disk.content)
            torn.tear(write, kept)
            assert Guest(torn).ledger.entries >= guest.journal.durable
        disk.put(write.offset, write.data)
        guest.journal.written(write)
    assert Guest(disk).ledger.entries == before + 400


def test_a_repeat_of_the_last_request_is_answered_after_a_crash() -> None:
    disk = Disk()
    guest = Guest(disk)
    guest.ledger.apply(Transfer(9, 1, 1, 2, 3))
    for sequence in range(1, 75):
        guest.ledger.apply(Transfer(7, sequence, 1, 2, 3))
    guest.commit()
    after = Guest(disk).ledger
    assert after.apply(Transfer(9, 1, 1, 2, 3)) == 1
    assert after.apply(Transfer(7, 74, 1, 2, 3)) == 75
    assert after.apply(Transfer(9, 2, 1, 2, 3)) == 76


def test_half_a_million_entries_are_recovered_by_pieces_and_only_they_are_read() -> None:
    disk = Disk(64 * 2**20)
    guest = Guest(disk, records=60_000)
    for _ in range(10):
        guest.transfer(50_000)
        guest.commit()
    disk.reads.clear()
    after = Guest(disk, records=100_000)
    assert after.recovered == Recovered(entries=500_000, replayed=500_000, generation=1, fresh=False)
    assert sum(disk.reads) < 25 * 2**20
    assert after.ledger.as_of(500_000)[1].tolist() == guest.ledger.as_of(500_000)[1].tolist()
    assert after.ledger.records(1, 2)["sequence"].tolist() == [400_001, 400_002]


def test_a_ring_that_has_wrapped_gives_all_that_it_still_holds() -> None:
    disk = Disk(RING_AT + 5000 * SECTOR)  # 75 000 records, read in three pieces
    guest = Guest(disk, records=1100)
    for _ in range(200):
        guest.transfer(1000 if guest.ledger.entries else 333)
        guest.commit()
    newest = guest.ledger.entries
    after = Guest(disk, records=100_000)
    assert after.ledger.entries == newest
    assert after.ledger.oldest == ((newest - 1) // 15 - 5000 + 1) * 15 + 1
    for first in range(after.ledger.oldest, newest + 1, 4096):
        entries = after.ledger.records(first, 4096)["entry"].tolist()
        assert entries == list(range(first, min(first + 4096, newest + 1)))


# ---------------------------------------------------------------- what no crash explains


def test_a_later_version_is_refused_by_name() -> None:
    disk = used_disk()
    disk.put(8, struct.pack("!I", 2))
    disk.put(4, struct.pack("!I", zlib.crc32(disk.content[8:SECTOR])))
    with pytest.raises(JournalError, match="is of version 2; this program knows version 1"):
        Guest(disk)


@pytest.mark.parametrize("at", [0, 4, 8, 12, 511])
def test_a_spoilt_superblock_is_refused(at: int) -> None:
    disk = used_disk()
    disk.spoil(at)
    with pytest.raises(JournalError, match="superblock is spoilt"):
        Guest(disk)


def test_a_superblock_that_is_gone_does_not_make_a_disk_a_new_one() -> None:
    disk = used_disk()
    disk.put(0, bytes(SECTOR))
    with pytest.raises(JournalError, match="superblock is gone"):
        Guest(disk)


def test_a_disk_that_has_grown_is_refused() -> None:
    disk = used_disk()
    disk.content.extend(bytes(SECTOR))
    with pytest.raises(JournalError, match=f"has {MIN_DISK_BYTES + SECTOR} bytes, .* one of {MIN_DISK_BYTES}"):
        Guest(disk)


def test_a_disk_that_gives_less_than_it_has_is_refused() -> None:
    disk = used_disk()
    ledger = Guest(Disk()).ledger
    with pytest.raises(JournalError, match="the disk gave 7 bytes at 512, not 50176"):
        recover(ledger, lambda offset, size: disk.read(offset, size)[:7], MIN_DISK_BYTES)


def test_two_spoilt_checkpoints_are_refused() -> None:
    disk = used_disk()
    disk.spoil(SECTOR + 100)
    disk.spoil(SECTOR + SLOT + 20_000)
    with pytest.raises(JournalError, match="both checkpoints"):
        Guest(disk)


@pytest.mark.parametrize("more", [[10], [10, 10], [65, 59], [100, 100, 30]])
def test_a_newest_checkpoint_that_is_spoilt_is_told_from_a_torn_one(more: list[int]) -> None:
    disk = used_disk()
    guest = Guest(disk)  # another boot
    for count in more:
        guest.transfer(count)
        guest.commit()
    disk.spoil(SECTOR + guest.ledger.checkpoint % 2 * SLOT)
    with pytest.raises(JournalError, match="newest checkpoint on the disk is spoilt"):
        Guest(disk)


def test_a_spoilt_sector_that_has_to_be_written_once_more_is_refused() -> None:
    disk = used_disk(100)
    Guest(disk).commit()  # a checkpoint, after which the sector does not count
    disk.spoil(RING_AT + 6 * SECTOR + 40)
    with pytest.raises(JournalError, match="sector of entry 100 is spoilt"):
        Guest(disk)


@pytest.mark.parametrize("is_lost", [False, True])
def test_records_before_a_sector_that_is_spoilt_or_was_never_written_are_not_remembered(is_lost: bool) -> None:
    disk = used_disk(100)
    earlier = disk.sector(3)
    guest = Guest(disk)
    guest.transfer(100)
    guest.commit()
    Guest(disk).commit()  # a checkpoint: nothing is replayed
    disk.put(RING_AT + 3 * SECTOR, earlier if is_lost else bytes(SECTOR))  # entries 166 to 180, a lap on
    after = Guest(disk)
    assert after.recovered == Recovered(entries=200, replayed=0, generation=1, fresh=False)
    assert after.ledger.records(1, 4096)["entry"].tolist() == list(range(181, 201))


@settings(max_examples=200)
@given(st.integers(0, MIN_DISK_BYTES * 8 - 1))
def test_a_bit_that_changes_is_noticed_or_ends_the_journal(bit: int) -> None:
    disk = used_disk(112)
    disk.content[bit // 8] ^= 1 << bit % 8
    try:
        guest = Guest(disk)
    except JournalError:
        return
    assert guest.ledger.total == TOTAL
    count = guest.ledger.entries - guest.ledger.oldest + 1
    assert guest.ledger.records(1, 4096)["amount"].tolist() == [1] * count


# ---------------------------------------------------------------- all of it, at random


class CrashingGuest(RuleBasedStateMachine):
    """Clients transfer, the journal commits, the VM moves and crashes, with any part of the last write on the disk."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk()
        self.guest = Guest(self.disk)
        self.truth: list[tuple[int, int, int, int, int, int]] = []
        self.generation = 1
        self.furthest = -1  # sector of the ring that was ever written, counted on and on

    @rule(count=st.integers(1, 60), seed=st.integers(0, 2**32))
    def transfer(self, count: int, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(count):
            client, source, target = chance.randint(1, 5), chance.randrange(ACCOUNTS), chance.randrange(ACCOUNTS)
            sequence = 1 + sum(record[2] == client for record in self.truth)
            amount = chance.randrange(2**32)
            if self.guest.ledger.is_full:
                with pytest.raises(LedgerError, match="full"):
                    self.guest.ledger.apply(Transfer(client, sequence, source, target, amount))
                return
            entry = self.guest.ledger.apply(Transfer(client, sequence, source, target, amount))
            self.truth.append((entry, sequence, client, source, target, amount))

    def next_write(self) -> Write | None:
        write = self.guest.journal.next_write(self.generation)
        if write and not write.checkpoint:
            self.furthest = max(self.furthest, (write.entries - 1) // 15)
        return write

    @rule(most=st.integers(1, 5))
    def commit(self, most: int) -> None:
        for _ in range(most):
            if write := self.next_write():
                self.disk.put(write.offset, write.data)
                self.guest.journal.written(write)

    @rule(kept=st.sets(st.integers(0, 48)))
    def fail_to_write(self, kept: set[int]) -> None:
        if write := self.next_write():
            self.disk.tear(write, kept)

    @rule()
    def migrate(self) -> None:
        self.guest.migrate()
        self.generation += 1

    @rule(kept=st.sets(st.integers(0, 48)), records=st.integers(15, 200), claimed=st.booleans())
    def crash(self, kept: set[int], records: int, claimed: bool) -> None:
        if write := self.next_write():
            self.disk.tear(write, kept)
        acknowledged = self.guest.journal.durable
        self.guest = Guest(self.disk, records)
        entries = self.guest.ledger.entries
        assert acknowledged <= entries <= len(self.truth)
        assert self.guest.journal.durable == self.guest.recovered.entries == entries
        assert self.guest.recovered.generation <= self.generation
        self.truth = self.truth[:entries]
        self.generation += claimed

        # all records that both rings can hold are there, and each client's last request is answered from them
        ledger = self.guest.ledger
        oldest = max(1, entries - records + 1, (self.furthest - RING + 1) * 15 + 1)
        assert ledger.records(oldest, 4096).tolist() == self.truth[oldest - 1 :]
        for client in {record[2] for record in self.truth}:
            last = [record for record in self.truth if record[2] == client][-1]
            if last[0] >= oldest:
                assert ledger.apply(Transfer(client, last[1], *last[3:])) == last[0]

    @precondition(lambda self: self.truth)
    @invariant()
    def it_holds_each_transfer_once_and_the_total(self) -> None:
        ledger = self.guest.ledger
        assert ledger.entries == len(self.truth)
        known = ledger.records(1, 4096).tolist()
        assert known == self.truth[len(self.truth) - len(known) :]
        balances, numbers = [OPENING_BALANCE] * ACCOUNTS, dict.fromkeys(range(1, 6), 0)
        for _, _, client, source, target, amount in self.truth:
            balances[source] -= amount
            balances[target] += amount
            numbers[client] += 1
        clients, accounts = ledger.as_of(ledger.entries)
        assert accounts.tolist() == balances and sum(balances) == ledger.total == TOTAL
        assert dict.fromkeys(range(1, 6), 0) | dict(clients.tolist()) == numbers


TestCrashingGuest = CrashingGuest.TestCase
TestCrashingGuest.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
