"""Who owns a VM, on a datastore: the calls behind the steps of hosts/ownership.py.

    <vm>/.lck-<vm>.<generation>      a block of JSON: the Claim, with a number that its owner pulses
    <vm>/.draft-<vm>.<nonce>         the same before it is linked to its name, and for a moment after
    <vm>/<vm>-flat.vmdk              the disk belongs to the user of the newest generation

A claim is ready to be taken when its draft is written: what is left for a switchover is LINK, FENCE, CHECK.
"""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable

import msgspec

from hosts.ownership import LEASE_S, Claiming, Lease, Sight, Step, Watch
from hosts.store import Store, StoreSilent
from hosts.vm_files import disk_path
from topologies.errors import TestbedError

FORMAT = 1  # of a lock file
_BLOCK_BYTES = 512  # a lock file is written as a whole, or not at all
_MAX_CLAIM_BYTES = 4096
# The disk belongs to this user plus the generation: nobody on a NAS has such a number otherwise
_FIRST_USER = 200_000
_LOOK_EVERY_S = 0.2  # at another's pulse
_AGAIN_AFTER_S = 0.2  # a call that was not answered, or not well
# Lock files of so many generations are kept: a LINK that was sent long ago finds its name taken
_KEPT_GENERATIONS = 16
_OLD_DRAFT_S = 60.0


class DatastoreError(TestbedError):
    """Ownership cannot be read or taken; nothing was changed."""


class DatastoreSilent(DatastoreError):
    """The datastore does not answer."""


class OwnerUnknown(TestbedError):
    """A generation may be ours, or may become ours: the datastore has not said so."""


class Claim(msgspec.Struct, frozen=True):
    """The content of a generation file. `nonce` tells two claims of one host apart; `pulse` counts while it lives."""

    format: int
    vm: str
    generation: int
    host: str
    running: bool
    nonce: str
    pulse: int = 0


class _Format(msgspec.Struct, frozen=True):
    """As much of a lock file as every version has."""

    format: int


def user_of(generation: int) -> int:
    """The user to whom the disk belongs under this generation."""
    return _FIRST_USER + generation


