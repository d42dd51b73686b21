"""What needs headers only stays light: no torch, no numpy, and help at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import environment, here, series
from conftest import make_pico

from ditmoe_cli.cli.app import COMMANDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, its profile and plans for it."""
    folder = tmp_path_factory.mktemp("imports")
    make_pico(sampler="rf", in_channels=1).save(folder / "a.safetensors")
    make_pico(sampler="rf", in_channels=1).save(folder / "shards", shard_bytes=50_000)
    settings = ("--images", 4, "--steps", 2, "--bins", 2)
    here("profile-experts", "a.safetensors", *settings, "-o", "p.safetensors", cwd=folder)
    pruned = here("prune", "a.safetensors", "--keep", 2, "--profile", "p.safetensors", "--dry-run", cwd=folder)
    (folder / "prune.json").write_text(pruned.out)
    here("prune", "a.safetensors", "--keep", 2, "--method", "random", "--no-refit", "-o", "s.safetensors", cwd=folder)
    (folder / "quantize.json").write_text(
        here("quantize", "a.safetensors", "--uniform", "--bits", 8, "--dry-run", cwd=folder).out
    )
    return folder


LIGHT = (
    ("--help",),
    ("--version",),
    *((name, "--help") for name in COMMANDS),
    ("report", "sensitivity", "--help"),
    ("report", "sensitivity", "demo:digits", "--dry-run"),
    ("prune", "--list-methods"),
    ("merge", "--list-methods"),
    ("inspect", "a.safetensors"),
    ("inspect", "shards"),
    ("inspect", "demo:digits"),
    ("inspect", "a.safetensors", "--verify"),
    ("inspect", "s.safetensors", "--recipe"),
    ("run", "s.safetensors", "a.safetensors", "-o", "again.safetensors", "--dry-run"),
    ("inspect", "a.safetensors", "shards"),
    ("inspect", "a.safetensors", "shards", "--verify"),
    ("inspect", "a.safetensors", "demo:digits"),
    ("convert", "a.safetensors", "--dry-run"),
    ("export", "a.safetensors", "--to", "upstream", "--dry-run"),
    ("export", "a.safetensors", "--to", "diffusers", "--dry-run"),
    ("prune", "a.safetensors", "--keep", 2, "--profile", "p.safetensors", "--dry-run"),
    ("prune", "a.safetensors", "--keep", 2, "--profile", "p.safetensors", "--router", "slice", "--dry-run"),
    ("prune", "a.safetensors", "--keep", 2, "--method", "frequency", "--profile", "p.safetensors", "--dry-run"),
    ("prune", "a.safetensors", "--keep", 0.5, "--dry-run"),
    ("prune", "a.safetensors", "--keep", 2, "--method", "random", "--dry-run"),
    ("prune", "a.safetensors", "--keep", 2, "--method", "random", "--no-refit", "--dry-run"),
    ("prune", "a.safetensors", "--keep", 2, "--neurons", 0.5, "--multiple", 8, "--constants", "--dry-run"),
    ("merge", "a.safetensors", "--groups", 2, "--dry-run"),
    ("quantize", "a.safetensors", "--uniform", "--bits", 4, "--dry-run"),
    ("quantize", "shards", "--uniform", "--bits", 8, "--dry-run"),
    ("heal", "s.safetensors", "--original", "a.safetensors", "--profile", "p.safetensors", "--dry-run"),
    ("heal", "s.safetensors", "--original", "a.safetensors", "--scope", "block", "--steps", 5, "--dry-run"),
    ("distill", "s.safetensors", "--original", "a.safetensors", "--dry-run"),
    ("schedule", "a.safetensors", "--flops", 0.6, "--dry-run"),
    ("schedule", "a.safetensors", "--method", "fora:2", "--dry-run"),
    ("distill", "a.safetensors", "--steps", 1, "--cfg", 1.5, "--progressive", "--iterations", 5, "--dry-run"),
    ("apply", "a.safetensors", "--plan", "prune.json", "--dry-run"),
    ("apply", "a.safetensors", "--plan", "quantize.json", "--dry-run"),
    ("plan", "prune.json"),
    ("plan", "prune.json", "quantize.json"),
)


