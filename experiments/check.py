"""`./vmotion check`: format, lint, types, import contracts and unit tests. Needs no root.

Every step runs, whatever became of those before it. A step's output is shown if it failed;
otherwise its last line is enough.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_TOOLS = Path(sys.executable).parent


def main() -> int:
    """0 if every step passed, else 1."""
    with tempfile.TemporaryDirectory(prefix="vmotion-check-") as temporary:
        # Each user has caches of their own: these tools fail on files that root left there.
        cache = f".check-{os.getuid()}_cache" if os.access(_ROOT, os.W_OK) else temporary
        steps = {
            "format": ["ruff", "format", "--check", f"--cache-dir={cache}/ruff"],
            "lint": ["ruff", "check", f"--cache-dir={cache}/ruff"],
            "types": ["mypy", f"--cache-dir={cache}/mypy"],
            "imports": ["lint-imports", f"--cache-dir={cache}/imports"],
            "unit tests": ["pytest", "-q", "-o", f"cache_dir={cache}/pytest", "tests/unit"],
        }
        failed = [name for name, command in steps.items() if not _passes(name, command)]
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
    output = done.stdout.rstrip()
    verdict = f"FAILED\n{output}" if done.returncode else f"ok  {output.rpartition(chr(10))[2]}"
    print(f"{name:<10}  {time.monotonic() - started:5.1f} s  {verdict}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
