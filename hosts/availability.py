"""High availability: the VMs of a host that has died are started again on another one, as vSphere HA does.

    with Availability(vcenter):
        ...

1.  Every host is asked for its status, again and again. One that has not answered for SUSPECT_AFTER_S is suspected.
2.  Another host is told to restart each of its VMs. It does so only once the VM's lease has run out, by its own watch
    (hosts/ownership.py), so it does no harm to suspect a host that lives: its VMs' pulses go on, and that is that.
3.  A VM that was refused is tried again, on the next host, as long as its own does not answer.

A host that cannot reach its storage stops its VMs by itself, before anybody else may have them. Off unless asked for.
"""

import threading
import time
from collections import Counter

from hosts import control
from hosts.control import AgentClient, ControlError
from hosts.vcenter import VCenter
from topologies.errors import TestbedError

ASK_EVERY_S = 0.5
SUSPECT_AFTER_S = 1.5
_ANSWER_WITHIN_S = 1.0


class Availability:
    """For the length of a block; a thread for each host, which asks it, and one for each VM that is being restarted."""

    def __init__(self, vcenter: VCenter) -> None:
        self._vcenter, self._events = vcenter, vcenter.events
        self._closed = threading.Event()
        self._lock = threading.Lock()  # of the two below
        self._restarting: set[str] = set()
        self._refusals: Counter[str] = Counter()  # of each VM: after each it is the next host's turn
        self._heard_s = {host.name: time.monotonic() for host in vcenter.plan.hosts}
        self._threads = [
            threading.Thread(target=self._watch, args=(host.name,), name=f"ha-{host.name}", daemon=True)
            for host in vcenter.plan.hosts
        ]

    def __enter__(self) -> "Availability":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing more is restarted; a restart that has begun ends as it ends."""
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def suspects(self, host: str) -> bool:
        return time.monotonic() - self._heard_s[host] > SUSPECT_AFTER_S

    def _watch(self, host: str) -> None:
        client: AgentClient | None = None
        suspected = False
        while not self._closed.wait(ASK_EVERY_S):
            try:
                client = client or self._vcenter.client(host, _ANSWER_WITHIN_S)
                client.call(control.Status())
                self._heard_s[host] = time.monotonic()
            except ControlError:
                if client is not None:
                    client.close()
                client = None
            if self.suspects(host) != suspected:
                suspected = not suspected
                self._events.emit("ha.suspected" if suspected else "ha.back", host=host)
            if suspected:
                self._rescue_from(host)
        if client is not None:
            client.close()

    def _rescue_from(self, host: str) -> None:
        others = [name for name in self._heard_s if name != host and not self.suspects(name)]
        if not others:
            return
        for vm in [vm for vm, place in list(self._vcenter.places.items()) if place == host]:
            with self._lock:
                if vm in self._restarting:
                    continue
                self._restarting.add(vm)
                there = others[self._refusals[vm] % len(others)]
            threading.Thread(target=self._restart, args=(vm, host, there), name=f"ha-{vm}", daemon=True).start()

    def _restart(self, vm: str, dead: str, there: str) -> None:
        refused: TestbedError | None = None
        try:
            reply = self._vcenter.restart(vm, there)
            self._events.emit("ha.restarted", vm=vm, host=there, instead_of=dead, generation=reply["generation"])
        except TestbedError as error:  # it may have been unregistered meanwhile, too
            refused = error
        finally:
            with self._lock:
                self._restarting.discard(vm)
                self._refusals[vm] += refused is not None
        if refused is not None:  # the next host is not kept waiting for one that is silent
            said = self._vcenter.find(vm)  # it may have left its host before that died
            self._events.emit("ha.refused", vm=vm, host=there, reason=f"{refused}; {said}")
