"""VMs on a store, for tests: a folder with the files that make a VM one."""

from dataclasses import replace
from pathlib import Path

from hosts.datastore import Datastore
from hosts.store import Folder
from hosts.vm_folder import VmFolder
from topologies.plan import VM, read_plan

SEED_VM = read_plan().vm("vm1")


def datastore_of(folder: Path, *vms: str) -> Datastore:
    """The datastore in a folder, with these VMs on it."""
    store = Folder(folder)
    for vm in vms:
        make_vm(store, vm)
    return Datastore(store)


def make_vm(store: Folder, vm: str, disk: int = 2**20) -> VM:
    """The files of a VM like the plan's vm1, with a small disk."""
    made = replace(SEED_VM, name=vm, disk=disk)
    VmFolder(store, vm).create(made)
    return made
