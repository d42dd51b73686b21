"""Help texts: options in named sections, examples, and summaries that are never cut."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

# those that many commands have stand last, in this order
_SHARED = ("Checkpoint", "Output", "Machine", "Printing")
_LAST = "Printing"  # the section of options without one, such as --help
_WIDEST = 30  # characters of an option's name in the left column


class SectionedCommand(TyperCommand):
    """A command whose help has a section for each group of options, and ends in examples."""

    examples: tuple[str, ...] = ()

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, section by section, in columns that line up."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(section_of(parameter), []).append(tidy(record))
        terms = [term for records in sections.values() for term, _ in records]
        width = max((len(term) for term in terms if len(term) <= _WIDEST), default=0)
        for title in sorted(sections, key=_rank):  # a stable sort
            with formatter.section(title):
                formatter.write_dl([(f"{term:<{width}}", text) for term, text in sections[title]], col_max=width)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, each in one line."""
        del ctx
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {example}\n" for example in self.examples))


def section_of(parameter: Any) -> str:
    """Return the title of the section that a parameter stands in."""
    if parameter.param_type_name == "argument":
        return "Arguments"
    return str(parameter.rich_help_panel or _LAST)


def tidy(record: tuple[str, str]) -> tuple[str, str]:
    """Return an option's name and text, with one space before its default."""
    term, text = record
    return term, re.sub(r"  \[", " [", text)


def _rank(title: str) -> int:
    if title == "Arguments":
        return -1
    return 1 + _SHARED.index(title) if title in _SHARED else 0


class Program(TyperGroup):
    """The program, whose help shows each command's whole summary."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a line for each command, or more where the terminal is narrow."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.short_help or "") for name, command in commands if command is not None])
