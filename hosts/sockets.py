"""TCP connections as data: taken out of one kernel and put into another by TCP_REPAIR (tcp(7), CRIU's libsoccr).

    state = checkpoint(sock)           # frozen: sends nothing, receives nothing; release(sock) undoes it
    sock  = restore(state)             # elsewhere, same address: still frozen
    release(sock, state)               # alive: what has not been sent leaves, the peer is asked what it has

Between checkpoint and restore no frame for the connection may reach either kernel, or it answers RST:
the VM's port has to be dark. Release wants it open, for what leaves then. The namespace's `lo` has to be
up, and its neighbour table in place: a peer's FIN is made here, and answered at once or a little later.

Carried are connections over IPv4 and IPv6 in these states (RFC 9293), with both queues and every option:

    ESTABLISHED                      both directions are open
    FIN_WAIT1  FIN_WAIT2             we have said the last of ours; the peer goes on
    CLOSE_WAIT                       the peer has said the last of its own; we go on
    CLOSING    LAST_ACK              both have; our FIN is not acknowledged yet

Not carried are those without a descriptor that could be frozen: SYN_SENT and SYN_RECV (a handshake under
way: the client that takes it for complete is answered RST), TIME_WAIT (both ends are done; only a delayed
duplicate would have met it), and a connection that its program has closed before the peer acknowledged
everything. A program that is moved keeps such a descriptor until then (hosts/light_guest.py).
Segments that arrived out of order are not carried either: their sender still has them.
"""

import array
import errno
import fcntl
import functools
import socket
import struct
import termios
import time
from collections.abc import Callable

import msgspec

from topologies.errors import TestbedError

# linux/tcp.h, linux/sockios.h, asm-generic/socket.h
_TCP_REPAIR, _TCP_REPAIR_QUEUE, _TCP_QUEUE_SEQ = 19, 20, 21
_TCP_REPAIR_OPTIONS, _TCP_TIMESTAMP, _TCP_REPAIR_WINDOW = 22, 24, 29
_TCP_USER_TIMEOUT = 18
_ON, _OFF, _OFF_SILENTLY = 1, 0, -1  # of TCP_REPAIR: without "silently" an established connection probes the window
_NO_QUEUE, _RECV_QUEUE, _SEND_QUEUE = 0, 1, 2
_SIOCOUTQNSD = 0x894B
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _SO_MEMINFO, _SO_BUF_LOCK = 32, 33, 55, 72
_OPT_TIMESTAMPS, _OPT_SACK, _OPT_WSCALE = 1, 2, 4  # tcpi_options
_KIND_MSS, _KIND_WSCALE, _KIND_SACK, _KIND_TIMESTAMPS = 2, 3, 4, 8  # TCP option numbers
_MAX_USER_MSS = 32767  # TCP_MAXSEG takes no more
_ESTABLISHED, _FIN_WAIT1, _FIN_WAIT2, _CLOSE_WAIT, _LAST_ACK, _CLOSING = 1, 4, 5, 8, 9, 11  # net/tcp_states.h
_CARRIED = frozenset((_ESTABLISHED, _FIN_WAIT1, _FIN_WAIT2, _CLOSE_WAIT, _LAST_ACK, _CLOSING))
_WE_SAID_GOOD_BYE = frozenset((_FIN_WAIT1, _FIN_WAIT2, _LAST_ACK, _CLOSING))
_PEER_SAID_GOOD_BYE = frozenset((_CLOSE_WAIT, _LAST_ACK, _CLOSING))
_FIN, _ACK = 0x01, 0x10  # flags of a segment
# linux/in.h, linux/in6.h: IP_TRANSPARENT, IPV6_TRANSPARENT
_TRANSPARENT: dict[int, tuple[int, int]] = {
    socket.AF_INET: (socket.IPPROTO_IP, 19),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 75),
}
_TCP = socket.IPPROTO_TCP
_PLAIN_OPTIONS = (
    (_TCP, socket.TCP_NODELAY),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),  # after the connect: it starts the timer
    (_TCP, socket.TCP_KEEPIDLE),
    (_TCP, socket.TCP_KEEPINTVL),
    (_TCP, socket.TCP_KEEPCNT),
    (_TCP, _TCP_USER_TIMEOUT),
)
_WINDOW = struct.Struct("5I")  # struct tcp_repair_window: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup
_PUSH_BYTES = 1 << 16
_INITIAL_WINDOW = 10  # segments (RFC 6928)
_LATER = 2  # ms: our clock never shows less than the peer has seen, or its PAWS check (RFC 7323) drops our segments
_ASSUMED_RTT_MS = 20  # more than the switch's relearning takes; the true one replaces it within a few segments
_INJECTED_WITHIN_S = 1.0  # it takes microseconds, unless this CPU's kernel is behind with its packets
_ZERO = array.array("i", [0])


