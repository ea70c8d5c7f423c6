"""Quantities with units, read and printed.

RAM is counted in binary units (512MiB), links and rates in decimal ones (1Gbit, 50MB/s), as is
usual in the field. A bare number is refused: 512 of what?
"""

import re

from topologies.errors import UsageError

_SIZES = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_RATES = {f"{unit}/S": factor for unit, factor in _SIZES.items()}  # bytes per second
_BITRATES = {"BIT": 1, "KBIT": 10**3, "MBIT": 10**6, "GBIT": 10**9}  # bits per second
_DIGITS = 20  # more than any machine has bytes
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z/%]*)")


def _parse(text: str, units: dict[str, int], example: str) -> float:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no quantity; write it like {example}")
    number, unit = match.groups()
    if "BIT" not in units and re.search("[KMG]i?b(/|$)", unit):
        raise UsageError(f"{text!r}: {unit!r} is read as bits by some; write it like {example}")
    factor = units.get(unit.upper())
    if factor is None:
        missing = "has no unit" if not unit else f"has an unknown unit {unit!r} (not one of {', '.join(units)})"
        raise UsageError(f"{text!r} {missing}; write it like {example}")
    if len(number) > _DIGITS:
        raise UsageError(f"a quantity of {len(number)} digits is none; write it like {example}")
    return float(number) * factor


def parse_size(text: str) -> int:
    """Bytes, from '512MiB', '1GiB', '64MB'."""
    return round(_parse(text, _SIZES, "512MiB"))


def parse_rate(text: str) -> int:
    """Bytes per second, from '50MB/s'."""
    return round(_parse(text, _RATES, "50MB/s"))


def parse_bitrate(text: str) -> int:
    """Bits per second, from '1Gbit' or '1 Gbit/s'; 'unshaped' is 0, and nothing else is."""
    if text.strip() == "unshaped":
        return 0
    rate = round(_parse(text.removesuffix("/s"), _BITRATES, "1Gbit (or 'unshaped')"))
    if rate == 0:
        raise UsageError(f"{text!r} is no rate at all; write it like 1Gbit (or 'unshaped')")
    return rate


def parse_percent(text: str) -> float:
    """A fraction 0..1, from '75%'."""
    percent = _parse(text, {"%": 1}, "75%")
    if percent > 100:
        raise UsageError(f"{text!r} is more than the whole; write it like 75%")
    return percent / 100


def format_size(size_bytes: float) -> str:
    """'512 MiB', '1.5 GiB': for people."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.4g} {unit}"
    return f"{size_bytes:.0f} B"


def format_bitrate(bits_per_s: float) -> str:
    """'1 Gbit/s', or 'unshaped' for 0."""
    if bits_per_s == 0:
        return "unshaped"
    for unit, factor in (("Gbit/s", 10**9), ("Mbit/s", 10**6), ("kbit/s", 10**3)):
        if bits_per_s >= factor:
            return f"{bits_per_s / factor:.4g} {unit}"
    return f"{bits_per_s:.0f} bit/s"
