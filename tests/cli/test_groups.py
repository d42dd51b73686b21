"""Groups of options become parameters, and are put together again."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer

from ditmoe_cli.api.argument_checks import at_least, ending, one_of
from ditmoe_cli.cli.groups import spliced
from ditmoe_cli.errors import UsageError


def halves(text: str) -> tuple[int, int]:
    try:
        left, right = map(int, text.split("|"))
    except ValueError:
        raise ValueError("give two numbers") from None
    return left, right


@dataclass(frozen=True)
class Place:
    where: Annotated[str, typer.Argument(metavar="WHERE")]
    count: Annotated[int, typer.Option("--count", callback=at_least(1), help="How many.")] = 3
    halves: Annotated[tuple[int, int], typer.Option("--halves", parser=halves)] = (1, 2)
    constant: bool = False


@dataclass(frozen=True)
class OtherPlace(Place):
    count: Annotated[int, typer.Option("-c", "--number")] = 5
    constant: Annotated[bool, typer.Option("--constant")] = False


@dataclass(frozen=True)
class Tone:
    loud: Annotated[bool, typer.Option("--loud/--soft")] = True


calls: list[tuple[Place, Tone]] = []


def run(place: Place, tone: Tone) -> None:
    """Do it."""
    calls.append((place, tone))


def run_other(place: OtherPlace) -> None:
    calls.append((place, Tone()))


def call(words: list[str], function: object = run) -> tuple[Place, Tone]:
    app = typer.Typer(add_completion=False)
    app.command()(spliced(function))  # type: ignore[arg-type]
    calls.clear()
    typer.main.get_command(app)(words, standalone_mode=False)
    (found,) = calls
    return found


def test_every_option_is_a_parameter_in_the_order_of_groups_and_fields() -> None:
    command = spliced(run)
    assert list(inspect.signature(command).parameters) == ["where", "count", "halves", "loud"]
    assert command.__doc__ == run.__doc__


def test_defaults_are_those_of_the_groups() -> None:
    assert call(["here"]) == (Place("here", 3, (1, 2)), Tone(True))


def test_values_reach_their_groups_parsed() -> None:
    words = ["here", "--count", "7", "--halves", "4|5", "--soft"]
    assert call(words) == (Place("here", 7, (4, 5)), Tone(False))


def test_a_subclass_declares_fields_anew_and_constants_can_become_options() -> None:
    assert call(["here"], run_other)[0] == OtherPlace("here", 5, (1, 2), False)
    assert call(["here", "--number", "0", "--constant"], run_other)[0] == OtherPlace("here", 0, (1, 2), True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "--count 0: must be at least 1"),
        (["--halves", "4"], "--halves 4: give two numbers"),
    ],
)
def test_a_refused_value_is_named_with_its_option(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        call(["here", *words])
    assert error.value.message == message


def test_checks_return_what_they_let_pass() -> None:
    assert at_least(0)(0) == 0
    assert one_of("a", "b")("b") == "b"
    assert ending(".png")(Path("a.png")) == Path("a.png")
    with pytest.raises(ValueError, match=r"^choose a or b$"):
        one_of("a", "b")("c")
    with pytest.raises(ValueError, match=r"^choose a, b, c$"):
        one_of("a", "b", "c")("d")
    with pytest.raises(ValueError, match=r"^give a name that ends in \.html or \.htm$"):
        ending(".html", ".htm")(Path("a.txt"))
