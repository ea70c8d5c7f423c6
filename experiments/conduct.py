"""Conducts an experiment: checks the machine, makes the run and its world, judges, and leaves nothing behind.

An experiment is a module of this package with a function

    def run(run: Run) -> Findings

It is called inside the run's world; the exit status is 0 if and only if every check of its Findings is true.
"""

import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from experiments import faucet, report
from experiments.preflight import check_kernel, check_machine, check_nfs
from experiments.run import Options, Run
from experiments.verdict import Findings
from experiments.world import leftovers, run_inside
from topologies.errors import TestbedError

Experiment = Callable[[Run], Findings]
_INTERRUPTED = "interrupted; everything is taken down"


def conduct(name: str, experiment: Experiment, options: Options) -> int:
    """Run an experiment in a world of its own and return the exit status of the program."""
    check_machine(options.plan)
    if options.datastore == "nfs":
        check_nfs()
    if options.controller == "faucet":
        faucet.install()
    return run_inside(lambda: _inside(name, experiment, options))


def _inside(name: str, experiment: Experiment, options: Options) -> int:
    try:
        check_kernel(options.plan)
        return _judged(Run(name, options), experiment)
    except TestbedError as error:
        print(f"vmotion: {error}", file=sys.stderr)
        return error.exit_status
    except (KeyboardInterrupt, SystemExit) as stop:
        print(f"vmotion: {_INTERRUPTED}", file=sys.stderr)
        return 128 + signal.SIGINT if isinstance(stop, KeyboardInterrupt) else int(stop.code or 1)


def _judged(run: Run, experiment: Experiment) -> int:
    """Whatever happens, there is a summary.json in the end, and it says what happened."""
    summary: dict[str, Any] = {"schema": 1, "experiment": run.experiment, "verdict": "fail", "checks": {}}
    summary["error"] = _INTERRUPTED  # until it is known to be something else
    try:
        before = leftovers()  # namespaces of the machine itself, which a world's copy of its mounts shows
        findings = experiment(run)
        left = sorted(leftovers() - before)
        summary["checks"] = findings.checks | {"nothing_left_behind": not left}
        summary |= findings.sections | {"wall_s": run.wall_s()} | ({"left_behind": left} if left else {})
        if all(summary["checks"].values()):
            summary["verdict"] = "pass"
        del summary["error"]
        if findings.error:
            summary["error"] = findings.error
    except TestbedError as error:
        summary["error"] = str(error)
        raise
    except Exception as error:  # a bug of ours: told in full in the logs, in one line to the person
        (run.logs / "traceback.log").write_text(traceback.format_exc())
        summary["error"] = f"internal error: {error!r}; see {run.logs}/traceback.log"
        raise TestbedError(summary["error"]) from error
    finally:
        run.write_summary(summary)
        if not summary["checks"]:
            print(f"results  {run.folder}", file=sys.stderr)
    if "migration" in summary:
        report.table(summary)
    elif "failed_migration" in summary:
        report.failure(summary)
    report.conclusion(summary, run.folder)
    if "error" in summary:
        print(f"vmotion: {summary['error']}", file=sys.stderr)
    return 0 if summary["verdict"] == "pass" else 1
