"""The controller process.

    python -m controller --plan PLAN --manager CERTIFICATE --port 6653 --events events.jsonl

Without a plan it guards nothing: whatever MAC shows up is believed, as in any learning switch.
"""

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from controller.api import Api
from controller.app import Mobility
from controller.guard import Policy
from controller.intents import IntentError, Verifier
from controller.learning_switch import LearningSwitch
from controller.policy import policy_of
from controller.sdn_backend import listen, listen_at, serve_http, start
from topologies.errors import UsageError
from topologies.events import EventLog
from topologies.plan import read_plan

APPLICATIONS = ("mobility", "learning-switch")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)  # one line, without argparse's usage text


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m controller", description="The SDN controller (OpenFlow 1.3).")
    parser.add_argument("--application", default="mobility", choices=APPLICATIONS, help="default %(default)s")
    parser.add_argument("--plan", metavar="FILE", help="what is behind which port: then MACs are guarded")
    parser.add_argument("--manager", metavar="FILE", help="the manager's certificate: what it signs is believed")
    parser.add_argument("--listen", default="127.0.0.1", metavar="ADDRESS", help="default %(default)s")
    parser.add_argument("--port", default=6653, type=int, help="TCP port, default %(default)s; 0 for any free one")
    parser.add_argument("--api-port", type=int, help="serve the JSON API on 127.0.0.1; default: not")
    parser.add_argument("--api-socket", metavar="PATH", help="serve it there, too")
    parser.add_argument("--events", default=os.devnull, metavar="PATH", help="append events here; default: none")
    parser.add_argument("--log-level", default="warning", choices=["debug", "info", "warning", "error"])
    options = parser.parse_args(words)
    for option in ("port", "api_port"):
        number = getattr(options, option)
        if number is not None and not 0 <= number <= 65535:
            name = option.replace("_", "-")
            raise UsageError(f"argument --{name}: {number} is no TCP port; choose one of 0 to 65535")
    return options


def _run(words: Sequence[str] | None) -> None:
    options = _parse(words)
    logging.basicConfig(level=options.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    stopped = _stop_signals()
    policy = policy_of(read_plan(options.plan)) if options.plan else Policy()
    verifier = _verifier(options.manager) if options.manager else None
    try:
        event_log = EventLog(options.events, "controller")
    except OSError as error:
        raise UsageError(f"cannot write to {options.events}: {error.strerror}; choose another --events") from error
    listener = _listen(options.listen, options.port, "--listen or --port")
    told: dict[str, Any] = {}
    if options.application == "mobility":
        application = start(listener, Mobility, event_log, policy)
        api = Api(application, verifier)
        if options.api_port is not None:
            socket_ = _listen("127.0.0.1", options.api_port, "--api-port")
            serve_http(socket_, api)
            told["api_port"] = socket_.getsockname()[1]
        if options.api_socket is not None:
            serve_http(_listen_at(Path(options.api_socket)), api)
    else:
        start(listener, LearningSwitch, event_log)
    address, port = listener.getsockname()[:2]
    event_log.emit("controller.listening", address=address, port=port, **told)
    stopped.recv(1)


def _listen(address: str, port: int, options: str) -> Any:
    try:
        return listen(address, port)
    except OSError as error:
        where = f"{address} port {port}"
        raise UsageError(f"cannot listen on {where}: {error.strerror}; choose another {options}") from error


def _listen_at(path: Path) -> Any:
    """A Unix socket that only its owner may use."""
    mask = os.umask(0o177)
    try:
        return listen_at(path)
    except OSError as error:
        raise UsageError(f"cannot listen at {path}: {error.strerror}; choose another --api-socket") from error
    finally:
        os.umask(mask)


def _verifier(path: str) -> Verifier:
    try:
        return Verifier(Path(path).read_bytes())
    except (OSError, ValueError, IntentError) as error:
        raise UsageError(f"argument --manager: {path} is no certificate that can be read: {error}") from error


def _stop_signals() -> socket.socket:
    """A socket that becomes readable at SIGTERM or SIGINT.

    An exception raised by a handler would end whichever greenlet happens to run, and only that one.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    return reader


def main(words: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    try:
        _run(words)
    except UsageError as error:
        print(f"controller: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
