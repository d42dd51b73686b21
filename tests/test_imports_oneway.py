"""Imports point one way: cli, then the domain, then checkpoint, then errors."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "ditmoe_cli"
NAME = "ditmoe_cli"

# what each part may import from, besides itself; a new part has to be entered here
ALLOWED = {
    "errors": set(),
    "processes": {"errors"},
    "progress": set(),
    "briefs": set(),
    "control_groups": set(),
    "free_memory": {"control_groups"},
    "threads": {"control_groups"},
    "demo": set(),
    "version": set(),
    "files": {"version", "progress", "free_memory", "threads", "errors"},
    "formats": {"files", "progress", "processes", "free_memory", "errors"},
    "model": {"briefs", "formats", "files", "progress", "threads", "errors"},
    "diffusion": {"model", "files", "progress", "errors"},
    "evaluation": {
        "briefs",
        "processes",
        "free_memory",
        "diffusion",
        "model",
        "formats",
        "files",
        "progress",
        "errors",
    },
    "routing": {"briefs", "processes", "evaluation", "diffusion", "model", "formats", "files", "progress", "errors"},
    "exporting": {"diffusion", "model", "formats", "files", "progress", "errors"},
    "compression": {
        *(
            "briefs",
            "exporting",
            "routing",
            "evaluation",
            "diffusion",
            "model",
            "formats",
            "files",
            "progress",
            "version",
            "errors",
        ),
        *("processes", "threads"),
    },
    "scheduling": {"compression", "routing", "diffusion", "model", "progress", "errors"},
    "api": {
        *(
            "briefs",
            "processes",
            "scheduling",
            "compression",
            "exporting",
            "evaluation",
            "routing",
            "diffusion",
            "model",
            "formats",
            "files",
        ),
        *("briefs", "threads", "errors", "version", "progress"),
    },
    "cli": {
        *("api", "scheduling", "compression", "exporting", "evaluation", "routing"),
        *("diffusion", "model", "formats", "files"),
        *("processes", "progress", "threads", "errors", ""),
    },
    "__main__": {"cli"},
    "": {"api", "errors", "version"},  # the package itself: its lazy public interface
}
# rooms of compression whose methods share other rooms, and never import from each other
WALLED = {
    f"{NAME}.compression.{name}"
    for name in ("prune", "merge", "delta", "repair", "precision", "rounding", "heal", "distill")
}
TERMINAL = {"typer", "rich", "click"}


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def part(module: str) -> str:
    """The part of the package that a module of it belongs to."""
    return module.split(".")[1] if "." in module else ""


def room(module: str) -> str:
    """The folder of `compression` that a module stands in, such as ``ditmoe_cli.compression.prune``."""
    return ".".join(module.split(".")[:3])


def is_for_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(body: list[ast.stmt], everywhere: bool) -> Iterator[ast.stmt]:
    """Statements in `body`, nested ones too; without `everywhere` only those that run on import."""
    for node in body:
        yield node
        if not everywhere and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_typing(node)):
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, field, []), everywhere)
        for handler in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
            yield from statements(handler.body, everywhere)


def imports(module: str, everywhere: bool = True) -> set[str]:
    """The full names of the modules that `module` imports."""
    found: set[str] = set()
    for node in statements(ast.parse(MODULES[module].read_text()).body, everywhere):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import; write it out"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


def test_the_parser_sees_imports() -> None:
    """Of every kind that the package uses, so that the tests below have teeth."""
    assert "torch" in imports(f"{NAME}.files.reader"), "inside functions"
    assert "torch" not in imports(f"{NAME}.files.reader", everywhere=False)
    assert f"{NAME}.model.config" in imports(f"{NAME}.model.dit")
    assert f"{NAME}.compression.delta.differencing" in imports(f"{NAME}.compression.apply"), "of modules"
    assert "typer" in imports(f"{NAME}.cli.app")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    mine = part(module)
    assert mine in ALLOWED, f"enter {mine!r} into the table above"
    theirs = {part(name) for name in imports(module) if name.split(".")[0] == NAME}
    assert theirs - {mine} <= ALLOWED[mine]


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) not in ("cli", "__main__")])
def test_only_the_command_line_talks_to_a_terminal(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(module)} & TERMINAL


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in WALLED])
def test_methods_of_compression_do_not_know_each_other(module: str) -> None:
    assert {room(name) for name in imports(module)} & WALLED <= {room(module)}


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions count, and those for type checkers too: a circle is a circle however it is hidden."""
    edges = {module: {name for name in imports(module) if name in MODULES and name != module} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for name in sorted(edges[module]):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())
    assert done == set(MODULES)


def test_no_two_modules_have_one_name() -> None:
    """But a command's module may share the name of the one that it serves."""
    names = [name.rpartition(".")[2] for name, file in MODULES.items() if file.name != "__init__.py"]
    commands = {name.rpartition(".")[2] for name in MODULES if name.startswith(f"{NAME}.cli.commands.")}
    assert not {name for name, count in Counter(names).items() if count > 1 + (name in commands)}


def test_the_table_has_no_way_back() -> None:
    for lower, upper in ((a, b) for a, others in ALLOWED.items() for b in others if b):
        assert lower not in ALLOWED[upper], f"{lower} and {upper} may import each other"
