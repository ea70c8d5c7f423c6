"""What the SDN controller of a run knows: its JSON API (controller/api.py), through the socket in the run's folder.

ask(run.folder, "locations")                 inside the run's world or outside
./vmotion locations | moves | flows          of the newest run that is under way
"""

import http.client
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.run import RESULTS
from experiments.testbed import API_SOCKET
from topologies.errors import UsageError

_ANSWER_WITHIN_S = 10.0
_WIDTH = 140  # of a table, whatever the terminal: it is for grep, too


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket. A socket's name has 108 bytes (unix(7)) and a path may have more."""

    def __init__(self, folder: Path) -> None:
        super().__init__("localhost", timeout=_ANSWER_WITHIN_S)
        self._folder = folder

    def connect(self) -> None:
        folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY)
        try:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(_ANSWER_WITHIN_S)
            self.sock.connect(f"/proc/self/fd/{folder}/{API_SOCKET}")
        finally:
            os.close(folder)


def ask(folder: Path, what: str) -> Any:
    """The answer to GET /<what>; UsageError if there is none."""
    connection = _Connection(folder)
    try:
        connection.request("GET", f"/{what}")
        answer = connection.getresponse()
        said = json.loads(answer.read())
    except FileNotFoundError as error:
        raise UsageError(f"no controller is at work in {folder}; start an experiment and ask while it runs") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UsageError(f"the controller of {folder} does not answer: {error}") from error
    finally:
        connection.close()
    if answer.status != http.HTTPStatus.OK:
        raise UsageError(f"the controller of {folder} says: {said.get('error', said)}")
    return said


# ---------------------------------------------------------------- for people


def show(what: str, as_json: bool) -> int:
    """The newest run's; as a table, or as it came."""
    said = ask((RESULTS / "latest").resolve(), what)
    if as_json:
        print(json.dumps(said, indent=2))
    else:
        Console(width=_WIDTH, soft_wrap=True).print(_TABLES[what](said))
    return 0


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _locations(said: Any) -> Table:
    table = _table("MAC", "port", "behind it", "role", "held for")
    for place in said:
        held = place["held_for"]["name"] if place["held_for"] else ""
        table.add_row(place["mac"], place["name"], place["node"], place["role"], held)
    return table


def _moves(said: Any) -> Table:
    table = _table("MAC", "from", "to", "cause", "announced", "confirmed after")
    for move in said:
        came, done = move["packet_in"], move.get("barrier")
        places = move["from_name"], move["to_name"]
        took = f"{(done - came) / 1e6:.2f} ms" if done else "not yet"
        table.add_row(move["mac"], *places, move["cause"], "yes" if move["announced"] else "no", took)
    return table


def _flows(said: Any) -> Table:
    table = _table("switch", "table", "priority", "match", "output", "next table", "packets")
    for switch, flows in said.items():
        for flow in flows:
            match = " ".join(f"{field}={_value(field, value)}" for field, value in flow["match"].items()) or "any"
            output, goto = ", ".join(map(str, flow["output"])), "" if flow["goto"] is None else str(flow["goto"])
            if not output and not goto:
                output = "dropped"
            row = (switch, str(flow["table"]), str(flow["priority"]), match, output, goto, str(flow["packets"]))
            table.add_row(*row)
    return table


def _value(field: str, value: Any) -> str:
    return f"{value:#06x}" if field == "eth_type" else str(value)


_TABLES: dict[str, Callable[[Any], Table]] = {"locations": _locations, "moves": _moves, "flows": _flows}
VIEWS = tuple(_TABLES)
