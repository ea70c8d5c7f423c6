"""The text files of a VM: what is written is read again, and what cannot be is named."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosts.vm_files import VmFileError, disk_bytes, from_vmx, to_descriptor, to_vmx, uuid_of
from topologies.plan import VM, read_plan

SEED = read_plan().vms[0]


@st.composite
def vms(draw: st.DrawFn) -> VM:
    size, share = st.integers(0, 2**50), st.floats(0, 1)
    return dataclasses.replace(
        SEED,
        name=draw(st.from_regex(r"[a-z][a-z0-9]{0,7}", fullmatch=True)),
        ram=draw(size),
        fill=draw(share),
        compressible=draw(share),
        dirty_rate=draw(size),
        working_set=draw(size),
        bulk_rate=draw(size),
        ip6=draw(st.sampled_from(["", "fd00::11/64"])),
        port_group=draw(st.sampled_from(["VM Network", "Production"])),
    )


@given(vms())
def test_a_configuration_is_read_as_it_was_written(vm: VM) -> None:
    assert from_vmx(to_vmx(vm), "esx1", vm.disk, "x.vmx") == vm


def test_the_configuration_says_what_vmware_says() -> None:
    text = to_vmx(SEED)
    for line in ('displayName = "vm1"', 'memSize = "512"', 'ethernet0.address = "00:50:56:00:00:01"'):
        assert line in text.splitlines()
    assert uuid_of(SEED) == uuid_of(dataclasses.replace(SEED, host="esx2", ram=1 << 30))


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('displayName = "vm1"\n', "", "x.vmx has no displayName"),
        ('displayName = "vm1"', "displayName: vm1", "x.vmx, line 4: 'displayName: vm1' is not of the form"),
        ('fill = "0.75"', 'fill = "much"', "guestinfo.workload.fill is 'much', which is no number"),
        ('fill = "0.75"', 'fill = "nan"', "guestinfo.workload.fill is 'nan', which cannot be"),
        ('ram_bytes = "536870912"', 'ram_bytes = "-1"', "guestinfo.workload.ram_bytes is '-1', which cannot be"),
    ],
)
def test_a_spoilt_configuration_is_named(old: str, new: str, why: str) -> None:
    text = to_vmx(SEED)
    assert old in text
    with pytest.raises(VmFileError) as refusal:
        from_vmx(text.replace(old, new), "esx1", SEED.disk, "x.vmx")
    assert why in str(refusal.value)


@given(st.text(max_size=300))
def test_any_text_is_a_configuration_or_an_error(text: str) -> None:
    for read in (lambda: from_vmx(text, "esx1", SEED.disk, "x.vmx"), lambda: disk_bytes(text, "vm1", "x.vmdk")):
        with pytest.raises(VmFileError):
            read()


@given(st.integers(1, 2**40))
def test_a_descriptor_tells_how_long_the_disk_is(sectors: int) -> None:
    assert disk_bytes(to_descriptor("vm1", sectors * 512), "vm1", "x.vmdk") == sectors * 512


def test_a_descriptor_of_another_disk_is_named() -> None:
    with pytest.raises(VmFileError, match=r"not one of vm1-flat\.vmdk"):
        disk_bytes(to_descriptor("vm2", 1 << 20), "vm1", "x.vmdk")