def test_nothing_heavy_is_imported(folder: Path) -> None:
    before = sorted(file.name for file in folder.iterdir())
    for words, (outcome, heavy) in zip(LIGHT, series(LIGHT, folder), strict=True):
        line = " ".join(map(str, words))
        assert outcome.code == 0, f"{line}: {outcome.err}"
        assert outcome.out, line
        assert not heavy, f"{line} imports {heavy}"
    assert sorted(file.name for file in folder.iterdir()) == before, "a dry run writes nothing"


def test_the_check_can_tell(folder: Path) -> None:
    """What computes imports torch, and is seen to."""
    words = ("quantize", "a.safetensors", "--uniform", "--bits", 4, "-o", "b.safetensors")
    ((outcome, heavy),) = series([words], folder)
    assert outcome.code == 0
    assert "torch" in heavy


_WAITING = """
import sys
from ditmoe_cli.cli.app import run

class Stdin:
    def __init__(self):
        self.buffer = self
    def isatty(self):
        return False
    def read(self):
        print("torch" in sys.modules, "numpy" in sys.modules, file=sys.stderr, flush=True)
        return b""

for words in COMMANDS:
    sys.stdin = Stdin()
    run(words)
"""


def test_the_envelope_is_read_before_torch_is_imported(folder: Path) -> None:
    """All commands of a pipe start at once; those that wait must weigh nothing."""
    commands = [
        ["inspect"],
        ["convert"],
        ["profile-experts"],
        ["prune", "--keep", "2"],
        ["merge", "--groups", "2"],
        ["quantize", "--uniform", "--bits", "4"],
        ["heal"],
        ["distill"],
        ["apply", "--plan", "prune.json"],
        ["sample"],
        ["fid"],
        ["compare"],
        ["bench"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", _WAITING.replace("COMMANDS", json.dumps(commands))],
        cwd=folder,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=60,
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("ditmoe: error: stdin is empty")]
    assert said == ["False False"] * len(commands), done.stderr


_OWN_MODULES = """
import sys
from ditmoe_cli.cli.app import run
code = run(sys.argv[1:])
assert code == 0, code
own = [name for name in sys.modules if name.startswith("ditmoe_cli.")]
print("imported", len(sys.modules), *own, file=sys.stderr)
"""


def imported(*words: str, cwd: Path) -> tuple[int, set[str]]:
    """How many modules a command imports in all, and which of ours."""
    done = subprocess.run(
        [sys.executable, "-c", _OWN_MODULES, *words],
        cwd=cwd,
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    (line,) = done.stderr.splitlines()
    _, count, *own = line.split()
    return int(count), {name.removeprefix("ditmoe_cli.") for name in own}


HELP = {
    *("api", "api.notes", "api.shown_progress"),
    *(
        "cli",
        "cli.announced_imports",
        "cli.app",
        "cli.completion",
        "cli.groups",
        "cli.help_texts",
        "cli.interruption",
        "cli.machine",
        "cli.terminal",
    ),
    "cli.progress_display",
    *("control_groups", "errors", "files", "files.cleanup", "processes", "progress", "threads", "version"),
}


@pytest.mark.parametrize(("word", "most"), [("--help", 200), ("--version", 240)])
def test_the_program_alone_imports_no_command(word: str, most: int, tmp_path: Path) -> None:
    """Modules are counted instead of seconds, which a busy machine stretches: 160 of them take 0.1 s."""
    count, own = imported(word, cwd=tmp_path)
    assert own == HELP
    assert count < most


_EACH_ALONE = """
import contextlib, io, os, sys
from ditmoe_cli.cli.app import COMMANDS, run
for command in COMMANDS:
    if (child := os.fork()) == 0:
        with contextlib.redirect_stderr(io.StringIO()):
            code = run([command, "--nothing"])  # which is refused sooner than help is laid out
        called = [name for name in sys.modules if name.startswith("ditmoe_cli.cli.commands.")]
        print(code, command, *called, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_a_command_is_imported_when_it_is_called(tmp_path: Path) -> None:
    """Each in a fork of one process, to which the program is imported and no command."""
    done = subprocess.run(
        [sys.executable, "-c", _EACH_ALONE], cwd=tmp_path, env=environment(), check=True, capture_output=True, text=True
    )
    modules = {name: f"ditmoe_cli.cli.commands.{name.replace('-', '_')}" for name in COMMANDS}
    assert done.stdout.splitlines() == [f"2 {name} {module}" for name, module in modules.items()], done.stderr
