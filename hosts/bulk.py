"""The bulk stream's content: the byte at each offset of a connection is known, so that both ends can check it.

The guest sends, the client verifies. The content repeats after a prime number of bytes, so that
a lost, doubled or shifted segment of any usual size shows.
"""

import random

PORT = 7200
_PERIOD = 65_521
_CONTENT = random.Random(2).randbytes(_PERIOD)
_DOUBLED = _CONTENT * 5


def pattern(offset: int, length: int) -> bytes:
    """The `length` bytes (up to 256 KiB) of the stream from `offset` on."""
    start = offset % _PERIOD
    if start + length > len(_DOUBLED):
        raise ValueError(f"at most {len(_DOUBLED) - _PERIOD} bytes at once, not {length}")
    return _DOUBLED[start : start + length]
