"""The OpenFlow framework: the only module that names Ryu and os-ken, its maintained fork.

SDN_BACKEND=ryu (default) or os_ken chooses one; the same application runs on both. Importing
this module patches the standard library for eventlet, hence a controller is a process of its own.
"""

import importlib
import importlib.util
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

from topologies.errors import UsageError

BACKEND = os.environ.get("SDN_BACKEND", "ryu")

if BACKEND not in ("ryu", "os_ken") or importlib.util.find_spec(BACKEND) is None:
    # At import, before any main(): the one place where a module may end the process.
    print(f"SDN_BACKEND={BACKEND} is unknown or not installed; set it to ryu or os_ken", file=sys.stderr)
    raise SystemExit(UsageError.exit_status)

# os-ken's "native" threads cannot be killed: a lost switch goes unnoticed and SIGTERM never ends them (4.2.2).
os.environ["OSKEN_HUB_TYPE"] = "eventlet"
os.environ.setdefault("EVENTLET_NO_GREENDNS", "yes")  # no name is resolved here; 0.8 s less to import


def _module(name: str) -> Any:
    return importlib.import_module(f"{BACKEND}.{name}")


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet announces its retirement at every import
    import eventlet
    import eventlet.event
    import eventlet.wsgi

    if not hasattr(eventlet.wsgi, "ALREADY_HANDLED"):
        eventlet.wsgi.ALREADY_HANDLED = []  # gone since eventlet 0.30.3, but Ryu 4.34 imports it
    # Sockets and no more: eventlet's os.write() waits in epoll first, which refuses /dev/null.
    eventlet.monkey_patch(socket=True)
    hub = _module("lib.hub")
    _app_manager = _module("base.app_manager")
    _controller = _module("controller.controller")
    _handler = _module("controller.handler")
    _OFPHandler: Any = _module("controller.ofp_handler").OFPHandler
    ofp_event = _module("controller.ofp_event")

App = _app_manager.RyuApp if BACKEND == "ryu" else _app_manager.OSKenApp
OPENFLOW_1_3 = _module("ofproto.ofproto_v1_3").OFP_VERSION
set_ev_cls = _handler.set_ev_cls
spawn, sleep = hub.spawn, hub.sleep
# A switch whose connection is silent for 9 to 12 s is taken for lost; the framework's default is never.
_CONF = _module("cfg").CONF
_CONF.set_override("echo_request_interval", 3.0)
_CONF.set_override("maximum_unreplied_echo_requests", 3)
MAIN_DISPATCHER, DEAD_DISPATCHER = _handler.MAIN_DISPATCHER, _handler.DEAD_DISPATCHER


class _Handshake(_OFPHandler):
    """The framework's half of a connection, without its own listener, whose failure nobody would see."""

    def start(self) -> None:
        App.start(self)


Reply = eventlet.event.Event  # something that another greenlet will `send`


def wait_for_reply(reply: Any, within_s: float) -> bool:
    """Whether it was sent in time."""
    with eventlet.Timeout(within_s, False):
        reply.wait()
        return True
    return False


def read_flow_stats_as(entry: type) -> None:
    """`entry.parser(data, offset)` reads an entry of a dump of flows, instead of the framework's own class."""
    _module("ofproto.ofproto_v1_3_parser").OFPFlowStatsReply.cls_stats_body_cls = entry


def serve_http(listener: Any, application: Any) -> None:
    """A WSGI application on a listening socket; returns at once."""
    hub.spawn(eventlet.wsgi.server, listener, application, log_output=False, debug=False)


def listen(host: str, port: int) -> Any:
    """A listening socket; OSError if the address is not to be had.

    Without SO_REUSEPORT, eventlet's default: two controllers on one port would share its switches by chance.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return hub.listen((host, port), family=family, reuse_port=False)


def listen_at(path: Path) -> Any:
    """A listening Unix socket. A name has 108 bytes (unix(7)) and a path may have more: it is given from its folder."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        listener.listen()
        return listener
    finally:
        os.close(folder)


def start(listener: Any, application: type, *args: Any) -> Any:
    """Instantiate and start the application and serve the switches that connect; returns it at once."""
    manager = _app_manager.AppManager.get_instance()
    apps = [manager.instantiate(_Handshake), manager.instantiate(application, *args)]
    for app in apps:
        app.start()
    hub.spawn(_serve, listener)
    return apps[-1]


def _serve(listener: Any) -> None:
    while True:
        connection, address = listener.accept()
        hub.spawn(_controller.datapath_connection_factory, connection, address)
