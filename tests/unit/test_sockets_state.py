"""The arithmetic of a frozen TCP connection; the kernel's part is tested live."""

import socket
import struct

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hosts.sockets import Settled, TcpState, _before, _clamped_window, _negotiated, _segment, _signed

HALF = 2**31
ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING = 1, 4, 5, 8, 9, 11  # net/tcp_states.h
STATES = (ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING)
SETTLED = Settled(
    family=socket.AF_INET,
    local=("10.0.0.11", 7100),
    peer=("10.0.0.100", 40_000),
    negotiated=_negotiated(options=1 | 2 | 4, send_wscale=7, recv_wscale=9),
    send_wscale=7,
    timestamps=True,
    plain=((6, 1, 1),),
    buf_lock=0,
    congestion=b"cubic",
)
SETTLED6 = msgspec.structs.replace(
    SETTLED, family=socket.AF_INET6, local=("fd00::11", 7100, 0, 0), peer=("fd00::100", 40_000, 0, 0)
)


def state(**changes: object) -> TcpState:
    """An established connection with empty queues and all the usual options."""
    plain = TcpState(
        settled=SETTLED,
        state=ESTABLISHED,
        mss=1460,
        segment=1448,
        timestamp=123_456,
        window=struct.pack("5I", 1000, 65_000, 65_000, 32_000, 1000),
        recv_seq=1000,
        send_seq=2000,
        recv_queue=b"",
        send_queue=b"",
        unsent=0,
        sndbuf=87_040,
        rcvbuf=131_072,
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
    """Segments that came out of order are not carried, a FIN comes later: the kernel refuses a window beyond.

    Where the window ends, the peer has been told already.
    """
    wl1, wup = (recv_seq + wl1_off) % 2**32, (recv_seq + wup_off) % 2**32
    window = struct.pack("5I", wl1, 65_000, 1000, 32_000, wup)
    clamped = struct.unpack("5I", _clamped_window(state(recv_seq=recv_seq, window=window)))
    assert clamped[0] == (recv_seq if wl1_off > 0 else wl1)
    assert clamped[4] == (recv_seq if wup_off > 0 else wup)
    assert clamped[1:3] == (65_000, 65_000), "no window is larger than the largest one"
    assert (clamped[3] + clamped[4] - 32_000 - wup) % 2**32 == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (0, []),
        (1, [(8, 0)]),  # timestamps
        (2, [(4, 0)]),  # SACK
        (4, [(3, 7 | 9 << 16)]),  # window scales, ours and the peer's
        (7, [(4, 0), (3, 7 | 9 << 16), (8, 0)]),
        (7 | 8, [(4, 0), (3, 7 | 9 << 16), (8, 0)]),  # ECN is not an option of the handshake
    ],
)
def test_what_the_handshake_agreed_on_is_told_as_the_kernel_wants_it(
    options: int, expected: list[tuple[int, int]]
) -> None:
    assert list(struct.iter_unpack("II", _negotiated(options, 7, 9))) == expected


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


@pytest.mark.parametrize(
    ("kernel_state", "queued", "unsent", "fin_outstanding"),
    [
        (ESTABLISHED, 100_000, 0, False),  # there is none
        (CLOSE_WAIT, 100_000, 0, False),
        (FIN_WAIT2, 0, 0, True),  # the peer has it
        (FIN_WAIT1, 0, 0, False),  # it leaves again, as what is before it does
        (FIN_WAIT1, 10_000, 0, False),
        (FIN_WAIT1, 100_000, 0, True),  # it has left, as all before it has
        (FIN_WAIT1, 100_000, 1, False),
        (LAST_ACK, 100_000, 0, True),
        (LAST_ACK, 100_000, 50_000, False),
        (CLOSING, 0, 0, True),
        (CLOSING, 100_000, 50_000, True),
    ],
)
def test_a_good_bye_is_restored_like_the_bytes_before_it(
    kernel_state: int, queued: int, unsent: int, fin_outstanding: bool
) -> None:
    frozen = state(state=kernel_state, send_queue=bytes(queued), unsent=unsent)
    assert frozen.fin_outstanding is fin_outstanding
    if fin_outstanding:
        assert frozen.outstanding == queued, "a FIN comes after all bytes"


@pytest.mark.parametrize("kernel_state", STATES)
def test_only_what_can_be_asked_about_or_is_settled_does_without_a_round_trip_time(kernel_state: int) -> None:
    assert state(state=kernel_state).in_flight is (kernel_state not in (ESTABLISHED, FIN_WAIT2))
    if kernel_state != FIN_WAIT2:  # has nothing in its send queue
        assert state(state=kernel_state, send_queue=bytes(100_000)).in_flight


@pytest.mark.parametrize("settled", [SETTLED, SETTLED6], ids=["IPv4", "IPv6"])
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**30), st.booleans())
def test_a_segment_in_the_peers_name_is_one(
    settled: Settled, recv_seq: int, acknowledged: int, snd_wnd: int, timestamps: bool
) -> None:
    settled = msgspec.structs.replace(settled, timestamps=timestamps)
    window = struct.pack("5I", 0, snd_wnd, snd_wnd, 0, 0)
    segment = _segment(state(settled=settled, recv_seq=recv_seq, window=window), 0x11, acknowledged)
    source, target, seq, ack, offset, flags, shown, _, urgent = struct.unpack_from("!HHIIBBHHH", segment)
    assert (source, target, seq, ack, flags, urgent) == (40_000, 7100, recv_seq, acknowledged, 0x11, 0)
    assert (offset >> 4) * 4 == len(segment) == (32 if timestamps else 20)
    assert shown == min(snd_wnd >> 7, 0xFFFF)

    ends = b"".join(socket.inet_pton(settled.family, str(end[0])) for end in (settled.peer, settled.local))
    covered = ends + struct.pack("!II", len(segment), socket.IPPROTO_TCP) + segment  # RFC 8200, 8.1; RFC 9293, 3.1
    total = sum(struct.unpack(f"!{len(covered) // 2}H", covered))
    assert total % 0xFFFF == 0, "the checksum makes the sum come out even"


@given(st.integers(-(2**31), 2**33))
def test_a_number_keeps_its_32_bits_as_a_signed_one(number: int) -> None:
    assert struct.pack("i", _signed(number)) == struct.pack("I", number % 2**32)


@given(st.binary(max_size=100), st.binary(max_size=100), st.integers(0, 2**32 - 1))
def test_a_frozen_connection_travels_as_data(recv_queue: bytes, send_queue: bytes, sequence: int) -> None:
    frozen = state(
        settled=SETTLED6, recv_queue=recv_queue, send_queue=send_queue, recv_seq=sequence, unsent=len(send_queue) // 2
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(frozen), type=TcpState) == frozen
