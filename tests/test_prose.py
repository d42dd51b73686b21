"""Rules on the package's strings, docstrings included."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "ditmoe_cli"
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def strings(file: Path) -> Iterator[str]:
    """All string constants of a module, docstrings and parts of f-strings too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_only_the_command_line_names_options() -> None:
    """Messages elsewhere mark settings (`ditmoe_cli.errors`), since Python callers read them too."""
    of_others = PACKAGE / "exporting" / "upstream_script.py"  # the options of upstream's program
    outside = [f for f in PACKAGE.rglob("*.py") if f.relative_to(PACKAGE).parts[0] != "cli" and f != of_others]
    named = {
        str(file.relative_to(PACKAGE)): options
        for file in outside
        if (options := [option for text in strings(file) for option in OPTION.findall(text)])
    }
    assert not named


def test_options_are_seen_in_the_command_line() -> None:
    commands = PACKAGE / "cli" / "commands"
    assert "--uniform" in {option for text in strings(commands / "quantize.py") for option in OPTION.findall(text)}
