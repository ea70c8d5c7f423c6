"""One probe of one client (experiments/probes.py) for the length of a block.

with OneProbe(testbed, "vm1", "udp", "first-move", EchoResult) as probe:    # it has had its first answer
    ...                                                                    # the migration
    seen = probe.stop()
"""

import signal
import sys
import time
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from experiments.children import READY, Child, wait_until_up
from experiments.testbed import Testbed

_ROOT = Path(__file__).parent.parent
_READY_WITHIN_S, _ENDED_WITHIN_S = 15.0, 90.0

T = TypeVar("T")


class OneProbe(Generic[T]):
    """`name` is of its files in <run>/probes; `result`: the type of what it has seen."""

    def __init__(self, testbed: Testbed, vm: str, kind: str, name: str, result: type[T], *options: str) -> None:
        self._result, self._kind = result, kind
        self._out = testbed.run.folder / "probes" / f"{name.replace(':', '.')}.json"
        self._out.parent.mkdir(exist_ok=True)
        plan = testbed.run.plan
        words = ["-m", "experiments.probes", kind, "--target", str(plan.vm(vm).interface.ip)]
        words += ["--out", str(self._out), "--seed", str(time.monotonic_ns() % 2**31), *options]
        popen, log = testbed.popen(plan.clients[0].name), self._out.with_suffix(".log")
        self._child = Child(f"the {kind} probe", popen, [sys.executable, *words], log, _ROOT)

    def __enter__(self) -> Any:
        try:
            wait_until_up([self._child], READY, time.monotonic() + _READY_WITHIN_S)
        except BaseException:
            self._child.kill()
            raise
        return self

    def stop(self) -> T:
        """Its last word: it stops, once what is open is answered."""
        self._child.finish(signal.SIGTERM)
        self._child.wait(time.monotonic() + _ENDED_WITHIN_S)
        return msgspec.json.decode(self._out.read_bytes(), type=self._result)

    def __exit__(self, *_: object) -> None:
        self._child.kill()
