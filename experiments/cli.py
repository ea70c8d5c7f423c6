"""The command line: ./vmotion demo | run NAME | bench | test | check.

Bad input is one line on stderr that names the thing, the reason and the remedy, and exit status 2.
"""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from experiments.conduct import Experiment, conduct
from experiments.run import CONTROLLERS, Options
from hosts import announce
from hosts.policy import FIXED_MS, MODES, STRATEGIES, Policy
from hosts.transport import COMPRESSIONS, MAX_STREAMS, Transport
from topologies.errors import TestbedError, UsageError
from topologies.plan import DEFAULT_PLAN, LEAF_SPINE, Plan, read_plan
from topologies.units import format_size, parse_bitrate, parse_percent, parse_rate, parse_size

# name -> what it shows; each is a module of this package
EXPERIMENTS = {
    "basic_vmotion": "a VM moves from one host to the other and its client notices nothing",
    "announcements": "what a RARP is worth: announced or not, there and back again, over four kinds of switches",
    "endurance": "two hundred moves back and forth under load, and nothing wears out",
    "host_failure": "a host dies, or is cut off from its storage; its VM runs on the other one, never on both",
    "controller_failure": "the SDN controller dies while a VM moves; the network goes on, and is healed at its return",
    "fabric_failover": "in a leaf-spine fabric trunks, a spine and the controller fail, and a VM moves across leaves",
    "mac_spoof": "a malicious client says that the VM is where it is itself; who believes it",
    "shared_storage": "a VM is a folder of files on a NAS: any host can run it from them, one at a time",
    "split_brain": "hosts lose each other and the storage at the worst moments of a migration; one runs the VM",
    "faults": "at every state of a migration something breaks; each time the end is the one that was promised",
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults as a person would write them; without an option of the VM it is the plan that counts."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default, said = action.default, action.help or ""
        if action.dest == "help" or default in (None, False, []) or "(default" in said:
            return said
        if default is argparse.SUPPRESS:
            return f"{said} (default: the plan's)"
        if isinstance(default, int) and action.metavar == "SIZE":
            return f"{said} (default: {format_size(default)})"
        if isinstance(default, int) and action.metavar == "RATE":
            return f"{said} (default: {default / 1e6:g} MB/s)"
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """argparse without its usage dump: an error is one line."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", _Help)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Listing(argparse.Action):
    """Prints the experiments and ends the program, as --help does."""

    def __call__(self, *_: Any) -> NoReturn:
        width = max(map(len, EXPERIMENTS))
        print("\n".join(f"{name:{width}}  {shows}" for name, shows in EXPERIMENTS.items()))
        sys.exit(0)


def quantity(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of units as an argparse type: its own message reaches the person."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number; write it without a unit")
    return number


def _downtime(text: str) -> float:
    ms = _positive(text)
    if ms < FIXED_MS:
        least = f"a switchover with nothing left to send is predicted to take {FIXED_MS:g} ms"
        raise argparse.ArgumentTypeError(f"{text!r} is never predicted: {least}; take as much or more")
    return ms


def _streams(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_STREAMS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of streams; take 1 to {MAX_STREAMS}")
    return int(text)


def _schedule(text: str) -> tuple[int, ...]:
    try:
        times = tuple(int(part) for part in text.split(","))
    except ValueError:
        times = ()
    if not times or list(times) != sorted(times) or times[0] < 0 or times[-1] > 60_000 or len(times) > 100:
        limits = "at most 100 of them, none above 60000"
        raise argparse.ArgumentTypeError(
            f"{text!r} is no ascending list of ms ({limits}); write it like 0,50,200,450,800"
        )
    return times


def _said(schedule: tuple[int, ...]) -> str:
    return ",".join(map(str, schedule))


def experiment_options(parser: argparse.ArgumentParser) -> None:
    """The options that every experiment has. The ones of the VM override the plan's."""
    default = argparse.SUPPRESS
    add = parser.add_argument
    add("--plan", type=Path, default=DEFAULT_PLAN, metavar="FILE", help="what the testbed consists of (TOML)")
    add("--ram", type=quantity(parse_size), default=default, metavar="SIZE", help="RAM of the VM, like 512MiB")
    add(
        "--fill",
        type=quantity(parse_percent),
        default=default,
        metavar="SHARE",
        help="how much of it is filled, like 75%%",
    )
    add(
        "--compressible",
        type=quantity(parse_percent),
        default=default,
        metavar="SHARE",
        help="how much of that repeats, like 60%%",
    )
    add(
        "--dirty-rate",
        type=quantity(parse_rate),
        default=default,
        metavar="RATE",
        help="how fast it writes, like 50MB/s",
    )
    add(
        "--working-set",
        type=quantity(parse_size),
        default=default,
        metavar="SIZE",
        help="to how much of it, like 64MiB",
    )
    add("--link", type=quantity(parse_bitrate), default=default, metavar="RATE", help="the cable: 1Gbit, unshaped")
    add("--mode", choices=MODES, default="precopy", help="how RAM is moved")
    add("--announce", choices=announce.MODES, default="rarp", help="how the VM's new place is told")
    add("--announce-ms", type=_schedule, default=_said(announce.SCHEDULE_MS), metavar="MS,...", help="after the resume")
    add("--downtime-ms", type=_downtime, default=50.0, metavar="MS", help="the longest downtime aimed at")
    add("--timeout-s", type=_positive, default=120.0, metavar="S", help="when the strategy takes over from pre-copy")
    add("--timeout-strategy", choices=STRATEGIES, default="cancel", help="what is done then")
    add("--encrypt", action="store_true", help="the vMotion stream in TLS 1.3")
    add("--compress", choices=COMPRESSIONS, default="none", help="pack pages where that is faster")
    add("--bandwidth-limit", type=quantity(parse_bitrate), default="unshaped", metavar="RATE", help="like 500Mbit")
    add("--streams", type=_streams, default=1, metavar="N", help="TCP connections that carry pages")
    add("--datastore", choices=("nfs", "local"), default="nfs", help="where the VMs' files are")
    add("--controller", choices=CONTROLLERS, default="mobility", help="of the physical switch; the others, to compare")
    add("--seed", type=int, default=1, help="what the clients' random choices begin with")
    add("--out", type=Path, default=None, metavar="DIR", help="results folder (default: results/NAME-TIME)")


def _case_options(parser: argparse.ArgumentParser) -> None:
    """Of experiments that consist of cases; each is small, so their VM is."""
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this case, or those like 'cut@*'")
    parser.add_argument("--long", action="store_true", help="all cases")
    _small_vm(parser)


def _fabric_options(parser: argparse.ArgumentParser) -> None:
    _small_vm(parser)
    parser.set_defaults(plan=LEAF_SPINE)


def _compared_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", default=[], choices=CONTROLLERS, help="this controller")
    _small_vm(parser)


def _endurance_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--migrations", type=int, default=200, metavar="N", help="how many moves")
    parser.set_defaults(ram=parse_size("64MiB"), working_set=parse_size("8MiB"), dirty_rate=parse_rate("20MB/s"))


def _small_vm(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(ram=parse_size("64MiB"), working_set=parse_size("8MiB"), dirty_rate=parse_rate("5MB/s"))


# further options of an experiment, by its name
_FURTHER = {
    "announcements": _compared_options,
    "faults": _case_options,
    "endurance": _endurance_options,
    "host_failure": _small_vm,
    "mac_spoof": _compared_options,
    "fabric_failover": _fabric_options,
    "controller_failure": _small_vm,
    "split_brain": _small_vm,
}


def options_of(chosen: argparse.Namespace, command_line: Sequence[str]) -> Options:
    """Checked options from parsed ones; UsageError if they contradict the plan."""
    plan = read_plan(chosen.plan)
    if hasattr(chosen, "link"):
        plan = dataclasses.replace(plan, link=chosen.link)
    of_vm = ("ram", "fill", "compressible", "dirty_rate", "working_set")
    changes = {k: getattr(chosen, k) for k in of_vm if hasattr(chosen, k)}
    for vm in plan.vms:
        plan = plan.with_vm(dataclasses.replace(vm, **changes))
    return Options(
        plan=plan,
        plan_file=chosen.plan.resolve(),
        announce=chosen.announce,
        schedule_ms=chosen.announce_ms,
        policy=Policy(chosen.downtime_ms, chosen.timeout_s, chosen.mode, chosen.timeout_strategy),
        transport=Transport(chosen.encrypt, chosen.compress, chosen.bandwidth_limit, chosen.streams),
        datastore=chosen.datastore,
        controller=_controller(chosen.controller, plan),
        seed=chosen.seed,
        out=chosen.out,
        only=tuple(getattr(chosen, "only", ())),
        long=getattr(chosen, "long", False),
        migrations=getattr(chosen, "migrations", 1),
        command_line=tuple(command_line),
    )


def _controller(name: str, plan: Plan) -> str:
    if name != "mobility" and plan.trunks:
        raise UsageError(f"--controller {name}: a plan with trunks has loops, which only mobility can forward over")
    return name


def _options_of_experiment(name: str, parser: argparse.ArgumentParser) -> None:
    experiment_options(parser)
    _FURTHER.get(name, lambda parser: None)(parser)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vmotion", description="See a live migration: a vMotion testbed on Mininet.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    experiment_options(commands.add_parser("demo", help="the main experiment, basic_vmotion (root)"))
    run = commands.add_parser("run", help="one experiment by its name (root)")
    run.add_argument("--list", action=_Listing, nargs=0, help="name the experiments, and what each shows")
    names = run.add_subparsers(dest="experiment", metavar="NAME", required=True, parser_class=_Parser)
    for name, shows in EXPERIMENTS.items():
        _options_of_experiment(name, names.add_parser(name, help=shows))
    bench = commands.add_parser("bench", help="measure, and compare with the targets (root)")
    bench.add_argument("--only", metavar="NAME", action="append", default=[], help="this group; may be repeated")
    bench.add_argument("--list", action="store_true", help="name the groups, and what each measures")
    bench.add_argument("--json", type=Path, metavar="FILE", default=None, help="write the rows here too")
    bench.add_argument("--samples", type=int, default=5, metavar="N", help="of each figure")
    for view, shows in (("locations", "where each MAC is"), ("moves", "who moved"), ("flows", "what the switches do")):
        viewer = commands.add_parser(view, help=f"{shows}, as the controller of the run under way says (root)")
        viewer.add_argument("--json", action="store_true", help="as the controller's API has it")
    commands.add_parser("test", help="the whole test suite (root); further words go to pytest")
    commands.add_parser("check", help="format, lint, types, imports, unit tests (no root)")
    return parser


def _run(words: Sequence[str]) -> int:
    if words[:1] == ["test"]:
        from experiments import suite

        return suite.main(list(words[1:]))
    chosen = _parser().parse_args(words)
    match chosen.command:
        case "demo":
            return _named("basic_vmotion", chosen, words)
        case "run":
            return _named(chosen.experiment, chosen, words)
        case "locations" | "moves" | "flows" as view:
            from experiments import sdn_view

            return sdn_view.show(view, chosen.json)
        case "bench":
            from experiments import bench

            return bench.main(chosen.only, chosen.list, chosen.json, chosen.samples)
        case _:
            from experiments import check

            return check.main()


def _named(name: str, chosen: argparse.Namespace, words: Sequence[str]) -> int:
    return _conducted(name, importlib.import_module(f"experiments.{name}"), chosen, ["vmotion", *words])


def _conducted(name: str, module: Any, chosen: argparse.Namespace, words: Sequence[str]) -> int:
    if getattr(chosen, "list", False):
        print("\n".join(module.names()))
        return 0
    options = options_of(chosen, words)
    getattr(module, "check", lambda options: None)(options)  # what it cannot do is told before anything is made
    return conduct(name, module.run, options)


def _guarded(action: Callable[[], int]) -> int:
    try:
        return action()
    except TestbedError as error:
        print(f"vmotion: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("vmotion: interrupted", file=sys.stderr)
        return 130


def main() -> int:
    return _guarded(lambda: _run(sys.argv[1:]))


def script(name: str, experiment: Experiment, about: str | None) -> NoReturn:
    """An experiment called as a program of its own; `about`, its docstring, is its --help."""
    parser = _Parser(prog=name, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    _options_of_experiment(name, parser)
    module = sys.modules[experiment.__module__]
    sys.exit(_guarded(lambda: _conducted(name, module, parser.parse_args(), sys.argv)))


if __name__ == "__main__":
    sys.exit(main())
