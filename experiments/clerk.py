"""A client that makes transactions all the time, whatever happens to the VM, and audits the ledger at the end.

    with Clerk(testbed, "vm1", "before") as clerk:
        ...                                             # migrations, crashes, restarts
        seen = clerk.audit()

It repeats what was not acknowledged, over a new connection if it has to; `connections` says how many it took.
"""

from experiments.one_probe import OneProbe
from experiments.probes import STEADFAST
from experiments.streams import ANSWER_TIMEOUT_S, INTERVAL_MS, TransactionsResult
from experiments.testbed import Testbed


class Clerk(OneProbe[TransactionsResult]):
    """`patience_s`: a connection without an answer for so long is given up for a new one."""

    def __init__(
        self,
        testbed: Testbed,
        vm: str,
        name: str,
        patience_s: float = ANSWER_TIMEOUT_S,
        interval_ms: float = INTERVAL_MS,
    ) -> None:
        options = ("--patience-s", str(patience_s), "--interval-ms", str(interval_ms))
        super().__init__(testbed, vm, STEADFAST, name, TransactionsResult, *options)

    def audit(self) -> TransactionsResult:
        return self.stop()
