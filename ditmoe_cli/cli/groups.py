"""Splice groups of options into commands.

A group is a frozen dataclass whose fields are options: ``Annotated[type, typer.Option(...)]``, with a default unless
the option is required. A command is a plain function of groups::

    def run(source: Source, to: Destination, printing: Printing) -> None: ...

`spliced` turns it into the function that typer reads, with one parameter for every option. Where a command needs
another default or help text, it subclasses the group and declares that field anew. A field that is declared without an
option is a constant of the group. The group's `panel` is the title of the section in which help shows its options;
an option that belongs elsewhere names another one as its ``rich_help_panel``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import MISSING, Field, dataclass, fields
from inspect import Parameter, Signature
from typing import Annotated, Any, get_args, get_type_hints

from typer.models import ParameterInfo

from ditmoe_cli.errors import UsageError

_SETUP = "setup"  # no parameter of a command has this name
_CHECKING: ContextVar[bool] = ContextVar("checking", default=False)


@dataclass(frozen=True)
class _Option:
    """An option or argument: the name of its field, its type, its description for typer, and its default."""

    name: str
    type: Any
    info: ParameterInfo
    default: Any
    panel: str | None

    def parameter(self) -> Parameter:
        """Return the parameter that typer reads; an option with a parser is text there, and None by default."""
        info, is_text = copy(self.info), self.info.parser is not None
        info.parser = info.callback = None
        info.rich_help_panel = info.rich_help_panel or self.panel
        info.autocompletion = info.autocompletion or _completion(self.info.callback)
        return Parameter(
            self.name,
            Parameter.KEYWORD_ONLY,
            annotation=Annotated[str | None if is_text else self.type, info],
            default=None if is_text and self.default is not Parameter.empty else self.default,
        )

    def value(self, given: Any) -> Any:
        """Return what was given, parsed and checked, or the default.

        Raises `UsageError` with the option's name where its parser or callback raises `ValueError`.
        """
        if given is None:
            return self.default
        convert = self.info.parser or self.info.callback or (lambda value: value)
        try:
            return convert(given)
        except ValueError as error:
            raise UsageError(f"{self._flag} {given}: {error}") from None

    @property
    def _flag(self) -> str:
        """The option's long name."""
        names = (self.info.default, *(self.info.param_decls or ()))  # typer holds the first name as the default
        return next(name for name in names if isinstance(name, str) and name.startswith("--"))


def _completion(check: Callable[..., Any] | None) -> Callable[[str], list[str]] | None:
    """Return the function that completes a word, where the check of an option knows all its values."""
    choices: tuple[str, ...] = getattr(check, "choices", ())
    return completing(*choices) if choices else None


def _options(group: type[Any]) -> list[_Option]:
    """Return the options of a group in the order of its fields."""
    hints = get_type_hints(group, include_extras=True)
    return [
        _Option(field.name, get_args(hints[field.name])[0], info, _default(field), getattr(group, "panel", None))
        for field in fields(group)
        for info in get_args(hints[field.name])[1:]
        if isinstance(info, ParameterInfo)
    ]


def _default(field: Field[Any]) -> Any:
    return Parameter.empty if field.default is MISSING else field.default


def spliced(run: Callable[..., None], setup: type[Any] | None = None) -> Callable[..., None]:
    """Return the function of all options of the groups that `run` takes, in the order of its parameters.

    `setup` is a group of every command, though `run` may do without it; its method `apply` is called first.

    The parser or callback of an option is a function of the value that returns it, or raises `ValueError` with a hint;
    users read ``--option value: hint``. A callback with a tuple `choices` completes them in shells.
    """
    groups = get_type_hints(run)
    del groups["return"]
    if setup is not None and setup not in groups.values():
        groups[_SETUP] = setup
    options = {name: _options(group) for name, group in groups.items()}
    parameters = [option.parameter() for members in options.values() for option in members]

    def command(**given: Any) -> None:
        values = {
            name: {option.name: option.value(given[option.name]) for option in members}
            for name, members in options.items()
        }
        made = {name: group(**values[name]) for name, group in groups.items()}
        if _CHECKING.get():
            return
        for group in made.values():
            if setup is not None and isinstance(group, setup):
                group.apply()
        made.pop(_SETUP, None)
        run(**made)

    command.__doc__ = run.__doc__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return command


@contextmanager
def only_checked() -> Iterator[None]:
    """Have commands that are called parse and check the values of their options, and then do nothing."""
    before = _CHECKING.set(True)
    try:
        yield
    finally:
        _CHECKING.reset(before)


def completing(*words: str) -> Callable[[str], list[str]]:
    """Return the function that completes one of these words, for options whose value is checked later."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]