class Datastore:
    """The ownership of the VMs of a store. Errors are DatastoreErrors unless something else is said."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self.store, self._clock = store, clock

    def newest(self, vm: str) -> Claim | None:
        """The newest claim; None for a VM that was never powered on."""
        generation = self.newest_generation(vm)
        return self._read(vm, generation) if generation else None

    def newest_generation(self, vm: str) -> int:
        """0 for a VM that was never powered on."""
        try:
            # a datastore out of sight is not one without VMs
            there = vm in self.store.names("/")
        except OSError as error:
            raise _trouble(error, f"VM {vm}: its datastore cannot be read") from error
        return self.check(vm) if there else 0

    def check(self, vm: str) -> int:
        """CHECK: the newest generation of a VM that has a folder."""
        try:
            return max(_generations(vm, self.store.names(f"/{vm}")), default=0)
        except OSError as error:
            raise _trouble(error, f"VM {vm}: its folder cannot be read") from error

    def claim(
        self, vm: str, generation: int, host: str, running: bool = True, patience_s: float = 20.0
    ) -> Lease | None:
        """Take a generation, which follows the newest one; None if another was faster. OwnerUnknown as of Draft.take.

        DatastoreError if it cannot be told, also because the generation before it is not there.
        """
        draft = self.draft(vm, generation, host, running)
        lease = draft.take(patience_s) if draft else None
        if draft and lease:
            draft.discard()
        return lease

    def draft(self, vm: str, generation: int, host: str, running: bool = True) -> "Draft | None":
        """Make everything ready for a generation to be taken; None if it is gone already."""
        newest = self.newest_generation(vm)
        if newest >= generation:
            return None
        if newest < generation - 1:
            gone = f"generation {generation - 1} is gone from the datastore"
            raise DatastoreError(f"VM {vm}: {gone}; it must not be emptied under a running VM")
        claim = Claim(FORMAT, vm, generation, host, running, secrets.token_hex(8))
        draft = Draft(self, claim)
        try:
            self.store.attributes(disk_path(vm))  # without a disk it is not a VM
            self.store.write_new(draft.path, _encoded(claim), 0o600)
        except OSError as error:
            raise _trouble(error, f"VM {vm}: generation {generation} cannot be claimed") from error
        return draft

    def await_silence(self, vm: str) -> Claim | None:
        """WATCH the newest claim: its owner has been dead for a lease when this returns; None if it lives.

        A claim that does not run is nobody's: it is returned at once. DatastoreError if there is no claim.
        """
        claim = self.newest(vm)
        if claim is None:
            raise DatastoreError(f"VM {vm} was never powered on: there is no lease to break")
        if not claim.running:
            return claim
        watch = Watch(claim.generation, claim.pulse, self._clock())
        last = watch.since_s + 3 * LEASE_S  # a datastore that hardly answers tells nothing
        while True:
            time.sleep(_LOOK_EVERY_S)
            asked_s = self._clock()
            try:
                now = self.newest(vm)
            except DatastoreSilent:
                if asked_s > last:
                    raise
                continue
            if now is None:
                raise DatastoreError(f"VM {vm}: its lock files are gone from the datastore")
            match watch.saw(now.generation, now.pulse, asked_s):
                case Sight.ALIVE:
                    return None
                case Sight.DEAD:
                    return now

    def _read(self, vm: str, generation: int) -> Claim:
        path = lock_path(vm, generation)
        try:
            content = self.store.read(path, _MAX_CLAIM_BYTES)
        except OSError as error:
            raise _trouble(error, f"VM {vm}: the lock file {path} cannot be read") from error
        try:
            version = msgspec.json.decode(content, type=_Format).format
            if version > FORMAT:
                later = f"was written by a later version of vmotion (format {version}; this one knows {FORMAT})"
                raise DatastoreError(f"VM {vm}: the lock file {path} {later}; use that version")
            claim = msgspec.json.decode(content, type=Claim)
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, no claim
            raise DatastoreError(f"VM {vm}: the lock file {path} cannot be read: {error}") from error
        if (claim.vm, claim.generation) != (vm, generation):
            what = f"VM {claim.vm}, generation {claim.generation}"
            raise DatastoreError(f"VM {vm}: the lock file {path} is one of {what}")
        return claim


class Draft:
    """A claim that is ready to be taken; its file has still another name."""

    def __init__(self, datastore: Datastore, claim: Claim) -> None:
        self.claim = claim
        self.path = f"/{claim.vm}/.draft-{claim.vm}.{claim.nonce}"
        self._datastore, self._store = datastore, datastore.store

    def take(self, patience_s: float = 20.0) -> Lease | None:
        """LINK, FENCE, CHECK; None if another was faster.

        The lease may have lapsed when this returns, if the datastore was slow. DatastoreError if nothing was changed;
        OwnerUnknown if it is not known whether the generation is ours after so many seconds.
        """
        now = self._datastore._clock
        deadline = now() + patience_s
        claiming = Claiming(self.claim.generation, self.claim.nonce, now())
        asked = False  # a LINK without an answer
        while claiming.step not in (Step.OWNED, Step.LOST):
            try:
                claiming = self._step(claiming)
            except (OSError, DatastoreError) as error:
                asked = asked or isinstance(error, StoreSilent)
                if claiming.step is Step.LINK and not asked:  # refused
                    self.discard()
                    what = f"VM {self.claim.vm}: generation {self.claim.generation} cannot be claimed"
                    raise _trouble(error, what) from error
                if now() > deadline:
                    what = f"VM {self.claim.vm}: whether generation {self.claim.generation} is ours is not known"
                    raise OwnerUnknown(f"{what}: {error}") from error
                time.sleep(_AGAIN_AFTER_S)
        if claiming.step is Step.LOST:
            self.discard()
            return None
        return claiming.lease

    def _step(self, claiming: Claiming) -> Claiming:
        vm, generation = self.claim.vm, self.claim.generation
        match claiming.step:
            case Step.LINK:
                return claiming.linked(self._link())
            case Step.FENCE:
                self._store.chown(disk_path(vm), user_of(generation))
                return claiming.fenced()
            case _:
                return claiming.checked(self._datastore.check(vm))

    def _link(self) -> str:
        """Whose the generation is now, by its nonce."""
        try:
            self._store.link(self.path, lock_path(self.claim.vm, self.claim.generation))
        except FileExistsError:  # another's; or ours, by a call that was sent again
            try:
                return self._datastore._read(self.claim.vm, self.claim.generation).nonce
            except DatastoreSilent:
                raise
            except DatastoreError:  # ours would be intact
                return ""
        return self.claim.nonce

    def discard(self) -> None:
        """Its other name is not needed any more. If it cannot be taken away now, an owner does it (Keeper.collect)."""
        with contextlib.suppress(OSError):
            self._store.unlink(self.path)


class Keeper:
    """Keeps a generation: pulses in its file, watches over its fence, takes away what is not needed any more.

    What it raises is OSError and DatastoreError alike: the pulse was not acknowledged.
    """

    def __init__(self, datastore: Datastore, vm: str, generation: int, host: str) -> None:
        """DatastoreError, or OSError, if the newest generation is not this one of this host."""
        self._datastore, self._store = datastore, datastore.store
        claim = datastore._read(vm, generation)
        if claim.host != host or not claim.running:
            raise DatastoreError(f"VM {vm}: generation {generation} is not one under which {host} runs it")
        self.claim = claim
        self._file = self._store.open(lock_path(vm, generation), os.O_RDWR | os.O_SYNC)

    def pulse(self) -> int:
        """PULSE, then CHECK: returns the newest generation."""
        self.claim = msgspec.structs.replace(self.claim, pulse=self.claim.pulse + 1)
        self._file.write(0, _encoded(self.claim))
        return self._datastore.check(self.claim.vm)

    def mend_fence(self) -> bool:
        """FENCE again, if one who claimed before us was late with his; whether that was so."""
        path, user = disk_path(self.claim.vm), user_of(self.claim.generation)
        if self._store.attributes(path).uid >= user:
            return False
        self._store.chown(path, user)
        return True

    def collect(self) -> None:
        """Drafts that nobody will take any more, and lock files of long ago."""
        vm, newest = self.claim.vm, self.claim.generation
        names = self._store.names(f"/{vm}")
        pulsed_s = self._store.attributes(lock_path(vm, newest)).changed_s
        for name in names:
            path = f"/{vm}/{name}"
            old = any(generation <= newest - _KEPT_GENERATIONS for generation in _generations(vm, [name]))
            if name.startswith(f".draft-{vm}."):
                with contextlib.suppress(FileNotFoundError):
                    idle_s = pulsed_s - self._store.attributes(path).changed_s
                    old = name.endswith(f".{self.claim.nonce}") or idle_s > _OLD_DRAFT_S
            if old:
                with contextlib.suppress(FileNotFoundError):
                    self._store.unlink(path)

    def close(self) -> None:
        self._file.close()


def lock_path(vm: str, generation: int) -> str:
    return f"/{vm}/.lck-{vm}.{generation}"


def _generations(vm: str, names: list[str]) -> list[int]:
    name = re.compile(rf"\.lck-{re.escape(vm)}\.(\d+)")
    return [int(match[1]) for entry in names if (match := name.fullmatch(entry))]


def _encoded(claim: Claim) -> bytes:
    return msgspec.json.encode(claim).ljust(_BLOCK_BYTES)


def _trouble(error: Exception, what: str) -> DatastoreError:
    kind = DatastoreSilent if isinstance(error, StoreSilent | DatastoreSilent) else DatastoreError
    return kind(f"{what}: {error}")