class Settled(msgspec.Struct, frozen=True):
    """What stays as it is while the program sets no option: read once, so that no downtime has to pay for it."""

    family: int
    local: tuple[str | int, ...]  # as socket.getsockname gives it
    peer: tuple[str | int, ...]
    negotiated: bytes  # in the handshake: TCP_REPAIR_OPTIONS, but for the MSS
    send_wscale: int
    timestamps: bool
    plain: tuple[tuple[int, int, int], ...]  # level, option, value: where it is not a new socket's
    buf_lock: int
    congestion: bytes


class TcpState(msgspec.Struct, frozen=True):
    """A frozen connection. Sequence numbers are the ends of the queues' bytes; a FIN takes the number after them."""

    settled: Settled
    state: int  # of _CARRIED
    mss: int  # the peer's limit
    segment: int  # bytes that a segment to it carries: what is left of that, and of the way there, beside options
    timestamp: int
    window: bytes  # _WINDOW
    recv_seq: int
    send_seq: int
    recv_queue: bytes
    send_queue: bytes
    unsent: int  # bytes at the end of send_queue that never left
    sndbuf: int
    rcvbuf: int

    @property
    def outstanding(self) -> int:
        """How many bytes at the beginning of send_queue are restored as sent and not yet acknowledged.

        What was in flight at the suspend is often lost, and a restored connection knows no round-trip time: it
        would wait for seconds (RFC 6298's initial time-out) to send it again. As much as fits into an initial
        window is therefore restored as never sent, and leaves again at once; the peer drops what it has already.
        More than that cannot leave at once, and an acknowledgement of what is "not yet sent" would be refused.
        """
        if self.state == _CLOSING:
            return len(self.send_queue)
        sent = len(self.send_queue) - self.unsent
        return 0 if sent <= _INITIAL_WINDOW * self.segment else sent

    @property
    def in_flight(self) -> bool:
        """Whether only the retransmission timer could notice that what counts as sent was lost in the dark.

        A restored connection would set it to 3 s (the kernel's fallback without a round-trip time). So it gets to
        know one: a byte before the first is sent to nobody and acknowledged by a segment of our own making.
        An established connection without anything outstanding can be helped by `probe`.
        """
        return self.state not in (_ESTABLISHED, _FIN_WAIT2) or (bool(self.send_queue) and self.outstanding > 0)

    @property
    def fin_outstanding(self) -> bool:
        """Whether our FIN is restored as sent, like the bytes before it; if not, it leaves with the release.

        In CLOSING it has to be, for our FIN must come before the peer's: the other order is LAST_ACK.
        """
        if self.state in (_FIN_WAIT2, _CLOSING):
            return True
        return self.state in _WE_SAID_GOOD_BYE and self.outstanding > 0 and self.unsent == 0


def settled(sock: socket.socket) -> Settled:
    """Read a connection's addresses and options; OSError if it has no peer (any more)."""
    info = sock.getsockopt(_TCP, socket.TCP_INFO, 8)
    return Settled(
        family=sock.family,
        local=sock.getsockname(),
        peer=sock.getpeername(),
        negotiated=_negotiated(options=info[5], send_wscale=info[6] & 15, recv_wscale=info[6] >> 4),
        send_wscale=info[6] & 15,
        timestamps=bool(info[5] & _OPT_TIMESTAMPS),
        plain=tuple(sorted(_plain(sock) - _plain_of_a_new_socket())),
        buf_lock=sock.getsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK),
        congestion=sock.getsockopt(_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0"),
    )


def _plain(sock: socket.socket) -> frozenset[tuple[int, int, int]]:
    return frozenset((level, option, sock.getsockopt(level, option)) for level, option in _PLAIN_OPTIONS)


@functools.cache
def _plain_of_a_new_socket() -> frozenset[tuple[int, int, int]]:
    with socket.socket() as new:
        return _plain(new)


