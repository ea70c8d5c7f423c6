"""The SDN controller is away for a while: it dies, or a switch does not reach it."""

import time

from experiments.testbed import Testbed
from experiments.waiting import until
from experiments.world import run as in_the_world
from topologies.events import Event, find, read_events

_NOBODY = "tcp:127.0.0.1:1"
_WITHIN_S = 15.0


class Outage:
    """For the length of a block; afterwards `back_ns` says when there was a controller again.

    The controller is killed, and another one begins; or of one `switch` the management cable is pulled, as it were: it
    asks where nobody listens, its other settings stay. At the end of the block every switch has been taken on again.
    """

    def __init__(self, testbed: Testbed, switch: str = "") -> None:
        self._testbed, self._switch = testbed, switch
        self._told, self._address = 0, ""
        self.back_ns = 0

    def __enter__(self) -> "Outage":
        self._told = self._connections()
        if self._switch:
            self._address = in_the_world("ovs-vsctl", "get-controller", self._switch).strip()
            self._ask_at(_NOBODY)
        else:
            self._testbed.kill_controller()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # the testbed is taken down, and the block's own error is the one to be told
            return
        self.back_ns = time.monotonic_ns()
        if self._switch:
            self._ask_at(self._address)
        else:
            self._testbed.start_controller()
            self.back_ns = find(self._events(), "controller.listening")[-1]["t"]
        missing = 1 if self._switch else len(self._testbed.run.plan.switches)
        until(lambda: self._connections() >= self._told + missing, "the switches are back", _WITHIN_S)

    def _ask_at(self, address: str) -> None:
        in_the_world("ovs-vsctl", "set", "controller", self._switch, f'target="{address}"')

    def _connections(self) -> int:
        return len(find(self._events(), "switch.connected"))

    def _events(self) -> list[Event]:
        return read_events(self._testbed.run.events_file)
