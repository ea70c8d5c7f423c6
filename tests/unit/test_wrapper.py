"""The wrapper ./vmotion, on a machine that has nothing but the programs below: no root, no apt, no network.

A shell script stands for Python and for uv; it makes what they would make and notes how it was called.
"""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

WRAPPER = Path(__file__).resolve().parents[2] / "vmotion"
UTILITIES = [
    "cat",
    "chmod",
    "cp",
    "flock",
    "head",
    "mkdir",
    "mv",
    "readlink",
    "rm",
    "sed",
    "sha256sum",
    "sleep",
    "tail",
]

PYTHON = r"""#!/bin/sh
echo "$*" >>"$CALLS"
for last; do :; done
case $* in
    -V) echo "Python $(cat "${0%/*}/version" 2>/dev/null || echo 3.12.1)" ;;
    *sys.executable*) echo "$0" ;;
    "-I -m venv "*) mkdir -p "$last/bin" && cp "$0" "$last/bin/python" ;;
    *" pip install "*) cp "$0" "${0%/*}/uv" ;;
    *" venv --relocatable "*) mkdir -p "$last/bin" && cp "$0" "$last/bin/python" ;;
    *" pip sync "*) eval "${SYNC:-}" ;;
    "-m experiments.cli"*) echo "$$ $PWD $PYTHONPATH"; shift 2; printf '<%s>' "$@" ;;
esac
"""


class Machine:
    """A tree with the wrapper, and a PATH of its own."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self._calls = folder / "the tree", folder / "bin", folder / "calls"
        self.root.mkdir()
        self.bin.mkdir()
        self.policy = folder / "policy-rc.d"
        wrapper = WRAPPER.read_text().replace("POLICY=/usr/sbin/policy-rc.d", f"POLICY={self.policy}")
        (self.root / "vmotion").write_text(wrapper)
        (self.root / "vmotion").chmod(0o755)
        for name in ("requirements.txt", "build-constraints.txt"):
            (self.root / name).write_text("one==1\n")
        for name in UTILITIES:
            program = shutil.which(name)
            assert program, f"no {name} here"
            (self.bin / name).symlink_to(program)
        self.add("python3", PYTHON)
        self.add("id", "#!/bin/sh\necho 1000\n")
        self.add("ldconfig", "#!/bin/sh\n")

    def add(self, name: str, script: str) -> None:
        program = self.bin / name
        program.write_text(script)
        program.chmod(0o755)

    def add_tools(self) -> None:
        """What the commands for root use."""
        for program in self.call("demo")[2].removeprefix("vmotion: missing: ").partition(";")[0].split(", "):
            self.add(program, "#!/bin/sh\n")
        self.add_library("ganesha/libfsalvfs.so")
        self.add("ldconfig", "#!/bin/sh\necho '\tlibnfs.so.14 (libc6,x86-64) => /lib/libnfs.so.14'\n")

    def add_library(self, name: str) -> None:
        library = self.bin.parent / "lib/any-linux" / name
        library.parent.mkdir(parents=True)
        library.touch()

    def start(self, *command: str | Path, cwd: Path, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env={"PATH": str(self.bin), "CALLS": str(self._calls), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *words: str, **env: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of ./vmotion with these words."""
        process = self.start("./vmotion", *words, cwd=self.root, **env)
        out, err = process.communicate()
        return process.returncode, out, err

    def installations(self) -> int:
        """How many times the Python packages were installed."""
        return self._calls.read_text().count(" pip sync ")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


Refused = Callable[..., str]


@pytest.fixture
def refused(machine: Machine) -> Refused:
    """Calls ./vmotion, which has to end with status 2 and one line; returns that line."""

    def call(*words: str, **env: str) -> str:
        status, out, err = machine.call(*words, **env)
        assert (status, out) == (2, "")
        assert err.startswith("vmotion: ")
        assert err.count("\n") == 1
        return err

    return call


# ------------------------------------------------------------ running


def test_the_first_call_installs_and_later_ones_do_not(machine: Machine) -> None:
    status, _, err = machine.call("check")
    assert (status, machine.installations()) == (0, 1)
    assert "installing Python packages" in err
    status, _, err = machine.call("check")
    assert (status, machine.installations(), err) == (0, 1, "")


def test_the_program_gets_the_same_words_in_the_callers_directory(machine: Machine, tmp_path: Path) -> None:
    machine.call("check")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = elsewhere / "link"
    link.symlink_to(machine.root / "vmotion")
    process = machine.start(link, "check", "two  words", "", "*", "$HOME", cwd=elsewhere)
    out, _ = process.communicate()
    # the same process id: no shell stays between the caller's signals and the program
    assert out == f"{process.pid} {elsewhere} {machine.root}\n<check><two  words><><*><$HOME>"


