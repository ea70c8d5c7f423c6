"""What the controller knows, as JSON over HTTP on 127.0.0.1; and the one thing that can be told to it.

    GET  /locations   each MAC, its place, and since when it is held
    GET  /moves       the last moves, the newest first
    GET  /flows       each switch's entries, by its name in the plan, asked from the switch itself
    GET  /guard       VMs' MACs, intents, alarms
    GET  /network     switches, their ports, trunks, the tree of the floods
    POST /intents     the manager's word (controller/intents.py), its signature in the header X-Signature

A WSGI application (PEP 3333), which the framework's own server serves.
"""

import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

import msgspec

from controller.app import Mobility
from controller.intents import MAX_BODY_BYTES, IntentError, Verifier
from controller.network import Port
from controller.openflow import Flow, FlowStats
from controller.switches import SwitchGone

_StartResponse = Callable[[str, list[tuple[str, str]]], Any]


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Api:
    """Reads the application's state; changes nothing but by `intents`."""

    def __init__(self, mobility: Mobility, verifier: Verifier | None) -> None:
        self._mobility, self._verifier = mobility, verifier
        self._answers: dict[tuple[str, str], Callable[[dict[str, Any]], Any]] = {
            ("GET", "/locations"): self._locations,
            ("GET", "/moves"): self._moves,
            ("GET", "/flows"): self._flows,
            ("GET", "/guard"): self._guard,
            ("GET", "/network"): self._network,
            ("POST", "/intents"): self._intents,
        }

    def __call__(self, environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
        status, said = HTTPStatus.OK, None
        try:
            method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
            answer = self._answers.get((method, path))
            if answer is None:
                there = any(path == known for _, known in self._answers)
                missing = HTTPStatus.METHOD_NOT_ALLOWED if there else HTTPStatus.NOT_FOUND
                known = ", ".join(f"{method} {path}" for method, path in self._answers)
                raise _Refused(missing, f"there is no {method} {path}; there are {known}")
            said = answer(environ)
        except _Refused as error:
            status, said = error.status, {"error": str(error)}
        body = msgspec.json.format(msgspec.json.encode(said), indent=2) + b"\n"
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        start_response(f"{status.value} {status.phrase}", headers)
        return [body]

    def _locations(self, _environ: dict[str, Any]) -> Any:
        held = self._mobility.locations.held()
        return [
            {"mac": mac, **self._place(at), "held_for": self._place(held[mac].new) if mac in held else None}
            for mac, at in sorted(self._mobility.locations.all().items())
        ]

    def _moves(self, _environ: dict[str, Any]) -> Any:
        return [
            move
            | {"from_name": self._place(Port(move["from_switch"], move["from"]))["name"]}
            | {"to_name": self._place(Port(move["switch"], move["to"]))["name"]}
            for move in reversed(self._mobility.moves)
        ]

    def _flows(self, _environ: dict[str, Any]) -> Any:
        said: dict[str, list[dict[str, Any]]] = {}
        for name, switch in sorted(self._mobility.switches.items()):
            try:
                stats = switch.dump()
            except SwitchGone as error:
                raise _Refused(HTTPStatus.GATEWAY_TIMEOUT, f"switch {name} does not answer") from error
            entries = [_entry(entry, entry.flow) for entry in stats if entry.flow is not None]
            said[self._called(name)] = sorted(entries, key=lambda entry: (entry["table"], -entry["priority"]))
        return said

    def _guard(self, _environ: dict[str, Any]) -> Any:
        guard, now_s = self._mobility.guard, time.monotonic()
        intents = [
            {"mac": intent.mac, "from": intent.from_host, "to": intent.to, "ends_in_s": intent.until_s - now_s}
            for intent in guard.intents.values()
            if intent.until_s > now_s
        ]
        damped = sorted(mac for mac in guard.vms if guard.is_damped(mac, now_s))
        said = {"is_on": guard.is_on, "vms": sorted(guard.vms), "intents": intents, "damped": damped}
        counts = {"known": len(self._mobility.locations), "packet_ins": self._mobility.packet_ins}
        return said | counts | {"refused": self._mobility.alarms}

    def _network(self, _environ: dict[str, Any]) -> Any:
        network = self._mobility.network
        switches = {
            self._called(name): [self._place(port) for port in switch.cables()]
            for name, switch in self._mobility.switches.items()
        }
        return {"switches": switches, "trunks": network.trunks(), "tree": sorted(self._mobility.forwarding.tree())}

    def _intents(self, environ: dict[str, Any]) -> Any:
        if self._verifier is None:
            raise _Refused(HTTPStatus.FORBIDDEN, "this controller knows no manager")
        length = environ.get("CONTENT_LENGTH") or "0"
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an intent has {MAX_BODY_BYTES} bytes at most")
        body = environ["wsgi.input"].read(int(length))
        try:
            intent = self._verifier.read(body, environ.get("HTTP_X_SIGNATURE", ""), time.time(), time.monotonic())
            self._mobility.intend(intent)
        except IntentError as error:
            raise _Refused(HTTPStatus.FORBIDDEN, str(error)) from error
        except ValueError as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        return {"mac": intent.mac, "to": intent.to}

    def _called(self, switch: str) -> str:
        """By its name in the plan, or by its datapath id."""
        return self._mobility.guard.policy.switches.get(switch, switch)

    def _place(self, port: Port) -> dict[str, Any]:
        place, switch = self._mobility.guard.place(port), self._mobility.switches.get(port.switch)
        name = switch.ports.get(port.number, str(port.number)) if switch else str(port.number)
        return {"switch": port.switch, "port": port.number, "name": name, "role": place.role, "node": place.node}


def _entry(stats: FlowStats, flow: Flow) -> dict[str, Any]:
    match = {field: value for field, value in flow.match._asdict().items() if value is not None}
    return flow._asdict() | {"match": match, "packets": stats.packets, "age_s": stats.age_s}
