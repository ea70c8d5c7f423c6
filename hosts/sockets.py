"""TCP connections as data: taken out of one kernel and put into another by TCP_REPAIR (tcp(7), CRIU's soccr).

    state = checkpoint(sock)           # frozen: sends nothing, receives nothing; release(sock) undoes it
    sock  = restore(state)             # elsewhere, same address: still frozen
    release(sock, state)               # alive: the kernel probes the peer's window, the rest of the queue goes out

Between checkpoint and restore no frame for the connection may reach either kernel, or it answers RST:
the VM's port has to be dark. Release wants it open, for what leaves then. Only ESTABLISHED connections
are carried.
"""

import array
import errno
import fcntl
import socket
import struct
import termios

import msgspec

from topologies.errors import TestbedError

# linux/tcp.h, linux/sockios.h, asm-generic/socket.h
_TCP_REPAIR, _TCP_REPAIR_QUEUE, _TCP_QUEUE_SEQ = 19, 20, 21
_TCP_REPAIR_OPTIONS, _TCP_TIMESTAMP, _TCP_REPAIR_WINDOW = 22, 24, 29
_TCP_USER_TIMEOUT = 18
_NO_QUEUE, _RECV_QUEUE, _SEND_QUEUE = 0, 1, 2
_SIOCOUTQNSD = 0x894B
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _SO_BUF_LOCK = 32, 33, 72
_OPT_TIMESTAMPS, _OPT_SACK, _OPT_WSCALE = 1, 2, 4  # tcpi_options
_KIND_MSS, _KIND_WSCALE, _KIND_SACK, _KIND_TIMESTAMPS = 2, 3, 4, 8  # TCP option numbers
_ESTABLISHED = 1
_TCP = socket.IPPROTO_TCP
_PLAIN_OPTIONS = (
    (_TCP, socket.TCP_NODELAY),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (_TCP, socket.TCP_KEEPIDLE),
    (_TCP, socket.TCP_KEEPINTVL),
    (_TCP, socket.TCP_KEEPCNT),
    (_TCP, _TCP_USER_TIMEOUT),
)
_PUSH_BYTES = 1 << 16
_INITIAL_WINDOW = 10  # segments (RFC 6928)


class TcpState(msgspec.Struct, frozen=True):
    """A frozen connection. Sequence numbers are the ends of the queues, as TCP_QUEUE_SEQ gives them."""

    local: tuple[str, int]
    peer: tuple[str, int]
    options: int  # tcpi_options
    send_wscale: int
    recv_wscale: int
    mss: int
    timestamp: int
    window: bytes  # struct tcp_repair_window
    recv_seq: int
    send_seq: int
    recv_queue: bytes
    send_queue: bytes
    unsent: int  # bytes at the end of send_queue that never left
    sndbuf: int
    rcvbuf: int
    buf_lock: int
    plain: tuple[tuple[int, int, int], ...]  # level, option, value
    congestion: bytes

    @property
    def outstanding(self) -> int:
        """How many bytes at the beginning of send_queue are restored as sent and not yet acknowledged.

        What was in flight at the suspend is often lost, and a restored connection knows no round-trip time: it
        would wait a whole second (RFC 6298's initial time-out) to send it again. As much as fits into an initial
        window is therefore restored as never sent, and leaves again at once; the peer drops what it has already.
        More than that cannot leave at once, and an acknowledgement of what is "not yet sent" would be refused.
        """
        sent = len(self.send_queue) - self.unsent
        return 0 if sent <= _INITIAL_WINDOW * self.mss else sent


def checkpoint(sock: socket.socket) -> TcpState | None:
    """Freeze a connection and read its state; None (and nothing frozen) if it is not ESTABLISHED."""
    info = sock.getsockopt(_TCP, socket.TCP_INFO, 8)
    if info[0] != _ESTABLISHED:
        return None
    sock.setsockopt(_TCP, _TCP_REPAIR, 1)
    try:
        return _read(sock, info)
    except BaseException:
        sock.setsockopt(_TCP, _TCP_REPAIR, 0)
        raise