def test_the_programs_exit_status_is_the_wrappers(machine: Machine) -> None:
    machine.add("python3", PYTHON.replace("shift 2;", "exit 7;"))
    assert machine.call("check")[0] == 7


def test_help_needs_no_installed_programs(machine: Machine) -> None:
    for words in ([], ["--help"], ["demo", "--help"], ["run", "basic_vmotion", "-h"], ["nonsense"]):
        status, out, _ = machine.call(*words)
        assert status == 0
        assert out.endswith("".join(f"<{word}>" for word in words) or "<>")


# ------------------------------------------------------------ the virtual environment


@pytest.mark.parametrize("name", ["requirements.txt", "build-constraints.txt"])
def test_a_changed_lock_is_installed(machine: Machine, name: str) -> None:
    machine.call("check")
    (machine.root / name).write_text("one==2\n")
    machine.call("check")
    assert machine.installations() == 2


def test_another_python_gets_another_environment(machine: Machine) -> None:
    machine.call("check")
    (machine.root / ".venv/bin/version").write_text("3.12.9")  # an upgrade of the system: the same but for its patches
    machine.call("check")
    assert machine.installations() == 1
    (machine.root / ".venv/bin/version").write_text("3.13.0")
    machine.call("check")
    assert machine.installations() == 2


def test_a_failed_installation_says_where_its_story_is_and_is_done_again(machine: Machine) -> None:
    status, out, err = machine.call("check", SYNC="echo no route to host; exit 1")
    assert (status, out) == (2, "")
    assert f"{machine.root}/.boot/python.log" in err
    assert "no route to host" in err
    assert machine.call("check")[0] == 0


def test_a_killed_installation_is_done_again(machine: Machine) -> None:
    assert machine.call("check", SYNC="kill -9 $PPID")[0] == -9
    assert not (machine.root / ".venv").exists()
    assert machine.call("check")[0] == 0
    assert machine.installations() == 2


def test_a_failed_update_leaves_the_environment_as_it_was(machine: Machine) -> None:
    machine.call("check")
    (machine.root / "requirements.txt").write_text("one==2\n")
    assert machine.call("check", SYNC="exit 1")[0] == 2
    (machine.root / "requirements.txt").write_text("one==1\n")
    assert machine.call("check")[0] == 0
    assert machine.installations() == 2


def test_of_two_first_calls_one_installs_and_both_run(machine: Machine) -> None:
    processes = [machine.start("./vmotion", "check", n, cwd=machine.root, SYNC="sleep 0.3") for n in "01"]
    outs = [process.communicate()[0] for process in processes]
    assert [out.splitlines()[1] for out in outs] == ["<check><0>", "<check><1>"]
    assert machine.installations() == 1


# ------------------------------------------------------------ what is missing


def test_no_python(machine: Machine, refused: Refused) -> None:
    (machine.bin / "python3").unlink()
    assert "python3 (3.11 to 3.13)" in refused("check")


def test_an_unsuitable_python_is_named(machine: Machine, refused: Refused) -> None:
    (machine.bin / "version").write_text("3.10.12")
    assert "Python 3.10.12" in refused("check")


def test_a_suitable_python_is_found_by_its_full_name(machine: Machine) -> None:
    (machine.bin / "python3").rename(machine.bin / "python3.11")
    machine.add("python3", "#!/bin/sh\necho Python 3.14.0\n")
    assert machine.call("check")[0] == 0


def test_the_callers_python_is_taken_or_refused(machine: Machine, refused: Refused, tmp_path: Path) -> None:
    assert "PYTHON is /nowhere" in refused("check", PYTHON="/nowhere")
    theirs = tmp_path / "their python"
    (machine.bin / "python3").rename(theirs)
    assert machine.call("check", PYTHON=str(theirs))[0] == 0


def test_missing_programs_are_named_with_the_remedy(machine: Machine, refused: Refused) -> None:
    assert "mnexec" in refused("demo")  # there is no apt-get
    machine.add("apt-get", "#!/bin/sh\nexit 1\n")
    line = refused("demo", "--ram", "1GiB")
    assert "mnexec" in line
    assert "sudo ./vmotion demo" in line


def test_the_part_of_ganesha_that_exports_folders_may_be_missing(machine: Machine, refused: Refused) -> None:
    machine.add_tools()
    assert machine.call("demo")[0] == 0
    shutil.rmtree(machine.bin.parent / "lib")
    line = refused("demo")
    assert "missing: libfsalvfs.so;" in line and "nfs-ganesha-vfs" in line


