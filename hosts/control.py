"""The control API between the manager and the agents: JSON lines over TLS, both sides with a certificate.

Every request is one line; the answer is any number of Notice lines and then one Reply or one Refusal.
The authority is made for one run, in memory (`trustme`); a caller without a certificate of it does not
get past the handshake, and only the manager's name may give orders.
"""

import socket
import socketserver
import ssl
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec

from hosts.policy import Policy
from hosts.transport import Transport
from topologies.errors import TestbedError
from topologies.plan import NAME_PATTERN, VM

PORT = 8443
MANAGER = "vcenter"
_MAX_LINE_BYTES = 1 << 20
_HANDSHAKE_TIMEOUT_S = 5.0
# An agent reports at least every round; the longest silence is filling the RAM of a large VM.
ANSWER_WITHIN_S = 180.0
# A host that is told to restart a dead one's VM may die itself; to wait out a lease and fill RAM takes seconds.
_RESTART_WITHIN_S = 60.0
# What it knows by heart it says at once, or it is gone: a connection to a host without power looks open
_STATUS_WITHIN_S = 5.0
_UNHEARD_TIMEOUT_S = 10.0


class ControlError(TestbedError):
    """An agent could not be reached, or refused; the message says which and why."""


class AgentGone(ControlError):
    """There was no answer: what the agent has made of the request is not known."""


# A VM's name becomes part of paths on a datastore and of sockets' names
VmName = Annotated[str, msgspec.Meta(pattern=rf"\A{NAME_PATTERN}\Z")]


class Request(msgspec.Struct, tag=True, frozen=True):
    """Base of all requests."""

    answer_within_s: ClassVar[float] = ANSWER_WITHIN_S


class Create(Request, frozen=True):
    """Make a VM's files on the datastore; what is there already stays as it is."""

    vm: VM


class Delete(Request, frozen=True):
    """Remove all files of a VM that is off."""

    vm: VmName


class Register(Request, frozen=True):
    """Replies the VM of these files, if this host could run it."""

    vm: VmName


class PowerOn(Request, frozen=True):
    """Start a VM here, with fresh RAM, from its files. `announce`, `schedule_ms`: as in hosts/announce.py.

    Replies {"generation", "tracking", "entries", "replayed"}: its ledger's, as its disk had them.
    """

    vm: VmName
    announce: str
    schedule_ms: tuple[int, ...]


class Restart(Request, frozen=True):
    """The same of a VM whose host is dead: only if its owner's pulse stands still for a lease (hosts/ownership.py)."""

    answer_within_s: ClassVar[float] = _RESTART_WITHIN_S
    vm: VmName
    announce: str
    schedule_ms: tuple[int, ...]


class PowerOff(Request, frozen=True):
    """Shut a VM down and say on its datastore that it is off; one that has failed halfway can be repeated.

    Replies {"generation", "orderly"}: whether it was shut down, and its nvram saved.
    """

    vm: VmName


class Prepare(Request, frozen=True):
    """Make ready for a VM to come, in TLS only if `encrypt`. Replies {"token", "ip", "port"}: where to connect."""

    vm: VmName
    migration: str
    announce: str
    schedule_ms: tuple[int, ...]
    encrypt: bool = False


class Migrate(Request, frozen=True):
    """Move a VM to a host that is prepared. Notices are Progress; replies an Outcome (hosts/source.py).

    It goes on if its caller goes away; Status tells of it, Cancel ends it.
    """

    vm: VmName
    migration: str
    ip: str
    port: int
    token: str
    policy: Policy
    transport: Transport = msgspec.field(default_factory=Transport)


class Cancel(Request, frozen=True):
    """Give up a migration that leaves from here, if it has not come to its point of no return."""

    migration: str


class Abandon(Request, frozen=True):
    """Forget a preparation; nothing happens if there is none."""

    migration: str


class Status(Request, frozen=True):
    """Replies {"host", "vms", "migrations", "memory_bytes"}: memory beyond the guests' RAM.

    vms: {name: {"generation", "state", "pid", "work", "silent_ms", "disk_full"}}, the state as in hosts/channel.py, or
    "dead", or "stalled": it stands still until its datastore, which has been silent for so long, gives it a lease;
    migrations under way here: {migration: {"role": "source" or "destination", "progress": the latest or None}}.
    """

    answer_within_s: ClassVar[float] = _STATUS_WITHIN_S


class Owner(Request, frozen=True):
    """Replies the newest Claim of a VM on the datastore (hosts/datastore.py), None if it never ran."""

    vm: VmName


class Break(Request, frozen=True):
    """Stop the next migration that enters a state here, "source:suspended" say (hosts/breakpoints.py)."""

    state: str
    seconds: float = 30.0


class Continue(Request, frozen=True):
    """Take a breakpoint away, and let go on what has stopped at it."""


class Notice(msgspec.Struct, tag=True, frozen=True):
    content: Any


class Reply(msgspec.Struct, tag=True, frozen=True):
    content: Any


class Refusal(msgspec.Struct, tag=True, frozen=True):
    reason: str


_requests = msgspec.json.Decoder(
    Create
    | Delete
    | Register
    | PowerOn
    | Restart
    | PowerOff
    | Prepare
    | Migrate
    | Cancel
    | Abandon
    | Status
    | Owner
    | Break
    | Continue
)
_answers = msgspec.json.Decoder(Notice | Reply | Refusal)

# A handler gets the request and a function for notices, and returns the reply's content.
Notify = Callable[[Any], None]
Handler = Callable[[Any, Notify], Any]


# ---------------------------------------------------------------- certificates


