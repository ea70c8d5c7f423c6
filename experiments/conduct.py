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

from experiments import report
from experiments.preflight import check_kernel, check_machine
from experiments.run import Options, Run
from experiments.verdict import Findings
from experiments.world import leftovers, run_inside
from topologies.errors import TestbedError

Experiment = Callable[[Run], Findings]


def conduct(name: str, experiment: Experiment, options: Options) -> int:
    """Run an experiment in a world of its own and return the exit status of the program."""
    check_machine(options.plan)
    return run_inside(lambda: _inside(name, experiment, options))


def _inside(name: str, experiment: Experiment, options: Options) -> int:
    try:
        check_kernel(options.plan)
        run = Run(name, options)
    except TestbedError as error:
        print(f"vmotion: {error}", file=sys.stderr)
        return error.exit_status
    before = leftovers()  # namespaces of the machine itself, which a world's copy of its mounts shows
    summary: dict[str, Any] = {"schema": 1, "experiment": name, "verdict": "fail", "checks": {}}
    status = 1
    try:
        findings = experiment(run)
    except TestbedError as error:
        summary["error"] = str(error)
        status = error.exit_status
    except (KeyboardInterrupt, SystemExit) as stop:
        summary["error"] = "interrupted; everything is taken down"
        status = 128 + signal.SIGINT if isinstance(stop, KeyboardInterrupt) else int(stop.code or 1)
    except Exception as error:  # a bug of ours: told in full in the logs, in one line to the person
        summary["error"] = f"internal error: {error!r}; see {run.logs}/traceback.log"
        (run.logs / "traceback.log").write_text(traceback.format_exc())
    else:
        left = sorted(leftovers() - before)
        summary["checks"] = findings.checks | {"nothing_left_behind": not left}
        summary |= findings.sections
        summary["wall_s"] = run.wall_s()
        if left:
            summary["left_behind"] = left
        if all(summary["checks"].values()):
            summary["verdict"], status = "pass", 0
    finally:
        run.write_summary(summary)
    if "error" in summary:
        print(f"vmotion: {summary['error']}", file=sys.stderr)
        print(f"results  {run.folder}", file=sys.stderr)
    else:
        if "migration" in summary:
            report.table(summary)
        report.conclusion(summary, run.folder)
    return status
