"""What a client does against a VM for a whole run: four probes, each a process of its own in the client's namespace.

python -m experiments.probes KIND --target IP --out FILE.json [--seed N]

ping          ICMP echo every 10 ms; the VM's kernel answers
udp           a numbered datagram every millisecond to the echo service
transactions  one TCP connection to the transaction server: one transfer after the other, audited at the end
bulk          one TCP connection that reads the bulk stream and verifies every byte
steadfast     transactions over as many connections as it takes, for a VM that may be started again

with Probes(c1.popen, "10.0.0.11", folder, seed) as probes:    # all four have had their first answer
    ...                                                        # the migration
    results = probes.stop()
"""

import argparse
import signal
import sys
import time
from pathlib import Path
from types import TracebackType

import msgspec

from experiments import echo, streams
from experiments.children import READY, Child, Popen, Stop, wait_until_up
from topologies.errors import TestbedError

READY_TIMEOUT_S = 10.0  # a probe starts in 0.3 s; the rest is for ARP and SYN retransmissions
STOP_TIMEOUT_S = streams.ANSWER_TIMEOUT_S + 30.0  # the outstanding answer, then the audit
KINDS = ("ping", "udp", "transactions", "bulk")
STEADFAST = "steadfast"
_ROOT = Path(__file__).resolve().parent.parent


class Results(msgspec.Struct, frozen=True):
    """What the probes of one client saw."""

    ping: echo.EchoResult
    udp: echo.EchoResult
    transactions: streams.TransactionsResult
    bulk: streams.BulkResult


class Probes:
    """All four probes for the length of the block, in the namespace where `popen` starts programs.

    TestbedError if one of them cannot begin, or fails; whatever happens, none outlives the block.
    """

    def __init__(
        self, popen: Popen, target_ip: str, folder: Path, seed: int, interval_ms: float = streams.INTERVAL_MS
    ) -> None:
        self._popen = popen
        self._target_ip = target_ip
        self._folder = folder.resolve()
        self._seed, self._interval_ms = seed, interval_ms
        self._children: list[Child] = []

    def __enter__(self) -> "Probes":
        self._folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + READY_TIMEOUT_S
        try:
            for kind in KINDS:
                words = [sys.executable, "-m", "experiments.probes", kind, "--target", self._target_ip]
                words += ["--out", str(self._file(kind)), "--seed", str(self._seed)]
                words += ["--interval-ms", str(self._interval_ms)]
                log = self._folder / f"{kind}.log"
                self._children.append(Child(f"the {kind} probe", self._popen, words, log, cwd=_ROOT))
            wait_until_up(self._children, READY, deadline)
        except BaseException:
            self._kill()
            raise
        return self

    def stop(self) -> Results:
        """End the probes and return what they saw."""
        for child in self._children:
            child.finish(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for child in self._children:
            child.wait(deadline)
        raw = {kind: msgspec.Raw(self._file(kind).read_bytes()) for kind in KINDS}
        return msgspec.json.decode(msgspec.json.encode(raw), type=Results)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()

    def _kill(self) -> None:
        for child in self._children:
            child.kill()

    def _file(self, kind: str) -> Path:
        return self._folder / f"{kind}.json"


def main() -> int:
    """One probe; the exit status says whether there is a result."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.probes", description="One probe of a VM, until SIGTERM."
    )
    parser.add_argument("kind", choices=(*KINDS, STEADFAST))
    parser.add_argument("--target", required=True, metavar="IP")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")
    parser.add_argument("--seed", type=int, default=1, help="of the transactions; each client of a VM needs its own")
    parser.add_argument("--interval-ms", type=float, default=streams.INTERVAL_MS, help="between two transactions")
    parser.add_argument("--patience-s", type=float, default=streams.ANSWER_TIMEOUT_S, help="steadfast: for an answer")
    options = parser.parse_args()
    stop = Stop()
    try:
        result = _probe(options, stop)
        unfinished = options.out.with_suffix(".tmp")
        unfinished.write_bytes(msgspec.json.encode(result))
        unfinished.replace(options.out)
    except (OSError, TestbedError) as error:
        print(f"{options.kind} probe of {options.target}: {error}", file=sys.stderr)
        return 1
    return 0


def _probe(options: argparse.Namespace, stop: Stop) -> msgspec.Struct:
    target = options.target
    match options.kind:
        case "ping":
            return echo.ping(target, stop)
        case "udp":
            return echo.udp(target, stop)
        case "transactions":
            return streams.transactions(target, options.seed, stop, options.interval_ms)
        case "bulk":
            return streams.bulk(target, stop)
        case _:
            return streams.steadfast(target, options.seed, stop, options.interval_ms, options.patience_s)


if __name__ == "__main__":
    sys.exit(main())
