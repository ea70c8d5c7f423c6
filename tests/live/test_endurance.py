"""Nothing wears out: the endurance experiment, short (with --long: two hundred moves)."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_moves_back_and_forth_leave_nothing_behind(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    moves = "200" if pytestconfig.getoption("--long") else "14"
    words = [sys.executable, "-m", "experiments.endurance", "--migrations", moves, "--out", str(tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