def checkpoint(sock: socket.socket, known: Settled | None = None) -> TcpState | None:
    """Freeze a connection and read its state; None (and nothing frozen) if it is in none that is carried."""
    state = sock.getsockopt(_TCP, socket.TCP_INFO, 1)[0]
    if state not in _CARRIED:
        return None
    known = known or settled(sock)
    segment = sock.getsockopt(_TCP, socket.TCP_MAXSEG)  # in repair mode it tells the peer's limit
    sock.setsockopt(_TCP, _TCP_REPAIR, _ON)
    try:
        return _read(sock, state, segment, known)
    except BaseException:
        sock.setsockopt(_TCP, _TCP_REPAIR, _OFF)
        raise


def _read(sock: socket.socket, state: int, segment: int, known: Settled) -> TcpState:
    recv_seq, recv_bytes = _select(sock, _RECV_QUEUE), _ioctl(sock, termios.FIONREAD)  # the bytes without a FIN
    recv_queue = _peek(sock, recv_bytes)
    send_seq, send_bytes = _select(sock, _SEND_QUEUE), _ioctl(sock, termios.TIOCOUTQ)  # a FIN counts here
    unsent = _ioctl(sock, _SIOCOUTQNSD) if send_bytes else 0
    if state in _WE_SAID_GOOD_BYE:
        send_seq, send_bytes, unsent = send_seq - 1, max(send_bytes - 1, 0), max(unsent - 1, 0)
    _, rcvbuf, _, sndbuf = struct.unpack("4I", sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 16))
    return TcpState(
        settled=known,
        state=state,
        mss=sock.getsockopt(_TCP, socket.TCP_MAXSEG),
        segment=segment,
        timestamp=sock.getsockopt(_TCP, _TCP_TIMESTAMP),
        window=sock.getsockopt(_TCP, _TCP_REPAIR_WINDOW, _WINDOW.size),
        recv_seq=(recv_seq - (state in _PEER_SAID_GOOD_BYE)) & 0xFFFFFFFF,
        send_seq=send_seq & 0xFFFFFFFF,
        recv_queue=recv_queue,
        send_queue=_peek(sock, send_bytes),
        unsent=unsent,
        sndbuf=sndbuf,
        rcvbuf=rcvbuf,
    )


def restore(state: TcpState) -> socket.socket:
    """The connection again, in this network namespace, which has its local address; frozen until release."""
    sock = socket.socket(state.settled.family, socket.SOCK_STREAM)
    try:
        _restore(sock, state)
    except (OSError, TestbedError) as error:
        sock.close()
        ends = f"{state.settled.local} - {state.settled.peer}"
        raise TestbedError(f"connection {ends} could not be restored: {error}") from error
    return sock


def _restore(sock: socket.socket, state: TcpState) -> None:
    known, in_flight = state.settled, state.in_flight
    # Repair mode also lets us bind beside the service's listener; SO_REUSEADDR would take that back.
    sock.setsockopt(_TCP, _TCP_REPAIR, _ON)
    sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _room(state.sndbuf, state.send_queue))
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _room(state.rcvbuf, state.recv_queue))
    _begin(sock, _RECV_QUEUE, state.recv_seq - len(state.recv_queue))
    first = state.send_seq - len(state.send_queue)  # that the peer has not acknowledged
    _begin(sock, _SEND_QUEUE, first - in_flight)
    sock.bind(known.local)
    # The peer's limit, known before the connect, is what the segment size is worked out from (tcp_connect_init).
    sock.setsockopt(_TCP, socket.TCP_MAXSEG, min(state.mss, _MAX_USER_MSS))
    sock.connect(known.peer)  # in repair mode: ESTABLISHED at once, no packet
    sock.setsockopt(_TCP, _TCP_REPAIR_OPTIONS, known.negotiated + struct.pack("II", _KIND_MSS, state.mss))
    sock.setsockopt(_TCP, _TCP_TIMESTAMP, _signed(state.timestamp + _LATER))
    if state.recv_queue:
        sock.setsockopt(_TCP, _TCP_REPAIR_QUEUE, _RECV_QUEUE)
        _push(sock, memoryview(state.recv_queue))
    sock.setsockopt(_TCP, _TCP_REPAIR_WINDOW, _clamped_window(state))
    sock.setsockopt(_TCP, _TCP_REPAIR_QUEUE, _SEND_QUEUE)  # what is queued from here on counts as sent
    if in_flight:
        sock.send(b"?")
        _inject(sock, state, _ACK, first, lambda: not _ioctl(sock, termios.TIOCOUTQ))
        _push(sock, memoryview(state.send_queue)[: state.outstanding])
    if state.state != _ESTABLISHED:
        _say_good_bye(sock, state, first)
    sock.setsockopt(_TCP, _TCP_REPAIR_QUEUE, _NO_QUEUE)
    if state.recv_queue:
        # back to its size before the first segment leaves: it tells the peer a window
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, state.rcvbuf // 2)  # the kernel doubles what it is told
    for level, option, value in known.plain:
        sock.setsockopt(level, option, value)
    if not sock.getsockopt(_TCP, socket.TCP_CONGESTION, 16).startswith(known.congestion + b"\0"):
        sock.setsockopt(_TCP, socket.TCP_CONGESTION, known.congestion)


