"""An incoming migration, phase by phase. Until the claim any failure ends with nothing left of the VM here.

prepare       RAM, guest process, namespace, dark port, announcement frames       (before the source starts)
greet         HELLO, WELCOME
receive       pages into RAM, an acknowledgement for every round; in a hurry from SUSPENDING on
restore       RAM checked against the source's digest, sockets restored
claim         the next generation on the datastore            <== POINT OF NO RETURN
resume        gate open, guest told to run, first announcement, RESUMED
"""

import secrets

from hosts.machine import Machine
from hosts.protocol import (
    Hello,
    Kind,
    ProtocolError,
    RemoteProtocolError,
    Resumed,
    State,
    Welcome,
    negotiate,
)
from hosts.ram import PageHashes
from hosts.stream import PeerAborted, Stream, StreamLost
from hosts.urgency import hurry, relax
from topologies.errors import TestbedError


class IncomingFailed(TestbedError):
    """The VM did not come here; the message says why."""


class IncomingMigration:
    """A VM that is to come: `machine` is built and dark; `token` lets its source in."""

    def __init__(self, machine: Machine, migration: str, generation: int) -> None:
        machine.guest.await_state()
        self.machine, self.migration, self.generation = machine, migration, generation
        self.token = secrets.token_hex(16)
        self.hashes = PageHashes(machine.guest.ram)

    def run(self, stream: Stream, hello: Hello) -> None:
        """Until the VM runs here. IncomingFailed before the point of no return; nothing of it was seen outside."""
        try:
            self._run(stream, hello)
        finally:
            relax()

    def _run(self, stream: Stream, hello: Hello) -> None:
        try:
            self.greet(stream, hello)
            state = self.receive(stream)
            self.restore(state)
            self.claim(stream)
        except (TestbedError, OSError) as error:
            if isinstance(error, StreamLost | PeerAborted | ProtocolError) and stream.session.may("lost"):
                stream.session.step("lost")
            else:
                stream.abort(str(error))
            raise IncomingFailed(f"VM {self.machine.vm.name} did not come: {error}") from error
        self.resume(stream)

    # ------------------------------------------------------------ the phases

    def greet(self, stream: Stream, hello: Hello) -> None:
        version = negotiate(hello.major, hello.minor)
        if hello.ram_bytes != self.machine.guest.ram.size:
            raise RemoteProtocolError(
                f"{hello.ram_bytes} bytes of RAM announced, prepared {self.machine.guest.ram.size}"
            )
        stream.send(Welcome(*version))

    def receive(self, stream: Stream) -> State:
        ram = self.machine.guest.ram
        while True:
            header, body = stream.receive()
            match header.kind:
                case Kind.PAGES | Kind.ZERO:
                    stream.receive_pages(header, ram, self.hashes)
                case Kind.SUSPENDING:
                    hurry()
                case Kind.ROUND_END:
                    stream.mark(Kind.ROUND_ACK, header.round)
                case Kind.STATE:
                    self._emit("state.received", state_bytes=header.length)
                    state: State = body
                    return state

    def restore(self, state: State) -> None:
        self.digest = self.hashes.digest()
        if self.digest != state.ram_digest:
            raise RemoteProtocolError(f"RAM differs: digest {self.digest} here, {state.ram_digest} at the source")
        self._emit("ram.verified", ram_digest=self.digest)
        self.machine.guest.restore(state.device)
        self._emit("sockets.restored")

    def claim(self, stream: Stream) -> None:
        """The point of no return: from the claim on the VM is ours, and the source will never resume it."""
        machine = self.machine
        if not machine.site.datastore.claim(machine.vm.name, self.generation, machine.site.host.name):
            stream.session.step("claim lost")
            raise IncomingFailed(f"generation {self.generation} was claimed by another host first")
        machine.generation = self.generation
        stream.session.step("claim")
        self._emit("generation.claimed", generation=self.generation)

    def resume(self, stream: Stream) -> None:
        machine = self.machine
        machine.port.open()
        self._emit("gate.opened")
        self._emit("vm.resuming")
        # the guest's thaw and the switch's relearning run side by side
        machine.guest.run(meanwhile=lambda: machine.announcer.start(self._announced))
        self._emit("vm.resumed")
        stream.session.step("resume")
        try:
            stream.send(Resumed(self.generation, self.digest))
        except StreamLost as error:  # the source asks the datastore then
            self._emit("migration.unheard", reason=str(error))

    def _announced(self, number: int, mode: str, frames: int) -> None:
        self._emit("announce.sent", round=number, mode=mode, frames=frames)

    def _emit(self, kind: str, **fields: object) -> int:
        return self.machine.emit(kind, migration=self.migration, **fields)
