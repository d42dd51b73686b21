"""What type checkers know of `import ditmoe_cli`: ``__init__.pyi`` is made of the signatures, by running this file.

A dry run has a type of its own, and what `inspect` returns depends on whether there is another checkpoint.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import ditmoe_cli

STUB = Path(ditmoe_cli.__file__).with_suffix(".pyi")
HEAD = """# The types of what `import ditmoe_cli` offers, for type checkers; written by tests/api/test_public_types.py.
# fmt: off
# ruff: noqa
"""
DRY = "dry_run"
DECIDED = ("plan_merge", "plan_prune", "plan_quantize", "schedule", "sensitivity")
"""Functions whose dry runs never find what is up to date."""
Variant = tuple[dict[str, str], str]
"""Parameters that are annotated otherwise than in the code, and what is returned then."""


def variants(name: str, returned: str) -> list[Variant]:
    """The overloads of a function."""
    if name == "inspect":
        alone, listed, two = returned.split(" | ")
        first: Variant = ({"other": "None = None", "tensors": "Literal[False] = False"}, alone)
        return [first, ({"other": "None = None"}, f"{alone} | {listed}"), ({"other": "AnyCheckpoint"}, two)]
    done, foreseen = returned.split(" | ")
    told = foreseen if name in DECIDED else returned
    return [
        ({DRY: "Literal[False] = False"}, done),
        ({DRY: "Literal[True]"}, told),
        ({DRY: "bool"}, returned),
    ]


class _Plain(ast.NodeTransformer):
    """Annotations without what checks values."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id == "Annotated":
            assert isinstance(node.slice, ast.Tuple)
            return self.visit(node.slice.elts[0])
        return self.generic_visit(node)


def plain(annotation: str) -> str:
    return ast.unparse(_Plain().visit(ast.parse(annotation, mode="eval")))


def default_of(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return ""
    is_literal = isinstance(parameter.default, str | int | float | bool | tuple | None)
    return f" = {parameter.default!r}" if is_literal else " = ..."


def declared(name: str, function: Any, variant: Variant) -> str:
    words: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        own = variant[0].get(parameter.name) or plain(parameter.annotation) + default_of(parameter)
        words.append(f"{parameter.name}: {own}")
    lines = textwrap.fill(", ".join(words), 112, break_long_words=False, break_on_hyphens=False)
    return f"@overload\ndef {name}(\n{textwrap.indent(lines, '    ')},\n) -> {variant[1]}: ...\n"


def names_in(text: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}


def origins(module: str) -> dict[str, str]:
    """Where a module has its names from."""
    tree = ast.parse(Path(import_module(module).__file__ or "").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in imported for alias in node.names}


def stub() -> str:
    """The text of ``__init__.pyi``."""
    imports: dict[str, str] = {}
    bodies: list[str] = []
    reexported: list[str] = []
    for name in ditmoe_cli.__all__:
        value = getattr(ditmoe_cli, name)
        if not inspect.isfunction(value):
            continue
        returned = inspect.signature(value).return_annotation
        if DRY not in inspect.signature(value).parameters and name != "inspect":
            reexported.append(f"from {value.__module__} import {name} as {name}")
            continue
        body = "".join(declared(name, value, variant) for variant in variants(name, returned))
        bodies.append(body)
        known = origins(value.__module__)
        for used in names_in(body) - set(dir(builtins)):
            imports[used] = known.get(used, value.__module__)
    imports |= {"overload": "typing", "Literal": "typing"}
    lines = [f"from {module} import {used}" for used, module in imports.items()]
    others = {"DitmoeError": "errors", "__version__": "version"}
    reexported += [f"from ditmoe_cli.{module} import {name} as {name}" for name, module in others.items()]
    return HEAD + "\n".join([*sorted(lines), *sorted(reexported), "", *bodies])


def test_type_checkers_know_the_signatures() -> None:
    """Whoever changes one runs this file."""
    assert STUB.read_text() == stub()


USER = """
import ditmoe_cli as ditmoe

plan = ditmoe.plan_prune("demo:digits", keep=4)
reveal_type(plan)
reveal_type(ditmoe.plan_quantize("demo:digits", bits=4, dry_run=True))
reveal_type(ditmoe.apply("demo:digits", plan))
reveal_type(ditmoe.compress("demo:digits", ratio=0.5, dry_run=True).ratio)
reveal_type(ditmoe.export("demo:digits", to="diffusers"))
reveal_type(ditmoe.heal("a", original="b", dry_run=True))
reveal_type(ditmoe.sensitivity("demo:digits", dry_run=True))
reveal_type(ditmoe.inspect("demo:digits"))
reveal_type(ditmoe.inspect("demo:digits", "b.safetensors").same)
reveal_type(ditmoe.sample("demo:digits"))
ditmoe.plan_prune("demo:digits", kep=4)
"""
REVEALED = (
    *("plan.CompressionPlan", "written_checkpoints.ForeseenCheckpoint", "written_checkpoints.WrittenCheckpoint"),
    *('"float"', "export_runs.ExportedCheckpoint", "TrainedCheckpoint | ", "sensitivity_runs.ForeseenMap"),
    *("inspection_runs.InspectedCheckpoint", '"bool"', "sample_runs.SampledImages"),
)


@pytest.mark.slow
def test_strict_users_see_types(tmp_path: Path) -> None:
    """mypy, which takes most of a minute to read torch first, knows results, and an argument that does not exist."""
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    words = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    said = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True).stdout.splitlines()
    revealed = [line for line in said if "Revealed type" in line]
    assert len(revealed) == len(REVEALED)
    assert all(expected in line for expected, line in zip(REVEALED, revealed, strict=True))
    assert any("kep" in line and "error" in line for line in said)
    assert "Any" not in "".join(revealed)


if __name__ == "__main__":
    STUB.write_text(stub())
