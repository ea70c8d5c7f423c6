"""Shared storage and ownership: whoever holds a VM's newest generation may run it; nobody else ever does.

    <folder>/<vm>/.lck-<vm>.<generation>      JSON: the Claim

A generation is claimed by linking a complete file to its name: link(2) has exactly one winner, on a
local file system as on NFS. The claim of generation g+1 is the one point of no return of a migration.

The local-directory datastore is a folder that all hosts of one machine see. It emulates neither the
network between a host and its storage nor fencing: no NFS traffic, no lease, no late write refused.
"""

import contextlib
import os
import re
import secrets
from pathlib import Path
from typing import Protocol

import msgspec

from topologies.errors import TestbedError

_MAX_CLAIM_BYTES = 4096


class DatastoreError(TestbedError):
    """Ownership cannot be read or taken; nothing was changed."""


class Claim(msgspec.Struct, frozen=True):
    """The content of a generation file. `nonce` tells two claims of one host apart."""

    vm: str
    generation: int
    host: str
    running: bool
    nonce: str


class Datastore(Protocol):
    """What a host needs to know about who owns a VM."""

    def newest(self, vm: str) -> Claim | None:
        """The newest claim; None for a VM that was never powered on."""

    def claim(self, vm: str, generation: int, host: str, running: bool = True) -> bool:
        """Take a generation, which follows the newest one; False if another was faster.

        DatastoreError if it cannot be told, also because the generation before it is not there.
        """


class LocalDatastore:
    """A folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def newest(self, vm: str) -> Claim | None:
        generations = self._generations(vm)
        return self._read(vm, max(generations)) if generations else None

    def claim(self, vm: str, generation: int, host: str, running: bool = True) -> bool:
        home = self._folder / vm
        claim = Claim(vm, generation, host, running, secrets.token_hex(8))
        draft = home / f".draft-{vm}.{claim.nonce}"
        try:
            home.mkdir(exist_ok=True)
            newest = max(self._generations(vm), default=0)
            if newest >= generation:
                return False
            if newest < generation - 1:
                gone = f"generation {generation - 1} is gone from the datastore"
                raise DatastoreError(f"VM {vm}: {gone}; it must not be emptied under a running VM")
            try:
                draft.write_bytes(msgspec.json.encode(claim))
                os.link(draft, self._path(vm, generation))
            except FileExistsError:
                return False
            finally:
                with contextlib.suppress(OSError):  # link(2) has decided; a draft left over harms nobody
                    draft.unlink()
        except OSError as error:
            raise DatastoreError(f"VM {vm}: generation {generation} cannot be claimed: {error}") from error
        return True

    def _path(self, vm: str, generation: int) -> Path:
        return self._folder / vm / f".lck-{vm}.{generation}"

    def _generations(self, vm: str) -> list[int]:
        name = re.compile(rf"\.lck-{re.escape(vm)}\.(\d+)")
        try:
            # a datastore out of sight is not one without VMs
            names = os.listdir(self._folder / vm) if vm in os.listdir(self._folder) else []
        except OSError as error:
            raise DatastoreError(f"VM {vm}: its folder cannot be read: {error}") from error
        return [int(match[1]) for entry in names if (match := name.fullmatch(entry))]

    def _read(self, vm: str, generation: int) -> Claim:
        path = self._path(vm, generation)
        try:
            content = path.read_bytes()[:_MAX_CLAIM_BYTES]
            claim = msgspec.json.decode(content, type=Claim)
        except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, no claim
            raise DatastoreError(f"VM {vm}: the lock file {path.name} cannot be read: {error}") from error
        if (claim.vm, claim.generation) != (vm, generation):
            what = f"VM {claim.vm}, generation {claim.generation}"
            raise DatastoreError(f"VM {vm}: the lock file {path.name} is one of {what}")
        return claim
