"""The ledger's journal on the VM's disk: what is acknowledged is there after a crash, exactly once.

The disk begins with a superblock (magic, CRC-32, version, size) and two slots for checkpoints, written in turn: all
accounts, the clients' last numbers, the number of entries that they are made of, and a serial number. The rest is a
ring of sectors of 15 records each; entry e is in sector (e-1)//15, counted round and round, at place (e-1)%15. A
group commit writes the sectors from the first entry on that is not on stable storage; the last one may be partly filled
and is written again by the next commit. A sector's header says up to which entry it is filled, under which generation
of the VM's ownership and after which boot it was written: the disk's own record of who wrote when. Each structure
has its CRC, numbers are big-endian, and a sector (512 bytes) is written as a whole or not at all, as disks promise; of
the sectors of one write any may be missing after a crash. Recovery takes the newest whole checkpoint and then the
sectors that follow it without a gap.

Sectors that no recovery took, because of a gap before them, hold entries whose numbers are given away again. So each
boot begins with a checkpoint, and it is on stable storage before a sector is written that bears its serial number
as its boot. All that follows a checkpoint was written after the same boot, then; a sector of another boot is not part
of it. (The generation could not tell that: a boot need not have a new one, and where a write was cut off by a
migration and its successor by a crash, a sector of the old generation rightly follows one of the new.)

Pure: nothing here reads or writes a disk, and nothing is kept but the ledger, whose RAM moves.
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hosts.ledger import ACCOUNTS, CLIENTS, OPENING_BALANCE, RECORD, SECTOR_RECORDS, Ledger
from hosts.vm_files import SECTOR_BYTES
from topologies.errors import TestbedError

VERSION = 1
# Every structure begins with its magic and the CRC of all that follows. A superblock's version stays where it is in
# every version, so that it can be told.
_SUPERBLOCK = np.dtype([("magic", "S4"), ("crc", ">u4"), ("version", ">u4"), ("bytes", ">u8"), ("spare", "V492")])
_CHECKPOINT = np.dtype(
    [
        ("magic", "S4"),
        ("crc", ">u4"),
        ("serial", ">u8"),
        ("boot", ">u8"),
        ("generation", ">u8"),
        ("entries", ">u8"),
        ("known", ">u8"),  # clients
        ("spare", "V464"),
        ("clients", ">u8", (CLIENTS, 2)),
        ("accounts", ">i8", ACCOUNTS),
    ]
)
_SECTOR = np.dtype(
    [
        ("magic", "S4"),
        ("crc", ">u4"),
        ("last", ">u8"),  # the entry up to which it is filled: where it lies says what its first one is
        ("generation", ">u8"),
        ("boot", ">u8"),
        ("records", RECORD, SECTOR_RECORDS),
    ]
)
_MAGIC = {_SUPERBLOCK: b"VMJS", _CHECKPOINT: b"VMJC", _SECTOR: b"VMJR"}
# A sector without numpy, which takes three times as long for a single one, and a client waits for it
_SEAL, _HEADER = struct.Struct("!4sI"), struct.Struct("!QQQ")
_RECORDS_BYTES = SECTOR_RECORDS * RECORD.itemsize
_SLOTS_AT = SECTOR_BYTES
_RING_AT = _SLOTS_AT + 2 * _CHECKPOINT.itemsize
_MAX_WRITE_SECTORS = 64 * 1024 // SECTOR_BYTES  # in a longer one the first records would wait for the last
_MAX_READ_SECTORS = 2**20 // SECTOR_BYTES
MIN_DISK_BYTES = _RING_AT + 8 * SECTOR_BYTES  # with half of a smaller ring filled, there may be no sector to go on in


class JournalError(TestbedError):
    """A disk that cannot be, or is not, this ledger's; nothing was written to it."""


@dataclass(frozen=True)
class Write:
    """What is to be written next, contiguous and of 64 KiB at most."""

    offset: int
    data: bytes
    entries: int  # up to this one the journal, or the checkpoint, is good once this is on stable storage
    checkpoint: bool


