"""The transaction server's data: accounts and a ledger that live in guest RAM, and its wire format.

Everything is a numpy view of the guest's memory, so that migrating RAM migrates it:

    header    entries applied so far, next free client slot, how far the journal has got
    clients   id -> last sequence number applied         (exactly once: a repeat is not applied again)
    accounts  balances; a transfer moves an amount, so their total never changes
    ledger    ring of the transfers in the order in which they were applied

A transfer is numbered by its client; entries are numbered by the server from 1 on. The answer is
sent after the transfer was applied. A ledger with a journal (hosts/journal.py) keeps in RAM what is
not on the disk yet: it is full when a new record would take the place of one of those.
"""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from topologies.errors import TestbedError

PORT = 7100
REQUEST = struct.Struct("!4sIQIII")  # kind, client, sequence, from, to, amount
REPLY = struct.Struct("!4sQQ")  # kind, sequence, entry
TRANSFER, DONE = b"XFER", b"DONE"
# AUDIT: `sequence` is the first entry wanted, `amount` how many. The reply is LEDGER, the number of
# records that follow and the total of all accounts, then that many records.
AUDIT, LEDGER = b"AUDT", b"LEDG"
RECORD = np.dtype(
    [("entry", ">u8"), ("sequence", ">u8"), ("client", ">u4"), ("from", ">u4"), ("to", ">u4"), ("amount", ">u4")]
)
MAX_AUDIT_RECORDS = 4096
SECTOR_RECORDS = 15  # of one sector of the journal: 512 bytes less a header of 32

ACCOUNTS = 1024
OPENING_BALANCE = 1_000_000
CLIENTS = 1024
_HEADER_BYTES = 4096
_CLIENT_BYTES = CLIENTS * 16
_ACCOUNT_BYTES = ACCOUNTS * 8
_FIXED_BYTES = _HEADER_BYTES + _CLIENT_BYTES + _ACCOUNT_BYTES


class LedgerError(TestbedError):
    """A request that no honest client makes; the connection that sent it is closed."""


@dataclass(frozen=True)
class Transfer:
    """One request: move `amount` from one account to another."""

    client: int
    sequence: int
    source: int
    target: int
    amount: int


class _Word:
    """A number of the ledger's header, as an attribute."""

    def __init__(self, at: int) -> None:
        self._at = at

    def __get__(self, ledger: "Ledger", owner: object = None) -> int:
        return ledger._header[self._at]

    def __set__(self, ledger: "Ledger", value: int) -> None:
        ledger._header[self._at] = value


