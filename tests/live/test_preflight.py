"""A machine that cannot carry a run says so in one line, before anything is made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT


def demo(path: str, *words: str, user: int | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", "demo", *words],
        env={**os.environ, "PATH": path},
        cwd=ROOT,
        user=user,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr


def test_without_root_it_says_sudo() -> None:
    readable = os.access(sys.executable, os.X_OK) and not any(
        parent.stat().st_mode & 0o001 == 0 for parent in (*ROOT.parents, *Path(sys.executable).resolve().parents)
    )
    if not readable:
        pytest.skip("another user cannot read this checkout or its Python")
    status, err = demo(os.environ["PATH"], user=65534)
    assert status == 2 and "sudo" in err


def test_a_missing_program_is_named_with_its_package(tmp_path: Path) -> None:
    # every program but one, as links: /usr/sbin and /sbin are searched as well, so it has to be one that is not there
    for folder in ("/usr/bin", "/bin"):
        for program in Path(folder).iterdir():
            link = tmp_path / program.name
            if program.name != "mnexec" and not link.is_symlink():
                link.symlink_to(program)
    status, err = demo(str(tmp_path))
    assert status == 2 and "mnexec is missing" in err and "apt-get install mininet" in err


def test_more_ram_than_the_machine_has_is_refused() -> None:
    status, err = demo(os.environ["PATH"], "--ram", "9999GiB")
    assert status == 2 and "9999 GiB" in err and "--ram" in err


def test_a_kernel_without_htb_is_told_and_the_remedy_works(tmp_path: Path) -> None:
    refusing = tmp_path / "tc"
    refusing.write_text('#!/bin/sh\necho "Error: Specified qdisc kind is unknown." >&2\nexit 2\n')
    refusing.chmod(0o755)
    status, err = demo(f"{tmp_path}:{os.environ['PATH']}", "--out", str(tmp_path / "out"))
    assert status == 2 and "HTB" in err and "--link unshaped" in err
    assert not (tmp_path / "out").exists()


def test_an_occupied_results_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    status, err = demo(os.environ["PATH"], "--out", str(tmp_path))
    assert status == 2 and "occupied" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
