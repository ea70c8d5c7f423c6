"""Bad input: one clear line that names the thing, the reason and the remedy; exit status 2; nothing is made."""

import sys
from pathlib import Path

import pytest

from experiments import cli, run
from experiments.run import Options
from hosts.policy import MODES, STRATEGIES, Policy
from hosts.transport import Transport
from topologies.plan import DEFAULT_PLAN

BAD = [
    ([], "COMMAND", "--help"),
    (["fly"], "'fly'", "demo"),
    (["demo", "--bogus"], "--bogus", "--help"),
    (["demo", "--ra", "512MiB"], "--ra", "--help"),  # no abbreviations: they would change their meaning one day
    (["demo", "--ram", "512"], "'512' has no unit", "512MiB"),
    (["demo", "--ram", "512MQ"], "'MQ'", "512MiB"),
    (["demo", "--ram", "0MiB"], "RAM", "16MiB"),
    (["demo", "--ram", "100kB"], "RAM", "4 KiB pages"),
    (["demo", "--ram", "64EiB"], "'EiB'", "512MiB"),
    (["demo", "--working-set", "513MiB"], "working set", "at most its RAM"),
    (["demo", "--fill", "120%"], "120%", "75%"),
    (["demo", "--compressible", "half"], "'half'", "75%"),
    (["demo", "--dirty-rate", "50MB"], "'MB'", "50MB/s"),
    (["demo", "--link", "fast"], "'fast'", "1Gbit"),
    (["demo", "--downtime-ms", "0"], "'0'", "positive"),
    (["demo", "--downtime-ms", "nan"], "'nan'", "positive"),
    (["demo", "--timeout-s", "-1"], "'-1'", "positive"),
    (["demo", "--timeout-strategy", "hope"], "'hope'", "cancel, switch, throttle, postcopy"),
    (["demo", "--compress", "zip"], "'zip'", "none, zstd, lz4"),
    (["demo", "--bandwidth-limit", "500"], "'500' has no unit", "1Gbit"),
    (["demo", "--streams", "0"], "'0'", "take 1 to 16"),
    (["demo", "--streams", "17"], "'17'", "take 1 to 16"),
    (["demo", "--streams", "-2"], "'-2'", "take 1 to 16"),
    (["demo", "--streams", "two"], "'two'", "take 1 to 16"),
    (["demo", "--encrypt=yes"], "'yes'", "--help"),
    (["demo", "--announce", "shout"], "'shout'", "rarp"),
    (["demo", "--announce-ms", "50,0"], "50,0", "0,50,200,450,800"),
    (["demo", "--datastore", "floppy"], "'floppy'", "nfs, local"),
    (["demo", "--mode", "teleport"], "'teleport'", "precopy, postcopy, stop-and-copy, hybrid"),
    (["demo", "--plan", "/nonexistent.toml"], "/nonexistent.toml", "No such file"),
    (["run"], "NAME", "--help"),
    (["run", "nosuch"], "'nosuch'", "basic_vmotion"),
    (["bench", "--only", "nosuch"], "'nosuch'", "goodput"),
    (["bench", "--samples", "0"], "0", "1 to 1000"),
    (["demo", "--downtime-ms", "5"], "'5' is never predicted", "8 ms"),
    (["run", "endurance", "--migrations", "6"], "--migrations 6", "at least 7"),
    (["run", "faults", "--only", "cut@nowhere*"], "'cut@nowhere*'", "--list"),
]


def _not_reached(*_: object) -> int:
    raise AssertionError("bad input began a run")


@pytest.mark.parametrize(("words", "thing", "remedy"), BAD, ids=[" ".join(words) or "nothing" for words, _, _ in BAD])
def test_bad_input_is_one_line_and_exit_2(
    words: list[str],
    thing: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys, "argv", ["vmotion", *words])
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(cli, "conduct", _not_reached)  # should anything pass that ought not to
    assert cli.main() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("vmotion: ")
    assert thing in err and remedy in err.replace("'", "")  # Python 3.13 quotes no choices
    assert list(tmp_path.iterdir()) == []


