"""A client that makes transactions all the time, whatever happens to the VM, and audits the ledger at the end.

    with Clerk(testbed, "vm1", "before") as clerk:
        ...                                             # migrations, crashes, restarts
        seen = clerk.audit()

It repeats what was not acknowledged, over a new connection if it has to; `connections` says how many it took.
"""

import signal
import sys
import time
from pathlib import Path

import msgspec

from experiments.children import READY, Child, wait_until_up
from experiments.probes import STEADFAST
from experiments.streams import ANSWER_TIMEOUT_S, INTERVAL_MS, TransactionsResult
from experiments.testbed import Testbed

_ROOT = Path(__file__).parent.parent
_READY_WITHIN_S, _AUDITED_WITHIN_S = 15.0, 90.0


class Clerk:
    """`patience_s`: a connection without an answer for so long is given up for a new one."""

    def __init__(
        self,
        testbed: Testbed,
        vm: str,
        name: str,
        patience_s: float = ANSWER_TIMEOUT_S,
        interval_ms: float = INTERVAL_MS,
    ) -> None:
        self._out = testbed.run.folder / "probes" / f"{name.replace(':', '.')}.json"
        self._out.parent.mkdir(exist_ok=True)
        plan = testbed.run.plan
        words = ["-m", "experiments.probes", STEADFAST, "--target", str(plan.vm(vm).interface.ip)]
        words += ["--out", str(self._out), "--seed", str(time.monotonic_ns() % 2**31)]
        words += ["--patience-s", str(patience_s), "--interval-ms", str(interval_ms)]
        popen, log = testbed.popen(plan.clients[0].name), self._out.with_suffix(".log")
        self._child = Child("the client", popen, [sys.executable, *words], log, _ROOT)

    def __enter__(self) -> "Clerk":
        wait_until_up([self._child], READY, time.monotonic() + _READY_WITHIN_S)
        return self

    def audit(self) -> TransactionsResult:
        """Its last word: it stops, once what is open is acknowledged."""
        self._child.finish(signal.SIGTERM)
        self._child.wait(time.monotonic() + _AUDITED_WITHIN_S)
        return msgspec.json.decode(self._out.read_bytes(), type=TransactionsResult)

    def __exit__(self, *_: object) -> None:
        self._child.kill()
