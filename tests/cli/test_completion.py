"""Shell completion: the words that bash, zsh and fish are given, and how they come to ask."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from unittest import mock

import pytest
from cli_helpers import command, environment, here

from ditmoe_cli.cli.app import load_program
from ditmoe_cli.cli.completion import SHELLS, answer


def bash(line: str) -> list[str]:
    """The words that bash is offered for the last word of a line, which may be empty."""
    words = line.split(" ")
    with mock.patch.dict(os.environ, COMP_WORDS=line, COMP_CWORD=str(len(words) - 1)):
        return answer(load_program(), "complete_bash").split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ditmoe pr", ["profile-experts", "prune"]),
        ("ditmoe prune --allo", ["--allocate"]),
        ("ditmoe prune --router ", ["auto", "slice", "ghost", "mass"]),
        ("ditmoe prune --router g", ["ghost"]),
        ("ditmoe merge --method m-", ["m-smoe"]),
        ("ditmoe quantize --format i", ["int8", "int"]),
        ("ditmoe quantize --method c", ["camera-q"]),
        ("ditmoe sample a.pt --solver d", ["dpmpp-2m", "ddim", "ddim-trailing", "ddpm"]),
        ("ditmoe fid --convention t", ["torch-fidelity"]),
        ("ditmoe bench --device c", ["cpu", "cuda"]),
        ("ditmoe report p", ["profile"]),
        ("ditmoe heal --scope b", ["block"]),
        ("ditmoe heal --train s", ["shared"]),
        ("ditmoe inspect dem", ["demo:digits"]),
        ("ditmoe compare a.pt de", ["demo:digits"]),
        ("ditmoe inspect ", []),  # files, which the shell itself completes
    ],
)
def test_the_words_that_bash_is_offered(
    line: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bash(line) == words


def test_a_file_comes_before_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demolished.pt").touch()
    assert bash("ditmoe inspect demo") == []


def test_zsh_and_fish_are_offered_help_too() -> None:
    with mock.patch.dict(os.environ, _TYPER_COMPLETE_ARGS="ditmoe ins", _TYPER_COMPLETE_FISH_ACTION="get-args"):
        assert answer(load_program(), "complete_zsh").startswith('_arguments \'*: :(("inspect":"Print what')
        assert answer(load_program(), "complete_fish").startswith("inspect\tPrint what a checkpoint is")
        assert answer(load_program(), "complete_tcsh") == ""


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_each_shell(shell: str, tmp_path: Path) -> None:
    outcome = here("--show-completion", shell, cwd=tmp_path)
    assert outcome.code == 0 and f"_DITMOE_COMPLETE=complete_{shell}" in outcome.out


def test_unknown_shells_are_named(tmp_path: Path) -> None:
    assert "bash, zsh, fish" in here("--show-completion", "tcsh", cwd=tmp_path).error(2)


def test_installing_writes_into_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    outcome = here("--install-completion", "bash", cwd=tmp_path)
    assert outcome.code == 0
    script = tmp_path / ".bash_completions" / "ditmoe.sh"
    assert str(script) in outcome.out and "complete_bash" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()


def test_where_the_home_folder_cannot_be_written_the_way_round_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    assert "use --show-completion instead" in here("--install-completion", "bash", cwd=tmp_path).error(3)


def test_bash_completes(tmp_path: Path) -> None:
    """The real shell, with the script that it detects to be its own: no shell is named."""
    program = tmp_path / "bin" / "ditmoe"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\nexec {shlex.join(command())} "$@"\n')
    program.chmod(0o755)
    script = """
        source <(ditmoe --show-completion)
        COMP_WORDS=(ditmoe prune --router gh); COMP_CWORD=3
        _ditmoe_completion ditmoe
        echo "${COMPREPLY[*]}"
    """
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=tmp_path, env=environment(PATH=path), text=True, capture_output=True
    )
    assert (done.stdout, done.stderr) == ("ghost\n", "")