def _read(sock: socket.socket, info: bytes) -> TcpState:
    recv_seq, recv_queue = _queue(sock, _RECV_QUEUE, _ioctl(sock, termios.FIONREAD))
    send_seq, send_queue = _queue(sock, _SEND_QUEUE, _ioctl(sock, termios.TIOCOUTQ))
    return TcpState(
        local=sock.getsockname(),
        peer=sock.getpeername(),
        options=info[5],
        send_wscale=info[6] & 15,
        recv_wscale=info[6] >> 4,
        mss=sock.getsockopt(_TCP, socket.TCP_MAXSEG),
        timestamp=_get_u32(sock, _TCP_TIMESTAMP),
        window=sock.getsockopt(_TCP, _TCP_REPAIR_WINDOW, 20),
        recv_seq=recv_seq,
        send_seq=send_seq,
        recv_queue=recv_queue,
        send_queue=send_queue,
        unsent=_ioctl(sock, _SIOCOUTQNSD),
        sndbuf=sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
        rcvbuf=sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
        buf_lock=sock.getsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK),
        plain=tuple((level, option, sock.getsockopt(level, option)) for level, option in _PLAIN_OPTIONS),
        congestion=sock.getsockopt(_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0"),
    )


def restore(state: TcpState) -> socket.socket:
    """The connection again, in this network namespace, which has its local address; frozen until release."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        _restore(sock, state)
    except OSError as error:
        sock.close()
        raise TestbedError(f"connection {state.local} - {state.peer} could not be restored: {error}") from error
    return sock


def _restore(sock: socket.socket, state: TcpState) -> None:
    # Repair mode also lets us bind beside the service's listener; SO_REUSEADDR would take that back.
    sock.setsockopt(_TCP, _TCP_REPAIR, 1)
    # queues are pushed in whole: a segment of a few bytes costs far more than its bytes
    sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, max(state.sndbuf, 4 * len(state.send_queue) + (1 << 20)))
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, max(state.rcvbuf, 4 * len(state.recv_queue) + (1 << 20)))
    _set_queue_seq(sock, _RECV_QUEUE, state.recv_seq - len(state.recv_queue))
    _set_queue_seq(sock, _SEND_QUEUE, state.send_seq - len(state.send_queue))
    sock.bind(state.local)
    sock.connect(state.peer)  # in repair mode: ESTABLISHED at once, no packet
    sock.setsockopt(_TCP, _TCP_REPAIR_OPTIONS, _negotiated(state))
    # The connect has settled for segments of 536 bytes, and knowing the peer's limit now does not change that:
    # setting IP options, even none, is what makes the kernel work the size out again (tcp_sync_mss).
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"")
    if state.options & _OPT_TIMESTAMPS:
        # never below what the peer has seen, or its PAWS check (RFC 7323) drops our segments
        _set_u32(sock, _TCP_TIMESTAMP, state.timestamp + 2)
    sock.setsockopt(_TCP, _TCP_REPAIR_QUEUE, _RECV_QUEUE)
    _push(sock, state.recv_queue)
    sock.setsockopt(_TCP, _TCP_REPAIR_QUEUE, _SEND_QUEUE)
    _push(sock, state.send_queue[: state.outstanding])
    sock.setsockopt(_TCP, _TCP_REPAIR_WINDOW, _clamped_window(state))
    sock.setsockopt(_TCP, _TCP_REPAIR_QUEUE, _NO_QUEUE)
    # back to its size before the first segment leaves: it tells the peer a window
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, state.rcvbuf // 2)  # the kernel doubles what it is told
    for level, option, value in state.plain:
        if value:
            sock.setsockopt(level, option, value)
    sock.setsockopt(_TCP, socket.TCP_CONGESTION, state.congestion)


def release(sock: socket.socket, state: TcpState | None = None) -> None:
    """Let a frozen connection live. With its `state` after restore; without after a checkpoint that was in vain."""
    sock.setsockopt(_TCP, _TCP_REPAIR, 0)  # sends a window probe
    if state is None:
        return
    _push(sock, state.send_queue[state.outstanding :])
    # sizes back to where they were, and autotuning with them, or buffers grow with every migration
    sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, state.sndbuf // 2)  # the kernel doubles what it is told
    sock.setsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK, state.buf_lock)


def probe(sock: socket.socket) -> None:
    """Ask the peer what it has, if it owes an acknowledgement: its answer stands for all that were lost."""
    if _ioctl(sock, termios.TIOCOUTQ):
        sock.setsockopt(_TCP, _TCP_REPAIR, 1)
        sock.setsockopt(_TCP, _TCP_REPAIR, 0)  # sends a window probe


def _negotiated(state: TcpState) -> bytes:
    """What the handshake agreed on, as TCP_REPAIR_OPTIONS wants it: pairs of (option kind, value)."""
    options = struct.pack("II", _KIND_MSS, state.mss)
    if state.options & _OPT_SACK:
        options += struct.pack("II", _KIND_SACK, 0)
    if state.options & _OPT_WSCALE:
        options += struct.pack("II", _KIND_WSCALE, state.send_wscale | state.recv_wscale << 16)
    if state.options & _OPT_TIMESTAMPS:
        options += struct.pack("II", _KIND_TIMESTAMPS, 0)
    return options


def _clamped_window(state: TcpState) -> bytes:
    """The window, without what came out of order beyond the receive queue's end: that is not carried."""
    snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup = struct.unpack("5I", state.window)
    if _before(state.recv_seq, snd_wl1):
        snd_wl1 = state.recv_seq
    if _before(state.recv_seq, rcv_wup):
        rcv_wup = state.recv_seq
    return struct.pack("5I", snd_wl1, snd_wnd, max(max_window, snd_wnd), rcv_wnd, rcv_wup)


