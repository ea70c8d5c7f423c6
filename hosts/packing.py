"""Packing pages for slow links: zstd or lz4, chosen where it pays.

Whether it pays is measured, not guessed: at the beginning of a long round some pages go plain and some
packed, and what brought more pages across in a second is used for the rest. With a full socket buffer the
time of a send is the link's, so this compares the link with the processor; pages that fill it come before.
"""

from collections.abc import Callable

import msgspec

from hosts.protocol import CHUNK_PAGES, PLAIN, Flag
from hosts.ram import PAGE
from topologies.errors import TestbedError

# What socket buffers swallow at once (net.ipv4.tcp_wmem: 4 MiB at most), so that the link's speed shows behind it
WARM_UP_PAGES, TRIAL_PAGES = 2 * CHUNK_PAGES, 3 * CHUNK_PAGES
_LONG_ROUND_PAGES = 4 * TRIAL_PAGES
# A packing that saves less than this, in time and in bytes, is not worth the receiver's work
_MIN_GAIN = 0.05
_ZSTD_LEVEL = 1
# No window is larger than what is packed at once
_MAX_WINDOW = CHUNK_PAGES * PAGE


def packer(method: str) -> tuple[Flag, Callable[[bytes], bytes]]:
    """The flag of a method and its function."""
    if method == "zstd":
        import zstandard

        return Flag.ZSTD, zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress
    if method == "lz4":
        import lz4.block

        return Flag.LZ4, lambda data: bytes(lz4.block.compress(data, store_size=False))
    return PLAIN, bytes


def unpack(flag: Flag, data: bytes, size: int) -> bytes:
    """`size` bytes out of `data`, never more memory than that; TestbedError if it is not what was packed."""
    try:
        if flag is Flag.ZSTD:
            import zstandard

            if zstandard.get_frame_parameters(data).content_size != size:
                raise TestbedError("they claim another size")
            # into a buffer of that size; a stream would grow with whatever the frame holds
            content = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompress(data, allow_extra_data=False)
        else:
            import lz4.block

            content = lz4.block.decompress(data, uncompressed_size=size)
    except Exception as error:  # each library has errors of its own
        raise TestbedError(f"packed pages cannot be unpacked: {error}") from error
    if len(content) != size:
        raise TestbedError(f"packed pages are {len(content)} bytes, not {size}")
    return bytes(content)


class Trial(msgspec.Struct):
    """Pages, what was sent for them and the seconds that this took, of one way of sending."""

    pages: int = 0
    size: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.pages / self.seconds if self.seconds else 0.0


class Choice:
    """Packed or plain, for the next pages of a round. Pure: `sent` tells it what happened."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._trials = {True: Trial(), False: Trial()}
        self._warm_up = WARM_UP_PAGES

    def begin_round(self, pages: int) -> None:
        """A long round tries both ways again; a short one uses what is known."""
        if pages >= _LONG_ROUND_PAGES:
            self._begin()

    def packed(self) -> bool:
        """How the next pages go. Plain ones first: they leave the socket buffer full, packed ones may not."""
        if self._warm_up > 0:
            return False
        for way in (False, True):
            if self._trials[way].pages < TRIAL_PAGES:
                return way
        return self.pays

    @property
    def pays(self) -> bool:
        """As far as is known: both ways have to have been tried.

        Of two ways that take the link as long, either may seem faster by chance; the bytes tell.
        """
        packed, plain = self._trials[True], self._trials[False]
        saves = packed.size < packed.pages * PAGE * (1 - _MIN_GAIN)
        return saves and 0 < plain.rate * (1 + _MIN_GAIN) < packed.rate

    def sent(self, packed: bool, pages: int, size: int, seconds: float) -> None:
        if self._warm_up > 0:
            self._warm_up -= pages
            return
        trial = self._trials[packed]
        if trial.pages < TRIAL_PAGES:
            trial.pages += pages
            trial.size += size
            trial.seconds += seconds
