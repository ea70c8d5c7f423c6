"""What README shows works: its experiment of one's own, its Mininet command."""

import json
import re
import subprocess
import sys
from pathlib import Path

from programs import ROOT

README = (ROOT / "README.md").read_text()


def test_the_experiment_of_ones_own_passes(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    script = tmp_path / "there_and_back.py"
    script.write_text(code)
    words = [sys.executable, str(script), "--ram", "64MiB", "--working-set", "8MiB", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        words, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, check=False
    )
    assert done.returncode == 0
    assert json.loads((tmp_path / "out/summary.json").read_text())["checks"]["ram_equal_both_times"] is True


def test_every_module_is_in_the_layout_and_every_named_module_exists() -> None:
    layout = README[README.index("## Where things are") :]
    for package in ("topologies", "hosts", "controller", "experiments"):
        for module in (ROOT / package).glob("*.py"):
            assert module.name == "__init__.py" or module.name in layout, f"{package}/{module.name} is not in README"
    existing = {path.name for path in ROOT.glob("*/*.py")}
    assert set(re.findall(r"\b\w+\.py\b", layout)) <= existing