def _say_good_bye(sock: socket.socket, state: TcpState, first: int) -> None:
    """From ESTABLISHED to the state that it was in, but for a FIN of ours that is yet to leave."""

    def now_in(states: frozenset[int]) -> bool:
        return sock.getsockopt(_TCP, socket.TCP_INFO, 1)[0] in states

    if state.fin_outstanding and state.state != _LAST_ACK:
        sock.shutdown(socket.SHUT_WR)
    if state.state == _FIN_WAIT2:
        _inject(sock, state, _ACK, state.send_seq + 1, lambda: now_in(frozenset((_FIN_WAIT2,))))
    if state.state in _PEER_SAID_GOOD_BYE:
        _inject(sock, state, _FIN | _ACK, first, lambda: now_in(_PEER_SAID_GOOD_BYE))
    if state.fin_outstanding and state.state == _LAST_ACK:
        sock.shutdown(socket.SHUT_WR)


def _inject(sock: socket.socket, state: TcpState, flags: int, acknowledged: int, taken: Callable[[], bool]) -> None:
    """Let the kernel have a segment of the peer's: it goes out to our own address, and so comes in by `lo`."""
    family, local, peer = state.settled.family, state.settled.local, state.settled.peer
    level, transparent = _TRANSPARENT[family]
    with socket.socket(family, socket.SOCK_RAW, _TCP) as raw:
        # The kernel makes the IP header (raw(7)), from the peer's address, which is not ours: "transparent". With an
        # IPv6 header of our own, the route that the connection then keeps would keep the VM's device from going away.
        raw.setsockopt(level, transparent, 1)
        raw.bind((peer[0], 0))
        raw.sendto(_segment(state, flags, acknowledged & 0xFFFFFFFF), (local[0], 0))
    deadline = time.monotonic() + _INJECTED_WITHIN_S
    while not taken():
        if time.monotonic() > deadline:
            raise TestbedError("the kernel did not take a segment made in its peer's name; is lo up?")
        time.sleep(0.0002)


def _segment(state: TcpState, flags: int, acknowledged: int) -> bytes:
    """A segment without data from the peer (RFC 9293); no window is changed by it."""
    family, local, peer = state.settled.family, state.settled.local, state.settled.peer
    source, target = (socket.inet_pton(family, str(end[0])) for end in (peer, local))
    window = min(_WINDOW.unpack(state.window)[1] >> state.settled.send_wscale, 0xFFFF)
    # The peer's own clock is unknown: 0 stands for "none" (tcp_paws_check). The echo is what tells a round-trip time.
    echo = (state.timestamp + _LATER - _ASSUMED_RTT_MS) & 0xFFFFFFFF
    options = struct.pack("!BBBBII", 1, 1, 8, 10, 0, echo) if state.settled.timestamps else b""
    size = 20 + len(options)
    head = struct.pack("!HHIIBBH", peer[1], local[1], state.recv_seq, acknowledged, size << 2, flags, window)
    covered = source + target + struct.pack("!HH", _TCP, size) + head + options
    total = sum(struct.unpack(f"!{len(covered) // 2}H", covered))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return head + struct.pack("!HH", total ^ 0xFFFF, 0) + options