@dataclass(frozen=True)
class Recovered:
    """What a disk gave."""

    entries: int
    replayed: int  # of these, after the checkpoint
    generation: int  # the highest under which anything was written
    fresh: bool  # nothing was, it is a new disk: to be formatted (`format_disk`)


class Journal:
    """What has to be written next. The ledger was recovered from this disk, here or where the VM has come from.

    One write at a time: `next_write`, on stable storage, `written`. If it has failed, or if the VM has moved meanwhile,
    the next one takes its place; but before the VM runs elsewhere it must be over, one way or the other: a write that
    comes late takes back what was written since.
    """

    def __init__(self, ledger: Ledger, disk_bytes: int) -> None:
        self._sectors = _ring_sectors(disk_bytes)
        if not ledger.boot:
            raise JournalError("the ledger in RAM has no journal: it has to be recovered from its disk first")
        self._ledger = ledger

    @property
    def durable(self) -> int:
        """Entries up to this one may be acknowledged."""
        return self._ledger.durable

    def next_write(self, generation: int) -> Write | None:
        """A copy of what is not on stable storage yet, as it is now, to be written under that generation."""
        ledger = self._ledger
        durable, covered, entries = ledger.durable, ledger.covered, ledger.entries
        if ledger.checkpoint < ledger.boot or durable - covered >= self._sectors * SECTOR_RECORDS // 2:
            return self.checkpoint(generation)
        if durable == entries:
            return None
        first = durable // SECTOR_RECORDS
        stop = min(
            first + _MAX_WRITE_SECTORS,
            first - first % self._sectors + self._sectors,  # the end of the ring
            covered // SECTOR_RECORDS + self._sectors,  # a lap on lies the first entry that no checkpoint covers
            (entries - 1) // SECTOR_RECORDS + 1,
        )
        start, last = first * SECTOR_RECORDS, min(stop * SECTOR_RECORDS, entries)
        records = ledger.records(start + 1, last - start).tobytes().ljust((stop - first) * _RECORDS_BYTES, b"\0")
        sectors, boot = [], ledger.boot
        for sector in range(first, stop):
            filled = min((sector + 1) * SECTOR_RECORDS, last)
            at = (sector - first) * _RECORDS_BYTES
            content = _HEADER.pack(filled, generation, boot) + records[at : at + _RECORDS_BYTES]
            sectors.append(_SEAL.pack(_MAGIC[_SECTOR], zlib.crc32(content)) + content)
        return Write(_offset(first, self._sectors), b"".join(sectors), last, checkpoint=False)

    def written(self, write: Write) -> None:
        """It is on stable storage now."""
        if write.checkpoint:
            self._ledger.checkpoint += 1
            self._ledger.covered = write.entries
        else:
            self._ledger.durable = write.entries

    def checkpoint(self, generation: int) -> Write:
        """Of what is durable, not of all that was applied: so each entry that it covers has its record on the disk."""
        ledger = self._ledger
        serial = ledger.checkpoint + 1
        clients, accounts = ledger.as_of(ledger.durable)
        data = _checkpoint(serial, ledger.boot, generation, ledger.durable, clients, accounts)
        return Write(_slot(serial), data, ledger.durable, checkpoint=True)


def format_disk(disk_bytes: int) -> list[tuple[int, bytes]]:
    """What to write where on a disk of zeros, each on stable storage before the next: with the last one, it is one."""
    _ring_sectors(disk_bytes)
    no_clients, accounts = np.zeros((0, 2), np.uint64), np.full(ACCOUNTS, OPENING_BALANCE)
    superblock = np.zeros(1, _SUPERBLOCK)
    superblock["version"] = VERSION
    superblock["bytes"] = disk_bytes
    return [(_slot(0), _checkpoint(0, 0, 0, 0, no_clients, accounts)), (0, _sealed(superblock))]


# ---------------------------------------------------------------- recovery


