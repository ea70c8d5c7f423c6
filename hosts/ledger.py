"""The transaction server's data: accounts and a ledger that live in guest RAM, and its wire format.

Everything is a numpy view of the guest's memory, so that migrating RAM migrates it:

    header    entries applied so far, next free client slot
    clients   id -> last sequence number applied         (exactly once: a repeat is not applied again)
    accounts  balances; a transfer moves an amount, so their total never changes
    ledger    ring of the transfers in the order in which they were applied

A transfer is numbered by its client; entries are numbered by the server from 1 on. The answer is
sent after the transfer was applied.
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

ACCOUNTS = 1024
OPENING_BALANCE = 1_000_000
_CLIENTS = 1024
_HEADER_BYTES = 4096
_CLIENT_BYTES = _CLIENTS * 16
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


class Ledger:
    """Accounts and ledger in a writable buffer of at least 64 KiB; `format` once, `open` ever after."""

    def __init__(self, memory: Any) -> None:
        raw = np.frombuffer(memory, np.uint8)
        capacity = (raw.size - _FIXED_BYTES) // RECORD.itemsize
        if capacity < 1:
            raise LedgerError(f"a ledger needs more than {_FIXED_BYTES} bytes of RAM, got {raw.size}")
        accounts_at = _HEADER_BYTES + _CLIENT_BYTES
        self._header = raw[:16].view(np.uint64)  # entries applied, clients known
        self._clients = raw[_HEADER_BYTES:accounts_at].view(np.uint64).reshape(_CLIENTS, 2)
        self._accounts = raw[accounts_at:_FIXED_BYTES].view(np.int64)
        self._ring = raw[_FIXED_BYTES : _FIXED_BYTES + capacity * RECORD.itemsize].view(RECORD)
        self._slots = {int(client): slot for slot, (client, _) in enumerate(self._clients[: int(self._header[1])])}

    def format(self) -> None:
        """An empty ledger with every account at its opening balance."""
        self._header[:] = 0
        self._clients[:] = 0
        self._accounts[:] = OPENING_BALANCE
        self._slots.clear()

    @property
    def entries(self) -> int:
        """Transfers applied so far."""
        return int(self._header[0])

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
        self._header[0] = entry
        return entry

    def records(self, first: int, count: int) -> np.ndarray:
        """Up to `count` (at most MAX_AUDIT_RECORDS) records from entry `first` on, as far as the ring holds them."""
        first = max(first, self.entries - self._ring.size + 1, 1)
        last = min(first + min(count, MAX_AUDIT_RECORDS) - 1, self.entries)
        return self._ring[(np.arange(first, last + 1) - 1) % self._ring.size]

    def _slot(self, client: int) -> int:
        slot = self._slots.get(client)
        if slot is None:
            slot = int(self._header[1])
            if slot == _CLIENTS:
                raise LedgerError(f"client {client:#x} is one too many; the server knows {_CLIENTS}")
            self._clients[slot] = (client, 0)
            self._header[1] = slot + 1
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
