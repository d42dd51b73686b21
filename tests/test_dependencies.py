"""Every third-party import of the package is declared in pyproject.toml, also those inside functions."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "ditmoe_cli"
FOR_DEVELOPERS = ("test", "lint", "peers")  # extras that the package itself must not rest on
ALIASES = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "huggingface_hub": "huggingface-hub",
    "yaml": "pyyaml",
    "triton": "torch",  # comes with torch for CUDA, and is taken where it is there
}


def called(function: ast.expr) -> str:
    """The last name of what a call calls, "" where it has none."""
    match function:
        case ast.Name(name) | ast.Attribute(attr=name):
            return name
    return ""


def imported(file: Path) -> Iterator[str]:
    """The top-level names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and called(node.func).endswith(("import_module", "find_spec")):
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value.split(".")[0]


@cache
def third_party() -> dict[str, str]:
    """Third-party modules that the package imports, each with a file that does."""
    found = {name: str(file) for file in sorted(PACKAGE.rglob("*.py")) for name in imported(file)}
    return {name: file for name, file in found.items() if name not in sys.stdlib_module_names | {"ditmoe_cli"}}


def plain(name: str) -> str:
    """The name of a distribution, as registries compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    """The distributions that pyproject.toml declares for users: dependencies and extras."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in extras.keys() - {*FOR_DEVELOPERS} for line in extras[name])]
    return {plain(re.split(r"[\s\[<>=!~;]", line)[0]) for line in lines}


def test_imports_inside_functions_are_seen() -> None:
    assert {"torch", "numpy", "scipy", "typer", "matplotlib", "bitsandbytes"} <= third_party().keys()


def test_every_third_party_import_is_declared() -> None:
    installed, known = packages_distributions(), declared()
    undeclared = {
        module: file
        for module, file in third_party().items()
        if not {plain(name) for name in (ALIASES.get(module, module), *installed.get(module, ()))} & known
    }
    assert undeclared == {}, "third-party modules, each with a file that imports it"
