"""How Python users call: arguments of wrong types and values become errors that name them, long work is shown."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from ditmoe_cli.api.argument_checks import at_least, seed_of_64_bits
from ditmoe_cli.api.devices import named_device
from ditmoe_cli.api.notes import note_nothing, told_to
from ditmoe_cli.api.shown_progress import shown_nowhere, shown_to_users
from ditmoe_cli.errors import UsageError, did_you_mean
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.processes import under_torchrun
from ditmoe_cli.progress import is_watched, watched_by

P = ParamSpec("P")
R = TypeVar("R")

AnyPath = str | Path
"""A path."""
AnyCheckpoint = str | os.PathLike[str] | Checkpoint
"""A checkpoint: a path, ``demo:digits``, ``hf:OWNER/REPO/FILE``, what `open_checkpoint` returned, or a written one."""
Seed = Annotated[int, seed_of_64_bits]
Count = Annotated[int, at_least(1)]
Device = Annotated[str, named_device]
NamedDtype = Literal["auto", "fp32", "bf16", "fp16"]

_WORDS: Mapping[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    NoneType: "None",
    Checkpoint: "an opened checkpoint",
}


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function whose arguments are checked by their annotations, and whose phases are shown.

    An annotation may be a type, a union, a `Literal`, a sequence or mapping, or ``Annotated[type, check]`` with a check
    that returns its value or raises `ValueError`. Raises `UsageError` for other values, naming the argument.
    """
    signature = inspect.signature(function)

    @cache
    def hints() -> dict[str, Any]:
        return {name: _hint(parameter.annotation, function) for name, parameter in signature.parameters.items()}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = _bound(function.__name__, signature, args, kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = checked(name, value, hints()[name])
        if is_watched():
            return function(*bound.args, **bound.kwargs)
        with watched_by(shown_to_users):
            return function(*bound.args, **bound.kwargs)

    return call


def _bound(
    name: str, signature: inspect.Signature, args: Sequence[object], kwargs: Mapping[str, object]
) -> inspect.BoundArguments:
    """Return arguments by their names. Raises `TypeError`, as Python does, naming the function and what is near."""
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        unknown = next((word for word in kwargs if word not in signature.parameters), None)
        near = did_you_mean(unknown, signature.parameters) if unknown is not None else ""
        raise TypeError(f"{name}(): {error}{near}") from None


def _hint(annotation: str, function: Callable[..., Any]) -> Any:
    """Return the type that an annotation names; anything where that is imported for type checkers alone."""
    try:
        return eval(annotation, function.__globals__)
    except NameError:
        return Any


@contextmanager
def quiet() -> Iterator[None]:
    """Show neither progress nor notes while the context lasts."""
    with told_to(note_nothing), watched_by(shown_nowhere):
        yield


def alone() -> None:
    """Raise `UsageError` in one of several processes of torchrun, whose first alone would have a result."""
    if under_torchrun():
        raise UsageError("this function works in one process; under torchrun start the command in its place")


def checked(name: str, value: object, hint: Any) -> Any:
    """Return the value of an argument as its annotation has it: numbers of numpy as Python's, lists as tuples.

    Raises `UsageError` for a value that the annotation does not allow.
    """
    try:
        return _as(hint, value)
    except TypeError:
        raise UsageError(f"⟨{name}⟩ {_shown(value)}: give {' or '.join(dict.fromkeys(_words(hint)))}") from None
    except ValueError as error:
        raise UsageError(f"⟨{name}⟩ {_shown(value)}: {error}") from None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _as(hint: Any, value: object) -> Any:
    """Return a value as a hint has it. Raises `TypeError` for another type, `ValueError` for a value out of range."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = _as(parts[0], value)
        for check in parts[1:] if found is not None else ():
            found = check(found)
        return found
    if origin in (Union, UnionType):
        return _as_one_of(parts, value)
    if origin is Literal:
        if value not in parts:
            raise ValueError(f"choose {', '.join(map(str, parts))}")
        return value
    if origin is not None and issubclass(origin, Mapping):
        return {_as(parts[0], key): _as(parts[1], each) for key, each in _instance(value, Mapping).items()}
    if origin is not None and issubclass(origin, Sequence):
        if isinstance(value, str | bytes):
            raise TypeError
        try:
            return tuple(_as(parts[0], each) for each in iter(value))  # type: ignore[call-overload]
        except TypeError:
            raise TypeError from None
    return _as_plain(Path if origin is os.PathLike else hint, value)


def _as_one_of(hints: Sequence[Any], value: object) -> Any:
    """Return a value as the first of the hints has it that allows its type."""
    refused: ValueError | None = None
    for hint in sorted(hints, key=lambda hint: hint is float):  # whole numbers stay whole where they may
        try:
            return _as(hint, value)
        except TypeError:
            continue
        except ValueError as error:
            refused = refused or error
    raise refused or TypeError


def _as_plain(hint: Any, value: object) -> Any:
    if hint is Any:
        return value
    is_number = not isinstance(value, bool)
    if hint is float and is_number and isinstance(value, Real):
        return float(value)
    if hint is int and is_number and isinstance(value, Integral):
        return int(value)
    if hint is Path and isinstance(value, os.PathLike) and isinstance(os.fspath(value), str):
        return Path(value)
    if hint in (int, float) or not isinstance(value, hint):
        raise TypeError
    return value


def _instance(value: object, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _words(hint: Any) -> Iterator[str]:
    """Yield what people may give for a hint."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from _words(parts[0])
    elif origin in (Union, UnionType):
        for part in parts:
            yield from _words(part)
    elif origin is Literal:
        yield f"one of {', '.join(map(str, parts))}"
    elif origin is os.PathLike:
        yield _WORDS[Path]
    elif origin is not None:
        yield "a mapping" if issubclass(origin, Mapping) else "a list"
    else:
        yield _WORDS.get(hint, f"a {hint.__name__}")
