"""The arithmetic of a frozen TCP connection; the kernel's part is tested live."""

import struct

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hosts.sockets import TcpState, _before, _clamped_window, _negotiated

HALF = 2**31


def state(**changes: object) -> TcpState:
    """A connection with empty queues and all the usual options."""
    plain = TcpState(
        local=("10.0.0.11", 7100),
        peer=("10.0.0.100", 40_000),
        options=1 | 2 | 4,
        send_wscale=7,
        recv_wscale=9,
        mss=1448,
        timestamp=123_456,
        window=struct.pack("5I", 1000, 65_000, 65_000, 32_000, 1000),
        recv_seq=1000,
        send_seq=2000,
        recv_queue=b"",
        send_queue=b"",
        unsent=0,
        sndbuf=87_040,
        rcvbuf=131_072,
        buf_lock=0,
        plain=((6, 1, 1),),
        congestion=b"cubic",
    )
    return msgspec.structs.replace(plain, **changes)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1, 2, True),
        (2, 1, False),
        (7, 7, False),
        (2**32 - 1, 0, True),  # the wrap
        (0, 2**32 - 1, False),
        (2**32 - 10, 10, True),
        (0, HALF - 1, True),
        (HALF - 1, 0, False),
    ],
)
def test_sequence_numbers_are_compared_in_their_circle(a: int, b: int, expected: bool) -> None:
    assert _before(a, b) is expected


@given(st.integers(0, 2**32 - 1), st.integers(1, HALF - 1))
def test_what_is_sent_later_is_not_before(start: int, distance: int) -> None:
    later = (start + distance) % 2**32
    assert _before(start, later)
    assert not _before(later, start)


@given(st.integers(0, 2**32 - 1), st.integers(-100_000, 100_000), st.integers(-100_000, 100_000))
@example(50, -100, -100)
@example(2**32 - 50, 100, 0)
def test_the_window_never_reaches_beyond_what_is_carried(recv_seq: int, wl1_off: int, wup_off: int) -> None:
    """Segments that came out of order are not carried: the window must not speak of them, or the kernel refuses it."""
    wl1, wup = (recv_seq + wl1_off) % 2**32, (recv_seq + wup_off) % 2**32
    window = struct.pack("5I", wl1, 65_000, 1000, 32_000, wup)
    clamped = struct.unpack("5I", _clamped_window(state(recv_seq=recv_seq, window=window)))
    assert clamped[0] == (recv_seq if wl1_off > 0 else wl1)
    assert clamped[4] == (recv_seq if wup_off > 0 else wup)
    assert clamped[1:4] == (65_000, 65_000, 32_000), "no window is larger than the largest one"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (0, [(2, 1448)]),
        (1, [(2, 1448), (8, 0)]),  # timestamps
        (2, [(2, 1448), (4, 0)]),  # SACK
        (4, [(2, 1448), (3, 7 | 9 << 16)]),  # window scales, ours and the peer's
        (7, [(2, 1448), (4, 0), (3, 7 | 9 << 16), (8, 0)]),
        (7 | 8, [(2, 1448), (4, 0), (3, 7 | 9 << 16), (8, 0)]),  # ECN is not an option of the handshake
    ],
)
def test_what_the_handshake_agreed_on_is_told_as_the_kernel_wants_it(
    options: int, expected: list[tuple[int, int]]
) -> None:
    assert list(struct.iter_unpack("II", _negotiated(state(options=options)))) == expected


@pytest.mark.parametrize(
    ("queued", "unsent", "outstanding"),
    [
        (0, 0, 0),
        (5000, 5000, 0),
        (14_480, 0, 0),  # an initial window (RFC 6928: 10 segments): it leaves again at once
        (14_481, 0, 14_481),
        (100_000, 85_520, 0),
        (100_000, 85_519, 14_481),
    ],
)
def test_what_was_in_flight_and_fits_into_an_initial_window_counts_as_never_sent(
    queued: int, unsent: int, outstanding: int
) -> None:
    assert state(send_queue=bytes(queued), unsent=unsent).outstanding == outstanding


@given(st.binary(max_size=100), st.binary(max_size=100), st.integers(0, 2**32 - 1))
def test_a_frozen_connection_travels_as_data(recv_queue: bytes, send_queue: bytes, sequence: int) -> None:
    frozen = state(recv_queue=recv_queue, send_queue=send_queue, recv_seq=sequence, unsent=len(send_queue) // 2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(frozen), type=TcpState) == frozen
