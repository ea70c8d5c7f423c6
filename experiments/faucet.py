"""Faucet, a controller of others' making, to compare with: installed on demand, in an environment of its own.

It learns MACs with time-outs, from packet-ins of a rule that each MAC's entries hide it from (https://faucet.nz).
"""

import os
import subprocess
import sys
from pathlib import Path

from topologies.errors import UsageError
from topologies.plan import Plan

VERSION = "1.10.12"
_ROOT = Path(__file__).parent.parent
_HOME = _ROOT / ".boot" / f"faucet-{VERSION}"
_DONE = _HOME / "installed"  # made last
_WITHIN_S = 300


def is_installed() -> bool:
    return _DONE.exists()


def install() -> None:
    """UsageError if it cannot be had. Before the world is made: that has no way to the Internet."""
    if is_installed():
        return
    installer = next(iter(sorted((_ROOT / ".boot").glob("uv-*/bin/uv"))), None)
    if installer is None:
        raise UsageError("faucet: there is no installer in .boot; call ./vmotion once")
    environment = str(_HOME / "venv")
    for words in (
        [str(installer), "venv", "--quiet", "--clear", "--python", sys.executable, environment],
        [str(installer), "pip", "install", "--quiet", "--python", environment, f"faucet=={VERSION}"],
    ):
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=_WITHIN_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise UsageError(f"faucet {VERSION} could not be installed within {_WITHIN_S} s") from error
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:]
            raise UsageError(f"faucet {VERSION} could not be installed: {' '.join(said)}")
    _DONE.touch()


def words(port: int) -> list[str]:
    return [
        str(_HOME / "venv/bin/faucet"),
        "--ryu-ofp-listen-host=127.0.0.1",
        f"--ryu-ofp-tcp-listen-port={port}",
    ]


def environment(plan: Plan, folder: Path) -> dict[str, str]:
    """Its variables; its configuration, one VLAN over all ports of the plan's switch, is written to `folder`."""
    ports = len(plan.hosts) + len(plan.clients)
    interfaces = "".join(f"      {number}: {{native_vlan: office}}\n" for number in range(1, ports + 1))
    config = folder / "faucet.yaml"
    config.write_text(
        "vlans:\n  office: {vid: 100}\n"
        f"dps:\n  {plan.switch}:\n    dp_id: 0x1\n    hardware: Open vSwitch\n    interfaces:\n{interfaces}"
    )
    return {
        "PATH": f"{_HOME / 'venv/bin'}:{os.environ['PATH']}",  # it starts another program of its environment
        "FAUCET_CONFIG": str(config),
        "FAUCET_LOG": str(folder / "faucet.log"),
        "FAUCET_EXCEPTION_LOG": str(folder / "faucet_exception.log"),
        "FAUCET_PROMETHEUS_ADDR": "127.0.0.1",
    }