def _before(a: int, b: int) -> bool:
    """a < b in sequence space (RFC 9293)."""
    return (a - b) & 0xFFFFFFFF > 0x7FFFFFFF


def _queue(sock: socket.socket, queue: int, length: int) -> tuple[int, bytes]:
    sock.setsockopt(_TCP, _TCP_REPAIR_QUEUE, queue)
    sequence = _get_u32(sock, _TCP_QUEUE_SEQ)
    content = sock.recv(length, socket.MSG_PEEK | socket.MSG_DONTWAIT) if length else b""
    if len(content) != length:
        raise TestbedError(f"a TCP queue of {length} bytes gave {len(content)}")
    return sequence, content


def _set_queue_seq(sock: socket.socket, queue: int, sequence: int) -> None:
    sock.setsockopt(_TCP, _TCP_REPAIR_QUEUE, queue)
    _set_u32(sock, _TCP_QUEUE_SEQ, sequence)


def _push(sock: socket.socket, content: bytes) -> None:
    view, step = memoryview(content), _PUSH_BYTES
    while view:
        try:
            view = view[sock.send(view[:step]) :]
        except OSError as error:
            if error.errno != errno.ENOMEM or step == 1024:  # smaller pieces fit into what is left of the buffer
                raise
            step //= 2


def _ioctl(sock: socket.socket, request: int) -> int:
    value = array.array("i", [0])
    fcntl.ioctl(sock, request, value)
    return value[0]


def _get_u32(sock: socket.socket, option: int) -> int:
    return int(struct.unpack("I", sock.getsockopt(_TCP, option, 4))[0])


def _set_u32(sock: socket.socket, option: int, value: int) -> None:
    sock.setsockopt(_TCP, option, struct.pack("I", value & 0xFFFFFFFF))
