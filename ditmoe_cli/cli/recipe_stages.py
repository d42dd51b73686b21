"""Stages of a recipe as commands: their words, checked before the first one runs, and how they are called.

A stage is called in this process, as a command of a pipe is: it takes the stage that is handed to it, and its document
is taken in place of printed. Errors name file and stage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import typer

from ditmoe_cli.cli.app import COMMANDS, load_command
from ditmoe_cli.cli.groups import only_checked
from ditmoe_cli.cli.stage import Stage, handed_on, parse_stage
from ditmoe_cli.cli.terminal import taken_results
from ditmoe_cli.compression.plan import parse_plan
from ditmoe_cli.compression.recipe import RecipeStage
from ditmoe_cli.errors import BadInputError, DitmoeError, UsageError, did_you_mean
from ditmoe_cli.files.provenance import EXPORTING

PROFILING = "profile-experts"
WRITERS = ("convert", "prune", "merge", "quantize", "compress", "heal", "distill", "apply")
"""Commands that write a checkpoint, with which the next stage goes on."""
OF, PLAN = "of", "plan"
"""Options that a recipe alone has: of profile-experts what is profiled, and a plan in place of its file."""
_NO_STAGES = ("run", "plan")
_OWN = {
    "output": "of the last checkpoint is given to ditmoe run",
    "force": "is given to ditmoe run",
    "dry-run": "is given to ditmoe run",
    "threads": "is given to ditmoe run",
    **dict.fromkeys(("json", "text", "quiet"), "is given to ditmoe run"),
    **dict.fromkeys(("list-methods", "plan-only", "curve", "png"), "writes no checkpoint"),
}
_FREE = ("output", "png")  # of these, what commands may have that write no checkpoint
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


@dataclass(frozen=True)
class Called:
    """A stage of a recipe as a command.

    Attributes:
        stage: the stage.
        number: its place in the recipe, from 1.
        where: file and stage, for messages.
    """

    stage: RecipeStage
    number: int
    where: str

    @property
    def command(self) -> str:
        """The name of the command."""
        return self.stage.command

    @property
    def writes(self) -> bool:
        """Whether it writes a checkpoint."""
        return self.command in WRITERS

    @property
    def exports(self) -> bool:
        """Whether it writes for another program, where ``ditmoe run`` says."""
        return self.command == EXPORTING and "output" not in self.stage.options

    @property
    def of(self) -> str | None:
        """The checkpoint that is profiled, where that is not the one that the stage before made."""
        return self.stage.options.get(OF) if self.command == PROFILING else None

    @property
    def plan(self) -> Mapping[str, Any] | None:
        """The plan that stands in the recipe itself; None elsewhere."""
        plan = self.stage.options.get(PLAN)
        return plan if self.command == "apply" and isinstance(plan, dict) else None

    def with_options(self, **options: Any) -> Called:
        """Return the stage with other values of some options."""
        return replace(self, stage=replace(self.stage, options={**self.stage.options, **options}))

    def takes(self, option: str) -> bool:
        """Return whether its command has an option that it does not name."""
        return option not in self.stage.options and self.command in COMMANDS and option in _parameters(self.command)

    def references(self) -> Iterator[tuple[str, str]]:
        """Yield the options that name a checkpoint or another input of the recipe, with the name."""
        for name, value in self.stage.options.items():
            if isinstance(value, str) and value.startswith("$"):
                yield name, value

    def check(self) -> None:
        """Raise `UsageError` for an unknown command, options that it has not, and values that these refuse.

        Raises `BadInputError` for a plan that is none.
        """
        if self.command not in COMMANDS or self.command in _NO_STAGES:
            told = did_you_mean(self.command, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
            raise UsageError(f"{self.where}: no such command{told if self.command not in COMMANDS else ' of a pipe'}")
        if self.plan is not None:
            parse_plan(self.plan, f"{self.where}: plan")
        with only_checked():
            self._invoke(self.words({}))

    def with_defaults(self) -> Called:
        """Return the stage with the options that were left out, as far as its command still has them."""
        return self.with_options(**{name: value for name, value in self.stage.defaults.items() if self.takes(name)})

    def words(self, names: Mapping[str, str]) -> list[str]:
        """Return the words of its options; `names` tells what ``$names`` stand for."""
        parameters = _parameters(self.command)
        words: list[str] = []
        for name, value in self.stage.options.items():
            if name == OF and self.command == PROFILING:
                continue
            self._refuse_own(name)
            if name not in parameters:
                near = did_you_mean(name, parameters)
                raise UsageError(f"{self.where}: {self.command} has no option {name!r}{near}")
            parameter, is_on = parameters[name]
            named = names.get(value, value) if isinstance(value, str) else value
            words += self._words_of(name, named, parameter, is_on)
        return words

    def _refuse_own(self, name: str) -> None:
        if name in _OWN and (self.writes or name not in _FREE):
            raise UsageError(f"{self.where}: option {name!r} {_OWN[name]}; leave it out")

    def _words_of(self, name: str, value: object, parameter: Any, is_on: bool) -> list[str]:
        """Return an option with its value, a switch where it is on; none for null."""
        if value is None:
            return []
        if getattr(parameter, "is_flag", False):
            if not isinstance(value, bool):
                raise UsageError(f"{self.where}: option {name!r} is {value!r}; it is a switch: give true or false")
            other = parameter.secondary_opts if is_on else parameter.opts
            return [f"--{name}"] if value else list(other[:1])
        if isinstance(value, bool):
            raise UsageError(f"{self.where}: option {name!r} is {str(value).lower()}; it is no switch: give its value")
        if isinstance(value, dict):
            return [f"--{name}=-"]
        if isinstance(value, list):
            texts = list(map(_text, value))
            return [f"--{name}={text}" for text in (texts if parameter.multiple else [",".join(texts)])]
        return [f"--{name}={_text(value)}"]

    def run(self, stage: Stage, words: list[str]) -> tuple[Stage, dict[str, Any]]:
        """Call the command on a stage; return the stage that it hands on, and its result."""
        with handed_on(stage), taken_results() as documents:
            self._invoke([*words, "--json"])
        if not documents:
            raise BadInputError(f"{self.where}: gave no result")
        after = parse_stage(json.dumps(documents[-1]))
        return replace(after, piped=True), dict(documents[-1]["result"])

    def _invoke(self, words: list[str]) -> None:
        """Call the command with some words. Errors name the stage."""
        with self.naming():
            command = load_command(self.command)
            with command.make_context(self.command, words) as context:
                command.invoke(context)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Name the stage in each error."""
        try:
            yield
        except DitmoeError as error:
            if not error.message.startswith(self.where):
                error.args = (f"{self.where}: {error.message}",)
            raise
        except _ClickException as error:
            message = error.format_message() if hasattr(error, "format_message") else str(error)
            raise UsageError(f"{self.where}: {message}") from None


def _parameters(command: str) -> dict[str, tuple[Any, bool]]:
    """Return the options of a command by their long names, with whether a switch of that name turns something on."""
    found: dict[str, tuple[Any, bool]] = {}
    for parameter in load_command(command).params:
        if parameter.param_type_name == "option":
            for names, is_on in ((parameter.opts, True), (parameter.secondary_opts, False)):
                found |= {name[2:]: (parameter, is_on) for name in names if name.startswith("--")}
    return found


def _text(value: object) -> str:
    return repr(value) if isinstance(value, float) else str(value)