def chosen(monkeypatch: pytest.MonkeyPatch, *words: str) -> Options:
    """What an experiment is given by this command line."""
    given: list[Options] = []

    def conduct(name: str, experiment: object, options: Options) -> int:
        given.append(options)
        return 0

    monkeypatch.setattr(sys, "argv", ["vmotion", *words])
    monkeypatch.setattr(cli, "conduct", conduct)
    assert cli.main() == 0
    return given[0]


def test_without_options_a_migration_is_plain_pre_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    options = chosen(monkeypatch, "demo")
    assert options.policy == Policy(downtime_ms=50.0, timeout_s=120.0, mode="precopy", timeout_strategy="cancel")
    assert options.transport == Transport(encrypt=False, compress="none", bandwidth_limit=0, streams=1)
    assert options.command_line == ("vmotion", "demo")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_options_of_a_policy_reach_the_experiment(
    monkeypatch: pytest.MonkeyPatch, mode: str, strategy: str
) -> None:
    words = ["--mode", mode, "--timeout-strategy", strategy, "--timeout-s", "7.5", "--downtime-ms", "20"]
    assert chosen(monkeypatch, "demo", *words).policy == Policy(20.0, 7.5, mode, strategy)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "transport"),
    [
        (["--encrypt"], Transport(encrypt=True)),
        (["--compress", "zstd"], Transport(compress="zstd")),
        (["--compress", "lz4"], Transport(compress="lz4")),
        (["--bandwidth-limit", "500Mbit"], Transport(bandwidth_limit=500_000_000)),
        (["--bandwidth-limit", "unshaped"], Transport()),
        (["--streams", "16"], Transport(streams=16)),
        (["--encrypt", "--compress=zstd", "--bandwidth-limit=1Gbit", "--streams=4"], Transport(True, "zstd", 10**9, 4)),
    ],
)
def test_the_options_of_the_transport_reach_the_experiment(
    monkeypatch: pytest.MonkeyPatch, words: list[str], transport: Transport
) -> None:
    assert chosen(monkeypatch, "run", "basic_vmotion", *words).transport == transport


def test_a_vm_is_on_the_nas_unless_its_user_wants_it_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "demo").datastore == "nfs"
    assert chosen(monkeypatch, "demo", "--datastore", "local").datastore == "local"


def test_a_guest_may_write_to_all_of_its_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = chosen(monkeypatch, "demo", "--ram", "64MiB", "--working-set", "64MiB").plan
    assert {(vm.ram, vm.working_set) for vm in plan.vms} == {(2**26, 2**26)}


PLANS = [
    ('name = "c1"', 'name = "c1"\ncolour = "red"', "colour", "unknown key"),
    ("10.0.0.100/24", "10.0.0.11/24", "10.0.0.11", "give it its own"),
    ("00:50:56:00:01:64", "00:50:56:00:00:01", "00:50:56:00:00:01", "give it its own"),
    ('host = "esx1"', 'host = "esx9"', "esx9", "unknown host"),
    (
        'ip = "50.50.50.2", netmask = "255.255.255.252"',
        'ip = "50.50.50.2", netmask = "255.255.252"',
        "255.255.252",
        "/30",
    ),
    ('ip = "50.50.50.2"', 'ip = "50.50.50.6"', "50.50.50.4/30", "different subnets"),
    ('link = "1Gbit"', "link = 1000", "1000", "unit"),
]


@pytest.mark.parametrize(("old", "new", "thing", "reason"), PLANS, ids=[plan[3] + " " + plan[2] for plan in PLANS])
def test_a_bad_plan_is_one_line_and_exit_2(
    old: str,
    new: str,
    thing: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    text = DEFAULT_PLAN.read_text()
    assert old in text
    plan = tmp_path / "plan.toml"
    plan.write_text(text.replace(old, new))
    monkeypatch.setattr(sys, "argv", ["vmotion", "demo", "--plan", str(plan)])
    monkeypatch.setattr(cli, "conduct", _not_reached)
    assert cli.main() == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(plan) in err and thing in err and reason in err
