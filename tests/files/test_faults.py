"""Whatever happens before any call or bytecode of a write, the target is absent, the old or the whole new one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from cli_helpers import environment
from conftest import TESTS

SCENES = {
    "a new file": ("x.safetensors",),
    "a file over an old one": ("x.safetensors", "--old"),
    "a new folder": ("x",),
    "a folder over an old one": ("x", "--old"),
    "a folder over an old one, without exchange": ("x", "--old", "--no-exchange"),
}
SLOW = [SCENES[name] for name in SCENES if name != "a file over an old one"]


def played(words: tuple[str, ...]) -> dict[str, int]:
    """Play a scene with all kinds of faults, and return how many there were of each kind."""
    done = subprocess.run(
        [sys.executable, TESTS / "support" / "writing.py", *words],
        env=environment(PYTHONPATH=f"{TESTS.parent}:{TESTS / 'support'}"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


@pytest.mark.parametrize(
    "words",
    [pytest.param(words, id=name, marks=pytest.mark.slow if words in SLOW else ()) for name, words in SCENES.items()],
)
def test_a_write_is_all_or_nothing(words: tuple[str, ...]) -> None:
    counts = played(words)
    assert counts["kills"] >= 20 and counts["signals_between"] >= 60
    assert sum(counts.values()) >= 140
