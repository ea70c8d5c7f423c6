"""How a migration's bytes cross the vMotion cable: what a person may choose of it."""

from typing import Literal

import msgspec

COMPRESSIONS = ("none", "zstd", "lz4")
MAX_STREAMS = 16


class Transport(msgspec.Struct, frozen=True):
    """`bandwidth_limit` in bit/s, 0 for none; `streams`: TCP connections that carry pages."""

    encrypt: bool = False
    compress: Literal["none", "zstd", "lz4"] = "none"
    bandwidth_limit: int = 0
    streams: int = 1
