"""What `import ditmoe_cli` offers: names and signatures are pinned; run as a program, this file writes them anew.

The types of test_public_types.py too.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import ditmoe_cli

PINNED = Path(__file__).with_name("public_surface.txt")
ASKED_FOR = {
    *("load_model", "open_checkpoint", "profile", "read_profile", "plan_prune", "plan_merge", "plan_quantize"),
    *("compress", "size_curve", "apply", "heal", "distill", "sample", "score", "compare", "bench", "report"),
    *("schedule", "sensitivity", "inspect", "convert", "export", "quiet"),
}
# the command that a function does the work of
COMMANDS = {
    "profile": "profile-experts",
    "plan_prune": "prune",
    "plan_merge": "merge",
    "plan_quantize": "quantize",
    "compress": "compress",
    "size_curve": "compress",
    "apply": "apply",
    "heal": "heal",
    "distill": "distill",
    "sample": "sample",
    "schedule": "schedule",
    "score": "fid",
    "compare": "compare",
    "bench": "bench",
    "inspect": "inspect",
    "convert": "convert",
    "export": "export",
    "report": "report",
    "sensitivity": "report-sensitivity",
}
OF_THE_TERMINAL = {
    *("help", "json", "text", "quiet", "threads", "weights_memory", "list_methods", "plan_only", "curve"),
    "recipe",  # of what inspect returns
    *("heads", "top_k", "sampler", "num_classes"),  # of open_checkpoint
    *("max", "max_error", "max_memory", "max_ratio", "same"),  # exit codes
}
WITHOUT_CURVE = {"max_damage", "heal", "steps", "minutes", "clock", "output", "max_shard_size", "dry_run"}
TO_WRITE = {"output", "force", "max_shard_size"}  # of commands that plan and write; in Python `apply` writes


def lines() -> Iterator[str]:
    """One line for each public name, and one for each argument."""
    for name in dir(ditmoe_cli):
        value = getattr(ditmoe_cli, name)
        if not inspect.isfunction(value):
            yield f"{name}"
            continue
        signature = inspect.signature(value)
        yield f"{name} -> {signature.return_annotation}"
        for parameter in signature.parameters.values():
            star = "*, " if parameter.kind is parameter.KEYWORD_ONLY else ""
            yield f"    {star}{parameter}"


def test_names_and_signatures_are_pinned() -> None:
    """Whoever changes them says so in the CHANGELOG, and runs this file."""
    assert list(lines()) == PINNED.read_text().splitlines()


def test_dir_shows_what_there_is() -> None:
    assert set(dir(ditmoe_cli)) == {*ASKED_FOR, "DitmoeError", "__version__"} == set(ditmoe_cli.__all__)
    for name in ditmoe_cli.__all__:
        assert getattr(ditmoe_cli, name) is not None


def test_no_name_is_that_of_a_module() -> None:
    """Importing a module would set it in place of the function."""
    folder = Path(ditmoe_cli.__file__).parent
    assert not {path.stem for path in folder.iterdir()} & ASKED_FOR


def test_an_unknown_name_is_said() -> None:
    with pytest.raises(AttributeError, match="'ditmoe_cli' has no attribute 'prune'"):
        ditmoe_cli.prune  # noqa: B018


def test_importing_imports_nothing_heavy() -> None:
    """Neither do the functions themselves, before they are called."""
    code = (
        "import sys, ditmoe_cli; first = len(sys.modules); dir(ditmoe_cli); "
        "[getattr(ditmoe_cli, name) for name in ditmoe_cli.__all__]; "
        "print(first, *[name for name in ('torch', 'numpy', 'typer', 'rich', 'tqdm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, *heavy = done.stdout.split()
    assert int(count) < 80 and heavy == []


@pytest.mark.parametrize("name", sorted(ASKED_FOR - {"quiet"}))
def test_every_function_is_documented(name: str) -> None:
    """The docstring names each argument, or those that they are like."""
    text = inspect.getdoc(getattr(ditmoe_cli, name)) or ""
    assert "Raise" in text and text.splitlines()[0].endswith(".")


def options(command: str) -> dict[str, Any]:
    """The options of a command by their names, each with its default."""
    from ditmoe_cli.cli.groups import _options, get_type_hints

    module = import_module(f"ditmoe_cli.cli.commands.{command.replace('-', '_')}")
    groups = {name: group for name, group in get_type_hints(module.run).items() if name != "return"}
    found = [option for group in groups.values() for option in _options(group)]
    flags = [option for option in found if type(option.info).__name__ == "OptionInfo"]
    return {option._flag.partition("/")[0].removeprefix("--").replace("-", "_"): option.default for option in flags}


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_are_the_options_of_the_command(name: str) -> None:
    parameters = inspect.signature(getattr(ditmoe_cli, name)).parameters
    ours, theirs = set(parameters), set(options(COMMANDS[name])) - OF_THE_TERMINAL
    if name == "compress":
        theirs -= {"png"}  # of --curve
    if name == "size_curve":
        theirs -= WITHOUT_CURVE
    if name == "apply":
        ours |= {"plan"}
    if name == "bench":
        theirs |= {"threads"}  # which are measured
    missing = theirs - ours - (TO_WRITE if name.startswith("plan_") else set())
    assert not missing
    positional = {"checkpoint", "other", "others", "subject", "a", "b", "profile"}
    assert not ours - theirs - positional


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_those_of_the_command(name: str) -> None:
    for option, default in options(COMMANDS[name]).items():
        parameter = inspect.signature(getattr(ditmoe_cli, name)).parameters.get(option)
        if parameter is None or parameter.default is parameter.empty:
            continue
        ours = parameter.default
        if option == "train":
            continue  # "all", which the command says as all groups
        if option == "max_shard_size":
            default = default.text
        if option.endswith("_interval"):
            default = None if default == (0.0, 1.0) else default
        assert ours == default, option


if __name__ == "__main__":
    from test_public_types import STUB, stub

    PINNED.write_text("\n".join(lines()) + "\n")
    STUB.write_text(stub())