@pytest.mark.parametrize(("number", "is_known"), [(12, False), (13, True), (14, True), (15, False), (16, False)])
def test_a_libnfs_has_to_be_one_that_is_known(machine: Machine, number: int, is_known: bool) -> None:
    machine.add_tools()
    machine.add("ldconfig", f"#!/bin/sh\necho '\tlibnfs.so.{number} (libc6,x86-64) => /lib/libnfs.so.{number}'\n")
    status, _, err = machine.call("demo")
    assert (status == 0) == is_known
    assert ("missing: libnfs.so;" in err and "libnfs-utils" in err) != is_known


def test_a_python_without_ensurepip_is_a_missing_package(machine: Machine, refused: Refused) -> None:
    machine.add("python3", PYTHON.replace("-V)", "*ensurepip*) exit 1 ;;\n    -V)"))
    machine.add("apt-get", "#!/bin/sh\nexit 1\n")
    assert "ensurepip" in refused("check")


APT = """#!/bin/sh
echo "$*"
case $* in
    *update) : >updated ;;
    *install*) [ -e updated ] || exit 100; for last; do :; done; %s ;;
esac
"""


@pytest.fixture
def as_root(machine: Machine, tmp_path: Path) -> Callable[[str], None]:
    """The caller is root, the tools are missing, and apt-get brings them; before that it does this."""

    def as_root(first: str) -> None:
        machine.add_tools()
        shutil.move(machine.bin, tmp_path / "tools")
        machine.bin.mkdir()
        for name in (*UTILITIES, "python3"):
            shutil.move(tmp_path / "tools" / name, machine.bin)
        machine.add("ldconfig", "#!/bin/sh\n")
        machine.add("id", "#!/bin/sh\necho 0\n")
        machine.add("dpkg", "#!/bin/sh\n")
        machine.add("apt-get", APT % f"{first}; cp {tmp_path}/tools/* {machine.bin}")

    return as_root


def test_root_gets_missing_packages_installed(machine: Machine, as_root: Callable[[str], None]) -> None:
    as_root(":")
    status, _, err = machine.call("demo")
    assert status == 0
    assert "installing mininet" in err
    log = (machine.root / ".boot/apt.log").read_text()
    assert log.count("--no-install-recommends install mininet") == 2  # before and after apt-get update


def asks(machine: Machine) -> str:
    return f"{machine.policy} rpcbind start; echo asked $?"


def test_what_is_installed_starts_no_service(machine: Machine, as_root: Callable[[str], None]) -> None:
    as_root(asks(machine))
    assert machine.call("demo")[0] == 0
    assert "asked 101\n" in (machine.root / ".boot/apt.log").read_text()
    assert not machine.policy.exists()


def test_a_policy_that_the_machine_has_is_kept(machine: Machine, as_root: Callable[[str], None]) -> None:
    as_root(asks(machine))
    machine.policy.write_text("#!/bin/sh\nexit 104\n")
    machine.policy.chmod(0o755)
    assert machine.call("demo")[0] == 0
    assert "asked 104\n" in (machine.root / ".boot/apt.log").read_text()
    assert machine.policy.exists()


def test_a_failed_installation_holds_no_service(machine: Machine, as_root: Callable[[str], None]) -> None:
    as_root("exit 100")
    assert machine.call("demo")[0] == 2
    assert not machine.policy.exists()


def test_a_killed_installation_holds_no_service(machine: Machine, as_root: Callable[[str], None]) -> None:
    as_root("kill -9 $PPID")
    assert machine.call("demo")[0] == -9
    assert subprocess.run([machine.policy, "rpcbind", "start"], check=False).returncode == 0
    assert not machine.policy.exists()


def test_what_starts_with_the_machine_is_what_did_before(
    machine: Machine, as_root: Callable[[str], None], tmp_path: Path
) -> None:
    units = tmp_path / "units"
    units.write_text("rpcbind.socket enabled enabled\nssh.service enabled enabled\n")
    as_root(f"echo nfs-ganesha.service enabled enabled >>{units}")
    machine.add(
        "systemctl", f'#!/bin/sh\ncase $1 in list-unit-files) cat {units} ;; *) echo "$*" >>{tmp_path}/done ;; esac\n'
    )
    assert machine.call("demo")[0] == 0
    assert (tmp_path / "done").read_text() == "disable nfs-ganesha.service\n"


def test_packages_that_cannot_be_installed_end_the_call(machine: Machine) -> None:
    machine.add("id", "#!/bin/sh\necho 0\n")
    machine.add("apt-get", "#!/bin/sh\necho E: no space left\nexit 100\n")
    status, out, err = machine.call("demo")
    assert (status, out) == (2, "")
    assert f"{machine.root}/.boot/apt.log" in err
    assert "E: no space left" in err
