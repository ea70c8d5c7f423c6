"""The whole test suite, in a world of its own: unit tests and live ones. Arguments go to pytest."""

import sys
from pathlib import Path

from experiments.preflight import check_machine, check_nfs
from experiments.world import run_inside
from topologies.plan import read_plan

_ROOT = Path(__file__).parent.parent


def main(arguments: list[str]) -> int:
    import pytest

    check_machine(read_plan())
    check_nfs()
    sys.stdout.flush()
    chosen = arguments if any(not word.startswith("-") for word in arguments) else [*arguments, str(_ROOT / "tests")]
    return run_inside(lambda: int(pytest.main(["--rootdir", str(_ROOT), *chosen])))
