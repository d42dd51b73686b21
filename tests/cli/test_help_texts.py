"""Help: options in named sections, one default each, examples that work, summaries that are whole."""

from __future__ import annotations

import inspect
import os
import re
import shlex
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar
from unittest import mock

import pytest
import typer
from cli_helpers import here

from ditmoe_cli.cli.app import COMMANDS, load_command, load_program
from ditmoe_cli.cli.groups import spliced
from ditmoe_cli.cli.help_texts import SectionedCommand, section_of, tidy


def module_of(name: str) -> Any:
    return import_module(f"ditmoe_cli.cli.commands.{name.replace('-', '_')}")


def help_of(*words: str, columns: int = 100) -> str:
    with mock.patch.dict(os.environ, COLUMNS=str(columns)):
        return here(*words, "--help", cwd=Path()).out


@dataclass(frozen=True)
class Paper:
    panel: ClassVar[str] = "Paper"

    size: Annotated[str, typer.Option("--size", help="Its size.")] = "a4"
    quiet: Annotated[bool, typer.Option("--quiet", rich_help_panel="Printing", help="Say nothing.")] = False


@dataclass(frozen=True)
class Ink:
    panel: ClassVar[str] = "Ink"

    colour: Annotated[str | None, typer.Option("--with-a-colour-of-a-very-long-name", help="Its colour.")] = None


def run(paper: Paper, ink: Ink) -> None:
    """Print."""


def test_sections_are_the_panels_of_groups_with_shared_ones_last() -> None:
    program = typer.Typer(add_completion=False, rich_markup_mode=None)
    program.command(cls=SectionedCommand)(spliced(run))
    command = typer.main.get_command(program)
    command.examples = ("print --size a3",)  # type: ignore[attr-defined]
    with command.make_context("print", [], resilient_parsing=True) as context:
        assert command.get_help(context).splitlines() == [
            "Usage: print [OPTIONS]",
            "",
            "  Print.",
            "",
            "Paper:",
            "  --size <str>  Its size. [default: a4]",
            "",
            "Ink:",
            "  --with-a-colour-of-a-very-long-name <str>",
            "                Its colour.",
            "",
            "Printing:",
            "  --quiet       Say nothing.",
            "  --help        Show this message and exit.",
            "",
            "Examples:",
            "  print --size a3",
        ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_stands_in_a_named_section(name: str) -> None:
    groups = inspect.get_annotations(module_of(name).run, eval_str=True)
    assert all(getattr(group, "panel", None) or only_arguments(group) for what, group in groups.items() if group)
    command = load_command(name)
    with command.make_context(name, [], resilient_parsing=True) as context:
        sections = {section_of(parameter) for parameter in command.get_params(context)}
    assert {"Machine", "Printing"} <= sections
    assert all(f"\n{section}:\n" in help_of(name) for section in sections)


def only_arguments(group: Any) -> bool:
    """Whether a group holds no option, so that it needs no section: arguments have one of their own."""
    hints = inspect.get_annotations(group, eval_str=True).values()
    return not any(isinstance(part, typer.models.OptionInfo) for hint in hints for part in hint.__metadata__)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_states_two_defaults(name: str) -> None:
    command = load_command(name)
    with command.make_context(name, [], resilient_parsing=True) as context:
        records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    assert not [record for record in records if record and record[1].count("[default: ") > 1]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_commands_that_parse(name: str) -> None:
    """Each example has this command in it, and every command of its pipe takes the words that it is given."""
    examples = module_of(name).EXAMPLES
    assert examples
    text = help_of(name)
    for example in examples:
        assert f"\n  {example}\n" in text, "in one line, to be copied"
        assert len(example) <= 98
        called = [parse(stage) for stage in example.partition(" > ")[0].split(" | ")]
        assert name in called or (name, called) in (("plan", ["prune"]), ("run", ["inspect"])), "or makes what it takes"


def parse(stage: str) -> str:
    """Parse a command as the program does, without running it; return its name."""
    words = shlex.split(stage)
    start = words.index("ditmoe_cli") if words[0] == "torchrun" else 0
    assert words[start] in ("ditmoe", "ditmoe_cli"), stage
    name, *rest = words[start + 1 :]
    with load_command(name).make_context(name, rest):
        return name


def test_an_example_with_a_slip_would_be_seen() -> None:
    with pytest.raises(typer.BadParameter.__mro__[2]):
        parse("ditmoe prune ckpt.pt --kepp 0.5")


@pytest.mark.parametrize("columns", [20, 60, 80, 200])
def test_summaries_are_whole_at_every_width(columns: int) -> None:
    text = re.sub(r"\s+", " ", help_of(columns=columns))
    assert all(f"{name} {summary}" in text for name, summary in COMMANDS.items())
    assert "..." not in text.replace("[ARGS]...", "")


def test_one_space_stands_before_a_default() -> None:
    assert tidy(("--a", "What.  [default: 3]")) == ("--a", "What. [default: 3]")


def test_a_bare_program_prints_its_help_and_ends_as_a_usage_error() -> None:
    outcome = here(cwd=Path())
    assert outcome.code == 2 and outcome.out.startswith("Usage: ditmoe ")
    assert list(load_program().commands) == list(COMMANDS)