def issue_certificates(folder: Path, names: dict[str, list[str]]) -> None:
    """A new authority, and for each name a certificate for its addresses: <folder>/ca.pem, <name>.crt, <name>.pem.

    The last one has the key, too.
    """
    import trustme

    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, addresses in names.items():
        certificate = authority.issue_cert(*addresses, common_name=name)
        path = folder / f"{name}.pem"
        path.touch(mode=0o600)
        certificate.private_key_and_cert_chain_pem.write_to_path(path)
        certificate.cert_chain_pems[0].write_to_path(folder / f"{name}.crt")


def tls_context(folder: Path, name: str, server: bool) -> ssl.SSLContext:
    """TLS 1.3 as `name`; the peer must have a certificate of the run's authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(folder / "ca.pem")
    context.load_cert_chain(folder / f"{name}.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _bound_silence(sock: ssl.SSLSocket) -> None:
    """A peer that takes nothing for so long, or whose machine is gone, ends the connection (tcp(7)): nobody blocks."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_UNHEARD_TIMEOUT_S * 1000))


def common_name(sock: ssl.SSLSocket) -> str:
    """Whom the peer's certificate names."""
    subject: Any = (sock.getpeercert() or {}).get("subject", ())
    return next((value for part in subject for key, value in part if key == "commonName"), "")


# ---------------------------------------------------------------- the agent's side


class ControlServer(socketserver.ThreadingTCPServer):
    """Serves the control API on one address; each connection has a thread, each request its handler."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, ip: str, context: ssl.SSLContext, handler: Handler, log: Callable[[str], None]) -> None:
        self.context, self.handler, self.log = context, handler, log
        super().__init__((ip, PORT), _Connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.log(f"control connection of {client_address}: {traceback.format_exc()}")


class _Connection(socketserver.BaseRequestHandler):
    server: ControlServer

    def handle(self) -> None:
        self.request.settimeout(_HANDSHAKE_TIMEOUT_S)
        try:
            with self.server.context.wrap_socket(self.request, server_side=True) as sock:
                caller = common_name(sock)
                if caller != MANAGER:
                    self.server.log(f"{self.client_address}: {caller!r} may not give orders")
                    return
                sock.settimeout(None)  # a manager may be silent for as long as it likes
                _bound_silence(sock)
                with sock.makefile("rb") as lines:
                    while line := lines.readline(_MAX_LINE_BYTES):
                        if not line.endswith(b"\n"):  # its end is not a request of its own
                            self._say(sock, Refusal(f"a request has at most {_MAX_LINE_BYTES} bytes"))
                            return
                        self._say(sock, self._answer(sock, line))
        except (OSError, EOFError) as error:  # a refused certificate, a caller that went away
            self.server.log(f"{self.client_address}: {error}")

    def _answer(self, sock: ssl.SSLSocket, line: bytes) -> Reply | Refusal:
        def notify(content: Any) -> None:
            try:
                self._say(sock, Notice(content))
            except OSError as error:  # what was begun goes on without its audience
                self.server.log(f"{self.client_address}: gone, not told {content}: {error}")

        try:
            return Reply(self.server.handler(_requests.decode(line), notify))
        except (TestbedError, ValueError, RecursionError) as error:  # the latter two: no request at all
            return Refusal(str(error))
        except Exception as error:  # a bug in the agent is told to the caller, and its trace kept
            self.server.log(traceback.format_exc())
            return Refusal(f"internal error: {error!r}; see the agent's log")

    @staticmethod
    def _say(sock: ssl.SSLSocket, answer: msgspec.Struct) -> None:
        sock.sendall(msgspec.json.encode(answer) + b"\n")


# ---------------------------------------------------------------- the manager's side


class AgentClient:
    """A connection to one host's agent."""

    def __init__(self, host: str, ip: str, certificates: Path, answer_within_s: float = ANSWER_WITHIN_S) -> None:
        self.host, self._answer_within_s = host, answer_within_s
        context = tls_context(certificates, MANAGER, server=False)
        try:
            plain = socket.create_connection((ip, PORT), min(answer_within_s, _HANDSHAKE_TIMEOUT_S))
            self._socket = context.wrap_socket(plain, server_hostname=ip)
        except OSError as error:
            raise AgentGone(f"host {host}: its agent at {ip} cannot be reached: {error}") from error
        self._lines = self._socket.makefile("rb")
        self.broken = False

    def call(self, request: Request, notice: Callable[[Any], None] = lambda content: None) -> Any:
        """Send a request and return its reply; ControlError if it is refused, AgentGone if the agent is gone.

        A call that ends otherwise than by an answer leaves the connection `broken`: what comes next is not ours.
        """
        self.broken = True
        try:
            self._socket.settimeout(min(self._answer_within_s, request.answer_within_s))
            self._socket.sendall(msgspec.json.encode(request) + b"\n")
            while line := self._lines.readline():
                match _answers.decode(line):
                    case Notice(content=content):
                        notice(content)
                    case Reply(content=content):
                        self.broken = False
                        return content
                    case Refusal(reason=reason):
                        self.broken = False
                        raise ControlError(f"host {self.host}: {reason}")
        except (OSError, msgspec.MsgspecError) as error:
            raise AgentGone(f"host {self.host}: its agent is gone ({error})") from error
        raise AgentGone(f"host {self.host}: its agent is gone")

    def is_open(self) -> bool:
        """Whether an idle connection is still there: its agent may have been restarted meanwhile."""
        self._socket.settimeout(0)
        try:
            self._socket.recv(1)  # the end, or a word that nobody asked for
        except ssl.SSLWantReadError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
