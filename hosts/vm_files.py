"""The files that a VM is, their names and what is in them. Pure: text in, text out.

    <vm>/<vm>.vmx              configuration: name, UUID, MAC, RAM, port group, workload
    <vm>/<vm>.vmdk             descriptor of the disk (VMware, Virtual Disk Format 5.0)
    <vm>/<vm>-flat.vmdk        the disk itself, raw
    <vm>/<vm>.nvram            counters of the machine, from its last power-off
    <vm>/<vm>-<id>.vswp        swap of the host that runs it, sparse; gone at power-off
    <vm>/.lck-<vm>.<g>         who owns it, by generation (hosts/datastore.py)
    <vm>/vmware.log            what happened to it; vmware-<n>.log the older ones

Both text formats are lines `key = "value"`; whoever reads them takes nothing for granted.
"""

import re
import uuid
from collections.abc import Mapping

from topologies.errors import TestbedError
from topologies.plan import VM

SECTOR_BYTES = 512
MAX_TEXT_BYTES = 64 * 1024  # of a .vmx or a descriptor: a longer one is none
_LINE = re.compile(r'([A-Za-z0-9_.:]+)\s*=\s*"([^"]*)"')
_EXTENT = re.compile(r'RW (\d{1,15}) VMFS "([^"/]+)"')
# Of the light guest, which VMware does not know: guestinfo is the part of a .vmx that is the user's own
_WORKLOAD = "guestinfo.workload."
_GENERATED = uuid.UUID("6f1d3c62-7a0e-4c53-9b6a-5a0d6c1f7e55")  # of UUIDs that are made from a VM's MAC (RFC 9562, 5.5)


class VmFileError(TestbedError):
    """A file of a VM that cannot be read; the message names the file, the key and the reason."""


def vmx_path(vm: str) -> str:
    return f"/{vm}/{vm}.vmx"


def descriptor_path(vm: str) -> str:
    return f"/{vm}/{vm}.vmdk"


def disk_path(vm: str) -> str:
    return f"/{vm}/{vm}-flat.vmdk"


def nvram_path(vm: str) -> str:
    return f"/{vm}/{vm}.nvram"


def swap_path(vm: str, host: str) -> str:
    return f"/{vm}/{vm}-{host}.vswp"


# ---------------------------------------------------------------- .vmx


def uuid_of(vm: VM) -> uuid.UUID:
    """The same for the same VM, whoever asks."""
    return uuid.uuid5(_GENERATED, vm.mac)


def to_vmx(vm: VM) -> str:
    """The configuration of a VM. Where it runs is not part of it."""
    hexadecimal = uuid_of(vm).hex
    pairs = [hexadecimal[at : at + 2] for at in range(0, 32, 2)]
    values = {
        ".encoding": "UTF-8",
        "config.version": "8",
        "virtualHW.version": "21",
        "displayName": vm.name,
        "uuid.bios": f"{' '.join(pairs[:8])}-{' '.join(pairs[8:])}",
        "memSize": str(-(-vm.ram // 2**20)),
        "nvram": f"{vm.name}.nvram",
        "scsi0:0.present": "TRUE",
        "scsi0:0.fileName": f"{vm.name}.vmdk",
        "ethernet0.present": "TRUE",
        "ethernet0.addressType": "static",
        "ethernet0.address": vm.mac,
        "ethernet0.networkName": vm.port_group,
        f"{_WORKLOAD}ip": vm.ip,
        f"{_WORKLOAD}ip6": vm.ip6,
        f"{_WORKLOAD}ram_bytes": str(vm.ram),
        f"{_WORKLOAD}fill": repr(vm.fill),
        f"{_WORKLOAD}compressible": repr(vm.compressible),
        f"{_WORKLOAD}dirty_rate": str(vm.dirty_rate),
        f"{_WORKLOAD}working_set": str(vm.working_set),
        f"{_WORKLOAD}bulk_rate": str(vm.bulk_rate),
    }
    return "".join(f'{key} = "{value}"\n' for key, value in values.items())


def from_vmx(text: str, host: str, disk: int, path: str) -> VM:
    """The VM of a configuration, to be run on `host` with a disk of so many bytes; VmFileError names `path`.

    Keys that are not ours are let be.
    """
    values = _values(text, path)

    def number(key: str, kind: type[int] | type[float]) -> float:
        try:
            value = kind(_of(values, key, path))
        except ValueError:
            raise VmFileError(f"{path}: {key} is {values[key]!r}, which is no number") from None
        if not 0 <= value < 2**63:
            raise VmFileError(f"{path}: {key} is {values[key]!r}, which cannot be")
        return value

    return VM(
        name=_of(values, "displayName", path),
        host=host,
        ip=_of(values, f"{_WORKLOAD}ip", path),
        mac=_of(values, "ethernet0.address", path),
        port_group=_of(values, "ethernet0.networkName", path),
        ram=int(number(f"{_WORKLOAD}ram_bytes", int)),
        fill=number(f"{_WORKLOAD}fill", float),
        compressible=number(f"{_WORKLOAD}compressible", float),
        dirty_rate=int(number(f"{_WORKLOAD}dirty_rate", int)),
        working_set=int(number(f"{_WORKLOAD}working_set", int)),
        bulk_rate=int(number(f"{_WORKLOAD}bulk_rate", int)),
        ip6=values.get(f"{_WORKLOAD}ip6", ""),
        disk=disk,
    )


def _values(text: str, path: str) -> dict[str, str]:
    values = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise VmFileError(f'{path}, line {number}: {line[:60]!r} is not of the form key = "value"')
        values[match[1]] = match[2]
    return values


def _of(values: Mapping[str, str], key: str, path: str) -> str:
    if key not in values:
        raise VmFileError(f"{path} has no {key}")
    return values[key]


# ---------------------------------------------------------------- .vmdk


def to_descriptor(vm: str, size_bytes: int) -> str:
    """The descriptor of a raw disk of whole sectors."""
    sectors = size_bytes // SECTOR_BYTES
    return f"""\
# Disk DescriptorFile
version=1
CID=fffffffe
parentCID=ffffffff
createType="vmfs"

# Extent description
RW {sectors} VMFS "{vm}-flat.vmdk"

# The Disk Data Base
#DDB
ddb.adapterType = "lsilogic"
ddb.geometry.cylinders = "{max(1, sectors // (255 * 63))}"
ddb.geometry.heads = "255"
ddb.geometry.sectors = "63"
ddb.virtualHWVersion = "21"
"""


def disk_bytes(text: str, vm: str, path: str) -> int:
    """How long the disk of a descriptor is; VmFileError if it is not this VM's, or none at all."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "# Disk DescriptorFile":
        raise VmFileError(f"{path} is no disk descriptor")
    extents = [match for line in lines if (match := _EXTENT.fullmatch(line.strip()))]
    if len(extents) != 1 or extents[0][2] != f"{vm}-flat.vmdk":
        raise VmFileError(f"{path}: its extents are {[e[0] for e in extents]}, and not one of {vm}-flat.vmdk")
    return int(extents[0][1]) * SECTOR_BYTES