def recover(ledger: Ledger, read: Callable[[int, int], bytes], disk_bytes: int) -> Recovered:
    """Bring a ledger to what the disk says; `read` takes an offset and a size, of 1 MiB at most.

    All that is read counts as durable: whoever writes to a disk writes to stable storage (hosts/vmx_process.py). What
    its writer did not live to see answered may show a moment before it is there, and would be lost if the storage's own
    machine crashed just then. Of a disk that is not whole in a way that no crash explains, JournalError.
    """
    sectors = _ring_sectors(disk_bytes)
    if ledger.capacity < SECTOR_RECORDS:
        raise JournalError(f"a ledger with a journal needs RAM for {SECTOR_RECORDS} records, not {ledger.capacity}")
    slots = _blocks(read, _SLOTS_AT, 2, _CHECKPOINT)
    whole = sorted(slots[_are_whole(slots)], key=lambda slot: int(slot["serial"]))
    fresh = _is_fresh(_blocks(read, 0, 1, _SUPERBLOCK), disk_bytes)
    if fresh and any(slot["serial"] for slot in whole):
        raise JournalError("the disk's superblock is gone, and it is not a new one: there is a checkpoint")
    if fresh:
        ledger.format()
        ledger.boot = 1
        return Recovered(entries=0, replayed=0, generation=0, fresh=True)
    if not whole:
        raise JournalError("both checkpoints on the disk are spoilt: which entries it holds cannot be told")
    newest = whole[-1]
    covered = int(newest["entries"])
    ledger.restore(covered, newest["clients"][: int(newest["known"])], newest["accounts"])
    ledger.checkpoint, ledger.covered = int(newest["serial"]), covered
    generation = max(int(newest["generation"]), _replay(ledger, read, sectors, int(newest["boot"])))
    _remember(ledger, read, sectors)
    if ledger.oldest > ledger.entries // SECTOR_RECORDS * SECTOR_RECORDS + 1:
        raise JournalError(f"the journal's sector of entry {ledger.entries} is spoilt, and it was on stable storage")
    ledger.durable, ledger.boot = ledger.entries, ledger.checkpoint + 1
    return Recovered(ledger.entries, ledger.entries - covered, generation, fresh=False)


def _is_fresh(superblock: np.ndarray, disk_bytes: int) -> bool:
    if not any(superblock.tobytes()):
        return True
    if not _are_whole(superblock).all():
        raise JournalError("the disk's superblock is spoilt, or it is no ledger's journal")
    version, size = int(superblock["version"][0]), int(superblock["bytes"][0])
    if version != VERSION:
        raise JournalError(f"the journal on the disk is of version {version}; this program knows version {VERSION}")
    if size != disk_bytes:
        raise JournalError(f"the disk has {disk_bytes} bytes, and the journal on it is one of {size}")
    return False


def _replay(ledger: Ledger, read: Callable[[int, int], bytes], sectors: int, boot: int) -> int:
    """Apply what follows the checkpoint without a gap; the highest generation seen."""
    generation = 0
    start, end = ledger.covered // SECTOR_RECORDS, ledger.covered // SECTOR_RECORDS + sectors
    while start < end:
        stop = min(end, start + _MAX_READ_SECTORS, start - start % sectors + sectors)
        found = _blocks(read, _offset(start, sectors), stop - start, _SECTOR)
        whole = _are_whole(found)
        generation = max(generation, int(found["generation"][whole].max(initial=0)))
        last, filled = found["last"].astype(np.int64), np.arange(start + 1, stop + 1) * SECTOR_RECORDS
        # Sectors of a later boot, or a lap on, are written only when there is a later checkpoint
        if (whole & ((found["boot"] > boot) | (found["boot"] == boot) & (last > filled))).any():
            raise JournalError(
                f"the newest checkpoint on the disk is spoilt: the journal goes on after {ledger.covered}"
            )
        follow = whole & (found["boot"] == boot) & (last > filled - SECTOR_RECORDS)
        full = int(np.logical_and.accumulate(follow & (last == filled)).sum())
        taken = full + int(follow[full : full + 1].sum())  # after the full ones, one that is partly filled
        if taken:
            records = found["records"][:taken].reshape(-1)
            ledger.replay(records[ledger.entries - start * SECTOR_RECORDS : last[taken - 1] - start * SECTOR_RECORDS])
        if full < stop - start:
            break
        start = stop
    return generation


