"""Both ends of a migration's connections in one process, over real TCP, and memory to be moved."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from hosts.protocol import CHUNK_PAGES, MAJOR, MINOR, Header, Hello, Kind, Session, Welcome
from hosts.ram import PAGE, PageHashes, Ram
from hosts.stream import PEER_TIMEOUT_S, Stream

SILENCE_S = 0.1  # instead of the real time-out, where a test waits for it
MIB = 2**20
# kind -> the most that its body may hold, in bytes
LIMITS = {
    Kind.HELLO: 4096,
    Kind.WELCOME: 4096,
    Kind.PAGES: CHUNK_PAGES * (PAGE + 16),
    Kind.ZERO: CHUNK_PAGES * 8,
    Kind.ROUND_END: 0,
    Kind.ROUND_ACK: 0,
    Kind.STATE: 128 * MIB,
    Kind.RESUMED: 4096,
    Kind.ABORT: 4096,
    Kind.SUSPENDING: 0,
    Kind.JOIN: 4096,
    Kind.BITMAP: 16 * MIB,
    Kind.FETCH: 8,
    Kind.ALL_SENT: 4096,
    Kind.COMPLETE: MIB,
}
HELLO = Hello(MAJOR, MINOR, "vm1-0badcafe", "token", 0)


@contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        caller = socket.create_connection(listener.getsockname())
        called, _ = listener.accept()
    with caller, called:
        yield caller, called


def session_in(role: str, state: str) -> Session:
    session = Session(role)
    session.state = state
    return session


@contextmanager
def streams(
    here: tuple[str, str], there: tuple[str, str], timeout_s: float = PEER_TIMEOUT_S
) -> Iterator[tuple[Stream, Stream]]:
    """Two streams that are connected, each in a role and a state."""
    with (
        connection() as (caller, called),
        Stream(caller, session_in(*here), timeout_s) as one,
        Stream(called, session_in(*there), timeout_s) as other,
    ):
        yield one, other


@contextmanager
def migration() -> Iterator[tuple[Stream, Stream]]:
    """A source and a destination that have greeted each other."""
    with streams(("source", "new"), ("destination", "new")) as (source, destination):
        source.send(HELLO)
        assert destination.expect(Kind.HELLO) == HELLO
        destination.send(Welcome(MAJOR, MINOR))
        source.expect(Kind.WELCOME)
        yield source, destination


@contextmanager
def lanes(number: int, timeout_s: float = PEER_TIMEOUT_S) -> Iterator[tuple[list[Stream], list[Stream]]]:
    """Both ends of so many further connections that carry pages."""
    if not number:
        yield [], []
        return
    ends = streams(("sender", "streaming"), ("receiver", "streaming"), timeout_s)
    with ends as (one, other), lanes(number - 1, timeout_s) as others:
        yield [one, *others[0]], [other, *others[1]]


def table(*runs: tuple[int, int]) -> bytes:
    """Runs as they are on the wire."""
    return np.array(runs, ">u4").tobytes()


@contextmanager
def memory(pages: int) -> Iterator[Ram]:
    ram = Ram.create("test", pages * PAGE)
    try:
        yield ram
    finally:
        ram.close()


def scribble(ram: Ram, pages: set[int]) -> None:
    """Something of its own in each page, not always in its first word."""
    for page in pages:
        ram.words[page, page % 512] = page + 1


def page_set(runs: np.ndarray) -> set[int]:
    """The pages of runs, by Python alone."""
    return {page for first, end in runs.tolist() for page in range(first, end)}


def receive_round(stream: Stream, ram: Ram, hashes: PageHashes) -> list[Header]:
    """Frames of pages up to the end of the round, which is acknowledged."""
    headers = []
    while (header := stream.receive()[0]).kind is not Kind.ROUND_END:
        headers.append(header)
        stream.receive_pages(header, ram, hashes)
    stream.mark(Kind.ROUND_ACK, header.round)
    return headers
