"""A VM's folder on a datastore: the files that it is (hosts/vm_files.py), made, read and taken away."""

import contextlib
import os

from hosts import vm_files
from hosts.store import Store, StoreFile
from hosts.vm_files import MAX_TEXT_BYTES, VmFileError
from topologies.plan import VM

_WORLD_READABLE = 0o644  # NFS asks who may read when it opens a disk: the next owner does so before it is one


class VmFolder:
    """Errors are OSErrors of the store, and VmFileErrors for what is not as it has to be."""

    def __init__(self, store: Store, vm: str) -> None:
        self._store, self.vm = store, vm

    def create(self, vm: VM) -> None:
        """A VM with an empty disk; what is there already stays as it is. Once it has a configuration it is one."""
        with contextlib.suppress(FileExistsError):
            self._store.mkdir(f"/{vm.name}")
        self._make_disk(vm)
        self._write_once(vm_files.descriptor_path(vm.name), vm_files.to_descriptor(vm.name, vm.disk).encode())
        self._write_once(vm_files.vmx_path(vm.name), vm_files.to_vmx(vm).encode())

    def delete(self) -> None:
        """All of it: the configuration first, so that nobody powers it on meanwhile, the lock files last."""

        def order(name: str) -> tuple[bool, bool]:
            return not name.endswith(".vmx"), name.startswith(".lck-")

        for name in sorted(self._store.names(f"/{self.vm}"), key=order):
            self._store.unlink(f"/{self.vm}/{name}")
        self._store.rmdir(f"/{self.vm}")

    def read(self, host: str) -> VM:
        """The VM of these files, to be run on `host`."""
        disk = vm_files.disk_bytes(self._text(vm_files.descriptor_path(self.vm)), self.vm, f"{self.vm}.vmdk")
        path = vm_files.vmx_path(self.vm)
        vm = vm_files.from_vmx(self._text(path), host, disk, path)
        if vm.name != self.vm:
            raise VmFileError(f"{path} is the configuration of {vm.name!r}; a VM's files have its name")
        size = self._store.attributes(vm_files.disk_path(self.vm)).size
        if size != disk:
            raise VmFileError(f"{vm_files.disk_path(self.vm)} has {size} bytes, and its descriptor says {disk}")
        return vm

    # ------------------------------------------------------------ nvram

    def nvram(self) -> bytes:
        """Empty if the VM was never shut down."""
        try:
            return self._store.read(vm_files.nvram_path(self.vm), MAX_TEXT_BYTES)
        except FileNotFoundError:
            return b""

    def save_nvram(self, content: bytes) -> None:
        self._replace(vm_files.nvram_path(self.vm), content)

    # ------------------------------------------------------------ swap

    def add_swap(self, host: str, ram_bytes: int) -> None:
        """For a VM that runs, or is to run, on a host; sparse, for nothing is swapped out."""
        path = vm_files.swap_path(self.vm, host)
        with contextlib.suppress(FileNotFoundError):
            self._store.unlink(path)  # of a host that could not clear up
        self._sparse(path, ram_bytes, 0o600)

    def remove_swap(self, host: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._store.unlink(vm_files.swap_path(self.vm, host))

    # ------------------------------------------------------------ parts

    def _make_disk(self, vm: VM) -> None:
        path = vm_files.disk_path(vm.name)
        with contextlib.suppress(FileExistsError):
            self._sparse(path, vm.disk, _WORLD_READABLE)
        if not self._store.attributes(path).size:  # of one who was broken off
            self._stretch(self._store.open(path), vm.disk)

    def _sparse(self, path: str, size_bytes: int, mode: int) -> None:
        self._stretch(self._store.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode), size_bytes)

    @staticmethod
    def _stretch(file: StoreFile, size_bytes: int) -> None:
        try:
            file.truncate(size_bytes)
        finally:
            file.close()

    def _write_once(self, path: str, content: bytes) -> None:
        try:
            self._store.attributes(path)
        except FileNotFoundError:
            self._replace(path, content)

    def _replace(self, path: str, content: bytes) -> None:
        """As a whole, or not at all."""
        with contextlib.suppress(FileNotFoundError):
            self._store.unlink(f"{path}.new")
        self._store.write_new(f"{path}.new", content)
        self._store.rename(f"{path}.new", path)

    def _text(self, path: str) -> str:
        content = self._store.read(path, MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            raise VmFileError(f"{path} is longer than {MAX_TEXT_BYTES} bytes: it is none of ours")
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise VmFileError(f"{path} is no text: {error}") from error
