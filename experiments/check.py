"""`./vmotion check`: format, lint, types, import contracts and unit tests. Needs no root.

Every step runs, whatever became of those before it. A step's output is shown if it failed;
otherwise its last line is enough.
"""

import subprocess
import sys
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_TOOLS = Path(sys.executable).parent

STEPS = {
    "format": ["ruff", "format", "--check"],
    "lint": ["ruff", "check"],
    "types": ["mypy"],
    "imports": ["lint-imports"],
    "unit tests": ["pytest", "-q", "tests/unit"],
}


def main() -> int:
    """0 if every step passed, else 1."""
    failed = [name for name, command in STEPS.items() if not _passes(name, command)]
    if failed:
        print(f"check failed: {', '.join(failed)}")
    return 1 if failed else 0


def _passes(name: str, command: list[str]) -> bool:
    program, *words = command
    started = time.monotonic()
    done = subprocess.run(
        [_TOOLS / program, *words],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    verdict = f"FAILED\n{done.stdout}" if done.returncode else f"ok  {done.stdout.rstrip().rpartition(chr(10))[2]}"
    print(f"{name:<10}  {time.monotonic() - started:5.1f} s  {verdict}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