def _remember(ledger: Ledger, read: Callable[[int, int], bytes], sectors: int) -> None:
    """Fill the ring with the records before those that were replayed, back to the first that is not there any more."""
    stop = -(-ledger.covered // SECTOR_RECORDS)
    end = max(0, (ledger.entries - ledger.capacity) // SECTOR_RECORDS, -(-ledger.entries // SECTOR_RECORDS) - sectors)
    while stop > end:
        start = max(end, stop - _MAX_READ_SECTORS, (stop - 1) - (stop - 1) % sectors)
        found = _blocks(read, _offset(start, sectors), stop - start, _SECTOR)
        filled = np.arange(start + 1, stop + 1) * SECTOR_RECORDS
        last = found["last"].astype(np.int64)
        held = _are_whole(found) & (last <= filled) & (last >= np.minimum(filled, ledger.covered))
        gone = int(np.flatnonzero(np.append(True, ~held))[-1])
        first = (start + gone) * SECTOR_RECORDS
        ledger.remember(found["records"][gone:].reshape(-1)[: ledger.covered - first])
        if gone:
            break
        stop = start


# ---------------------------------------------------------------- the structures


def _ring_sectors(disk_bytes: int) -> int:
    if disk_bytes < MIN_DISK_BYTES:
        raise JournalError(f"a disk for the ledger's journal needs {MIN_DISK_BYTES} bytes, this one has {disk_bytes}")
    return (disk_bytes - _RING_AT) // SECTOR_BYTES


def _offset(sector: int, sectors: int) -> int:
    return _RING_AT + sector % sectors * SECTOR_BYTES


def _slot(serial: int) -> int:
    return _SLOTS_AT + serial % 2 * _CHECKPOINT.itemsize


def _checkpoint(
    serial: int, boot: int, generation: int, entries: int, clients: np.ndarray, accounts: np.ndarray
) -> bytes:
    checkpoint = np.zeros(1, _CHECKPOINT)
    checkpoint[["serial", "boot", "generation", "entries", "known"]] = (serial, boot, generation, entries, len(clients))
    checkpoint["clients"][0, : len(clients)] = clients
    checkpoint["accounts"] = accounts
    return _sealed(checkpoint)


def _sealed(blocks: np.ndarray) -> bytes:
    blocks["magic"] = _MAGIC[blocks.dtype]
    blocks["crc"] = _checksums(blocks)
    return blocks.tobytes()


def _are_whole(blocks: np.ndarray) -> np.ndarray:
    return (blocks["magic"] == _MAGIC[blocks.dtype]) & (blocks["crc"] == np.array(_checksums(blocks), np.uint32))


def _checksums(blocks: np.ndarray) -> list[int]:
    size = blocks.dtype.itemsize
    raw = blocks.view(np.uint8).data
    return [zlib.crc32(raw[at + 8 : at + size]) for at in range(0, len(raw), size)]


def _blocks(read: Callable[[int, int], bytes], offset: int, count: int, kind: np.dtype) -> np.ndarray:
    data = read(offset, count * kind.itemsize)
    if len(data) != count * kind.itemsize:
        raise JournalError(f"the disk gave {len(data)} bytes at {offset}, not {count * kind.itemsize}")
    return np.frombuffer(data, kind)


def written_under(read: Callable[[int, int], bytes], disk_bytes: int) -> list[tuple[int, int, int]]:
    """What the disk itself tells of who wrote when: (first entry, last entry, generation), in the order of the entries.

    Of all sectors that are whole, so of more than a recovery takes; neighbours of one generation are one.
    """
    sectors = _ring_sectors(disk_bytes)
    found = []
    for start in range(0, sectors, _MAX_READ_SECTORS):
        blocks = _blocks(read, _offset(start, sectors), min(_MAX_READ_SECTORS, sectors - start), _SECTOR)
        for block in blocks[_are_whole(blocks)]:
            last = int(block["last"])
            found.append(((last - 1) // SECTOR_RECORDS * SECTOR_RECORDS + 1, last, int(block["generation"])))
    spans: list[tuple[int, int, int]] = []
    for first, last, generation in sorted(found):
        if spans and spans[-1][2] == generation:
            first = spans.pop()[0]
        spans.append((first, last, generation))
    return spans