def release(sock: socket.socket, state: TcpState | None = None) -> None:
    """Let a frozen connection live. With its `state` after restore; without after a checkpoint that was in vain."""
    if state is None:
        sock.setsockopt(_TCP, _TCP_REPAIR, _OFF)
        return
    # Nobody has to be asked about an idle connection; five hundred probes and answers would crowd out what matters.
    idle = not state.send_queue and _WINDOW.unpack(state.window)[1] >= state.mss
    sock.setsockopt(_TCP, _TCP_REPAIR, _OFF_SILENTLY if idle else _OFF)
    if state.send_queue:
        _push(sock, memoryview(state.send_queue)[state.outstanding :])
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, state.sndbuf // 2)  # the kernel doubles what it is told
    if state.state in _WE_SAID_GOOD_BYE and not state.fin_outstanding:
        sock.shutdown(socket.SHUT_WR)
    # sizes are back to where they were, and now autotuning, or buffers grow with every migration
    sock.setsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK, state.settled.buf_lock)


def probe(sock: socket.socket) -> None:
    """Ask the peer what it has, if it owes an acknowledgement: its answer stands for all that were lost.

    The kernel does so for an established connection only; any other waits for its retransmission timer.
    """
    if _ioctl(sock, termios.TIOCOUTQ):
        sock.setsockopt(_TCP, _TCP_REPAIR, _ON)
        sock.setsockopt(_TCP, _TCP_REPAIR, _OFF)  # sends a window probe


def _negotiated(options: int, send_wscale: int, recv_wscale: int) -> bytes:
    """What the handshake agreed on, as TCP_REPAIR_OPTIONS wants it: pairs of (option kind, value)."""
    told = b""
    if options & _OPT_SACK:
        told += struct.pack("II", _KIND_SACK, 0)
    if options & _OPT_WSCALE:
        told += struct.pack("II", _KIND_WSCALE, send_wscale | recv_wscale << 16)
    if options & _OPT_TIMESTAMPS:
        told += struct.pack("II", _KIND_TIMESTAMPS, 0)
    return told


def _clamped_window(state: TcpState) -> bytes:
    """The window, without what lies beyond the receive queue's end: out of order, not carried; or a FIN, made later.

    Its right edge stays where the peer knows it, and a FIN has room before it.
    """
    snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup = _WINDOW.unpack(state.window)
    beyond_wl1, beyond_wup = _before(state.recv_seq, snd_wl1), _before(state.recv_seq, rcv_wup)
    if not (beyond_wl1 or beyond_wup or snd_wnd > max_window):
        return state.window
    if beyond_wl1:
        snd_wl1 = state.recv_seq
    if beyond_wup:
        rcv_wnd += (rcv_wup - state.recv_seq) & 0xFFFFFFFF
        rcv_wup = state.recv_seq
    return _WINDOW.pack(snd_wl1, snd_wnd, max(max_window, snd_wnd), rcv_wnd, rcv_wup)


def _before(a: int, b: int) -> bool:
    """a < b in sequence space (RFC 9293)."""
    return (a - b) & 0xFFFFFFFF > 0x7FFFFFFF


def _room(size: int, queue: bytes) -> int:
    """Half of a buffer's size; queues are pushed in whole, and a segment of a few bytes costs far more than them."""
    return max(size, 4 * len(queue) + (1 << 20)) if queue else size // 2


def _select(sock: socket.socket, queue: int) -> int:
    """Choose the queue that is read, and tell where it ends."""
    sock.setsockopt(_TCP, _TCP_REPAIR_QUEUE, queue)
    return sock.getsockopt(_TCP, _TCP_QUEUE_SEQ)


def _peek(sock: socket.socket, length: int) -> bytes:
    content = sock.recv(length, socket.MSG_PEEK | socket.MSG_DONTWAIT) if length else b""
    if len(content) != length:
        raise TestbedError(f"a TCP queue of {length} bytes gave {len(content)}")
    return content


def _begin(sock: socket.socket, queue: int, sequence: int) -> None:
    sock.setsockopt(_TCP, _TCP_REPAIR_QUEUE, queue)
    sock.setsockopt(_TCP, _TCP_QUEUE_SEQ, _signed(sequence))


def _push(sock: socket.socket, content: memoryview) -> None:
    step = _PUSH_BYTES
    while content:
        try:
            content = content[sock.send(content[:step]) :]
        except OSError as error:
            if error.errno != errno.ENOMEM or step == 1024:  # smaller pieces fit into what is left of the buffer
                raise
            step //= 2


def _ioctl(sock: socket.socket, request: int) -> int:
    value = _ZERO[:]
    fcntl.ioctl(sock.fileno(), request, value)
    return value[0]


def _signed(number: int) -> int:
    """The int with the same 32 bits: setsockopt takes it in a third of the time that bytes need."""
    return ((number + 0x80000000) & 0xFFFFFFFF) - 0x80000000