class Ledger:
    """Accounts and ledger in a writable buffer of at least 64 KiB; `format` once, `open` ever after."""

    entries = _Word(0)  # transfers applied so far
    _known = _Word(1)  # clients
    oldest = _Word(2)  # the ring holds no record of an entry before this one
    # The journal's: how far it has got has to move with the RAM
    durable = _Word(3)  # entries up to this one are on stable storage
    checkpoint = _Word(4)  # serial number of the newest one on stable storage
    covered = _Word(5)  # entries up to this one are in it
    boot = _Word(6)  # serial number of the first checkpoint since RAM was recovered; 0: there is no journal

    def __init__(self, memory: Any) -> None:
        raw = np.frombuffer(memory, np.uint8)
        capacity = (raw.size - _FIXED_BYTES) // RECORD.itemsize
        if capacity < 1:
            raise LedgerError(f"a ledger needs more than {_FIXED_BYTES} bytes of RAM, got {raw.size}")
        accounts_at = _HEADER_BYTES + _CLIENT_BYTES
        self._header: memoryview[int] = raw[: 7 * 8].view(np.uint64).data  # numpy is slower with single numbers
        self._clients = raw[_HEADER_BYTES:accounts_at].view(np.uint64).reshape(CLIENTS, 2)
        self._accounts = raw[accounts_at:_FIXED_BYTES].view(np.int64)
        self._ring = raw[_FIXED_BYTES : _FIXED_BYTES + capacity * RECORD.itemsize].view(RECORD)
        self._slots = {int(client): slot for slot, (client, _) in enumerate(self._clients[: self._known])}

    def format(self) -> None:
        """An empty ledger with every account at its opening balance."""
        for word in range(len(self._header)):
            self._header[word] = 0
        self.oldest = 1
        self._clients[:] = 0
        self._accounts[:] = OPENING_BALANCE
        self._slots.clear()

    @property
    def capacity(self) -> int:
        """Records that the ring has room for."""
        return self._ring.size

    @property
    def is_full(self) -> bool:
        """Whether the next record would take the place of one that the journal has yet to write.

        It writes whole sectors, so it needs the durable records of the sector that it is in, too.
        """
        needed = self.durable // SECTOR_RECORDS * SECTOR_RECORDS + 1
        return self.boot != 0 and self.entries + 1 - self.capacity >= needed

    @property
    def total(self) -> int:
        """The sum of all accounts: ACCOUNTS * OPENING_BALANCE for ever."""
        return int(self._accounts.sum())

    def apply(self, transfer: Transfer) -> int:
        """Apply a transfer exactly once and return its entry number.

        A sequence number must follow the client's last; the last one again is answered again.
        """
        if transfer.source >= ACCOUNTS or transfer.target >= ACCOUNTS:
            raise LedgerError(f"client {transfer.client:#x} names an account beyond {ACCOUNTS - 1}")
        client = self._clients[self._slot(transfer.client)]
        last = int(client[1])
        if transfer.sequence == last:
            return self._entry_of(transfer)
        if transfer.sequence != last + 1:
            raise LedgerError(f"client {transfer.client:#x} sent number {transfer.sequence} after {last}")
        if self.is_full:
            raise LedgerError(f"the ledger is full: its journal is at {self.durable} of {self.entries} entries")
        entry = self.entries + 1
        self._ring[(entry - 1) % self._ring.size] = (
            entry,
            transfer.sequence,
            transfer.client,
            transfer.source,
            transfer.target,
            transfer.amount,
        )
        self._accounts[transfer.source] -= transfer.amount
        self._accounts[transfer.target] += transfer.amount
        client[1] = transfer.sequence
        self.entries = entry
        return entry

    def records(self, first: int, count: int) -> np.ndarray:
        """Up to `count` (at most MAX_AUDIT_RECORDS) records from entry `first` on, as far as the ring holds them."""
        first = max(first, self.entries - self._ring.size + 1, self.oldest)
        return self._between(first, min(first + min(count, MAX_AUDIT_RECORDS) - 1, self.entries))

    # ------------------------------------------------------------ for the journal

    def as_of(self, entry: int) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the clients and the accounts as they were after that entry; the ring holds what came later."""
        clients, accounts = self._clients[: self._known].copy(), self._accounts.copy()
        self._book(self._between(entry + 1, self.entries), clients, accounts, -1)
        return clients, accounts

    def restore(self, entries: int, clients: np.ndarray, accounts: np.ndarray) -> None:
        """Begin with what `as_of` gave; the ring is empty."""
        self.format()
        self.entries, self._known, self.oldest = entries, len(clients), entries + 1
        self._clients[: len(clients)] = clients
        self._accounts[:] = accounts
        self._slots.update((int(client), slot) for slot, (client, _) in enumerate(clients))

    def replay(self, records: np.ndarray) -> None:
        """Apply records that follow the newest entry and were applied once already: nothing is checked again."""
        self._book(records, self._clients, self._accounts, 1)
        self.entries += len(records)
        self._put(records)

    def remember(self, records: np.ndarray) -> None:
        """Put the records before the oldest one, which are applied, into the ring as far as it reaches."""
        self.oldest -= len(records)
        self._put(records)

    def _book(self, records: np.ndarray, clients: np.ndarray, accounts: np.ndarray, sign: int) -> None:
        """Apply records (1) or take them back (-1). A client's numbers follow one another, so they can be counted."""
        amounts = sign * records["amount"].astype(np.int64)
        np.subtract.at(accounts, records["from"].astype(np.intp), amounts)
        np.add.at(accounts, records["to"].astype(np.intp), amounts)
        for client, count in zip(*np.unique(records["client"], return_counts=True), strict=True):
            slot = self._slot(int(client))
            clients[slot, 1] = int(clients[slot, 1]) + sign * int(count)

    def _put(self, records: np.ndarray) -> None:
        kept = records[records["entry"].astype(np.int64) > self.entries - self._ring.size]
        self._ring[(kept["entry"].astype(np.int64) - 1) % self._ring.size] = kept

    # ------------------------------------------------------------

    def _between(self, first: int, last: int) -> np.ndarray:
        at, count = (first - 1) % self._ring.size, max(0, last - first + 1)
        if at + count <= self._ring.size:
            return self._ring[at : at + count].copy()  # one or two are asked for all the time, and this is quicker
        return self._ring[np.arange(at, at + count) % self._ring.size]

    def _slot(self, client: int) -> int:
        slot = self._slots.get(client)
        if slot is None:
            slot = self._known
            if slot == CLIENTS:
                raise LedgerError(f"client {client:#x} is one too many; the server knows {CLIENTS}")
            self._clients[slot] = (client, 0)
            self._known = slot + 1
            self._slots[client] = slot
        return slot

    def _entry_of(self, transfer: Transfer) -> int:
        known = self.records(self.entries - MAX_AUDIT_RECORDS + 1, MAX_AUDIT_RECORDS)
        mine = known[(known["client"] == transfer.client) & (known["sequence"] == transfer.sequence)]
        if not mine.size:
            raise LedgerError(
                f"client {transfer.client:#x} repeats number {transfer.sequence}, long gone from the ledger"
            )
        return int(mine["entry"][0])
