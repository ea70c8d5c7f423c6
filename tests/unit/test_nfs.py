"""Which libnfs is taken, and what is said of another: no server."""

import ctypes
from collections.abc import Callable, Iterator

import pytest

from hosts import nfs


@pytest.fixture
def there_is(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets the machine have these libraries and no other."""

    def there_is(*sonames: str) -> None:
        def load(soname: str) -> ctypes.CDLL:
            if soname not in sonames:
                raise OSError(f"{soname}: cannot open shared object file")
            return ctypes.CDLL(None)

        monkeypatch.setattr(nfs, "_load", load)

    nfs.library.cache_clear()
    yield there_is
    nfs.library.cache_clear()


def test_a_libnfs_whose_calls_are_others_is_named(there_is: Callable[..., None]) -> None:
    there_is("libnfs.so.16")
    with pytest.raises(nfs.NfsMissing, match=r"libnfs\.so\.16 is newer .*--datastore local"):
        nfs.library()


def test_a_machine_without_libnfs_is_told_what_to_install(there_is: Callable[..., None]) -> None:
    there_is()
    with pytest.raises(nfs.NfsMissing, match=r"no libnfs\.so\.14 or .*apt-get install libnfs-utils"):
        nfs.library()
