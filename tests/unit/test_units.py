"""Quantities with units: what is read, what is refused, what is shown."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topologies.errors import UsageError
from topologies.units import (
    format_bitrate,
    format_size,
    parse_bitrate,
    parse_percent,
    parse_rate,
    parse_size,
)

Parser = Callable[[str], float]
PARSERS: tuple[Parser, ...] = (parse_size, parse_rate, parse_bitrate, parse_percent)


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (parse_size, "512MiB", 512 * 2**20),
        (parse_size, "1GiB", 2**30),
        (parse_size, "1.5KiB", 1536),
        (parse_size, "64MB", 64_000_000),
        (parse_size, "2GB", 2 * 10**9),
        (parse_size, "3KB", 3000),
        (parse_size, "17B", 17),
        (parse_size, "0MiB", 0),
        (parse_size, " 512 mib ", 512 * 2**20),
        (parse_rate, "50MB/s", 50_000_000),
        (parse_rate, "1GiB/s", 2**30),
        (parse_rate, "4kib/S", 4096),
        (parse_bitrate, "1Gbit", 10**9),
        (parse_bitrate, "2.5Gbit", 2_500_000_000),
        (parse_bitrate, "10Mbit", 10**7),
        (parse_bitrate, "64kbit", 64_000),
        (parse_bitrate, "9600bit", 9600),
        (parse_bitrate, "1 Gbit/s", 10**9),
        (parse_bitrate, "unshaped", 0),
        (parse_percent, "75%", 0.75),
        (parse_percent, "0%", 0.0),
        (parse_percent, "100 %", 1.0),
    ],
)
def test_a_quantity_is_read_in_its_unit(parse: Parser, text: str, expected: float) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("parse", "text", "why"),
    [
        (parse_size, "512", "has no unit"),
        (parse_rate, "50Mb/s", "read as bits by some"),
        (parse_size, "512Mib", "read as bits by some"),
        (parse_bitrate, "0Gbit", "no rate at all"),
        (parse_size, "", "is no quantity"),
        (parse_size, "MiB", "is no quantity"),
        (parse_size, "-1MiB", "is no quantity"),
        (parse_size, "+1MiB", "is no quantity"),
        (parse_size, "1,5MiB", "is no quantity"),
        (parse_size, ".5MiB", "is no quantity"),
        (parse_size, "1e3MB", "is no quantity"),
        (parse_size, "nanMiB", "is no quantity"),
        (parse_size, "infB", "is no quantity"),
        (parse_size, "512 Mi B", "is no quantity"),
        (parse_size, "a\nb", "is no quantity"),
        (parse_size, "1TiB", "unknown unit 'TiB'"),
        (parse_size, "50MB/s", "unknown unit 'MB/s'"),
        (parse_size, "1Gbit", "unknown unit 'Gbit'"),
        (parse_size, "unshaped", "is no quantity"),
        (parse_rate, "50MB", "unknown unit 'MB'"),
        (parse_rate, "50", "has no unit"),
        (parse_bitrate, "1Gb", "unknown unit 'Gb'"),
        (parse_bitrate, "1GB", "unknown unit 'GB'"),
        (parse_bitrate, "1000", "has no unit"),
        (parse_percent, "0.75", "has no unit"),
        (parse_percent, "101%", "more than the whole"),
        (parse_percent, "75%%", "unknown unit '%%'"),
    ],
)
def test_what_is_no_quantity_of_its_kind_is_refused_by_name_and_with_an_example(
    parse: Parser, text: str, why: str
) -> None:
    with pytest.raises(UsageError, match=why) as refusal:
        parse(text)
    message = str(refusal.value)
    assert message.startswith(repr(text))
    assert "write it like " in message
    assert "\n" not in message
    assert refusal.value.exit_status == 2


@pytest.mark.parametrize("unit", ["MiB", "MB/s", "Gbit", "%"])
def test_a_number_beyond_every_machine_is_refused_too(unit: str) -> None:
    parse = {"MiB": parse_size, "MB/s": parse_rate, "Gbit": parse_bitrate, "%": parse_percent}[unit]
    with pytest.raises(UsageError):
        parse("9" * 400 + unit)


def test_a_fraction_of_a_percent_counts() -> None:
    assert parse_percent("12.5%") == pytest.approx(0.125)
    with pytest.raises(UsageError, match="more than the whole"):
        parse_percent("100.4%")


@given(st.text(alphabet="0123456789.-+eE \nkKMGiBbt/s%", max_size=12) | st.text(max_size=12), st.sampled_from(PARSERS))
def test_any_text_is_a_quantity_or_a_usage_error(text: str, parse: Parser) -> None:
    refusal = ""
    try:
        assert parse(text) >= 0
    except UsageError as error:
        refusal = str(error)
    assert "\n" not in refusal


@given(
    st.integers(0, 2**22), st.sampled_from([("B", 1), ("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("GB", 10**9)])
)
def test_a_whole_number_of_a_unit_is_exact(number: int, unit: tuple[str, int]) -> None:
    name, factor = unit
    assert parse_size(f"{number}{name}") == parse_size(f"{number} {name.lower()}") == number * factor
    assert parse_rate(f"{number}{name}/s") == number * factor


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (512 * 2**20, "512 MiB"),
        (2**30 - 2**20, "1023 MiB"),
        (1.5 * 2**30, "1.5 GiB"),
    ],
)
def test_a_size_is_shown_in_the_largest_unit_that_it_fills(size_bytes: float, shown: str) -> None:
    assert format_size(size_bytes) == shown


@pytest.mark.parametrize(
    ("bits_per_s", "shown"),
    [(0, "unshaped"), (999, "999 bit/s"), (64_000, "64 kbit/s"), (10**7, "10 Mbit/s"), (2.5e9, "2.5 Gbit/s")],
)
def test_a_rate_is_shown_in_the_largest_unit_that_it_fills(bits_per_s: float, shown: str) -> None:
    assert format_bitrate(bits_per_s) == shown


@given(st.integers(0, 2**43))
def test_a_size_that_was_shown_can_be_typed_in_again(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == pytest.approx(size_bytes, rel=1e-3)
